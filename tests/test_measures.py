"""The paper's four measures, against arithmetic written out here for each family of networks."""

import math

import pytest
import torch
from torch import nn

from dist_gsl import compact, create_model, find_neurons, measure
from dist_gsl.neurons import Neurons
from tests.exactness import kill_a_third_, randomise_
from tests.networks import IMAGE, chain
from tests.test_tracing import Tied

BNET_WIDTHS = [64, 64, 128, 128, 256, 256, 512, 512, 512, 512]
BNET_KEPT = [40, 64, 100, 128, 256, 200, 512, 490, 300, 480]  # 374 of 2,944 are gone
DEC8_WIDTHS = [32, 64, 128, 256, 384, 384, *[512] * 10]
DEC8_KEPT = [32, 60, 128, 256, 384, 380, *[512] * 8, 400, 333]
DEC3_WIDTHS = [48, 96, 160, 256, 512, 512]
DEC3_KEPT = [20, 50, 91, 100, 250, 200]  # 873 of 1,584 are gone


def full_size(name: str, kept: list[int], *, num_classes: int, side: int, channels: int) -> Neurons:
    """The network of the paper, every parameter 1, with the last neurons of each convolution dead."""
    with torch.device("meta"):
        model = create_model(name, num_classes=num_classes, batch_norm=name == "dec8")  # both kinds of neurons
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.ones_(p)
    neurons = find_neurons(model, torch.zeros(1, channels, side, side))
    convs = [layer for layer in neurons if layer.kind == "conv"]
    neurons.zero_({c.name: range(k, c.num_neurons) for c, k in zip(convs, kept, strict=True)})
    return neurons


def by_hand(
    widths: list[int], kept: list[int], taps: list[int], *, channels: int, extra: int, positions: int, num_classes: int
) -> dict[str, float]:
    """taps: kernel height x width; extra: parameters of a neuron beside its filter; positions: what the FC reads."""
    fan_in, fan_in_kept = [channels, *widths[:-1]], [channels, *kept[:-1]]
    group = [c * k + extra for c, k in zip(fan_in, taps, strict=True)]
    conv = sum(n * p for n, p in zip(widths, group, strict=True))
    dead = sum((n - k) * p for n, k, p in zip(widths, kept, group, strict=True))
    conv_left = sum(n * (c * k + extra) for n, c, k in zip(kept, fan_in_kept, taps, strict=True))
    fc = (widths[-1] * positions + 1) * num_classes
    fc_left = (kept[-1] * positions + 1) * num_classes
    return {
        "neurons": 100 * (sum(widths) - sum(kept)) / sum(widths),
        "group_param": 100 * dead / conv,
        "total_param": 100 * dead / conv,  # no live neuron has a zero of its own
        "total_induced": 100 * (conv + fc - conv_left - fc_left) / (conv + fc),
        "all_neurons": 100 * (sum(widths) - sum(kept)) / sum(widths),
    }


def test_bnet_c() -> None:
    neurons = full_size("bnet-c", BNET_KEPT, num_classes=1000, side=224, channels=3)
    found = measure(neurons.model, neurons).as_dict()
    taps = [9] * 10
    expected = by_hand(BNET_WIDTHS, BNET_KEPT, taps, channels=3, extra=1, positions=49, num_classes=1000)
    assert found == pytest.approx(expected)
    assert round(found["neurons"], 2) == 12.70  # the paper's number for the same 374 of 2,944


def test_dec8() -> None:
    neurons = full_size("dec8", DEC8_KEPT, num_classes=1000, side=224, channels=3)
    found = measure(neurons.model, neurons).as_dict()
    taps = [11, 11, 7, 7, *[3] * 12]
    expected = by_hand(DEC8_WIDTHS, DEC8_KEPT, taps, channels=3, extra=2, positions=1, num_classes=1000)
    assert found == pytest.approx(expected)


def test_dec3() -> None:
    neurons = full_size("dec3", DEC3_KEPT, num_classes=36, side=32, channels=1)
    found = measure(neurons.model, neurons).as_dict()
    taps = [9, 9, 9, 9, 8, 8]
    expected = by_hand(DEC3_WIDTHS, DEC3_KEPT, taps, channels=1, extra=1, positions=1, num_classes=36)
    assert found == pytest.approx(expected)
    assert round(found["neurons"], 2) == 55.11  # the paper's number for the same 873 of 1,584


def small() -> Neurons:
    """`chain()` without BatchNorm: conv 2 -> 6 -> 8, 3 x 3; fc 32 -> 7 -> 3; no parameter is 0."""
    neurons = find_neurons(chain(batch_norm=False), torch.randn(2, *IMAGE))
    for p in neurons.model.parameters():
        nn.init.ones_(p)
    return neurons


CONV = 6 * (2 * 9 + 1) + 8 * (6 * 9 + 1)  # 114 + 440
LAST = 7 * 3 + 3  # fc2; fc1 is in none of the sums


def test_nothing_dead_is_0_percent() -> None:
    neurons = small()
    assert set(measure(neurons.model, neurons).as_dict().values()) == {0.0}


