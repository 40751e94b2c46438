"""Handwritten digits in a few epochs: does a search work here? Minutes on two cores."""

from dataclasses import replace

from dist_gsl.config import RunConfig
from dist_gsl.recipes import find
from dist_gsl.tuning import Choice, Float, When


def base() -> RunConfig:
    digits = find("digits")
    return replace(digits, train=replace(digits.train, epochs=6))


def space():
    return {
        "penalty.beta.rest": Float(1.2, 4.0, log=True),
        "penalty.beta.num_first": Choice([0, 2]),
        "penalty.beta.first": When("penalty.beta.num_first", [2], Float(1.2, 6.0, log=True)),
        "penalty.alpha.rest": Choice([0.0, 0.5]),
        "penalty.beta_schedule.start": Float(0.5, 1.5),
        "penalty.beta_schedule.end": Float(3.5, 5.0),
    }
