"""A folder on a store that fsspec knows: list, read, write, remove. Every failure becomes one line for the user.

A file appears whole or not at all, on an object store and under file:// (a mounted disk), where it is on the disk when
`write` and `upload` return; on file servers that are spoken to (sftp, smb, hdfs) it may be seen, and left by a kill or
a power cut, half written. A folder never appears at once: whoever writes several files writes the one that makes them
count last, and checks sizes before. Credentials are found by the store's own library in its usual places; none is ever
part of a URL here.
"""

from __future__ import annotations

import hashlib
import os
import platform
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llmtrain.data.staging import make_folder, sync_path
from llmtrain.errors import CorruptError, UserError

AT_ONCE = 8  # files that are uploaded or fetched at the same time
_PIECE_BYTES = 8 << 20
_OURS = "-c constraints.txt -e '.[remote]'"
_PACKAGES = {
    "s3": _OURS, "s3a": _OURS, "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs",
    "sftp": "paramiko", "ssh": "paramiko", "smb": "smbprotocol", "hdfs": "pyarrow", "http": "aiohttp",
    "https": "aiohttp",
}  # fmt: skip
# Elsewhere folders are only parts of names; making one may even make a bucket.
_MOUNTED = {"file", "local"}
_WITH_FOLDERS = {*_MOUNTED, "sftp", "ssh", "smb", "hdfs", "webhdfs"}
_UNFINISHED = ".unfinished"  # ends the name of what is being written; ranks may write the same file at once


class RemoteError(UserError):
    """The store, or the way to it, does not do what it should; trying again later may help."""


def is_url(text: object) -> bool:
    """Whether it names a folder on a store rather than a path of this machine."""
    return isinstance(text, str) and "://" in text


def path_or_url(text: str) -> Path | str:
    """Argparse type: a path of this machine, or the URL of a folder on a store."""
    return text.rstrip("/") if is_url(text) else Path(text)


