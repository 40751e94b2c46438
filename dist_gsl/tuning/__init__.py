"""Searching for the penalty: a space of configs, trials on Ray Tune, and the front of accuracy against neurons.

A file of `tune_spaces/` imports the domains from here.
"""

from dist_gsl.tuning.space import Choice, Float, Int, When

__all__ = ["Choice", "Float", "Int", "When"]
