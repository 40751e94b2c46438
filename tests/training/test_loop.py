"""The loop on one process: what options change and what they must not, and resuming."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_gsl.training import checkpoint, loop
from dist_gsl.training.state import MovingAverage, RunState, buffers_matter, build
from tests.device import DEVICE, waits_are_errors
from tests.training.trainings import NETWORK, PENALTY, TRAIN, TensorBatches, equal, equal_tensors, trained


def test_neurons_die_within_the_schedule_and_stay_dead() -> None:
    state, records = trained(replace(TRAIN, shrink="never"))
    shares = [record["neurons"] for record in records]
    assert shares[0] == 0  # the penalty starts after the first epoch
    assert shares[2] > 5
    assert shares[3] == shares[2]  # and ends after the third
    assert [record["beta_factor"] for record in records] == [0, 1, 1, 0]
    for layer in state.neurons:
        dead = ~layer.alive()
        for rows in state.neurons.parts(layer):
            assert not rows[dead].any()
        assert rows[~dead].any()


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_resumed_equals_uninterrupted(tmp_path: Path, batch_norm: bool, ema: float | None) -> None:
    network, config = {**NETWORK, "batch_norm": batch_norm}, replace(TRAIN, ema=ema)
    whole, records = trained(config, network=network)
    saved: list[dict] = []
    data = TensorBatches()
    part = build(
        network,
        image_shape=(1, 32, 32),
        train=config,
        penalty=PENALTY,
        steps_per_epoch=len(data),
        device=DEVICE,
    )

    def stop(state: RunState, record: dict) -> None:
        if record["epoch"] == 3:
            checkpoint.save(state.state_dict(), tmp_path / "kept")
            saved.append(record)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        loop.train(part, config=config, penalty=PENALTY, training_data=data, validation_data=TensorBatches(), on_epoch=stop)
    assert saved[0]["neurons"] > 0
    resumed, rest = trained(config, state=checkpoint.load(tmp_path / "kept"), network=network)
    assert equal(whole, resumed)
    assert equal_tensors(whole.evaluated, resumed.evaluated)
    assert [record["val_loss"] for record in records[3:]] == [record["val_loss"] for record in rest]
    assert [record["epoch"] for record in resumed.history] == [1, 2, 3, 4]


def test_accumulation_changes_nothing_but_rounding() -> None:
    assert equal(trained()[0], trained(replace(TRAIN, accumulate=3))[0], tolerance=1e-4)


@pytest.mark.filterwarnings("ignore:layer .* would kill every neuron", "ignore:stepping after backward")
def test_options_that_must_change_something_do() -> None:
    plain = trained()[0]
    for option in (
        {"label_smoothing": 0.3}, {"max_grad_norm": 0.1}, {"weight_decay": 0.1}, {"nesterov": True}, {"seed": 1}, {"autocast": True},
    ):  # fmt: skip
        assert not equal(plain, trained(replace(TRAIN, **option))[0]), option


def test_without_penalty_nothing_dies() -> None:
    state, records = trained(penalty=PENALTY.without())
    assert records[-1]["all_neurons"] == 0
    assert records[-1]["beta_factor"] == 0
    assert all(bool(layer.alive().all()) for layer in state.neurons)


def test_the_averaged_copy_has_the_same_dead_neurons() -> None:
    state, _ = trained(replace(TRAIN, ema=0.5, shrink="never"))
    average = dict(state.evaluated.named_parameters())
    assert state.evaluated is not state.model
    num_dead = 0
    for layer in state.neurons:
        dead = (~layer.alive()).nonzero().flatten()
        num_dead += len(dead)
        for piece in (*layer.producers, *layer.readers):
            assert not piece.rows(average[piece.tensor])[dead].any()
    assert num_dead > 0


def test_the_average_is_that_of_torch() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.BatchNorm2d(3)).to(DEVICE)
    mine = MovingAverage(model, 0.9)
    theirs = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(4):
        model(torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(seed)).to(DEVICE)).square().sum().backward()
        optimizer.step()
        for each in (mine, theirs):
            each.update_parameters(model)
    assert equal_tensors(mine, theirs)
    assert not equal_tensors(mine.module, model)


def test_square_loss() -> None:
    _, records = trained(replace(TRAIN, loss="square"))
    assert {"val_rmse", "train_loss"} <= set(records[-1])
    assert "val_top1" not in records[-1]
    assert records[-1]["val_rmse"] == pytest.approx(records[-1]["val_loss"] ** 0.5)


def test_an_exploding_loss_ends_with_the_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"(not finite|times that of the first steps) in epoch \d.*; lower train.learning_rate"):
        trained(replace(TRAIN, learning_rate=1e6, warmup_epochs=0))


def test_init_takes_parameters_of_the_same_network_only(tmp_path: Path) -> None:
    first, _ = trained(replace(TRAIN, shrink="never"))
    file = checkpoint.save(first.state_dict(), tmp_path / "kept")
    data = TensorBatches()

    def start(network: dict) -> RunState:
        return build(
            network, image_shape=(1, 32, 32), train=replace(TRAIN, init=str(file)), penalty=PENALTY.without(),
            steps_per_epoch=len(data), device=DEVICE,
        )  # fmt: skip

    assert equal(first, start(NETWORK))
    with pytest.raises(ValueError, match="does not fit"):
        start({**NETWORK, "width": 1 / 8})


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"autocast": True}, {"accumulate": 2}, {"channels_last": True}], ids=str)
def test_on_a_gpu_the_host_waits_for_no_step(options: dict) -> None:
    config, data = replace(TRAIN, **options), TensorBatches()
    state = build(NETWORK, image_shape=(1, 32, 32), train=config, penalty=PENALTY, steps_per_epoch=len(data), device=DEVICE)
    batches = list(data)
    for batch in batches[:2]:  # DDP makes its buckets, kernels are compiled
        loop.train_step(state, config, batch)
    with waits_are_errors():
        for batch in batches[2:]:
            for group in state.optimizer.param_groups:
                group["lr"] *= 0.9  # the kernels' limits change with it
            loop.train_step(state, config, batch)


class Counting(nn.Module):
    """A layer whose forward reads what the last one left."""

    def __init__(self) -> None:
        super().__init__()
        self.count: torch.Tensor
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x * self.count


class Renormalised(nn.BatchNorm2d):
    """As batch renormalisation does, it reads running statistics in training."""


def test_buffers_that_matter_are_handed_out() -> None:
    plain = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()]
    assert not buffers_matter(nn.Sequential(*plain))
    assert buffers_matter(nn.Sequential(*plain, Counting()))
    assert buffers_matter(nn.Sequential(*plain, Renormalised(2)))
    assert buffers_matter(nn.Sequential(*plain, nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 2, 3))))
