"""Data: sources, FFCV files, and the loader that reads them in batches.

ffcv is imported only by `write`, `check` and `Loader` when they are called.
"""

from dist_gsl.data.beton import write
from dist_gsl.data.checking import check, decode_all
from dist_gsl.data.config import Augment, DataConfig
from dist_gsl.data.info import BetonInfo, DataError, DatasetInfo, Skipped, SplitInfo, dataset_info
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
    "Skipped",
    "SplitInfo",
    "Task",
    "check",
    "dataset_info",
    "decode_all",
    "prepare",
    "write",
]
