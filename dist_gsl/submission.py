"""Jobs on a Ray cluster: ship the code, start `dist-gsl train`, `tune` or a script there, follow its log, start it again.

A job's driver runs on the cluster, so a closed laptop ends nothing. Everything goes through Ray's job server.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import dist_gsl
from dist_gsl.tracking import masked

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 5.0, 15.0
"""A dead address is known after these at the latest."""
LOST_AFTER_S = 600.0
"""A job's log is asked for again for this long before it is left alone."""
SILENCE_S = 60.0
"""After so long without a word a job's log is asked for anew."""
STOP_TIMEOUT_S = 60.0
"""Time that a stopped job's driver has to tell the tracking store and to leave its checkpoints whole."""
POLL_S = 1.0
NAME = "dist_gsl_name"
"""The key in a job's metadata by which our jobs are known: the run's or the search's name."""
GIVEN = "given"
"""Folder of the shipped code with the config or space file that the user named."""


class UnknownJobError(ValueError):
    """The cluster has no such job."""


@dataclass(frozen=True)
class Job:
    """One job of ours."""

    id: str
    name: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str
    exit_code: int | None
    """The driver's; None: it has none yet, or was killed with its machine."""
    start: float | None
    """Seconds since 1970."""
    end: float | None
    command: str

    @property
    def is_over(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class Cluster:
    """The job server of a Ray cluster.

    `ValueError` for an address that is none or where nothing answers within 30 seconds, and for a missing or wrong token.
    """

    def __init__(self, address: str) -> None:
        self.address = _server_address(address)
        self.is_guarded = _is_guarded(self.address)
        self._client: JobSubmissionClient = self._connect()

    def _connect(self) -> JobSubmissionClient:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        for module in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
            logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)  # their lines on uploads and websockets
        if self.is_guarded and os.environ.get("RAY_AUTH_MODE") != "token":
            raise ValueError(
                f"{self.address} asks for a token: export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE, "
                "the file with the token that the cluster was started with"
            )
        try:
            return JobSubmissionClient(self.address)
        except AuthenticationError as error:
            raise ValueError(
                f"{self.address} does not take this token: RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) must name the one "
                "that the cluster was started with"
            ) from error

    # --- jobs

    def submit(self, command: Sequence[str], *, name: str, folder: Path, environment: Mapping[str, str]) -> str:
        """Starts a command in a copy of `folder` on the cluster; the job's id. Nothing secret belongs in `environment`:
        whoever sees the dashboard reads it."""
        job_id = f"{name}-{secrets.token_hex(3)}"
        self._client.submit_job(
            entrypoint=shlex.join(command), submission_id=job_id,
            runtime_env={"working_dir": str(folder), "env_vars": {**environment, "RAY_JOB_STOP_WAIT_TIME_S": f"{STOP_TIMEOUT_S:g}"}},
            metadata={NAME: name, "dist_gsl_version": dist_gsl.__version__},
        )  # fmt: skip
        return job_id

    def jobs(self) -> list[Job]:
        """Our jobs, the newest first."""
        found = [_job(details) for details in self._client.list_jobs() if NAME in (details.metadata or {})]
        return sorted(found, key=lambda job: job.start or 0.0, reverse=True)

    def job(self, job_id: str) -> Job:
        """`UnknownJobError` where there is no such job."""
        try:
            return _job(self._client.get_job_info(job_id))
        except RuntimeError as error:
            if "does not exist" not in str(error):
                raise
            raise UnknownJobError(f"{self.address} has no job {job_id!r}; `dist-gsl jobs list` shows them") from error

    def stop(self, job_id: str) -> Job:
        """Asks a job to end, and waits until it has; its last checkpoint stays."""
        if not self.job(job_id).is_over:
            self._client.stop_job(job_id)
        end = time.monotonic() + 2 * STOP_TIMEOUT_S
        while not (job := self.job(job_id)).is_over:
            if time.monotonic() > end:
                raise RuntimeError(f"job {job_id} does not end; ask again, or look at {self.dashboard(job_id)}")
            time.sleep(POLL_S)
        return job

    def logs(self, job_id: str) -> str:
        """What a job has printed so far."""
        self.job(job_id)
        return self._client.get_job_logs(job_id)

    def follow(self, job_id: str, write: Callable[[str], None]) -> Job:
        """Hands on what a job prints until it is over. A lost connection is made again, and nothing is written twice.

        `RuntimeError` where the cluster does not answer for ten minutes.
        """
        import aiohttp
        import requests

        written, lost_since = 0, None
        lost = (aiohttp.ClientError, requests.RequestException, OSError, RuntimeError)
        while True:
            try:
                self.job(job_id)
                lost_since = None
                tail = _Tail(write, skip=written)
                try:
                    asyncio.run(tail.follow(self._client.tail_job_logs(job_id)))
                finally:
                    written += tail.written
                if (job := self.job(job_id)).is_over:
                    return job
            except UnknownJobError as error:
                if not written:
                    raise
                raise RuntimeError(f"{self.address} has forgotten job {job_id}: its head was started anew") from error
            except lost as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > LOST_AFTER_S:
                    raise RuntimeError(
                        f"{self.address} does not answer any more; the job may well go on: "
                        f"`dist-gsl jobs logs {job_id} --follow` takes it up again"
                    ) from error
            time.sleep(POLL_S)

    def dashboard(self, job_id: str) -> str:
        return f"{self.address}/#/jobs/{job_id}"


