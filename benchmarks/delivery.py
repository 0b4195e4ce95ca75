"""llmtrain's batch delivery in a process of its own, for `benchmarks.data`: as peer_drivers/delivery.py has others'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.peer_drivers.delivery import Contender, Spec, serve
from llmtrain.data.batches import Layout, Order, Windows, WindowSet, batches, inputs_and_targets, plain_order
from llmtrain.data.mixture import MixedOrder, MixedWindows, Stage
from llmtrain.data.packed import open_packed
from llmtrain.data.packing import GROUP
from llmtrain.data.shards import TokenDataset
from llmtrain.model.document_mask import document_begins

CPU = torch.device("cpu")
SEED = 1
WEIGHTS = (0.6, 0.3, 0.1)  # of the mixture


def plain(spec: Spec) -> tuple[WindowSet, Order]:
    length = spec["length"]
    windows = Windows(TokenDataset(spec["prepared"]).split("train"), length, length)
    return windows, plain_order(len(windows), SEED)


def mixed(spec: Spec) -> tuple[WindowSet, Order]:
    """A third of the tokens in each of three folders."""
    length = spec["length"]
    sources = [Windows(TokenDataset(path).split("train"), length, length) for path in spec["sources"]]
    order = MixedOrder([len(source) for source in sources], SEED, [Stage(0, WEIGHTS)])
    return MixedWindows(sources), order


def packed(spec: Spec) -> tuple[WindowSet, Order]:
    data = TokenDataset(spec["prepared"])
    windows = open_packed(data, "train", spec["length"], spec["document_end"], GROUP)
    return windows, plain_order(len(windows), SEED)


def deliver(
    spec: Spec,
    step: int,
    *,
    source: Callable[[Spec], tuple[WindowSet, Order]],
    widen: bool = True,
    documents: bool = False,
) -> Iterator[Any]:
    """Open the data, and yield the batches from `step` on.

    Args:
        spec: see peer_drivers/delivery.py.
        step: the first.
        source: opens it.
        widen: to int64, as a CPU takes them; else they stay what is copied to a GPU, which widens them itself.
        documents: with the index at which each token's document begins, of which both kinds of mask are made.
    """
    size = spec["batch"]
    windows, order = source(spec)
    layout = Layout(len(windows), size, size)
    for batch in batches(windows, layout, order, position=layout.position_after(0, step), as_int64=widen):
        for tokens, _ in batch.micro_batches():
            if not widen:
                yield tokens
                continue
            inputs, targets = inputs_and_targets(tokens, size, CPU, batch.padding)
            yield (inputs, targets, document_begins(inputs, spec["document_end"])) if documents else (inputs, targets)


def contender(**how: Any) -> Contender:
    return Contender(partial(deliver, **how), distribution="llmtrain", resumes=True)


OURS = {
    "llmtrain": contender(source=plain),
    "llmtrain, as stored": contender(source=plain, widen=False),
    "llmtrain, mixture": contender(source=mixed),
    "llmtrain, mixture, documents": contender(source=mixed, documents=True),
    "llmtrain, best_fit, documents": contender(source=packed, documents=True),
}

if __name__ == "__main__":
    serve(OURS)
