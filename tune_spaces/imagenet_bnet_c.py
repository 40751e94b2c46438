"""ImageNet with the paper's BNet^C."""

from dist_gsl.config import RunConfig
from dist_gsl.recipes import find
from dist_gsl.tuning import Choice, Float, When


def base() -> RunConfig:
    return find("bnet-c-imagenet-gs")


def space():
    return {
        "penalty.beta.rest": Float(8.0, 60.0, log=True),
        "penalty.beta.num_first": Choice([0, 2, 3]),
        "penalty.beta.first": When("penalty.beta.num_first", [2, 3], Float(8.0, 150.0, log=True)),
        "penalty.alpha.rest": Choice([0.0, 0.25, 0.5]),
        "penalty.beta_schedule.start": Float(0.5, 5.0),
        "penalty.beta_schedule.ramp": Choice([0.0, 5.0]),
        "penalty.beta_schedule.end": Float(30.0, 50.0),
    }
