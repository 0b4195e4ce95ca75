"""Which checkpoint a launch goes on from, and whether it may."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtrain.checkpoint.folders import committed_steps, step_folder
from llmtrain.checkpoint.format import CONFIG, CheckpointReader
from llmtrain.checkpoint.progress import Progress
from llmtrain.checkpoint.store import OpenCheckpoint, find_checkpoint, newest_good
from llmtrain.config import RunConfig, load_config
from llmtrain.data.shards import DataIdentity
from llmtrain.errors import UserError
from llmtrain.hf_config import FOLDER_KEYS

# What may not change within a run: it would give the saved tensors or the position in the data another meaning.
_FIXED = {
    "run": ["seed"],
    "data": ["seq_len", "stride", "packing"],
    "model": list(FOLDER_KEYS),
    "optimizer": ["name"],
}  # fmt: skip
# What changes nothing about the numbers, and so is not worth a line.
_SILENT = {
    "run.dir", "run.name", "training.stop_after", "model.init_from", "data.workers", "data.path", "checkpoint.remote",
}  # fmt: skip


def choose_checkpoint(
    run_dir: Path, resume: str, warn: Callable[[str], None], open_one: OpenCheckpoint
) -> CheckpointReader | None:
    """Open (by `open_one`) the checkpoint that `--resume auto|never|PATH` means; None: start from the beginning.

    With PATH the run branches off from another run, or goes back within this one. Once it has saved for itself, the
    same command goes on from there and says so: a requeued job does not begin again and again.

    Raises:
        UserError: the folder holds another run, and `never` or a PATH outside it was given; or PATH is none.
        CorruptError: there are checkpoints, and none is good.
    """
    if resume == "never":
        if committed_steps(run_dir) or (run_dir / "metrics.jsonl").exists():
            raise UserError(f"{run_dir}: holds another run; choose another run.dir, or go on with it by --resume auto")
        return None
    path = Path(resume)
    if resume == "auto" or path.resolve() == run_dir.resolve():
        return newest_good(run_dir, warn, open_one)
    if committed_steps(run_dir):
        own = newest_good(run_dir, warn, open_one)
        if own and own.state().get("started_from") == str(path.resolve()):
            warn(_went_on_before(path, run_dir, own.manifest.step))
            return own
        if path.resolve().parent != run_dir.resolve():
            raise UserError(
                f"{run_dir}: holds another run than one from {path}; choose another run.dir, or go on with it by "
                "--resume auto"
            )
    # A run folder means where it got to; its best, which the other verbs take, would throw steps away.
    return newest_good(path, warn, open_one) if committed_steps(path) else open_one(find_checkpoint(path))


def brings_weights(run_dir: Path, resume: str) -> bool:
    """Whether `choose_checkpoint` opens one, or raises, whatever it finds; before anything is fetched from a store.

    A PATH says nothing by itself: it may be that of the run's own folder, which is still empty.
    """
    return resume != "never" and bool(committed_steps(run_dir))


def _went_on_before(path: Path, run_dir: Path, step: int) -> str:
    if path.resolve().parent == run_dir.resolve():
        newest = step_folder(run_dir, step).name
        again = f"to go back once more, rename its later steps before ({newest} to {newest}.aside-1)"
    else:
        again = "to begin there once more, choose another run.dir"
    return (
        f"--resume {path}: {run_dir} went on from there before, and has come to step {step:,} since: going on with "
        f"that; {again}"
    )


def own_step(run_dir: Path, reader: CheckpointReader | None) -> int | None:
    """The step of a checkpoint that lies in the run folder as its own; None: there is none, or it is another run's."""
    if reader is None:
        return None
    step = reader.manifest.step
    return step if reader.folder.resolve() == step_folder(run_dir, step).resolve() else None


def progress_of(reader: CheckpointReader, config: RunConfig, data: DataIdentity, packing: str = "") -> Progress:
    """Check that the checkpoint belongs to this run; return how far it had come.

    Args:
        reader: of the checkpoint.
        config: of this run.
        data: that this run is to go on with.
        packing: digest of what its packed windows are made of.

    Raises:
        UserError: other data, another tokenizer, a changed model: the difference is shown, nothing is touched.
    """
    check_tokenizer(reader, data)
    if reader.manifest.data_fingerprint != data.fingerprint():
        raise UserError(
            f"{reader.folder}: was trained on other data than {config.data.where} holds (fingerprint "
            f"{reader.manifest.data_fingerprint[:12]}, now {data.fingerprint()[:12]}), so its position in the data "
            "means nothing here; use the same data, or start a new run.dir with model.init_from"
        )
    saved = saved_config(reader)
    for section, keys in _FIXED.items():
        for key in keys:
            before, now = (getattr(getattr(c, section), key) for c in (saved, config))
            if before != now:
                raise UserError(
                    f"{reader.folder}: was saved with {section}.{key}={before}, this run has {now}; set it back, or "
                    "choose another run.dir"
                )
    try:
        progress = Progress(**reader.state())
    except TypeError as error:
        raise UserError(
            f"{reader.folder}: its state is of another version of llmtrain ({reader.manifest.llmtrain_version}: "
            f"{error}); go on with that version, or start a new run.dir with model.init_from"
        ) from error
    # The ids are the same; where documents end may not be, and what is made of both depends on the code as well.
    if progress.packing not in (None, packing):
        raise UserError(
            f"{reader.folder}: its windows were packed otherwise than these would be (digest "
            f"{(progress.packing or 'none')[:12]}, now {(packing or 'none')[:12]}): documents of {config.data.where} "
            "end elsewhere, or another version of llmtrain packs in another way; go on with what it was, or start a "
            "new run.dir with model.init_from"
        )
    return progress


def check_tokenizer(reader: CheckpointReader, data: DataIdentity) -> None:
    """Refuse data whose ids mean something else than those the model was trained on."""
    if reader.manifest.tokenizer_sha256 != data.tokenizer.sha256:
        raise UserError(
            f"{reader.folder}: was trained with another tokenizer than this data was prepared with "
            f"({reader.manifest.tokenizer_sha256[:12]}, data has {data.tokenizer.kind} {data.tokenizer.sha256[:12]}); "
            "prepare the data with --tokenizer set to the checkpoint's tokenizer folder"
        )


def saved_config(reader: CheckpointReader) -> RunConfig:
    """The resolved config that the checkpoint was saved with; `model.head_dim` also where it was no key yet."""
    config = load_config(reader.path(CONFIG))
    model = config.model.model_copy(update={"head_dim": config.model.head_width})
    return config.model_copy(update={"model": model})


def changes(before: RunConfig, now: RunConfig) -> list[str]:
    """The settings that differ, as `section.key: old → new`; those that cannot matter are left out."""
    lines = []
    for section, values in now.model_dump().items():
        old: dict[str, Any] = before.model_dump()[section]
        for key, value in values.items():
            name = f"{section}.{key}"
            if old[key] != value and name not in _SILENT and section != "logging":
                lines.append(f"{name}: {old[key]} → {value}")
    return lines


class CheckpointWeights(CheckpointReader):
    """A checkpoint of ours as weights to start from: `model.init_from`."""

    def accept(self, config: RunConfig, data: DataIdentity) -> None:
        """Check that they can start this run.

        Raises:
            UserError: the tokenizer or the model is another one.
        """
        check_tokenizer(self, data)
        saved, now = saved_config(self).model, config.model
        for key in _FIXED["model"]:
            if getattr(saved, key) != getattr(now, key):
                raise UserError(
                    f"model.init_from {self.folder}: its {key} is {getattr(saved, key)}, this run's is "
                    f"{getattr(now, key)}"
                )
