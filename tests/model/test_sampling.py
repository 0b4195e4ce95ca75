"""Sampling: the cache changes nothing, the context may run out, and each option does what its name says."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from llmtrain.data.tokenizer import fit_tokenizer
from llmtrain.model.sampling import SamplingOptions, choose, prompt_ids, sample
from llmtrain.model.transformer import Transformer
from tests.model.test_transformer import SEQ_LEN, build, shake

GREEDY = SamplingOptions(temperature=0.0)
VARIANTS = [{}, {"positions": "learned", "norm": "layernorm"}, {"kv_heads": 1}, {"tie_embeddings": False}]


def write(model: Transformer, prompts: list[list[int]], options: SamplingOptions, tokens: int, seed: int = 5):
    seeds = range(seed, seed + len(prompts))
    chosen = itertools.islice(sample(model, torch.tensor(prompts), options, seeds), tokens)
    return torch.stack(list(chosen), dim=1).tolist()


def argmax_without_cache(model: Transformer, prompt: list[int], tokens: int) -> list[int]:
    """The definition, from scratch for every token; a context that is full is cut to its newer half."""
    context, written = prompt[-SEQ_LEN:], []
    for _ in range(tokens):
        with torch.no_grad():
            written.append(int(model(torch.tensor([context]))[0, -1].argmax()))
        full = len(context) == SEQ_LEN
        context = [*context, written[-1]]
        if full:
            context = context[-SEQ_LEN // 2 :]
    return written


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompt_tokens", [1, 7, SEQ_LEN - 1, SEQ_LEN, SEQ_LEN + 9])
def test_greedy_equals_argmax_without_a_cache_also_past_the_context(variant, prompt_tokens: int) -> None:
    model = shake(build(**variant)).eval()
    prompt = torch.randint(101, (prompt_tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    tokens = 3 * SEQ_LEN
    assert write(model, [prompt], GREEDY, tokens) == [argmax_without_cache(model, prompt, tokens)]


def test_no_kernel_is_used_that_plans_for_each_length_anew_and_training_has_it_again() -> None:
    model, seen = build().eval(), list[bool]()
    model.blocks[0].register_forward_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    write(model, [[1, 2]], GREEDY, 3)
    assert seen == [False] * 3 and torch.backends.cuda.cudnn_sdp_enabled()


def test_a_context_of_one_token_goes_on() -> None:
    torch.manual_seed(0)
    model = Transformer(build().config, 1)
    model.init_weights()
    assert len(write(shake(model).eval(), [[3]], GREEDY, 5)[0]) == 5


def test_the_same_seed_gives_the_same_ids_and_another_seed_others() -> None:
    model = shake(build()).eval()
    options = SamplingOptions(temperature=1.0)
    first = write(model, [[1, 2]], options, 20)
    assert write(model, [[1, 2]], options, 20) == first
    assert write(model, [[1, 2]], options, 20, seed=6) != first


def test_a_row_is_the_same_whatever_is_beside_it() -> None:
    model = shake(build()).eval()
    options = SamplingOptions(temperature=1.0)
    together = write(model, [[1, 2]] * 4, options, 20)
    assert len({tuple(row) for row in together}) == 4
    assert [write(model, [[1, 2]], options, 20, seed=5 + row)[0] for row in range(4)] == together


def frequencies(logits: list[float], options: SamplingOptions, draws: int = 4000) -> dict[int, float]:
    generator = torch.Generator().manual_seed(0)
    chosen = (int(choose(torch.tensor([logits]), options, [generator])) for _ in range(draws))
    return {token: count / draws for token, count in Counter(chosen).items()}


LOGITS = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (SamplingOptions(), [0.4, 0.3, 0.2, 0.1]),
        (SamplingOptions(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (SamplingOptions(top_k=2), [4 / 7, 3 / 7]),
        (SamplingOptions(top_k=100), [0.4, 0.3, 0.2, 0.1]),
        (SamplingOptions(top_p=0.65), [4 / 7, 3 / 7]),
        (SamplingOptions(top_p=0.75), [4 / 9, 3 / 9, 2 / 9]),
        (SamplingOptions(top_p=1e-9), [1.0]),
        (SamplingOptions(top_p=1.0), [0.4, 0.3, 0.2, 0.1]),
        (SamplingOptions(top_k=3, top_p=0.7), [4 / 7, 3 / 7]),
        (SamplingOptions(vocab_size=2), [4 / 7, 3 / 7]),
        (SamplingOptions(temperature=0.0, vocab_size=3), [1.0]),
    ],
)
def test_tokens_come_as_often_as_their_probability(options: SamplingOptions, expected: list[float]) -> None:
    measured = frequencies(LOGITS, options)
    assert set(measured) == set(range(len(expected)))
    for token, probability in enumerate(expected):  # four standard deviations of 4,000 draws
        assert measured[token] == pytest.approx(probability, abs=4 * math.sqrt(0.25 / 4000))


@pytest.mark.parametrize("temperature", [1e-45, 1e-12, 1e-7, 1e-5, 1e-3])
def test_a_very_low_temperature_is_greedy(temperature: float) -> None:
    logits = [80.0, -80.0, 80.5, 3e4, -3e4]
    assert frequencies(logits, SamplingOptions(temperature=temperature), draws=20) == {3: 1.0}


def test_a_prompt_begins_a_document_where_none_was_seen_behind_another() -> None:
    tokenizer = fit_tokenizer("char", ["abc"])
    ids = tokenizer.encode("cab").tolist()
    assert prompt_ids(tokenizer, "cab", begins_document=False) == ids
    assert prompt_ids(tokenizer, "cab", begins_document=True) == [tokenizer.eos_id, *ids]
    for begins in (False, True):
        assert prompt_ids(tokenizer, "", begins_document=begins) == [tokenizer.eos_id]
