"""The data of a run, wherever they are: written, copied here, or just found."""

from pathlib import Path

from dist_gsl.data.beton import Progress, write
from dist_gsl.data.config import DataConfig
from dist_gsl.data.info import dataset_info
from dist_gsl.data.staging import stage
from dist_gsl.storage import is_uri


def prepare(config: DataConfig, *, progress: Progress | None = None) -> Path:
    """The folder on this machine with the files of `config`, which are written first where `config.dir` leaves that to us,
    and copied here first where it is a URI.

    Raises:
        ValueError: the source cannot be opened or read.
        DataError: `config.dir` names a folder without a data set, or a URI that cannot be copied.
    """
    if config.dir is not None and is_uri(config.dir):
        return stage(config.dir, progress=progress)
    directory = config.directory()
    if config.dir is None:
        write(config.source, directory, seed=config.seed, counts=config.counts(), progress=progress)
    dataset_info(directory)
    return directory
