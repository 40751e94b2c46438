"""Small networks and training steps that several test files use."""

from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_gsl.models import create_model, input_shape

IMAGE = (2, 8, 8)
NUM_CLASSES = 3


def chain(*, batch_norm: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two convolutions, a flatten of 2 x 2 maps, two linear layers: (N, 2, 8, 8) -> (N, 3).

    The neurons of a layer differ in strength, so that a penalty kills a few early and others later.
    """
    torch.manual_seed(seed)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["conv1"] = nn.Conv2d(2, 6, 3, padding=1)
    if batch_norm:
        parts["bn1"] = nn.BatchNorm2d(6)
    parts["relu1"], parts["pool1"] = nn.ReLU(), nn.MaxPool2d(2)
    parts["conv2"] = nn.Conv2d(6, 8, 3, padding=1)
    if batch_norm:
        parts["bn2"] = nn.BatchNorm2d(8)
    parts["relu2"], parts["pool2"], parts["flatten"] = nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()
    parts["fc1"], parts["relu3"], parts["fc2"] = nn.Linear(8 * 4, 7), nn.ReLU(), nn.Linear(7, NUM_CLASSES)
    with torch.no_grad():
        for name in ("conv1", "bn1", "conv2", "bn2", "fc1"):
            for p in parts[name].parameters() if name in parts else ():
                p.mul_(torch.linspace(0.1, 1.5, len(p)).view(-1, *[1] * (p.dim() - 1)))
    return nn.Sequential(parts).to(dtype)


def tiny(name: str, *, batch_norm: bool | None = None) -> tuple[nn.Module, Tensor]:
    """A network of the zoo at a small width with an example input."""
    size = 32 if name == "dec3" else 64
    width = {"bnet": 1 / 64, "bnet-c": 1 / 16, "dec3": 1 / 16}.get(name, 1 / 32)
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, width=width, image_size=size, batch_norm=batch_norm)
    return model, torch.randn(2, input_shape(name)[0], size, size)


def batches(
    num: int, *, size: int = 8, seed: int = 1, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches for the same seed; class y has a mean image of its own, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(NUM_CLASSES, *IMAGE, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    for _ in range(num):
        y = torch.randint(NUM_CLASSES, (size,), generator=generator)
        noise = torch.randn(size, *IMAGE, generator=generator, dtype=torch.float64)
        yield (means[y] + 0.5 * noise).to(dtype), y


def train_step(model: nn.Module, step: Callable[[], object], batch: tuple[Tensor, Tensor]) -> float:
    """Forward, backward, `step()`; the loss before it."""
    model.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    step()
    return float(loss.detach())
