"""Networks that once were followed wrongly: what is removed must not be noticed, and what cannot be is pinned."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_gsl import ModuleRule, ProximalSGD, SparseGroupLasso, compact, find_neurons
from dist_gsl.neurons import Neurons
from tests.exactness import check_exact, randomise_

CHANNELS_IN = (3, 8, 8)


class Net(nn.Module):
    """What a function makes of an image, with the given modules and parameters."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def conv(num_in: int, num_out: int, size: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(num_in, num_out, size, **options)


def gain(channels: int = 6) -> nn.Parameter:
    return nn.Parameter(torch.ones(channels, 1, 1))


class Same(nn.Conv2d):
    """Pads by itself, as some libraries do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (1, 1, 1, 1)))


class ActivatedNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(input))


def added_in_place(m: Any, x: Tensor) -> Any:
    h = m.c1(x)
    y = h
    y += 1.0
    return m.fc(m.c2(h).mean((2, 3)))


def view_changed_in_place(m: Any, x: Tensor) -> Any:
    h = m.c1(x)
    y = h.flatten(1)
    y += 1
    return m.fc(m.c2(h).mean((2, 3)))


def activated_under_another_name(m: Any, x: Tensor) -> Any:
    h = m.c1(x)
    F.hardsigmoid(m.same(h), inplace=True)
    return m.fc(m.c2(h).mean((2, 3)))


PLAIN: dict[str, Callable[[], Any]] = {"c1": lambda: conv(3, 6), "c2": lambda: conv(6, 5), "fc": lambda: nn.Linear(5, 3)}


def plain(function: Callable[[Any, Tensor], Any], **members: Any) -> Net:
    return Net(function, **{**{name: make() for name, make in PLAIN.items()}, **members})


class Halved(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input / 2)


def tied_to_words() -> Net:
    """The last layer's weight is an embedding of which the length of each word is used."""
    model = plain(lambda m, x: m.head(F.relu(m.fc(m.c2(m.c1(x)).mean((2, 3))))) + m.words(x[:, 0, 0, :5].abs().long() % 5).norm(dim=-1),
                  words=nn.Embedding(5, 3), head=nn.Linear(3, 5))
    model.get_submodule("head").register_parameter("weight", model.get_parameter("words.weight"))
    return model