def _job(details: JobDetails) -> Job:
    return Job(
        id=details.submission_id or "", name=(details.metadata or {}).get(NAME, ""), status=details.status.value,
        message=" ".join((details.message or "").split()), exit_code=details.driver_exit_code,
        start=details.start_time and details.start_time / 1000, end=details.end_time and details.end_time / 1000,
        command=details.entrypoint,
    )  # fmt: skip


class _Tail:
    """Writes what a source has that begins anew each time, without the first `skip` characters; until it ends, or says
    nothing for a while, as a connection does that died on the way."""

    def __init__(self, write: Callable[[str], None], *, skip: int) -> None:
        self.write, self.skip, self.written = write, skip, 0

    async def follow(self, source: AsyncIterator[str]) -> None:
        while True:
            try:
                text = await asyncio.wait_for(anext(source), SILENCE_S)
            except (StopAsyncIteration, TimeoutError):
                return
            new = text[self.skip :]
            self.skip = max(0, self.skip - len(text))
            if new:
                self.write(new)
                self.written += len(new)


def _server_address(address: str) -> str:
    parts = urlsplit(address if "://" in address or ":" not in address else f"http://{address}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"--address {masked(address)!r} is no job server; give that of the cluster's head, such as http://HEAD:8265"
        )
    if parts.username or parts.password:
        raise ValueError("--address: leave user and password out of it; Ray's own token comes from RAY_AUTH_TOKEN_PATH")
    return parts.geturl().rstrip("/")


def _is_guarded(address: str) -> bool:
    """Does the cluster ask for a token? `ValueError` where nothing answers."""
    import requests

    try:
        answer = requests.get(f"{address}/api/authentication_mode", timeout=(CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S))
    except requests.RequestException as error:
        raise ValueError(
            f"no job server answers at {address}: is the cluster up, and is its port 8265 reachable from here "
            "(`kubectl port-forward`, `ssh -L`)?"
        ) from error
    if answer.status_code == 404:  # older than tokens
        return False
    if not answer.ok:
        raise ValueError(f"{address} answers {answer.status_code} and is no Ray job server; give http://HEAD:8265")
    try:
        return bool(answer.json()["authentication_mode"] == "token")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{address} is no Ray job server; give http://HEAD:8265") from error


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


# --- what is shipped


@contextmanager
def shipped(given: Sequence[Path] = (), *, script: Path | None = None) -> Iterator[tuple[Path, dict[Path, str]]]:
    """A folder with this package and its spaces, for a cluster to run, and the names in it of the files that are given
    along. script: a relative path; it has the same there, and so have the Python files beside and below it. Neither data nor
    runs nor version control are in it: it is some hundred kilobytes."""
    package = Path(dist_gsl.__file__).parent
    with tempfile.TemporaryDirectory(prefix="dist-gsl-") as temporary:
        folder = Path(temporary)
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
        shutil.copytree(package, folder / package.name, ignore=ignored)
        for spaces in (package.parent / "tune_spaces", Path.cwd() / "tune_spaces"):
            if spaces.is_dir():
                shutil.copytree(spaces, folder / "tune_spaces", ignore=ignored, dirs_exist_ok=True)
        for source in [] if script is None else script.parent.rglob("*.py"):
            if not source.is_file() or any(part.startswith(".") for part in source.parts):
                continue
            (folder / source).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / source)
        names = {}
        for file in given:
            # With its folder's name, by which a run's config is called.
            target = folder / GIVEN / file.absolute().parent.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            names[file] = str(target.relative_to(folder))
        yield folder, names


def tracking_environment() -> dict[str, str]:
    """The tracking address for a job, as set here; none for one of this machine alone, as a forwarded port is: the cluster's
    own is used then. `ValueError` for one that a cluster cannot use or must not see.

    Passwords stay where they are: the cluster has its own, as secrets of its environment.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not uri:
        return {}
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        raise ValueError(
            f"MLFLOW_TRACKING_URI {masked(uri)!r} is this machine's, and the job's driver runs on the cluster: start a server "
            "there with `sh cluster/mlflow-server.sh`, and set MLFLOW_TRACKING_URI=http://HOST:5000"
        )
    if parts.password or parts.username:
        raise ValueError(
            "MLFLOW_TRACKING_URI holds a user or a password, which every reader of the dashboard would see: leave them out "
            "and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the cluster's environment"
        )
    if _is_loopback(parts.hostname or ""):
        return {}
    return {"MLFLOW_TRACKING_URI": uri}
