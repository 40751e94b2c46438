"""BatchNorm's running statistics of a moving average, estimated. Imports torch alone.

An average of running statistics is not those of the averaged weights: while a penalty shrinks the filters, old statistics are of larger ones, and the
averaged network is at chance. Its statistics follow from its weights and the data, so here they are computed (Izmailov et al. 2018, "Averaging weights
leads to wider optima"; Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm").
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

NUM_STEPS = 16
"""Steps of training data that they are estimated from: a mean of so many batches' statistics."""


@torch.no_grad()
def estimate_statistics(model: nn.Module, parts: Iterable[Tensor]) -> None:
    """Sets the running mean and variance of every BatchNorm to the mean of those of `parts`.

    parts: images, at least one part, each as one forward pass of training has it. All other modules are as in evaluation: what dropout
    hides is not hidden there.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    was_training = model.training
    before = [(norm.momentum, norm.get_buffer("num_batches_tracked").clone()) for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's plain mean
        norm.train()
    for images in parts:
        model(images)
    for norm, (momentum, num_batches) in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.get_buffer("num_batches_tracked").copy_(num_batches)
    model.train(was_training)
