"""The facts of prepared data on a terminal: tables, bars, and text that shows what cannot be seen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmtrain.observe.formats import count, printable, visible
from llmtrain.observe.text_curve import BARS

SAMPLE_LINES = 8
LONG_RUN = re.compile(r"(\\.|.)\1{7,}")  # of one character, in a token
ROWS = 20  # of inputs or files, that are listed
Facts = dict[str, Any]


def show(reports: list[Facts], console: Console | None = None) -> None:
    """Print what `data.inspection.inspect` found, folder by folder, and first how they compare if they are several."""
    console = console or Console(highlight=False, markup=False, emoji=False)
    if len(reports) > 1:
        _section(console, f"{len(reports)} sources", _sources(reports, console.width))
    for facts in reports:
        for title, body in _sections(facts, console.width):
            _section(console, title, body)


def _section(console: Console, title: str, body: RenderableType) -> None:
    console.print(Text(title, "bold"), no_wrap=True, overflow="ellipsis")
    console.print(Padding(body, (0, 0, 0, 2), expand=False))
    console.print()


def _sections(facts: Facts, width: int) -> Iterator[tuple[str, RenderableType]]:
    tokenizer = facts["tokenizer"]
    ids = f"{tokenizer['kind']}, {count(tokenizer['vocab_size'])} ids, {facts['dtype']}"
    yield f"{_short(facts['data'], width - 40)} · {ids}", _splits(facts)
    lengths = {name: split["document_tokens"] for name, split in facts["splits"].items() if split["document_tokens"]}
    if lengths:
        yield "document lengths, in tokens with the end of the document", _lengths(lengths)
    if len({source["input"] for source in facts["sources"]}) > 1:
        yield "from inputs", _origins(facts["sources"], "input", width)
    if facts["files_in_place"]:
        yield "from files in place", _origins(facts["files_in_place"], "file", width)
    yield "vocabulary", _lines(_vocabulary(facts["vocabulary"], facts["unknown_tokens"]))
    if facts["tokens"]["longest"]:
        yield "most frequent tokens, and the longest of the vocabulary", _frequent_and_longest(facts["tokens"], width)
    elif facts["tokens"]["most_frequent"]:
        yield "most frequent tokens", _token_table(facts["tokens"]["most_frequent"], width)
    yield "copies of documents", _lines(_copies(facts["duplicates"]))
    if facts["skipped"] or facts["changed"]:
        yield "when it was prepared", _lines(_prepared(facts))
    for sample in facts["samples"]:
        end = sample["start"] + sample["tokens"]
        where = f"{sample['split']}, tokens {count(sample['start'])} to {count(end)}, document {sample['document']:,}"
        yield f"sample: {where}", _excerpt(sample["text"])


def _table(*headings: str) -> Table:
    """Columns of numbers, but the first."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table


def _sources(reports: list[Facts], width: int) -> Table:
    table = _table("source", "tokens", "share", "documents", "MB of text", "bytes/token")
    rows = [(facts["data"], list(facts["splits"].values())) for facts in reports]
    total = sum(split["tokens"] for _, splits in rows for split in splits)
    for name, splits in rows:
        table.add_row(Text(_short(name, width - 66)), *_sizes(splits, total))
    return table


def _splits(facts: Facts) -> Table:
    table = _table("", "tokens", "share", "documents", "MB of text", "bytes/token")
    every = list(facts["splits"].values())
    total = sum(split["tokens"] for split in every)
    for name, split in facts["splits"].items():
        table.add_row(Text(name), *_sizes([split], total))
    return table


def _sizes(splits: list[Facts], total: int) -> list[str]:
    tokens, documents = (sum(split[what] for split in splits) for what in ("tokens", "documents"))
    text = sum(split["text_bytes"] or 0 for split in splits)
    return [
        count(tokens), _percent(tokens, total), count(documents), f"{text / 1e6:,.2f}" if text else "?",
        f"{text / tokens:.3f}" if text and tokens else "?",
    ]  # fmt: skip


def _lengths(lengths: dict[str, Facts]) -> Group:
    percentiles = next(iter(lengths.values()))["percentiles"]
    table = _table("", "mean", "min", *(f"{p} %" for p in percentiles), "max")
    bars = []
    for name, facts in lengths.items():
        numbers = [facts["min"], *facts["percentiles"].values(), facts["max"]]
        table.add_row(Text(name), f"{facts['mean']:,.0f}", *map(count, numbers))
        steps = facts["histogram"]
        highest = max(step["documents"] for step in steps)
        drawn = "".join(_bar(step["documents"], highest) for step in steps)
        bars.append(Text(f"{name}: from {count(steps[0]['from'])} {drawn} to {count(steps[-1]['below'])}, by doubling"))
    return Group(table, *bars)


