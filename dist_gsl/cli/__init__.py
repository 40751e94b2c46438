"""The command line: parse, call one function, exit code. 0 done; 2 what the user gave is wrong; 1 it failed."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console

from dist_gsl import __version__, heap
from dist_gsl.cli import data, results, submit, train, tune
from dist_gsl.cli.common import OneLineParser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `dist-gsl`."""
    heap.keep_freed()  # networks are trained and timed
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    console = Console(soft_wrap=True, markup=False)  # paths may hold brackets
    handler = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(arguments, console)
    except (
        ValueError,
        FileNotFoundError,
        FileExistsError,
        NotADirectoryError,
        IsADirectoryError,
        PermissionError,
    ) as error:
        _one_line(error)
        return 2
    except (RuntimeError, OSError) as error:
        _one_line(error)
        return 1
    except _Terminated:
        print(f"dist-gsl: terminated; {_how_to_go_on(arguments)}", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print(f"dist-gsl: interrupted; {_how_to_go_on(arguments)}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, handler)


class _Terminated(KeyboardInterrupt):
    """SIGTERM: whoever runs the machine wants us to end, and everything is left as after Ctrl-C."""


def _terminate(signum: int, frame: object) -> None:
    raise _Terminated


def _one_line(error: BaseException) -> None:
    if os.environ.get("DIST_GSL_TRACEBACK"):
        raise error
    print("dist-gsl: error: " + " ".join(str(error).split()), file=sys.stderr)


def _how_to_go_on(arguments: Sequence[str]) -> str:
    command = next(iter(arguments), "")
    if command in ("train", "tune"):
        return "`--resume` goes on from the last checkpoint"
    return "the same command goes on where it was" if command == "data" else "give the same command again"


def _run(arguments: list[str], console: Console) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not options.takes_fields:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    _quiet()
    options.fields, options.command_line = rest, ["dist-gsl", *arguments]
    exit_code: int = options.run(options, console)
    return exit_code


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="dist-gsl",
        description="Train networks that find their own number of neurons, and keep only those.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dist-gsl {__version__}")
    parser.set_defaults(takes_fields=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=OneLineParser)
    for module in (data, train, tune, submit, results):
        module.add(commands)
    return parser


def _quiet() -> None:
    """Leaves the terminal to our own lines; what other libraries log as a warning on import is not the user's concern."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns of a change to come otherwise
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="No complete tensor found", module="torch.export")
    show, package = warnings.showwarning, str(Path(__file__).parent.parent)

    def one_line(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
    ) -> None:
        if filename.startswith(package):
            print(f"dist-gsl: warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = one_line
