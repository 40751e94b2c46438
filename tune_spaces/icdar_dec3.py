"""The ICDAR characters with the paper's Dec3."""

from dist_gsl.config import RunConfig
from dist_gsl.recipes import find
from dist_gsl.tuning import Choice, Float, When


def base() -> RunConfig:
    return find("dec3-icdar-gs")


def space():
    return {
        "penalty.beta.rest": Float(2.0, 15.0, log=True),
        "penalty.beta.num_first": Choice([0, 1, 2]),
        "penalty.beta.first": When("penalty.beta.num_first", [1, 2], Float(2.0, 30.0, log=True)),
        "penalty.alpha.rest": Choice([0.0, 0.25, 0.5]),
        "penalty.beta_schedule.start": Float(0.5, 4.0),
        "penalty.beta_schedule.ramp": Choice([0.0, 2.0]),
        "penalty.beta_schedule.end": Float(20.0, 40.0),
    }