def tied_to_another() -> Net:
    model = plain(lambda m, x: m.fc(F.relu(m.f1(x.mean((2, 3))))) + m.f2(x.mean((2, 3))).sum(1, keepdim=True), f1=nn.Linear(3, 5), f2=Halved(3, 5))
    model.get_submodule("f2").register_parameter("weight", model.get_parameter("f1.weight"))
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "a parameter times f(0)": lambda: plain(lambda m, x: m.fc(m.c2(torch.sigmoid(m.c1(x)) * m.g).mean((2, 3))), g=gain()),
    "a parameter minus f(0)": lambda: plain(lambda m, x: m.fc(m.c2(m.g - torch.sigmoid(m.c1(x))).mean((2, 3))), g=gain()),
    "divided by a parameter": lambda: plain(lambda m, x: m.fc(m.c2(torch.sigmoid(m.c1(x)) / m.g).mean((2, 3))), g=gain()),
    "added in place": lambda: plain(added_in_place),
    "a view changed in place": lambda: plain(view_changed_in_place),
    "activated under another name": lambda: plain(activated_under_another_name, same=nn.Identity()),
    "a bias that is used elsewhere": lambda: plain(lambda m, x: m.fc(m.c2(torch.sigmoid(m.c1(x))).mean((2, 3))) + m.c2.bias.sum()),
    "a running mean that is used elsewhere": lambda: plain(
        lambda m, x: m.fc(m.bn(m.c2(torch.sigmoid(m.c1(x)))).mean((2, 3))) + m.bn.running_mean.sum(), c2=conv(6, 5, bias=False), bn=nn.BatchNorm2d(5)
    ),
    "BatchNorm over tokens": lambda: Net(
        lambda m, x: m.fc(m.bn(m.f2(torch.sigmoid(m.f1(x.flatten(2)[..., :4])))).mean(1)),
        f1=nn.Linear(4, 6), f2=nn.Linear(6, 7, bias=False), bn=nn.BatchNorm1d(3), fc=nn.Linear(7, 3),
    ),
    "a convolution that pads by itself": lambda: plain(lambda m, x: m.fc(m.c2(torch.sigmoid(m.c1(x))).mean((2, 3))), c2=Same(6, 5, 3)),
    "a norm that activates by itself": lambda: plain(lambda m, x: m.fc(m.c2(m.bn(m.c1(x))).mean((2, 3))), bn=ActivatedNorm(6)),
    "a kernel of one and a view": lambda: Net(lambda m, x: m.fc(F.relu(m.c1(x)).view(x.size(0), -1)), c1=conv(3, 6), fc=nn.Linear(384, 3)),
    "joined along the height": lambda: Net(
        lambda m, x: m.fc(torch.cat([m.c1(x), m.c3(x)], 2).flatten(1)), c1=conv(3, 6), c3=conv(3, 6), fc=nn.Linear(768, 3)
    ),
    "another's number of channels": lambda: plain(
        lambda m, x: m.fc(m.c2(m.c1(x)).mean((2, 3))) + m.f2(m.c3(x).view(x.shape[0], m.c1(x).shape[1], -1).mean(1)), c3=conv(3, 6), f2=nn.Linear(64, 3)
    ),
    "every other feature": lambda: Net(lambda m, x: m.fc(m.c1(x[:, :, :7, :7]).flatten(1)[:, ::2]), c1=conv(3, 6), fc=nn.Linear(147, 3)),
    "squeezed": lambda: plain(lambda m, x: m.fc(F.adaptive_avg_pool2d(m.c2(m.c1(x)), 1).squeeze())),
    "transposed and mixed": lambda: Net(
        lambda m, x: m.fc(m.c1(x).flatten(2).mT.softmax(-1).mean(1)), c1=conv(3, 6), fc=nn.Linear(6, 3)
    ),
    "its data": lambda: plain(lambda m, x: m.fc(m.c2(m.c1(x).data.sigmoid()).mean((2, 3)))),
    "scaled by the number of channels": lambda: plain(lambda m, x: m.fc(m.c2(F.relu(m.c1(x)) * m.c1(x).shape[1] ** -0.5).mean((2, 3)))),
    "taken apart": lambda: Net(
        lambda m, x: m.c2(m.c1(x).unbind(1)[0].unsqueeze(1)).mean((2, 3)) + m.c3(m.c1(x).unbind(1)[1].unsqueeze(1)).mean((2, 3)),
        c1=conv(3, 6), c2=conv(1, 3), c3=conv(1, 3),
    ),
    "a divisor": lambda: plain(lambda m, x: m.fc(m.c2(x[:, :1] / (m.c1(x) + 0.0)).mean((2, 3)))),
    "by keyword": lambda: plain(lambda m, x: m.fc(torch.flatten(input=m.c2(input=m.c1(x)).mean((2, 3)), start_dim=1))),
    "indices of a pool": lambda: plain(lambda m, x: m.fc(m.c2(m.pool(m.c1(x))[0]).mean((2, 3))), pool=nn.MaxPool2d(2, return_indices=True)),
    "an uneven constant made larger": lambda: Net(
        lambda m, x: m.fc(F.interpolate(F.avg_pool2d(torch.sigmoid(m.c1(x)), 3, 2, 1), scale_factor=2).flatten(1)), c1=conv(3, 6), fc=nn.Linear(384, 3)
    ),
    "a weight that another kind of module uses too": lambda: tied_to_words(),
    "a weight that a module with its own forward uses too": lambda: tied_to_another(),
    "a root": lambda: plain(lambda m, x: m.fc(m.c2(m.c1(x).abs().sqrt()).mean((2, 3)))),
    "a helper in training alone": lambda: plain(
        lambda m, x: m.fc(m.c2(F.relu(m.c1(x))).mean((2, 3))) + (m.aux(F.relu(m.c1(x)).mean((2, 3))) if m.training else 0), aux=nn.Linear(6, 3)
    ),
}  # fmt: skip


