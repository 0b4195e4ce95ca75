"""Write a checkpoint as a Hugging Face model folder, which transformers and what builds on it load."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.arguments import VerbParser
from llmtrain.errors import CorruptError, UserError, run_main
from llmtrain.storage.remote import path_or_url

if TYPE_CHECKING:
    from llmtrain.checkpoint.format import CheckpointReader
    from llmtrain.data.tokenizer import Tokenizer

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
SHARD_BYTES = "5GB"  # as transformers long had it: a file that every file system and tool takes


@dataclass(frozen=True)
class Exported:
    """What was written."""

    out: str
    checkpoint: str
    step: int
    architecture: str
    dtype: str
    parameters: int
    files: list[str]  # with tensors
    bytes: int  # of them
    padding_left_out: int  # ids of the model that the tokenizer does not have
    tokenizer: str | None  # why it was not written; None: it was


def export(path: Path | str, out: Path, dtype: str = "fp32", shard_bytes: int = 5 * 10**9) -> Exported:
    """Write the folder; all of it, or nothing.

    Args:
        path: PATH of the verbs.
        out: not there, or empty.
        dtype: of `DTYPES`.
        shard_bytes: of tensors, in one file.

    Raises:
        UserError: there is no checkpoint, its model is none of those that transformers has, or `out` is in use.
        CorruptError: the checkpoint is damaged.
    """
    from llmtrain.checkpoint.load import naming_others, open_checkpoint
    from llmtrain.checkpoint.remote import local_checkpoint
    from llmtrain.data.progress_bar import progress_bar
    from llmtrain.data.staging import staged_folder
    from llmtrain.storage.cache import say

    _check_free(out)
    path = local_checkpoint(path)
    reader = open_checkpoint(path)
    content = _Content(reader, dtype)
    files = reader.tensor_files()
    with naming_others(path, reader.folder):
        size = sum(file.bytes for file in files)
        with progress_bar("checking", size, sys.stderr.isatty()) as report:
            if problems := reader.verify(report):
                raise CorruptError("; ".join(problems[:3]))
        with staged_folder(out, say=say) as folder:
            return content.write(folder, out, shard_bytes)


def _check_free(out: Path) -> None:
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out}: exists and is not an empty folder; choose another --out or delete it")
    except OSError as error:
        raise UserError(f"{out}: cannot be read ({error.strerror})") from error


class _Content:
    """What the folder will hold; made before anything is written, for the model may be none that can be exported."""

    def __init__(self, reader: CheckpointReader, dtype: str):
        from llmtrain.checkpoint.resume import saved_config
        from llmtrain.data.shards import TOKENIZER_FOLDER
        from llmtrain.data.tokenizer import load_tokenizer
        from llmtrain.hf_config import architecture_for, config_json
        from llmtrain.model.hf_layout import parameter_shapes, tensors_to_write

        saved = saved_config(reader)
        model, seq_len = saved.model.model_dump(), saved.data.seq_len
        self._reader, self._dtype = reader, dtype
        self._architecture = architecture_for(model)
        tokenizer = load_tokenizer(reader.folder / TOKENIZER_FOLDER)
        shapes = parameter_shapes(saved.model, seq_len)
        self._tensors = tensors_to_write(self._architecture, shapes, tokenizer.vocab_size)
        self._padding = model["vocab_size"] - tokenizer.vocab_size
        ids = _special_ids(tokenizer)
        # torch_dtype, as all versions of transformers read it.
        config = config_json(model, seq_len, tokenizer.vocab_size) | {"torch_dtype": DTYPES[dtype]} | ids
        self._files = {name: json.dumps(value, indent=2) + "\n" for name, value in [
            ("config.json", config), ("generation_config.json", ids),
        ]}  # fmt: skip
        self._no_tokenizer = self._add_tokenizer(tokenizer, seq_len)

    def _add_tokenizer(self, tokenizer: Tokenizer, seq_len: int) -> str | None:
        """Add its files; return why that cannot be."""
        from llmtrain.data.tokenizer_export import hugging_face_files

        try:
            self._files |= hugging_face_files(tokenizer, seq_len)
        except UserError as error:
            return str(error)
        return None

    def write(self, folder: Path, out: Path, shard_bytes: int) -> Exported:
        import torch

        from llmtrain.checkpoint.hf_writer import write_weights

        dtype = getattr(torch, DTYPES[self._dtype])
        paths = write_weights(folder, self._reader, self._tensors, dtype, shard_bytes)
        for name, text in self._files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return Exported(
            out=str(out),
            checkpoint=str(self._reader.folder),
            step=self._reader.manifest.step,
            architecture=self._architecture,
            dtype=DTYPES[self._dtype],
            parameters=sum(math.prod(tensor.shape) for tensor in self._tensors if tensor.parts),
            files=[path.name for path in paths],
            bytes=sum(path.stat().st_size for path in paths),
            padding_left_out=self._padding,
            tokenizer=self._no_tokenizer,
        )


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    if tokenizer.eos_id < 0:  # of token files of which little is known
        return {}
    pad = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    return {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad}


def _as_text(exported: Exported) -> str:
    lines = [
        f"exported: {exported.out}  ({exported.architecture}, {exported.parameters:,} parameters in {exported.dtype}, "
        f"{exported.bytes / 1e6:,.1f} MB in {len(exported.files)} file{'s' if len(exported.files) > 1 else ''})",
        f"  from {exported.checkpoint}, step {exported.step:,}",
    ]
    if exported.padding_left_out:
        lines.append(f"  {exported.padding_left_out:,} ids that only padded the vocabulary are left out")
    if exported.tokenizer:
        lines.append(f"  without a tokenizer: {exported.tokenizer}")
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
    add(
        "path",
        type=path_or_url,
        metavar="PATH",
        help="a run folder (its best checkpoint, else its latest) or a checkpoint",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    add(
        "--dtype",
        choices=sorted(DTYPES),
        default="fp32",
        help="of the weights in it (default: %(default)s, as they are)",
    )
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
    args = parser().parse_args(argv)
    exported = export(args.path, args.out, args.dtype, args.shard_bytes)
    print(json.dumps(asdict(exported)) if args.json else _as_text(exported))


if __name__ == "__main__":
    sys.exit(run_main(main))
