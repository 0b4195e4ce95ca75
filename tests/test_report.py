"""report: what it says of prepared data is true, on any kind of it, as a table and as JSON."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.data.shards import MANIFEST
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.prepare import main as prepare
from llmtrain.report import main
from tests.conftest import Call, Command, is_one_clear_line, write_data


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Forty documents, of which three are the same, and two hold what no terminal should be given."""
    lines = [f"Line {i} of many. " + "word " * (i % 7) + "\n" for i in range(37)]
    lines += ["the same once more\n"] * 3 + ["\x1b[31m[bold]red[/bold] 日本語 \t·\\ \ufeff\n"] * 2
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def facts_of(call: Call, *arguments: object) -> list[dict[str, Any]]:
    code, out, err = call(main, *arguments, "--json")
    assert (code, err) == (0, "")
    reports: list[dict[str, Any]] = json.loads(out)["data"]
    return reports


def ids_of(folder: Path, split: str = "train") -> np.ndarray:
    return np.concatenate([np.fromfile(path, "<u2") for path in sorted(folder.glob(f"{split}-*.bin"))])


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe", "bbpe"])
def test_every_number_is_that_of_the_ids(texts: Path, tmp_path: Path, call: Call, kind: str) -> None:
    out = tmp_path / "out"
    assert call(prepare, "--input", texts, "--tokenizer", kind, "--val-split", 0.2, "--out", out)[0] == 0
    (facts,) = facts_of(call, out, "--tokens", 10_000, "--samples", 4, "--window-tokens", 30)
    tokenizer = load_tokenizer(out / "tokenizer")
    every = []
    for split, told in facts["splits"].items():
        ids = ids_of(out, split)
        every.append(ids)
        lengths = np.diff(np.flatnonzero(ids == tokenizer.eos_id), prepend=-1)
        assert told["tokens"] == len(ids) and told["documents"] == len(lengths)
        assert told["bytes_per_token"] == pytest.approx(told["text_bytes"] / len(ids), abs=1e-4)
        spread = told["document_tokens"]
        assert (spread["min"], spread["max"]) == (lengths.min(), lengths.max())
        assert spread["percentiles"]["50"] == sorted(lengths)[(len(lengths) - 1) // 2]
        for step in spread["histogram"]:
            assert step["documents"] == sum(step["from"] <= length < step["below"] for length in lengths)
        assert sum(step["documents"] for step in spread["histogram"]) == len(lengths)
    counts = np.bincount(np.concatenate(every), minlength=tokenizer.vocab_size)
    use = facts["vocabulary"]
    assert (use["used"], use["never_used"]) == ((counts > 0).sum(), (counts == 0).sum())
    assert use["rare"] == ((counts > 0) & (counts < 10)).sum()
    assert (use["smallest_used"], use["largest_used"]) == tuple(np.flatnonzero(counts)[[0, -1]])
    assert {entry["id"]: entry["count"] for entry in use["special"]}[tokenizer.eos_id] == counts[tokenizer.eos_id]
    for listed in facts["tokens"].values():
        assert all(entry["count"] == counts[entry["id"]] for entry in listed)
        for entry in listed:
            assert bytes.fromhex(entry["hex"]) == tokenizer.token_bytes(entry["id"])
    assert len(facts["tokens"]["most_frequent"]) == use["used"]
    for sample in facts["samples"]:
        ids = ids_of(out, sample["split"])[sample["start"] :][: sample["tokens"]]
        text = "".join(tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ids == tokenizer.eos_id)))
        assert sample["text"].replace("⟨eos⟩", "").replace("⟨unk⟩", "\ufffd") == text
    assert [sample["split"] for sample in facts["samples"]] == ["train"] * 4 + ["val"] * 4


def test_copies_are_found_in_and_across_splits(tmp_path: Path, call: Call) -> None:
    lines = ["said twice\n", "said once\n", "said twice\n"] + [f"unlike others: {i}\n" for i in range(30)]
    whole = tmp_path / "texts.jsonl"
    whole.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    run = ["--input", whole, "--tokenizer", "byte", "--val-split"]
    assert call(prepare, *run, 0, "--out", tmp_path / "all")[0] == 0
    (facts,) = facts_of(call, tmp_path / "all")
    length = len("said twice\n") + 1
    assert facts["duplicates"]["splits"]["train"] == {
        "copies": 1, "tokens": length, "share": round(length / facts["splits"]["train"]["tokens"], 6),
        "most_repeated": [{"times": 2, "document": 0, "tokens": length, "text": "said twice\n⟨eos⟩"}],
    }  # fmt: skip
    assert facts["duplicates"]["also_in_train"] == {}
    # The first lines become a validation split that repeats what is trained on.
    assert call(prepare, *run, 0, "--dedup", "--out", tmp_path / "without")[0] == 0
    (facts,) = facts_of(call, tmp_path / "without")
    assert facts["duplicates"]["splits"]["train"]["copies"] == 0
    assert sum(facts["skipped"].values()) == 1
    _, out, _ = call(main, tmp_path / "without")
    assert "left out: 1 " in out and "train: 0 exact copies" in out