def zeroed(model: nn.Module, neurons: Neurons, which: dict[str, list[int]]) -> nn.Module:
    """Where nothing but the neurons' own parameters is zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, indices in which.items():
            for piece in neurons[name].producers:
                piece.clear_(model.get_parameter(piece.tensor), torch.tensor(indices))
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_no_removal_is_noticed(name: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    randomise_(model)
    x = torch.randn(3, *CHANNELS_IN, dtype=torch.float64)
    neurons = find_neurons(model, x)
    which = {layer.name: [0] for layer in neurons if layer.num_neurons > 1}
    alone = zeroed(model, neurons, which)
    neurons.zero_(which)
    for training in (False, True):
        expected = alone.train(training)(x)
        torch.testing.assert_close(model.train(training)(x), expected, rtol=1e-9, atol=1e-9)
    result = compact(model, neurons, example_inputs=x)
    for training in (False, True):
        torch.testing.assert_close(result.model.train(training)(x), model.train(training)(x), rtol=1e-9, atol=1e-9)
    for layer in neurons:  # and each alone, down to a single neuron
        again = find_neurons(model, x)
        again.zero_({layer.name: range(1, layer.num_neurons)})
        compact(model, again, example_inputs=x)


def test_a_slope_without_end_is_pinned_and_so_is_a_constant_that_is_dropped_at_random() -> None:
    x = torch.randn(3, *CHANNELS_IN)
    root = find_neurons(NETWORKS["a root"](), x)
    assert root.pinned["c1"] == "read by .sqrt() (sqrt), whose slope at what the dead give is not finite"
    always = plain(lambda m, x: m.fc(m.c2(F.dropout(torch.sigmoid(m.c1(x)), 0.5, training=True)).mean((2, 3))))
    never = plain(lambda m, x: m.fc(m.c2(F.dropout(torch.sigmoid(m.c1(x)), 0.5, training=False)).mean((2, 3))))
    assert "always on" in find_neurons(always, x).pinned["c1"]
    assert find_neurons(never, x)["c1"].readers[0].constant is not None


def test_the_size_of_the_batch_is_no_way_around() -> None:
    model = Net(
        lambda m, x: m.f2(F.relu(m.fc(F.relu(m.b(F.relu(m.a(x)))).view(x.size(0), -1)))),
        a=conv(3, 6, 3), b=conv(6, 5, 3), fc=nn.Linear(80, 4), f2=nn.Linear(4, 2),
    )  # fmt: skip
    assert not any(layer.bypassed for layer in find_neurons(model, torch.randn(3, *CHANNELS_IN)))


def test_zero_times_something_that_depends_on_the_input_is_no_way_around() -> None:
    model = plain(lambda m, x: m.fc(m.c2(F.relu(m.c1(x)) * torch.sigmoid(x.mean(1, keepdim=True))).mean((2, 3))))
    neurons = find_neurons(model, torch.randn(3, *CHANNELS_IN))
    assert {layer.name: layer.bypassed for layer in neurons} == {"c1": False, "c2": False}


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.05}, {"momentum": 0.9, "nesterov": True}])
def test_what_feeds_an_empty_branch_trains_on_as_it_did(options: dict[str, Any]) -> None:
    """The norm before an empty branch belongs to the stream's neurons: its gradient is 0, but momentum and decay go on."""
    model = Net(
        lambda m, x: m.fc(F.relu(m.c(F.relu(m.join(m.stem(x))))).mean((2, 3))),
        stem=conv(3, 6), c=conv(6, 5), fc=nn.Linear(5, 3),
        join=Net(lambda m, h: h + m.b(F.relu(m.bn2(m.a(F.relu(m.bn1(h)))))), bn1=nn.BatchNorm2d(6), a=conv(6, 4, 3, padding=1, bias=False),
                 bn2=nn.BatchNorm2d(4), b=conv(4, 6, 3, padding=1)),
    ).double()  # fmt: skip
    randomise_(model)
    x = torch.randn(3, *CHANNELS_IN, dtype=torch.float64)
    neurons = find_neurons(model, x)
    optimizer = ProximalSGD(model.parameters(), neurons, SparseGroupLasso(beta=0.01), lr=0.05, **options)
    for step in range(20):
        if step == 3:
            neurons.zero_({"join.a": range(4)})
            result = compact(model, neurons, optimizer, example_inputs=x)
            twin = ProximalSGD(result.model.parameters(), result.neurons, SparseGroupLasso(beta=0.01), lr=0.05, **options)
            assert result.optimizer_state is not None
            twin.load_state_dict(result.optimizer_state)
        for network, its in [(model, optimizer)] if step < 3 else [(model, optimizer), (result.model, twin)]:
            its.zero_grad()
            network(x + step).square().mean().backward()
            its.step()
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-9, atol=1e-12)
    small = dict(result.model.named_parameters())
    assert all(p.grad is not None for p in small.values() if p.numel())  # DDP would wait for one that has none
    torch.testing.assert_close(small["join.bn1.weight"], model.get_parameter("join.bn1.weight"), rtol=1e-9, atol=1e-12)


