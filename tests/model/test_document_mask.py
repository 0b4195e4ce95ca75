"""Several documents in a window are as if each had one of its own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F  # noqa: N812 -- the name everyone reads
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask

from llmtrain.model import document_mask
from llmtrain.model.document_mask import block_mask, document_begins, within_documents
from llmtrain.model.transformer import KVCache, Transformer
from tests.model.test_transformer import VARIANTS, resolved, shake

END = 7
VOCAB = 101
# Where documents begin in each row: anywhere, side by side (without a token of their own), at the very first.
BEGINS = [[5, 6, 19], [0, 11, 31], []]
SEQ_LEN = 32
# float32 sums in another order, a few units in the last place of numbers of order one, as between a cache and none.
FLOAT32 = 2e-5


def build(document_end: int | None = END, checkpointing: str = "none", seq_len: int = SEQ_LEN, **model: Any) -> Any:
    torch.manual_seed(0)
    built = Transformer(resolved(VOCAB, **model), seq_len, checkpointing, document_end)
    built.init_weights()
    torch.manual_seed(1)
    return shake(built)


def window(begins: list[list[int]] = BEGINS, seq_len: int = SEQ_LEN, seed: int = 2) -> torch.Tensor:
    """(rows, seq_len + 1) ids, with ends where documents begin, and nowhere else."""
    ids = torch.randint(END + 1, VOCAB, (len(begins), seq_len + 1), generator=torch.Generator().manual_seed(seed))
    for row, places in zip(ids, begins, strict=True):
        row[torch.tensor(places, dtype=torch.long)] = END
    return ids


def pieces(begins: list[list[int]] = BEGINS, seq_len: int = SEQ_LEN) -> list[tuple[int, slice]]:
    """Row and place of each document."""
    cuts = [sorted({0, *places, seq_len}) for places in begins]
    return [(row, slice(a, b)) for row, at in enumerate(cuts) for a, b in pairwise(at)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_documents_run_one_by_one(variant: dict[str, Any]) -> None:
    masked, plain = build(**variant).eval(), build(None, **variant).eval()
    ids = window()[:, :-1]
    with torch.no_grad():
        logits, mixed = masked(ids), plain(ids)
        for row, place in pieces():
            alone = plain(ids[row : row + 1, place])
            assert torch.allclose(logits[row : row + 1, place], alone, atol=FLOAT32)
    assert torch.equal(logits[2], mixed[2]) or torch.allclose(logits[2], mixed[2], atol=FLOAT32)  # one document
    assert (logits[0, 6:] - mixed[0, 6:]).abs().max() > 0.01


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[2], VARIANTS[4]])
def test_gradients_are_those_of_documents_run_one_by_one(variant: dict[str, Any]) -> None:
    masked, plain = build(**variant), build(None, **variant)
    ids = window()
    loss = masked(ids[:, :-1], ids[:, 1:])
    loss.backward()
    alone = sum(plain(ids[r : r + 1, :-1][:, at], ids[r : r + 1, 1:][:, at]) for r, at in pieces())
    alone.backward()
    assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
    for (name, ours), theirs in zip(masked.named_parameters(), plain.parameters(), strict=True):
        # Sums over 96 targets in another order: 2^-24 each, so 1e-5 of the largest leaves room for them all.
        assert (ours.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max(), name


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    ids, gradients = window(), []
    for checkpointing in ("none", kind):
        model = build(checkpointing=checkpointing)
        model(ids[:, :-1], ids[:, 1:]).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


LONG = ({"heads": 1, "dim": 16}, 1200)  # more than a block of the kernel's keys


@pytest.mark.parametrize(("variant", "seq_len"), [*((variant, SEQ_LEN) for variant in VARIANTS), LONG])
def test_no_other_document_is_seen(variant: dict[str, Any], seq_len: int) -> None:
    model = build(seq_len=seq_len, **{**variant, "layers": 2}).eval()
    places = [[a * seq_len // SEQ_LEN for a in row] for row in BEGINS]
    ids = window(places, seq_len)[:, :-1]
    with torch.no_grad():
        before = model(ids)
        assert before.isfinite().all()
        for row, place in pieces(places, seq_len):
            changed = ids.clone()
            inside = slice(place.start + (ids[row, place.start] == END).item(), place.stop)
            changed[row, inside] = END + 1 + (changed[row, inside] - END) % (VOCAB - END - 1)
            after = model(changed)
            others = torch.ones(ids.shape, dtype=torch.bool)
            others[row, place] = False
            assert torch.equal(before[others], after[others])
            if inside.start < inside.stop:
                assert not torch.equal(before[row, inside], after[row, inside])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cache_gives_the_same_logits_piece_by_piece(variant: dict[str, Any]) -> None:
    model = build(**variant).eval()
    ids = window()[:, :-1]
    cache = KVCache(SEQ_LEN)
    with torch.no_grad():
        whole = model(ids)
        parts = [model(ids[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 7), (7, 20), (20, SEQ_LEN))]
    assert torch.allclose(whole, torch.cat(parts, 1), atol=FLOAT32)


def test_positions_begin_anew_with_each_document() -> None:
    ids = torch.tensor([[3, END, 3, 3, END, END, 3], [END, 3, 3, 3, 3, 3, 3]])
    assert document_begins(ids, END).tolist() == [[0, 1, 1, 1, 4, 5, 5], [0] * 7]
    documents = within_documents(ids, 3, END, torch.float32, use_flex=False)
    assert documents.positions.tolist() == [[0, 0, 1], [4, 5, 6]]
    assert (documents.mask == 0)[0, 0].int().tolist() == [[0, 0, 0, 0, 1, 0, 0], [0] * 5 + [1, 0], [0] * 5 + [1, 1]]


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (8, 257), (0, 5), (2, 0)])
def test_begins_on_a_cpu_are_those_that_other_devices_scan_for(shape: tuple[int, int], density: float) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.where(torch.rand(shape[0], shape[1] + 1, generator=generator) < density, END, 1)[:, :-1]
    found, scanned = document_begins(ids, END), document_mask._scanned_begins(ids, END)
    assert found.dtype == torch.int64
    assert torch.equal(found, scanned)


@pytest.mark.parametrize("seq_len", [100, 128, 384, 700])
def test_the_block_mask_is_the_one_that_torch_makes_from_every_pair(seq_len: int) -> None:
    generator = torch.Generator().manual_seed(seq_len)
    for density in (0.001, 0.01, 0.1):
        is_end = torch.rand(3, seq_len, generator=generator) < density
        begins = document_begins(torch.where(is_end, END, 1), END)

        def looks(b: Any, _h: Any, q: Any, k: Any, begins: torch.Tensor = begins) -> Any:
            return (begins[b, q] == begins[b, k]) & (q >= k)

        expected, ours = create_block_mask(looks, 3, None, seq_len, seq_len, device="cpu"), block_mask(begins)
        assert ours.shape[-2:] == expected.shape[-2:] == (seq_len, seq_len)
        assert ours.BLOCK_SIZE == expected.BLOCK_SIZE
        for name in ("kv", "full_kv", "q", "full_q"):
            counts = getattr(ours, f"{name}_num_blocks")
            assert torch.equal(counts, getattr(expected, f"{name}_num_blocks")), name
            here, there = getattr(ours, f"{name}_indices"), getattr(expected, f"{name}_indices")
            assert here.dtype == there.dtype and here.shape == there.shape
            named = torch.arange(here.shape[-1]) < counts[..., None]
            assert torch.equal(here[named], there[named]), name


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[2], VARIANTS[4]])
def test_flex_attention_gives_the_reference(variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In its plain form; the kernel is for GPUs."""
    seq_len = 300
    places = [[a * seq_len // SEQ_LEN for a in row] for row in BEGINS]
    model, ids = build(seq_len=seq_len, **variant).eval(), window(places, seq_len)[:, :-1]
    with torch.no_grad():
        reference = model(ids)
        monkeypatch.setattr("llmtrain.model.transformer.flex_suits", lambda *_: True)
        monkeypatch.setattr(document_mask, "_compiled", lambda: flex.flex_attention)
        used: list[Any] = []
        monkeypatch.setattr(
            "llmtrain.model.transformer.flex_attention",
            lambda *a, **k: used.append(a[3]) or document_mask.flex_attention(*a, **k),
        )
        assert torch.allclose(model(ids), reference, atol=FLOAT32)
        assert len(used) == 3 and len(set(map(id, used))) == 1  # one mask for all layers
        model(ids[:, :200])
        assert len(used) == 3  # each length would be another kernel


def test_other_documents_compile_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for the kernel on its own nor for a block that is compiled; the documents are an argument of it."""
    torch._dynamo.reset()  # what other tests have compiled counts towards a limit
    model, rotation = build(seq_len=256).eval(), None
    attention, block = CompileCounter(), CompileCounter()
    plain = flex.flex_attention
    compiled = torch.compile(plain, dynamic=False, backend=attention)
    monkeypatch.setattr(document_mask, "_compiled", lambda: compiled)
    x = torch.randn(2, 256, 64)
    with torch.no_grad():
        for seed in range(3):
            is_end = torch.rand(2, 256, generator=torch.Generator().manual_seed(seed)) < 0.02
            mask = block_mask(document_begins(torch.where(is_end, END, 1), END))
            eager = model.blocks[0](x, rotation, None, mask)
            if seed == 0:
                model.blocks[1].load_state_dict(model.blocks[0].state_dict())
                model.blocks[1].compile(backend=block)
            assert torch.allclose(model.blocks[1](x, rotation, None, mask), eager, atol=FLOAT32)
    assert attention.frame_count == block.frame_count == 1


@pytest.mark.slow
def test_flex_attention_compiled_gives_the_reference() -> None:
    """By torch's compiler for CPUs, which has a kernel for it without a gradient."""
    begins = document_begins(window([[40, 41, 200], []], 300), END)[:, :300]
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, 300, 16, generator=generator) for heads in (4, 2, 2))
    ids = torch.where(begins == torch.arange(300), END, 1)
    mask = within_documents(ids, 300, END, torch.float32, use_flex=False).mask
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    with torch.no_grad():
        ours = document_mask.flex_attention(q, k, v, block_mask(begins), enable_gqa=True)
    assert torch.allclose(ours, expected, atol=FLOAT32)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[4]])
