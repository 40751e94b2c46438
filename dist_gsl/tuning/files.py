"""Space files: Python files with base() -> RunConfig and space() -> {field: domain}, by name or by path."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path

import dist_gsl
from dist_gsl.config import RunConfig
from dist_gsl.tuning.space import Space

FOLDER = "tune_spaces"


def folders() -> list[Path]:
    """Where names are looked up: the working directory's tune_spaces/, then the one that comes with the project."""
    return [Path.cwd() / FOLDER, Path(dist_gsl.__file__).parents[1] / FOLDER]


def names() -> dict[str, Path]:
    """Every space that has a name; the working directory's win."""
    found = {file.stem: file for folder in reversed(folders()) for file in sorted(folder.glob("[!_.]*.py"))}
    return dict(sorted(found.items()))


def summary(file: Path) -> str:
    """The first line of a space file's docstring, without running it."""
    import ast

    try:
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
    except (OSError, SyntaxError, ValueError):
        return "(cannot be read)"
    return text.splitlines()[0] if text else ""


def load(name: str) -> tuple[Path, RunConfig, Space]:
    """(file, base config, space) of a space by name or path. The file is run: it is the user's own code.

    `ValueError` for an unknown name, or a file that does not give both.
    """
    known = names()
    file = Path(name) if name.endswith(".py") or "/" in name else known.get(name)
    if file is None:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}; or name a .py file"
        raise ValueError(f"tune: no space is called {name!r}; {hint}")
    if not file.is_file():
        raise ValueError(f"tune: there is no space file {file}; `dist-gsl tune --help` lists the names")
    spec = importlib.util.spec_from_file_location(f"dist_gsl_space_{file.stem.replace('-', '_')}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        base, space = module.base(), module.space()
    except ValueError as error:
        raise ValueError(f"space {file.stem}: {str(error).removeprefix('space: ')}") from error
    except Exception as error:  # the user's code may raise anything
        raise ValueError(f"space {file}: {type(error).__name__}: {error}") from error
    if not isinstance(base, RunConfig):
        raise ValueError(f"space {file}: base() returns a {type(base).__name__}, must return a run's config (RunConfig)")
    return file, base, space
