"""The process group of a training's workers, set up by Ray Train.

Ray's own `TorchConfig` would do, but imports torch in Ray Train's controller, which never uses it: three seconds before the workers are even
asked for. And it finds a free port that somebody else may have by the time it is used, while here the first worker listens at once.

Import nothing here that imports torch; `launch` sends this module to the controller as it is, for the same reason.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig


class _ProcessGroup(Backend):
    share_cuda_visible_devices = True
    """As NCCL needs it: every worker of a node sees all of the node's GPUs that the training has."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        address, port = worker_group.execute(_listen)[0]
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) > 0 else "gloo"
        worker_group.execute(_join, backend, address, port, backend_config.timeout_s)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Who waits for a lost one does not answer. Ray ends them all after this, and hears of the first that fails."""
        if len(worker_group) > 1:
            with contextlib.suppress(GetTimeoutError):
                ray.get(worker_group.execute_async(_leave), timeout=SHUTDOWN_S)


SHUTDOWN_S = 30.0


@dataclass
class ProcessGroupConfig(BackendConfig):
    """NCCL where workers have a GPU, gloo elsewhere."""

    timeout_s: float
    """For which an operation waits for the other workers."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroup


# In the workers.


def _listen() -> tuple[str, int]:
    from dist_gsl.training import worker

    return worker.listen()


def _join(backend: str, address: str, port: int, timeout_s: float) -> None:
    from dist_gsl.training import worker

    worker.join(backend, address, port, timeout_s)


def _leave() -> None:
    from dist_gsl.training import worker

    worker.leave()