def test_autocast_keeps_documents_apart(variant: dict[str, Any]) -> None:
    masked, plain = build(**variant).eval(), build(None, **variant).eval()
    ids = window()[:, :-1]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = masked(ids)
        for row, place in pieces():
            # bf16 keeps 8 bits, so a sum in another order may round otherwise: 2^-9 of numbers of order one, a few.
            assert (logits[row : row + 1, place] - plain(ids[row : row + 1, place])).abs().max() < 2**-5


def test_dropout_keeps_documents_apart() -> None:
    """Another kernel. It draws the same for all documents before and after the one that changes."""
    model, ids = build(dropout=0.2), window()[:, :-1]
    changed = ids.clone()
    changed[1, 12:31] = END + 1
    results = []
    for these in (ids, changed):
        torch.manual_seed(5)
        results.append(model(these))
    same = torch.ones(ids.shape, dtype=torch.bool)
    same[1, 11:31] = False
    assert torch.equal(results[0][same], results[1][same])
    assert not torch.equal(results[0][~same], results[1][~same])


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_flex_attention_has_the_gradient_of_the_reference(checkpointing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its plain form, which torch lets no CPU have a gradient of, though there is one."""
    seq_len = 300
    ids = window([[a * seq_len // SEQ_LEN for a in row] for row in BEGINS], seq_len)
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(document_mask, "_compiled", lambda: flex.flex_attention)
    gradients = []
    for use_flex in (False, True):
        monkeypatch.setattr("llmtrain.model.transformer.flex_suits", lambda *_, use_flex=use_flex: use_flex)
        model = build(seq_len=seq_len, checkpointing=checkpointing, **VARIANTS[4])
        model(ids[:, :-1], ids[:, 1:]).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert not all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # two ways indeed
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
