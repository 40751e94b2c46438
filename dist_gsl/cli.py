"""The command line: parse, call one function, exit code. 0 done; 2 what the user gave is wrong; 1 it failed."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import re
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from dist_gsl import __version__
from dist_gsl.config import RunConfig

if TYPE_CHECKING:
    from dist_gsl.tuning.records import SearchFolder


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `dist-gsl`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    console = Console(soft_wrap=True, markup=False)  # paths may hold brackets
    try:
        return _run(arguments, console)
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        _one_line(error)
        return 2
    except (RuntimeError, OSError) as error:
        _one_line(error)
        return 1
    except KeyboardInterrupt:
        print("dist-gsl: interrupted; `--resume` goes on from the last checkpoint", file=sys.stderr)
        return 130


def _one_line(error: BaseException) -> None:
    if os.environ.get("DIST_GSL_TRACEBACK"):
        raise error
    print("dist-gsl: error: " + " ".join(str(error).split()), file=sys.stderr)


def _run(arguments: list[str], console: Console) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command not in ("train", "tune") and rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    _quiet()
    commands = {
        "data": _data, "compact": _compact, "report": _report, "evaluate": _evaluate, "bench": _bench, "ui": _ui,
    }  # fmt: skip
    if options.command in ("train", "tune"):
        run = _train if options.command == "train" else _tune
        return run(options, rest, arguments, console)
    return commands[options.command](options, console)


def _parser() -> argparse.ArgumentParser:
    class OneLine(argparse.ArgumentParser):
        def error(self, message: str) -> None:  # type: ignore[override]
            self.exit(2, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")

    parser = OneLine(
        prog="dist-gsl",
        description="Train networks that find their own number of neurons, and keep only those.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dist-gsl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=OneLine)

    data = commands.add_parser("data", help="write and check data files", allow_abbrev=False)
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=OneLine)
    write = actions.add_parser("write", help="write a source's splits as .beton files")
    write.add_argument(
        "source", help="chars, digits, rotated-digits, or imagefolder:PATH (PATH/train/CLASS/*.jpg, PATH/val/...)"
    )
    write.add_argument("out_dir", type=Path)
    write.add_argument("--seed", type=int, default=0, help="seed of rendered and drawn sources (%(default)s)")
    write.add_argument(
        "--max-side", type=int, default=400, help="longest side of stored colour images in pixels (%(default)s)"
    )
    write.add_argument("--jpeg-quality", type=int, default=90, help="1 to 100 (%(default)s)")
    check = actions.add_parser("check", help="is this file whole and readable?")
    check.add_argument("file", type=Path)

    train = commands.add_parser(
        "train", help="train a recipe, remove the dead neurons, report", allow_abbrev=False, add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_recipe_list(),
        description="Trains a recipe, or a run's config.yaml, on distributed workers; removes the neurons that died, proves\n"
        "that the function is the same, and reports. Every field of the config can be changed: --train.epochs 20\n"
        "(`dist-gsl train RECIPE --help` lists them).",
    )  # fmt: skip
    train.add_argument("recipe", nargs="?", help="one of the recipes below, or a config.yaml")
    train.add_argument("-h", "--help", action="store_true", help="this text; with RECIPE, its fields and their values")
    train.add_argument("--name", help="the run's name (RECIPE-DATE-TIME)")
    train.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (%(default)s)")
    train.add_argument(
        "--resume", action="store_true", help="go on with the run of this --name from its last checkpoint"
    )
    train.add_argument(
        "--baseline", action="store_true", help="train the same without penalty first, and report the gap to it"
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
    train.add_argument("--no-tracking", action="store_true", help="leave MLflow out")

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
    tune.add_argument("--seed", type=int, default=0, help="of the search; that of each training is train.seed (%(default)s)")
    tune.add_argument("--name", help="the search's name (SPACE-DATE-TIME)")
    tune.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (%(default)s)")
    tune.add_argument(
        "--resume", action="store_true", help="go on with the search of this --name; finished trials are kept"
    )
    tune.add_argument("--no-baseline", action="store_true", help="leave out the first trial, which has no penalty")
    tune.add_argument("--no-stopping", action="store_true", help="train hopeless trials to their end too")
    tune.add_argument("--max-concurrent", type=int, metavar="N", help="trials at once (as many as the cluster holds)")
    tune.add_argument(
        "--max-accuracy-drop", type=float, metavar="POINTS", help="choose the cheapest trial within this of the baseline"
    )
    tune.add_argument(
        "--max-latency-ms", type=float, metavar="MS", help="choose among trials whose compact network is this fast"
    )
    tune.add_argument("--dry-run", action="store_true", help="check space, config and cluster, and stop")
    tune.add_argument("--no-tracking", action="store_true", help="leave MLflow out")

    compact = commands.add_parser("compact", help="remove a run's dead neurons and write RUN_DIR/compact/")
    compact.add_argument("run_dir", type=Path)
    report = commands.add_parser("report", help="the table, report.json and plots of runs")
    report.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="a run's folder, or a search's")
    report.add_argument("--baseline-run", metavar="NAME", help="the baseline's name (the run's own, NAME-baseline)")
    report.add_argument(
        "--final", action="store_true", help="read the test split, once you have chosen; else validation"
    )
    evaluate = commands.add_parser("evaluate", help="classify your own images with a run's compact network")
    evaluate.add_argument("run_dir", type=Path)
    evaluate.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    bench = commands.add_parser("bench", help="run time and memory, full against compact")
    bench.add_argument("run_dir", type=Path)
    ui = commands.add_parser("ui", help="open the MLflow UI on the store in use")
    ui.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (%(default)s)")
    ui.add_argument("--port", type=int, default=5000, help="(%(default)s)")
    return parser


def _recipe_list() -> str:
    from dist_gsl.recipes import RECIPES

    width = max(len(name) for name in RECIPES)
    return "recipes:\n" + "\n".join(f"  {name:<{width}}  {recipe.summary}" for name, recipe in RECIPES.items())


def _space_list() -> str:
    from dist_gsl.tuning import files

    spaces = files.names()
    width = max(map(len, spaces), default=0)
    return "spaces:\n" + "\n".join(f"  {name:<{width}}  {files.summary(file)}" for name, file in spaces.items())


def _quiet() -> None:
    """Leaves the terminal to our own lines; what other libraries log as a warning on import is not the user's concern."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns of a change to come otherwise
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="No complete tensor found", module="torch.export")


