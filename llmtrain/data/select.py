"""Which of the files that are found in folders are read: by name, by language, by size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePath

from llmtrain.errors import UserError, nearest

LANGUAGES: dict[str, str] = {
    "assembly": ".s .asm",
    "c": ".c .h",
    "clojure": ".clj .cljs",
    "cpp": ".cc .cpp .cxx .hh .hpp .hxx .h",
    "csharp": ".cs",
    "css": ".css .scss",
    "cuda": ".cu .cuh",
    "dart": ".dart",
    "elixir": ".ex .exs",
    "erlang": ".erl .hrl",
    "fortran": ".f .f90 .f95",
    "go": ".go",
    "haskell": ".hs",
    "html": ".html .htm",
    "java": ".java",
    "javascript": ".js .jsx .mjs .cjs",
    "json": ".json",
    "julia": ".jl",
    "kotlin": ".kt .kts",
    "lua": ".lua",
    "markdown": ".md .markdown",
    "ocaml": ".ml .mli",
    "perl": ".pl .pm",
    "php": ".php",
    "python": ".py .pyi",
    "r": ".r .R",
    "ruby": ".rb",
    "rust": ".rs",
    "scala": ".scala",
    "shell": ".sh .bash",
    "sql": ".sql",
    "swift": ".swift",
    "tex": ".tex",
    "typescript": ".ts .tsx",
    "yaml": ".yaml .yml",
    "zig": ".zig",
}


@dataclass(frozen=True)
class Selection:
    """What is taken of the files of a folder or glob; a file that the user named is always taken.

    Args:
        patterns: of names (`*.py`) or of paths below the folder (`src/*.py`); none: all files.
        max_bytes: larger text files are left out. JSONL and Parquet are not: their size says nothing of a document's.
    """

    patterns: tuple[str, ...] = ()
    max_bytes: int | None = None

    def takes(self, path: PurePath, is_text: bool, size: int, left_out: Counter[str]) -> bool:
        """Whether a file is taken; counts what is not. A name is matched with and without `.gz` or `.zst`."""
        if self.patterns:
            names = [str(path), path.name]
            names += [name.removesuffix(path.suffix) for name in names if path.suffix.lower() in (".gz", ".zst")]
            if not any(_matches(name, pattern) for name in names for pattern in self.patterns):
                left_out["files of other names"] += 1
                return False
        if is_text and self.max_bytes is not None and size > self.max_bytes:
            left_out["files over --max-file-bytes"] += 1
            return False
        return True


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*/{pattern}")


def patterns_of(languages: Iterable[str]) -> tuple[str, ...]:
    """The name patterns of languages.

    Raises:
        UserError: one is not in `LANGUAGES`.
    """
    for language in languages:
        if language not in LANGUAGES:
            raise UserError(f"--language {language}: {nearest(language, list(LANGUAGES))}; --include '*.xyz' takes any")
    return tuple(f"*{suffix}" for language in languages for suffix in LANGUAGES[language].split())
