"""Data: sources, FFCV files, and the loader that reads them in batches.

ffcv is imported only by `write`, `check` and `Loader` when they are called.
"""

from dist_gsl.data.beton import BetonInfo, DataError, DatasetInfo, check, dataset_info, write
from dist_gsl.data.config import Augment, DataConfig
from dist_gsl.data.loader import Batch, Loader
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
    "Task",
    "check",
    "dataset_info",
    "write",
]
