"""Runs the Dockerfile's steps without a Docker engine, in fresh Debian roots: does the image build, and does it work?

    sudo python3 docker/run_steps.py /var/tmp/image --accelerator cpu

Needs root, debootstrap and 15 GB. FROM is a debootstrap of the same release (a stage: a copy of its root), RUN and ENTRYPOINT
are chroots with the stage's environment, shell and user, COPY copies. What Docker does beyond that (layers, its cache, the
container runtime's GPU hooks, signals) is not run. The machine's own apt sources and pip settings are used, as its network
needs them; they are no part of the image. At the end the image's user runs `dist-gsl --version`, loads
what is compiled, and trains the digits for three epochs on the roots' own Python, FFCV and Ray.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

CONTEXT = Path(__file__).parents[1]
WHOLE = """
import importlib.metadata, dist_gsl, dist_gsl.kernels
from dist_gsl.data import native
assert dist_gsl.__version__ == importlib.metadata.version("dist_gsl"), f"the image holds {dist_gsl.__version__}"
dist_gsl.find_neurons, dist_gsl.kernels.cpu.library(), native.library()
"""
"""What the image holds is this package, not what its dependencies were installed by."""
SMOKE = ["train", "digits", "--name", "image", "--no-tracking", "--train.epochs", "3", "--penalty.beta.rest", "1.5",
         "--penalty.beta-schedule.start", "0", "--penalty.beta-schedule.end", "2"]  # fmt: skip


@dataclass
class Stage:
    """A root file system and what Docker remembers beside it."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    user: str = "0"
    directory: str = "/"
    entrypoint: list[str] = field(default_factory=list)


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(KEYWORD, rest) of each instruction, continuation lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for logical in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if logical.strip():
            keyword, _, rest = logical.strip().partition(" ")
            yield keyword.upper(), rest.strip()


def expanded(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda match: values.get(match[1], ""), text)


@contextlib.contextmanager
def mounted(root: Path) -> Iterator[None]:
    """The file systems that a container has."""
    points = [("proc", "proc"), ("sysfs", "sys"), ("devtmpfs", "dev"), ("tmpfs", "dev/shm")]
    done: list[Path] = []
    try:
        for kind, name in points:
            (root / name).mkdir(exist_ok=True)
            subprocess.run(["mount", "-t", kind, kind, root / name], check=True)
            done.append(root / name)
        yield
    finally:
        for point in reversed(done):
            subprocess.run(["umount", "--lazy", point], check=True)


def run(stage: Stage, command: list[str]) -> None:
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root",
                   **stage.arguments, **stage.environment}  # fmt: skip
    inside = f"cd {shlex.quote(stage.directory)} && exec {shlex.join(command)}"
    with mounted(stage.root):
        done = subprocess.run(
            ["chroot", f"--userspec={stage.user}:{stage.user}", stage.root, "/bin/sh", "-c", inside], env=environment, check=False
        )
    if done.returncode != 0:
        raise SystemExit(f"run_steps: exit code {done.returncode} of: {shlex.join(command)}")


def fresh(root: Path, release: str, base: Path) -> None:
    """A Debian root with this machine's way to its packages; made once, then copied."""
    if not (base / "etc" / "debian_version").exists():
        mirrors = subprocess.run(
            ["sh", "-c", "grep -rhE '^(deb |URIs:)' /etc/apt/sources.list /etc/apt/sources.list.d | grep -oE '[a-z+]+:/[^ ]+'"],
            capture_output=True, text=True, check=False,
        ).stdout.split()  # fmt: skip
        mirror = next(each for each in mirrors if each.rstrip("/").endswith("/debian"))
        subprocess.run(["debootstrap", "--variant=minbase", "--include=ca-certificates", release, base, mirror], check=True)
    shutil.rmtree(root, ignore_errors=True)
    subprocess.run(["cp", "-a", base, root], check=True)
    shutil.rmtree(root / "etc" / "apt", ignore_errors=True)
    for name in ("/etc/apt", "/etc/pip.conf", "/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt"):
        if Path(name).exists():
            subprocess.run(["cp", "-aLT", name, f"{root}{name}"], check=True)
    for sources in (root / "etc" / "apt" / "sources.list.d").glob("*"):
        if not re.search(r"/debian\b", sources.read_text()):  # other packages' sources, whose keys are not here
            sources.unlink()


def copy(stage: Stage, rest: str, stages: dict[str, Stage]) -> None:
    words = shlex.split(rest)
    origin = CONTEXT
    if words[0].startswith("--from="):
        origin = stages[words.pop(0).removeprefix("--from=")].root
    *sources, target = words
    place = stage.root / os.path.join(stage.directory, target).lstrip("/")
    for source in sources:
        found = origin / source.lstrip("/")
        if found.is_dir():
            shutil.copytree(found, place, dirs_exist_ok=True, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            goal = place / found.name if target.endswith("/") or place.is_dir() else place
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(found, goal)


def build(folder: Path, *, accelerator: str, release: str) -> Stage:
    """Every step of the file, in order; the last stage."""
    stages: dict[str, Stage] = {}
    given = {"ACCELERATOR": accelerator}
    everywhere: dict[str, str] = {}
    stage = None
    for keyword, rest in instructions((CONTEXT / "docker" / "Dockerfile").read_text()):
        print(f"--- {keyword} {rest}", flush=True)
        values = {**everywhere, **({} if stage is None else {**stage.arguments, **stage.environment})}
        if keyword == "ARG":
            name, _, default = rest.partition("=")
            value = given.get(name) or everywhere.get(name) or default
            (everywhere if stage is None else stage.arguments)[name] = value
        elif keyword == "FROM":
            base, _, name = expanded(rest, everywhere).partition(" AS ")
            if base in stages:
                before = stages[base]
                stage = replace(before, environment=dict(before.environment), arguments={})
            else:
                stage = Stage(folder / name)
                fresh(stage.root, release, folder / "debian")
            stages[name] = stage
        elif stage is None:
            raise SystemExit(f"run_steps: {keyword} before FROM")
        elif keyword == "SHELL":
            stage.shell = [word.strip('", ') for word in rest.strip("[]").split(",")]
        elif keyword == "ENV":
            for word in shlex.split(rest):
                name, _, value = word.partition("=")
                value = value.replace("$PATH", values.get("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"))
                stage.environment[name] = expanded(value, values)
        elif keyword == "WORKDIR":
            stage.directory = rest
            (stage.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif keyword == "USER":
            stage.user = rest
        elif keyword == "COPY":
            copy(stage, rest, stages)
        elif keyword == "RUN":
            run(stage, [*stage.shell, rest])
        elif keyword == "ENTRYPOINT":
            stage.entrypoint = [word.strip('", ') for word in rest.strip("[]").split(",")]
        elif keyword not in ("LABEL", "CMD"):
            raise SystemExit(f"run_steps: {keyword} is not understood")
    assert stage is not None
    return stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the roots are made; 15 GB")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--release", default="bookworm", help="the Debian release of the Dockerfile's base (%(default)s)")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("run_steps: chroot needs root")
    options.folder.mkdir(parents=True, exist_ok=True)
    image = build(options.folder.absolute(), accelerator=options.accelerator, release=options.release)
    run(image, [*image.entrypoint, "--version"])
    run(image, ["/opt/venv/bin/python", "-c", WHOLE])
    image.environment["RAY_AUTH_MODE"] = "disabled"  # a Ray of its own, which nobody else reaches
    run(image, [*image.entrypoint, *SMOKE])
    print("image: every step ran, and its user trained")


if __name__ == "__main__":
    main()
