"""Which versions are installed, what they were tested with, and which of them say themselves that they clash."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import InvalidRequirement, Requirement

from llmtrain.health.finding import Finding, fail, ok, warn
from llmtrain.packages import installed_version

# What a run cannot do without, and where a version can break it.
LIBRARIES = ("accelerate", "numpy", "pydantic", "safetensors", "tokenizers", "sentencepiece", "gigatoken")
OPTIONAL = ("deepspeed", "datasets", "tensorboard", "wandb")
# With the checkout only: an installed package does not carry the versions that it was tested with.
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def version_findings() -> Iterator[Finding]:
    """Look at torch and the libraries."""
    build = (
        f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {hip}" if (hip := torch.version.hip) else "CPU"
    )
    yield ok("torch", f"{torch.__version__} ({build} build)")
    installed = {name: installed_version(name) for name in (*LIBRARIES, *OPTIONAL)}
    missing = [name for name in LIBRARIES if installed[name] is None]
    if missing:
        yield fail("libraries", f"{', '.join(missing)} missing; install llmtrain again with pip")
    tested = _tested_versions()
    other = [
        f"{name} {version} (tested: {tested[name]})"
        for name, version in [("torch", torch.__version__.partition("+")[0]), *installed.items()]
        if version and name in tested and version != tested[name]
    ]
    if other:
        yield warn("libraries", f"{', '.join(other)}; if something fails: pip install -c constraints.txt -e .")
    present = ", ".join(f"{name} {version}" for name, version in installed.items() if version)
    absent = [name for name in OPTIONAL if installed[name] is None]
    yield ok("libraries", present + (f"; optional, not here: {', '.join(absent)}" if absent else ""))
    clashes = list(clashing(("llmtrain", "torch", *LIBRARIES, *OPTIONAL)))
    if clashes:
        yield fail("versions", f"{'; '.join(clashes)}; install them together: pip install -c constraints.txt -e .")
    else:
        yield ok("versions", "what these need of one another is there")


def clashing(packages: tuple[str, ...]) -> Iterator[str]:
    """What installed packages need (their own metadata says so), and the installed version that is not that."""
    for package in packages:
        try:
            needs = metadata.requires(package) or []
        except metadata.PackageNotFoundError:
            continue
        for text in needs:
            try:
                need = Requirement(text)
            except InvalidRequirement:
                continue  # an old package's own spelling, which pip let pass
            if need.marker and not need.marker.evaluate({"extra": ""}):
                continue  # of another system, or of an extra
            found = installed_version(need.name)
            if found is None:
                yield f"{package} needs {need.name}, which is not installed"
            elif not need.specifier.contains(found, prereleases=True):
                yield f"{package} needs {need.name}{need.specifier}, installed is {found}"


def _tested_versions() -> dict[str, str]:
    if not CONSTRAINTS.is_file():
        return {}
    pins = re.findall(r"^([\w.-]+)==(\S+)", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    return {name.lower(): version for name, version in pins}
