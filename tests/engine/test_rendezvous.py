"""Where processes meet: waiting for the place, the address of this machine, and one line for every way to miss."""

from __future__ import annotations

import os
import socket
import threading
import time

import psutil
import pytest
from torch.distributed import DistNetworkError, DistStoreError

from llmtrain.engine.rendezvous import interfaces, meeting, own_address
from llmtrain.errors import UserError


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def rank_1(monkeypatch: pytest.MonkeyPatch) -> int:
    """The environment of one of two processes on two machines; returns the port of the rendezvous."""
    port = free_port()
    place = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "RANK": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "unchanged")
    return port


def test_it_waits_until_process_0_listens(rank_1: int) -> None:
    servers = []
    later = threading.Timer(1.0, lambda: servers.append(socket.create_server(("127.0.0.1", rank_1))))
    later.start()
    began = time.monotonic()
    with meeting(timeout_s=30):
        assert 0.9 < time.monotonic() - began < 10
    servers[0].close()


def test_nobody_there_is_one_line_after_the_timeout(rank_1: int) -> None:
    began = time.monotonic()
    with pytest.raises(UserError) as error, meeting(timeout_s=1):
        pytest.fail("not reached")
    assert 0.9 < time.monotonic() - began < 5
    assert f"no rendezvous at 127.0.0.1:{rank_1} within 1 s (Connection refused)" in str(error.value)
    assert "main_process_ip" in str(error.value)


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT", "RANK"])
def test_a_launch_by_hand_that_forgets_a_variable_is_told_which(
    rank_1: int, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=rf"WORLD_SIZE is 2, but .*\('{missing}'\)"), meeting(timeout_s=1):
        pytest.fail("not reached")


@pytest.mark.parametrize(("error", "message"), [
    (DistStoreError("Timed out after 16 seconds waiting for clients. 1/2 clients joined."), "only 1 of 2 processes"),
    (RuntimeError("Gloo connectFullMesh failed with [/a/gloo/transport/tcp/pair.cc:152] timed out connecting: "
                  "SO_ERROR: Connection refused, remote=[127.0.1.1]:41902"), "remote=[127.0.1.1]:41902); open all"),
    (DistNetworkError("the socket broke"), "cannot talk to each other (the socket broke)"),
])  # fmt: skip
def test_what_the_libraries_say_becomes_one_line(
    rank_1: int, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError) as raised, meeting(timeout_s=1):
        raise error
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_other_errors_and_one_process_are_left_alone(rank_1: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match="CUDA driver"), meeting(timeout_s=1):
        raise RuntimeError("CUDA driver too old")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("MASTER_ADDR")
    with meeting(timeout_s=1):
        pass


def test_the_interface_is_chosen_only_where_there_are_other_hosts_and_nobody_chose(
    rank_1: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    with meeting(timeout_s=1):
        assert os.environ["GLOO_SOCKET_IFNAME"] == "unchanged"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # registered for removal after the test
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with meeting(timeout_s=1):
        assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with meeting(timeout_s=1):
        assert os.environ["GLOO_SOCKET_IFNAME"] in psutil.net_if_addrs()


def test_the_own_address_is_the_loopback_only_where_there_is_one_host(
    rank_1: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert own_address() == "127.0.0.1"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    others = [address for address in interfaces() if not address.startswith(("127.", "::1", "fe80"))]
    if not others:
        pytest.skip("this machine has no address but the loopback")
    assert own_address() in others
