"""`dist-gsl train`."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path

from rich.console import Console

from dist_gsl import storage
from dist_gsl.cli.common import Commands, add_run_options, check_paths, dry_run, where_to_look, with_overrides


def add(commands: Commands) -> None:
    train = commands.add_parser(
        "train", help="train a recipe, remove the dead neurons, report", allow_abbrev=False, add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_recipe_list(),
        description="Trains a recipe, or a run's config.yaml, on distributed workers; removes the neurons that died, proves\n"
        "that the function is the same, and reports. Every field of the config can be changed: --train.epochs 20\n"
        "(`dist-gsl train RECIPE --help` lists them).",
    )  # fmt: skip
    train.add_argument("recipe", nargs="?", help="one of the recipes below, or a config.yaml")
    train.add_argument("-h", "--help", action="store_true", help="this text; with RECIPE, its fields and their values")
    add_run_options(train, kind="run", default="RECIPE")
    train.add_argument(
        "--baseline", action="store_true", help="train the same without penalty first, and report the gap to it"
    )
    train.add_argument(
        "--target", metavar="WHAT=HOW-MUCH",
        help="what may be left, instead of a beta: neurons=50%%, params=100000, macs=30%% or latency_ms=2.5 (--train.target)",
    )
    train.add_argument(
        "--init", metavar="PATH",
        help="start from weights instead of from chance: a run's folder, a checkpoint, or a file of a state_dict (--train.init)",
    )
    train.add_argument("--baseline-run", metavar="NAME", help="report the gap to an earlier run instead")
    train.add_argument(
        "--from-trial", metavar="ID",
        help="in the place of a recipe: train the config of a search's trial to the end, such as SEARCH/trial-003;\n"
        "with no field changed its training goes on where it stopped, and the search's baseline is the baseline",
    )  # fmt: skip
    train.add_argument(
        "--dry-run", action="store_true", help="check config, shapes and cluster, without data, and stop"
    )
    train.set_defaults(run=run, takes_fields=True, format_help=train.format_help)


def _recipe_list() -> str:
    from dist_gsl.recipes import RECIPES

    width = max(len(name) for name in RECIPES)
    return "recipes:\n" + "\n".join(f"  {name:<{width}}  {recipe.summary}" for name, recipe in RECIPES.items())


def run(options: argparse.Namespace, console: Console) -> int:
    from dist_gsl import recipes

    trial = None
    if options.from_trial is not None:
        from dist_gsl.tuning import records

        trial = records.find_trial(options.runs, options.from_trial)
        if options.recipe is not None and not options.recipe.startswith("-"):
            raise ValueError(f"train: give a recipe or --from-trial, not both ({options.recipe!r})")
        options.recipe, start = f"{trial.path.parent.name}-{trial.name}", trial.config
    elif options.recipe is None or options.recipe.startswith("-"):
        if not options.help:
            raise ValueError("train: name a recipe or a config.yaml; `dist-gsl train --help` lists the recipes")
        print(options.format_help())
        return 0
    else:
        start = recipes.find(options.recipe)
    if options.target is not None:
        options.fields = [*options.fields, "--train.target", options.target]
    if options.init is not None:
        options.fields = [*options.fields, "--train.init", options.init]
    config = with_overrides(f"train {options.recipe}", start, [*options.fields, *(["--help"] if options.help else [])])
    if options.baseline and options.baseline_run:
        raise ValueError("train: give --baseline or --baseline-run, not both")
    if trial is not None and config != trial.config:
        trial = None  # another training: from its start
    elif trial is not None and not (options.baseline or options.baseline_run):
        options.baseline_run = records.baseline_of(options.runs, trial)
    if options.dry_run:
        return dry_run(options.recipe, config, console)
    from dist_gsl import experiment, report

    recipe = options.recipe
    if recipe not in recipes.RECIPES and options.from_trial is None:
        recipe = Path(recipe).parent.name
    name = options.name or f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    if (options.resume or options.start_or_resume) and not options.name:
        given = "--resume" if options.resume else "--start-or-resume"
        raise ValueError(f"train: {given} needs the --name of the run to go on with")
    check_paths(options.runs, config)
    resume = options.resume or (options.start_or_resume and experiment.is_begun(options.runs, name))
    made = experiment.run(
        config, name=name, runs_dir=options.runs, recipe=recipe, command=options.command_line, console=console,
        resume=resume, with_baseline=options.baseline, baseline_name=options.baseline_run,
        track=not options.no_tracking, continued=trial,
    )  # fmt: skip
    report.print_table([made], console)
    place = storage.remote_of(options.runs / name) or options.runs / name
    console.print(f"run: {place}   plots: in its plots/   MLflow: {where_to_look(options.runs)}", highlight=False)
    return 0
