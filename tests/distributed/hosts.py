"""Two network namespaces as two hosts: names, addresses and /etc/hosts of their own, and one cable between them.

As on a stock Debian, each host's own name stands for 127.0.1.1 in its /etc/hosts. It takes root and Linux.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Self

INTERFACE = "eth0"


class HostsRefusedError(Exception):
    """This machine does not let us make network namespaces; says why."""


def _ip(*arguments: str) -> str:
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise HostsRefusedError(f"ip {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout


@dataclass(frozen=True)
class Host:
    """One namespace."""

    name: str
    address: str
    namespace: str

    def start(self, command: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a program on this host; what it prints goes to `log`."""
        inside = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name, *command]
        # Nothing tells gloo its interface: the run has to find the one that leads to the other host.
        inherited = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
        with log.open("wb") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *inside],
                stdout=output, stderr=subprocess.STDOUT, env={**inherited, **env},
            )  # fmt: skip

    def processes(self) -> dict[int, str]:
        """What runs on this host: process id → command line."""
        found = {}
        for pid in map(int, _ip("netns", "pids", self.namespace).split()):
            try:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile
        return {pid: line for pid, line in found.items() if line}

    def trainers(self) -> list[int]:
        """Process ids of the ranks on this host."""
        return sorted(
            pid for pid, line in self.processes().items() if "llmtrain.train" in line and "launch" not in line
        )

    def ip(self, *arguments: str) -> None:
        """Run `ip` on this host."""
        _ip("-n", self.namespace, *arguments)


class TwoHosts:
    """Made on entering, removed on leaving, with everything that runs on them."""

    def __init__(self) -> None:
        suffix = secrets.token_hex(4)
        self.alpha = Host("alpha", "10.77.0.1", f"llmtrain-{suffix}-alpha")
        self.beta = Host("beta", "10.77.0.2", f"llmtrain-{suffix}-beta")

    def __enter__(self) -> Self:
        if not shutil.which("ip") or not shutil.which("unshare"):
            raise HostsRefusedError("the commands ip (iproute2) and unshare (util-linux) are not both installed")
        try:
            self._make()
            subprocess.run(["ip", "netns", "exec", self.alpha.namespace, "unshare", "--uts", "true"], check=True)
        except (HostsRefusedError, OSError, subprocess.CalledProcessError) as error:
            self._remove()
            raise HostsRefusedError(str(error)) from error
        return self

    def _make(self) -> None:
        for host, other in ((self.alpha, self.beta), (self.beta, self.alpha)):
            _ip("netns", "add", host.namespace)
            etc = Path("/etc/netns") / host.namespace  # `ip netns exec` lays these over /etc
            etc.mkdir(parents=True)
            names = f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n{other.address} {other.name}\n"
            (etc / "hosts").write_text(names)
        ends = ["type", "veth", "peer", "name", INTERFACE, "netns", self.beta.namespace]
        _ip("link", "add", INTERFACE, "netns", self.alpha.namespace, *ends)
        for host in (self.alpha, self.beta):
            host.ip("address", "add", f"{host.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                host.ip("link", "set", interface, "up")

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _remove(self) -> None:
        for host in (self.alpha, self.beta):
            if (Path("/run/netns") / host.namespace).exists():
                for pid in host.processes():
                    os.kill(pid, signal.SIGKILL)
                _ip("netns", "delete", host.namespace)
            shutil.rmtree(Path("/etc/netns") / host.namespace, ignore_errors=True)

    def pull_cable(self) -> None:
        """Both hosts see that there is no carrier."""
        self.beta.ip("link", "set", INTERFACE, "down")

    def lose_frames(self) -> None:
        """The carrier stays up and nothing arrives, as when a switch fails: frames go to addresses that nobody has."""
        for host, other in ((self.alpha, self.beta), (self.beta, self.alpha)):
            nobody = ["lladdr", "02:00:00:00:00:0a", "dev", INTERFACE, "nud", "permanent"]
            host.ip("neighbour", "replace", other.address, *nobody)
