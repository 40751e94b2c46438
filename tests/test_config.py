"""Configs: what is written is what is read, and what does not fit is refused by one line that names it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_gsl.config import RunConfig, check_field, field_names
from dist_gsl.training.config import TrainConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"epoch": 3}}, "no field is called 'train.epoch'; did you mean train.epochs"),
        ({"penalti": {}}, "no field is called 'penalti'; did you mean penalty"),
        ({"train": {"epochs": "many"}}, "train.epochs is 'many', must be int"),
        ({"train": {"epochs": True}}, "train.epochs is True, must be int"),
        ({"train": 3}, "train must be a mapping"),
        ({"penalty": {"alpha": {"rest": 1.5}}}, r"alpha is 1.5, must lie in \[0, 1\]"),
        ({"penalty": {"beta": {"first": -1}}}, "beta is -1.0, must be a finite number >= 0"),
        ({"penalty": {"beta_schedule": {"start": 3, "end": 2}}}, "needs start >= 0"),
        ({"data": {"augment": "mirror"}}, "data.augment is 'mirror', must be one of none"),
        ({"data": {"start_size": 128}}, "data.full_size_epoch is 0, must be at least 1 with data.start_size"),
        ({"data": {"full_size_epoch": 3}}, "and 0 without"),
        ({"data": {"start_size": 4, "full_size_epoch": 3}}, "data.start_size is 4, must be at least 8"),
        ({"data": {"memory_gb": 0.0}}, "data.memory_gb is 0.0, must be above 0"),
        ({"train": {"seed": None}}, "train.seed must have a value"),
        ({"network": {"name": "dec33"}}, "dec3"),
        ({"workers": {"num": 0}}, "workers.num is 0"),
        ({"workers": {"num": 2, "min": 3}}, "workers.min is 3, must be from 1 to workers.num 2"),
        ({"workers": {"resize_interval": 0.0}}, "workers.resize_interval is 0.0, must be above 0"),
        ({"train": {"checkpoint_steps": 0}}, "train.checkpoint_steps is 0, must be at least 1"),
        ({"train": {"checkpoint_minutes": 0.0}}, "train.checkpoint_minutes is 0.0, must be above 0"),
    ],
)
def test_what_does_not_fit_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(values)


@given(
    epochs=st.integers(1, 100), rate=st.floats(1e-6, 10), drops=st.lists(st.floats(0, 50), max_size=4),
    by_layer=st.dictionaries(st.text(min_size=1, max_size=5), st.floats(0, 5), max_size=3), decay=st.none() | st.floats(0.1, 0.999),
)  # fmt: skip
def test_dict_and_back(
    epochs: int, rate: float, drops: list[float], by_layer: dict[str, float], decay: float | None
) -> None:
    values = {
        "train": {"epochs": epochs, "learning_rate": rate, "drop_epochs": drops, "ema": decay},
        "penalty": {"beta": {"by_layer": by_layer}},
    }
    config = RunConfig.from_dict(values)
    assert RunConfig.from_dict(config.to_dict()) == config
    assert config.train.drop_epochs == tuple(drops)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for content in (b"\xff\xfe\x00", b"- a list", b"a: [1"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="config"):
            RunConfig.load(file)


def test_field_names_are_those_of_the_command_line() -> None:
    assert {"train.epochs", "penalty.beta.rest", "data.source", "workers.num"} <= set(field_names())
    with pytest.raises(ValueError, match="did you mean"):
        check_field("train.learningrate", field_names())


@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_learning_rates(schedule: str) -> None:
    config = TrainConfig(epochs=10, learning_rate=0.4, schedule=schedule, warmup_epochs=2, drop_epochs=(4.0, 8.0))
    rates = [config.learning_rate_at(step, steps_per_epoch=10) for step in range(100)]
    assert rates[:20] == pytest.approx([0.4 * (i + 1) / 20 for i in range(20)])
    assert max(rates) == pytest.approx(0.4)
    if schedule == "constant":
        assert set(rates[20:]) == {0.4}
    elif schedule == "step":
        assert rates[39] == pytest.approx(0.4)
        assert rates[40] == rates[79] == pytest.approx(0.04)
        assert rates[80] == pytest.approx(0.004)
    else:
        assert rates[60] == pytest.approx(0.2)  # half way of 2..10
        assert rates[20:] == sorted(rates[20:], reverse=True)
