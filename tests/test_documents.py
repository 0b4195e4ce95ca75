"""Runs on documents apart: the loss and the gradient are those of documents one by one, however they are cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from llmtrain.assemble import Assembly, assemble
from llmtrain.config import load_config, make_config
from llmtrain.data.batches import batches, inputs_and_targets
from llmtrain.engine import make_engine
from llmtrain.errors import Stopped
from llmtrain.evaluate import main as evaluate
from llmtrain.generate import main as generate
from llmtrain.model.loss import IGNORE_INDEX
from llmtrain.model.transformer import Transformer
from llmtrain.prepare import main as prepare
from llmtrain.train import accumulate
from llmtrain.train import main as train
from tests.conftest import Call, is_one_clear_line, records
from tests.distributed.launching import assert_equal_numbers, launch
from tests.documents import texts, write_documents
from tests.test_train import merged, numbers, run

Config = dict[str, Any]
KINDS = [{"document_mask": True}, {"packing": "best_fit"}]
FLOAT32 = 1e-5  # sums in another order, as between engines
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents of up to 90 characters, some longer than a window of 64, in several shards."""
    splits = {"train": texts(300, 90), "val": texts(30, 90, seed=1000)}
    return write_documents(tmp_path_factory.mktemp("documents") / "data", splits, shard_tokens=4_000)


@pytest.fixture(params=KINDS, ids=["windows", "best_fit"])
def config(request: pytest.FixtureRequest, config_dict: Config, documents: Path) -> Config:
    """A run of 12 steps on documents apart."""
    return merged(
        config_dict, data={"path": str(documents), **request.param}, training={"max_steps": 12, "eval_every": 6},
        logging={"every": 1}, checkpoint={"save_every": 5},
    )  # fmt: skip


@contextmanager
def assembled(config: Config) -> Iterator[Assembly]:
    engine = make_engine(60.0)
    try:
        yield assemble(make_config(config), engine)
    finally:
        engine.close()


