"""What is done with a trained run: `dist-gsl compact`, `report`, `evaluate`, `bench`, and `ui`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from dist_gsl import storage
from dist_gsl.cli.common import Commands, add_runs, folder_of


def add(commands: Commands) -> None:
    compact = commands.add_parser("compact", help="remove a run's dead neurons and write RUN_DIR/compact/")
    compact.add_argument("run_dir", type=folder_of(storage.local_run), metavar="RUN_DIR", help="a run's folder, or its URI")
    compact.add_argument(
        "--multiple-of", type=int, default=1, metavar="N",
        help="keep as many dead neurons, all zero, as make every width a multiple of N; a GPU may run odd widths slower than the whole network, an H100 wants 32 (%(default)s)",
    )  # fmt: skip
    compact.set_defaults(run=_compact)
    report = commands.add_parser("report", help="the table, report.json and plots of runs")
    report.add_argument(
        "run_dirs", type=folder_of(storage.local_run), nargs="+", metavar="RUN_DIR", help="a run's folder or its URI, or a search's folder"
    )
    report.add_argument("--baseline-run", metavar="NAME", help="the baseline's name (the run's own, NAME-baseline)")
    report.add_argument(
        "--final", action="store_true", help="read the test split, once you have chosen; else validation"
    )
    report.set_defaults(run=_report)
    evaluate = commands.add_parser("evaluate", help="classify your own images with a run's compact network")
    evaluate.add_argument("run_dir", type=folder_of(storage.local_run), metavar="RUN_DIR", help="a run's folder, or its URI")
    evaluate.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    evaluate.set_defaults(run=_evaluate)
    bench = commands.add_parser("bench", help="run time and memory, full against compact")
    bench.add_argument("run_dir", type=folder_of(storage.local_run), metavar="RUN_DIR", help="a run's folder, or its URI")
    bench.set_defaults(run=_bench)
    ui = commands.add_parser("ui", help="open the MLflow UI on the store in use")
    add_runs(ui)
    ui.add_argument("--port", type=int, default=5000, help="(%(default)s)")
    ui.set_defaults(run=_ui)


def _compact(options: argparse.Namespace, console: Console) -> int:
    from dist_gsl import runs

    folder = runs.RunFolder.existing(options.run_dir)
    compacted, difference = runs.compact_run(
        runs.Trained.load(folder), multiple_of=options.multiple_of, say=lambda text: console.print(text, highlight=False)
    )
    folder.push()
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