# --- commands


def _data(options: argparse.Namespace, console: Console) -> int:
    from dist_gsl import data
    from dist_gsl.display import Steps

    if options.action == "check":
        info = data.check(options.file, full=True)
        console.print(
            f"{options.file}: {info.num_samples:,} samples, {info.channels} channel(s), whole", highlight=False
        )
        return 0
    steps = Steps(console)
    try:
        files = data.write(
            options.source,
            options.out_dir,
            seed=options.seed,
            max_side=options.max_side,
            jpeg_quality=options.jpeg_quality,
            num_workers=os.cpu_count() or 1,
            progress=steps,
        )
    finally:
        steps.close()
    for split, path in files.items():
        console.print(f"{split}: {path}", highlight=False)
    return 0


def _train(options: argparse.Namespace, rest: list[str], arguments: list[str], console: Console) -> int:
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
        _command_help("train")
        return 0
    else:
        start = recipes.find(options.recipe)
    config = _with_overrides(f"train {options.recipe}", start, [*rest, *(["--help"] if options.help else [])])
    if options.baseline and options.baseline_run:
        raise ValueError("train: give --baseline or --baseline-run, not both")
    if trial is not None and config != trial.config:
        trial = None  # another training: from its start
    elif trial is not None and not (options.baseline or options.baseline_run):
        options.baseline_run = records.baseline_of(options.runs, trial)
    if options.dry_run:
        return _dry_run(options.recipe, config, console)
    from dist_gsl import experiment, report

    recipe = options.recipe
    if recipe not in recipes.RECIPES and options.from_trial is None:
        recipe = Path(recipe).parent.name
    name = options.name or f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    if options.resume and not options.name:
        raise ValueError("train: --resume needs the --name of the run to go on with")
    made = experiment.run(
        config, name=name, runs_dir=options.runs, recipe=recipe, command=["dist-gsl", *arguments], console=console,
        resume=options.resume, with_baseline=options.baseline, baseline_name=options.baseline_run,
        track=not options.no_tracking, continued=trial,
    )  # fmt: skip
    report.print_table([made], console)
    console.print(
        f"run: {options.runs / name}   plots: {options.runs / name / 'plots'}   MLflow: dist-gsl ui", highlight=False
    )
    return 0