def test_zeros_of_live_neurons_and_weights_that_read_a_dead_one_are_told_apart() -> None:
    neurons = small()
    with torch.no_grad():
        neurons.parameter("conv2.weight")[0, 3, :, :] = 0  # 9 zeros of a live neuron
        neurons.parameter("conv2.weight")[7, 0, 0, 0] = 0  # of a neuron that dies
        neurons.parameter("conv1.bias")[5] = 0
        neurons.parameter("fc1.weight")[0] = 0  # no convolution
    neurons.zero_({"conv1": [0, 1], "conv2": [7]})  # clears conv2.weight[:, :2] too: induced, no zeros of live neurons
    found = measure(neurons.model, neurons)
    dead = 2 * (2 * 9 + 1) + (6 * 9 + 1)
    readers = 7 * 2 * 9  # of the seven live neurons of conv2; fc1 is not in the sum
    assert found.neurons == pytest.approx(100 * 3 / 14)
    assert found.group_param == pytest.approx(100 * dead / CONV)
    assert found.total_param == pytest.approx(100 * (dead + 9 + 1) / CONV)
    assert found.total_induced == pytest.approx(100 * (dead + readers) / (CONV + LAST))
    assert found.all_neurons == pytest.approx(100 * 3 / (14 + 7))  # the 3 outputs are no neurons


def test_dead_linear_neurons_count_only_where_the_last_layer_reads_them() -> None:
    neurons = small()
    neurons.zero_({"fc1": [0, 1]})
    found = measure(neurons.model, neurons)
    assert (found.neurons, found.group_param, found.total_param) == (0, 0, 0)
    assert found.total_induced == pytest.approx(100 * 2 * 3 / (CONV + LAST))
    assert found.all_neurons == pytest.approx(100 * 2 / 21)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_removal_changes_no_measure(batch_norm: bool) -> None:
    model = chain(batch_norm=batch_norm)
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    with torch.no_grad():
        model.get_parameter("conv2.weight")[3, 4] = 0
    neurons.zero_({"conv1": [0, 2], "conv2": [1], "fc1": [6]})
    before = measure(model, neurons)
    assert before.total_param > before.group_param > 0
    once = compact(model, neurons)
    assert measure(once.model, once.neurons) == before
    neurons.zero_({"conv1": [5], "conv2": [0, 7]})
    once.neurons.zero_({"conv1": [3], "conv2": [0, 6]})
    assert measure(once.model, once.neurons) == measure(model, neurons) != before
    twice = compact(once.model, once.neurons)
    assert measure(twice.model, twice.neurons) == measure(model, neurons)


def test_a_network_without_convolutions_and_with_shared_weights() -> None:
    model = Tied("parameter")
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    assert set(measure(model, neurons).as_dict().values()) == {0.0}


def test_shared_convolutions_count_once() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 3, 3), nn.Conv2d(3, 2, 1)
    )
    model[2].weight = model[1].weight
    for p in model.parameters():
        nn.init.ones_(p)
    neurons = find_neurons(model, torch.randn(2, 2, 12, 12))
    assert [layer.name for layer in neurons] == ["0", "3"]  # the shared weight ties three convolutions
    neurons.zero_({"3": [1]})
    total = (2 * 9 + 1) * 4 + (4 * 9 + 1) * 4 + 4 + (4 * 9 + 1) * 3 + (3 + 1) * 2
    assert measure(model, neurons).group_param == pytest.approx(100 * 37 / total)
    neurons.zero_({"0": [2]})
    assert measure(model, neurons).group_param == pytest.approx(100 * (37 + 2 * 9 + 1 + 4 * 9 + 1 + 1) / total)
    assert math.isfinite(measure(model, neurons).total_induced)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5", "resnext50_32x4d"])
def test_tied_networks_lose_what_the_measures_say(name: str) -> None:
    """Without zeros of their own, networks of tied channels lose exactly the parameters that group_param and total_induced count."""
    model = create_model(name, num_classes=5)
    randomise_(model)
    neurons = find_neurons(model, torch.zeros(1, 3, 64, 64))
    kill_a_third_(neurons, empty=0.2)
    measures = measure(model, neurons)
    small = compact(model, neurons)
    before, after = (dict(m.named_parameters()) for m in (model, small.model))
    convolutions = {piece.tensor for layer in neurons.all_layers if layer.kind == "conv" for piece in layer.producers}
    last = [layer for layer in neurons.all_layers if layer.kind == "linear"][-1:]
    counted = convolutions | {piece.tensor for layer in last for piece in layer.producers}
    gone = sum(before[tensor].numel() - after[tensor].numel() for tensor in counted)
    assert measures.total_induced == pytest.approx(100 * gone / sum(before[tensor].numel() for tensor in counted))
    dead = sum(layer.num_dead * layer.group_size for layer in neurons if layer.kind == "conv")
    assert measures.group_param == pytest.approx(100 * dead / sum(before[tensor].numel() for tensor in convolutions))
    assert measure(small.model, small.neurons) == measures
