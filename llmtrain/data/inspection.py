"""What a prepared folder holds, as facts: sizes, lengths, use of the vocabulary, frequent tokens, copies, samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.data.outside import TokenRange
from llmtrain.data.progress_bar import progress_bar
from llmtrain.data.scan import Scan, found_in, repeats, scan_split
from llmtrain.data.shards import TOKENIZER_FOLDER, Manifest, SplitInfo, TokenDataset
from llmtrain.data.tokenizer import Tokenizer, load_tokenizer
from llmtrain.errors import CorruptError

LARGE_BYTES = 64 << 20  # from here on a progress bar is worth showing
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
RARE_BELOW = 10  # an id that occurs less often is hardly learned
MOST_REPEATED = 5
EXCERPT_TOKENS = 40
Facts = dict[str, Any]  # JSON values


@dataclass(frozen=True)
class Shown:
    """How much is shown."""

    tokens: int = 20  # of the most frequent, and of the longest
    samples: int = 3  # windows, of each split
    window_tokens: int = 120
    seed: int = 1337


def inspect(path: str | Path, folder: Path, shown: Shown, show_progress: bool = False) -> Facts:
    """Read all ids once and return what `llmtrain report --json` prints of one folder.

    Args:
        path: what the user calls the data.
        folder: where it lies on this machine.
        shown: how much of it is shown.
        show_progress: whether a long pass has a bar on the terminal.

    Raises:
        UserError: the folder holds no prepared data.
        CorruptError: it is damaged.
    """
    data = TokenDataset(folder)
    data.check()
    data.check_tokenizer()
    manifest, tokenizer = data.manifest, load_tokenizer(folder / TOKENIZER_FOLDER)
    size = sum(shard.ids.bytes for shard in manifest.shards())
    with progress_bar(str(path), size, show_progress and size >= LARGE_BYTES) as report:
        try:
            scans = {name: scan_split(folder, manifest, name, report) for name in manifest.splits}
        except OSError as error:
            raise CorruptError(f"{folder}: cannot be read ({error.strerror or error})") from error
    texts = _Texts(tokenizer)
    recipe = manifest.recipe
    return {
        "data": str(path),
        "tokenizer": {"kind": manifest.tokenizer.kind, "vocab_size": manifest.tokenizer.vocab_size},
        "dtype": manifest.dtype,
        "fingerprint": manifest.fingerprint(),
        "inputs": recipe.get("request", {}).get("inputs", []),
        "splits": {name: _split(split, scans[name], texts) for name, split in manifest.splits.items()},
        "sources": _sources(manifest, scans),
        "files_in_place": _files_in_place(manifest.splits),
        "vocabulary": _vocabulary(tokenizer, _total(scans, tokenizer.vocab_size), texts),
        "tokens": _tokens(_total(scans, tokenizer.vocab_size), texts, shown.tokens),
        "duplicates": _duplicates(data, scans, texts),
        "skipped": recipe.get("skipped", {}),
        "changed": recipe.get("changed", {}),
        "unknown_tokens": recipe.get("unknown_tokens", {}),
        "samples": [sample for name in manifest.splits for sample in _samples(data, name, scans[name], shown, texts)],
    }


class _Texts:
    """The text of ids."""

    def __init__(self, tokenizer: Tokenizer):
        self.names = _names(tokenizer)
        self.bytes = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.lengths = np.array([len(text) for text in self.bytes], np.int64)
        self._tokenizer = tokenizer

    def known(self) -> bool:
        """Whether any id has a text."""
        return bool(self.lengths.any())

    def token(self, token: int) -> Facts:
        """One id alone: what its bytes are where they are UTF-8, its name where it stands for no text."""
        data = self.bytes[token]
        text = data.decode("utf-8", "replace") if data else None
        return {"id": token, "text": text, "hex": data.hex(), "name": self.names.get(token)}

    def window(self, ids: npt.NDArray[Any]) -> str:
        """Ids that follow each other: text, and the names of those that stand for none."""
        pieces, begin = [], 0
        for place in [*np.flatnonzero(np.isin(ids, list(self.names))).tolist(), len(ids)]:
            pieces.append(self._tokenizer.decode(ids[begin:place]))
            pieces += [self.names[int(token)] for token in ids[place : place + 1]]
            begin = place + 1
        return "".join(pieces)


def _names(tokenizer: Tokenizer) -> dict[int, str]:
    """The special ids, as a report shows them."""
    ids = {"bos": tokenizer.bos_id, "pad": tokenizer.pad_id, "unk": tokenizer.unk_id, "eos": tokenizer.eos_id}
    return {token: f"⟨{name}⟩" for name, token in ids.items() if token is not None and token >= 0}


def _total(scans: Mapping[str, Scan], vocab_size: int) -> npt.NDArray[np.int64]:
    return sum((scan.counts for scan in scans.values()), np.zeros(vocab_size, np.int64))


def _split(split: SplitInfo, scan: Scan, texts: _Texts) -> Facts:
    # Token files that are used in place do not say how much text they are: their tokens do.
    text_bytes = split.text_bytes or (int(scan.counts @ texts.lengths) if texts.known() else 0)
    return {
        "tokens": split.tokens,
        "documents": split.documents,
        "shards": len(split.shards),
        "text_bytes": text_bytes or None,
        "bytes_per_token": round(text_bytes / split.tokens, 4) if text_bytes and split.tokens else None,
        "document_tokens": _lengths(scan.lengths),
    }


def _lengths(lengths: npt.NDArray[np.int64]) -> Facts | None:
    """Exact percentiles (each a length that occurs), and how many lengths lie between two powers of two."""
    if not len(lengths):
        return None
    values = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    powers = np.bincount(np.frexp(lengths.astype(np.float64))[1])  # 2^(i-1) ≤ length < 2^i
    return {
        "min": int(lengths.min()),
        "max": int(lengths.max()),
        "mean": round(float(lengths.mean()), 2),
        "percentiles": {str(p): int(value) for p, value in zip(PERCENTILES, values, strict=True)},
        "histogram": [
            {"from": 1 << power >> 1, "below": 1 << power, "documents": int(count)}
            for power, count in enumerate(powers)
            if power >= int(np.flatnonzero(powers)[0])
        ],
    }


def _sources(manifest: Manifest, scans: Mapping[str, Scan]) -> list[Facts]:
    """What comes from each input, where several were prepared together: their documents follow each other."""
    facts = []
    for split, counts in manifest.recipe.get("documents_of_inputs", {}).items():
        ends = np.cumsum(counts)
        for name, begin, end in zip(manifest.recipe["request"]["inputs"], ends - counts, ends, strict=True):
            tokens = int(scans[split].lengths[begin:end].sum())
            facts.append({"input": name, "split": split, "documents": int(end - begin), "tokens": tokens})
    return facts


def _files_in_place(splits: Mapping[str, SplitInfo]) -> list[Facts]:
    """What comes from each file that is used where it lies."""
    return [
        {"file": shard.ids.path, "split": name, "tokens": shard.tokens, "documents": shard.documents}
        for name, split in splits.items()
        for shard in split.shards
        if isinstance(shard.ids, TokenRange)
    ]


def _vocabulary(tokenizer: Tokenizer, counts: npt.NDArray[np.int64], texts: _Texts) -> Facts:
    used = np.flatnonzero(counts)
    is_special = np.isin(np.arange(tokenizer.vocab_size), list(texts.names))
    without_text = (texts.lengths == 0) & ~is_special if texts.known() else np.zeros(tokenizer.vocab_size, bool)
    order = np.sort(counts)[::-1].cumsum()
    return {
        "size": tokenizer.vocab_size,
        "used": len(used),
        "never_used": tokenizer.vocab_size - len(used),
        "never_used_special": int((is_special & (counts == 0)).sum()),
        "never_used_without_text": int((without_text & (counts == 0)).sum()),
        "rare": int(((counts > 0) & (counts < RARE_BELOW)).sum()),
        "rare_below": RARE_BELOW,
        "cover_half": int(np.searchsorted(order, order[-1] / 2) + 1) if len(used) else 0,
        "smallest_used": int(used[0]) if len(used) else None,
        "largest_used": int(used[-1]) if len(used) else None,
        "special": [{"id": i, "name": name, "count": int(counts[i])} for i, name in sorted(texts.names.items())],
    }


def _tokens(counts: npt.NDArray[np.int64], texts: _Texts, number: int) -> Facts:
    """The most frequent tokens, and the longest ones; of equals, the one with the smaller id first."""
    total = int(counts.sum())
    frequent = np.argsort(-counts, kind="stable")[:number]
    longest = np.argsort(-texts.lengths, kind="stable")[:number]

    def facts(token: int) -> Facts:
        share = round(int(counts[token]) / total, 6) if total else 0.0
        return {**texts.token(token), "count": int(counts[token]), "share": share}

    return {
        "most_frequent": [facts(int(token)) for token in frequent if counts[token]],
        "longest": [facts(int(token)) for token in longest if texts.lengths[token]],
    }


def _duplicates(data: TokenDataset, scans: Mapping[str, Scan], texts: _Texts) -> Facts:
    """Exact copies of documents, found by their ids: within each split, and of training documents in the others."""
    facts: Facts = {"splits": {}, "also_in_train": {}}
    for name, scan in scans.items():
        found = repeats(scan.hashes)
        copies = found.times - 1
        tokens = int((copies * scan.lengths[found.documents]).sum())
        most = zip(found.documents[:MOST_REPEATED].tolist(), found.times[:MOST_REPEATED].tolist(), strict=True)
        facts["splits"][name] = {
            "copies": int(copies.sum()),
            "tokens": tokens,
            "share": round(tokens / len(stream), 6) if len(stream := data.split(name)) else 0.0,
            "most_repeated": [
                {"times": times, "document": number, "tokens": int(scan.lengths[number]),
                 "text": texts.window(_document(data, name, scan.lengths, number))}
                for number, times in most
            ],
        }  # fmt: skip
        if name != "train" and "train" in scans:
            facts["also_in_train"][name] = found_in(scan.hashes, scans["train"].hashes)
    return facts


def _document(data: TokenDataset, split: str, lengths: npt.NDArray[np.int64], number: int) -> npt.NDArray[Any]:
    """The first ids of a document."""
    start = lengths[:number].sum(keepdims=True)
    row: npt.NDArray[Any] = data.split(split).gather(start, min(int(lengths[number]), EXCERPT_TOKENS))[0]
    return row


def _samples(data: TokenDataset, name: str, scan: Scan, shown: Shown, texts: _Texts) -> Iterator[Facts]:
    """Windows from all over a split, each from another stretch of it."""
    stream = data.split(name)
    length = min(shown.window_tokens, len(stream))
    if not length:
        return
    lots, ends = np.random.default_rng(shown.seed), scan.lengths.cumsum()
    limits = np.linspace(0, len(stream) - length + 1, shown.samples + 1)
    for low, high in pairwise(limits):
        start = min(int(lots.uniform(low, high)), len(stream) - length)
        ids = stream.gather(np.array([start]), length)[0]
        number = int(np.searchsorted(ends, start, "right"))
        yield {"split": name, "start": start, "tokens": length, "document": number, "text": texts.window(ids)}
