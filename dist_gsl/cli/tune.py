"""`dist-gsl tune`."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from typing import TYPE_CHECKING

from rich.console import Console

from dist_gsl.cli.common import Commands, add_run_options, check_paths, dry_run, where_to_look, with_overrides

if TYPE_CHECKING:
    from dist_gsl.training.path import PathConfig
    from dist_gsl.tuning.records import SearchFolder


def add(commands: Commands) -> None:
    tune = commands.add_parser(
        "tune", help="search over beta, alpha and their schedules for the trade-off of accuracy and neurons",
        allow_abbrev=False, add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_space_list(),
        description="Trains many configs of a search space, each a distributed run of its own, and shows which of them no other\n"
        "beats in both accuracy and cost. Selection reads validation data alone; then train the chosen one to the end:\n"
        "  dist-gsl train --from-trial SEARCH/trial-003    dist-gsl report runs/NAME --final\n"
        "Every field of the space's base config can be changed: --train.epochs 3 (`dist-gsl tune SPACE --help` lists them).",
    )  # fmt: skip
    tune.add_argument("space", nargs="?", help="one of the spaces below, or a Python file with base() and space()")
    tune.add_argument("-h", "--help", action="store_true", help="this text; with SPACE, its config's fields")
    tune.add_argument(
        "--trials", type=int, metavar="K", help="trials in all, the baseline counted (20; resumed: as many as before)"
    )
    tune.add_argument(
        "--searcher", default="optuna", help="optuna (learns from both objectives), random, or grid (%(default)s)"
    )
    tune.add_argument(
        "--objective", default="neurons", help="what is to be low: neurons, or latency of one image (%(default)s)"
    )
    tune.add_argument(
        "--seed", type=int, default=0, help="of the search; that of each training is train.seed (%(default)s)"
    )
    tune.add_argument(
        "--path", action="store_true",
        help="the whole front from little more than one training: begin with the dense network, raise penalty.beta.rest along\n"
        "the space's range, the baseline and K - 1 points in all (11), each warm-started from the last and trained briefly",
    )  # fmt: skip
    tune.add_argument("--step-epochs", type=int, metavar="N", help="of a path: with each strength of the penalty (3)")
    tune.add_argument(
        "--finish-epochs", type=int, metavar="N", help="of a path: without penalty, from there to its network (4)"
    )
    add_run_options(tune, kind="search", default="SPACE")
    tune.add_argument("--no-baseline", action="store_true", help="leave out the first trial, which has no penalty")
    tune.add_argument("--no-stopping", action="store_true", help="train hopeless trials to their end too")
    tune.add_argument("--max-concurrent", type=int, metavar="N", help="trials at once (as many as the cluster holds)")
    tune.add_argument(
        "--max-accuracy-drop",
        type=float,
        metavar="POINTS",
        help="choose the cheapest trial within this of the baseline",
    )
    tune.add_argument(
        "--max-latency-ms", type=float, metavar="MS", help="choose among trials whose compact network is this fast"
    )
    tune.add_argument("--dry-run", action="store_true", help="check space, config and cluster, and stop")
    tune.set_defaults(run=run, takes_fields=True, format_help=tune.format_help)


def _space_list() -> str:
    from dist_gsl.tuning import files

    spaces = files.names()
    width = max(map(len, spaces), default=0)
    return "spaces:\n" + "\n".join(f"  {name:<{width}}  {files.summary(file)}" for name, file in spaces.items())


def run(options: argparse.Namespace, console: Console) -> int:
    from dist_gsl.tuning import files

    if options.space is None or options.space.startswith("-"):
        if not options.help:
            raise ValueError("tune: name a space or a .py file; `dist-gsl tune --help` lists the spaces")
        print(options.format_help())
        return 0
    file, base, space = files.load(options.space)
    base = with_overrides(f"tune {options.space}", base, [*options.fields, *(["--help"] if options.help else [])])
    if (options.resume or options.start_or_resume) and not options.name:
        given = "--resume" if options.resume else "--start-or-resume"
        raise ValueError(f"tune: {given} needs the --name of the search to go on with")
    check_paths(options.runs, base)
    from dist_gsl.tuning import driver, paths, results
    from dist_gsl.tuning import space as spaces
    from dist_gsl.tuning.records import PATH, SearchFolder, SearchSettings
    from dist_gsl.tuning.stopping import StoppingConfig

    before = SearchFolder(options.runs.absolute() / options.name) if options.name else None
    is_begun = before is not None and before.settings_file.exists()
    resume = options.resume or (options.start_or_resume and is_begun)
    if options.trials is not None:
        num_trials = options.trials
    elif before is not None and resume and is_begun:
        num_trials = before.settings().num_trials
    else:
        num_trials = POINTS_OF_A_PATH if options.path else SearchSettings.num_trials
    settings = SearchSettings(
        num_trials=num_trials, space_file=file.stem, space={}, base=base, searcher=PATH if options.path else options.searcher,
        objective=options.objective, seed=options.seed, baseline=not options.no_baseline,
        stopping=None if options.no_stopping or options.path else StoppingConfig(), path=_path(options),
    )  # fmt: skip
    if options.dry_run:
        spaces.check(space, base)
        if settings.path is not None:
            paths.values(settings, space)
        return dry_run(options.space, base, console, command="tune")
    folder = driver.search(
        settings, space, name=options.name or f"{file.stem}-{datetime.now():%Y%m%d-%H%M%S}",
        runs_dir=options.runs, console=console, command=options.command_line, resume=resume,
        track=not options.no_tracking, max_concurrent=options.max_concurrent,
    )  # fmt: skip
    front = results.load(folder)
    results.print_front(front, console)
    is_met = _show_choice(folder, options, console)
    console.print(f"search: {options.runs / folder.name}   plot: {options.runs / folder.name / results.FRONT_PLOT}"
                  f"   MLflow: {where_to_look(options.runs)}", highlight=False)  # fmt: skip
    if front.failed:
        print(f"dist-gsl: error: {len(front.failed)} of {len(front.trials)} trials failed, see above", file=sys.stderr)
    return 0 if is_met and not front.failed else 1


POINTS_OF_A_PATH = 11
"""The dense network counted."""


def _path(options: argparse.Namespace) -> PathConfig | None:
    from dist_gsl.training.path import PathConfig

    given = {"step_epochs": options.step_epochs, "finish_epochs": options.finish_epochs}
    given = {name: value for name, value in given.items() if value is not None}
    if not options.path:
        if given:
            raise ValueError(f"tune: --{next(iter(given)).replace('_', '-')} is of a path; give --path too")
        return None
    return PathConfig(**given)


def _show_choice(folder: SearchFolder, options: argparse.Namespace, console: Console) -> bool:
    """Names the trial to take: under the constraints that were given, else the knee. False if none fits."""
    from dist_gsl.tuning import results

    drop, latency = options.max_accuracy_drop, options.max_latency_ms
    if drop is None and latency is None:
        chosen, why = results.load(folder).knee, "knee of the front"
    else:
        if latency is not None:
            results.add_latencies(folder)
        chosen = results.load(folder).choose(max_accuracy_drop=drop, max_latency_ms=latency)
        why = " and ".join(
            [*([] if drop is None else [f"at most {drop:g} points below the reference"]),
             *([] if latency is None else [f"at most {latency:g} ms"])]
        )  # fmt: skip
    if chosen is None:
        console.print(f"choice ({why}): no finished trial fits; loosen the constraint or search on", highlight=False)
        return drop is None and latency is None
    name = f"{folder.name}/trial-{chosen.number:03d}"
    console.print(f"choice ({why}): {name}   to the end: dist-gsl train --from-trial {name}", highlight=False)
    return True
