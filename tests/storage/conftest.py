"""A real S3 server on this machine, in a process of its own: what it keeps is reached over HTTP only."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import free_port

# One thing it does that a usual server does not: what touches a name that `hold` holds waits until that file is gone.
_SERVER = """
import sys, time
from pathlib import Path
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

application, hold = DomainDispatcherApplication(create_backend_app), Path(sys.argv[2])

def serve(environ, start):
    while hold.exists() and hold.read_text() in environ["PATH_INFO"]:
        time.sleep(0.05)
    return application(environ, start)

run_simple("127.0.0.1", int(sys.argv[1]), serve, threaded=True)
"""


class Server:
    """`moto` with one empty bucket at a time."""

    def __init__(self, port: int | None = None) -> None:
        self.port = port or free_port()
        self.hold = Path(tempfile.mkdtemp()) / "hold"
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(self.port), str(self.hold)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.requests: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "Running on" in line:
                break
        else:
            raise RuntimeError("the S3 server did not start")
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.requests.append(line)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class Bucket:
    """An empty bucket, its URL and its objects."""

    def __init__(self, server: Server, client: Any, name: str):
        self.server, self.name, self.url = server, name, f"s3://{name}"
        self._client = client
        client.create_bucket(Bucket=name)

    def names(self) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", []))

    def get(self, key: str) -> bytes:
        content: bytes = self._client.get_object(Bucket=self.name, Key=key)["Body"].read()
        return content

    def put(self, key: str, content: bytes) -> None:
        self._client.put_object(Bucket=self.name, Key=key, Body=content)

    def steps(self, run: str) -> list[int]:
        """The finished checkpoints."""
        marked = [key.split("/") for key in self.names() if key.endswith("/COMMITTED") and key.startswith(f"{run}/")]
        return [int(parts[-2][5:]) for parts in marked if parts[-2][5:].isdigit()]


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.stop()


@pytest.fixture
def s3_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Server], None]:
    """Where the store's library finds the server and the credentials: nothing of it is in our config."""

    def use(server: Server) -> None:
        variables = {
            "AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "not-to-be-written",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(tmp_path / "none"), "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
            "LLMTRAIN_CACHE": str(tmp_path / "cache"),
        }  # fmt: skip
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return use


_numbers = iter(range(10**6))


@pytest.fixture
def bucket(server: Server, s3_environment: Callable[[Server], None]) -> Bucket:
    return make_bucket(server, s3_environment)


def make_bucket(server: Server, use: Callable[[Server], None], name: str | None = None) -> Bucket:
    import boto3
    import fsspec

    use(server)
    fsspec.config.conf.clear()
    for kind in ("s3", "s3a"):
        fsspec.get_filesystem_class(kind).clear_instance_cache()
    client = boto3.client("s3", endpoint_url=server.url)
    return Bucket(server, client, name or f"bucket-{next(_numbers)}")
