"""The data of a run: one prepared folder, or several that are mixed (`data.sources`)."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtrain.config import DataSection, RunConfig
from llmtrain.data.batches import Order, Windows, WindowSet, plain_order
from llmtrain.data.documents import document_end
from llmtrain.data.fetch import local_data
from llmtrain.data.mixture import LONGEST_CYCLE, MixedOrder, MixedWindows, Stage, Weights, whole_numbers
from llmtrain.data.packed import PackedWindows, open_packed
from llmtrain.data.packing import GROUP
from llmtrain.data.shards import TOKENIZER_FOLDER, TokenDataset, TokenizerInfo
from llmtrain.errors import UserError

_ROUNDED = 0.01  # from so large a change of a share on it is told


@dataclass(frozen=True)
class Source:
    """One prepared folder, and what it is called in metrics."""

    name: str
    data: TokenDataset

    def train_windows(self, seq_len: int, stride: int) -> Windows:
        """Its training windows.

        Raises:
            UserError: there is not one.
        """
        stream = self.data.split("train")
        windows = Windows(stream, seq_len, stride)
        if not len(windows):
            raise UserError(
                f"data.seq_len {seq_len} is longer than the data: {self.data.path} has {len(stream)} training tokens "
                f"and one window takes {seq_len + 1}; lower data.seq_len or prepare more text"
            )
        return windows

    def val_windows(self, seq_len: int) -> Windows | None:
        """Its validation windows; None: there is not one. They never overlap, so that each token counts once."""
        if "val" not in self.data.manifest.splits:
            return None
        windows = Windows(self.data.split("val"), seq_len, seq_len)
        return windows if len(windows) else None


@dataclass(frozen=True)
class ValidationSet:
    """A split of prepared data that is only evaluated, and what it is called in metrics."""

    name: str
    data: TokenDataset
    split: str

    def fingerprint(self) -> str:
        """Equal exactly when its tokens are."""
        return self.data.manifest.fingerprint() + self.split

    def windows(self, seq_len: int) -> Windows:
        """Its windows, which never overlap.

        Raises:
            UserError: there is no such split, or not one window.
        """
        windows = Windows(self.data.split(self.split), seq_len, seq_len)
        if not len(windows):
            raise UserError(
                f"data.validation: the {self.split} split of {self.data.path} has {len(windows.stream)} tokens, and "
                f"one window takes {seq_len + 1}; lower data.seq_len, prepare more text, or leave it out"
            )
        return windows


@dataclass(frozen=True)
class TrainingData:
    """All sources, of one tokenizer, in the order of the config; and the sets beside them, of the same."""

    sources: tuple[Source, ...]
    sets: tuple[ValidationSet, ...] = ()

    @property
    def where(self) -> str:
        """Names the folders for people."""
        return ", ".join(str(source.data.path) for source in self.sources)

    @property
    def tokenizer(self) -> TokenizerInfo:
        """Of every source."""
        return self.sources[0].data.manifest.tokenizer

    @property
    def tokenizer_folder(self) -> Path:
        """Where it lies."""
        return self.sources[0].data.path / TOKENIZER_FOLDER

    @property
    def train_tokens(self) -> int:
        """Of all sources."""
        return sum(source.data.manifest.splits["train"].tokens for source in self.sources)

    def fingerprint(self) -> str:
        """Equal exactly when the token streams are equal; that of one folder is its own."""
        prints = [source.data.manifest.fingerprint() for source in self.sources]
        return prints[0] if len(prints) == 1 else hashlib.sha256(" ".join(prints).encode()).hexdigest()

    def fingerprint_of_sets(self) -> str:
        """Equal exactly when the token streams of the sets are; no part of what a run trains on."""
        return "".join(one.fingerprint() for one in self.sets)

    def check_tokenizer(self) -> None:
        """Raise CorruptError if the tokenizer's files are not those that the ids were made with."""
        self.sources[0].data.check_tokenizer()

    def train_windows(self, seq_len: int, stride: int) -> WindowSet:
        """The training windows of all sources.

        Raises:
            UserError: a source has none.
        """
        windows = [source.train_windows(seq_len, stride) for source in self.sources]
        return windows[0] if len(windows) == 1 else MixedWindows(windows)

    def packed_windows(self, seq_len: int) -> PackedWindows:
        """The packed training windows of the one source that there is.

        Raises:
            UserError: its documents cannot be told apart, or there is not one.
        """
        data = self.sources[0].data
        windows = open_packed(data, "train", seq_len, document_end(data), GROUP)
        if not len(windows):
            raise UserError(f"data.packing: {data.path} has no document with a token of its own; prepare more text")
        return windows

    def document_end(self, evaluated: Container[str]) -> int:
        """The id that closes documents, in every source, the validation data of those that are evaluated, and all sets.

        Raises:
            UserError: in one they cannot be told apart.
        """
        ends = [document_end(source.data) for source in self.sources]  # all of one tokenizer
        for source in self.sources:
            if source.name in evaluated:
                document_end(source.data, "val")
        for one in self.sets:
            document_end(one.data, one.split)
        return ends[0]

    def mean_piece(self, seq_len: int) -> float:
        """Mean length of what plain windows cut documents into, in tokens, or less; of the source where it is least."""
        splits = [source.data.manifest.splits["train"] for source in self.sources]
        return min(split.tokens / (split.documents + split.tokens / seq_len) for split in splits)

    def val_windows(self, seq_len: int) -> dict[str, Windows]:
        """The validation windows of each source that has any, by its name."""
        found = {source.name: source.val_windows(seq_len) for source in self.sources}
        return {name: windows for name, windows in found.items() if windows is not None}

    def set_windows(self, seq_len: int) -> dict[str, Windows]:
        """The windows of each set of `data.validation`, by its name.

        Raises:
            UserError: one has none.
        """
        return {one.name: one.windows(seq_len) for one in self.sets}


