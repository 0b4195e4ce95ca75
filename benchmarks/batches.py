"""Batch delivery: tokens per second in one process, and the time to the first batch.

    python -m benchmarks.batches [--tokens 100000000]

Side by side at length 1024 and batch 8, warm pages: a bare numpy gather (a floor: no widening to int64, no range
check), llmtrain (int64 tensors, range-checked), torch's DataLoader over a memmap, and nanoGPT's way (random offsets).
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import alternate, print_table, spread, write_result
from benchmarks.synthetic import write_random_data
from llmtrain.data.batches import Layout, Windows, batches, inputs_and_targets, plain_order
from llmtrain.data.shards import TokenDataset

LENGTH, BATCH = 1024, 8
CPU = torch.device("cpu")


class MapDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """What a user of torch writes: one window for each index."""

    def __init__(self, path: Path):
        self.ids = np.memmap(path, dtype=np.uint16, mode="r")

    def __len__(self) -> int:
        return (len(self.ids) - 1) // LENGTH

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = torch.from_numpy(self.ids[index * LENGTH : index * LENGTH + LENGTH + 1].astype(np.int64))
        return row[:-1], row[1:]


def bare_gather(path: Path) -> Iterator[object]:
    ids = np.memmap(path, dtype=np.uint16, mode="r")
    plain = np.asarray(ids)
    order = np.random.default_rng(1).permutation((len(plain) - 1) // LENGTH) * LENGTH
    buffer = np.empty((BATCH, LENGTH + 1), np.uint16)
    while True:
        for begin in range(0, len(order) - BATCH, BATCH):
            for row, start in zip(buffer, order[begin : begin + BATCH].tolist(), strict=True):
                row[:] = plain[start : start + LENGTH + 1]
            yield buffer


def ours(folder: Path) -> Iterator[object]:
    windows = Windows(TokenDataset(folder).split("train"), LENGTH, LENGTH)
    for batch in batches(windows, Layout(len(windows), BATCH, BATCH), plain_order(len(windows), 1), position=0):
        for tokens, _ in batch.micro_batches():
            yield inputs_and_targets(tokens, BATCH, CPU)


def torch_loader(path: Path) -> Iterator[object]:
    while True:
        yield from DataLoader(MapDataset(path), batch_size=BATCH, shuffle=True)


def nanogpt_way(path: Path) -> Iterator[object]:
    while True:
        ids = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(ids) - LENGTH, (BATCH,))
        x = torch.stack([torch.from_numpy(ids[i : i + LENGTH].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(ids[i + 1 : i + 1 + LENGTH].astype(np.int64)) for i in starts])
        yield x, y


def first_batch_ms(folder: Path) -> float:
    began = time.perf_counter()
    next(ours(folder))  # type: ignore[call-overload]
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--count", type=int, default=3000, help="batches of each turn")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = write_random_data(Path(name) / "data", args.tokens, 50_000)
        shard = folder / "train-00000.bin"
        np.memmap(shard, dtype=np.uint16, mode="r").max()  # warm the pages
        streams = {
            "bare numpy gather": bare_gather(shard),
            "llmtrain": ours(folder),
            "torch DataLoader": torch_loader(shard),
            "nanoGPT's way": nanogpt_way(shard),
        }

        def turn(stream: Iterator[object]) -> float:
            began = time.perf_counter()
            for _ in itertools.islice(stream, args.count):
                pass
            return args.count * BATCH * LENGTH / (time.perf_counter() - began) / 1e6

        measures = alternate({k: lambda s=s: turn(s) for k, s in streams.items()}, args.rounds)  # type: ignore[misc]
        first = spread([first_batch_ms(folder) for _ in range(20)])
    rows = [{"delivery": k, **{f"Mtokens/s {q}": x for q, x in spread(v).items()}} for k, v in measures.items()]
    print_table(rows)
    print(f"first batch after opening the data, ms: {first}")
    write_result("batches", [*rows, {"first batch ms": first, "arguments": vars(args)}], ["llmtrain", "torch", "numpy"])


if __name__ == "__main__":
    main()
