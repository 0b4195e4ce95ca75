"""Sampling from a decoder: greedy, temperature, top-k, top-p; a key-value cache; on past the context length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmtrain.data.tokenizer import Tokenizer
from llmtrain.model.transformer import KVCache, Transformer

# Colder than this, float32 probabilities are one and zeros, and a division by the temperature may overflow.
COLDEST = 1e-6


# Not cuDNN's attention, which torch prefers on a Hopper: it plans anew for each length, tens of milliseconds a token.
KERNELS_FOR_ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen; temperature 0 is greedy."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    vocab_size: int | None = None  # ids from here on are padding of the model's vocabulary and never chosen


def choose(logits_BV: Tensor, options: SamplingOptions, generators: Sequence[torch.Generator]) -> Tensor:
    """Pick one id for each row, by the row's own (CPU) generator: (B, V) logits → (B,) int64.

    Top-k keeps the k most likely; top-p then keeps the smallest set whose probability reaches p (Holtzman et al. 2020).
    """
    logits_BV = logits_BV.float()[:, : options.vocab_size]
    if options.temperature < COLDEST:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / options.temperature
    if options.top_k is not None and options.top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(options.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    probabilities_BV = logits_BV.softmax(-1)
    if options.top_p is not None and options.top_p < 1:
        sorted_BV, order_BV = probabilities_BV.sort(-1, descending=True)
        before_BV = sorted_BV.cumsum(-1) - sorted_BV  # probability of all that are more likely
        outside_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(-1, order_BV, before_BV >= options.top_p)
        probabilities_BV = probabilities_BV.masked_fill(outside_BV, 0.0)
    # Drawn on the CPU, so that a seed means the same text on any device.
    rows = zip(probabilities_BV.cpu(), generators, strict=True)
    return torch.cat([torch.multinomial(row_V, 1, generator=own) for row_V, own in rows]).to(logits_BV.device)


def prompt_ids(tokenizer: Tokenizer, prompt: str, *, begins_document: bool) -> list[int]:
    """The ids to go on from; an empty prompt begins a document, as every document of the training stream does: after
    the end of another.

    Args:
        tokenizer: of the model.
        prompt: text.
        begins_document: so does any prompt: `data.document_mask`, with which no text had another before it.

    Raises:
        UserError: the prompt has a character that the tokenizer lacks.
    """
    ids: list[int] = tokenizer.encode(prompt).tolist()
    return ids if ids and not begins_document else [tokenizer.eos_id, *ids]


@torch.no_grad()
def sample(model: Transformer, prompt_BS: Tensor, options: SamplingOptions, seeds: Sequence[int]) -> Iterator[Tensor]:
    """Yield one (B,) tensor of next ids after another, endlessly.

    When the context is full, its newer half is read again as a new context: text goes on at the price of one longer
    step for each half context.

    Args:
        model: in evaluation mode.
        prompt_BS: int64 ids, at least one; only the last `model.seq_len` are read.
        options: how to choose.
        seeds: one for each row: what is chosen for a row does not depend on the rows beside it.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    context_BS = prompt_BS[:, -model.seq_len :]
    cache = KVCache(model.seq_len)
    pending_BS = context_BS
    while True:
        with sdpa_kernel(KERNELS_FOR_ANY_LENGTH):
            logits_BSV = model(pending_BS, cache=cache, last_only=True)
        ids_B = choose(logits_BSV[:, -1], options, generators)
        yield ids_B
        pending_BS = ids_B[:, None]
        context_BS = torch.cat((context_BS, pending_BS), dim=1)
        if cache.length == model.seq_len:
            context_BS = context_BS[:, -max(1, model.seq_len // 2) :]
            cache, pending_BS = KVCache(model.seq_len), context_BS
