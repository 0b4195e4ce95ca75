"""`llmtrain prepare`: text in, token shards out.

    find files → divide into training and validation → fit the tokenizer on training → encode, in several processes
    → shards and manifest in `OUT.parts` → renamed to OUT

With `--part I/N` many such commands, on any machines that share a file system, encode a stretch of the input each, and
whichever comes last joins them; both ways are in `data/parts.py`. Existing token files are not encoded, only checked
and referred to (`data/adopt.py`).

What is written depends on the input and the options only, never on the number of workers or parts or on their speed.
OUT appears in one step at the end: whatever happens before leaves nothing that looks finished.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llmtrain.data.adopt import adopt
from llmtrain.data.corpus import told
from llmtrain.data.fetch import upload_data
from llmtrain.data.filter_module import FLAG, FilterModule
from llmtrain.data.filters import parse_filter
from llmtrain.data.flags import parser
from llmtrain.data.parts import PartOutcome, numbers_as_ranges, prepare_all, prepare_part
from llmtrain.data.pieces import Pieces
from llmtrain.data.recipe import Options, Outcome, check_unused
from llmtrain.data.refine import Refinement
from llmtrain.data.select import Selection, patterns_of
from llmtrain.data.shards import SplitInfo
from llmtrain.data.token_files import are_token_files
from llmtrain.data.tokenizer import FITTED_KINDS
from llmtrain.data.tokenizer_none import NoTokenizer
from llmtrain.errors import UserError, run_main, tell
from llmtrain.storage.cache import cache_folder
from llmtrain.storage.remote import Remote

TOKEN_FLAGS = {"--val-input": "val_inputs", "--token-dtype": "token_dtype", "--eos-id": "eos_id"}


def prepare(options: Options, show_progress: bool = False) -> Outcome:
    """Write prepared data to `options.out`, or find that the same request was written there before.

    Token files are looked through and referred to; anything else is text, which is encoded.

    Raises:
        UserError: bad input, options that do not fit it, or a folder that cannot be written.
    """
    if are_token_files(options.inputs):
        return adopt(options, say=_say, show_progress=show_progress)
    return prepare_all(options, say=_say, show_progress=show_progress)


def _say(line: str) -> None:
    tell(f"llmtrain: {line}", sys.stderr)


def _summary(outcome: Outcome, out: Path | str) -> dict[str, Any]:
    """The facts that `--json` prints and the text form tells."""
    manifest = outcome.manifest
    return {
        "out": str(out),
        "already_prepared": outcome.already_prepared,
        "tokenizer": manifest.tokenizer.kind,
        "vocab_size": manifest.tokenizer.vocab_size,
        "dtype": manifest.dtype,
        "splits": {
            name: {
                **_counts(split),
                "bytes_per_token": round(split.text_bytes / split.tokens, 3) if split.text_bytes else None,
            }
            for name, split in manifest.splits.items()
        },
        "split_by": manifest.recipe.get("split_by"),
        "skipped": manifest.recipe.get("skipped", {}),
        "changed": manifest.recipe.get("changed", {}),
        "unknown_tokens": manifest.recipe.get("unknown_tokens", {}),
        "not_given_back": manifest.recipe.get("not_given_back"),
        "used_in_place": sorted({file.path for file in manifest.outside()}),
        "fingerprint": manifest.fingerprint(),
        "fit_seconds": round(outcome.fit_seconds, 3),
        "encode_seconds": round(outcome.encode_seconds, 3),
    }


def _as_text(summary: dict[str, Any]) -> str:
    state = "already prepared" if summary["already_prepared"] else "prepared"
    lines = [f"{state}: {summary['out']}  ({summary['tokenizer']}, {summary['vocab_size']:,} ids, {summary['dtype']})"]
    for name, split in summary["splits"].items():
        lines.append(
            f"  {name:<5} {split['tokens']:>13,} tokens  {split['documents']:>9,} documents"
            + (
                f"  {split['text_bytes'] / 1e6:>9,.2f} MB of text  {split['bytes_per_token']:.2f} bytes per token"
                if split["text_bytes"]
                else ""
            )
        )
    if files := summary["used_in_place"]:
        lines.append(f"  used in place, so leave them there: {', '.join(files[:3])}{', …' if len(files) > 3 else ''}")
    if summary["skipped"]:
        lines.append(f"  skipped: {told(summary['skipped'])}")
    if summary["changed"]:
        lines.append(f"  changed: {told(summary['changed'])}")
    for name, count in summary["unknown_tokens"].items():
        fitted = ", which was fitted on training text," if summary["tokenizer"] in FITTED_KINDS else ""
        lines.append(f"  {count:,} tokens of {name} are <unk>: what the tokenizer{fitted} cannot spell")
    lines.append(f"next: llmtrain train --config configs/debug.yaml data.path={summary['out']}")
    return "\n".join(lines)


def _part_summary(outcome: PartOutcome, out: Path) -> dict[str, Any]:
    return {
        "out": str(out),
        "part": outcome.number,
        "parts": outcome.count,
        "already_done": outcome.already_done,
        "missing": outcome.missing,
        "splits": {name: _counts(split) for name, split in outcome.encoded.splits.items()},
    }


def _part_as_text(summary: dict[str, Any]) -> str:
    tokens, documents = (sum(split[what] for split in summary["splits"].values()) for what in ("tokens", "documents"))
    return (
        f"part {summary['part']}/{summary['parts']} {'was done already' if summary['already_done'] else 'done'}:"
        f" {tokens:,} tokens, {documents:,} documents; of {summary['out']} still missing: part"
        f" {numbers_as_ranges(summary['missing'])}"
    )


def _counts(split: SplitInfo) -> dict[str, int]:
    return {"tokens": split.tokens, "documents": split.documents, "text_bytes": split.text_bytes}


def _gather(flags: dict[str, Any]) -> None:
    """Put flags that belong together into the fields that `Options` has for them."""
    patterns = (*flags.pop("include"), *patterns_of(flags.pop("languages")))
    flags["selection"] = Selection(patterns, flags.pop("max_file_bytes"))
    own = flags.pop("filter_module")
    module = FilterModule.of(own) if own else None
    filters = tuple(parse_filter(text) for text in flags.pop("filters"))
    if module and not {name for name, _ in filters} & set(module.names()):
        raise UserError(f"{FLAG} {own}: none of its filters is used; --filter {module.names()[0]} uses one")
    form, least, most = (flags.pop(name) for name in ("normalize", "min_chars", "max_chars"))
    flags["pieces"] = Pieces(flags.pop("digits"), flags.pop("whitespace"))
    flags["pieces"].check(flags["tokenizer"])
    flags["refine"] = Refinement(form, least, most, filters, module)


def main(argv: list[str]) -> None:
    """Run `llmtrain prepare`."""
    flags = vars(parser().read(argv))
    as_json, part, join = (flags.pop(name) for name in ("json", "part", "join"))
    if part and join:
        raise UserError("--part and --join: a part joins by itself when it is the last; give one of them")
    inputs, remote = tuple(flags.pop("input") or Options.inputs), None
    flags["val_inputs"] = tuple(flags["val_inputs"] or ())
    is_tokens = are_token_files(inputs)
    flags["tokenizer"] = flags["tokenizer"] or (NoTokenizer.kind if is_tokens else Options.tokenizer)
    if is_tokens and (part or join or isinstance(flags["out"], str)):
        raise UserError(
            f"{inputs[0]}: token files are used where they are, in one pass, by a folder here; leave"
            f" {'--part and --join' if part or join else 'the URL'} out"
        )
    if isinstance(url := flags["out"], str):
        if part or join:
            raise UserError(f"--part and --join need a folder that all machines share, not {url}")
        remote = Remote(url)
        remote.check_writable()
        flags["out"] = cache_folder("prepared", url)
    _gather(flags)
    options, show = Options(inputs=inputs, **flags), sys.stderr.isatty()
    if not is_tokens:
        check_unused(options, TOKEN_FLAGS, "for token files (.bin) only, and the input is text")
    outcome: Outcome | PartOutcome
    if part or join:
        outcome = prepare_part(options, *(part or (None, None)), say=_say, show_progress=show)
    else:
        outcome = prepare(options, show)
    where: Path | str = options.out
    if remote is not None:
        upload_data(options.out, remote)
        where = remote.url
    if isinstance(outcome, PartOutcome):
        summary, as_text = _part_summary(outcome, options.out), _part_as_text
    else:
        summary, as_text = _summary(outcome, where), _as_text
    print(json.dumps(summary, indent=1) if as_json else as_text(summary))


if __name__ == "__main__":
    sys.exit(run_main(main))
