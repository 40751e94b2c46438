"""A vision transformer small enough for a CPU, built from torchvision's."""

from torch import nn

PATCH = 4
HEADS = 4
LAYERS = 4
HEAD_WIDTH = 16
MLP_WIDTH = 256


def vit_mini(num_classes: int, *, in_channels: int, width: float, image_size: int) -> nn.Module:
    """Four layers of four heads on patches of 4 x 4: (N, in_channels, image_size, image_size) -> (N, num_classes); 0.2 million parameters at
    width 1. `width` multiplies a head's width and that of the hidden layers of the MLPs. `ValueError` for a size that patches do not cover."""
    from torchvision.models import VisionTransformer  # a second to import

    from dist_gsl.models.torchvision_models import replace_first_conv

    if image_size % PATCH:
        raise ValueError(f"image_size of vit-mini must be a multiple of {PATCH}, got {image_size}")
    model = VisionTransformer(
        image_size=image_size, patch_size=PATCH, num_layers=LAYERS, num_heads=HEADS, hidden_dim=HEADS * max(1, round(HEAD_WIDTH * width)),
        mlp_dim=max(1, round(MLP_WIDTH * width)), num_classes=num_classes,
    )  # fmt: skip
    # torchvision starts the head at zero, and with it every gradient behind it.
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    if in_channels != 3:
        replace_first_conv(model, name="vit-mini", in_channels=in_channels, keep_filters=False)
    return model
