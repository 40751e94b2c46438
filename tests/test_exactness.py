"""Removal leaves every kind of network as it was: torchvision's families, folded constants, whole branches."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_gsl import ProximalSGD, SparseGroupLasso, compact, create_model, find_neurons
from dist_gsl.neurons import Neurons
from tests.exactness import check_exact, kill_a_third_, moved_by_one_live_neuron, randomise_, without_randomness_
from tests.networks import IMAGE

# One of each family, the smallest; benchmarks/exactness.py does all 80. (name, side of the image)
FAMILIES = [
    ("convnext_tiny", 64), ("densenet121", 64), ("efficientnet_b0", 64), ("efficientnet_v2_s", 64), ("googlenet", 64), ("inception_v3", 96),
    ("mnasnet0_5", 64), ("mobilenet_v2", 64), ("mobilenet_v3_small", 64), ("regnet_x_400mf", 64), ("regnet_y_400mf", 64), ("resnet18", 64),
    ("resnext50_32x4d", 64), ("shufflenet_v2_x0_5", 64), ("squeezenet1_1", 64), ("swin_t", 64), ("swin_v2_t", 64), ("vit_b_32", 64),
]  # fmt: skip


def network(name: str, side: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, image_size=side if name.startswith("vit") else None)
    randomise_(model)
    without_randomness_(model)
    return model, torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "side"), FAMILIES)
def test_a_third_of_the_neurons_and_some_branches_go_unnoticed(name: str, side: int) -> None:
    model, x = network(name, side)
    neurons = find_neurons(model, x)
    live = next(layer for layer in neurons if not layer.bypassed) if not all(layer.bypassed for layer in neurons) else next(iter(neurons))
    assert moved_by_one_live_neuron(model, neurons, live, x) > 1e-6
    dead = kill_a_third_(neurons, empty=0.25)
    assert dead >= sum(layer.num_neurons // 3 for layer in neurons)
    check_exact(model, neurons, x)


# --- what a dead neuron leaves behind


class Folding(nn.Module):
    """conv1 -> f -> conv2, padded or not, with a bias or BatchNorm -> relu -> mean -> fc1 -> f -> fc2."""

    def __init__(self, *, padding: int = 0, padding_mode: Any = "zeros", bias: bool = True, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(2, 6, 3)
        self.conv2 = nn.Conv2d(6, 5, 3, padding=padding, padding_mode=padding_mode, bias=bias)
        self.norm = nn.BatchNorm2d(5) if norm else nn.Identity()
        self.fc1, self.fc2 = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv2(self.conv1(x).sigmoid())).relu()
        return self.fc2(F.softplus(self.fc1(x.mean((2, 3)))))


@pytest.mark.parametrize(
    "options", [{}, {"bias": False, "norm": True}, {"padding": 1, "padding_mode": "circular"}, {"padding": 1, "padding_mode": "replicate"}]
)
def test_what_a_dead_neuron_gives_goes_into_its_readers_bias(options: dict[str, object]) -> None:
    model = Folding(**options)  # type: ignore[arg-type]
    randomise_(model)
    x = torch.randn(4, *IMAGE)
    neurons = find_neurons(model, x)
    assert [layer.name for layer in neurons] == ["conv1", "conv2", "fc1"]
    zeroed = copy.deepcopy(model).double()  # only the neurons' own parameters are zero: what they give is seen by their readers
    kill = {"conv1": [0, 4], "fc1": [2]}
    with torch.no_grad():
        for name, which in kill.items():
            for piece in neurons[name].producers:
                piece.clear_(zeroed.get_parameter(piece.tensor), torch.tensor(which))
    model.double()
    neurons.zero_({**kill, "fc1": [2, 2]})
    for training in (False, True):
        expected, folded = zeroed.train(training)(x.double()), model.train(training)(x.double())
        torch.testing.assert_close(folded, expected, rtol=1e-9, atol=1e-12)
    neurons.zero_(kill)  # dead already: nothing is folded twice
    torch.testing.assert_close(model(x.double()), expected, rtol=1e-9, atol=1e-12)
    check_exact(model, neurons, x)


def test_zeros_around_a_constant_pin_and_a_missing_bias_too() -> None:
    x = torch.randn(2, *IMAGE)
    assert "with zeros around it" in find_neurons(Folding(padding=1), x).pinned["conv1"]
    assert "no bias of its own" in find_neurons(Folding(bias=False), x).pinned["conv1"]


def test_a_constant_with_another_rim_is_folded_by_position_or_stays() -> None:
    x = torch.randn(3, *IMAGE)
    before = [nn.Conv2d(2, 4, 3), nn.Sigmoid(), nn.AvgPool2d(3, 1, 1)]  # zeros around 0.5: 2/9 in the corners
    model = nn.Sequential(*before, nn.Flatten(), nn.Linear(144, 3)).double()
    neurons = find_neurons(model, x.double())
    with torch.no_grad():
        for name in ("0.weight", "0.bias"):
            model.get_parameter(name)[1] = 0
    expected = model(x.double())
    neurons.zero_({"0": [1]})
    torch.testing.assert_close(model(x.double()), expected, rtol=1e-12, atol=1e-12)
    check_exact(model, neurons, x)
    pinned = find_neurons(nn.Sequential(*before, nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(72, 3)).double(), x.double()).pinned
    assert "not the same everywhere" in pinned["0"]


def test_a_constant_that_weights_of_two_biases_read_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.fc3, self.fc4 = nn.Linear(128, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.fc3.weight = self.fc2.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.fc4(self.fc3(self.fc2(self.fc1(x.flatten(1)).sigmoid()).relu()))

    neurons = find_neurons(Shared(), torch.randn(2, *IMAGE))
    assert "whose weights are used more than once" in neurons.pinned["fc1"]


def test_momentum_takes_no_part_and_an_average_does() -> None:
    model = Folding()
    neurons = find_neurons(model, torch.randn(2, *IMAGE))
    momentum = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    average = copy.deepcopy(model)
    neurons.register_copy(lambda: [momentum])
    neurons.register_copy(lambda: [{**dict(average.named_parameters()), **dict(average.named_buffers())}], is_model=True)
    assert average.conv2.bias is not None
    before = average.conv2.bias.detach() + 0.5 * average.conv2.weight.detach()[:, 3].sum((1, 2))
    neurons.zero_({"conv1": [3]})
    assert torch.equal(momentum["conv2.bias"], torch.ones(5))
    assert not momentum["conv2.weight"][:, 3].any()
    torch.testing.assert_close(average.get_parameter("conv2.bias").detach(), before)
    assert not average.conv1.weight[3].any()


def test_neurons_that_may_come_back_are_folded_when_they_are_removed() -> None:
    model = Folding()
    x = torch.randn(4, *IMAGE)
    neurons = find_neurons(model, x)
    optimizer = ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta={"conv1": 0.05}), lr=0.1, revive=True)
    with torch.no_grad():
        for p in model.conv1.parameters():
            p[:3] *= 1e-3
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert neurons["conv1"].num_dead == 3
    assert model.conv2.weight[:, ~neurons["conv1"].mask].any()  # their readers are as they were
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = compact(model, neurons, example_inputs=x)
    assert result.max_abs_difference <= 1e-9 * result.max_abs_output
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(result.model.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-6)  # rounded to float32 only afterwards
    neurons.settle_()
    assert not model.conv2.weight[:, ~neurons["conv1"].mask].any()
    check_exact(model, neurons, x)


def test_dead_neurons_stay_dead_though_their_readers_have_gradients() -> None:
    """Training with the dead in place is the same as training without them, where they give 0.5 as well."""
    model = Folding().double()
    x = torch.randn(4, *IMAGE, dtype=torch.float64)
    neurons = find_neurons(model, x)
    neurons.zero_({"conv1": [1, 3], "fc1": [0]})
    result = compact(model, neurons)
    losses: list[list[float]] = []
    for network_, its in ((model, neurons), (result.model, result.neurons)):
        optimizer = ProximalSGD(network_.parameters(), its, SparseGroupLasso(beta=0.01), lr=0.05, momentum=0.9)
        losses.append([])
        for step in range(30):
            optimizer.zero_grad()
            loss = (network_(x + step) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert not model.get_parameter("conv2.weight")[:, 1].any()
    assert not neurons.parts(neurons["fc1"])[0][0].any()


# --- depth


class Block(nn.Module):
    """x + conv3(relu(bn2(conv2(relu(bn1(conv1(x))))))), a bottleneck."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn3(self.conv3(self.bn2(self.conv2(out)).relu()))
        out += x
        return out.relu()


