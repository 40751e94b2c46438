"""BatchNorm's statistics of a moving average."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dist_gsl.penalty import PenaltyConfig, PerLayer, Schedule
from dist_gsl.training import loop
from dist_gsl.training.state import build
from dist_gsl.training.statistics import NUM_STEPS, estimate_statistics
from tests.device import DEVICE
from tests.training.trainings import NETWORK, TRAIN, TensorBatches


def test_they_are_the_means_of_the_parts_statistics() -> None:
    torch.manual_seed(0)
    conv, first, linear, second = (each.to(DEVICE) for each in (nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(27, 4), nn.BatchNorm1d(4)))
    model = nn.Sequential(conv, first, nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), linear, second)
    model(torch.randn(8, 1, 5, 5).to(DEVICE))
    tracked = first.get_buffer("num_batches_tracked").clone()
    parts = [torch.randn(size, 1, 5, 5, generator=torch.Generator().manual_seed(size)).to(DEVICE) for size in (4, 7)]
    estimate_statistics(model, parts)
    assert model.training
    assert first.momentum == 0.1
    assert torch.equal(first.get_buffer("num_batches_tracked"), tracked)
    inside = [conv(part) for part in parts]
    torch.testing.assert_close(first.running_mean, torch.stack([each.mean((0, 2, 3)) for each in inside]).mean(0))
    torch.testing.assert_close(first.running_var, torch.stack([each.transpose(0, 1).flatten(1).var(1) for each in inside]).mean(0))
    outputs = []  # nothing is dropped
    for each in inside:
        normalised = nn.functional.batch_norm(each, None, None, first.weight, first.bias, training=True)
        outputs.append(linear(normalised.relu().flatten(1)))
    torch.testing.assert_close(second.running_mean, torch.stack([each.mean(0) for each in outputs]).mean(0))


def test_a_network_without_batch_norm_is_not_even_run() -> None:
    def parts() -> None:
        raise AssertionError

    estimate_statistics(nn.Sequential(nn.Conv2d(1, 3, 3)), iter(parts, None))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_evaluated_has_the_statistics_of_its_own_weights(accumulate: int) -> None:
    """Under a penalty that takes all norms down within three epochs: an average of running statistics has those of weights that are gone."""
    config = replace(TRAIN, epochs=3, ema=0.9, accumulate=accumulate)
    penalty = PenaltyConfig(beta=PerLayer(rest=2.5), unit="epochs", beta_schedule=Schedule(start=0.5))
    data, validation = TensorBatches(num_steps=NUM_STEPS + 2), TensorBatches()
    state = build({**NETWORK, "batch_norm": True}, image_shape=(1, 32, 32), train=config, penalty=penalty, steps_per_epoch=len(data), device=DEVICE)
    records: list[dict] = []
    loop.train(state, config=config, penalty=penalty, training_data=data, validation_data=validation, on_epoch=lambda _, record: records.append(record))
    model = state.evaluated
    found = {name: buffer.clone() for name, buffer in model.named_buffers()}
    data.set_epoch(2, 2)
    estimate_statistics(model, [part for batch in data for part in batch.images.tensor_split(accumulate)])
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, found[name]), name
    assert any(float(a.max()) > 0 for name, a in found.items() if name.endswith("running_var"))
    assert records[-1]["val_loss"] == pytest.approx(loop.evaluate(model, validation, config, device=DEVICE)["loss"])
