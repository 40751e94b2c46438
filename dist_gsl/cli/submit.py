"""`dist-gsl submit` and `dist-gsl jobs`: training and searching on a Ray cluster, followed from here."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from dist_gsl import storage
from dist_gsl.cli import train, tune
from dist_gsl.cli.common import Commands, OneLineParser, with_overrides
from dist_gsl.submission import Cluster, Job, shipped, tracking_environment

FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 300.0
"""Before a failed job is submitted again, twice as long each time."""


def add(commands: Commands) -> None:
    submit = commands.add_parser(
        "submit", help="train or search on a Ray cluster", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Ships this code to a Ray cluster and runs `dist-gsl train` or `tune` there, with its output shown here.\n"
        "Paths in the command are the cluster's: --runs must be one that all its nodes see (or DIST_GSL_RUNS there);\n"
        "a config.yaml or a space file that is named is shipped along. `python SCRIPT ...` runs a script that uses this\n"
        "library, shipped with the Python files beside it.\n"
        "  dist-gsl submit --address http://HEAD:8265 --workers 8 --gpus-per-worker 1 -- train dec8-imagenet-sgl --name first\n"
        "Ctrl-C stops the job; with --no-wait it is left alone, and `dist-gsl jobs` looks after it.",
    )  # fmt: skip
    _add_address(submit)
    submit.add_argument("--workers", metavar="N|MIN:MAX", help="processes that train together, or the fewest and the most of them")
    submit.add_argument(
        "--gpus-per-worker", type=int, choices=(0, 1), help="GPUs of each worker (one if the cluster has as many)"
    )
    submit.add_argument(
        "--wait", action=argparse.BooleanOptionalAction, default=True,
        help="show the job's output until it ends, and exit with its code",
    )  # fmt: skip
    submit.add_argument(
        "--retry", type=int, default=0, metavar="N",
        help="submit a job that failed again, up to N times, each going on from its last checkpoint (%(default)s); a script begins anew",
    )  # fmt: skip
    submit.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- train|tune|python ...", help="what is to be run there")
    submit.set_defaults(run=_submit)

    jobs = commands.add_parser("jobs", help="list, follow and stop what was submitted", allow_abbrev=False)
    actions = jobs.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=OneLineParser)
    _add_address(actions.add_parser("list", help="our jobs on a cluster, the newest first"))
    logs = actions.add_parser("logs", help="what a job has printed")
    stop = actions.add_parser("stop", help="ask a job to end; its last checkpoint stays")
    for action in (logs, stop):
        action.add_argument("id", metavar="ID", help="as `dist-gsl jobs list` shows it")
        _add_address(action)
    logs.add_argument("--follow", action="store_true", help="go on until the job ends")
    jobs.set_defaults(run=_jobs)


def _add_address(parser: argparse.ArgumentParser) -> None:
    given = os.environ.get("RAY_API_SERVER_ADDRESS")
    parser.add_argument(
        "--address", default=given, required=given is None,
        help="the cluster's job server, such as http://HEAD:8265 (RAY_API_SERVER_ADDRESS)",
    )  # fmt: skip


def _submit(options: argparse.Namespace, console: Console) -> int:
    arguments = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    is_script = arguments[:1] == ["python"]
    if is_script and (options.workers is not None or options.gpus_per_worker is not None):
        raise ValueError("submit: --workers and --gpus-per-worker are of train and tune; a script says itself what it needs")
    if options.workers is not None:
        arguments = [*arguments, "--workers", options.workers]
    if options.gpus_per_worker is not None:
        arguments = [*arguments, "--workers.gpu", str(bool(options.gpus_per_worker))]
    if options.retry < 0 or (options.retry and not options.wait):
        raise ValueError(f"submit: --retry {options.retry} needs a number of at least 0, and to --wait for the job")
    asked = _checked_script(arguments) if is_script else _checked(arguments)
    if is_script:
        asked.name = f"{asked.script.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    elif asked.name is None:
        stem = Path(asked.given).stem if asked.given_file is None else asked.given_file.absolute().parent.name
        asked.name = f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
        arguments = [*arguments, "--name", asked.name]
    cluster = Cluster(options.address)
    environment = tracking_environment()
    if not environment and os.environ.get("MLFLOW_TRACKING_URI"):
        console.print("MLFLOW_TRACKING_URI is this machine's own: the cluster's is used", highlight=False)
    if not cluster.is_guarded:
        console.print(
            f"warning: {cluster.address} asks for no token, so whoever reaches it runs what they like there: "
            "start the cluster with RAY_AUTH_MODE=token", highlight=False,
        )  # fmt: skip
    with shipped([] if asked.given_file is None else [asked.given_file], script=asked.script if is_script else None) as (folder, names):
        if asked.given_file is not None:
            arguments = _renamed(arguments, asked.given, names[asked.given_file])
        pause_s = FIRST_PAUSE_S
        for attempt in range(options.retry + 1):
            job_id = cluster.submit(
                arguments if is_script else ["python", "-m", "dist_gsl.cli", *arguments], name=asked.name, folder=folder, environment=environment
            )
            console.print(f"job: {job_id}   dashboard: {cluster.dashboard(job_id)}", highlight=False)
            if uri := environment.get("MLFLOW_TRACKING_URI"):
                console.print(f"MLflow: {uri}", highlight=False)
            if not options.wait:
                console.print(f"follow it: dist-gsl jobs logs {job_id} --follow --address {cluster.address}", highlight=False)
                return 0
            job = _follow(cluster, job_id, console)
            if job.status != "FAILED" or job.exit_code == 2 or attempt == options.retry:
                break
            where = "" if is_script else ", from its last checkpoint"
            console.print(f"job {job_id} failed; again in {pause_s:g} s{where}", highlight=False)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            if not is_script:
                arguments = [*(each for each in arguments if each not in ("--resume", "--start-or-resume")), "--start-or-resume"]
    console.print(f"job {job_id}: {_story(job)}", highlight=False)
    return 0 if job.status == "SUCCEEDED" else job.exit_code or 1


def _checked(arguments: Sequence[str]) -> argparse.Namespace:
    """What is to be run there, as its own command would read it: what is wrong is said before anything is shipped."""
    from dist_gsl import recipes
    from dist_gsl.tuning import files

    if not arguments or arguments[0] not in ("train", "tune"):
        raise ValueError("submit: name what to run after `--`, such as `dist-gsl submit --address ADDR -- train dec3-chars`")
    asked, fields = _parse(arguments)
    if asked.help:
        raise ValueError(f"submit: `dist-gsl {asked.command} --help` tells of its options")
    given_runs = [each for each in arguments if each.partition("=")[0] == "--runs"]
    if given_runs and not asked.runs.is_absolute():
        raise ValueError(f"submit: --runs {asked.runs} must be an absolute path, one that all nodes of the cluster see")
    asked.given = asked.recipe if asked.command == "train" else asked.space
    asked.given_file = None
    if asked.command == "train" and asked.from_trial is not None:
        asked.given = asked.from_trial.replace("/", "-")
        return asked
    if asked.given is None:
        raise ValueError(f"submit: name a {'recipe' if asked.command == 'train' else 'space'} after `{asked.command}`")
    if asked.command == "train":
        start = recipes.find(asked.given)
        asked.given_file = None if asked.given in recipes.RECIPES else Path(asked.given)
    else:
        file, start, _ = files.load(asked.given)
        asked.given_file = None if asked.given in files.names() else file
    config = with_overrides(f"{asked.command} {asked.given}", start, fields)
    if config.data.dir is not None and storage.is_uri(config.data.dir):
        storage.check_address(config.data.dir)  # everybody who sees the dashboard sees the command
    return asked


def _checked_script(arguments: Sequence[str]) -> argparse.Namespace:
    script = Path(arguments[1]) if len(arguments) > 1 else None
    if script is None or script.suffix != ".py":
        raise ValueError("submit: name a script after `python`, such as benchmarks/learning/run.py")
    if not script.is_file():
        raise ValueError(f"submit: {script}: no such file")
    if script.is_absolute() or ".." in script.parts or script.parent == Path():
        raise ValueError(f"submit: {script} must lie in a folder below this one, which is shipped: go to the folder above it and name it from there")
    return argparse.Namespace(script=script, given_file=None)


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OneLineParser(prog="dist-gsl submit --", allow_abbrev=False, add_help=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=OneLineParser)
    for module in (train, tune):
        module.add(commands)
    return parser.parse_known_args(arguments)


def _renamed(arguments: Sequence[str], before: str, after: str) -> list[str]:
    """The arguments with another recipe or space; an option may have the same value."""
    for position in (i for i, each in enumerate(arguments) if each == before):
        changed = [*arguments[:position], after, *arguments[position + 1 :]]
        asked, _ = _parse(changed)
        if after == (asked.recipe if asked.command == "train" else asked.space):
            return changed
    raise AssertionError(f"{before} is not among {arguments}")


def _follow(cluster: Cluster, job_id: str, console: Console) -> Job:
    """Ctrl-C asks the job to end and waits for that; a second one leaves it to itself."""
    try:
        return cluster.follow(job_id, partial(_write, console))
    except KeyboardInterrupt:
        console.print(
            f"\nstopping job {job_id}; to leave one running, submit it with --no-wait "
            f"(Ctrl-C now leaves this one: `dist-gsl jobs logs {job_id} --follow`)", highlight=False,
        )  # fmt: skip
        with suppress(RuntimeError):
            console.print(f"job {job_id}: {_story(cluster.stop(job_id))}", highlight=False)
        raise


def _jobs(options: argparse.Namespace, console: Console) -> int:
    cluster = Cluster(options.address)
    if options.action == "list":
        jobs = cluster.jobs()
        longest = max((len(job.id) for job in jobs), default=0)
        table = Table(
            Column("job", no_wrap=True, min_width=longest),  # to be copied whole
            Column("run", overflow="fold"), Column("status", no_wrap=True, min_width=len("succeeded")),
            Column("began", overflow="fold"), "lasts", "message",
        )  # fmt: skip
        for job in jobs:
            began = "-" if job.start is None else f"{datetime.fromtimestamp(job.start):%Y-%m-%d %H:%M:%S}"
            message = job.message if job.status == "FAILED" else ""
            table.add_row(job.id, job.name, job.status.lower(), began, _duration(job), message[:120])
        console.print(table)
        return 0
    if options.action == "stop":
        console.print(f"job {options.id}: {_story(cluster.stop(options.id))}", highlight=False)
        return 0
    if not options.follow:
        console.file.write(cluster.logs(options.id))
        return 0
    job = cluster.follow(options.id, partial(_write, console))
    console.print(f"job {job.id}: {_story(job)}", highlight=False)
    return 0 if job.status == "SUCCEEDED" else job.exit_code or 1


def _write(console: Console, text: str) -> None:
    console.file.write(text)
    console.file.flush()


def _duration(job: Job) -> str:
    if job.start is None:
        return "-"
    return str(timedelta(seconds=round((job.end or time.time()) - job.start)))


def _story(job: Job) -> str:
    code = f" with exit code {job.exit_code}" if job.status == "FAILED" and job.exit_code is not None else ""
    return f"{job.status.lower()}{code} after {_duration(job)}"
