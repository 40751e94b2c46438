"""The part of a run's config that says which network is trained."""

from dataclasses import KW_ONLY, dataclass

from dist_gsl.models.registry import check_options


@dataclass(frozen=True)
class NetworkConfig:
    """Which network; its number of classes, channels and image size follow from the data."""

    name: str = "dec3"
    """bnet, bnet-c, dec8, dec8-640, dec8-768, dec3, vit-mini, or any torchvision classifier."""

    _: KW_ONLY

    width: float = 1.0
    """Multiplier of every hidden width; 1 is the paper's network. Not for torchvision's networks."""

    batch_norm: bool | None = None
    """BatchNorm after every convolution; None is the network's own default. Not for torchvision's networks."""

    pretrained: bool = False
    """Start from torchvision's weights (torchvision's networks only) instead of from scratch."""

    def __post_init__(self) -> None:
        check_options(self.name, width=self.width, batch_norm=self.batch_norm, pretrained=self.pretrained)