def test_validation_documents_that_are_trained_on_are_told(tmp_path: Path, call: Call) -> None:
    train, val = [5, 1, 2, 0] * 3 + [6, 0], [5, 1, 2, 0, 9, 0, 6, 0, 7]
    for name, ids in {"train": train, "val": val}.items():
        np.array(ids, "<u2").tofile(tmp_path / f"{name}.bin")
    out = tmp_path / "out"
    assert call(prepare, "--input", tmp_path, "--vocab-size", 10, "--eos-id", 0, "--out", out)[0] == 0
    (facts,) = facts_of(call, out)
    assert facts["duplicates"]["also_in_train"] == {"val": 2}
    assert facts["duplicates"]["splits"]["train"]["copies"] == 2


def test_the_screen_says_it_in_80_columns_and_commands_no_terminal(texts: Path, tmp_path: Path, call: Call) -> None:
    out = tmp_path / "out"
    assert call(prepare, "--input", texts, "--tokenizer", "bbpe", "--val-split", 0, "--out", out)[0] == 0
    code, screen, err = call(main, out, "--samples", 8, "--window-tokens", 2_000)
    assert (code, err) == (0, "")
    assert max(map(len, screen.splitlines())) <= 80
    assert "\x1b" not in screen and "\ufeff" not in screen
    for what in ("bbpe", "42", "train: 3 exact copies", "3 times, ", "the·same·once·more", "⟨eos⟩", "never occur"):
        assert what in screen, what
    assert "[bold]red[/bold]" in screen, "text is text, not rich's markup"


def test_token_files_in_place_have_numbers_for_texts_and_a_line_each(tmp_path: Path, call: Call) -> None:
    for name, seed in {"a.bin": 1, "b.bin": 2}.items():
        np.random.default_rng(seed).integers(1, 900, 5_000).astype("<u2").tofile(tmp_path / name)
    out = tmp_path / "out"
    inputs = ["--input", tmp_path / "a.bin", "--input", tmp_path / "b.bin"]
    assert call(prepare, *inputs, "--vocab-size", 1000, "--val-split", 0.1, "--out", out)[0] == 0
    (facts,) = facts_of(call, out)
    assert [(Path(file["file"]).name, file["split"], file["tokens"]) for file in facts["files_in_place"]] == [
        ("a.bin", "train", 4500), ("b.bin", "train", 4500), ("a.bin", "val", 500), ("b.bin", "val", 500),
    ]  # fmt: skip
    assert facts["tokens"]["longest"] == [] and facts["splits"]["train"]["bytes_per_token"] is None
    assert facts["vocabulary"]["never_used_without_text"] == 0
    first = facts["samples"][0]
    assert first["text"].startswith(f"<{np.fromfile(tmp_path / 'a.bin', '<u2')[first['start']]}>")
    code, screen, _ = call(main, out)
    assert code == 0 and "b.bin" in screen and re.search(r"<\d+><\d+>", screen)


def test_text_of_token_files_is_measured_by_their_tokens(tmp_path: Path, call: Call) -> None:
    text = "größer als zuvor 日本語\n" * 50
    np.array([*text.encode(), 257], "<u2").tofile(tmp_path / "train.bin")
    out = tmp_path / "out"
    arguments = ["--input", tmp_path / "train.bin", "--tokenizer", "byte", "--val-split", 0, "--out", out]
    assert call(prepare, *arguments)[0] == 0
    (facts,) = facts_of(call, out)
    assert facts["splits"]["train"]["text_bytes"] == len(text.encode())


