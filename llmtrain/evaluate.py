"""Loss, perplexity, accuracy and bits per byte of a trained model on prepared data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llmtrain.arguments import VerbParser, positive_int
from llmtrain.checkpoint.load import TrainedModel, load_model
from llmtrain.checkpoint.resume import check_tokenizer
from llmtrain.data.ahead import ahead
from llmtrain.data.batches import Layout, Windows, validation_batches
from llmtrain.data.documents import document_end
from llmtrain.data.fetch import local_data
from llmtrain.data.shards import TokenDataset
from llmtrain.errors import UserError, run_main
from llmtrain.observe.record import finite
from llmtrain.observe.validation import validate
from llmtrain.storage.remote import path_or_url


def evaluate(trained: TrainedModel, data: TokenDataset, split: str, batches: int | None) -> dict[str, Any]:
    """Evaluate just as the trainer does: the same windows, micro-batches and precision.

    Args:
        trained: the model.
        data: prepared with the model's tokenizer.
        split: which part of it.
        batches: only so many global batches of windows, spread evenly over the split; None: all.

    Returns:
        what `--json` prints; `bits_per_byte` is None where the data does not know its size as text.

    Raises:
        UserError: another tokenizer, no such split, or a split without a single window.
    """
    engine, config = trained.engine, trained.config
    check_tokenizer(trained.reader, data.manifest)
    seq_len, training = config.data.seq_len, config.training
    windows = Windows(data.split(split), seq_len, seq_len)
    if config.data.document_mask:
        document_end(data, split)
    if not len(windows):
        raise UserError(
            f"{data.path}: the {split} split has {len(windows.stream):,} tokens, and one window of this model takes "
            f"{seq_len + 1}; prepare more text"
        )
    layout = Layout(
        windows=len(windows),
        global_batch=training.global_batch_size,
        micro_batch=training.micro_batch_size,
        rank=engine.rank,
        world_size=engine.world_size,
    )
    limit = batches and batches * layout.global_batch
    arriving = ahead(validation_batches(windows, layout, limit), engine.device)
    result = validate(engine, arriving, layout.micro_batch, trained.tokenizer.vocab_size)
    info = data.manifest.splits[split]
    bits = result.bits_per_byte(info.text_bytes / info.tokens) if info.text_bytes else None
    return {
        "checkpoint": str(trained.reader.folder),
        "step": trained.reader.manifest.step,
        "data": str(data.path),
        "split": split,
        "loss": finite(result.loss),
        "perplexity": finite(result.perplexity),
        "accuracy": result.accuracy,
        "bits_per_byte": finite(bits),
        "tokens": result.tokens,
    }


def _as_text(result: dict[str, Any]) -> str:
    def number(name: str, unit: str) -> str:
        value = result[name]
        return "unknown" if value is None else f"{value:.6g} {unit}".rstrip()

    lines = {
        "checkpoint": result["checkpoint"],
        "data": f"{result['data']}, {result['split']} split, {result['tokens']:,} tokens",
        "loss": number("loss", "nats per token"),
        "perplexity": number("perplexity", ""),
        "accuracy": f"{100 * result['accuracy']:.2f} %",
        "bits per byte": number("bits_per_byte", ""),
    }
    return "\n".join(f"{name:>13}  {value}" for name, value in lines.items())


def _open_data(trained: TrainedModel, path: Path | str | None) -> TokenDataset:
    """Open the data asked for, or the run's own."""
    paths = trained.config.data.paths
    if path is None and len(paths) > 1:
        raise UserError(
            f"{trained.reader.folder}: was trained on several sources; name one by --data: {' or '.join(paths)}"
        )
    own = local_data(path or trained.config.data.where)
    if path is None and not own.is_dir():
        raise UserError(f"{own}: the data that {trained.reader.folder} was trained on is not here; name it by --data")
    return TokenDataset(own)


def parser() -> VerbParser:
    """The parser of `llmtrain evaluate`."""
    made = VerbParser("evaluate", __doc__.splitlines()[0], "llmtrain evaluate checkpoints --data data/book --json")
    add = made.add_argument
    add(
        "path",
        type=path_or_url,
        metavar="PATH",
        help="a run folder (its best checkpoint, else its latest) or a checkpoint",
    )
    add("--data", type=path_or_url, metavar="DIR", help="prepared data (default: what the run was trained on)")
    add("--split", default="val", help="which part of it (default: %(default)s)")
    add("--batches", type=positive_int, metavar="N", help="only N global batches, as training.eval_batches=N does")
    add("--json", action="store_true", help="print the result as JSON")
    return made


def main(argv: list[str]) -> None:
    """`llmtrain evaluate`."""
    args = parser().parse_args(argv)
    with load_model(args.path, compiled=True) as trained:
        result = evaluate(trained, _open_data(trained, args.data), args.split, args.batches)
        if trained.engine.rank == 0:
            print(json.dumps(result, allow_nan=False) if args.json else _as_text(result))


if __name__ == "__main__":
    sys.exit(run_main(main))