def deep() -> tuple[nn.Module, Tensor, Neurons]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), Block(6, 4), Block(6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    randomise_(model)
    x = torch.randn(4, *IMAGE)
    return model, x, find_neurons(model, x)


def test_a_branch_without_neurons_is_a_constant_and_stays_that_constant() -> None:
    model, x, neurons = deep()
    assert [layer.name for layer in neurons if layer.bypassed] == ["1.conv1", "1.conv2", "2.conv1", "2.conv2"]
    neurons.zero_({"1.conv2": range(4)})
    assert neurons["1.conv1"].num_dead == 4  # nothing reads it any more
    neurons.zero_({"2.conv1": range(3)})
    check_exact(model, neurons, x)
    small = compact(model, neurons).model
    assert sum(p.numel() for p in small.get_submodule("1").parameters()) == 12  # the BatchNorm that holds the constant
    # And it can be followed as it is. What reads an empty layer is a constant too, and dies by the penalty alone.
    assert [layer.name for layer in find_neurons(small, x)] == ["0", "2.conv2"]
    # And it goes on as the whole network does: statistics drift alike, in evaluation too.
    models = [copy.deepcopy(m).double().train() for m in (model, small)]
    for step in range(3):
        for m in models:
            m.zero_grad()
            m(x.double() + step).square().sum().backward()
            with torch.no_grad():
                for name, p in m.named_parameters():
                    if p.grad is not None and name.startswith(("0", "1.bn3", "2.bn3", "5")):
                        p.sub_(0.01 * p.grad)
    outputs = [m.eval()(x.double()) for m in models]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-12)


