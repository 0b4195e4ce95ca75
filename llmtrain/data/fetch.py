"""Prepared data that lies on a store: fetched once to a machine, verified, then read like any other."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from llmtrain.data.shards import MANIFEST, Manifest, check_inside, hash_file, read_manifest
from llmtrain.data.staging import make_once
from llmtrain.errors import CorruptError, UserError
from llmtrain.storage.cache import cache_folder, say
from llmtrain.storage.remote import Remote, in_parallel, is_url


def local_data(path: str | Path) -> Path:
    """The folder of this machine where the prepared data of `data.path` lies; a URL is fetched into the cache.

    The cache goes by the manifest's hash, so the same data under another URL is not fetched again, and other data under
    the same URL is. Of several processes of a machine one fetches, and the others wait for it.

    Raises:
        UserError: there is no prepared data, or it cannot be fetched or written here.
        CorruptError: a file there is not what the manifest says.
    """
    if not is_url(path):
        return Path(path)
    remote = Remote(str(path))
    text = remote.read(MANIFEST)
    if text is None:
        raise UserError(
            f"{path}: not prepared data (no {MANIFEST} in it); make it: llmtrain prepare --input … --out {path}"
        )
    manifest = _parse(text, remote)
    _refuse_outside(manifest, remote)
    folder = cache_folder("data", text.decode())

    def fetch(staged: Path) -> None:
        files = {file.path: file.sha256 for file in manifest.files()}
        for name in files:
            check_inside(staged, name, Path(f"{remote.url}/{MANIFEST}"))
        say(f"fetching {remote.url} ({sum(file.bytes for file in manifest.files()) / 1e6:,.1f} MB) to {folder}")
        in_parallel(lambda name: remote.fetch(name, staged / name, files[name]), list(files))
        (staged / MANIFEST).write_bytes(text)

    is_made = (folder / MANIFEST).is_file
    make_once(folder, fetch, is_made=is_made, say=say, task=f"fetching {remote.url}")
    return folder


def upload_data(folder: Path, remote: Remote) -> bool:
    """Copy prepared data to a store, the manifest last; return False if the same lies there already.

    Raises:
        UserError: the store holds other prepared data.
        CorruptError: a file here is not what the manifest says, or has another size there.
    """
    manifest, text = read_manifest(folder), (folder / MANIFEST).read_bytes()
    _refuse_outside(manifest, remote)
    there = remote.read(MANIFEST)
    if there is not None:
        if _parse(there, remote).fingerprint() == manifest.fingerprint():
            return False
        raise UserError(f"{remote.url}: holds other prepared data; choose another --out or delete it")
    files = {file.path: file for file in manifest.files()}
    for file in files.values():
        if hash_file(folder / file.path) != file.sha256:
            raise CorruptError(f"{folder / file.path}: content differs from the hash in the manifest; delete {folder}")
    in_parallel(lambda name: remote.upload(folder / name, name), list(files))
    sizes = remote.sizes()
    for name, file in files.items():
        if sizes.get(name) != file.bytes:
            raise CorruptError(f"{remote.url}/{name}: has another size than was uploaded; run the same command again")
    remote.write(MANIFEST, text)
    return True


def problems_of(remote: Remote) -> tuple[Manifest, list[str]]:
    """Read every file of prepared data on a store; return one line for each that is wrong."""
    text = remote.read(MANIFEST)
    if text is None:
        raise UserError(f"{remote.url}: neither prepared data nor a checkpoint nor a run with checkpoints")
    manifest = _parse(text, remote)
    _refuse_outside(manifest, remote)
    for file in manifest.files():
        check_inside(Path("/data"), file.path, Path(f"{remote.url}/{MANIFEST}"))
    return manifest, remote.problems((file.path, file.bytes, file.sha256) for file in manifest.files())


def _refuse_outside(manifest: Manifest, remote: Remote) -> None:
    """What is on a store must be whole there: a file of some machine is never opened because a store says so."""
    if outside := manifest.outside():
        raise UserError(
            f"{remote.url}: its manifest refers to token files of one machine ({outside[0].path}), which are used in"
            " place there; on a store there can only be data that was prepared from text"
        )


def _parse(text: bytes, remote: Remote) -> Manifest:
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptError(f"{remote.url}/{MANIFEST}: {where}: {first['msg']}; prepare the data again") from error
