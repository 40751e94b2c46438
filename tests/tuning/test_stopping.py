"""When there is no hope, worked out by hand."""

from dist_gsl.tuning.stopping import Moment, StoppingConfig, collapsed, hopeless


def curve(*points: tuple[float, float]) -> list[Moment]:
    return [Moment(epoch, quality, alive) for epoch, (quality, alive) in enumerate(points, start=1)]


FINISHED = [
    curve((60, 100), (80, 80), (88, 60), (90, 60)),  # from epoch 2 on: +10 quality, -20 alive
    curve((62, 100), (82, 90), (89, 80), (92, 80)),  # +10, -10
    curve((55, 100), (70, 40), (76, 30), (80, 30)),  # +10, -10
]
RULES = StoppingConfig(min_finished=3, min_epochs=2, margin_quality=0.0, margin_alive=2.0)


def test_a_trial_that_cannot_reach_the_front_is_stopped() -> None:
    # At best 79 + 10 = 89 with 90 - 20 = 70 alive: (90, 60) dominates that.
    reason = hopeless(curve((60, 100), (79, 90)), FINISHED, penalty_is_over=False, config=RULES)
    assert reason is not None
    assert "at best 89.00 with 70.0 %" in reason


def test_it_goes_on_while_its_best_case_is_not_dominated() -> None:
    # At best 91 with 70 alive: (90, 60) has less quality, (92, 80) more neurons.
    assert hopeless(curve((60, 100), (81, 90)), FINISHED, penalty_is_over=False, config=RULES) is None


def test_neurons_that_may_still_die_count() -> None:
    late = curve((60, 100), (75, 60))  # at best 85 with 40: nothing has less than 40 but (80, 30)
    assert hopeless(late, FINISHED, penalty_is_over=False, config=RULES) is None
    # Without penalty it keeps its 60, which (90, 60) has too: not fewer by the margin.
    assert hopeless(late, FINISHED, penalty_is_over=True, config=RULES) is None
    assert hopeless(curve((60, 100), (75, 63)), FINISHED, penalty_is_over=True, config=RULES) is not None


def test_nobody_is_judged_early_or_alone() -> None:
    bad = curve((10, 100), (10, 100))
    assert hopeless(bad, FINISHED[:2], penalty_is_over=True, config=RULES) is None
    assert hopeless(bad[:1], FINISHED, penalty_is_over=True, config=RULES) is None
    assert hopeless([], FINISHED, penalty_is_over=True, config=RULES) is None
    assert hopeless(bad, FINISHED, penalty_is_over=True, config=RULES) is not None


def test_a_margin_of_quality_spares_the_close_ones() -> None:
    close = curve((60, 100), (79.9, 90))  # at best 89.9
    assert hopeless(close, FINISHED, penalty_is_over=False, config=RULES) is not None
    wide = StoppingConfig(min_finished=3, min_epochs=2, margin_quality=0.02, margin_alive=2.0)  # 0.02 x 12 = 0.24
    assert hopeless(close, FINISHED, penalty_is_over=False, config=wide) is None


def test_a_layer_that_lives_by_min_alive_alone_has_collapsed() -> None:
    neurons = {"a": 16, "b": 16, "c": 2}
    assert collapsed({"a": 3, "b": 1, "c": 1}, neurons=neurons, min_alive=1) == "b"
    assert collapsed({"a": 3, "b": 2, "c": 1}, neurons=neurons, min_alive=1) is None
    assert collapsed({"a": 3, "b": 2, "c": 1}, neurons=neurons, min_alive=2) == "b"
    assert collapsed({"a": 3, "b": 0, "c": 1}, neurons=neurons, min_alive=0) == "b"
