"""How long a resume takes from launch to its first step, and how much of that is reading the checkpoint.

    python -m benchmarks.resume [--preset 350m] [--rounds 3] [--folder DIR]

One process (float32, AdamW, one sequence of 128 a step) trains a step and saves. Then it is launched again and again,
in turns: into an empty folder, and to go on from the checkpoint, whose files are taken out of the page cache of this
machine before (a virtual disk may have another cache behind it). A launch is killed as soon as its first step is on
record, so that it saves nothing.

- `fresh s`, `resume s`: from launch to the time stamp of the record of the first step.
- `read s`: what the resumed launch says of reading and checking (SHA-256 of every byte).
- `reading / what a resume adds`: `read s` over `resume s` less `fresh s`; 1: a resume costs its reading and no more.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.checkpoint import drop_from_cache, files
from benchmarks.common import alternate, print_table, spread, write_result
from benchmarks.synthetic import write_random_data

TOLD = re.compile(r"read and checked ([\d,.]+) MB in ([\d.]+) s")


class Bench:
    """One config, by which runs are launched."""

    def __init__(self, folder: Path, preset: str):
        self.folder, self._config = folder, folder / "config.json"
        data = write_random_data(folder / "data", tokens=100_000, vocab_size=50_304)
        config = {
            "data": {"path": str(data), "seq_len": 128},
            "model": {"preset": preset},
            "training": {
                "max_steps": 1000, "precision": "fp32", "compile": False, "eval_every": None, "micro_batch_size": 1,
                "global_batch_size": 1,
            },
            "checkpoint": {"save_every": None},
            "logging": {"every": 1, "plots": False},
        }  # fmt: skip
        self._config.write_text(json.dumps(config))
        self._runs = iter(range(10**6))
        self.saved = folder / "saved"
        done = subprocess.run(self._command(self.saved, "training.stop_after=1"), check=False, capture_output=True)
        if done.returncode != 75:
            raise RuntimeError(f"the run that saves ended with {done.returncode}: {done.stderr.decode()[-2000:]}")
        self.megabytes = 0.0

    def _command(self, run_dir: Path, *settings: str) -> list[str]:
        return [
            sys.executable, "-m", "llmtrain", "train", "--config", str(self._config), f"run.dir={run_dir}", *settings,
        ]  # fmt: skip

    def fresh(self) -> dict[str, float]:
        return {"fresh s": self._first_step(self.folder / f"fresh-{next(self._runs)}", 1)[0]}

    def resume(self) -> dict[str, float]:
        for path in files(self.saved):
            drop_from_cache(path)
        seconds, said = self._first_step(self.saved, 2)
        told = TOLD.search(said)
        if told is None:
            raise RuntimeError(f"the launch did not go on from a checkpoint: {said[-2000:]}")
        self.megabytes = float(told[1].replace(",", ""))
        return {"resume s": seconds, "read s": float(told[2])}

    def _first_step(self, run_dir: Path, step: int) -> tuple[float, str]:
        """Seconds from launch to the record of `step`, which is this launch's first; and what it said."""
        log = self.folder / "log"
        with log.open("w") as out:
            began = time.time()
            process = subprocess.Popen(self._command(run_dir), stdout=out, stderr=out)
            try:
                while (record := self._record(run_dir, step)) is None or record < began:
                    if process.poll() is not None:
                        raise RuntimeError(f"a launch ended with {process.returncode}: {log.read_text()[-2000:]}")
                    time.sleep(0.05)
            finally:
                process.kill()
                process.wait()
        return record - began, log.read_text()

    @staticmethod
    def _record(run_dir: Path, step: int) -> float | None:
        """When a step was recorded."""
        path = run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        return next((record["time"] for record in whole if record["step"] == step), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="350m")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each that count, after one that does not")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")
    parser.add_argument("--out", type=Path, help="file of the result; default: benchmarks/results/resume.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        bench = Bench(Path(name), args.preset)
        turns = alternate({"fresh": bench.fresh, "resume": bench.resume}, args.rounds)
    values = {key: [turn[key] for turn in turns[key.split()[0]]] for key in ("fresh s", "resume s")}
    values["read s"] = [turn["read s"] for turn in turns["resume"]]
    rows = [{"what": key, **spread(taken)} for key, taken in values.items()]
    median = {key: statistics.median(taken) for key, taken in values.items()}
    facts = {
        "preset": args.preset,
        "checkpoint MB": bench.megabytes,
        "reading / what a resume adds": median["read s"] / (median["resume s"] - median["fresh s"]),
        "reading / resume": median["read s"] / median["resume s"],
    }
    print_table(rows)
    for key, value in facts.items():
        print(f"{key}: {value:.2f}" if isinstance(value, float) else f"{key}: {value}")
    write_result("resume", [*rows, facts], ["llmtrain", "torch", "accelerate"], args.out)


if __name__ == "__main__":
    main()
