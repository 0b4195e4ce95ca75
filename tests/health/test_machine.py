"""What the doctor says of a machine: its driver, links, limits and versions, as the system tells them."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from llmtrain.health import gpus, limits, links, versions
from llmtrain.health.cluster import Member, bandwidth_finding, expected_gb_s, gpus_finding, links_finding
from llmtrain.health.links import Links

# As nvidia-smi prints them (driver 550 on a DGX H100).
HEADER = "| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: 12.4     |\n"
NVLINK = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\n" + "".join(f"\t Link {i}: 26.562 GB/s\n" for i in range(18))
Answers = Callable[..., None]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    """A program of that name that answers so, for there is no GPU here."""

    def install(told: str, code: int = 0) -> None:
        (tmp_path / "told").write_text(told)
        (tmp_path / "nvidia-smi").write_text(
            f'#!/bin/sh\necho "$@" > "{tmp_path}/asked"\ncat "{tmp_path}/told"\nexit {code}\n'
        )
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return install


def test_a_driver_without_a_torch_that_uses_it_is_told(nvidia_smi: Answers) -> None:
    nvidia_smi(HEADER)
    (found,) = gpus.gpu_findings()
    assert (found.status, found.name) == ("warn", "driver")
    assert "550.54.15; runs CUDA up to 12.4" in found.detail and "CPU build" in found.detail
    nvidia_smi("NVIDIA-SMI has failed", code=9)
    (found,) = gpus.gpu_findings()
    assert "nvidia-smi fails" in found.detail


@pytest.mark.parametrize(("cuda", "built_for", "works", "status", "words"), [
    ((12, 4), "12.8", True, "ok", "550"), ((12, 4), "13.0", False, "FAIL", "install torch for CUDA 12"),
    ((13, 0), "12.8", True, "ok", "550"), ((12, 4), "12.4", False, "FAIL", "--gpus all"),
    (None, "12.4", True, "ok", "550"),
])  # fmt: skip
def test_a_driver_runs_what_its_major_version_can(
    cuda: tuple[int, int] | None, built_for: str, works: bool, status: str, words: str
) -> None:
    found = gpus._driver_finding("550", cuda, built_for, works)
    assert found.status == status and words in found.detail


def test_each_gpu_that_is_not_well_is_named() -> None:
    assert list(gpus.gpu_problems("0, 3, 0, Not Active\n1, 4, [N/A], Not Active\n")) == []
    busy, broken, hot = gpus.gpu_problems("0, 20480, 0, Not Active\n1, 5, 2, Not Active\n2, 5, 0, Active\n")
    assert busy.startswith("GPU 0 holds 20.5 GB of other programs")
    assert broken.startswith("GPU 1 has 2 memory errors") and hot.startswith("GPU 2 is slowed down")


def test_links_are_as_fast_as_the_system_says(nvidia_smi: Answers, tmp_path: Path) -> None:
    nvidia_smi(NVLINK)
    assert (
        links.own_links("GPU-6f").gpu == pytest.approx(18 * 26.562) and links.own_links("GPU-6f").gpu_kind == "NVLink"
    )
    nvidia_smi("4, 16\n")
    assert (
        links.own_links("GPU-6f").gpu == pytest.approx(31.5, rel=1e-3)
        and links.own_links("GPU-6f").gpu_kind == "PCIe 4 × 16"
    )
    assert (tmp_path / "asked").read_text().endswith(" -i GPU-6f\n")
    assert links.own_links(None).gpu is None
    for port, state, rate in (("a/ports/1", "4: ACTIVE", "400 Gb/sec (4X NDR)"), ("b/ports/1", "1: DOWN", "10 Gb/sec")):
        (tmp_path / port).mkdir(parents=True)
        (tmp_path / port / "state").write_text(state)
        (tmp_path / port / "rate").write_text(rate)
    assert links.infiniband_gb_s(tmp_path) == 50
    assert links.infiniband_gb_s(tmp_path / "none") == 0


def members(*hosts: str, gpu: float | None = 400.0, host: float | None = 50.0) -> list[Member]:
    return [Member(name, "H100", Links(gpu, "NVLink", host, "InfiniBand")) for name in hosts]


def test_what_the_links_should_give_is_that_of_the_slowest_on_the_way() -> None:
    assert expected_gb_s(members("a", "a")) == (400.0, "NVLink")
    assert expected_gb_s(members("a", "a", "b", "b")) == (50.0, "InfiniBand")
    assert expected_gb_s(members("a", "b", gpu=None)) == (50.0, "InfiniBand")
    assert expected_gb_s(members("a", "a", gpu=None)) == (None, "NVLink")
    assert bandwidth_finding("all-reduce", 380.0, 400.0, "NVLink").status == "ok"
    slow = bandwidth_finding("all-reduce", 3.0, 50.0, "InfiniBand")
    assert slow.status == "warn" and "6% of what InfiniBand should give (50.0 GB/s)" in slow.detail
    assert bandwidth_finding("all-reduce", 3.0, None, "Ethernet").status == "ok"


def test_the_slowest_link_and_the_slow_gpus_are_named() -> None:
    four = members("a", "a", "b", "b")
    assert links_finding([10.0, 11.0, 9.0, 10.0], four).status == "ok"
    found = links_finding([10.0, 10.0, 2.0, 10.0], four)
    assert found.status == "warn" and "from 1 to 2" in found.detail and "a and b" in found.detail
    assert gpus_finding([700.0, 690.0, 710.0, 705.0], four).status == "ok"
    found = gpus_finding([700.0, 500.0, 710.0, 705.0], four)
    assert found.status == "warn" and "rank 1 on a: 500" in found.detail


def test_the_limits_of_the_process_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        found = {finding.name: finding for finding in limits.limit_findings(has_gpu=False)}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found["open files"].status == "warn" and "up to 256" in found["open files"].detail
    assert found["locked memory"].status == "ok"
    monkeypatch.setattr(limits, "LITTLE_SHARED_BYTES", 1 << 62)
    (little,) = limits._shared_memory(has_gpu=True)
    assert little.status == "warn" and "--shm-size" in little.detail


def test_the_disk_is_measured_where_the_run_goes_and_nothing_stays(tmp_path: Path) -> None:
    found = limits.disk_finding(tmp_path, checkpoint_bytes=1e6, grace_s=1e9)
    assert found.status == "ok" and "a checkpoint of 1.00MB" in found.detail
    found = limits.disk_finding(tmp_path, checkpoint_bytes=1e18, grace_s=120.0)
    assert found.status == "warn" and "health.grace_s is 120" in found.detail
    assert list(tmp_path.iterdir()) == []
    assert "not measured" in limits.disk_finding(tmp_path / "none").detail


def test_versions_that_clash_by_their_own_word_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(versions.clashing(("torch", "accelerate", "numpy"))) == []
    folder = tmp_path / "picky-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: picky\nVersion: 1.0\nRequires-Dist: numpy<1\nRequires-Dist: no-such-thing-here\n"
        'Requires-Dist: torch>99; extra == "gpu"\nRequires-Dist: torch>99; sys_platform == "none"\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert list(versions.clashing(("picky",))) == [
        f"picky needs numpy<1, installed is {metadata.version('numpy')}",
        "picky needs no-such-thing-here, which is not installed",
    ]
