"""What a training's driver and its workers tell each other."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class Listener:
    """What a launch tells the one who started it; every method may be left as it is."""

    def progress(self, epoch: int, step: int, num_steps: int, loss: float, images_per_second: float) -> None:
        """A few times a second at most, from the first worker."""

    def epoch(self, record: dict[str, Any], norms: dict[str, Any], masks: dict[str, Any]) -> None:
        """After each epoch: the record, each layer's neuron norms and which are alive (numpy, (neurons,))."""

    def back(self, epoch: int) -> None:
        """The training went back to after this epoch: what was told of later ones holds no more."""

    def told(self, kind: str, number: int, history: Sequence[dict[str, Any]]) -> None:
        """Of a path: the strength `number` is "begun", after the epochs of `history`, or its network is "trained"."""

    def note(self, text: str) -> None:
        """What the first worker tells of how it goes on."""

    def warning(self, text: str) -> None:
        """What the first worker warns of."""


class Control:
    """What the driver of a training and its workers have in common; a Ray actor, one as each is a process that wakes up all the time."""

    def __init__(self) -> None:
        self._num_begun, self._is_stopped = 0, False
        self._events: list[tuple[Any, ...]] = []
        self._is_told = asyncio.Event()

    async def begin(self) -> int:
        """Called by each group of workers when it begins; which one it is, counted from 1."""
        self._num_begun += 1
        return self._num_begun

    async def tell(self, *event: Any) -> None:
        """To the driver: a method of `Listener` and what it gets; or "begun" by a new group of workers, or "failed", why."""
        self._events.append(event)
        self._is_told.set()

    async def take(self, timeout: float) -> list[tuple[Any, ...]]:
        """What was told since it was last asked; where that is nothing, as soon as there is something, and nothing after a timeout in seconds."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_told.wait(), timeout)
        self._is_told.clear()
        events, self._events = self._events, []
        return events

    async def stop(self) -> None:
        """Asks the training to keep its state and end."""
        self._is_stopped = True

    async def is_stopped(self) -> bool:
        return self._is_stopped


STOP_GRACE_S = 25.0
"""Time that the workers have to keep their state after somebody asked the run to end; Slurm and Kubernetes kill after 30 s."""


POLL_S = 1.0
"""Time between two looks at the training itself, where nothing is told; what is told is heard at once."""


def fit(
    trainer: Any,
    take: Callable[[float], list[tuple[Any, ...]]],
    listener: Listener,
    *,
    stop: Callable[[], object],
    idle: Callable[[], object] = lambda: None,
) -> str | None:
    """Trains, and hands every event to the listener soon; what the workers gave up on, if they did.

    take: `Control.take`. stop: `Control.stop`. idle: called now and then when nothing is told.

    Training runs on the side: on the main thread Ray would take Ctrl-C for itself, and the listener would come late. The first Ctrl-C or
    SIGTERM asks the workers to keep their state and end, by `stop`; what it would have done before is done then, or at the second.
    """
    outcome: list[BaseException] = []
    failure, is_told = None, False
    events: deque[tuple[Any, ...]] = deque()

    def train() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # raised again by the thread that waits
            outcome.append(error)

    thread = threading.Thread(target=train, name="fit", daemon=True)
    thread.start()
    with postponed_signals(stop) as signals:
        while True:
            is_over = not thread.is_alive()  # asked before the events, so that nothing is left of them afterwards
            if signals and not is_told:
                is_told = True
                listener.warning("the workers keep their state and end; Ctrl-C once more ends at once")
            if signals and not is_over and time.monotonic() > signals[0] + STOP_GRACE_S:
                listener.warning(f"the workers did not end within {STOP_GRACE_S:g} s; the checkpoint before is the last")
                break
            if not events:
                events.extend(take(0.0 if is_over else POLL_S))
            if not events:
                if is_over:
                    break
                idle()
                continue
            kind, *content = events.popleft()  # one at a time, as the listener may be slow and the signals wait
            if kind == "begun":
                failure = None  # of workers that were replaced
            elif kind == "failed":
                (failure,) = content
            else:
                getattr(listener, kind)(*content)
    if outcome:
        raise outcome[0]
    return failure


@contextlib.contextmanager
def postponed_signals(first: Callable[[], object]) -> Iterator[list[float]]:
    """At the first SIGINT or SIGTERM `first` is called, on a thread of its own as the main one may be waiting for somebody, and the time is
    added to the list; the signal's handler is called at the end, or at the second signal. On another thread than the main one signals are not
    ours."""
    times: list[float] = []
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield times
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        arrived.append(number)
        times.append(time.monotonic())
        handler = handlers[signal.Signals(number)]
        if len(arrived) == 1:
            threading.Thread(target=first, name="stop", daemon=True).start()
        elif callable(handler):
            handler(number, frame)

    noted = [number for number, handler in handlers.items() if callable(handler)]
    for number in noted:
        signal.signal(number, note)
    try:
        yield times
    finally:
        for number in noted:
            signal.signal(number, handlers[number])
    for signalled in arrived[:1]:
        handler = handlers[signal.Signals(signalled)]
        assert callable(handler)
        handler(signalled, None)
