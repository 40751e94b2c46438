"""One process's group for all that trains here."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from tests.device import BACKEND


@pytest.fixture(autouse=True, scope="module")
def process_group() -> Iterator[None]:
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
