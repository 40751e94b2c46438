"""Networks by name: those of the paper, and any other classifier of torchvision."""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from dist_gsl.models.bnet import bnet, bnet_c
from dist_gsl.models.dec import dec3, dec8
from dist_gsl.models.vit import vit_mini


@dataclass(frozen=True)
class _Network:
    build: Callable[..., nn.Module]
    input_shape: tuple[int, int, int]


_NETWORKS = {
    "bnet": _Network(bnet, (3, 224, 224)),
    "bnet-c": _Network(bnet_c, (3, 224, 224)),
    "dec8": _Network(partial(dec8, last_width=512), (3, 224, 224)),
    "dec8-640": _Network(partial(dec8, last_width=640), (3, 224, 224)),
    "dec8-768": _Network(partial(dec8, last_width=768), (3, 224, 224)),
    "dec3": _Network(dec3, (1, 32, 32)),
}
_WITHOUT_BATCH_NORM = {"vit-mini": _Network(vit_mini, (1, 32, 32))}
_OWN = {**_NETWORKS, **_WITHOUT_BATCH_NORM}


def model_names() -> list[str]:
    """Names of the paper's networks. `create_model` also takes the name of any torchvision classifier."""
    return list(_NETWORKS)


def input_shape(name: str) -> tuple[int, int, int]:
    """(C, H, W) that the network takes unless told otherwise: (1, 32, 32) for dec3 and vit-mini, (3, 224, 224) for every other."""
    check_options(name)
    return _OWN[name].input_shape if name in _OWN else (3, 224, 224)


def check_options(name: str, *, width: float = 1.0, batch_norm: bool | None = None, pretrained: bool = False) -> None:
    """Raise ValueError if there is no network `name`, or if it does not take these options."""
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"width (--network.width) multiplies the layer widths and must be above 0, got {width}")
    own = ", ".join(_OWN)
    if name in _WITHOUT_BATCH_NORM and batch_norm is not None:
        raise ValueError(f"batch_norm (--network.batch-norm) is taken by {', '.join(_NETWORKS)}; {name} normalises over channels")
    if name in _OWN:
        if pretrained:
            raise ValueError(
                f"pretrained (--network.pretrained) loads torchvision's weights and {name!r} has none there: "
                "train it from scratch, or choose a torchvision network"
            )
        return
    # torchvision takes a second to import; the paper's networks do without it.
    from dist_gsl.models.torchvision_models import torchvision_names

    if name not in torchvision_names():
        close = difflib.get_close_matches(name.lower(), [*_OWN, *torchvision_names()], n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(
            f"no network is called {name!r} (--network.name): {hint}Known are {own}, and torchvision's classifiers"
        )
    if width != 1.0:
        raise ValueError(f"width (--network.width) is taken by {own}; {name} of torchvision has fixed widths")
    if batch_norm is not None:
        raise ValueError(
            f"batch_norm (--network.batch-norm) is taken by {', '.join(_NETWORKS)}; {name} of torchvision is built with or without it"
        )


def create_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int | None = None,
    width: float = 1.0,
    batch_norm: bool | None = None,
    image_size: int | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """Build a network: one of `model_names()`, "vit-mini", or any torchvision classifier.

    Shapes: the network maps (N, in_channels, image_size, image_size) to (N, num_classes); where those are not given
    they are those of `input_shape(name)`.

    Args:
        name: the network.
        num_classes: width of the last layer.
        in_channels: channels of the images.
        width: multiplier of every hidden width, convolutions and FC (rounded, at least 1); not torchvision's networks.
        batch_norm: BatchNorm after every convolution, which then has no bias; None is the network's default; the
            paper's networks only.
        image_size: height and width of the images.
        pretrained: start from torchvision's weights, but for the last layer if num_classes is not theirs; torchvision's
            networks only.

    Raises:
        ValueError: an unknown name, or an option or size which that network does not take.
    """
    check_options(name, width=width, batch_norm=batch_norm, pretrained=pretrained)
    for option, value in (("num_classes", num_classes), ("in_channels", in_channels), ("image_size", image_size)):
        if value is not None and value < 1:
            raise ValueError(f"{option} of {name} must be at least 1, got {value}")
    channels, height, _ = input_shape(name)
    channels = channels if in_channels is None else in_channels
    if name not in _OWN:
        from dist_gsl.models.torchvision_models import torchvision_model

        return torchvision_model(
            name, num_classes=num_classes, in_channels=channels, image_size=image_size, pretrained=pretrained
        )
    options: dict[str, Any] = {} if batch_norm is None else {"batch_norm": batch_norm}
    return _OWN[name].build(
        num_classes,
        in_channels=channels,
        width=width,
        image_size=height if image_size is None else image_size,
        **options,
    )
