"""The engine: one meaning of the gradient, float32 weights whatever the precision, and nothing left behind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from llmtrain import compiling
from llmtrain.compiling import settle_compile, settle_flex
from llmtrain.config import RunConfig, make_config
from llmtrain.cores import usable_cores
from llmtrain.engine import Engine, Limits, Verdict, make_engine
from llmtrain.engine.accelerate import dealt_out
from llmtrain.engine.precision import set_precision
from llmtrain.engine.processes import Processes
from llmtrain.errors import UserError
from llmtrain.model.transformer import Transformer
from llmtrain.resolve import resolve

ROWS, SEQ_LEN, VOCAB = 6, 16, 50


def config_of(optimizer: str, **training: Any) -> RunConfig:
    model = {"dim": 32, "layers": 2, "heads": 2}
    training = {"precision": "fp32", **training}
    config = make_config({"model": model, "training": training, "optimizer": {"name": optimizer}})
    facts = {"world_size": 1, "bf16_native": True, "compile_auto": False}
    return resolve(config, vocab_size=VOCAB, **facts)


@pytest.fixture
def engines() -> Iterator[Any]:
    """Make prepared engines, one after the other, all with the same weights."""
    made: list[Engine] = []

    def make(clip_norm: float | None = None, optimizer: str = "adamw", **training: Any) -> tuple[Engine, Transformer]:
        if made:
            made.pop().close()
        config = config_of(optimizer, **training)
        engine = make_engine(60.0)
        made.append(engine)
        torch.manual_seed(1)
        engine.build(
            lambda: Transformer(config.model, SEQ_LEN),
            config.training,
            config.optimizer.model_copy(update={"clip_norm": clip_norm}),
        )
        with engine.evaluating() as model:
            pass
        return engine, model

    yield make
    made.pop().close()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(VOCAB, (ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(2))
    targets = ids[:, 1:].clone()
    targets[0, 3:] = -100  # uneven target counts
    targets[4] = -100
    return ids[:, :-1], targets


def gradients(engine: Engine, model: Transformer, cuts: list[int]) -> list[torch.Tensor]:
    inputs, targets = batch()
    count = int((targets != -100).sum())
    edges = [0, *cuts, ROWS]
    for begin, end in itertools.pairwise(edges):
        engine.forward_backward(inputs[begin:end], targets[begin:end], global_targets=count, sync=end == ROWS)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_the_gradient_is_that_of_the_mean_over_all_targets(engines: Any) -> None:
    engine, model = engines()
    ours = gradients(engine, model, [])
    model.zero_grad()
    inputs, targets = batch()
    logits = model(inputs).flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-100).backward()
    for mine, parameter in zip(ours, model.parameters(), strict=True):
        assert torch.allclose(mine, parameter.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("cuts", [[3], [1, 2, 3], [5], [4, 5]])
def test_cutting_the_batch_unevenly_changes_no_gradient(engines: Any, cuts: list[int]) -> None:
    engine, model = engines()
    whole = gradients(engine, model, [])
    model.zero_grad()
    for a, b in zip(whole, gradients(engine, model, cuts), strict=True):
        # float32 sums in another order
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_the_norm_is_that_before_clipping_and_the_update_is_clipped(engines: Any) -> None:
    engine, model = engines(clip_norm=None)
    expected = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients(engine, model, [])]))
    assert torch.allclose(engine.step(0.0).grad_norm, expected)
    clipped_engine, clipped_model = engines(clip_norm=0.01)
    gradients(clipped_engine, clipped_model, [])
    seen: list[torch.Tensor] = []
    clipped_engine._optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in clipped_model.parameters()]).norm())
    )
    assert torch.allclose(clipped_engine.step(0.0).grad_norm, expected)
    assert seen[0].item() == pytest.approx(0.01, rel=1e-3)
    assert all(p.grad is None for p in clipped_model.parameters())


@pytest.mark.parametrize("share", [0.5, 1.0, 2.0])  # of the gradient's norm: above, at and below it
def test_clipping_is_that_of_torch_to_the_bit(engines: Any, share: float) -> None:
    engine, model = engines()
    unclipped = gradients(engine, model, [])
    limit = share * torch.nn.utils.get_total_norm(unclipped).item()
    engine, model = engines(clip_norm=limit)
    gradients(engine, model, [])
    seen: list[list[torch.Tensor]] = []
    engine._optimizer.register_step_pre_hook(
        lambda *_: seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    )
    norm = engine.step(0.0).grad_norm
    for parameter, gradient in zip(model.parameters(), unclipped, strict=True):
        parameter.grad = gradient.clone()
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(seen[0], expected, strict=True))
    assert torch.equal(expected[0], unclipped[0]) == (share == 2.0), "the cases are those that they are meant to be"


@pytest.mark.parametrize(("precision", "computed"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_products_are_computed_in_the_precision_and_weights_stay_float32(
    engines: Any, precision: str, computed: torch.dtype
) -> None:
    engine, model = engines(precision=precision)
    seen: list[torch.dtype] = []
    model.blocks[0].ff.up.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    found = gradients(engine, model, [])
    engine.step(1e-3)
    with engine.evaluating() as evaluated:
        evaluated(batch()[0])
    assert seen == [computed, computed]
    assert {g.dtype for g in found} == {torch.float32}
    assert {f.values.dtype for f in engine.fragments()} == {torch.float32}


def test_evaluating_leaves_no_trace(engines: Any) -> None:
    engine, model = engines()
    with engine.evaluating() as evaluated:
        assert not evaluated.training
        assert not evaluated(batch()[0]).requires_grad
    assert model.training
    with pytest.raises(ZeroDivisionError), engine.evaluating():
        raise ZeroDivisionError
    assert model.training


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_the_fragments_are_the_whole_state_and_load_puts_them_back(engines: Any, name: str) -> None:
    engine, model = engines(optimizer=name)
    gradients(engine, model, [])
    engine.step(1e-2)
    saved = {f.name: f.values.clone() for f in engine.fragments()}
    assert sum(v.numel() for n, v in saved.items() if n.startswith("model/")) == sum(
        p.numel() for p in model.parameters()
    )
    gradients(engine, model, [])
    engine.step(1e-2)
    for fragment in engine.to_fill():
        fragment.values.copy_(saved[fragment.name])
    engine.publish()
    after = {f.name: f.values for f in engine.fragments()}
    assert saved.keys() == after.keys()
    assert all(torch.equal(saved[n], after[n]) for n in saved)


def test_one_process_can_close_an_engine_and_make_another_precision(engines: Any) -> None:
    for precision in ("bf16", "fp32", "bf16"):
        engine, model = engines(precision=precision)
        gradients(engine, model, [])
        assert engine.step(1e-3).grad_norm.isfinite()
        assert engine.any(True) is True
        assert engine.any(False) is False
        assert engine.sum(torch.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
@pytest.mark.parametrize("refused_by", ["norm", "loss", "nan loss", "nan gradient"])
@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_a_refused_step_leaves_everything_as_it_was_also_the_first(
    monkeypatch: pytest.MonkeyPatch, engines: Any, name: str, refused_by: str, as_on_a_gpu: bool
) -> None:
    """On a GPU the host does not know that a step is refused, and the kernels leave everything as it is."""
    monkeypatch.setattr(Processes, "host_sees_all", not as_on_a_gpu)
    limits = {"norm": Limits(grad_norm=1e-6), "loss": Limits(loss=1.0)}.get(refused_by, Limits())
    loss = torch.tensor(math.nan if refused_by == "nan loss" else 2.0)
    engine, model = engines(optimizer=name)
    plain_engine, plain_model = engines(optimizer=name)
    plain_model.load_state_dict(model.state_dict())
    for is_refused in (True, False, True, True, False):
        gradients(engine, model, [])
        if is_refused and refused_by == "nan gradient":
            next(model.parameters()).grad[0] = math.nan  # type: ignore[index]
        outcome = engine.step(1e-2, loss if is_refused else None, limits if is_refused else Limits())
        assert isinstance(outcome.seen, torch.Tensor) == as_on_a_gpu
        seen = outcome.seen if isinstance(outcome.seen, Verdict) else Verdict.read(outcome.seen)
        assert seen.is_refused == is_refused
        assert all(p.grad is None for p in model.parameters())
        if not is_refused:
            gradients(plain_engine, plain_model, [])
            plain_engine.step(1e-2)
    states = [{f.name: f.values for f in one.fragments()} for one in (engine, plain_engine)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@given(sizes=st.lists(st.integers(1, 1000)), ranks=st.integers(1, 9))
def test_ranks_share_the_writing_evenly(sizes: list[int], ranks: int) -> None:
    """By whole tensors, so nobody has more than a fair part and the largest besides."""
    owners = dealt_out(sizes, ranks)
    held = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert sum(held) == sum(sizes) and max(held) <= sum(sizes) / ranks + max(sizes, default=0)


def test_a_compiled_block_is_one_graph_under_ddp_too(tmp_path: Any) -> None:
    """torch would cut it where DDP's buckets end: a block of this width is larger than the first."""
    torch._dynamo.reset()  # what other tests have compiled counts towards a limit
    config = config_of("adamw", compile=True)
    model = Transformer(config.model.model_copy(update={"dim": 768, "ff_dim": 2048}), SEQ_LEN)
    model.init_weights()
    set_precision(model, config.training, torch.device("cpu"))
    graphs = CompileCounter()
    for block in model.blocks:
        block.compile(backend=graphs)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        inputs, targets = batch()
        DistributedDataParallel(model)(inputs, targets).backward()
    finally:
        dist.destroy_process_group()
    assert graphs.frame_count == 1


