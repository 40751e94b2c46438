"""What a launch makes of signals."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest
from ray.util.queue import Empty

from dist_gsl import launch


class AskedToEndError(Exception):
    """What the handler of these tests raises."""


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """Signals that reach the handler that was there before."""
    reached: list[int] = []

    def handler(number: int, frame: object) -> None:
        reached.append(number)
        raise AskedToEndError

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield reached
    for number, was in before.items():
        signal.signal(number, was)


def send(*numbers: int) -> list[str]:
    """Signals sent to this process within the context; what happened, in order."""
    happened: list[str] = []
    try:
        with launch._postponed_signals() as signals:
            for number in numbers:
                os.kill(os.getpid(), number)
                happened.append(f"after {signals}")
    except AskedToEndError:
        happened.append("handled")
    return happened


class Happening:
    """The events of a training and the training itself: those that come one after another. A test double of Ray's queue and trainer."""

    def __init__(self, *events: tuple) -> None:
        self.events = list(events)
        self.is_told = threading.Event()

    def get(self, timeout: float) -> tuple:
        if not self.events:
            self.is_told.set()
            raise Empty
        return self.events.pop(0)

    def fit(self) -> None:
        assert self.is_told.wait(30)


def test_what_failed_workers_said_is_forgotten_when_others_began() -> None:
    def outcome(*events: tuple) -> str | None:
        happening = Happening(*events)
        return launch._fit(happening, happening, launch.Listener(), lambda: None)

    assert outcome(("begun",), ("failed", "no room")) == "no room"
    assert outcome(("begun",), ("failed", "no room"), ("begun",), ("note", "on")) is None


@pytest.mark.parametrize("number", [int(signal.SIGINT), int(signal.SIGTERM)])
def test_the_first_signal_waits_for_the_end(number: int, handled: list[int]) -> None:
    assert send(number) == [f"after [{number}]", "handled"]
    assert handled == [number]


def test_the_second_does_not_wait(handled: list[int]) -> None:
    first, second = int(signal.SIGTERM), int(signal.SIGINT)
    assert send(first, second) == [f"after [{first}]", "handled"]
    assert handled == [second]


def test_signals_are_as_before_when_nothing_came(handled: list[int]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with launch._postponed_signals() as signals:
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    assert (signals, handled) == ([], [])


def test_on_another_thread_signals_are_left_alone(handled: list[int]) -> None:
    before, inside = signal.getsignal(signal.SIGTERM), list[object]()

    def other() -> None:
        with launch._postponed_signals():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert inside == [before]
