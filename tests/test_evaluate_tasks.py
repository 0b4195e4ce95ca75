"""evaluate --tasks: the real lm-evaluation-harness on tasks whose data is here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from llmtrain.checkpoint.load import TrainedModel, load_model
from llmtrain.evaluate import main
from llmtrain.export import main as export
from llmtrain.generate import main as generate
from llmtrain.harness.model import HarnessModel
from tests.conftest import Call, is_one_clear_line, prose
from tests.harness_task import QUESTIONS, write_tasks


@pytest.fixture
def trained(trained_run: Path) -> Iterator[TrainedModel]:
    with load_model(trained_run) as opened:
        yield opened


def ask(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def log_p(trained: TrainedModel, ids: list[int], first: int) -> tuple[float, bool]:
    """Of ids[first:], one by one, by the model alone; each after at most 64 before it."""
    nats, is_greedy = 0.0, True
    with trained.engine.evaluating() as model:
        for at in range(first, len(ids)):
            row = model(torch.tensor([ids[max(0, at - 64) : at]]))[0, -1].double().log_softmax(-1)
            nats, is_greedy = nats + row[ids[at]].item(), is_greedy and int(row.argmax()) == ids[at]
    return nats, is_greedy


def best_choices(trained: TrainedModel, row: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the right choice is the most likely one; and the most likely one for its length."""
    before = trained.tokenizer.encode(row["question"]).tolist()
    nats = [log_p(trained, before + trained.tokenizer.encode(c).tolist(), len(before))[0] for c in row["choices"]]
    by_length = [value / len(choice) for value, choice in zip(nats, row["choices"], strict=True)]
    return nats.index(max(nats)) == row["answer"], by_length.index(max(by_length)) == row["answer"]


