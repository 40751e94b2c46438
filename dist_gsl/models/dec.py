"""Dec8 and Dec3 (paper section 4.1), the networks of decomposed convolutions: a k x 1 layer, then a 1 x k layer."""

from collections import OrderedDict

from torch import nn

from dist_gsl.models.layers import assemble, decomposed_pair, fully_connected, scaled

DEC8_BATCH_NORM = True
DEC3_BATCH_NORM = True

_DEC8_SMALLEST_IMAGE = 32
_DEC3_IMAGE = 32


def dec8(
    num_classes: int,
    *,
    last_width: int = 512,
    in_channels: int = 3,
    width: float = 1.0,
    batch_norm: bool = DEC8_BATCH_NORM,
    image_size: int = 224,
) -> nn.Sequential:
    """Dec8-M, M = `last_width`: 512 (plain Dec8), 640 or 768 in the paper. Input 224 x 224 RGB.

    Shapes: (N, in_channels, H, W), H and W at least 32 -> (N, num_classes). Any such size fits one network, because
    the features are averaged over the image; `image_size` is only checked.

    | pair | widths   | k  | stride, pooling    | output at 224 | source of k |
    |------|----------|----|--------------------|---------------|-------------|
    | 1    | 32, 64   | 11 | 2, then max 2x2    | 56 x 56       | chosen      |
    | 2    | 128, 256 | 7  | max 2x2            | 28 x 28       | chosen      |
    | 3    | 384, 384 | 3  |                    | 28 x 28       | inferred    |
    | 4    | 512, 512 | 3  | max 2x2            | 14 x 14       | inferred    |
    | 5    | M, M     | 3  |                    | 14 x 14       | inferred    |
    | 6    | M, M     | 3  | max 2x2            | 7 x 7         | inferred    |
    | 7, 8 | M, M     | 3  |                    | 7 x 7         | inferred    |
    | fc   | classes  |    | after the mean of each channel |   | chosen      |

    The widths are the paper's, k = 3 in pairs 3 to 8 is inferred from its tables. Choices where it is silent: k of the
    pairs 1 and 2 (of 11, 7, 5 and 3, which all fit; together they hold under 4 % of the convolution parameters at
    M = 512); stride 2 in pair 1, split as (2, 1) and (1, 2); padding (k-1)/2; where to pool: down to the 7 x 7 of VGG,
    early enough that the wide pairs see small maps; global average pooling before the only FC; BatchNorm after each of
    the 16 convolutions.
    """
    if image_size < _DEC8_SMALLEST_IMAGE:
        raise ValueError(
            f"Dec8 halves the image 5 times, so image_size must be at least {_DEC8_SMALLEST_IMAGE}, got {image_size}; "
            "enlarge the images"
        )
    m = last_width
    # pair: (vertical, horizontal, k, stride, max-pooling after it)
    pairs = (
        (32, 64, 11, 2, True),
        (128, 256, 7, 1, True),
        (384, 384, 3, 1, False),
        (512, 512, 3, 1, True),
        (m, m, 3, 1, False),
        (m, m, 3, 1, True),
        (m, m, 3, 1, False),
        (m, m, 3, 1, False),
    )
    features: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (vertical, horizontal, kernel_size, stride, pool) in enumerate(pairs, start=1):
        out_channels = (scaled(vertical, width=width), scaled(horizontal, width=width))
        features.update(
            decomposed_pair(
                str(number),
                in_channels=in_channels,
                out_channels=out_channels,
                kernel_size=kernel_size,
                stride=stride,
                padding=kernel_size // 2,
                batch_norm=batch_norm,
            )
        )
        in_channels = out_channels[1]
        if pool:
            features[f"pool{number}"] = nn.MaxPool2d(2)
    features["avgpool"] = nn.AdaptiveAvgPool2d(1)
    return assemble(features, classifier=fully_connected(in_channels, num_classes=num_classes))


def dec3(
    num_classes: int,
    *,
    in_channels: int = 1,
    width: float = 1.0,
    batch_norm: bool = DEC3_BATCH_NORM,
    image_size: int = _DEC3_IMAGE,
) -> nn.Sequential:
    """Dec3, the network for the ICDAR characters. Input 32 x 32 grey.

    Shapes: (N, in_channels, 32, 32) -> (N, num_classes); 36 classes in the paper.

    | pair | widths   | k | padding | pooling | output  | source of k |
    |------|----------|---|---------|---------|---------|-------------|
    | 1    | 48, 96   | 9 | 4       | max 2x2 | 16 x 16 | inferred    |
    | 2    | 160, 256 | 9 | 4       | max 2x2 | 8 x 8   | inferred    |
    | 3    | 512, 512 | 8 | 0       |         | 1 x 1   | inferred    |
    | fc   | classes  |   |         |         |         | paper       |

    The widths are the paper's; k, padding and pooling are inferred: they reproduce its table of zeros. Choices where
    it is silent: a ReLU after each half of a pair, the last too; BatchNorm after each (off on request).
    """
    if image_size != _DEC3_IMAGE:
        raise ValueError(
            f"dec3 takes images of {_DEC3_IMAGE} x {_DEC3_IMAGE} only, got image_size {image_size}; "
            f"resize the images to {_DEC3_IMAGE}"
        )
    # pair: (vertical, horizontal, k, padding, max-pooling after it)
    pairs = ((48, 96, 9, 4, True), (160, 256, 9, 4, True), (512, 512, 8, 0, False))
    features: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (vertical, horizontal, kernel_size, padding, pool) in enumerate(pairs, start=1):
        out_channels = (scaled(vertical, width=width), scaled(horizontal, width=width))
        features.update(
            decomposed_pair(
                str(number),
                in_channels=in_channels,
                out_channels=out_channels,
                kernel_size=kernel_size,
                padding=padding,
                batch_norm=batch_norm,
            )
        )
        in_channels = out_channels[1]
        if pool:
            features[f"pool{number}"] = nn.MaxPool2d(2)
    return assemble(features, classifier=fully_connected(in_channels, num_classes=num_classes))