def _bar(value: int, highest: int) -> str:
    return BARS[-(-value * (len(BARS) - 1) // highest)] if value else " "


def _origins(rows: list[Facts], kind: str, width: int) -> Table:
    """How much is from each input or file."""
    table = _table(kind, "split", "tokens", "share", "documents")
    total = sum(facts["tokens"] for facts in rows)
    for facts in rows[:ROWS]:
        sizes = (count(facts["tokens"]), _percent(facts["tokens"], total), count(facts["documents"]))
        table.add_row(Text(_short(facts[kind], width - 52)), facts["split"], *sizes)
    if len(rows) > ROWS:
        table.add_row(f"and {len(rows) - ROWS:,} more")
    return table


def _vocabulary(facts: Facts, unknown: dict[str, int]) -> Iterator[str]:
    yield f"{count(facts['used'])} of {count(facts['size'])} ids occur ({_percent(facts['used'], facts['size'])})" + (
        f", from {count(facts['smallest_used'])} to {count(facts['largest_used'])}" if facts["used"] else ""
    )
    if facts["never_used"]:
        reasons = {"special": facts["never_used_special"], "without text": facts["never_used_without_text"]}
        of_these = [f"{count(number)} {reason}" for reason, number in reasons.items() if number]
        yield f"{count(facts['never_used'])} never occur" + (f" (of these {', '.join(of_these)})" if of_these else "")
    if facts["used"]:
        yield f"{count(facts['rare'])} occur fewer than {facts['rare_below']} times"
        yield f"half of all tokens are the {count(facts['cover_half'])} most frequent"
    if facts["special"]:
        yield "special: " + ", ".join(
            f"{entry['name']} {entry['id']} ({_times(entry['count'])})" for entry in facts["special"]
        )
    for name, number in unknown.items():
        yield f"{count(number)} tokens of {name} are what the tokenizer cannot spell"


def _frequent_and_longest(tokens: Facts, width: int) -> Table:
    both = Table.grid(padding=(0, 3), expand=False)
    both.add_row(_token_table(tokens["most_frequent"], width), _token_table(tokens["longest"], width, longest=True))
    return both


def _token_table(tokens: list[Facts], width: int, longest: bool = False) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
    table.add_column("id", justify="right", no_wrap=True)
    table.add_column("text", no_wrap=True, overflow="ellipsis", max_width=width // 2 - 20)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("bytes" if longest else "share", justify="right", no_wrap=True)
    for facts in tokens:
        last = str(len(facts["hex"]) // 2) if longest else f"{100 * facts['share']:.2f} %"
        table.add_row(str(facts["id"]), Text(_token_text(facts)), count(facts["count"]), last)
    return table


def _token_text(facts: Facts) -> str:
    text = LONG_RUN.sub(lambda run: f"{run[1]}×{len(run[0]) // len(run[1])}", visible(bytes.fromhex(facts["hex"])))
    return text or facts["name"] or f"<{facts['id']}>"


def _copies(facts: Facts) -> Iterator[RenderableType | str]:
    for name, found in facts["splits"].items():
        share = f" ({100 * found['share']:.2g} % of its tokens)" if found["copies"] else ""
        copies = "copy" if found["copies"] == 1 else "copies"
        yield f"{name}: {count(found['copies'])} exact {copies} of earlier documents{share}"
        for repeated in found["most_repeated"]:
            start = visible(repeated["text"].encode())
            size = f"{count(repeated['tokens'])} token{'s' if repeated['tokens'] > 1 else ''}"
            yield f"  {repeated['times']:,} times, {size}: {start}"
    for name, number in facts["also_in_train"].items():
        yield f"{count(number)} documents of {name} are also in train"


def _prepared(facts: Facts) -> Iterator[str]:
    for verb, counts in (("left out", facts["skipped"]), ("changed", facts["changed"])):
        for what, number in counts.items():
            yield f"{verb}: {count(number)} {what}"


def _lines(lines: Iterator[Any]) -> Group:
    return Group(*(Text(line, overflow="ellipsis", no_wrap=True) for line in lines))


def _excerpt(text: str) -> Group:
    """The first lines of a sample, each cut at the width of the terminal."""
    lines = printable(text).expandtabs(4).splitlines()
    more = ["…"] if len(lines) > SAMPLE_LINES else []
    return Group(*(Text(f"│ {line}", overflow="ellipsis", no_wrap=True) for line in [*lines[:SAMPLE_LINES], *more]))


def _short(path: str, width: int) -> str:
    """The end of a path, which says most."""
    return path if len(path) <= width else f"…{path[1 - width :]}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "?"


def _times(number: int) -> str:
    return "never" if not number else "once" if number == 1 else f"{count(number)} times"
