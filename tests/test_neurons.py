"""Slices, and neurons as a state: killing, copies, saving and loading."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dist_gsl import find_neurons
from dist_gsl.neurons import Neurons, Slice
from tests.networks import IMAGE, chain

# --- slices


def test_block_slices_are_views_and_others_are_copies() -> None:
    tensor = torch.randn(8, 3)
    rows = Slice.block("x", 0, 4, start=2).rows(tensor)
    assert torch.equal(rows, tensor[2:6])
    assert rows.data_ptr() == tensor[2:].data_ptr()
    pairs = Slice.block("x", 0, 4, size=2).rows(tensor)
    assert pairs.shape == (4, 2, 3)
    assert pairs.data_ptr() == tensor.data_ptr()
    scattered = Slice("x", 0, torch.tensor([[3], [1]]))
    assert not scattered.is_block
    rows = scattered.rows(tensor)
    assert torch.equal(rows, tensor[[3, 1]])
    rows.zero_()
    assert tensor.all()


@given(st.permutations(range(6)), st.sampled_from([0, 1, 2]), st.sampled_from([1, 2]))
def test_rows_written_back_change_nothing_and_cleared_ones_are_the_neurons(
    order: list[int], dim: int, size: int
) -> None:
    tensor = torch.randn(6, 6, 6, generator=torch.Generator().manual_seed(0))
    before = tensor.clone()
    piece = Slice("x", dim, torch.tensor(order[: 2 * size]).view(2, size))
    rows = piece.rows(tensor).clone()
    piece.write_(tensor, rows)
    assert torch.equal(tensor, before)
    if not piece.is_block:
        piece.write_(tensor, 2 * rows)
        assert torch.equal(piece.rows(tensor), 2 * rows)
    piece.clear_(tensor, torch.tensor([1]))
    cleared = order[size : 2 * size]
    assert not tensor.index_select(dim, torch.tensor(cleared)).any()
    others = torch.tensor([i for i in range(6) if i not in order[: 2 * size]])
    assert torch.equal(tensor.index_select(dim, others), before.index_select(dim, others))


# --- killing


@pytest.fixture
def neurons() -> Neurons:
    return find_neurons(chain(), torch.randn(2, *IMAGE))


def test_zero_clears_group_readers_gradients_and_copies_and_nothing_else(neurons: Neurons) -> None:
    parameters = dict(neurons.model.named_parameters())
    average = {name: torch.full_like(p, 2.0) for name, p in parameters.items()}
    neurons.register_copy(lambda: [average])
    for p in parameters.values():
        nn.init.constant_(p, 1.0)
        p.grad = torch.full_like(p, 3.0)
    neurons.zero_({"conv2": [1, 5]})

    expected = {name: torch.ones_like(p) for name, p in parameters.items()}
    for name in ("conv2.weight", "conv2.bias", "bn2.weight", "bn2.bias"):
        expected[name][[1, 5]] = 0
    expected["fc1.weight"][:, [4, 5, 6, 7, 20, 21, 22, 23]] = 0  # each map is 2 x 2 when it is flattened
    for name, p in parameters.items():
        assert torch.equal(p, expected[name]), name
        assert p.grad is not None
        assert torch.equal(p.grad, 3 * expected[name]), name
        assert torch.equal(average[name], 2 * expected[name]), name
    assert neurons["conv2"].alive().tolist() == [True, False, True, True, True, False, True, True]
    assert neurons["conv2"].num_dead == 2
    assert neurons["conv1"].alive().all()


def test_zero_takes_lists_ranges_and_tensors(neurons: Neurons) -> None:
    neurons.zero_({"conv1": range(2), "conv2": torch.tensor([3]), "fc1": []})
    assert [layer.num_dead for layer in neurons] == [2, 1, 0]


def test_alive_is_a_copy(neurons: Neurons) -> None:
    neurons["conv1"].alive()[:] = False
    assert neurons["conv1"].alive().all()


@pytest.mark.parametrize("indices", [[6], [-1], [0, 100]])
def test_there_is_no_such_neuron(neurons: Neurons, indices: list[int]) -> None:
    with pytest.raises(IndexError, match="'conv1' has neurons 0 to 5"):
        neurons.zero_({"conv1": indices})


def test_a_mask_is_not_indices(neurons: Neurons) -> None:
    with pytest.raises(IndexError, match=r"conv1.*indices"):
        neurons.zero_({"conv1": neurons["conv1"].alive()})
    assert neurons["conv1"].alive().all()


def test_pinned_and_unknown_layers_are_refused_by_name(neurons: Neurons) -> None:
    with pytest.raises(KeyError, match=r"fc2.*pinned.*outputs"):
        neurons.zero_({"fc2": [0]})
    with pytest.raises(KeyError, match=r"no layer 'conv9'.*conv1, conv2, fc1"):
        neurons["conv9"]


# --- saving and loading


def test_state_goes_through_a_weights_only_file(neurons: Neurons, tmp_path: Path) -> None:
    neurons.zero_({"conv1": [0, 3], "fc1": [6]})
    torch.save(neurons.state_dict(), tmp_path / "neurons.pt")
    other = find_neurons(chain(seed=1), torch.randn(2, *IMAGE))
    other.load_state_dict(torch.load(tmp_path / "neurons.pt", weights_only=True))
    for layer, same in zip(neurons, other, strict=True):
        assert torch.equal(layer.mask, same.mask)
        assert torch.equal(layer.indices, same.indices)


def test_state_is_a_copy(neurons: Neurons) -> None:
    state = neurons.state_dict()
    neurons.zero_({"conv1": [0]})
    assert state["conv1"]["mask"].all()
    neurons.load_state_dict(state)
    neurons.zero_({"conv1": [0]})
    assert state["conv1"]["mask"].all()


def test_state_of_another_network_is_refused(neurons: Neurons) -> None:
    state = neurons.state_dict()
    wider = dict(state, conv1={**state["conv1"], "mask": torch.ones(7, dtype=torch.bool)})
    with pytest.raises(ValueError, match="'conv1' has 6 neurons, the state 7"):
        neurons.load_state_dict(wider)
    del state["fc1"]
    with pytest.raises(ValueError, match="fc1"):
        neurons.load_state_dict(state)


def test_bound_to_another_model(neurons: Neurons) -> None:
    other = chain(seed=1)
    same = neurons.bound_to(other)
    same.zero_({"conv1": [2]})
    assert not other.get_parameter("conv1.weight")[2].any()
    assert neurons.parameter("conv1.weight")[2].all()
    assert neurons["conv1"].alive().all()
    assert same.pinned == neurons.pinned


def test_parts_are_the_whole_neuron(neurons: Neurons) -> None:
    parts: list[Tensor] = neurons.parts(neurons["conv2"])
    assert [tuple(part.shape) for part in parts] == [(8, 6, 3, 3), (8,), (8,), (8,)]
    assert neurons["conv2"].group_size == 6 * 9 + 3