def _tune(options: argparse.Namespace, rest: list[str], arguments: list[str], console: Console) -> int:
    from dist_gsl.tuning import files

    if options.space is None or options.space.startswith("-"):
        if not options.help:
            raise ValueError("tune: name a space or a .py file; `dist-gsl tune --help` lists the spaces")
        _command_help("tune")
        return 0
    file, base, space = files.load(options.space)
    base = _with_overrides(f"tune {options.space}", base, [*rest, *(["--help"] if options.help else [])])
    if options.resume and not options.name:
        raise ValueError("tune: --resume needs the --name of the search to go on with")
    from dist_gsl.tuning import driver, results
    from dist_gsl.tuning import space as spaces
    from dist_gsl.tuning.records import SearchFolder, SearchSettings
    from dist_gsl.tuning.stopping import StoppingConfig

    before = SearchFolder(options.runs.absolute() / options.name) if options.resume else None
    if options.trials is not None:
        num_trials = options.trials
    elif before is not None and before.settings_file.exists():
        num_trials = before.settings().num_trials
    else:
        num_trials = SearchSettings.num_trials
    settings = SearchSettings(
        num_trials=num_trials, space_file=file.stem, space={}, base=base, searcher=options.searcher, objective=options.objective,
        seed=options.seed, baseline=not options.no_baseline, stopping=None if options.no_stopping else StoppingConfig(),
    )  # fmt: skip
    if options.dry_run:
        spaces.check(space, base)
        return _dry_run(options.space, base, console, command="tune")
    folder = driver.search(
        settings, space, name=options.name or f"{file.stem}-{datetime.now():%Y%m%d-%H%M%S}",
        runs_dir=options.runs, console=console, command=["dist-gsl", *arguments], resume=options.resume,
        track=not options.no_tracking, max_concurrent=options.max_concurrent,
    )  # fmt: skip
    front = results.load(folder)
    results.print_front(front, console)
    is_met = _show_choice(folder, options, console)
    console.print(f"search: {options.runs / folder.name}   plot: {options.runs / folder.name / results.FRONT_PLOT}"
                  "   MLflow: dist-gsl ui", highlight=False)  # fmt: skip
    if front.failed:
        print(f"dist-gsl: error: {len(front.failed)} of {len(front.trials)} trials failed, see above", file=sys.stderr)
    return 0 if is_met and not front.failed else 1


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


def _command_help(command: str) -> None:
    parser = _parser()
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    print(subparsers.choices[command].format_help())


def _with_overrides(command: str, config: RunConfig, arguments: list[str]) -> RunConfig:
    """The config with `--any.field value` applied; one line for what does not fit."""
    import tyro

    from dist_gsl.config import check_field, field_names

    known = [*field_names(), "penalty.beta.by_layer", "penalty.alpha.by_layer"]
    for argument in arguments:
        if argument.startswith("--") and argument != "--help":
            check_field(argument[2:].partition("=")[0].replace("-", "_"), known)
        elif not argument.startswith("-") and argument is arguments[0]:
            raise ValueError(
                f"{command.split()[0]}: {argument!r} is neither a field nor an option; fields look like --train.epochs 20"
            )
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                RunConfig, default=config, args=arguments, prog=f"dist-gsl {command}",
                config=(tyro.conf.EnumChoicesFromValues, tyro.conf.FlagConversionOff),
            )  # fmt: skip
    except SystemExit as stop:
        if stop.code == 0:
            raise
        # A box, drawn or not: its title, what is wrong, a rule, where help is.
        lines = [line.strip(" │|─-+╭╮╰╯") for line in complaint.getvalue().splitlines()[1:]]
        message = itertools.takewhile(bool, itertools.dropwhile(lambda line: not line, lines))
        raise ValueError(re.sub(r"^Error parsing \S+: (?=\w+: |\w+\.\w)", "", " ".join(message))) from None


def _dry_run(name: str, config: RunConfig, console: Console, *, command: str = "train") -> int:
    from dist_gsl import data, launch
    from dist_gsl.recipes import RECIPES
    from dist_gsl.training import session

    directory = config.data.directory()
    if (directory / "dataset.json").exists():
        shapes = session.shapes_of(config, data.dataset_info(directory))
    elif recipe := RECIPES.get(name) or next(
        (known for known in RECIPES.values() if known.make().data.source == config.data.source), None
    ):
        shapes = session.Shapes(recipe.channels, config.data.size or recipe.size, recipe.num_outputs)
    else:
        raise ValueError(f"{command}: --dry-run of {name} needs its data, and {directory} holds none")
    neurons = session.dry_build(config, shapes)
    for layer in neurons:
        console.print(
            f"  {layer.name:<24} {layer.num_neurons:>5} neurons of {layer.group_size:,} parameters", highlight=False
        )
    for layer_name, reason in neurons.pinned.items():
        console.print(f"  {layer_name:<24} pinned: {reason}", highlight=False)
    with launch.ray_cluster(config.workers) as resources:
        where = "a GPU each" if resources.gpu else f"{config.workers.cpus:g} CPU each"
        console.print(
            f"{name}: config and shapes fit; {resources.num_workers} workers with {where} can be had", highlight=False
        )
    return 0


