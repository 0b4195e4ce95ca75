"""How long to the validation loss of nanoGPT's published CPU recipe: same text, at most its size, whole processes.

    python -m benchmarks.learning --text book.txt --nanogpt DIR [--repeats 3] [--out FILE]

nanoGPT runs by its own code from DIR with the flags of its README for a CPU: 0.8M parameters, length 64, batch 12,
2,000 steps, characters. llmtrain runs `configs/char.yaml` as shipped. Both split the text 90 : 10 at the same place, so
the validation characters are the same; nanoGPT estimates its loss over 200 random batches, llmtrain counts all of
them at the end. Wall time is that of the whole process, from its start to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import print_table, spread, write_result

ROOT = Path(__file__).parents[1]
NANOGPT_FLAGS = [
    "--device=cpu", "--compile=False", "--eval_iters=200", "--eval_interval=2000", "--log_interval=100",
    "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000",
    "--lr_decay_iters=2000", "--dropout=0.0", "--always_save_checkpoint=False",
]  # fmt: skip


def nanogpt(peer: Path, text: str, folder: Path, seed: int) -> tuple[float, float]:
    """Train nanoGPT in its own process; return (validation loss, seconds)."""
    data = peer / "data" / "shakespeare_char"  # where its config looks; written as its prepare.py would
    vocabulary = sorted(set(text))
    index = {character: i for i, character in enumerate(vocabulary)}
    ids = np.array([index[character] for character in text], dtype=np.uint16)
    cut = int(0.9 * len(text))
    ids[:cut].tofile(data / "train.bin")
    ids[cut:].tofile(data / "val.bin")
    meta = {"vocab_size": len(vocabulary), "itos": dict(enumerate(vocabulary)), "stoi": index}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *NANOGPT_FLAGS, f"--out_dir={folder}"]
    began = time.perf_counter()
    result = subprocess.run(command, cwd=peer, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    losses = re.findall(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)", result.stdout)
    assert losses[-1][0] == "2000", result.stdout[-500:]
    return float(losses[-1][1]), seconds


def llmtrain(text_file: Path, folder: Path, seed: int, overrides: list[str]) -> tuple[float, float]:
    """Prepare and train by the commands a user types; return (validation loss over all windows, seconds to train)."""
    module = [sys.executable, "-m", "llmtrain"]
    data = folder / "data"
    prepare = ["prepare", "--input", text_file, "--tokenizer", "char", "--val-split", "0.1", "--val-by", "tail"]
    subprocess.run([*module, *prepare, "--out", data], check=True, capture_output=True)
    settings = [f"data.path={data}", f"run.dir={folder / 'run'}", f"run.seed={seed}", *overrides]
    began = time.perf_counter()
    config = ROOT / "configs/char.yaml"
    subprocess.run([*module, "train", "--config", config, *settings], check=True, capture_output=True)
    seconds = time.perf_counter() - began
    evaluated = subprocess.run(
        [*module, "evaluate", folder / "run", "--json"], check=True, capture_output=True, text=True
    )
    return json.loads(evaluated.stdout)["loss"], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="about 1 MB of prose")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT; left out, only llmtrain runs")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file of the result; default: benchmarks/results/learning-char.json")
    parser.add_argument("overrides", nargs="*", help="section.key=value for llmtrain")
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    measures: dict[str, list[tuple[float, float]]] = {}
    for repeat in range(args.repeats):
        with tempfile.TemporaryDirectory() as name:
            if args.nanogpt:
                measures.setdefault("nanoGPT", []).append(nanogpt(args.nanogpt, text, Path(name) / "nano", repeat))
            (Path(name) / "ours").mkdir()
            ours = llmtrain(args.text, Path(name) / "ours", 1337 + repeat, args.overrides)
            measures.setdefault("llmtrain", []).append(ours)
    rows: list[dict[str, Any]] = []
    for trainer, values in measures.items():
        losses, seconds = spread([v[0] for v in values]), spread([v[1] for v in values])
        rows.append({"trainer": trainer, "val_loss": f"{losses['median']:.4f}", "loss": losses, "seconds": seconds})
    print_table(rows)
    about = {"text": args.text.name, "characters": len(text), "overrides": args.overrides, "threads": os.cpu_count()}
    print(write_result("learning-char", [*rows, about], ["llmtrain", "torch"], args.out))


if __name__ == "__main__":
    main()
