"""What several commands share: their parser, fields of the config as options, the dry run."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeAlias

from rich.console import Console

from dist_gsl import storage
from dist_gsl.config import RunConfig
from dist_gsl.storage import StorageAwayError, StorageError


class OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong and where help is."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")


Commands: TypeAlias = "argparse._SubParsersAction[OneLineParser]"
"""What `add` of each command's module gets, to add its parser to."""


def add_run_options(parser: argparse.ArgumentParser, *, kind: str, default: str) -> None:
    """The options by which a run or a search is named, found and gone on with."""
    parser.add_argument("--name", help=f"the {kind}'s name ({default}-DATE-TIME)")
    add_runs(parser)
    going_on = parser.add_mutually_exclusive_group()
    going_on.add_argument("--resume", action="store_true", help=f"go on with the {kind} of this --name")
    going_on.add_argument(
        "--start-or-resume", action="store_true",
        help=f"begin the {kind} of this --name, or go on with it where it is begun: for what starts a job again",
    )  # fmt: skip
    parser.add_argument("--no-tracking", action="store_true", help="leave MLflow out")


def add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs", type=folder_of(storage.local_folder), default=os.environ.get("DIST_GSL_RUNS", "runs"),
        help="folder of the runs, or its URI (DIST_GSL_RUNS, or else ./runs); on a cluster one that all nodes see",
    )  # fmt: skip


def folder_of(find: Callable[[str], Path]) -> Callable[[str], Path]:
    """The type of an argument that is a path or a URI; its errors in argparse's words."""

    def parse(text: str) -> Path:
        try:
            return find(text)
        except (StorageError, StorageAwayError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def where_to_look(runs_dir: Path) -> str:
    """How a person gets to see the tracking store in use."""
    from dist_gsl import tracking

    uri = tracking.tracking_uri(runs_dir)
    return tracking.masked(uri) if uri.startswith(("http://", "https://")) else "dist-gsl ui"


def check_paths(runs_dir: Path, config: RunConfig) -> None:
    """`ValueError` for a relative path in a job: its working directory is a copy of the code, deleted when it ends."""
    from dist_gsl import launch

    if not launch.is_job():
        return
    if config.data.dir is None or not storage.is_uri(config.data.dir):
        folder = config.data.directory()
        if not folder.is_absolute():
            raise ValueError(
                f"the data's folder {folder} would lie in the job's own copy of the code, which is deleted: give --data.dir an "
                "absolute path that all nodes of the cluster see, or a URI, or set DIST_GSL_DATA in the cluster's environment"
            )
    if config.train.init is not None and not Path(config.train.init).is_absolute():
        raise ValueError(f"--train.init {config.train.init} must be an absolute path, one that all nodes of the cluster see")
    if not runs_dir.is_absolute():
        raise ValueError(
            f"--runs {runs_dir} would lie in the job's own copy of the code, which is deleted: give an absolute path that "
            "all nodes of the cluster see, or set DIST_GSL_RUNS in the cluster's environment"
        )


def with_overrides(command: str, config: RunConfig, arguments: list[str]) -> RunConfig:
    """The config with `--any.field value` applied; one line for what does not fit."""
    import tyro

    from dist_gsl.config import check_field, field_names

    known = [*field_names(), "penalty.beta.by_layer", "penalty.alpha.by_layer"]
    arguments = expand_workers(arguments)
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


def expand_workers(arguments: list[str]) -> list[str]:
    """`--workers 2:8` in words of the config: at least 2, at most 8; `--workers 4`: 4."""
    found: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, given, value = argument.partition("=")
        if name != "--workers":
            found.append(argument)
            continue
        value = value if given else next(rest, "")
        matched = re.fullmatch(r"(?:(\d+):)?(\d+)", value)
        if matched is None:
            raise ValueError(f"--workers {value!r} must be a number of processes such as 4, or the fewest and the most such as 2:8")
        found += ["--workers.num", matched[2], *([] if matched[1] is None else ["--workers.min", matched[1]])]
    return found


def dry_run(name: str, config: RunConfig, console: Console, *, command: str = "train") -> int:
    """Prints a config's layers and checks that its workers can be had, without data."""
    from dist_gsl import data, launch
    from dist_gsl.data.staging import staged_folder
    from dist_gsl.recipes import RECIPES
    from dist_gsl.training import session

    given = config.data.dir
    directory = staged_folder(given) if given is not None and storage.is_uri(given) else config.data.directory()
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
