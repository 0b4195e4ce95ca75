"""Write a checkpoint as a Hugging Face model folder, which transformers and what builds on it load."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.arguments import VerbParser, add_checkpoint
from llmtrain.errors import run_main

if TYPE_CHECKING:
    from llmtrain.checkpoint.hf_export import Exported

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
SHARD_BYTES = "5GB"  # as transformers long had it: a file that every file system and tool takes


def _as_text(exported: Exported) -> str:
    lines = [
        f"exported: {exported.out}  ({exported.architecture}, {exported.parameters:,} parameters in {exported.dtype}, "
        f"{exported.bytes / 1e6:,.1f} MB in {len(exported.files)} file{'s' if len(exported.files) > 1 else ''})",
        f"  from {exported.checkpoint}, step {exported.step:,}",
    ]
    if exported.padding_left_out:
        lines.append(f"  {exported.padding_left_out:,} ids that only padded the vocabulary are left out")
    if exported.no_tokenizer:
        lines.append(f"  without a tokenizer: {exported.no_tokenizer}")
    return "\n".join(lines)


def _byte_size(text: str) -> int:
    """Argparse type: a size such as 500MB or 2GiB, above 0."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB or 2GiB, not '{text}'")
    return size


def parser() -> VerbParser:
    """The parser of `llmtrain export`."""
    made = VerbParser("export", __doc__.splitlines()[0], "llmtrain export checkpoints --out my-model --dtype bf16")
    add = made.add_argument
    add_checkpoint(made)
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    add("--dtype", choices=sorted(DTYPES), default="fp32", help="of the weights (default: %(default)s, as they are)")
    add(
        "--shard-bytes",
        type=_byte_size,
        default=SHARD_BYTES,
        metavar="SIZE",
        help="cut the weights into files of at most this size, such as 500MB (default: %(default)s)",
    )
    add("--json", action="store_true", help="print what was written as JSON")
    return made


def main(argv: list[str]) -> None:
    """`llmtrain export`."""
    args = parser().read(argv)

    import torch  # here, so that --help answers at once

    from llmtrain.checkpoint.hf_export import export

    exported = export(args.path, args.out, getattr(torch, DTYPES[args.dtype]), args.shard_bytes)
    print(json.dumps(asdict(exported)) if args.json else _as_text(exported))


if __name__ == "__main__":
    sys.exit(run_main(main))
