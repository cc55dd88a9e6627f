"""Machines that can be lost: a Ray cluster in namespaces of this kernel, as near as one comes.

Each machine has an address of its own on a bridge, its own processes, its own folder for what Ray
keeps, and shares with the others no more than the test's files. Losing one ends all its processes
at once. Needs the right to make namespaces.
"""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

__all__ = ["NET", "Machines", "can_make_machines"]

NET = "10.231.7"
_BRIDGE = "gbpbridge"
_START_TIMEOUT_S = 120.0


def can_make_machines() -> bool:
    """Tells whether this process may make namespaces and bridges."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    command = [
        "unshare",
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "ip",
        "link",
        "add",
        "type",
        "bridge",
    ]
    return subprocess.run(command, capture_output=True).returncode == 0


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)


class Machines:
    """A head without CPUs beside this process, and machines that come and go.

    Args:
        environment: Of the machines, beside this process's own.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        # Short, since the names of Ray's sockets are.
        self._folder = Path(tempfile.mkdtemp(prefix="gbpm"))
        token = self._folder / "token"
        token.write_text(secrets.token_hex(32))
        self.environment = {
            **environment,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._numbers = itertools.count(2)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.address = f"{NET}.1:6399"

    def start(self) -> None:
        """Starts the head."""
        _run(f"ip link add {_BRIDGE} type bridge")
        _run(f"ip addr add {NET}.1/24 dev {_BRIDGE}")
        _run(f"ip link set {_BRIDGE} up")
        self._launch(
            f"{NET}.1",
            [],
            *("--head", "--port=6399", "--num-cpus=0", f"--temp-dir={self._folder / 'ray'}"),
            *("--dashboard-host=127.0.0.1", "--dashboard-port=8399"),
            "--ray-client-server-port=20399",
        )

    def add(self, num_cpus: int = 1) -> str:
        """Starts a machine; returns its address when it is part of the cluster."""
        number = next(self._numbers)
        ip, space, cable = f"{NET}.{number}", f"gbp{number}", f"gbpveth{number}"
        _run(f"ip netns add {space}")
        _run(f"ip link add {cable} type veth peer name eth0 netns {space}")
        _run(f"ip link set {cable} master {_BRIDGE} up")
        _run(f"ip -n {space} addr add {ip}/24 dev eth0")
        _run(f"ip -n {space} link set eth0 up")
        _run(f"ip -n {space} link set lo up")
        own_folder = (
            f'mkdir -p {self._folder}/ray && mount -t tmpfs tmpfs {self._folder}/ray && exec "$@"'
        )
        inside = ["ip", "netns", "exec", space, "unshare", "--mount", "--pid", "--fork"]
        inside += ["--kill-child", "--mount-proc", "sh", "-c", own_folder, "sh"]
        self._launch(ip, inside, f"--address={self.address}", f"--num-cpus={num_cpus}")
        return ip

    def lose(self, ip: str) -> None:
        """Ends a machine as a power cut does."""
        process = self._processes.pop(ip)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        subprocess.run(["ip", "netns", "del", f"gbp{ip.rpartition('.')[2]}"], capture_output=True)

    def stop(self) -> None:
        """Ends all of them and takes the bridge away."""
        head, *others = self._processes.copy() or [""]
        for ip in others:
            self.lose(ip)
        if head:
            # It ends what it has started, which is in no namespace.
            self._processes[head].terminate()
            self._processes.pop(head).wait(60)
        subprocess.run(["ip", "link", "del", _BRIDGE], capture_output=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _launch(self, ip: str, inside: list[str], *arguments: str) -> None:
        command = [*inside, sys.executable, "-m", "ray.scripts.scripts", "start", *arguments]
        command += [f"--node-ip-address={ip}", "--disable-usage-stats", "--block"]
        log = self._folder / f"{ip}.log"
        with log.open("wb") as file:
            self._processes[ip] = subprocess.Popen(
                command,
                env={**os.environ, **self.environment, "GLOO_SOCKET_IFNAME": "eth0"},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while "Ray runtime started" not in (text := log.read_text()):
            assert self._processes[ip].poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.2)