@pytest.mark.parametrize("works", [True, False])
def test_where_nothing_can_be_compiled_for_a_gpu_a_run_goes_without_unless_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    """One rank of two is where Triton is missing, or the GPU too old for it."""
    engine: Any = SimpleNamespace(
        device=torch.device("cuda"), may_compile=lambda training: True, gather=lambda mine: [("auto", True, None), mine]
    )
    monkeypatch.setattr(compiling, "why_not_compiled", lambda kind: None if works else f"no compiler for {kind}")
    auto, asked = (make_config({"training": {"compile": how}}) for how in ("auto", True))
    warnings = [] if works else ["not compiled, by which this run would gain (training.compile): no compiler for cuda"]
    assert settle_compile(auto, engine, VOCAB, 10**6) == (works, warnings)
    if works:
        assert settle_compile(asked, engine, VOCAB, 10**6) == (True, [])
    else:
        with pytest.raises(UserError, match="compile: true, but it does not work here: no compiler for cuda; leave"):
            settle_compile(asked, engine, VOCAB, 10**6)

    engine.gather = lambda mine: [None, mine]
    masked, dropping = (
        resolve(
            make_config({"data": {"document_mask": True}, "model": {"dropout": dropout}}),
            vocab_size=VOCAB,
            world_size=1,
            bf16_native=True,
            compile_auto=False,
        )
        for dropout in (0.0, 0.1)
    )
    flex, doubts = settle_flex(masked, engine)
    assert flex == works and (works or "no compiler for cuda" in doubts[0])
    assert settle_flex(dropping, engine) == (False, [])  # which flex does not know


def test_ranks_that_share_cores_take_each_its_part_and_one_that_was_given_threads_keeps_them(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = engines()
    here = usable_cores()
    for others, threads, expected in (
        ([], 1, len(here)),
        ([here] * (len(here) - 1), 1, 1),
        ([here] * (2 * len(here)), 1, 1),
        ([frozenset({999})], 1, len(here)),  # bound to cores of its own
        ([], len(here) + 1, len(here) + 1),
    ):
        monkeypatch.setattr(engine, "gather", lambda mine, o=others: [mine, *((mine[0], cores) for cores in o)])
        torch.set_num_threads(threads)
        engine.use_own_cores()
        assert torch.get_num_threads() == expected