def test_a_continuation_is_as_likely_as_the_model_says(trained: TrainedModel) -> None:
    """In one batch: short, long, empty before, and more before than the model sees; and what it would write itself."""
    model, encode = HarnessModel(trained, rows=4), trained.tokenizer.encode
    end = trained.tokenizer.eos_id
    long = prose(150)
    pairs = [("The cat", " sat on a mat"), ("", "The"), (long, " and then"), ("Then it ", "ran")]
    answers = model.loglikelihood([ask("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (before, after), (nats, is_greedy) in zip(pairs, answers, strict=True):
        ids = [*([end] if not before else []), *encode(before + after).tolist()]
        first = len(ids) - len(encode(after)) - (before[-1:] == " ")
        if before == long:  # the window is as long as for the last token, so that earlier ones have less before them
            ids = ids[-65:]
            first = 65 - len(after)
        expected, is_expected = log_p(trained, ids, first)
        assert nats == pytest.approx(expected, abs=1e-4) and is_greedy == is_expected
    text = model.generate_until([ask("generate_until", "The cat", {"until": [], "max_gen_toks": 5})])[0]
    assert model.loglikelihood([ask("loglikelihood", "The cat", text)], disable_tqdm=True)[0][1]


def test_a_whole_text_counts_each_token_once(trained: TrainedModel) -> None:
    model, text = HarnessModel(trained, rows=3), prose(150, seed=4)
    ids = [trained.tokenizer.eos_id, *trained.tokenizer.encode(text).tolist()]
    expected = log_p(trained, ids[:65], 1)[0] + log_p(trained, ids[64:129], 1)[0]
    rest = len(ids) - 129
    expected += log_p(trained, ids[-65:], 65 - rest)[0]
    found = model.loglikelihood_rolling([ask("loglikelihood_rolling", text), ask("loglikelihood_rolling", "")])
    assert found == [pytest.approx(expected, abs=1e-3), 0.0]


def test_what_it_writes_is_what_generate_writes(trained: TrainedModel, trained_run: Path, call: Call) -> None:
    asked = {"until": ["."], "max_gen_toks": 40, "do_sample": False, "temperature": 0.0}
    text = HarnessModel(trained, rows=2).generate_until([ask("generate_until", "The cat", asked)])[0]
    _, out, _ = call(generate, trained_run, "--prompt", "The cat", "--greedy", "--max-new-tokens", 40, "--stop", ".")
    assert out == f"The cat{text}\n" and text


def test_tasks_are_run_and_told(trained_run: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    tasks = write_tasks(tmp_path / "tasks")
    names = ",".join(map(str, tasks.values()))
    code, out, err = call(main, trained_run, "--tasks", names, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["step"] == 30 and set(result["tasks"]) == {"own_cats", "own_perplexity", "own_writing"}
    cats, whole = result["tasks"]["own_cats"], result["tasks"]["own_perplexity"]
    with load_model(trained_run) as opened:
        right, right_by_length = zip(*(best_choices(opened, row) for row in QUESTIONS), strict=True)
        texts = [row["question"] * 8 for row in QUESTIONS]
        nats = HarnessModel(opened, 4).loglikelihood_rolling([ask("loglikelihood_rolling", text) for text in texts])
    assert cats["samples"] == len(QUESTIONS) and sum(right) < sum(right_by_length)
    assert cats["acc"] == pytest.approx(sum(right) / len(QUESTIONS))
    assert cats["acc_norm"] == pytest.approx(sum(right_by_length) / len(QUESTIONS))
    bits = -sum(nats) / math.log(2) / sum(len(text.encode()) for text in texts)
    assert whole["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    code, out, _ = call(main, trained_run, "--tasks", tasks["cats"], "--limit", 2)
    assert code == 0 and f"own_cats  acc {sum(right[:2]) / 2:g} ± " in out and out.count(", 2 samples") == 2


def test_the_harness_gives_an_export_the_same_scores(
    trained_run: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    tasks, folder = write_tasks(tmp_path / "tasks"), tmp_path / "exported"
    assert call(export, trained_run, "--out", folder)[0] == 0
    _, out, _ = call(main, trained_run, "--tasks", f"{tasks['cats']},{tasks['perplexity']}", "--json")
    own = json.loads(out)["tasks"]
    theirs = simple_evaluate(
        model="hf", model_args=f"pretrained={folder},dtype=float32", tasks=list(own), device="cpu", batch_size=2,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )["results"]  # fmt: skip
    for name, metric in [("own_cats", "acc"), ("own_cats", "acc_norm"), ("own_perplexity", "bits_per_byte")]:
        assert theirs[name][f"{metric},none"] == pytest.approx(own[name][metric], rel=1e-5), metric


def test_what_cannot_be_run_is_one_clear_line(trained_run: Path, tmp_path: Path, call: Call) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    questions = tmp_path / "tasks" / "questions.jsonl"
    questions.write_text(questions.read_text().replace("The cat", "The qat"))
    code, _, err = call(main, trained_run, "--tasks", tasks["cats"])
    assert code == 2 and "llmtrain: error: the char tokenizer lacks the character 'q' (U+0071)" in err
    questions.unlink()
    for arguments, message in [
        (["--tasks", tasks["cats"]], "cannot be run"),
        (["--tasks", tmp_path / "none.yaml"], "none.yaml"),
        (["--tasks", "arc_easy", "--stride", "8"], "--stride is of data, and --tasks have their own"),
        (["--shots", "2"], "--shots is for --tasks"),
    ]:
        code, out, err = call(main, trained_run, *arguments)
        assert code == 2 and is_one_clear_line(err) and message in err and out == "", err


@pytest.mark.slow
def test_a_glob_is_all_tasks_that_it_means_each_once(
    trained_run: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their data is on a hub, so the harness is stopped where it would fetch them."""
    asked: list[str] = []

    def fetch(*_: Any, tasks: list[str], **__: Any) -> None:
        asked.extend(tasks)
        raise OSError("no hub here")

    monkeypatch.setattr("lm_eval.evaluator.simple_evaluate", fetch)
    code, _, err = call(main, trained_run, "--tasks", "arc_easy,arc_[ec]*y,arc_[ec]*e")
    assert code == 2 and "--tasks arc_easy,arc_[ec]*y,arc_[ec]*e: cannot be run: no hub here" in err
    assert asked[0] == "arc_easy" and "arc_challenge" in asked and len(asked) == len(set(asked))
    code, _, err = call(main, trained_run, "--tasks", "no_such_*")
    assert code == 2 and is_one_clear_line(err) and "--tasks no_such_*: lm-evaluation-harness has no such task" in err


@pytest.mark.slow
def test_a_task_that_there_is_not_is_one_clear_line(trained_run: Path, call: Call) -> None:
    """Slow, for the harness looks through its thirteen thousand files of tasks."""
    code, out, err = call(main, trained_run, "--tasks", "arc_easy,no_such_task")
    assert code == 2 and is_one_clear_line(err) and out == ""
    assert "--tasks no_such_task: lm-evaluation-harness has no such task" in err
