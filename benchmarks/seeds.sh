#!/bin/sh
# The README's table: three seeds of the demo and of the digits, each with its baseline, on the test split. And whether the
# demo's baseline is trained out: on validation, the same training gone on with to twice the epochs.
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
    done
done
for seed in 0 1 2; do
    baseline="dec3-chars-seed$seed-baseline" twice="dec3-chars-seed$seed-twice"
    if [ ! -d "$runs/$twice" ]; then
        cp -r "$runs/$baseline" "$runs/.$twice" && rm -f "$runs/.$twice/report.json" && mv "$runs/.$twice" "$runs/$twice"
    fi
    [ -f "$runs/$twice/report.json" ] ||
        $gsl train "$runs/$baseline/config.yaml" --name "$twice" --runs "$runs" --resume --no-tracking --train.epochs 32
done
for recipe in dec3-chars digits; do
    for seed in 0 1 2; do
        $gsl report "$runs/$recipe-seed$seed" --final
    done
done
.venv/bin/python benchmarks/seeds.py "$runs"
