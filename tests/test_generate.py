"""generate: the text that the options promise, on the terminal as it is written, and one clear line for bad input."""

from __future__ import annotations

import codecs
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.checkpoint.load import load_model
from llmtrain.data.tokenizer import fit_tokenizer
from llmtrain.engine import Fragment
from llmtrain.generate import Writer, main
from tests.conftest import Call, Command, is_one_clear_line

COMMAND = [sys.executable, "-m", "llmtrain", "generate"]


@pytest.fixture
def samples(call: Call, trained_run: Path):
    """Generate as JSON; return the samples."""

    def run(*arguments: object) -> list[dict[str, Any]]:
        code, out, err = call(main, trained_run, "--json", "--max-new-tokens", 60, *arguments)
        assert (code, err) == (0, "")
        written: list[dict[str, Any]] = json.loads(out)["samples"]
        return written

    return run


def test_the_weights_are_those_of_the_checkpoint_bit_for_bit(trained_run: Path) -> None:
    with load_model(trained_run / "step-00000020") as trained, trained.engine.evaluating() as model:
        assert trained.reader.manifest.step == 20
        for name, parameter in model.named_parameters():
            saved = Fragment(f"model/{name}", tuple(parameter.shape), 0, torch.empty(parameter.numel()))
            assert not trained.reader.load([saved], ())
            assert torch.equal(saved.values.view(parameter.shape), parameter)


def test_a_run_folder_means_its_best_checkpoint(call: Call, trained_run: Path, tmp_path: Path) -> None:
    _, out, _ = call(main, trained_run, "--json", "--max-new-tokens", 1)
    assert json.loads(out)["checkpoint"] == str(trained_run / (trained_run / "best").readlink())
    shutil.copytree(trained_run, tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "best").unlink()
    _, out, _ = call(main, tmp_path / "run", "--json", "--max-new-tokens", 1)
    assert json.loads(out)["step"] == 30


def test_greedy_equals_argmax_over_the_whole_text(samples, trained_run: Path) -> None:
    [written] = samples("--greedy", "--prompt", "The ")
    with load_model(trained_run) as trained, trained.engine.evaluating() as model:
        ids = trained.tokenizer.encode("The ").tolist()
        for _ in range(60):
            ids.append(int(model(torch.tensor([ids]))[0, -1, : trained.tokenizer.vocab_size].argmax()))
        assert "The " + written["text"] == trained.tokenizer.decode(ids)
    assert (written["tokens"], written["ended"]) == (60, "length")
    assert samples("--temperature", 0, "--prompt", "The ")[0]["text"] == written["text"]
    assert samples("--top-k", 1, "--prompt", "The ")[0]["text"] == written["text"]


def test_the_same_seed_gives_the_same_text_and_no_seed_another_each_time(samples) -> None:
    texts = [samples("--seed", 3)[0]["text"] for _ in range(2)]
    assert texts[0] == texts[1]
    free = [samples()[0] for _ in range(3)]
    assert len({sample["text"] for sample in free}) == 3
    assert samples("--seed", free[0]["seed"])[0]["text"] == free[0]["text"]


def test_each_of_several_samples_comes_alone_by_its_seed(samples) -> None:
    together = samples("--num-samples", 35, "--seed", 9, "--temperature", 1.0)  # more than go side by side
    assert [sample["seed"] for sample in together] == list(range(9, 44))
    assert len({sample["text"] for sample in together}) == 35
    for index in (0, 1, 31, 32, 34):
        assert samples("--seed", 9 + index, "--temperature", 1.0) == [together[index]]


def test_text_goes_on_past_the_context(samples) -> None:
    [written] = samples("--prompt", "The cat sat on a mat and then it ran. " * 3, "--max-new-tokens", 200, "--seed", 1)
    assert written["tokens"] == 200 and len(written["text"]) == 200


def test_stop_strings_cut_exactly(samples) -> None:
    [free] = samples("--seed", 4)
    for stop in (free["text"][20:27], free["text"][30], free["text"][-1:]):
        [cut] = samples("--seed", 4, "--stop", stop, "--stop", "never written")
        assert cut["text"] == free["text"][: free["text"].index(stop)]
        assert cut["ended"] == "stop"


def test_the_end_of_a_document_ends_a_sample() -> None:
    tokenizer = fit_tokenizer("byte", [])
    writer = Writer(tokenizer, [tokenizer.eos_id], ["stop"], seed=7)
    pieces = [writer.add(token) for token in [*b"ends with st", tokenizer.eos_id]]
    assert writer.ended == "eos"
    assert "".join(pieces) == writer.sample().text == "ends with st"  # the start of a stop string was no stop string
    assert writer.sample().tokens == len("ends with st")


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    tokenizer = fit_tokenizer("byte", [])
    writer = Writer(tokenizer, [], [], seed=7)
    pieces = [writer.add(token) for token in "né".encode()[:-1]]
    assert [*pieces, writer.out_of_length()] == ["n", "", "\N{REPLACEMENT CHARACTER}"]


