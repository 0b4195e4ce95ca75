"""Show the tokenizer of prepared data or of a run, what it makes of a text, and write it as a tokenizer.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.arguments import VerbParser
from llmtrain.errors import UserError, run_main

if TYPE_CHECKING:
    from llmtrain.data.tokenizer import Tokenizer

TOKENIZER_FOLDER = "tokenizer"


def _open(path: Path) -> Tokenizer:
    """Load the tokenizer of prepared data, a checkpoint, a run, or one that lies in a folder by itself."""
    from llmtrain.data.tokenizer import load_tokenizer

    if (path / TOKENIZER_FOLDER).is_dir():
        return load_tokenizer(path / TOKENIZER_FOLDER)
    if any((path / name).is_file() for name in ("llmtrain_tokenizer.json", "tokenizer.json", "tokenizer.model")):
        return load_tokenizer(path)
    from llmtrain.checkpoint.store import find_checkpoint

    return load_tokenizer(find_checkpoint(path) / TOKENIZER_FOLDER)


def _write(path: Path, content: str) -> None:
    """Write a file that was not there; the same content may be."""
    try:
        if path.exists() and path.read_text(encoding="utf-8") != content:
            raise UserError(f"{path}: exists and is another; delete it or choose another --out")
        path.write_text(content, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error


def _facts(tokenizer: Tokenizer, text: str | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
    facts |= {name: getattr(tokenizer, name) for name in ("bos_id", "eos_id", "pad_id", "unk_id")}
    if text is not None:
        facts["tokens"] = [
            {"id": token, "hex": tokenizer.token_bytes(token).hex()} for token in tokenizer.encode(text).tolist()
        ]
    return facts


def _as_text(facts: dict[str, Any]) -> str:
    from llmtrain.observe.formats import visible

    special = ", ".join(
        f"{name[:-3]} {facts[name]}" for name in facts if name.endswith("_id") and facts[name] is not None
    )
    lines = [f"{facts['kind']}, {facts['vocab_size']:,} ids; {special}"]
    if "tokens" in facts:
        lines.append(f"{len(facts['tokens']):,} tokens:")
        lines += [f"{token['id']:>9}  {visible(bytes.fromhex(token['hex']))}" for token in facts["tokens"]]
    return "\n".join(lines)


def parser() -> VerbParser:
    """The parser of `llmtrain tokenizer`."""
    made = VerbParser("tokenizer", __doc__.splitlines()[0], "llmtrain tokenizer data/book --out tokenizer.json")
    add = made.add_argument
    add("path", type=Path, metavar="PATH", help="prepared data, a run, a checkpoint, or a folder with a tokenizer")
    add("--text", metavar="TEXT", help="show the tokens of this text")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="write it as a tokenizer.json, of whatever kind it is, for `tokenizers` and `transformers`",
    )
    add("--json", action="store_true", help="print what is shown as JSON")
    return made


def main(argv: list[str]) -> None:
    """`llmtrain tokenizer`."""
    args = parser().read(argv)
    tokenizer = _open(args.path)
    if args.out is not None:
        from llmtrain.data.tokenizer_export import tokenizer_json

        _write(args.out, tokenizer_json(tokenizer))
    facts = _facts(tokenizer, args.text)
    print(json.dumps(facts) if args.json else _as_text(facts))


if __name__ == "__main__":
    sys.exit(run_main(main))