def test_training_may_take_all_neurons_of_a_branch_and_keeps_one_elsewhere() -> None:
    model, x, neurons = deep()
    optimizer = ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=100.0), lr=0.1)
    model(x).square().sum().backward()
    with pytest.warns(UserWarning, match="min_alive"):
        optimizer.step()
    assert {layer.name: int(layer.mask.sum()) for layer in neurons} == {"0": 1, "1.conv1": 0, "1.conv2": 0, "2.conv1": 0, "2.conv2": 0}
    result = compact(model, neurons, optimizer)
    check_exact(model, neurons, x)
    again = ProximalSGD(result.model.parameters(), result.neurons, SparseGroupLasso(beta=0.001), lr=0.1)
    assert result.optimizer_state is not None
    again.load_state_dict(result.optimizer_state)
    result.model(x).square().sum().backward()  # a network without branches trains on
    again.step()
    kept = deep()[2]
    ProximalSGD(kept.model.parameters(), kept, SparseGroupLasso(beta=100.0), lr=0.1, depth=False)
    assert all(layer.mask.all() for layer in kept)


def test_a_branch_may_be_one_group() -> None:
    model, _, neurons = deep()
    optimizer = ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=0.2), lr=0.1, groups="branches")
    before = {layer.name: [part.clone() for part in neurons.parts(layer)] for layer in neurons}
    optimizer.step()  # no gradients: the proximal step alone
    for layer in neurons:
        norm = torch.cat([part.flatten() for part in before[layer.name]]).norm()
        shrink = 1 - 0.1 * 0.2 * (layer.group_size * layer.num_neurons) ** 0.5 / norm
        for part, old in zip(neurons.parts(layer), before[layer.name], strict=True):
            rows = torch.cat([p.reshape(layer.num_neurons, -1) for p in before[layer.name]], dim=1).norm(dim=1)
            own = 1 - 0.1 * 0.2 * layer.group_size**0.5 / rows.view(-1, *[1] * (part.dim() - 1))
            torch.testing.assert_close(part, old * (shrink if layer.bypassed else own))
    with pytest.warns(UserWarning, match="layer '0': beta 5 would kill"):
        ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=5.0), lr=1.0, groups="branches").step()
    assert {layer.name: int(layer.mask.sum()) for layer in neurons if layer.bypassed} == dict.fromkeys(["1.conv1", "1.conv2", "2.conv1", "2.conv2"], 0)
    with pytest.raises(ValueError, match="groups is 'layers'"):
        ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=5.0), lr=1.0, groups="layers")


def test_of_branches_side_by_side_the_last_one_stays() -> None:
    class Inception(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 5, 5, padding=2)
            self.fc = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.cat([self.a(x), self.b(x), self.c(x)], 1).relu().mean((2, 3)))

    model, x = Inception(), torch.randn(2, *IMAGE)
    neurons = find_neurons(model, x)
    assert {layer.name: layer.bypassed for layer in neurons} == {"a": True, "b": True, "c": False}
    neurons.zero_({"a": range(3), "b": range(4), "c": [1]})
    check_exact(model, neurons, x)