def test_the_terminal_shows_prompt_and_text(call: Call, samples, trained_run: Path) -> None:
    [written] = samples("--prompt", "The cat", "--seed", 2)
    code, out, err = call(main, trained_run, "--prompt", "The cat", "--seed", 2, "--max-new-tokens", 60)
    assert (code, out, err) == (0, f"The cat{written['text']}\n", "")
    _, out, _ = call(main, trained_run, "--prompt", "T", "--seed", 2, "--max-new-tokens", 5, "--num-samples", 2)
    assert out.splitlines()[0] == "--- sample 1 of 2, seed 2"
    assert out.count("\nT") == 2


@pytest.mark.slow
def test_text_streams_while_it_is_written_and_a_closed_pipe_ends_it_quietly(trained_run: Path) -> None:
    command = [*COMMAND, str(trained_run), "--max-new-tokens", "100000000", "--seed", "1", "--prompt", "The"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(300).startswith(b"The")
    assert process.poll() is None
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


class Terminal:
    """A real pseudo-terminal with the interactive prompt on it."""

    def __init__(self, *arguments: object):
        self._end, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments), "--interactive"],
            stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
            preexec_fn=_take_terminal,  # noqa: PLW1509 -- Ctrl-C is a signal only on a controlling terminal
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a character may come in two reads

    def until(self, text: str, timeout_s: float = 60) -> str:
        """Read until `text` has appeared; return what came before it."""
        deadline = time.monotonic() + timeout_s
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self._end], [], [], 0.1)[0]:
                self.seen += self._decoder.decode(os.read(self._end, 4096))
                self.seen = self.seen.replace("\r\n", "\n")
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def ended(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            os.close(self._end)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.slow
def test_the_interactive_prompt_answers_keeps_the_session_and_ends(call: Call, trained_run: Path) -> None:
    """In a real terminal: an answer, a prompt it cannot spell, an answer cut short by Ctrl-C, and the end."""
    terminal = Terminal(trained_run, "--seed", 2, "--max-new-tokens", 60)
    terminal.until("> ")
    terminal.type("The cat\n")
    assert terminal.until("\n") == "The cat"  # the echo of the keys
    _, expected, _ = call(main, trained_run, "--seed", 2, "--max-new-tokens", 60, "--prompt", "The cat")
    assert terminal.until("\n> ") + "\n" == expected
    terminal.type("Straße\n")
    assert "lacks the character 'ß'" in terminal.until("\n> ")
    terminal.type("The cat\n")
    terminal.until("The cat\n")
    assert terminal.until("\n> ") + "\n" == expected
    terminal.type("\x04")
    assert terminal.ended() == 0

    endless = Terminal(trained_run, "--max-new-tokens", 100_000_000)
    endless.until("> ")
    endless.type("The\n")
    endless.until("The\nThe")
    endless.type("\x03")
    endless.until("\n> ")
    endless.type("/quit\n")
    assert endless.ended() == 0


BAD = {
    "temperature": (["--temperature", "-1"], "--temperature: must be 0 (greedy) or more"),
    "no number": (["--temperature", "warm"], "--temperature: must be a number, not 'warm'"),
    "infinite": (["--temperature", "inf"], "must be a number"),
    "top-p 0": (["--top-p", "0"], "--top-p: must be over 0 and at most 1"),
    "top-p over 1": (["--top-p", "1.5"], "must be over 0 and at most 1"),
    "top-k": (["--top-k", "0"], "--top-k: must be a whole number of at least 1"),
    "length": (["--max-new-tokens", "0"], "--max-new-tokens: must be a whole number of at least 1"),
    "samples": (["--num-samples", "-3"], "--num-samples: must be a whole number of at least 1"),
    "seed": (["--seed", "-1"], "--seed: must be a whole number from 0"),
    "stop": (["--stop", ""], "--stop: an empty text"),
    "flag": (["--temprature", "1"], "unrecognized arguments: --temprature"),
    "both": (["--interactive", "--json"], "leave --prompt and --json out"),
    "prompt": (["--prompt", "Straße"], "lacks the character 'ß' (U+00DF) at position 4"),
    "prompt of bytes": (["--prompt", "\udcff"], "lacks the character U+DCFF"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_line(name: str, call: Call, trained_run: Path) -> None:
    arguments, message = BAD[name]
    code, out, err = call(main, trained_run, *arguments)
    assert code == 2 and is_one_clear_line(err) and message in err
    assert out == ""


def test_a_path_without_a_checkpoint_gets_one_clear_line(call: Call, tmp_path: Path, trained_run: Path) -> None:
    for path, message in [(tmp_path / "none", "no such folder"), (tmp_path, "no finished checkpoint")]:
        code, _, err = call(main, path)
        assert code == 2 and is_one_clear_line(err) and message in err
    code, _, err = call(main)
    assert code == 2 and is_one_clear_line(err) and "PATH" in err


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_and_good_ones_are_named(llmtrain: Command, trained_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run, symlinks=True)
    weights = run / (run / "best").readlink() / "rank00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = llmtrain("generate", run)
    assert result.returncode == 4 and is_one_clear_line(result.stderr)
    assert str(weights) in result.stderr and "differs from the hash" in result.stderr
    assert str(run / "step-00000010") in result.stderr and result.stdout == ""
    assert llmtrain("generate", run / "step-00000010", "--max-new-tokens", 3).returncode == 0
