"""Batch delivery beside the libraries that others train from: tokens a second, first batch, resume, memory.

    python -m benchmarks.data [--peers-python PATH] [--tokens 100000000] [--batches 2000] [--rounds 7] [--out FILE]

PATH is the python of an environment with torch and any of megatron-core, litdata, mosaicml-streaming and datasets; what
cannot be run is left out, which the output says. Length 1024, batch 8, uint16 ids with documents of 500 on average.

Every contender is a process of its own that stays open, with the same loop around it (peer_drivers/delivery.py), one
thread, no workers, the file's pages warm. One after another delivers `--batches` batches, and again, in turns; the
order turns round each time. A peer is what its users write, with shuffling, as it delivers: int64 tensors in most, the
stored dtype in some, which the column `delivers` says. torch's DataLoader stands there a second time as fast as it can
be made: a dataset that reads and widens a whole batch in one call (`__getitems__`), and nothing to collate. A bare
gather copies rows and does nothing else; the second one widens them too, as is done here for a CPU. `llmtrain, as
stored` is what is copied to a GPU, which widens it there. Ours are compared with the fastest peer as it is written, and
with that second one; those deliver plain windows, neither mixed nor with the begins of documents.

First batch: from opening the data, imports done, to the first batch. Resume: the same to the batch of a step far away;
peers that cannot be told to begin there have none. Megatron has built its indices by then.

The order: from positions in 10^13 tokens to windows, many at once. Then sizes: sparse files of up to 10^13 ids, really
opened and read. Memory is what a process has beyond what it had after its imports: own pages, and page tables, but not
pages of files, which the kernel takes back when it wants them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks.common import ROOT, alternate, arguments_without_places, print_table, spread, write_result
from benchmarks.delivery import OURS
from benchmarks.peer_drivers.delivery import PEERS, Spec
from benchmarks.synthetic import write_random_data, write_virtual_data
from llmtrain.data.order import sample_ids

DRIVER = Path(__file__).parent / "peer_drivers" / "delivery.py"
FLOORS = ("bare numpy gather", "bare numpy gather, widened")
STRONGEST = "torch DataLoader, batch-wise"
NEEDS_NOTHING = (*FLOORS, "torch DataLoader", STRONGEST, "nanoGPT's way")
LENGTH, BATCH, DOCUMENT_TOKENS, END = 1024, 8, 500, 0
SIZES = (  # and of a shard; 2^34 is what docs/data.md advises
    (10**8, 1 << 36), (10**10, 1 << 36), (10**12, 1 << 36), (10**13, 1 << 36), (10**13, 1 << 34), (10**13, 1 << 31)
)  # fmt: skip
FAR = (10**6, 10**7)  # steps
ORDER_POSITIONS = 4096
MOST_BYTES = 4e9  # that a peer may be known to need at a size


class Delivery:
    """A contender's process."""

    def __init__(self, name: str, python: str, spec: Spec):
        self.name, folder = name, Path(spec["folder"])
        folder.mkdir(parents=True)
        file = folder.with_suffix(".json")
        file.write_text(json.dumps({**spec, "folder": str(folder / "data")}))
        own = name in OURS
        command = [sys.executable, "-m", "benchmarks.delivery"] if own else [python, str(DRIVER)]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- closed with the process
        self._process = subprocess.Popen(
            [*command, name, str(file)],
            cwd=ROOT if own else folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def ask(self, command: str, number: int = 0) -> Any:
        """Have it do something, and return its answer.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(f"{command} {number}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or ["nothing said"]
            raise RuntimeError(f"{self.name}: {command}: exit code {self._process.returncode}: {said[-1]}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments(argv)
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        folder = Path(name)
        rows, left_out = side_by_side(args, folder)
        print_table([_printed(row) for row in rows])
        for peer, why in left_out.items():
            print(f"{peer}: left out: {why}")
        goals = compare(rows)
        print("\n".join(f"{what}: {ratio:.2f}" for what, ratio in goals.items()))
        sizes = [row for tokens, shard in args.sizes for row in at_size(folder, tokens, shard, args)]
        if sizes:
            print_table([_printed(row) for row in sizes])
    order = order_us()
    print(f"order of 10^13 tokens: {order['median']:.2f} µs a position, {ORDER_POSITIONS:,} at once")
    facts = {"goals": goals, "order, µs a position": order, "left out": left_out}
    facts["arguments"] = arguments_without_places(args)
    write_result("data", [*rows, *sizes, facts], ["llmtrain", "torch", "numpy"], args.out)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.data", description=__doc__.splitlines()[0])
    parser.add_argument("--peers-python", help="the python of an environment with the other libraries")
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--batches", type=int, default=2000, help="of each turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--openings", type=int, default=9, help="of which the median is taken")
    parser.add_argument("--sizes", type=_size, nargs="*", default=SIZES, metavar="TOKENS:SHARD_TOKENS")
    parser.add_argument("--scratch", type=Path, help="folder for a gigabyte of data; default: that for temporary files")
    parser.add_argument("--out", type=Path, help="file of the result; default: benchmarks/results/data.json")
    args = parser.parse_args(argv)
    if args.peers_python and not (found := shutil.which(args.peers_python)):
        parser.error(f"--peers-python {args.peers_python}: cannot be run; give the python of an environment")
    # Not resolved: the python of an environment is a link, and known by where it stands.
    args.peers_python = args.peers_python and os.path.abspath(found)  # noqa: PTH100
    return args


def _size(text: str) -> tuple[int, int]:
    tokens, shard = map(int, text.split(":"))
    return tokens, shard


def side_by_side(args: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """One row for each contender that runs, and why others do not."""
    spec = _write(folder, args.tokens)
    with ExitStack() as at_the_end:
        running, left_out = _start(args, folder, spec, at_the_end)
        asks = {name: partial(each.ask, "turn", args.batches) for name, each in running.items()}
        turns = alternate(asks, args.rounds)
        rows = []
        for name, each in running.items():
            rates = [args.batches * BATCH * LENGTH / seconds / 1e6 for seconds in turns[name]]
            rows.append(
                {
                    "delivery": name,
                    "version": each.ask("version"),
                    "Mtokens/s": spread(rates),
                    "first ms": _opening(each, 0, args.openings),
                    "resume ms": _opening(each, FAR[0], args.openings),
                    "memory MB": each.ask("memory")["beyond imports"] / 1e6,
                    "delivers": each.delivers,
                }
            )
    return rows, left_out


def _write(folder: Path, tokens: int) -> Spec:
    """The same kind of ids in one folder, and in three with a third of them each."""
    size = {"vocab_size": 50_000, "document_tokens": DOCUMENT_TOKENS}
    prepared = write_random_data(folder / "prepared", tokens, shard_tokens=tokens, **size)
    sources = [write_random_data(folder / f"source{i}", tokens // 3, shard_tokens=tokens, **size) for i in range(3)]
    for path in (prepared, *sources):
        np.memmap(path / "train-00000.bin", np.uint16, "r").max()  # warm the pages
    return {
        "tokens_file": str(prepared / "train-00000.bin"), "tokens": tokens, "length": LENGTH, "batch": BATCH,
        "document_end": END, "prepared": str(prepared), "sources": [str(path) for path in sources],
    }  # fmt: skip


def _start(
    args: argparse.Namespace, folder: Path, spec: Spec, at_the_end: ExitStack
) -> tuple[dict[str, Delivery], dict[str, str]]:
    running, left_out = dict[str, Delivery](), dict[str, str]()
    for number, name in enumerate([*PEERS, *OURS]):
        if name in PEERS and name not in NEEDS_NOTHING and not args.peers_python:
            left_out[name] = "no --peers-python"
            continue
        python = sys.executable if name in NEEDS_NOTHING else args.peers_python
        process = at_the_end.enter_context(Delivery(name, python, {**spec, "folder": str(folder / f"own{number}")}))
        try:
            process.ask("make")
            process.delivers = process.ask("open")
            running[name] = process
        except RuntimeError as error:
            if name in OURS:
                raise
            left_out[name] = str(error)
    return running, left_out


def _opening(delivery: Delivery, step: int, times: int) -> dict[str, float] | None:
    found = [delivery.ask("first", step) for _ in range(times + 1)][1:]  # at the first Megatron builds its indices
    return None if None in found else spread(found)


def compare(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Ours beside the fastest peer as its users write it, and beside the strongest; then the floors beside ours.

    Ratios of medians.
    """
    rate = {row["delivery"]: row["Mtokens/s"]["median"] for row in rows}
    as_written = (name for name in rate if name not in (*OURS, *FLOORS, STRONGEST))
    peers = (max(as_written, key=rate.__getitem__), STRONGEST)
    own = {f"{name} / {peer}": rate[name] / rate[peer] for peer in peers for name in OURS}
    floors = {"llmtrain": FLOORS[1], "llmtrain, as stored": FLOORS[0]}  # that do the same as far as they go
    return own | {f"{floor} / {name}": rate[floor] / rate[name] for name, floor in floors.items()}


def at_size(folder: Path, tokens: int, shard: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Opening, resuming and memory over files without content, here and in torch's DataLoader where it can be."""
    with _virtual(folder / "virtual", tokens, shard) as spec:
        for number, name in enumerate(("llmtrain", "torch DataLoader")):
            if name in PEERS and PEERS[name].holds(spec) > MOST_BYTES:
                continue
            with Delivery(name, sys.executable, {**spec, "folder": str(folder / f"virtual{number}")}) as each:
                each.ask("open")
                seconds = each.ask("turn", args.batches)
                yield {
                    "delivery": name,
                    "tokens": f"{tokens:.0e}",
                    "files": -(-tokens // shard) if name in OURS else 1,
                    "first ms": _opening(each, 0, args.openings),
                    **{f"step {far:.0e} ms": _opening(each, far, args.openings) for far in FAR},
                    "batch µs": 1e6 * seconds / args.batches,
                    "memory MB": each.ask("memory")["beyond imports"] / 1e6,
                }
            shutil.rmtree(folder / f"virtual{number}")


@contextmanager
def _virtual(folder: Path, tokens: int, shard: int) -> Iterator[Spec]:
    prepared = write_virtual_data(folder / "prepared", tokens, shard)
    flat = folder / "flat.bin"
    with flat.open("wb") as file:
        file.truncate(min(2 * tokens, 1 << 43))
    yield {
        "tokens_file": str(flat), "tokens": tokens, "length": LENGTH, "batch": BATCH, "document_end": END,
        "prepared": str(prepared),
    }  # fmt: skip
    shutil.rmtree(folder)


def order_us() -> dict[str, float]:
    """From positions to windows, per position."""
    windows, found = 10**13 // LENGTH, []
    for turn in range(30):
        positions = np.arange(ORDER_POSITIONS, dtype=np.int64) + BATCH * FAR[1] + turn * ORDER_POSITIONS
        began = time.perf_counter()
        sample_ids(positions, windows, 1)
        found.append(1e6 * (time.perf_counter() - began) / ORDER_POSITIONS)
    return spread(found)


def _printed(row: Mapping[str, Any]) -> dict[str, Any]:
    def text(value: Any) -> Any:
        if isinstance(value, dict):
            return f"{value['median']:.1f} ({value['min']:.1f} to {value['max']:.1f})"
        return ", ".join(value) if isinstance(value, list) else value

    return {key: text(value) for key, value in row.items()}


if __name__ == "__main__":
    main()
