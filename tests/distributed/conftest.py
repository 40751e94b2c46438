"""What the tests of this folder share, started once and only if a test needs it."""

import logging
from collections.abc import Iterator

import pytest

from tests.distributed.pair import Pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    two = Pair(tmp_path_factory.mktemp("pair"))
    yield two
    two.stop()


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Two CPUs of a Ray that every command run in this process joins: starting one takes as long as a small training.

    Its workers have the environment of its start. A test that sets another, or that ends a driver, runs the command in a
    process of its own, with a Ray of its own.
    """
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # as `launch.ray_cluster` sets it
        ray.init(address="local", num_cpus=2, include_dashboard=True, log_to_driver=False, logging_level=logging.ERROR)
        yield
        ray.shutdown()
