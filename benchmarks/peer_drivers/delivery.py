"""Batch delivery of one library in one process, for `benchmarks.data`: `python delivery.py NAME SPEC.json`.

Told on standard input what to do, a line each, it answers in a line of JSON. What is measured is the same for all: a
batch is taken when `next` returns it. The tokens lie as uint16 in one file; a library that wants another format gets
one made by its own writer (`make`), outside all measures.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Spec = dict[str, Any]  # tokens_file, tokens, length, batch, folder (its own), document_end, prepared, sources


@dataclass(frozen=True)
class Contender:
    """A way of delivering: opens the data and yields batches from a step on, endlessly or nearly so."""

    open_at: Callable[[Spec, int], Iterator[Any]]
    make: Callable[[Spec], None] | None = None  # its own format
    distribution: str | None = None
    resumes: bool = False  # opens at any step; else only at 0
    holds: Callable[[Spec], float] = lambda _: 0.0  # bytes of memory it is known to need


def serve(contenders: Mapping[str, Contender]) -> None:
    """Answer what is asked until nothing more is."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints
    contender, spec = contenders[sys.argv[1]], json.loads(Path(sys.argv[2]).read_text())
    import torch

    torch.set_num_threads(1)
    stream: Iterator[Any] = iter(())
    held = 0
    for line in sys.stdin:
        command, number = line.split()
        answer: Any = None
        if command == "make" and contender.make:
            contender.make(spec)
        elif command == "open":
            for _ in range(2):  # the first time it may still import
                next(contender.open_at(spec, 0))
            held = own_bytes()
            stream = contender.open_at(spec, 0)
            answer = describe(next(stream))
        elif command == "turn":
            began = time.perf_counter()
            for _ in itertools.islice(stream, int(number)):
                pass
            answer = time.perf_counter() - began
        elif command == "first" and (not int(number) or contender.resumes):
            began = time.perf_counter()
            other = contender.open_at(spec, int(number))
            next(other)
            answer = 1e3 * (time.perf_counter() - began)
            del other
        elif command == "memory":
            answer = {"beyond imports": own_bytes() - held, **memory()}
        elif command == "version" and contender.distribution:
            answer = importlib.metadata.version(contender.distribution)
        print(json.dumps(answer), file=answers, flush=True)


