"""The C++ of this package, which `pip install` compiles to modules of their own: finding one, of the version that the code beside it calls.

Such a module belongs to an environment, as FFCV does: code that is shipped to a cluster finds the one that is installed there. It is
called by ctypes and imports nothing.
"""

from __future__ import annotations

import ctypes
import importlib.util


class NotCompiledError(ImportError, RuntimeError):
    """A compiled module is missing, or is of another version than the code that calls it."""


def load(module: str, *, what: str, version: int, version_function: str, needs: str = "a compiler") -> ctypes.CDLL:
    """The library of a module, whose functions are still to be declared. `NotCompiledError` names it as `what`."""
    remedy = f"install the same dist_gsl here and on every node (pip compiles it: {needs} is needed)"
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise NotCompiledError(f"{what} {module} is missing: {remedy}")
    library = ctypes.CDLL(spec.origin)
    installed = library[version_function]()
    if installed != version:
        raise NotCompiledError(f"{what} {spec.origin} is of version {installed}, this code needs {version}: {remedy}")
    return library