def one_by_one(tokens: torch.Tensor, end: int, padding: int | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets (1, length) of each document in rows of windows."""
    inputs, targets = inputs_and_targets(tokens, len(tokens), CPU, padding)
    for ids, wanted in zip(inputs, targets, strict=True):
        length = int((wanted != IGNORE_INDEX).sum())
        for a, b in pairwise(sorted({0, length, *(ids[:length] == end).nonzero()[:, 0].tolist()})):
            yield ids[None, a:b], wanted[None, a:b]


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_loss_and_gradient_are_those_of_documents_one_by_one(config: Config, positions: str) -> None:
    """Over real tokens: with rows that are short of targets, and a batch that is short of rows."""
    config["model"]["positions"] = positions
    with assembled(config) as parts:
        end, position = parts.data.document_end(()), parts.layout.windows - 5
        with parts.engine.evaluating() as model:
            plain = Transformer(model.config, model.seq_len)
            plain.load_state_dict(model.state_dict())
        batch = next(batches(parts.train, parts.layout, parts.order(), position=position))
        loss = accumulate(parts.engine, batch, parts.layout.micro_batch).total
        again = next(batches(parts.train, parts.layout, parts.order(), position=position))
        alone, count = torch.zeros(()), 0
        for tokens, _ in again.micro_batches():
            for ids, wanted in one_by_one(tokens, end, again.padding):
                alone, count = alone + plain(ids, wanted), count + wanted.numel()
        (alone / count).backward()
        assert batch.target_count == count
        assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert ours.grad is not None and theirs.grad is not None
            assert (ours.grad - theirs.grad).abs().max() <= FLOAT32 * theirs.grad.abs().max(), name


def test_accumulation_and_resume_change_nothing(config: Config, tmp_path: Path) -> None:
    whole = run(config)
    parts = merged(config, run={"dir": str(tmp_path / "micro")}, training={"micro_batch_size": 2})
    assert_equal_numbers(run(parts), whole, FLOAT32)
    stopped = merged(config, run={"dir": str(tmp_path / "stopped")}, training={"stop_after": 7})
    with pytest.raises(Stopped):
        run(stopped)
    stopped["training"].pop("stop_after")
    assert numbers(run(stopped)) == numbers(whole)
    mixed = merged(config, run={"dir": str(tmp_path / "off")}, data={"document_mask": False, "packing": "windows"})
    losses = [[record["train_loss"] for record in records(folder)] for folder in (whole, run(mixed))]
    assert not set(losses[0]) & set(losses[1])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [("cpu-ddp", 2), ("cpu-zero3", 2)])
def test_ranks_change_nothing(config: Config, tmp_path: Path, name: str, processes: int) -> None:
    config["model"]["positions"] = "learned"
    config["training"] |= {"micro_batch_size": 2, "activation_checkpointing": "full"}
    many = merged(config, run={"dir": str(tmp_path / "many")})
    done = launch(name, processes, many)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_equal_numbers(tmp_path / "many", run(config), FLOAT32)


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(config: Config, tmp_path: Path) -> None:
    compiled = merged(config, run={"dir": str(tmp_path / "compiled")}, training={"compile": True})
    assert_equal_numbers(run(compiled), run(config), FLOAT32)  # fused float32 sums, 12 steps


def test_evaluate_sees_what_the_trainer_saw_and_generate_begins_a_document(config: Config, call: Call) -> None:
    folder = run(config)
    code, out, err = call(evaluate, folder / "final", "--json")
    assert code == 0, err
    assert yaml.safe_load(out)["loss"] == pytest.approx(records(folder)[-1]["val_loss"], rel=1e-6)
    code, out, err = call(generate, folder, "--prompt", "The cat", "--max-new-tokens", 5, "--seed", 1)
    assert code == 0 and out.startswith("The cat"), err


def test_flops_are_no_more_than_are_done(config: Config) -> None:
    whole = merged(config, data={"document_mask": False, "packing": "windows"})
    with assembled(whole) as parts:
        of_windows = parts.flops_per_token()
    with assembled(config) as parts:
        counted, model = parts.flops_per_token(), parts.config.model
        rows, end = parts.train.gather(np.arange(len(parts.train))), parts.data.document_end(())
        padding = getattr(parts.train, "padding", None)
    lengths = np.array([ids.numel() for ids, _ in one_by_one(rows, end, padding)])
    looked_at = (lengths * (lengths + 1) / 2).sum() / lengths.sum()  # keys for a query
    of_one = 3 * 2 * model.layers * 2 * model.dim
    done = of_windows - of_one * ((64 + 1) / 2 - looked_at)
    assert done - of_one * looked_at < counted <= done < of_windows


REFUSED = [
    ({"packing": "best_fit", "stride": 32}, "data.stride 32 is for data.packing: windows"),
    ({"packing": "best_fit", "document_mask": False}, "data.document_mask is false, but data.packing: best_fit"),
    ({"packing": "worst_fit"}, "data.packing"),
    ({"document_mask": "maybe"}, "data.document_mask"),
]


@pytest.mark.parametrize(("section", "message"), REFUSED)
def test_contradictions_are_one_line(
    config_dict: Config, documents: Path, call: Call, tmp_path: Path, section: Config, message: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(merged(config_dict, data={"path": str(documents), **section})))
    code, _, err = call(train, "--config", file)
    assert code == 2 and is_one_clear_line(err) and message in err


@pytest.mark.parametrize("kind", KINDS)
def test_data_without_ends_is_one_line(
    config_dict: Config, data: Path, call: Call, tmp_path: Path, kind: Config
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(merged(config_dict, data=kind)))
    code, _, err = call(train, "--config", file)
    assert code == 2 and is_one_clear_line(err) and "do not end with id" in err
    np.arange(5000, dtype="<u2").tofile(tmp_path / "train.bin")
    arguments = ("--input", tmp_path / "train.bin", "--vocab-size", 5000, "--out", tmp_path / "ids")
    assert call(prepare, *arguments)[0] == 0
    code, _, err = call(train, "--config", file, f"data.path={tmp_path / 'ids'}")
    assert code == 2 and is_one_clear_line(err) and "knows no id that ends a document" in err


def test_another_packing_is_another_run(config_dict: Config, documents: Path, call: Call) -> None:
    training = {"max_steps": 5, "eval_every": None}
    config = merged(config_dict, data={"path": str(documents), "packing": "best_fit"}, training=training)
    folder = run(config, "checkpoint.save_every=5")
    assert load_config(folder / "config.yaml").data.document_mask
    code, _, err = call(train, "--config", folder / "config.yaml", "data.packing=windows", "training.max_steps=9")
    assert code == 2 and is_one_clear_line(err) and "data.packing=best_fit, this run has windows" in err


def test_windows_that_would_be_packed_otherwise_are_refused_and_another_mask_is_told(
    config_dict: Config, documents: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ids are the same, so the fingerprint of the data is; which documents are packed together is not."""
    training = {"max_steps": 5, "eval_every": None}
    config = merged(config_dict, data={"path": str(documents), "packing": "best_fit"}, training=training)
    folder = run(config, "checkpoint.save_every=5")
    with monkeypatch.context() as patch:
        patch.setattr("llmtrain.data.sources.GROUP", 7)
        code, _, err = call(train, "--config", folder / "config.yaml", "training.max_steps=9")
    *said, error = err.splitlines(keepends=True)
    assert len(said) == 1 and "packing 300 documents" in said[0]
    assert code == 2 and is_one_clear_line(error) and "its windows were packed otherwise than these would be" in error
    assert call(train, "--config", folder / "config.yaml", "training.max_steps=9")[0] == 0
    plain = merged(config, run={"dir": str(folder.with_name("plain"))}, data={"packing": "windows"})
    folder = run(plain, "checkpoint.save_every=5")
    code, out, _ = call(
        train, "--config", folder / "config.yaml", "training.max_steps=9", "data.document_mask=true"
    )  # fmt: skip
    assert code == 0 and "changed since then: data.document_mask: False → True" in out


def test_the_waste_is_told(config_dict: Config, documents: Path, call: Call, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(merged(config_dict, data={"path": str(documents), "packing": "best_fit"})))
    code, out, err = call(train, "--config", file, "--dry-run")
    assert code == 0, err
    with assembled(yaml.safe_load(file.read_text())) as parts:
        waste = 1 - parts.targets_of_a_window / 64
    assert 0 < waste < 0.1 and f"windows of 64, {waste:.1%} of them padding" in out


def test_sources_keep_their_documents_apart_and_are_not_packed_together(
    config_dict: Config, documents: Path, call: Call, tmp_path: Path
) -> None:
    config = merged(config_dict, training={"max_steps": 2}, logging={"every": 1})
    sources = [{"path": str(documents), "weight": 1.0, "name": name} for name in ("one", "two")]
    config["data"] = {"seq_len": 64, "sources": sources}
    losses = []
    for mask in (False, True):
        masked = merged(config, run={"dir": str(tmp_path / str(mask))}, data={"document_mask": mask})
        losses.append(records(run(masked))[0]["train_loss"])
    assert losses[0] != losses[1]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(merged(config, data={"packing": "best_fit"})))
    code, _, err = call(train, "--config", file)
    assert code == 2 and is_one_clear_line(err) and "best_fit is for one source" in err
