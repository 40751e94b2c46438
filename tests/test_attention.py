"""Attention loses heads and channels of heads, exactly, and still does all that torch's does."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_gsl import compact, find_neurons, measure
from dist_gsl.attention import UnevenMultiheadAttention
from tests.exactness import check_exact, differences, kill_a_third_, randomise_

WIDTH, HEADS = 12, 3


class Encoder(nn.Module):
    """linear -> attention, with or without a shortcut -> linear; what is given to the attention is chosen by the test."""

    def __init__(self, *, shortcut: bool = True, batch_first: bool = True, bias: bool = True, cross: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.memory, self.last = nn.Linear(5, WIDTH), nn.Linear(5, WIDTH), nn.Linear(WIDTH, 4)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=batch_first)
        self.shortcut, self.cross, self.options = shortcut, cross, options

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        m = self.memory(x) if self.cross else h
        attended, weights = self.attention(h, m, m, **self.options)
        out = self.last(h + attended if self.shortcut else attended)
        return out + weights.square().mean() if self.options.get("need_weights", True) else out


MASKED = torch.ones(7, 7, dtype=torch.bool).triu(1)


@pytest.mark.parametrize(
    "options",
    [
        {"need_weights": False}, {}, {"shortcut": False}, {"batch_first": False}, {"bias": False}, {"cross": True}, {"average_attn_weights": False},
        {"attn_mask": MASKED, "need_weights": False}, {"attn_mask": MASKED, "is_causal": True, "need_weights": False},
    ],
)  # fmt: skip
def test_channels_of_heads_and_whole_heads_go_unnoticed(options: dict[str, Any]) -> None:
    model = Encoder(**options)
    randomise_(model)
    x = torch.randn(2, 7, 5)
    neurons = find_neurons(model, x)
    query_key, value = neurons["attention.query_key"], neurons["attention.value"]
    assert (query_key.num_neurons, value.num_neurons) == (WIDTH, WIDTH)
    assert query_key.group_size == 2 * (WIDTH + model.attention.in_proj_bias.numel() // (3 * WIDTH) if options.get("bias", True) else WIDTH)
    # A head without values, one without queries, one with a few of both: channels 0 to 3, 4 to 7, 8 to 11.
    neurons.zero_({"attention.value": [0, 1, 2, 3, 9], "attention.query_key": [4, 5, 6, 7, 8, 11]})
    check_exact(model, neurons, x)
    attention = compact(model, neurons).model.attention
    assert isinstance(attention, UnevenMultiheadAttention)
    assert attention.value_heads == (1, 1, 1, 1, 2, 2, 2)
    assert attention.query_key_heads == (0, 0, 0, 0, 2, 2)
    assert attention.in_proj_weight.shape[0] == 2 * 6 + 7


def test_a_live_channel_is_missed() -> None:
    model = Encoder(need_weights=False)
    randomise_(model)
    x = torch.randn(2, 7, 5)
    neurons = find_neurons(model, x)
    for name in ("attention.query_key", "attention.value"):
        other = neurons.bound_to(copy.deepcopy(model))
        other.zero_({name: [5]})
        assert (model(x) - other.model(x)).abs().max() > 1e-3


def test_all_of_it_goes_where_there_is_a_way_around_it() -> None:
    x = torch.randn(2, 7, 5)
    assert not find_neurons(Encoder(shortcut=False), x)["attention.value"].bypassed
    model = Encoder(need_weights=False)
    randomise_(model)
    neurons = find_neurons(model, x)
    assert neurons["attention.value"].bypassed
    neurons.zero_({"attention.value": range(WIDTH), "attention.query_key": range(WIDTH)})
    check_exact(model, neurons, x)
    assert compact(model, neurons).model.get_parameter("attention.in_proj_weight").numel() == 0


def test_it_shrinks_again_and_is_followed_again() -> None:
    model = Encoder(need_weights=False)
    randomise_(model)
    x = torch.randn(2, 7, 5)
    neurons = find_neurons(model, x)
    neurons.zero_({"attention.value": [1, 2, 11], "attention.query_key": [0, 9]})
    once = compact(model, neurons)
    once.neurons.zero_({"attention.value": [0, 8], "attention.query_key": [3]})
    check_exact(once.model, once.neurons, x)
    assert once.neurons["attention.value"].indices[[0, 8]].tolist() == [0, 10]
    again = find_neurons(once.model, x)
    assert again["attention.value"].num_neurons == 9
    assert again["attention.query_key"].num_neurons == 10
    kill_a_third_(again)
    check_exact(once.model, again, x)


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_smaller_one_takes_what_torchs_takes(need_weights: bool) -> None:
    """Masks of both kinds and shapes, one sequence without a batch, weights by head."""
    model = Encoder(need_weights=False)
    randomise_(model)
    neurons = find_neurons(model, torch.randn(2, 7, 5))
    neurons.zero_({"attention.value": [0, 1, 2, 3, 9], "attention.query_key": [4, 8]})
    whole, small = (m.double().get_submodule("attention") for m in (model, compact(model, neurons).model))
    query, key = torch.randn(2, 5, WIDTH, dtype=torch.float64), torch.randn(2, 6, WIDTH, dtype=torch.float64)
    blocked = torch.rand(2 * HEADS, 5, 6) < 0.3
    blocked[..., 0] = False
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    cases: list[dict[str, Any]] = [
        {}, {"attn_mask": blocked}, {"attn_mask": blocked[0]}, {"key_padding_mask": padding}, {"attn_mask": blocked[1], "key_padding_mask": padding},
        {"attn_mask": torch.randn(5, 6, dtype=torch.float64)}, {"average_attn_weights": False},
    ]  # fmt: skip
    for case in cases:
        for q, k in ((query, key), (query[0], key[0])):
            if q.dim() == 2 and ("key_padding_mask" in case or case.get("attn_mask") is blocked):
                continue
            expected, given = (m(q, k, k, need_weights=need_weights, **case) for m in (whole, small))
            torch.testing.assert_close(given[0], expected[0], rtol=0, atol=1e-12)
            if need_weights:
                torch.testing.assert_close(given[1], expected[1], rtol=0, atol=1e-12)


class Unlike(nn.MultiheadAttention):
    def forward(self, *given: Any, **options: Any) -> Any:
        out, weights = super().forward(*given, **options)
        return out + 1, weights


@pytest.mark.parametrize(
    "attention",
    [
        nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True, batch_first=True), nn.MultiheadAttention(WIDTH, HEADS, add_zero_attn=True, batch_first=True),
        Unlike(WIDTH, HEADS, batch_first=True),
    ],
)  # fmt: skip
def test_attention_of_another_kind_stays(attention: nn.MultiheadAttention) -> None:
    model = Encoder(need_weights=False)
    model.attention = attention
    neurons = find_neurons(model, torch.randn(2, 7, 5))
    assert not any(layer.name.startswith("attention") for layer in neurons)
    kill_a_third_(neurons)
    check_exact(model, neurons, torch.randn(2, 7, 5))


def test_training_goes_on_as_with_the_whole_one() -> None:
    model = Encoder(need_weights=False)
    randomise_(model)
    x = torch.randn(4, 7, 5)
    neurons = find_neurons(model, x)
    neurons.zero_({"attention.value": [0, 1, 2, 3], "attention.query_key": [5]})
    small = compact(model, neurons).model
    assert differences(model, neurons, small, x, training=True).worst <= 1e-12


def test_measures_speak_of_hidden_layers_where_there_is_no_convolution() -> None:
    model = Encoder(need_weights=False)
    randomise_(model)
    neurons = find_neurons(model, torch.randn(2, 7, 5))
    neurons.zero_({"attention.value": [0, 1, 2, 3], "attention.query_key": [5]})
    found, small = measure(model, neurons), compact(model, neurons)
    sizes = [{name: p.numel() for name, p in m.named_parameters() if not name.startswith("memory")} for m in (model, small.model)]
    hidden = sum(size for name, size in sizes[0].items() if not name.startswith("last"))
    in_groups = 4 * (WIDTH + 1) + 2 * (WIDTH + 1)
    assert found.group_param == found.total_param == pytest.approx(100 * in_groups / hidden)
    assert found.total_induced == pytest.approx(100 * (1 - sum(sizes[1].values()) / sum(sizes[0].values())))
    assert found.neurons == found.all_neurons == pytest.approx(100 * 5 / (3 * WIDTH))
    assert measure(small.model, small.neurons) == found


def test_a_hint_without_its_mask_is_refused_as_torch_refuses_it() -> None:
    model = Encoder(need_weights=False)
    neurons = find_neurons(model, torch.randn(2, 7, 5))
    neurons.zero_({"attention.value": [0]})
    x = torch.randn(2, 7, WIDTH)
    for network in (model, compact(model, neurons).model):
        with pytest.raises(RuntimeError, match="attn_mask"):
            network.get_submodule("attention")(x, x, x, is_causal=True)


class Net(nn.Module):
    def __init__(self, function: Any, **members: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def attention(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)


def test_queries_stay_where_the_input_is_seen_through_them_alone() -> None:
    """Keys and values are learned: without queries the output would not depend on the input."""
    book = Net(lambda m, x: m.last(m.a(m.first(x), m.book.expand(2, 3, WIDTH), m.book.expand(2, 3, WIDTH))[0]),
               first=nn.Linear(5, WIDTH), a=attention(), last=nn.Linear(WIDTH, 4), book=nn.Parameter(torch.randn(1, 3, WIDTH)))  # fmt: skip
    weights = Net(lambda m, x: m.last(m.a(m.first(x), m.first(x), m.first(x))[1]), first=nn.Linear(5, WIDTH), a=attention(), last=nn.Linear(7, 4))
    for model in (book, weights):
        neurons = find_neurons(model, torch.randn(2, 7, 5))
        assert not neurons["a.query_key"].bypassed
    assert not find_neurons(book, torch.randn(2, 7, 5))["a.value"].bypassed


def test_queries_without_values_die_with_them() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k = m.q(m.first(x)), m.k(m.first(x))
        return m.last(m.first(x) + m.a(q, k, m.first(x), need_weights=False)[0])

    layers = {name: nn.Linear(WIDTH, WIDTH) for name in ("q", "k")}
    model = Net(forward, first=nn.Linear(5, WIDTH), a=attention(), last=nn.Linear(WIDTH, 4), **layers)
    randomise_(model)
    x = torch.randn(2, 7, 5)
    neurons = find_neurons(model, x)
    neurons.zero_({"a.value": range(WIDTH)})
    assert not neurons["a.query_key"].mask.any()
    check_exact(model, neurons, x)
    taken = Net(lambda m, x: m.last(m.first(x) + m.a(m.first(x), m.first(x), m.first(x))[0]) + m.a(m.first(x), m.first(x), m.first(x))[1].sum(),
                first=nn.Linear(5, WIDTH), a=attention(), last=nn.Linear(WIDTH, 4))  # fmt: skip
    neurons = find_neurons(taken, x)
    neurons.zero_({"a.value": range(WIDTH)})
    assert neurons["a.query_key"].mask.all()  # the weights of attention are seen elsewhere


@pytest.mark.parametrize("how", ["called twice", "two with the same weights"])
def test_shared_attention_is_followed(how: str) -> None:
    model = Net(lambda m, x: m.last(m.b(m.a(m.first(x), m.first(x), m.first(x))[0], m.first(x), m.first(x))[0]),
                first=nn.Linear(5, WIDTH), a=attention(), b=attention(), last=nn.Linear(WIDTH, 4))  # fmt: skip
    if how == "called twice":
        model.b = model.a
    else:
        for name in ("in_proj_weight", "in_proj_bias"):
            model.get_submodule("b").register_parameter(name, model.get_parameter(f"a.{name}"))
    randomise_(model)
    x = torch.randn(2, 7, 5)
    neurons = find_neurons(model, x)
    assert neurons["a.value"].num_neurons == WIDTH
    assert kill_a_third_(neurons) > 8
    check_exact(model, neurons, x)


def test_what_it_gives_may_be_taken_by_a_slice_and_added_in_place() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        h += m.a(h, h, h, need_weights=False)[:1][0]
        return m.last(h)

    model = Net(forward, first=nn.Linear(5, WIDTH), a=attention(), last=nn.Linear(WIDTH, 4))
    randomise_(model)
    x = torch.randn(2, 7, 5)
    neurons = find_neurons(model, x)
    neurons.zero_({"a.value": [0, 1, 2, 3, 9], "a.query_key": [5]})
    check_exact(model, neurons, x)  # its backward pass too


def test_the_smaller_one_may_come_from_nowhere() -> None:
    model = Encoder(need_weights=False)
    neurons = find_neurons(model, torch.randn(2, 7, 5))
    neurons.zero_({"attention.value": [0, 1, 2, 3, 9], "attention.query_key": [4]})
    small = compact(model, neurons).model
    x = torch.randn(2, 7, 5)
    emptied, assigned = copy.deepcopy(small).to_empty(device="cpu"), copy.deepcopy(small).to("meta")
    emptied.load_state_dict(small.state_dict())
    assigned.load_state_dict(small.state_dict(), assign=True)
    for other in (emptied, assigned):
        assert torch.equal(other(x), small(x))


def test_attention_that_lost_nothing_is_torchs() -> None:
    model = Encoder(need_weights=False)
    neurons = find_neurons(model, torch.randn(2, 7, 5))
    assert type(compact(model, neurons).model.get_submodule("attention")) is nn.MultiheadAttention