def memory() -> dict[str, int]:
    """Bytes of this process: its own pages, page tables. Pages of files, which the kernel takes back, do not count."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = {line[0].rstrip(":"): line[1] for line in lines if len(line) == 3}
    return {"own pages": 1024 * int(kilobytes["RssAnon"]), "page tables": 1024 * int(kilobytes["VmPTE"])}


def own_bytes() -> int:
    return sum(memory().values())


def describe(batch: Any) -> list[str]:
    """Shape and dtype of every array in a batch."""
    if isinstance(batch, Mapping):
        batch = [batch[key] for key in sorted(batch)]
    if hasattr(batch, "shape"):
        return [f"{batch.dtype} {tuple(batch.shape)}".removeprefix("torch.")]
    return [text for part in batch for text in describe(part)]


def samples(spec: Spec) -> int:
    return (int(spec["tokens"]) - 1) // int(spec["length"])


def token_file(spec: Spec) -> np.memmap[Any, Any]:
    return np.memmap(spec["tokens_file"], np.uint16, "r", shape=(spec["tokens"],))


def bare_gather(spec: Spec, step: int) -> Iterator[Any]:
    """The floor: rows of a plain array copied into one buffer, in an order that is there already; never widened."""
    length, size = spec["length"], spec["batch"]
    plain = np.asarray(token_file(spec))
    order = np.random.default_rng(1).permutation(samples(spec)) * length
    buffer = np.empty((size, length + 1), np.uint16)
    while True:
        for begin in range(0, len(order) - size, size):
            for row, start in zip(buffer, order[begin : begin + size].tolist(), strict=True):
                row[:] = plain[start : start + length + 1]
            yield buffer


def bare_gather_widened(spec: Spec, step: int) -> Iterator[Any]:
    """The same, as two int64 tensors in fresh memory, which is what a model on a CPU takes."""
    import torch

    for buffer in bare_gather(spec, step):
        wide = torch.from_numpy(buffer).long()
        yield wide[:, :-1], wide[:, 1:]


def torch_loader(spec: Spec, step: int) -> Iterator[Any]:
    """What a user of torch writes: a map-style dataset over a memmap, shuffled by the DataLoader."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    length = spec["length"]

    class Windows(Dataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            self.ids = token_file(spec)

        def __len__(self) -> int:
            return samples(spec)

        def __getitem__(self, index: int) -> tuple[Any, Any]:
            row = torch.from_numpy(self.ids[index * length : index * length + length + 1].astype(np.int64))
            return row[:-1], row[1:]

    loader = DataLoader(Windows(), batch_size=spec["batch"], shuffle=True)
    while True:
        yield from loader


def torch_loader_of_batches(spec: Spec, step: int) -> Iterator[Any]:
    """The strongest form of the same: one call to the dataset reads and widens a whole batch; nothing is collated."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    length = spec["length"]

    class Windows(Dataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            ids = np.asarray(token_file(spec))
            self.rows = np.lib.stride_tricks.sliding_window_view(ids, length + 1)[::length]

        def __len__(self) -> int:
            return len(self.rows)

        def __getitems__(self, indices: list[int]) -> tuple[Any, Any]:
            rows = torch.from_numpy(self.rows[indices].astype(np.int64))
            return rows[:, :-1], rows[:, 1:]

    loader = DataLoader(Windows(), batch_size=spec["batch"], shuffle=True, collate_fn=lambda batch: batch)
    while True:
        yield from loader


def nanogpt_way(spec: Spec, step: int) -> Iterator[Any]:
    """`get_batch` of nanoGPT's train.py: random offsets, the memmap made anew for each batch against a leak."""
    import torch

    length = spec["length"]
    while True:
        data = np.memmap(spec["tokens_file"], dtype=np.uint16, mode="r")
        ix = torch.randint(len(data) - length, (spec["batch"],))
        x = torch.stack([torch.from_numpy(data[i : i + length].astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + length].astype(np.int64)) for i in ix])
        yield x, y


def rows_of(spec: Spec) -> Iterator[Any]:
    ids, length = token_file(spec), spec["length"]
    for index in range(samples(spec)):
        yield np.array(ids[index * length : index * length + length + 1])


def make_datasets(spec: Spec) -> None:
    import pyarrow as pa
    from datasets import Dataset

    ids, length = token_file(spec), spec["length"]
    count = samples(spec)
    rows = np.lib.stride_tricks.sliding_window_view(ids, length + 1)[::length][:count]
    flat = pa.array(np.ascontiguousarray(rows).reshape(-1))
    offsets = pa.array(np.arange(0, (count + 1) * (length + 1), length + 1, dtype=np.int32))
    Dataset(pa.table({"input_ids": pa.ListArray.from_arrays(offsets, flat)})).save_to_disk(spec["folder"])


def datasets_loader(spec: Spec, step: int) -> Iterator[Any]:
    from datasets import load_from_disk
    from torch.utils.data import DataLoader

    rows = load_from_disk(spec["folder"]).with_format("torch")
    loader = DataLoader(rows, batch_size=spec["batch"], shuffle=True)
    while True:
        yield from loader


def make_litdata(spec: Spec) -> None:
    import torch
    from litdata import TokensLoader
    from litdata.streaming.cache import Cache

    cache = Cache(spec["folder"], chunk_bytes="64MB", item_loader=TokensLoader(block_size=spec["length"] + 1))
    ids = token_file(spec)
    for number, begin in enumerate(range(0, len(ids), 1 << 20)):
        cache[number] = torch.from_numpy(ids[begin : begin + (1 << 20)].astype(np.uint16))
    cache.done()
    cache.merge()


def litdata_loader(spec: Spec, step: int) -> Iterator[Any]:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    size, length = spec["batch"], spec["length"]
    rows = StreamingDataset(
        spec["folder"], item_loader=TokensLoader(block_size=length + 1), shuffle=True, drop_last=True
    )
    loader = StreamingDataLoader(rows, batch_size=size, num_workers=0)
    while True:
        yield from loader


