# make demo: the main job on this machine. make test: the fast tests. Both set up what they need first.
PYTHON ?= python3
BIN := .venv/bin
SYSTEM_PACKAGES := g++ pkg-config libopencv-dev libturbojpeg0-dev libjpeg-dev libdeflate-dev
# Debian keeps these two apart from python3 itself.
SYSTEM_PACKAGES += $(shell $(PYTHON) -c 'import ensurepip' 2>/dev/null || echo python3-venv)
SYSTEM_PACKAGES += $(shell $(PYTHON) -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null || echo python3-dev)
# What the slow tests talk to: a real database and a real browser.
TEST_PACKAGES := postgresql chromium
# Files of tests go to so many processes: much of their time is Ray starting and hosts being missed, which needs no core.
TEST_PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile
RUNS ?= runs
DEMO ?= demo-$(shell date +%m%d-%H%M%S)

.PHONY: help setup demo seeds test test-slow lint types clean
help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: .setup-done ## install everything; does nothing twice

.setup-done: pyproject.toml constraints.txt docker/system-packages.sh dist_gsl/data/native/decode.cpp dist_gsl/kernels/proximal.cpp
	sh docker/system-packages.sh $(SYSTEM_PACKAGES)
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch .setup-done

demo: setup ## train Dec3 on rendered characters, with its baseline, and print the table (8 minutes on two cores)
	$(BIN)/dist-gsl train dec3-chars --name $(DEMO) --runs $(RUNS) --baseline

seeds: setup ## the README's three seeds of the demo and of the digits, on the test split
	sh benchmarks/seeds.sh $(RUNS)

test: setup ## the fast tests, 15 minutes at most
	$(PYTEST)

test-slow: setup ## whole zoo, every recipe, faults, searches, database, browser: 40 minutes at most
	sh docker/system-packages.sh $(TEST_PACKAGES)
	$(PYTEST) -m slow --durations 15

lint: setup ## ruff, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: setup ## mypy over library and tests
	$(BIN)/mypy

clean: ## remove what setup made
	rm -rf .venv .setup-done
