"""Hosts that are network namespaces of this machine, and Ray nodes on them: what crosses a network, on one machine.

Three namespaces: a hub with a bridge, from which jobs are submitted and where the tracking server runs, and two hosts
with a link to it each. Nothing of this leaves the machine, and the machine's own network is left as it is.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

HUB, HEAD, WORKER = "10.77.0.1", "10.77.0.2", "10.77.0.3"
RAY_PORT, JOBS_PORT, MLFLOW_PORT = 6379, 8265, 5000
JOBS, MLFLOW = f"http://{HEAD}:{JOBS_PORT}", f"http://{HUB}:{MLFLOW_PORT}"
BIN = Path(sys.executable).parent


def why_not() -> str | None:
    """The reason why namespaces cannot be made here; None where they can."""
    if shutil.which("ip") is None:
        return "`ip` is missing: apt-get install iproute2"
    name = f"gsl-{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"network namespaces may not be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Host:
    """One namespace, with an address on the bridge."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address

    def command(self, arguments: Sequence[str | Path]) -> list[str]:
        return ["ip", "netns", "exec", self.name, *map(str, arguments)]

    def processes(self) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        return [int(pid) for pid in listed.stdout.split()]

    def kill_all(self) -> None:
        """Ends every process of this host at once, as if its power went."""
        for _ in range(50):
            pids = self.processes()
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        raise AssertionError(f"{self.name} still has processes {self.processes()}")

    def received_bytes(self) -> int:
        """Through its link, since it was made."""
        file = f"/sys/class/net/{LINK}/statistics/rx_bytes"
        return int(subprocess.run(self.command(["cat", file]), capture_output=True, text=True, check=True).stdout)


LINK = "link0"
"""The name that each host has for its end of the link."""


class Network:
    """The hub, two hosts, and what runs on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tag = secrets.token_hex(3)
        self.hub, self.head, self.worker = (
            Host(f"gsl-{tag}-{what}", address) for what, address in (("hub", HUB), ("head", HEAD), ("work", WORKER))
        )
        self.token_file = folder / "token"
        self.token_file.write_text(secrets.token_hex(32))
        self.token_file.chmod(0o600)
        self.runs, self.unshared = folder / "runs", folder / "unshared"
        self._started: list[subprocess.Popen] = []

    # --- links

    def make(self) -> None:
        for host in (self.hub, self.head, self.worker):
            _ip("netns", "add", host.name)
            _ip("-n", host.name, "link", "set", "lo", "up")
        _ip("-n", self.hub.name, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", self.hub.name, "address", "add", f"{HUB}/24", "dev", "bridge0")
        _ip("-n", self.hub.name, "link", "set", "bridge0", "up")
        for host in (self.head, self.worker):
            port = self._port(host)
            _ip("-n", self.hub.name, "link", "add", port, "type", "veth", "peer", "name", LINK, "netns", host.name)
            _ip("-n", self.hub.name, "link", "set", port, "master", "bridge0", "up")
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", LINK)
            _ip("-n", host.name, "link", "set", LINK, "up")

    def _port(self, host: Host) -> str:
        return f"to-{host.name[-4:]}"

    def cut(self, host: Host) -> None:
        _ip("-n", self.hub.name, "link", "set", self._port(host), "down")

    def mend(self, host: Host) -> None:
        _ip("-n", self.hub.name, "link", "set", self._port(host), "up")

    def remove(self) -> None:
        for host in (self.worker, self.head, self.hub):
            host.kill_all()
        for process in self._started:
            process.wait(timeout=10)
        for host in (self.worker, self.head, self.hub):
            _ip("netns", "delete", host.name)

    # --- processes

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "DIST_GSL_"))}
        return {**kept, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(self.token_file)}  # fmt: skip

    def start(
        self, host: Host, arguments: Sequence[str | Path], *, log: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen:
        with (self.folder / log).open("a") as file:
            process = subprocess.Popen(
                host.command(arguments), stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=self.folder,
                env={**self.environment, **(environment or {})},
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in the background
            )  # fmt: skip
        self._started.append(process)
        return process

    def start_node(self, host: Host) -> None:
        """A Ray node with one CPU; one of them is the head. Ray's own files and `unshared` are each host's own."""
        own = self.folder / host.name[-4:]
        own.mkdir(exist_ok=True)
        self.unshared.mkdir(exist_ok=True)
        Path("/tmp/ray").mkdir(exist_ok=True)
        mounts = 'mount --bind "$1" /tmp/ray && mount -t tmpfs -o size=64m tmpfs "$2" && shift 2 && exec "$@"'
        environment = {
            "GLOO_SOCKET_IFNAME": LINK,
            "RAY_health_check_period_ms": "1000",  # a node is taken for dead after five seconds without answer
            "RAY_health_check_timeout_ms": "1000",
            "DIST_GSL_RUNS": str(self.runs),
            "DIST_GSL_DATA": str(self.folder / "data"),
        }
        ray: list[str | Path] = [BIN / "ray", "start", "--block", "--disable-usage-stats", f"--node-ip-address={host.address}",
               "--num-cpus=1", "--num-gpus=0", f"--object-store-memory={200 * 2**20}"]  # fmt: skip
        if host is self.head:
            ray += ["--head", f"--port={RAY_PORT}", f"--dashboard-host={host.address}", f"--dashboard-port={JOBS_PORT}"]
        else:
            ray += [f"--address={HEAD}:{RAY_PORT}"]
        self.start(
            host, ["sh", "-c", mounts, "sh", own, self.unshared, *ray], log=f"ray-{host.name[-4:]}.log",
            environment=environment,
        )  # fmt: skip

    def start_mlflow(self) -> None:
        """The tracking server, on the hub."""
        self.start(
            self.hub,
            [BIN / "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--host", HUB, "--port",
             str(MLFLOW_PORT), "--workers", "1", "--artifacts-destination", str(self.folder / "artifacts")],
            log="mlflow.log",
            environment={"MLFLOW_SERVER_ALLOWED_HOSTS": f"{HUB}:{MLFLOW_PORT}", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip

    def run(self, arguments: Sequence[str | Path], *, timeout: float = 800, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command on the hub, to its end."""
        return subprocess.run(
            self.hub.command(arguments), capture_output=True, text=True, check=False, cwd=self.folder, timeout=timeout,
            env={**self.environment, **environment}, stdin=subprocess.DEVNULL,
        )  # fmt: skip


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    """A hub and two hosts, with nothing running on them."""
    made = Network(folder)
    try:
        made.make()
        yield made
    finally:
        made.remove()


def until(what: Callable[[], bool], *, seconds: float, name: str) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"{name}: not within {seconds:g} s"
        time.sleep(0.1)
