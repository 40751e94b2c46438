"""Data: sources, FFCV files, and the loader that reads them in batches.

ffcv is imported only by `write`, `check` and `Loader` when they are called.
"""

from dist_gsl.data.beton import write
from dist_gsl.data.checking import check
from dist_gsl.data.config import Augment, DataConfig
from dist_gsl.data.info import BetonInfo, DataError, DatasetInfo, SplitInfo, dataset_info
from dist_gsl.data.loader import Batch, Loader
from dist_gsl.data.preparing import prepare
from dist_gsl.data.sources import SOURCES, Task

__all__ = [
    "SOURCES",
    "Augment",
    "Batch",
    "BetonInfo",
    "DataConfig",
    "DataError",
    "DatasetInfo",
    "Loader",
    "SplitInfo",
    "Task",
    "check",
    "dataset_info",
    "prepare",
    "write",
]