def test_a_grouped_convolution_may_be_cut_twice() -> None:
    model = nn.Sequential(conv(3, 4, 3), nn.ReLU(), conv(4, 6, 3, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).double()
    randomise_(model)
    x = torch.randn(3, *CHANNELS_IN, dtype=torch.float64)
    neurons = find_neurons(model, x)
    neurons.zero_({"0": [0]})  # leaves one channel a group: it is no depthwise convolution for that
    once = compact(model, neurons, example_inputs=x)
    once.neurons.zero_({"2": [0]})
    check_exact(once.model, once.neurons, x)


class Mixing(nn.Module):
    """A 1 x 1 convolution by hand; asks for a value."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.matrix, self.shift = nn.Parameter(torch.randn(num_in, num_out)), nn.Parameter(torch.randn(num_out))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        if x.abs().sum().item() < 0:
            return x
        out = torch.einsum("nchw,cd->ndhw", x, self.matrix) + self.shift.view(1, -1, 1, 1)
        return out if gate is None else out * gate


MIXING = ModuleRule(channel_dim=-3, reads={"matrix": 0}, produces={"matrix": 1, "shift": 0})


def test_a_module_with_a_rule_may_be_called_twice_and_with_two_inputs() -> None:
    x = torch.randn(3, *CHANNELS_IN, dtype=torch.float64)
    twice = plain(
        lambda m, x: m.fc((F.relu(m.mix(F.relu(m.c1(x)))) + F.relu(m.mix(F.relu(m.c3(x))))).mean((2, 3))) + m.f2(F.relu(m.c1(x)).mean((2, 3))),
        c3=conv(3, 6), mix=Mixing(6, 5), f2=nn.Linear(6, 3),
    ).double()  # fmt: skip
    neurons = find_neurons(twice, x, rules={Mixing: MIXING})
    assert {piece.tensor for piece in neurons["c1"].producers} == {"c1.weight", "c1.bias", "c3.weight", "c3.bias"}
    neurons.zero_({"c1": [1], "mix": [0]})
    check_exact(twice, neurons, x)
    gated = plain(lambda m, x: m.fc(m.mix(F.relu(m.c1(x)), m.c2(F.relu(m.c1(x)))).mean((2, 3))), mix=Mixing(6, 5)).double()
    assert find_neurons(gated, x, rules={Mixing: MIXING}).pinned["c2"] == "a second input of Mixing 'mix'"


def test_of_several_outputs_each_is_compared() -> None:
    model = plain(lambda m, x: (m.fc(m.c2(F.relu(m.c1(x))).mean((2, 3))), {"other": m.f2(F.relu(m.c1(x)).mean((2, 3)))}), f2=nn.Linear(6, 2))
    x = torch.randn(3, *CHANNELS_IN)
    neurons = find_neurons(model, x)
    neurons.zero_({"c1": [0, 2]})
    assert compact(model, neurons).max_abs_difference <= 1e-9
    neurons["c1"].readers = neurons["c1"].readers[:1] + tuple(
        type(piece)(piece.tensor, piece.dim, piece.index.flip(0)) for piece in neurons["c1"].readers[1:]
    )
    with pytest.raises(RuntimeError, match="of layer 'c1' moves an output"):
        compact(model, neurons)


def test_indices_as_inputs_are_not_made_up() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.tensor([[1, 2], [3, 9]])
    neurons = find_neurons(model, x)
    assert [layer.name for layer in neurons] == ["1"]
    neurons.zero_({"1": [3]})
    with pytest.raises(ValueError, match="pass example_inputs"):
        compact(model, neurons)
    assert compact(model, neurons, example_inputs=x).widths["1"] == 5
