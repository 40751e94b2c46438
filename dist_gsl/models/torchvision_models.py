"""Any classifier of torchvision by its name, with other classes, other input channels, or torchvision's weights."""

import torch
import torchvision
from torch import nn


def torchvision_names() -> list[str]:
    """Names of torchvision's classification models."""
    return torchvision.models.list_models(module=torchvision.models)


def torchvision_model(
    name: str, *, num_classes: int, in_channels: int = 3, image_size: int | None = None, pretrained: bool = False
) -> nn.Module:
    """The model `name`, one of `torchvision_names()`. Shapes: (N, in_channels, H, W) -> (N, num_classes).

    googlenet and inception_v3 come without their auxiliary classifiers, so that every model returns one tensor. With
    `pretrained`, torchvision's default weights are downloaded and loaded, all but the last layer's if `num_classes` is
    not theirs; a first convolution for other than 3 channels starts from their mean filter, scaled so that equal
    channels give the same response. `image_size` matters only to the models that fix it when built (vit, maxvit).
    """
    options: dict[str, object] = {}
    if name in ("googlenet", "inception_v3"):
        # Their transform_input turns ImageNet's normalisation into the one their weights were trained with.
        options = {"aux_logits": False, "init_weights": True, "transform_input": pretrained and in_channels == 3}
    if image_size is not None and name.startswith("vit_"):
        options["image_size"] = image_size
    if image_size is not None and name.startswith("maxvit_"):
        options["input_size"] = (image_size, image_size)
    model = torchvision.models.get_model(name, num_classes=num_classes, **options)
    if pretrained:
        source = torchvision.models.get_model(name, weights="DEFAULT")
        load_but_last_layer(model, source.state_dict(), name=name, num_classes=num_classes)
    if in_channels != 3:
        replace_first_conv(model, name=name, in_channels=in_channels, keep_filters=pretrained)
    return model


def load_but_last_layer(model: nn.Module, weights: dict[str, torch.Tensor], *, name: str, num_classes: int) -> None:
    """Load `weights` into `model`, in place, but for the tensors of the layer that gives the classes if they differ.

    Entries of `weights` that the model lacks (auxiliary classifiers) are left out.
    """
    state = model.state_dict()
    for key, own in state.items():
        if own.shape == weights[key].shape:
            state[key] = weights[key]
        elif own.shape[0] != num_classes:  # a mismatch elsewhere than in the last layer
            raise ValueError(
                f"the weights of {name} do not fit at {key}: {tuple(weights[key].shape)} against "
                f"{tuple(own.shape)}; build it for the image size they were trained at, or without pretrained"
            )
    model.load_state_dict(state)


def replace_first_conv(model: nn.Module, *, name: str, in_channels: int, keep_filters: bool) -> None:
    """Give `model` a first convolution for `in_channels` channels, in place.

    (out, 3, kH, kW) becomes (out, in_channels, kH, kW). `keep_filters`: start from the mean over the 3 channels times
    3 / in_channels; otherwise Kaiming normal by fan-out, as torchvision's own convolutional networks.
    """
    found = next(((path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d)), None)
    if found is None or found[1].in_channels != 3 or found[1].groups != 1:
        raise ValueError(
            f"{name} has no first convolution that reads 3 channels, so in_channels={in_channels} cannot be given to "
            "it; feed it 3-channel images"
        )
    path, old = found
    assert isinstance(old.padding, tuple)
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        (old.kernel_size[0], old.kernel_size[1]),
        stride=(old.stride[0], old.stride[1]),
        padding=(old.padding[0], old.padding[1]),
        dilation=(old.dilation[0], old.dilation[1]),
        bias=old.bias is not None,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    with torch.no_grad():
        if keep_filters:
            mean = old.weight.mean(dim=1, keepdim=True)
            new.weight.copy_((mean * (3 / in_channels)).expand_as(new.weight))
        else:
            nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)
