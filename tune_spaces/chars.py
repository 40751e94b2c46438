"""The demo's rendered characters with Dec3: a few minutes a trial on two cores."""

from dist_gsl.config import RunConfig
from dist_gsl.recipes import find
from dist_gsl.tuning import Choice, Float, When


def base() -> RunConfig:
    return find("dec3-chars")


def space():
    epochs = base().train.epochs
    return {
        "penalty.beta.rest": Float(0.4, 4.0, log=True),
        "penalty.beta.num_first": Choice([0, 2, 4]),
        "penalty.beta.first": When("penalty.beta.num_first", [2, 4], Float(0.4, 8.0, log=True)),
        "penalty.alpha.rest": Choice([0.0, 0.25, 0.5]),
        "penalty.beta_schedule.start": Float(0.5, 0.25 * epochs),
        "penalty.beta_schedule.ramp": Choice([0.0, 1.0, 2.0]),
        "penalty.beta_schedule.end": Choice([None, 0.6 * epochs, 0.75 * epochs]),
    }