def _compact(options: argparse.Namespace, console: Console) -> int:
    from dist_gsl import runs

    folder = runs.RunFolder.existing(options.run_dir)
    compacted, difference = runs.compact_run(
        runs.Trained.load(folder), say=lambda text: console.print(text, highlight=False)
    )
    left = sum(p.numel() for p in compacted.model.parameters())
    console.print(
        f"{folder.compact_dir}: {left:,} parameters; outputs differ by at most {difference:.3g} "
        f"(largest output {compacted.max_abs_output:.3g})",
        highlight=False,
    )
    return 0


def _report(options: argparse.Namespace, console: Console) -> int:
    from dist_gsl import experiment, report
    from dist_gsl.tuning import results
    from dist_gsl.tuning.records import SEARCH_FILE, SearchFolder

    searches = [path for path in options.run_dirs if (path / SEARCH_FILE).is_file()]
    if searches and options.final:
        raise ValueError(f"--final: {searches[0]} is a search, and selection never reads the test split; name a run")
    for path in searches:
        results.print_front(results.load(SearchFolder.existing(path)), console)
    reports = [
        experiment.report_again(path, final=options.final, console=console, baseline_name=options.baseline_run)
        for path in options.run_dirs
        if path not in searches
    ]
    if reports:
        report.print_table(reports, console)
    return 0


def _evaluate(options: argparse.Namespace, console: Console) -> int:
    from dist_gsl import artifact, runs

    folder = runs.RunFolder.existing(options.run_dir)
    for prediction in artifact.classify(folder.compact_dir, options.images):
        console.print(str(prediction), highlight=False)
    return 0


def _bench(options: argparse.Namespace, console: Console) -> int:
    import torch
    from rich.table import Table

    from dist_gsl import compaction, runs, timing

    trained = runs.Trained.load(runs.RunFolder.existing(options.run_dir))
    compacted = compaction.compact(trained.model, trained.neurons)
    timed = timing.compare(
        trained.model.eval(),
        compacted.model.eval(),
        example=torch.zeros(1, *trained.image_shape),
        batch_sizes=(1, 2, 8, 16, 64),
        seconds=20.0,
    )
    table = Table("batch", "full ms", "compact ms", "time saved %", title=f"run time on {timed.device}")
    for row in timed.timings:
        table.add_row(str(row.batch_size), f"{row.full_ms:.3f}", f"{row.compact_ms:.3f}", f"{row.saved_percent:.1f}")
    console.print(table)
    for what, before, after in (
        ("parameters", timed.full.parameters, timed.compact.parameters),
        ("multiply-adds", timed.full.multiply_adds, timed.compact.multiply_adds),
        ("bytes of features", timed.full.feature_bytes, timed.compact.feature_bytes),
    ):
        console.print(
            f"{what}: {before:,} -> {after:,} ({timing.saved_percent(before, after):.1f} % saved)", highlight=False
        )
    return 0


def _ui(options: argparse.Namespace, console: Console) -> int:
    from dist_gsl import tracking

    uri = tracking.create_store(options.runs)
    if uri.startswith(("http://", "https://")):
        console.print(f"the store in use is a server: open {tracking.masked(uri)}", highlight=False)
        return 0
    console.print(f"MLflow UI on http://127.0.0.1:{options.port}   (Ctrl-C ends it)", highlight=False)
    environment = {
        **os.environ, "MLFLOW_BACKEND_STORE_URI": uri,  # not an argument: it may hold a password
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # processes of its own, for what is not used here
    }  # fmt: skip
    sys.stdout.flush()
    os.execve(  # in our place, so that whoever ends this command ends the server
        sys.executable,
        [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(options.port),
         "--default-artifact-root", str(tracking.artifact_root(options.runs))],
        environment,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
