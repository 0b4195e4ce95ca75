"""What this machine has for training: versions, devices, cores, memory, disk."""

from __future__ import annotations

import platform
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from llmtrain.cores import usable_cores
from llmtrain.engine.device import computes_bf16_natively, free_memory, pick_device
from llmtrain.engine.rendezvous import address_towards, interfaces
from llmtrain.errors import UserError
from llmtrain.health.finding import Finding, fail, ok, warn
from llmtrain.health.gpus import gpu_findings
from llmtrain.health.limits import limit_findings
from llmtrain.health.versions import version_findings
from llmtrain.toolchain import lacking_to_compile

RENDEZVOUS_TIMEOUT_S = 5.0
TIGHT_BYTES = 2e9  # free memory or disk under which even small runs may fail


def machine_findings() -> Iterator[Finding]:
    """Look at everything that does not depend on a config."""
    yield ok("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from version_findings()
    yield _device()
    yield from gpu_findings()
    yield _bf16()
    yield _cores()
    yield _compiler()
    yield from limit_findings(pick_device().type == "cuda")
    yield _room("memory", free_memory(pick_device()), "close other programs, or lower training.micro_batch_size")
    yield _room("disk", shutil.disk_usage(Path.cwd()).free, f"free at {Path.cwd()}; let run.dir be somewhere else")


def rendezvous_finding(where: str) -> Finding:
    """Look at the place where the processes of a launch will meet, from this machine: HOST:PORT.

    `accelerate launch` meets there before any of our code runs, and tries for ten minutes without a clear word.

    Raises:
        UserError: not written as HOST:PORT.
    """
    host, _, port = where.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--rendezvous {where}: write it as HOST:PORT, such as 10.0.0.1:29500")
    try:
        address = str(socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        return fail("rendezvous", f"{host}: this machine does not know the name ({error.strerror}); give the address")
    is_here = address in interfaces()
    there = f"{host} ({address}, which is {'' if is_here else 'not '}this machine)"
    try:
        socket.create_connection((address, int(port)), timeout=RENDEZVOUS_TIMEOUT_S).close()
    except ConnectionRefusedError:
        if is_here:
            return ok("rendezvous", f"{there}: port {port} is free for machine_rank 0 to listen at")
        return warn(
            "rendezvous", f"{there}: can be reached, but nobody listens at port {port}; start machine_rank 0 there"
        )
    except OSError as error:
        reason = error.strerror or str(error)
        return fail(
            "rendezvous",
            f"{there}: cannot be reached from {address_towards(address) or 'here'}: {reason}; check main_process_ip, "
            "the network and the firewall",
        )
    if is_here:
        return warn("rendezvous", f"{there}: port {port} is taken: by a launch that is under way, else choose another")
    return ok("rendezvous", f"{there}: somebody listens at port {port}")


def _device() -> Finding:
    device = pick_device()
    if device.type == "cuda":
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        kinds = Counter(f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in properties)
        return ok("device", f"CUDA: {', '.join(f'{count} × {kind}' for kind, count in kinds.items())}")
    if device.type == "mps":
        return ok("device", "MPS (Apple GPU)")
    return ok("device", "CPU; no GPU found")


def _bf16() -> Finding:
    if computes_bf16_natively(pick_device()):
        return ok("bf16", "native; precision auto is bf16")
    return ok("bf16", "not native; precision auto is fp32")


def _cores() -> Finding:
    cores = len(usable_cores())
    threads = torch.get_num_threads()
    detail = f"{cores} cores, {threads} threads"
    if pick_device().type == "cpu" and threads * 2 < cores:
        return warn("cores", f"{detail}; unset OMP_NUM_THREADS, or set it to the number of physical cores")
    return ok("cores", detail)


def _compiler() -> Finding:
    if problem := lacking_to_compile():
        return warn("compiler", f"{problem}; without it torch.compile, which long runs gain by, does not work")
    return ok("compiler", "there, with the headers of Python, for torch.compile")


def _room(name: str, free: float, advice: str) -> Finding:
    detail = f"{free / 1e9:.1f} GB free"
    return ok(name, detail) if free >= TIGHT_BYTES else warn(name, f"only {detail}; {advice}")