def make_streaming(spec: Spec) -> None:
    from streaming import MDSWriter

    shutil.rmtree(spec["folder"], ignore_errors=True)
    with MDSWriter(out=spec["folder"], columns={"tokens": f"ndarray:uint16:{spec['length'] + 1}"}) as writer:
        for row in rows_of(spec):
            writer.write({"tokens": row})


def streaming_loader(spec: Spec, step: int) -> Iterator[Any]:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    rows = StreamingDataset(local=spec["folder"], shuffle=True, batch_size=spec["batch"])
    if step:
        epoch, begun = divmod(step, samples(spec) // spec["batch"])
        rows.load_state_dict(
            {"epoch": epoch, "sample_in_epoch": begun * spec["batch"], "num_canonical_nodes": 1, "shuffle_seed": 9176,
             "initial_physical_nodes": 1}
        )  # fmt: skip
    loader = DataLoader(rows, batch_size=spec["batch"])
    while True:
        yield from loader


def make_megatron(spec: Spec) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder = Path(spec["folder"])
    folder.mkdir(exist_ok=True)
    builder = IndexedDatasetBuilder(str(folder / "tokens.bin"), dtype=np.uint16)
    ids = np.asarray(token_file(spec))
    ends = np.append(np.flatnonzero(ids == spec["document_end"]) + 1, len(ids))
    begin = 0
    for end in ends.tolist():
        if end > begin:
            builder.add_document(torch.from_numpy(ids[begin:end].astype(np.int32)), [end - begin])
        begin = end
    builder.finalize(str(folder / "tokens.idx"))


def megatron_loader(spec: Spec, step: int, documents: bool = False) -> Iterator[Any]:
    """A GPTDataset, its three indices cached beside it by an earlier opening, behind the sampler that Megatron has."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split
    from torch.utils.data import DataLoader

    class Tokenizer:
        eod = spec["document_end"]
        pad = eod
        vocab_size = 1 << 16
        unique_identifiers: dict[str, str] = {}  # noqa: RUF012

    prefix, size = f"{spec['folder']}/tokens", spec["batch"]
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=spec["length"], blend=([prefix], None), split="1,0,0",
        path_to_cache=f"{spec['folder']}/cache", reset_position_ids=documents, reset_attention_mask=documents,
        eod_mask_loss=documents, create_attention_mask=documents, tokenizer=Tokenizer(),
    )  # fmt: skip
    indexed = IndexedDataset(prefix, mmap=True)
    epochs = -(-(step + 1) * size // samples(spec))
    rows = GPTDataset(
        indexed, prefix, np.arange(len(indexed.document_indices) - 1), epochs * samples(spec), Split.train, config
    )
    steps = (range(at, at + size) for at in range(step * size, len(rows) - size, size))
    first = DataLoader(rows, batch_sampler=steps)  # type: ignore[arg-type]
    yield from first
    while True:
        yield from DataLoader(rows, batch_size=size)


def megatron_documents(spec: Spec, step: int) -> Iterator[Any]:
    """The same with attention masks, positions and losses kept apart by document."""
    return megatron_loader(spec, step, documents=True)


def torch_memory(spec: Spec) -> float:
    return 40.0 * samples(spec)  # a permutation, and a Python int of each


PEERS = {
    "bare numpy gather": Contender(bare_gather, distribution="numpy", holds=lambda spec: 8.0 * samples(spec)),
    "bare numpy gather, widened": Contender(bare_gather_widened, distribution="numpy"),
    "torch DataLoader": Contender(torch_loader, distribution="torch", holds=torch_memory),
    "torch DataLoader, batch-wise": Contender(torch_loader_of_batches, distribution="torch", holds=torch_memory),
    "nanoGPT's way": Contender(nanogpt_way),
    "Hugging Face datasets": Contender(datasets_loader, make_datasets, "datasets"),
    "litdata": Contender(litdata_loader, make_litdata, "litdata"),
    "mosaicml-streaming": Contender(streaming_loader, make_streaming, "mosaicml-streaming", resumes=True),
    "megatron-core": Contender(megatron_loader, make_megatron, "megatron-core", resumes=True),
    "megatron-core, documents": Contender(megatron_documents, make_megatron, "megatron-core", resumes=True),
}

if __name__ == "__main__":
    serve(PEERS)
