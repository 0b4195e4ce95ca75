"""How this machine's pip reaches its packages, for a build elsewhere on it: `python docker/host_pip.py PIP_CONF`.

Writes all settings of pip (files and environment) to the one file PIP_CONF, and prints a buildah option for each local
file or folder that they name. Part of `make docker-test`; an image never contains any of it.
"""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse

# Not at their own paths: a read-only file in the way makes Debian's ca-certificates fail to install.
MOUNTED = "/mnt/host"


def settings() -> configparser.RawConfigParser:
    """What `pip config list` shows, with a variable of the environment over the same key of a file."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    parser = configparser.RawConfigParser()
    for line in sorted(lines, key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        section = "global" if section == ":env:" else section
        if not parser.has_section(section):
            parser.add_section(section)
        parser.set(section, key, " ".join(ast.literal_eval(value).split()))
    return parser


def move_local_paths(parser: configparser.RawConfigParser) -> set[Path]:
    """Make the settings name local files and folders as they will be seen under `MOUNTED`; returns these paths."""
    paths = set()
    for section in parser.sections():
        for key, value in parser.items(section):
            words = value.split()
            for position, word in enumerate(words):
                scheme = "file://" if word.startswith("file://") else ""
                path = Path(urlparse(word).path if scheme else word)
                if path.is_absolute() and path.exists():
                    # The pages of an index lead to files beside it (../../files/).
                    paths.add(path.parent if key.endswith("index-url") else path)
                    words[position] = f"{scheme}{MOUNTED}{path}"
            parser.set(section, key, " ".join(words))
    return paths


if __name__ == "__main__":
    pip_settings = settings()
    local_paths = move_local_paths(pip_settings)
    with Path(sys.argv[1]).open("w", encoding="utf-8") as file:
        pip_settings.write(file)
    for local_path in sorted(local_paths):
        print(f"--volume={local_path}:{MOUNTED}{local_path}:ro")
