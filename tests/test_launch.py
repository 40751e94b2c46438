"""What a launch makes of signals."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from dist_gsl import events, launch
from dist_gsl.training.config import WorkersConfig


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
    asked = threading.Event()
    try:
        with events.postponed_signals(asked.set) as times:
            for number in numbers:
                os.kill(os.getpid(), number)
                happened.append(f"{len(times)} after {number}")
                assert asked.wait(30)
    except AskedToEndError:
        happened.append("handled")
    return happened


class Happening:
    """The events of a training and the training itself, told all at once. A test double of `Control` and of Ray's trainer."""

    def __init__(self, *events: tuple) -> None:
        self.events = list(events)
        self.is_told = threading.Event()

    def take(self, timeout: float) -> list[tuple]:
        if not self.events:
            self.is_told.set()
        taken, self.events = self.events, []
        return taken

    def fit(self) -> None:
        assert self.is_told.wait(30)


def test_what_failed_workers_said_is_forgotten_when_others_began() -> None:
    def outcome(*told: tuple) -> str | None:
        happening = Happening(*told)
        return events.fit(happening, happening.take, events.Listener(), stop=lambda: None)

    assert outcome(("begun",), ("failed", "no room")) == "no room"
    assert outcome(("begun",), ("failed", "no room"), ("begun",), ("note", "on")) is None


def test_who_asks_for_the_end_does_not_wait_for_what_is_told(handled: list[int]) -> None:
    """A tracking server that does not answer, say."""
    stopped = threading.Event()

    class Slow(events.Listener):
        def note(self, text: str) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopped.wait(30)

    happening = Happening(("note", "an epoch"), ("note", "another"))
    with pytest.raises(AskedToEndError):
        events.fit(happening, happening.take, Slow(), stop=stopped.set)


class Told(events.Listener):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def test_too_few_machines_are_waited_for_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SHORTAGE_EVERY_S", 0.0)
    nodes = [{"CPU": 4.0}]
    monkeypatch.setattr(launch, "_alive_nodes", lambda: nodes)
    told, shortage = Told(), launch._Shortage(WorkersConfig(num=8, min=2, cpus=2, gpu=False, start_timeout=100.0))
    shortage.look(told)
    assert told.warnings == []
    nodes[0]["CPU"] = 2.0
    shortage.look(told)
    shortage.look(told)
    (warning,) = told.warnings
    assert warning.startswith("workers: 2 workers need 4 CPUs, the cluster has 2; lower --workers.min")
    assert warning.endswith("it waits for machines, 100 s at most")
    now = launch.time.monotonic()
    monkeypatch.setattr(launch.time, "monotonic", lambda: now + 50)
    shortage.look(told)
    nodes[0]["CPU"] = 4.0
    shortage.look(told)
    nodes[0]["CPU"] = 2.0
    shortage.look(told)
    assert len(told.warnings) == 2
    monkeypatch.setattr(launch.time, "monotonic", lambda: now + 151)
    with pytest.raises(RuntimeError, match=r"no machine came within 100 s. `--resume` goes on"):
        shortage.look(told)


@pytest.mark.parametrize("number", [int(signal.SIGINT), int(signal.SIGTERM)])
def test_the_first_signal_waits_for_the_end(number: int, handled: list[int]) -> None:
    assert send(number) == [f"1 after {number}", "handled"]
    assert handled == [number]


def test_the_second_does_not_wait(handled: list[int]) -> None:
    first, second = int(signal.SIGTERM), int(signal.SIGINT)
    assert send(first, second) == [f"1 after {first}", "handled"]
    assert handled == [second]


def test_signals_are_as_before_when_nothing_came(handled: list[int]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with events.postponed_signals(lambda: None) as times:
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    assert (times, handled) == ([], [])


def test_on_another_thread_signals_are_left_alone(handled: list[int]) -> None:
    before, inside = signal.getsignal(signal.SIGTERM), list[object]()

    def other() -> None:
        with events.postponed_signals(lambda: None):
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert inside == [before]


def test_of_a_traceback_the_error_is_told() -> None:
    class ControllerError(Exception):
        controller_failure = RuntimeError("ray::execute._join() (pid=1, ip=10.0.0.1)\n  File worker.py, line 3, in join\nDistNetworkError: no such address\n")

    assert launch._reason(ControllerError()) == "training failed: DistNetworkError: no such address"
