"""Records of runs in an MLflow store. The only module that imports mlflow, and only when a run is tracked.

Whatever happens to the store, training goes on: what could not be sent is kept and sent later, and the same records are in
the run's folder.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_gsl.tracking.base import Status, Tracker, epoch_metrics
from dist_gsl.tracking.store import (
    artifact_root,
    failures,
    is_database,
    lock,
    masked,
    probe_database,
    probe_server,
    reason,
    tracking_uri,
)  # fmt: skip

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from numpy.typing import NDArray
    from torch import nn

EXPERIMENT = "dist_gsl"
RETRY_AFTER_S = 30.0
"""After a failure nothing is sent for this long, twice as long after each further one and 600 s at most, so that a dead
server does not slow every epoch."""
MAX_RETRY_AFTER_S = 600.0
MAX_WAITING = 10_000
"""Records kept while the store cannot be reached; the oldest go first."""

# A dead server must cost seconds, not MLflow's default of 7 retries of 120 s. What the user has set stays.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would print credentials that are in the URI
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_TABLES = "mlflow.loggedArtifacts"  # the tag by which the UI knows a table
_MAX_PARAMS, _MAX_PARAM_LENGTH = 100, 6000  # of one MLflow request

_log = logging.getLogger(__name__)


def create_store(runs_dir: str | Path, *, experiment: str = EXPERIMENT) -> str:
    """Create the store in use and the experiment, once, before parallel runs use them; returns its URI.

    For the driver of several trials. `MlflowTracker.start` does the same. A store that cannot be reached is a warning.
    """
    uri = tracking_uri(runs_dir)
    MlflowTracker(runs_dir, uri=uri, experiment=experiment).connect()
    return uri


class MlflowTracker(Tracker):
    """Records in an MLflow store. No call raises for what the store or the network does: it warns and tries again.

    runs_dir: the folder of the runs, for the default store. uri: the store; None is `tracking_uri(runs_dir)`.
    retry_after_s: pause after the first failure, in which nothing is sent.
    """

    def __init__(
        self,
        runs_dir: str | Path,
        *,
        uri: str | None = None,
        experiment: str = EXPERIMENT,
        retry_after_s: float = RETRY_AFTER_S,
    ) -> None:
        self.uri = tracking_uri(runs_dir) if uri is None else uri
        self.run_id = None
        self._runs_dir, self._experiment = Path(runs_dir).absolute(), experiment
        self._retry_after_s, self._retry_at = retry_after_s, 0.0
        self._connected: tuple[MlflowClient, str] | None = None
        self._start: Callable[[MlflowClient, str], str] | None = None
        self._waiting: deque[tuple[str, Callable[[MlflowClient, str], None]]] = deque(maxlen=MAX_WAITING)
        self._is_away, self._num_failures = False, 0
        self._last_step = 0
        self._epochs: set[int] | None = None
        """Those that the store has; None: not asked yet."""

    # --- the interface

    def start(
        self, name: str, params: Mapping[str, Any], tags: Mapping[str, str] | None = None, *, run_id: str | None = None
    ) -> str | None:
        texts = {key: masked(str(value))[:_MAX_PARAM_LENGTH] for key, value in params.items()}

        def begin(client: MlflowClient, experiment_id: str) -> str:
            from mlflow.exceptions import MlflowException

            if run_id is not None:
                try:
                    client.update_run(run_id, status="RUNNING")
                    return run_id
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                        raise
                    _log.warning("tracking: %s has no run %s to go on with; a new one begins", masked(self.uri), run_id)
            new = client.create_run(experiment_id, run_name=name, tags=dict(tags or {})).info.run_id
            self.run_id, self._epochs = new, set()  # a failure from here on does not create it again
            return new

        def log_params(client: MlflowClient, new: str) -> None:
            from mlflow.entities import Param

            entries = [Param(key, value) for key, value in texts.items()]
            for first in range(0, len(entries), _MAX_PARAMS):
                client.log_batch(new, params=entries[first : first + _MAX_PARAMS])

        def params_if_new(client: MlflowClient, current: str) -> None:
            if current != run_id:
                log_params(client, current)

        self.run_id, self._start, self._epochs = None, begin, None
        self._send("the parameters", params_if_new)
        return self.run_id

    def metrics(self, values: Mapping[str, float | None], step: int) -> None:
        self._last_step = max(self._last_step, step)
        self._send("metrics", _metrics_sender(values, step))

    def epoch(self, record: Mapping[str, Any]) -> None:
        step = int(record["epoch"])
        send = _metrics_sender(epoch_metrics(record), step)

        def log(client: MlflowClient, run_id: str) -> None:
            known = self._known_epochs(client, run_id)
            if step not in known:
                send(client, run_id)
                known.add(step)

        self._last_step = max(self._last_step, step)
        self._send(f"epoch {step}", log)

    def back(self, epoch: int) -> None:
        def forget(client: MlflowClient, run_id: str) -> None:
            known = self._known_epochs(client, run_id)
            known -= {step for step in known if step > epoch}

        self._send(f"going back to epoch {epoch}", forget)

    def _known_epochs(self, client: MlflowClient, run_id: str) -> set[int]:
        if self._epochs is None:
            self._epochs = {metric.step for metric in client.get_metric_history(run_id, "epoch")}
        return self._epochs

    def summary(self, values: Mapping[str, float | None]) -> None:
        self.metrics(values, self._last_step)  # an earlier step would hide behind an epoch's metric of the same name

    def artifacts(self, paths: Path | Iterable[Path]) -> None:
        for path in [paths] if isinstance(paths, str | Path) else list(paths):
            self._send(f"artifact {Path(path).name}", _artifact_sender(Path(path)))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = {key: [row.get(key) for row in rows] for key in (rows[0] if rows else {})}
        if columns:
            self._send(f"table {name}", lambda client, run_id: _log_table(client, run_id, columns, f"{name}.json"))

    def model(self, model: nn.Module, example: NDArray[np.float32], *, pip_requirements: Sequence[str]) -> None:
        if len(example) < 2:
            raise ValueError(f"tracker: an example of {len(example)} input would fix the batch size; give 2 or more")
        on_cpu = copy.deepcopy(model).cpu().eval()

        def log(client: MlflowClient, run_id: str) -> None:
            import mlflow

            with _current_uri(self.uri), mlflow.start_run(run_id=run_id, log_system_metrics=False):
                try:
                    mlflow.pytorch.log_model(
                        on_cpu, name="model", input_example=example, pip_requirements=list(pip_requirements),
                        serialization_format="pt2",
                    )  # fmt: skip
                except failures():
                    raise
                except Exception as error:  # torch.export raises types of its own for what it cannot follow
                    _log.warning("tracking: the model is left out, torch.export cannot follow it (%s)", reason(error))
            client.update_run(run_id, status="RUNNING")  # leaving start_run ended it

        self._send("the model", log)

    def is_running(self, run_id: str) -> bool:
        found: list[str] = []

        def ask() -> None:
            client, _ = self._connect()
            found.append(client.get_run(run_id).info.status)

        return self._try(ask) is None and found == ["RUNNING"]

    def end(self, status: Status | str = Status.FINISHED) -> None:
        value = Status(status).value
        self._retry_at = 0.0  # the last chance
        self._send("the end of the run", lambda client, run_id: client.set_terminated(run_id, value))
        if self._waiting:
            count, uri = len(self._waiting), masked(self.uri)
            _log.warning("tracking: %d records did not reach %s; they are in the run's folder", count, uri)

    # --- sending

    def connect(self) -> bool:
        """Reach the store and create its experiment where there is none; False, with a warning, where that fails."""
        error = self._try(self._connect)
        if error is not None:
            self._away(error)
        return error is None

    def _send(self, what: str, record: Callable[[MlflowClient, str], None]) -> None:
        """Send a record after those that wait; where the store cannot be reached it waits too."""
        self._waiting.append((what, record))
        if self._start is None or time.monotonic() < self._retry_at:
            return
        while self._waiting:
            what, record = self._waiting[0]
            error = self._try(lambda record=record: self._deliver(record))  # type: ignore[misc]
            if error is not None and self._try(self._ask) is not None:
                self._away(error)
                return
            self._waiting.popleft()
            if error is not None:  # the store answers: it is this record that it does not take
                _log.warning("tracking: %s does not take %s (%s)", masked(self.uri), what, reason(error))
        if self._is_away:
            _log.warning("tracking: %s is reached again", masked(self.uri))
            self._is_away, self._num_failures = False, 0

    def _deliver(self, record: Callable[[MlflowClient, str], None]) -> None:
        client, experiment_id = self._connect()
        if self.run_id is None:
            assert self._start is not None
            self.run_id = self._start(client, experiment_id)
        record(client, self.run_id)

    def _ask(self) -> None:
        """Raises where the store does not answer."""
        client, _ = self._connect()
        if self.run_id is None:
            raise OSError("the run is not begun")
        client.get_run(self.run_id)

    def _try(self, action: Callable[[], Any]) -> Exception | None:
        """Does it; the error, where the store or the network fails."""
        expected = failures()  # imports mlflow, which sets up its loggers, before they are made quiet
        try:
            with _quiet():
                action()
        except expected as error:
            return error
        return None

    def _away(self, error: Exception) -> None:
        pause_s = min(self._retry_after_s * 2**self._num_failures, MAX_RETRY_AFTER_S)
        self._retry_at = time.monotonic() + pause_s
        self._num_failures = min(self._num_failures + 1, 10)
        if not self._is_away:
            _log.warning(
                "tracking: %s cannot be reached (%s); the run goes on and its records are sent later",
                masked(self.uri), reason(error),
            )  # fmt: skip
        self._is_away, self._connected = True, None

    def _connect(self) -> tuple[MlflowClient, str]:
        if self._connected is None:
            for name, value in _ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            in_database = is_database(self.uri)
            if in_database:
                probe_database(self.uri)
            else:
                probe_server(self.uri)
            from mlflow import MlflowClient

            with lock(self._runs_dir / ".mlflow.lock" if in_database else None):
                client = MlflowClient(self.uri)
                self._connected = client, self._experiment_id(client, in_database)
        return self._connected

    def _experiment_id(self, client: MlflowClient, in_database: bool) -> str:
        found = client.get_experiment_by_name(self._experiment)
        if found is not None:
            return found.experiment_id
        from mlflow.exceptions import MlflowException

        location = artifact_root(self._runs_dir).as_uri() if in_database else None  # a server has its own
        try:
            return client.create_experiment(self._experiment, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(self._experiment)  # another run has begun at the same moment
            if found is None:
                raise
            return found.experiment_id


def _metrics_sender(values: Mapping[str, float | None], step: int) -> Callable[[MlflowClient, str], None]:
    now = int(time.time() * 1000)
    numbers = {name: float(value) for name, value in values.items() if value is not None}

    def send(client: MlflowClient, run_id: str) -> None:
        from mlflow.entities import Metric

        client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in numbers.items()])

    return send


def _artifact_sender(path: Path) -> Callable[[MlflowClient, str], None]:
    def send(client: MlflowClient, run_id: str) -> None:
        if path.is_dir():
            client.log_artifacts(run_id, str(path), artifact_path=path.name)
        elif path.exists():
            client.log_artifact(run_id, str(path))
        else:
            _log.warning("tracking: %s is gone and is not sent", path)

    return send


def _log_table(client: MlflowClient, run_id: str, columns: dict[str, list[Any]], file: str) -> None:
    """What `client.log_table` writes, which would add to the rows of an earlier call instead of taking their place."""
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    client.log_dict(run_id, {"columns": list(columns), "data": rows}, file)
    tables = json.loads(client.get_run(run_id).data.tags.get(_TABLES, "[]"))
    entry = {"path": file, "type": "table"}
    if entry not in tables:
        client.set_tag(run_id, _TABLES, json.dumps([*tables, entry]))


@contextmanager
def _current_uri(uri: str) -> Iterator[None]:
    """MLflow's functions without a client use this store; afterwards the one they used before."""
    import mlflow

    name = "MLFLOW_TRACKING_URI"
    before = os.environ.get(name)  # set_tracking_uri writes it, for child processes
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
        if before is not None:
            os.environ[name] = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines of the database's creation, of the model's export and of retries."""
    loggers = [logging.getLogger(name) for name in ("alembic", "mlflow", "urllib3")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
