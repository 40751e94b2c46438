"""Removal of dead neurons: the function stays the same, and a removal that would change it is refused."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from dist_gsl import ProximalSGD, SparseGroupLasso, compact, find_neurons
from dist_gsl.compaction import check_difference
from dist_gsl.models import model_names
from dist_gsl.neurons import Neurons, Slice
from dist_gsl.removal import Removal, set_widths
from tests.networks import IMAGE, batches, chain, tiny, train_step
from tests.test_tracing import Tied


def randomise_(model: nn.Module) -> None:
    """Biases, BatchNorm scales, shifts and statistics that are not the neutral ones of a fresh network."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1:
                noise = torch.rand(tensor.shape, generator=generator) + 0.1
                tensor.copy_(noise if name.endswith(("running_var", "weight")) else noise - 0.6)


def kill_some(neurons: Neurons, *, seed: int = 0) -> dict[str, list[int]]:
    """Kills a random part of each layer, never all; {layer name: survivors}."""
    generator = torch.Generator().manual_seed(seed)
    survivors = {}
    for layer in neurons:
        order = torch.randperm(layer.num_neurons, generator=generator)
        num_dead = int(torch.randint(0, layer.num_neurons, (1,), generator=generator))
        neurons.zero_({layer.name: order[:num_dead]})
        survivors[layer.name] = sorted(order[num_dead:].tolist())
    return survivors


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("name", model_names())
def test_the_function_stays_the_same_for_the_whole_zoo(name: str, batch_norm: bool) -> None:
    model, x = tiny(name, batch_norm=batch_norm)
    randomise_(model)
    neurons = find_neurons(model, x)
    survivors = kill_some(neurons)
    result = compact(model, neurons, example_inputs=x)
    assert result.max_abs_output > 0
    assert result.max_abs_difference <= 1e-9 * result.max_abs_output
    assert {name: result.widths[name] for name in survivors} == {name: len(s) for name, s in survivors.items()}
    for layer in result.neurons:
        assert layer.indices.tolist() == survivors[layer.name]
        assert layer.alive().all()
    # Once more, without the code under test.
    other = torch.randn(3, *x.shape[1:], dtype=torch.float64)
    with torch.no_grad():
        full, small = model.double().eval()(other), result.model.double().eval()(other)
    assert full.abs().max() > 0
    torch.testing.assert_close(small, full, rtol=1e-9, atol=1e-9 * float(full.abs().max()))


def test_residual_networks_shrink_inside_their_blocks() -> None:
    model = torchvision.models.resnet18(num_classes=4)
    randomise_(model)
    neurons = find_neurons(model, torch.randn(1, 3, 32, 32))
    kill_some(neurons)
    result = compact(model, neurons)
    assert result.max_abs_difference <= 1e-9 * result.max_abs_output
    assert sum(p.numel() for p in result.model.parameters()) < sum(p.numel() for p in model.parameters())


def test_sizes_flags_and_layout_follow() -> None:
    model = chain().to(memory_format=torch.channels_last)
    model.get_parameter("fc2.bias").requires_grad_(False)
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    neurons.zero_({"conv1": [0, 2], "conv2": [1, 2, 3], "fc1": [5]})
    small = compact(model, neurons).model
    conv, bn, fc = (small.get_submodule(name) for name in ("conv2", "bn2", "fc1"))
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(bn, nn.BatchNorm2d)
    assert isinstance(fc, nn.Linear)
    assert (conv.in_channels, conv.out_channels, bn.num_features) == (4, 5, 5)
    assert (fc.in_features, fc.out_features) == (20, 6)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not small.get_parameter("fc2.bias").requires_grad
    assert small.get_parameter("fc1.bias").requires_grad
    assert small.training


def test_what_is_given_is_left_as_it_is() -> None:
    model = chain()
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    neurons.zero_({"conv1": [0, 2]})
    before = {name: t.clone() for name, t in model.state_dict().items()}
    small = compact(model, neurons).model
    with torch.no_grad():
        for p in small.parameters():
            p.fill_(7)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert neurons["conv1"].num_neurons == 6


def test_a_second_removal_counts_in_the_starting_network() -> None:
    model = chain()
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    neurons.zero_({"conv2": [0, 4]})
    once = compact(model, neurons)
    once.neurons.zero_({"conv2": [0, 5]})  # 1 and 7 of the starting network
    twice = compact(once.model, once.neurons)
    assert twice.neurons["conv2"].indices.tolist() == [2, 3, 5, 6]
    assert twice.neurons["conv2"].num_dead == 4
    assert twice.neurons["conv2"].group_size == neurons["conv2"].group_size
    neurons.zero_({"conv2": [1, 7]})
    directly = compact(model, neurons).model
    assert all(torch.equal(a, b) for a, b in zip(twice.model.parameters(), directly.parameters(), strict=True))


# --- refusals


@pytest.mark.parametrize("layer", ["conv1", "conv2", "fc1"])
def test_a_live_neuron_that_the_mask_calls_dead_is_not_removed(layer: str) -> None:
    model = chain()
    randomise_(model)
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    neurons.zero_({layer: [0]})
    neurons[layer].mask[1] = False
    with pytest.raises(RuntimeError, match="the mask calls a neuron dead that is not"):
        compact(model, neurons)


def test_a_live_shift_alone_is_noticed() -> None:
    model = chain()
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    neurons["conv1"].mask[1] = False
    with torch.no_grad():
        for name in ("conv1.weight", "conv1.bias", "bn1.weight"):
            model.get_parameter(name)[1] = 0
        model.get_parameter("bn1.bias")[1] = 1e-3
    with pytest.raises(RuntimeError, match="the mask calls a neuron dead that is not"):
        compact(model, neurons)


