"""BNet and BNet^C (paper section 4.1), the networks with square kernels."""

from collections import OrderedDict

from torch import nn

from dist_gsl.models.layers import assemble, conv_unit, fully_connected, scaled

BNET_BATCH_NORM = True
BNET_C_BATCH_NORM = True

_STAGES = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))
_DOWNSAMPLING = 2 ** len(_STAGES)


def bnet(
    num_classes: int,
    *,
    in_channels: int = 3,
    width: float = 1.0,
    batch_norm: bool = BNET_BATCH_NORM,
    image_size: int = 224,
) -> nn.Sequential:
    """BNet, that is VGG-B (Simonyan and Zisserman 2014, table 1, column B). Input 224 x 224 RGB.

    Shapes: (N, in_channels, image_size, image_size) -> (N, num_classes).

    | layer                 | widths   | kernel, stride, padding | output at 224 | source |
    |-----------------------|----------|-------------------------|---------------|--------|
    | conv1, conv2, pool2   | 64, 64   | 3x3, 1, 1; max 2x2      | 112 x 112     | VGG-B  |
    | conv3, conv4, pool4   | 128, 128 | same                    | 56 x 56       | VGG-B  |
    | conv5, conv6, pool6   | 256, 256 | same                    | 28 x 28       | VGG-B  |
    | conv7, conv8, pool8   | 512, 512 | same                    | 14 x 14       | VGG-B  |
    | conv9, conv10, pool10 | 512, 512 | same                    | 7 x 7         | VGG-B  |
    | fc1, fc2              | 4096     | dropout 0.5 after each  |               | VGG-B  |
    | fc3                   | classes  |                         |               | VGG-B  |

    Choices where the paper is silent: BatchNorm after every convolution (VGG-B has none; off on request);
    the size of the first FC's input follows from `image_size`, a multiple of 32.
    """
    features, in_features = _features(in_channels, width=width, batch_norm=batch_norm, image_size=image_size)
    hidden = scaled(4096, width=width)
    return assemble(features, classifier=fully_connected(in_features, hidden=(hidden, hidden), num_classes=num_classes))


def bnet_c(
    num_classes: int,
    *,
    in_channels: int = 3,
    width: float = 1.0,
    batch_norm: bool = BNET_C_BATCH_NORM,
    image_size: int = 224,
) -> nn.Sequential:
    """BNet^C: the convolutions of BNet and a single FC layer. Input 224 x 224 RGB.

    Shapes: (N, in_channels, image_size, image_size) -> (N, num_classes).

    | layer                  | widths                     | output at 224 | source             |
    |------------------------|----------------------------|---------------|--------------------|
    | conv1 ... conv10, pool | as BNet                    | 7 x 7         | paper, section 4.1 |
    | fc                     | 25088 = 7*7*512 -> classes |               | inferred           |

    Choices where the paper is silent: no global pooling before the FC (with it the paper's share of induced zeros,
    27.38 %, cannot be reached), no dropout (no hidden FC), BatchNorm as in BNet.
    """
    features, in_features = _features(in_channels, width=width, batch_norm=batch_norm, image_size=image_size)
    return assemble(features, classifier=fully_connected(in_features, num_classes=num_classes))


def _features(
    in_channels: int, *, width: float, batch_norm: bool, image_size: int
) -> "tuple[OrderedDict[str, nn.Module], int]":
    """The ten convolutions and five poolings, and the number of features they give."""
    if image_size < _DOWNSAMPLING or image_size % _DOWNSAMPLING:
        raise ValueError(
            f"BNet halves the image {len(_STAGES)} times, so image_size must be a multiple of {_DOWNSAMPLING}, "
            f"got {image_size}; resize the images to {max(1, round(image_size / _DOWNSAMPLING)) * _DOWNSAMPLING}"
        )
    features: OrderedDict[str, nn.Module] = OrderedDict()
    number = 0
    for stage in _STAGES:
        for size in stage:
            number += 1
            out_channels = scaled(size, width=width)
            features.update(
                conv_unit(
                    str(number),
                    in_channels=in_channels,
                    out_channels=out_channels,
                    kernel_size=(3, 3),
                    padding=(1, 1),
                    batch_norm=batch_norm,
                )
            )
            in_channels = out_channels
        features[f"pool{number}"] = nn.MaxPool2d(2)
    return features, in_channels * (image_size // _DOWNSAMPLING) ** 2
