"""What the tests of this folder share, started once and only if a test needs it."""

from collections.abc import Iterator

import pytest

from dist_gsl import launch
from dist_gsl.training.config import WorkersConfig
from tests.distributed.pair import Pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    two = Pair(tmp_path_factory.mktemp("pair"))
    yield two
    two.stop()


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of this machine that every command run in this process joins: starting one takes as long as a small training.

    Its workers have the environment of its start. A test that sets another, or that ends a driver, runs the command in a
    process of its own, with a Ray of its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with launch.ray_cluster(WorkersConfig(), dashboard=True):
            yield
