"""Text to token ids and back: the tokenizer kinds behind one protocol, fitted, saved and loaded.

====================  ============================================================  =======================
kind                  what a token is                                               saved as
====================  ============================================================  =======================
`char`                a character of the training text                              llmtrain_tokenizer.json
`byte`                a byte of UTF-8                                               llmtrain_tokenizer.json
`word`                a word, a run of blanks, a punctuation mark                   llmtrain_tokenizer.json
`bpe`, `unigram`      a SentencePiece piece                                         tokenizer.model
`bbpe`                a byte-level BPE token                                        tokenizer.json
`PATH.model`          of an existing SentencePiece model                            tokenizer.model
`PATH.json`           of an existing `tokenizer.json`                               tokenizer.json
`none`                not known: of token files prepared with `--vocab-size` alone  llmtrain_tokenizer.json
====================  ============================================================  =======================

Nothing here unpickles or executes what it loads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from llmtrain.data.pieces import AS_USUAL, Pieces
from llmtrain.data.shards import FileInfo, TokenizerInfo, hash_file
from llmtrain.data.tokenizer_base import IDENTITY, Ids, Lengths, Tokenizer, id_dtype, read_identity
from llmtrain.data.tokenizer_none import NoTokenizer
from llmtrain.data.tokenizer_table import ByteTokenizer, CharTokenizer, WordTokenizer
from llmtrain.errors import CorruptError, UserError, nearest

__all__ = [
    "DEFAULT_VOCAB_SIZE",
    "FITTED_KINDS",
    "KINDS",
    "Ids",
    "Lengths",
    "Tokenizer",
    "existing_digest",
    "existing_tokenizer",
    "fit_tokenizer",
    "id_dtype",
    "load_tokenizer",
    "tokenizer_info",
]

KINDS = ("char", "byte", "word", "bpe", "unigram", "bbpe")
FITTED_KINDS = ("char", "word", "bpe", "unigram", "bbpe")
SIZED_KINDS = ("word", "bpe", "unigram", "bbpe")
SAVED = ("tokenizer.json", "tokenizer.model")  # files that hold a whole tokenizer; the first that is there counts
# Used where no size is asked for, or less if the text supports less.
DEFAULT_VOCAB_SIZE = 8192


def fit_tokenizer(
    kind: str,
    training: Iterable[str],
    vocab_size: int | None = None,
    validation: Iterable[str] = (),
    pieces: Pieces = AS_USUAL,
) -> Tokenizer:
    """Make the tokenizer of a kind from the training documents.

    Args:
        kind: one of `KINDS`, or the path of a tokenizer that exists: a `.model` or `.json` file, or what `save` wrote.
        training: the documents it may learn from; read once, and only by kinds that learn.
        vocab_size: exactly how many ids it has; None for `DEFAULT_VOCAB_SIZE`, or fewer if the text supports fewer.
        validation: looked at by `char` only, which gets an `<unk>` id where these documents have other characters.
        pieces: what may be in one piece of `bpe`, `unigram` and `bbpe`.

    Raises:
        UserError: no such kind; a size the kind or the text cannot have (says the largest possible); a bad file.
    """
    if vocab_size is not None and kind not in SIZED_KINDS:
        raise UserError(f"--vocab-size {vocab_size}: the vocabulary of '{kind}' is given; leave --vocab-size out")
    pieces.check(kind)
    if (path := existing_tokenizer(kind)) is not None:
        return load_tokenizer(path) if path.is_dir() else _load_existing(path)
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        return CharTokenizer.fit(training, validation)
    if kind == "word":
        return WordTokenizer.fit(training, vocab_size, DEFAULT_VOCAB_SIZE)
    if kind in ("bpe", "unigram"):
        from llmtrain.data.tokenizer_sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer.fit(kind, training, vocab_size, DEFAULT_VOCAB_SIZE, pieces)
    from llmtrain.data.tokenizer_hf import HuggingFaceTokenizer

    return HuggingFaceTokenizer.fit(training, vocab_size, DEFAULT_VOCAB_SIZE, pieces.cuts())


def existing_tokenizer(kind: str) -> Path | None:
    """Return the file or folder that `kind` names, or None where it is one of `KINDS`.

    Raises:
        UserError: it is neither a kind nor a folder, or a `.model` or `.json` file, that exists.
    """
    if kind in KINDS:
        return None
    path = Path(kind)
    if path.is_dir():
        return path
    if path.suffix not in (".model", ".json"):
        hint = "a .model or .json file, or the tokenizer folder of prepared data or a checkpoint"
        raise UserError(f"unknown tokenizer '{kind}': {nearest(kind, list(KINDS))}; or name {hint}")
    if not path.is_file():
        raise UserError(f"{path}: no such tokenizer file")
    return path


def existing_digest(kind: str) -> str | None:
    """SHA-256 of what `existing_tokenizer` finds; None for one of `KINDS`."""
    path = existing_tokenizer(kind)
    if path is None or path.is_file():
        return hash_file(path) if path else None
    if not (path / IDENTITY).exists():  # the folder of a model: beside the tokenizer lie its weights
        files = [path / name for name in SAVED if (path / name).is_file()]
        return hash_file(files[0]) if files else None
    return hashlib.sha256("".join(map(hash_file, sorted(path.iterdir()))).encode()).hexdigest()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load the tokenizer that `save` wrote into a folder, or a lone `tokenizer.json` or `tokenizer.model` in it.

    Raises:
        UserError: there is none, or a file of another make is not what its name says.
        CorruptError: a file that was written here is damaged.
    """
    folder = Path(folder)
    content = read_identity(folder)
    kind = content["kind"] if content is not None else None
    if content is not None and kind in ("char", "byte", "word"):
        if kind == "byte":
            return ByteTokenizer()
        return CharTokenizer.from_content(content) if kind == "char" else WordTokenizer.from_content(content)
    if content is not None and kind == NoTokenizer.kind:
        return NoTokenizer.from_content(content)
    for name in SAVED:
        if (folder / name).is_file():
            return _load_existing(folder / name, kind)
    if content is not None:
        raise CorruptError(f"{folder}: the files of its {kind} tokenizer are missing; prepare the data again")
    raise UserError(f"{folder}: no tokenizer here (no {IDENTITY}, tokenizer.json or tokenizer.model)")


def tokenizer_info(folder: Path, tokenizer: Tokenizer | None = None) -> TokenizerInfo:
    """Describe the tokenizer saved in `DATA/tokenizer` for the manifest of `DATA`: file names are relative to `DATA`.

    Args:
        folder: where it is saved.
        tokenizer: the same, if it is at hand already.
    """
    tokenizer = tokenizer or load_tokenizer(folder)
    files = tuple(
        FileInfo(path=f"{folder.name}/{path.name}", bytes=path.stat().st_size, sha256=hash_file(path))
        for path in sorted(folder.iterdir())
    )
    together = hashlib.sha256("".join(f"{file.path}\0{file.sha256}\n" for file in files).encode())
    return TokenizerInfo(kind=tokenizer.kind, vocab_size=tokenizer.vocab_size, sha256=together.hexdigest(), files=files)


def _load_existing(path: Path, kind: str | None = None) -> Tokenizer:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if path.suffix == ".model":
        from llmtrain.data import tokenizer_sentencepiece as sp

        return sp.SentencePieceTokenizer(content, kind or sp.EXISTING, source=str(path))
    from llmtrain.data import tokenizer_hf as hf

    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a tokenizer.json (not UTF-8)") from error
    return hf.HuggingFaceTokenizer(text, kind or hf.EXISTING, source=str(path))
