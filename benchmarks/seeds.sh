#!/bin/sh
# The README's table: three seeds of the demo and of the digits, each with its baseline, on the test split.
# Usage: seeds.sh RUNS_DIR. Runs that are finished already are reported again, not trained again.
set -eu
runs=${1:-runs}
cd "$(dirname "$0")/.."
gsl=.venv/bin/dist-gsl
for recipe in dec3-chars digits; do
    for seed in 0 1 2; do
        name="$recipe-seed$seed"
        resume=""
        [ ! -d "$runs/$name-baseline" ] || resume="--resume"
        # shellcheck disable=SC2086  # no word where there is nothing to resume
        [ -f "$runs/$name/report.json" ] || $gsl train "$recipe" --name "$name" --runs "$runs" --baseline --train.seed "$seed" $resume
        $gsl report "$runs/$name" --final
    done
done
.venv/bin/python benchmarks/seeds.py "$runs"
