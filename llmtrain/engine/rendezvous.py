"""How the processes of one launch meet, and one clear line where they cannot.

Process 0 listens at MASTER_ADDR:MASTER_PORT (the launcher sets them) and the others connect; after that each talks with
each. Left to themselves the libraries go wrong in two ways: they print a C++ stack for each try to connect, and gloo
takes the address that the machine's own name stands for, which on a stock Debian is the loopback, where no other host
reaches it.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import psutil  # type: ignore[import-untyped]
from torch.distributed import DistError, DistStoreError

from llmtrain.errors import UserError

_NOTICE_AFTER_S = 10.0  # a wait longer than this is told
_TEST_NETWORK = "192.0.2.1"  # RFC 5737: never a host; the way to it is the default route


@contextmanager
def meeting(timeout_s: float) -> Iterator[None]:
    """While entered, the libraries join the processes: help them to, and explain where they fail.

    Raises:
        UserError: process 0 cannot be reached within `timeout_s`, not all came, or they cannot talk to each other.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        yield
        return
    rank, host, port = _place()
    where = f"{host}:{port}"
    if not _on_one_host():
        _choose_gloo_interface()
    if rank:
        _wait_for(host, port, timeout_s)
    try:
        yield
    except DistStoreError as error:
        came = re.search(r"(\d+)/(\d+) clients joined", str(error))
        raise UserError(
            f"rank {rank}: {f'only {came[1]} of {came[2]}' if came else 'not all'} processes came to {where} within "
            f"{timeout_s:g} s; start the same command on every machine, each with its own machine_rank"
        ) from error
    except RuntimeError as error:
        if not is_exchange_failure(error):
            raise
        raise UserError(
            f"rank {rank}: the processes meet at {where} but cannot talk to each other ({brief(error)}); open all TCP "
            "ports between the hosts, and set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME on GPUs) on each to the "
            "interface that joins them"
        ) from error


def _place() -> tuple[int, str, int]:
    try:
        return int(os.environ["RANK"]), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but RANK, MASTER_ADDR and MASTER_PORT do not say where the "
            f"processes meet ({error}); start them with accelerate launch or torchrun"
        ) from error


def _wait_for(host: str, port: int, timeout_s: float) -> None:
    """Wait until somebody listens at the rendezvous."""
    began = time.monotonic()
    is_told = False
    while True:
        waited_s = time.monotonic() - began
        try:
            socket.create_connection((host, port), timeout=max(timeout_s - waited_s, 0.1)).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        waited_s = time.monotonic() - began
        if waited_s >= timeout_s:
            raise UserError(
                f"rank {os.environ['RANK']}: no rendezvous at {host}:{port} within {timeout_s:g} s ({reason}); check "
                "that machine_rank 0 runs, that main_process_ip and main_process_port are its own, and the firewall"
            )
        if waited_s > _NOTICE_AFTER_S and not is_told:
            print(f"llmtrain: waiting for the rendezvous at {host}:{port} ({reason}), {timeout_s:g} s at most",
                  file=sys.stderr, flush=True)  # fmt: skip
            is_told = True
        time.sleep(min(0.5, timeout_s - waited_s))


def _on_one_host() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == os.environ.get("LOCAL_WORLD_SIZE", "1")


def own_address() -> str:
    """The address at which the other processes find this one.

    That is the loopback on one host; else where packets to process 0 leave, or, on its own machine whose name may stand
    for the loopback, where packets into the world would.
    """
    if _on_one_host():
        return "127.0.0.1"
    addresses = [address_towards(target) for target in (os.environ["MASTER_ADDR"], _TEST_NETWORK)]
    addresses += [address for address in interfaces() if not ip_address(address).is_link_local]
    outward = [address for address in addresses if address and not ip_address(address).is_loopback]
    return outward[0] if outward else "127.0.0.1"


def address_towards(target: str) -> str | None:
    """Where a packet to `target` would leave from; a connected UDP socket knows, and sends nothing."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interfaces() -> dict[str, str]:
    """Address → name of the interface that has it, for every interface that is up."""
    is_up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return {
        entry.address.partition("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if name in is_up and entry.family in (socket.AF_INET, socket.AF_INET6)
    }


def _choose_gloo_interface() -> None:
    """Tell gloo the interface that leads to the other hosts, unless somebody has."""
    name = interfaces().get(own_address())
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def is_exchange_failure(error: BaseException) -> bool:
    """Whether an exchange between processes failed.

    gloo raises a bare RuntimeError, which quotes its source file, but for one that a connection's end after a timeout
    gives to whoever comes to it next.
    """
    said = str(error).lower()
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in said or "timeout caused pair closure" in said)
    )


def brief(error: BaseException) -> str:
    """The first line of a library's message, without its source files, its guesses and its jokes."""
    line = (str(error).splitlines() or [""])[0]
    line = re.sub(r"\[\S+?\.(cc|cpp|h):\d+\]\s*", "", line)
    return line.partition(" This is typically")[0].rstrip(". ") or type(error).__name__
