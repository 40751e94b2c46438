"""Which store is in use, whose it is, and whether it answers."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from dist_gsl.storage import remote_of

PROBE_TIMEOUT_S = 5.0
"""Time in which a server's machine must accept a connection."""


def tracking_uri(runs_dir: str | Path) -> str:
    """The store in use: MLFLOW_TRACKING_URI, else the database `mlflow.db` in the folder of the runs (absolute)."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    return given or f"sqlite:///{Path(runs_dir).absolute() / 'mlflow.db'}"


def artifact_root(runs_dir: str | Path) -> Path:
    """Where a store without a server keeps files (absolute)."""
    return Path(runs_dir).absolute() / "mlartifacts"


def masked(text: str) -> str:
    """The text without the user and password of any URI in it, nor the values of MLflow's credential variables."""
    text = re.sub(r"(?<=://)[^\s/?#]*@", "***@", text)
    secrets = [os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("PASSWORD", "TOKEN")]
    with suppress(ValueError):  # not a URI
        secrets.append(urlsplit(os.environ.get("MLFLOW_TRACKING_URI", "")).password)
    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    return text


NETWORK_FILE_SYSTEMS = frozenset(
    ["nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "ceph", "beegfs", "glusterfs", "afs", "9p", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.glusterfs"]
)


def check_owner(runs_dir: str | Path, *, may_move: bool, mounts: str | None = None) -> None:
    """`ValueError` where the store in use is a file that this process may not be the right one to write: one on another
    machine's disk, or (`may_move`) of a driver that a cluster may start elsewhere next time.

    mounts: what is mounted where, as in /proc/mounts; None reads that.
    """
    uri = tracking_uri(runs_dir)
    if not uri.startswith("sqlite:"):
        return
    file = Path(uri.removeprefix("sqlite:///")).absolute()
    remote = remote_of(Path(runs_dir).absolute())
    kind = _file_system(file, Path("/proc/mounts").read_text() if mounts is None else mounts)
    if remote is not None and file.is_relative_to(Path(runs_dir).absolute()):
        why = f"would lie in this machine's copy of {remote}"
    elif kind in NETWORK_FILE_SYSTEMS:
        why = f"lies on another machine's disk ({kind})"
    elif may_move:
        why = "is of one machine, and this job's driver may start on another next time"
    else:
        return
    raise ValueError(
        f"tracking: {file} {why}: start a server where it stays, `mlflow server --backend-store-uri {uri} --host ADDRESS` "
        "(or cluster/mlflow-server.sh), and set MLFLOW_TRACKING_URI=http://ADDRESS:5000, or give --no-tracking"
    )


def _file_system(file: Path, mounts: str) -> str:
    """The kind of file system that a file lies on, or would."""
    best, kind = 0, ""
    for line in mounts.splitlines():
        _, point, this_kind, *_ = line.split()
        point = point.replace("\\040", " ")
        if file.is_relative_to(point) and len(point) >= best:  # the last one mounted there is the one that is seen
            best, kind = len(point), this_kind
    return kind


def failures() -> tuple[type[Exception], ...]:
    """What a store or the way to it can raise. A fault of ours (TypeError, KeyError) is not among them."""
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError
    from urllib3.exceptions import HTTPError

    # ImportError: the database's driver is not installed.
    return (MlflowException, RequestException, HTTPError, SQLAlchemyError, CommandError, OSError, ImportError)


def reason(error: BaseException) -> str:
    """The first line of what lies at the bottom: "Connection refused" under four layers of retries."""
    bottom: BaseException | None = error
    while bottom is not None:
        error = bottom if isinstance(bottom, failures()) else error
        bottom = bottom.__cause__ or bottom.__context__
    return masked((str(error).strip() or type(error).__name__).splitlines()[0])


def is_database(uri: str) -> bool:
    return urlsplit(uri).scheme.partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql")


def probe_database(uri: str) -> None:
    """Raises at once where a database cannot be opened: MLflow itself would try ten times, for 100 seconds."""
    import sqlalchemy

    path = uri.removeprefix("sqlite:///")
    if path != uri:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.pool.NullPool)
    try:
        sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()


def probe_server(uri: str) -> None:
    """Raises within seconds where a server's machine does not answer; through a proxy nothing is known beforehand."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https") or not parts.hostname or getproxies():
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname, port), timeout=PROBE_TIMEOUT_S).close()


@contextmanager
def lock(path: Path | None) -> Iterator[None]:
    """Holds a file against the other processes of this machine; None: holds nothing."""
    if path is None:
        yield
        return
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
