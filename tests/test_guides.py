"""All guides: links lead somewhere, commands and keys are known, the index has each page, the tutorial runs."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrain.arguments import VerbParser
from llmtrain.cli import VERBS
from llmtrain.completion import config_keys
from llmtrain.config import load_config
from llmtrain.errors import UserError
from llmtrain.sections import RunConfig
from tests.distributed.launching import environment, free_port

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("docker/*.md"), *ROOT.glob("benchmarks/*.md")])


def anchors(page: Path) -> set[str]:
    """Of its headings, as hosts of repositories make them: lower case, no punctuation, blanks as hyphens."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_index_knows_every_guide() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [
        page.name for page in DOCS.glob("*.md") if f"]({page.name})" not in index and page.name != "README.md"
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    for name in re.findall(r"(?:configs|launch)/[\w.-]+\.yaml", page.read_text(encoding="utf-8")):
        assert page.name == "LOG.md" or (ROOT / name).is_file(), name


GUIDES = [page for page in PAGES if page.name != "LOG.md"]  # which tells what was, too
FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
ANYTHING = "…"  # in a command: as many words as it takes; so is what stands in brackets
PLACEHOLDER = re.compile(rf"{ANYTHING}|[A-Z]+(?:[:/,][A-Z]+)*")  # FILE, N, HOST:PORT
KEYS = {key.removesuffix("=") for key in config_keys()}
KEY = re.compile(rf"(?<![\w./-])(?:{'|'.join(RunConfig.model_fields)})\.(?!(?:json|py|md)\b)\w+")
# What hands its arguments to a verb.
SCRIPTS = {
    "slurm/single-node.sbatch": ["train", "--config"], "slurm/multi-node.sbatch": ["train", "--config"],
    "slurm/evaluate.sbatch": ["evaluate"], "slurm/prepare-array.sbatch": ["prepare"], "docker/launch.sh": ["train"],
}  # fmt: skip


def shell_lines(text: str) -> list[str]:
    """Of the shell blocks; a command that is wrapped is one."""
    blocks = [block for kind, block in FENCED.findall(text) if kind.split(" ")[0] in ("", "bash")]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def backticked(text: str) -> list[str]:
    """What stands in backticks in the prose."""
    return re.findall(r"`([^`]+)`", FENCED.sub("", text))


def commands(line: str) -> Iterator[list[str]]:
    """Verb and arguments of each of our commands in a line of shell, whatever launches it."""
    if not re.search(r"\bllmtrain[ .][\w…]|\.sbatch |launch\.sh ", line):
        return
    lexer = shlex.shlex(re.sub(r"(?<=\s)\[[^\]]*\]", ANYTHING, line), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    for at, word in enumerate(words):
        if word == "llmtrain":
            begin = []
        elif word.startswith("llmtrain.") and words[at - 1] == "-m":
            begin = [word.removeprefix("llmtrain.")]
        elif word in SCRIPTS:
            begin = SCRIPTS[word]
        else:
            continue
        rest = words[at + 1 :]
        end = next((index for index, one in enumerate(rest) if re.fullmatch(r"[();<>|&]+", one)), len(rest))
        yield begin + rest[:end]


def parser_of(verb: str, *, is_whole: bool) -> VerbParser:
    """The verb's own; of a command that is not whole nothing is required, and FILE and N stand for what they name."""
    parser: VerbParser = importlib.import_module(f"llmtrain.{verb}").parser()
    parser.allow_abbrev = False
    for action in [] if is_whole else parser._actions:
        action.required = False
        action.type = _or_placeholder(action.type or str)
    return parser


def _or_placeholder(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: text if PLACEHOLDER.fullmatch(text) else convert(text)


def check(words: list[str], *, is_whole: bool) -> None:
    """Parse a command as its verb does, and its settings as the config does.

    Raises:
        UserError: there is no such verb, option, argument, key or value.
    """
    verb, arguments = words[0], words[1:]
    if PLACEHOLDER.fullmatch(verb):
        return
    if verb not in VERBS:
        raise UserError(f"{verb} is not a verb")
    parser = parser_of(verb, is_whole=is_whole and ANYTHING not in arguments)
    # As the value of an option it stays.
    pairs = zip(words, arguments, strict=False)
    arguments = [word for before, word in pairs if word != ANYTHING or before.startswith("--")]
    if "overrides" not in {action.dest for action in parser._actions}:
        parser.parse_args(arguments)
        return
    args = parser.parse_intermixed_args(arguments)
    file = args.config if args.config and (ROOT / args.config).is_file() else "configs/debug.yaml"
    load_config(ROOT / file, args.overrides)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_what_the_verbs_understand(page: Path) -> None:
    """Those of blocks must be whole; in the prose a name is enough, and options may stand alone."""
    text = page.read_text(encoding="utf-8")
    wrong = []
    for lines, is_whole in ((shell_lines(text), True), (backticked(text), False)):
        for line in lines:
            for words in filter(None, commands(line)):
                try:
                    check(words, is_whole=is_whole)
                except UserError as error:
                    wrong.append(f"{line}: {error}")
    assert wrong == []


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: str(page.relative_to(ROOT)))
def test_keys_are_those_of_the_config(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = {key for part in [*shell_lines(text), *backticked(text)] for key in KEY.findall(part)}
    assert named - KEYS == set()


def test_a_wrong_command_is_found() -> None:
    """By every way in which one is written; so what was found above is not nothing."""
    launch, script = "accelerate launch --config_file launch/ddp.yaml -m llmtrain.train", "sbatch slurm/evaluate.sbatch"
    for line in (
        "llmtrain evaluate RUN --batch 3", "llmtrain report", "llmtrain look data  # at it", f"{script} RUN --jsonl",
        f"{launch} --config configs/debug.yaml training.max_step=3", "python -m llmtrain.train optimizer.lr=x",
        "llmtrain prepare … --part 1of2", "true && llmtrain verify data/mine --jsno || false",
    ):  # fmt: skip
        (words,) = commands(line)
        with pytest.raises(UserError):
            check(words, is_whole=True)
    guides = [page.read_text(encoding="utf-8") for page in GUIDES]
    assert len([words for text in guides for line in shell_lines(text) for words in commands(line)]) > 70


@pytest.mark.parametrize("picture", sorted(DOCS.glob("*.svg")), ids=lambda picture: picture.name)
def test_pictures_load_nothing(picture: Path) -> None:
    text = picture.read_text(encoding="utf-8")
    assert "<text" in text and not re.search(r"""url\(["']?(?!#)|@import|(?:href|src)=["'](?!#)|<script""", text)


@pytest.mark.slow
def test_the_tutorial_runs_as_written(tmp_path: Path) -> None:
    blocks = re.findall(
        r"^```bash tutorial\n(.*?)^```", (DOCS / "tutorial.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert len(blocks) == 3
    for folder in ("configs", "launch"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    prefix = f'accelerate() {{ command accelerate launch --main_process_port {free_port()} "${{@:2}}"; }}\n'
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", prefix + "\n".join(blocks)],
        cwd=tmp_path, env=environment(PATH=path), capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "going on from checkpoints/first" in result.stdout and "all-reduce" in result.stdout
    for run in ("first", "two"):
        assert (tmp_path / "checkpoints" / run / "final").exists()
    assert not (tmp_path / "checkpoints/larger").exists()