class Remote:
    """One folder on a store, by URL; names are relative to it, with forward slashes.

    Raises:
        UserError: the URL holds a password, or nothing that is installed speaks its protocol.
        RemoteError: anything else, from any method; the message names the place and what the store's library said.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        if parts.password is not None or parts.query or "::" in url:
            raise UserError(
                f"{parts.scheme}://…: a URL with a password, with ?… or of several stores is refused: it would stand "
                "in logs; give the credentials as the store's own library expects them (environment or its files)"
            )
        self._fs, self._root = _open(self.url, parts.scheme)
        self._has_folders, self._is_mounted = parts.scheme in _WITH_FOLDERS, parts.scheme in _MOUNTED

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Every file in a folder and below it: its name relative to this `Remote`, and its bytes."""
        with self._asking(f"{self.url}/{folder}", "listed"):
            self._fs.invalidate_cache()
            found = self._fs.find(self._path(folder), detail=True)
            sizes = {name: info["size"] for name, info in found.items()}
            for name in [name for name, size in sizes.items() if size is None]:  # as in the list of a web server
                sizes[name] = self._fs.size(name)
            return {self._relative(name): int(size or 0) for name, size in sizes.items()}

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if it is not there."""
        with self._asking(f"{self.url}/{name}", "read"):
            try:
                content: bytes = self._fs.cat_file(self._path(name))
            except FileNotFoundError as error:
                if _is_absent(error):
                    return None
                raise
            return content

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with self._asking(f"{self.url}/{name}", "written"):
            self._put(name, lambda path: self._fs.pipe_file(path, content))

    def upload(self, local: Path, name: str) -> None:
        """Copy a file of this machine there.

        Raises:
            FileNotFoundError: the local file is gone.
        """
        if not local.is_file():
            raise FileNotFoundError(local)
        with self._asking(f"{self.url}/{name}", "written"):
            self._put(name, lambda path: self._fs.put_file(str(local), path))

    def hashed(self, name: str, take: Callable[[bytes], object] = lambda _piece: None) -> tuple[int, str]:
        """Read a file in pieces, each of which is given to `take`; return its bytes and SHA-256."""
        digest, size = hashlib.sha256(), 0
        with (
            self._asking(f"{self.url}/{name}", "read"),
            self._fs.open(self._path(name), "rb", cache_type="none") as file,
        ):
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
                size += len(piece)
                take(piece)
        return size, digest.hexdigest()

    def problems(self, files: Iterable[tuple[str, int, str]], folder: str = "") -> list[str]:
        """Read files of a folder, each given by name, bytes and SHA-256; return one line for each that is wrong."""
        sizes, found = self.sizes(folder), []
        for name, size, sha256 in files:
            if sizes.get(name) != size:
                found.append(f"{self.url}/{name}: has {sizes.get(name)} bytes where the manifest says {size}")
            elif self.hashed(name)[1] != sha256:
                found.append(f"{self.url}/{name}: content differs from the hash in the manifest")
        return found

    def fetch(self, name: str, local: Path, sha256: str) -> None:
        """Copy a file to this machine, hashed while it is written and flushed to disk.

        Raises:
            CorruptError: its content is not what `sha256` says.
            OSError: it cannot be written here.
        """
        local.parent.mkdir(parents=True, exist_ok=True)
        failure: list[OSError] = []

        def put(piece: bytes) -> None:
            try:
                file.write(piece)
            except OSError as error:  # ours, not the store's
                failure.append(error)
                raise

        with local.open("wb") as file:
            try:
                found = self.hashed(name, put)[1]
            except RemoteError:
                if failure:
                    raise failure[0] from None
                raise
            file.flush()
            os.fsync(file.fileno())
        if found != sha256:
            raise CorruptError(f"{self.url}/{name}: content differs from the hash in the manifest")

    def move(self, name: str, new: str) -> None:
        """Give a file another name."""
        with self._asking(f"{self.url}/{name}", "renamed"):
            self._make_folder(new)
            self._fs.mv(self._path(name), self._path(new))

    def remove(self, names: list[str]) -> None:
        """Remove files; one that is not there is no error."""
        for name in names:
            with self._asking(f"{self.url}/{name}", "removed"):
                try:
                    self._fs.rm_file(self._path(name))
                except FileNotFoundError as error:
                    if not _is_absent(error):
                        raise

    def check_writable(self) -> None:
        """Write a small file and remove it again: the only way to learn whether one may."""
        probe = f".writable-{platform.node()}-{os.getpid()}"
        self.write(probe, b"llmtrain asks whether it may write here\n")
        self.remove([probe])

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _relative(self, path: str) -> str:
        return path.removeprefix(self._root).lstrip("/")

    def _put(self, name: str, put: Callable[[str], object]) -> None:
        path = self._path(name)
        if not self._is_mounted:
            self._make_folder(name)
            put(path)
            return
        unfinished = Path(f"{path}.{platform.node()}-{os.getpid()}-{threading.get_ident()}{_UNFINISHED}")
        make_folder(unfinished.parent)
        try:
            put(str(unfinished))
            sync_path(unfinished)
            unfinished.replace(path)
        except BaseException:
            with suppress(OSError):  # or each further try would leave one more on a disk that is full
                unfinished.unlink()
            raise
        sync_path(unfinished.parent)

    def _make_folder(self, name: str) -> None:
        if self._has_folders:
            self._fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    @contextmanager
    def _asking(self, where: str, verb: str) -> Iterator[None]:
        try:
            yield
        except (RemoteError, MemoryError):
            raise
        except Exception as error:  # each store's library has exceptions of its own
            said = " ".join(str(error).split()) or type(error).__name__
            known = isinstance(error, FileNotFoundError) and said == self._path(where.removeprefix(f"{self.url}/"))
            said = "no such file" if known else said
            raise RemoteError(f"{where.rstrip('/')}: cannot be {verb}: {said}") from error


def in_parallel(work: Callable[[Any], object], items: list[Any]) -> None:
    """Do the work for all items, several at a time; raise the first failure in their order, and begin no more after it.

    In threads that the end of the process does not wait for: what is given up must not hold up the exit code.
    """
    waiting = iter(enumerate(items))
    failures: dict[int, Exception] = {}

    def run() -> None:
        for number, item in waiting:
            try:
                work(item)
            except Exception as error:  # of whatever kind: raised below
                failures[number] = error
            if failures:
                return

    threads = [threading.Thread(target=run, name="transfer", daemon=True) for _ in items[:AT_ONCE]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[min(failures)]


def _open(url: str, protocol: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs

        # Others write to the same folder, so a listing is never taken from memory.
        fs, root = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        package = _PACKAGES.get(protocol, "")
        install = f"pip install {package}" if package else "install the package that fsspec names for it"
        raise UserError(f"{url}: nothing installed here speaks {protocol}://; {install} ({error})") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}; known are {', '.join(sorted(_PACKAGES))}, file and memory") from error
    except Exception as error:  # some libraries look for credentials at once
        raise RemoteError(f"{url}: cannot be opened: {' '.join(str(error).split())}") from error
    return fs, root.rstrip("/")


def _is_absent(error: FileNotFoundError) -> bool:
    """Whether only the file is not there; where the whole bucket is missing, S3 says so."""
    return "bucket does not exist" not in str(error)