def make_order(windows: WindowSet, seed: int, stages: Sequence[Stage]) -> Order:
    """The order of training windows; `stages` are of no account where there is only one source."""
    if isinstance(windows, MixedWindows):
        return MixedOrder([len(source) for source in windows.sources], seed, stages)
    return plain_order(len(windows), seed)


def fetch_data(section: DataSection) -> list[Path]:
    """The folders of this machine where the data lies, sources first, then sets; what a URL names is fetched."""
    return [local_data(path) for path in (*section.paths, *(one.path for one in section.validation))]


def open_data(section: DataSection, folders: Sequence[Path]) -> TrainingData:
    """Open what `fetch_data` found.

    Raises:
        UserError: one is not prepared data, or sources have different tokenizers.
        CorruptError: a manifest is damaged.
    """
    opened = [TokenDataset(folder) for folder in folders]
    first, count = opened[0], len(section.paths)
    for number, other in enumerate(opened):
        if other.manifest.tokenizer.sha256 != first.manifest.tokenizer.sha256:
            raise UserError(
                f"data.{'sources' if number < count else 'validation'}: {other.path} was prepared with another "
                f"tokenizer ({_told(other)}) than {first.path} ({_told(first)}); prepare it with --tokenizer "
                f"{first.path / TOKENIZER_FOLDER}"
            )
    splits = [one.split for one in section.validation]
    return TrainingData(
        tuple(map(Source, section.names, opened[:count])),
        tuple(map(ValidationSet, section.set_names, opened[count:], splits)),
    )


def weights_from(section: DataSection) -> dict[int, Weights]:
    """The weights of all sources by the number of steps after which they hold."""
    sources = section.sources or ()
    return {at: tuple(source.weight_after(at) for source in sources) for at in section.stage_steps}


def doubts(config: RunConfig, evaluated: Container[str]) -> Iterator[str]:
    """What of a mixture is not as one would think it is, a line each."""
    section = config.data
    for at, weights in weights_from(section).items():
        counts = whole_numbers(weights)
        for name, weight, count in zip(section.names, weights, counts, strict=False):
            given, gets = weight / sum(weights), count / sum(counts)
            if abs(gets - given) > _ROUNDED * given:
                yield (
                    f"data.sources: after {at} steps {name} has {given:.2g} of all tokens by its weight and gets "
                    f"{gets:.2g}: shares are rounded to parts of {LONGEST_CYCLE:,}"
                )
    if config.training.eval_every and evaluated and len(section.names) > 1:
        for name in section.names:
            if name not in evaluated:
                yield f"data.sources: {name} has no validation window, so val_loss is that of the others"


def _told(data: TokenDataset) -> str:
    tokenizer = data.manifest.tokenizer
    return f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids, {tokenizer.sha256[:12]}"
