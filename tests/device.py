"""Where what knows nothing of devices is tested: on a GPU where there is one."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
BACKEND = "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo"

if DEVICE.type == "cuda":
    torch.backends.cudnn.deterministic = True  # as sums on a CPU are
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def waits_are_errors() -> Iterator[None]:
    """Of the host for the device, where there is one."""
    if DEVICE.type != "cuda":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not all of them are seen
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