def test_a_removal_that_changes_the_function_is_noticed() -> None:
    model = chain()
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    neurons.zero_({"conv1": [0]})
    layer = neurons["conv1"]
    layer.readers = (Slice("conv2.weight", 1, layer.readers[0].index.flip(0)),)  # the last neuron's readers go instead
    with pytest.raises(RuntimeError, match="dead neurons of layer 'conv1' moves an output"):
        compact(model, neurons)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_prove_nothing(value: float) -> None:
    model = chain()
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    neurons.zero_({"conv1": [0]})
    with torch.no_grad():
        model.get_parameter("fc2.bias")[0] = value
    with pytest.raises(RuntimeError, match="moves an output by nan"):
        compact(model, neurons)


def test_allowed_difference() -> None:
    check_difference(0.9e-9, 1.0)
    check_difference(0.0, 0.0)
    for difference, largest in ((1.1e-9, 1.0), (float("nan"), 1.0), (0.0, float("nan")), (0.0, float("inf"))):
        with pytest.raises(RuntimeError, match="compact"):
            check_difference(difference, largest)


def test_an_empty_layer_is_refused_by_name() -> None:
    model = chain()
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    neurons.zero_({"conv2": range(8)})
    with pytest.raises(ValueError, match="'conv2' has no neuron alive"):
        compact(model, neurons)


def test_shared_weights_stay_shared() -> None:
    model = Tied("parameter")
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    neurons.zero_({"fc1": [1]})
    result = compact(model, neurons)
    assert result.max_abs_difference <= 1e-9 * result.max_abs_output
    shared = result.model.get_submodule("fc2").weight
    assert shared is result.model.get_submodule("fc3").weight
    assert shared.shape == (3, 3)


# --- the optimizer's state, and widths


def test_momentum_is_cut_like_the_parameters() -> None:
    model = chain()
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    optimizer = ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=0.0), lr=0.05, momentum=0.9)
    for batch in batches(3):
        train_step(model, optimizer.step, batch)
    neurons.zero_({"conv1": [1, 2], "conv2": [0], "fc1": [3]})
    result = compact(model, neurons, optimizer)
    assert result.optimizer_state is not None
    small = ProximalSGD(result.model.parameters(), result.neurons, SparseGroupLasso(beta=0.0), lr=0.05, momentum=0.9)
    small.load_state_dict(result.optimizer_state)
    full_of, small_of = ({n: o.state[p]["momentum_buffer"] for n, p in m.named_parameters()}
                         for m, o in ((model, optimizer), (result.model, small)))  # fmt: skip
    a, b, c = [0, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 4, 5, 6]
    expected = {
        "conv1.weight": full_of["conv1.weight"][a], "conv1.bias": full_of["conv1.bias"][a],
        "bn1.weight": full_of["bn1.weight"][a], "bn1.bias": full_of["bn1.bias"][a],
        "conv2.weight": full_of["conv2.weight"][b][:, a], "conv2.bias": full_of["conv2.bias"][b],
        "bn2.weight": full_of["bn2.weight"][b], "bn2.bias": full_of["bn2.bias"][b],
        "fc1.weight": full_of["fc1.weight"][c][:, 4:], "fc1.bias": full_of["fc1.bias"][c],
        "fc2.weight": full_of["fc2.weight"][:, c], "fc2.bias": full_of["fc2.bias"],
    }  # fmt: skip
    assert set(small_of) == set(expected)
    for name, buffer in small_of.items():
        assert torch.equal(buffer, expected[name]), name
        assert buffer.any(), name
    assert small.num_steps == 3


def test_widths_make_the_network_that_a_removal_made() -> None:
    model = chain()
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    kill_some(neurons)
    result = compact(model, neurons)
    fresh = chain(seed=5)
    small, small_neurons = set_widths(
        fresh, find_neurons(fresh, torch.randn(2, *IMAGE)), {layer.name: layer.indices for layer in result.neurons}
    )
    small.load_state_dict(result.model.state_dict())
    small_neurons.load_state_dict(result.neurons.state_dict())
    x = torch.randn(2, *IMAGE)
    assert torch.equal(small.eval()(x), result.model.eval()(x))
    assert [layer.indices.tolist() for layer in small_neurons] == [layer.indices.tolist() for layer in result.neurons]


@pytest.mark.parametrize("name", ["bnet", "dec8", "dec3", "alexnet", "mobilenet_v3_small", "vit"])
def test_what_is_left_lies_where_the_network_did(name: str) -> None:
    """On whatever device, whose place "meta" takes here; DDP and NCCL have no use for a tensor of the host."""
    if name == "vit":
        model: nn.Module = torchvision.models.VisionTransformer(
            image_size=32, patch_size=16, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=24, dropout=0.1, num_classes=5
        )
        example = torch.randn(2, 3, 32, 32)
    elif name in ("alexnet", "mobilenet_v3_small"):
        model, example = getattr(torchvision.models, name)(num_classes=5), torch.randn(2, 3, 64, 64)
    else:
        model, example = tiny(name)
    neurons = find_neurons(model, example)
    for layer in neurons:
        layer.mask[0] = layer.num_neurons < 2
    smaller = Removal(neurons).model(copy.deepcopy(model).to("meta"))
    assert {tensor.device.type for tensor in (*smaller.parameters(), *smaller.buffers())} == {"meta"}
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