@pytest.mark.parametrize("parts", [1, 3])
def test_what_comes_from_each_input_is_told(texts: Path, tmp_path: Path, call: Call, parts: int) -> None:
    (tmp_path / "many").mkdir()
    for number in range(30):
        (tmp_path / "many" / f"{number:02}.txt").write_text(f"file {number}\n" * number)
    (tmp_path / "one.txt").write_text("one file\n" * 9)
    inputs = [tmp_path / "many", texts, tmp_path / "one.txt"]
    run = [word for name in inputs for word in ("--input", name)]
    run += ["--tokenizer", "byte", "--val-split", 0.3, "--augment", "case", "--out", tmp_path / "out"]
    for number in range(1, parts + 1):
        assert call(prepare, *run, *([] if parts == 1 else ["--part", f"{number}/{parts}"]))[0] == 0
    (facts,) = facts_of(call, tmp_path / "out")
    told = facts["sources"]
    assert [(source["input"], source["split"]) for source in told] == [
        (str(name), split) for split in ("train", "val") for name in inputs
    ]
    marks = {str(inputs[0]): "file ", str(inputs[1]): "Line ", str(inputs[2]): "one file"}
    for split in ("train", "val"):
        ids = ids_of(tmp_path / "out", split)
        documents = np.split(ids, np.flatnonzero(ids == 257) + 1)[:-1]
        for source in told:
            if source["split"] != split:
                continue
            begin = sum(other["documents"] for other in told[: told.index(source)] if other["split"] == split)
            own = documents[begin : begin + source["documents"]]
            assert sum(map(len, own)) == source["tokens"]
            text = bytes(np.concatenate([np.empty(0, "<u2"), *own]).astype("<u2").clip(max=255).astype("u1")).decode(
                "latin1"
            )
            assert all(
                (mark.lower() in text.lower()) == (name == source["input"]) for name, mark in marks.items() if own
            )
        assert sum(source["tokens"] for source in told if source["split"] == split) == len(ids)
    _, screen, _ = call(main, tmp_path / "out")
    assert "from inputs" in screen


def test_several_sources_are_compared(tmp_path: Path, call: Call) -> None:
    small = write_data(tmp_path / "small", {"train": "ab" * 50})
    large = write_data(tmp_path / "large", {"train": "ab" * 450})
    assert [facts["splits"]["train"]["tokens"] for facts in facts_of(call, small, large)] == [100, 900]
    code, screen, _ = call(main, small, large)
    assert code == 0
    assert "2 sources" in screen and "10.0 %" in screen and "90.0 %" in screen


@pytest.mark.parametrize("splits", [{"train": "abc", "val": ""}, {"train": ""}])
def test_empty_splits_are_no_trouble(tmp_path: Path, call: Call, splits: dict[str, str]) -> None:
    folder = write_data(tmp_path / "data", splits)
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, text in splits.items():
        manifest["splits"][name]["documents"] = bool(text) * 1  # a document of nothing is none
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (facts,) = facts_of(call, folder)
    assert facts["splits"]["train"]["tokens"] == len(splits["train"])
    code, screen, err = call(main, folder)
    assert (code, err) == (0, "") and "vocabulary" in screen


def test_data_on_a_store_is_fetched(data: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "cache"))
    shutil.copytree(data, tmp_path / "store")
    code, out, _ = call(main, f"file://{tmp_path}/store", "--json")
    assert code == 0
    (facts,), (here,) = json.loads(out)["data"], facts_of(call, data)
    assert facts.pop("data") == f"file://{tmp_path}/store" and here.pop("data") == str(data)
    assert facts == here


def test_what_is_no_prepared_data_is_refused_in_one_line(tmp_path: Path, call: Call) -> None:
    code, _, err = call(main, tmp_path)
    assert code == 2 and is_one_clear_line(err) and "not prepared data" in err
    code, _, err = call(main, tmp_path, "--tokens", "-1")
    assert code == 2 and is_one_clear_line(err)


def test_damage_ends_it_in_one_line(data: Path, tmp_path: Path, call: Call) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    shard = copy / "train-00001.bin"
    content = bytearray(shard.read_bytes())
    content[5] = 0xFF
    shard.write_bytes(content)
    code, out, err = call(main, copy)
    assert (code, out) == (4, "") and is_one_clear_line(err) and "train-00001.bin: was changed" in err
    shard.write_bytes(content[:-2])
    code, out, err = call(main, copy)
    assert (code, out) == (4, "") and is_one_clear_line(err) and "truncated" in err


def test_the_command_prints_wide_tables_on_wide_terminals_and_json_to_pipes(data: Path, llmtrain: Command) -> None:
    wide = llmtrain("report", data, "--window-tokens", 300, env={"COLUMNS": "120"})
    assert wide.returncode == 0, wide.stderr
    assert 80 < max(map(len, wide.stdout.splitlines())) <= 120
    result = llmtrain("report", data, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["data"][0]["data"] == str(data)
