"""Which packages are installed: by what pip has noted, for a folder of the same name can be imported, too."""

from __future__ import annotations

from importlib import metadata

_DECIDING = ("torch", "accelerate", "deepspeed", "numpy", "sentencepiece", "tokenizers", "safetensors", "torchao")


def installed_version(package: str) -> str | None:
    """The version of an installed package; None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def package_versions() -> dict[str, str]:
    """The installed versions of the packages that decide about numbers."""
    return {name: version for name in _DECIDING if (version := installed_version(name))}
