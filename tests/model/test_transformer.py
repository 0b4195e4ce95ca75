"""The decoder: equal to a reference, initialised on purpose, counted, causal, and the same with a cache."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 -- the name everyone reads

from llmtrain.config import ModelSection, make_config
from llmtrain.model.cost import flops_per_token, model_flops_utilization, parameter_count
from llmtrain.model.transformer import KVCache, RMSNorm, SquaredReLU, Transformer
from llmtrain.optim.optimizers import make_optimizer, parameter_groups
from llmtrain.presets import PRESETS
from llmtrain.resolve import resolve

SEQ_LEN = 32


def resolved(vocab_size: int = 101, **model: Any) -> ModelSection:
    config = make_config({"model": {"dim": 64, "layers": 3, "heads": 4, **model}})
    return resolve(config, vocab_size=vocab_size, world_size=1, bf16_native=False, compile_auto=False).model


def build(vocab_size: int = 101, checkpointing: str = "none", seed: int = 0, **model: Any) -> Transformer:
    torch.manual_seed(seed)
    built = Transformer(resolved(vocab_size, **model), SEQ_LEN, checkpointing)
    built.init_weights()
    return built


def shake(model: Transformer) -> Transformer:
    """Move every parameter off its special first value, so that nothing is zero or one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


# Of the wavelengths of the eight pairs of a head one stays, two are stretched by part, the rest whole.
SCALING = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 100}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"tie_embeddings": False},
    {"norm": "layernorm", "positions": "learned", "activation": "gelu", "qk_norm": False},
    {"kv_heads": 1},
    {"kv_heads": 2, "activation": "relu2", "tie_embeddings": False},
    {"ff_dim": 48, "qk_norm": False},
    {"kv_heads": 2, "qk_norm": False, "qkv_bias": True, "rope_scaling": SCALING},
    {"kv_heads": 2, "head_dim": 24, "qkv_bias": True},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_counted_by_the_formula(variant: dict[str, Any]) -> None:
    model = build(**variant)
    assert parameter_count(model.config, SEQ_LEN) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_initialised_on_purpose(variant: dict[str, Any]) -> None:
    """Filled with NaN first: what init_weights leaves out stays NaN."""
    model = build(**variant)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.init_weights()
    assert [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()] == []


def test_an_unknown_module_with_parameters_is_refused_by_the_initialisation() -> None:
    model = build()
    model.extra = torch.nn.Conv1d(2, 2, 1)
    with pytest.raises(TypeError, match="Conv1d"):
        model.init_weights()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon"])
def test_every_parameter_is_in_exactly_one_optimizer_group(variant: dict[str, Any], name: str) -> None:
    model = build(**variant)
    optimizer = make_optimizer(model, make_config({"optimizer": {"name": name}}).optimizer)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    assert set(grouped) == set(model.parameters())


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    model = build(tie_embeddings=False, positions="learned", qkv_bias=True)
    optimizer = make_optimizer(model, make_config({}).optimizer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    undecayed = {names[p] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert undecayed == {
        name
        for name in names.values()
        if "norm" in name or "bias" in name or name.startswith(("embedding", "position"))
    }
    assert sum("bias" in name for name in undecayed) == 3 * model.config.layers
    assert [names[p] for p in parameter_groups(model)["head"]] == ["head.weight"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("vocab_size", "dim"), [(66, 64), (66, 256), (8192, 128), (50_257, 768)])
def test_a_fresh_model_knows_nothing(variant: dict[str, Any], vocab_size: int, dim: int) -> None:
    model = build(vocab_size, **{**variant, "dim": dim, "heads": 4, "layers": 2})
    ids = torch.randint(vocab_size, (4, SEQ_LEN + 1), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        loss = model(ids[:, :-1], ids[:, 1:]).item() / (4 * SEQ_LEN)
    assert loss == pytest.approx(math.log(vocab_size), abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("tie", [True, False])
def test_results_equal_those_of_transformers_llama(kv_heads: int, tie: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = shake(build(kv_heads=kv_heads, tie_embeddings=tie, qk_norm=False)).eval()
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101, hidden_size=config.dim, intermediate_size=config.ff_dim, num_hidden_layers=config.layers,
            num_attention_heads=config.heads, num_key_value_heads=kv_heads, rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta, tie_word_embeddings=tie, max_position_embeddings=SEQ_LEN,
            attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    names = {
        "embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
        "attention_norm": "input_layernorm", "ff_norm": "post_attention_layernorm", "attention.q": "self_attn.q_proj",
        "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj", "attention.out": "self_attn.o_proj",
        "ff.gate": "mlp.gate_proj", "ff.up": "mlp.up_proj", "ff.down": "mlp.down_proj",
    }  # fmt: skip
    state = {}
    for ours, value in model.state_dict().items():
        if ours.startswith("blocks."):
            _, layer, rest = ours.split(".", 2)
            state[f"model.layers.{layer}.{names[rest.removesuffix('.weight')]}.weight"] = value
        else:
            state[names[ours]] = value
    llama.load_state_dict(state)
    ids = torch.randint(101, (3, SEQ_LEN))
    with torch.no_grad():
        theirs, ours_logits = llama(ids).logits, model(ids)
    assert (theirs - ours_logits).abs().max().item() <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_future_is_not_seen(variant: dict[str, Any]) -> None:
    model = shake(build(**variant)).eval()
    ids = torch.randint(101, (2, SEQ_LEN))
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 101
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cache_gives_the_same_logits_piece_by_piece(variant: dict[str, Any]) -> None:
    model = shake(build(**variant)).eval()
    ids = torch.randint(101, (2, SEQ_LEN))
    cache = KVCache(SEQ_LEN)
    with torch.no_grad():
        whole = model(ids)
        pieces = [model(ids[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 7), (7, 20), (20, SEQ_LEN))]
    # float32 sums in another order: a few units in the last place of numbers of order one.
    assert torch.allclose(whole, torch.cat(pieces, 1), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_activation_checkpointing_changes_no_gradient(kind: str) -> None:
    ids = torch.randint(101, (2, SEQ_LEN))
    gradients = []
    for checkpointing in ("none", kind):
        model = shake(build(checkpointing=checkpointing))
        model(ids, ids).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def kept_bytes(checkpointing: str, compiled: bool) -> int:
    """What a step keeps for its backward pass, in bytes, beside the parameters."""
    kept = dict[int, int]()
    model = shake(build(checkpointing=checkpointing))
    if compiled:
        for block in model.blocks:
            block.compile()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(101, (2, SEQ_LEN))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, ids)
    loss.backward()
    return sum(kept.values())


def test_what_writes_token_after_token_is_not_compiled_and_leaves_compiled_blocks_as_they_are() -> None:
    """Each layer and length would be compiled anew, up to a limit at which torch gives up, on training too."""
    made = []
    for compiled in (False, True):
        model = shake(build(layers=10))
        if compiled:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            for block in model.blocks:
                block.compile()
        calls: list[int] = []
        model.blocks[3].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        cache = KVCache(16)
        with torch.no_grad():
            made.append([model(torch.tensor([[token]]), cache=cache) for token in range(4)])
        assert len(calls) == 4
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    assert not torch._dynamo.utils.counters["stats"], "something was compiled"


@pytest.mark.slow
def test_a_compiled_block_keeps_what_selective_checkpointing_asks_for() -> None:
    """The products that the backward pass reads, and what comes out of attention: no less, nor much more."""
    full, selective, none = (kept_bytes(kind, compiled=True) for kind in ("full", "selective", "none"))
    config = build().config
    assert config.ff_dim and config.kv_heads
    of_a_token = 2 * config.dim + 2 * config.key_width + 2 * config.ff_dim  # q, attention; k, v; gate, up
    products = 4 * config.layers * 2 * SEQ_LEN * of_a_token
    assert products <= selective - full < 1.3 * products
    assert selective < none


@pytest.mark.slow
def test_a_copy_of_what_is_compiled_computes_with_its_own_weights() -> None:
    model = shake(build())
    for block in model.blocks:
        block.compile()
    ids = torch.randint(101, (2, SEQ_LEN))
    copied = copy.deepcopy(model)
    assert copied(ids, ids) == model(ids, ids)
    shake(copied)
    assert copied(ids, ids) != model(ids, ids)
    copied.load_state_dict(model.state_dict())
    assert copied(ids, ids) == model(ids, ids)


@pytest.mark.slow
@pytest.mark.parametrize(("checkpointing", "keeps"), [("none", True), ("selective", False), ("full", False)])
def test_what_is_compiled_and_made_again_keeps_no_cast_of_a_weight(checkpointing: str, keeps: bool) -> None:
    """So ZeRO-3, which cuts the weights over the ranks, may compile it: no rank would have all in bf16."""
    model = shake(build(checkpointing=checkpointing))
    for block in model.blocks:
        block.compile()
    shapes = {side for name, weight in model.blocks.named_parameters() if weight.ndim == 2
              for side in (tuple(weight.shape), tuple(weight.shape[::-1]))}  # fmt: skip
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    ids = torch.randint(101, (3, SEQ_LEN))  # 96 positions: no weight has a side of so many
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, ids)
    loss.backward()
    casts = [tensor for tensor in kept if tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes]
    assert bool(casts) == keeps


def test_targets_that_are_ignored_count_for_nothing() -> None:
    model = shake(build())
    ids = torch.randint(101, (2, SEQ_LEN))
    targets = ids.clone()
    targets[1] = -100
    assert model(ids, targets).item() == pytest.approx(model(ids[:1], ids[:1]).item(), rel=1e-6)
    assert model(ids, torch.full_like(ids, -100)).item() == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_with_about_the_size_in_its_name(preset: str) -> None:
    config = make_config({"model": {"preset": preset}})
    model = resolve(
        config,
        vocab_size=8192 if preset == "10m" else 32_000,
        world_size=1,
        bf16_native=True,
        compile_auto=False,
    ).model
    with torch.device("meta"):
        built = Transformer(model, 2048)
    counted = parameter_count(model, 2048)
    assert counted == sum(p.numel() for p in built.parameters())
    named = float(preset[:-1]) * {"m": 1e6, "b": 1e9}[preset[-1]]
    blocks_only = counted - model.vocab_size * model.dim  # type: ignore[operator]
    assert 0.75 * named < counted < 1.25 * named or 0.75 * named < blocks_only < 1.25 * named


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[2], VARIANTS[3], VARIANTS[7]])
def test_flops_agree_with_those_torch_counts(variant: dict[str, Any]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = build(**variant)
    ids = torch.randint(101, (2, SEQ_LEN))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(ids, ids).backward()
    # The plain attention kernel computes all positions, so this is the count without the causal half.
    assert counter.get_total_flops() == pytest.approx(
        2 * SEQ_LEN * flops_per_token(model.config, SEQ_LEN, causal=False)
    )


def test_utilization_of_an_unknown_device_is_unknown() -> None:
    assert model_flops_utilization(1e14, "Some GPU", 1) is None
    assert model_flops_utilization(989e12, "NVIDIA H200", 2) == pytest.approx(0.5)


def test_squared_relu_has_the_gradient_of_autograd_bit_for_bit() -> None:
    x = torch.randn(7, 33, requires_grad=True)
    gradient = torch.randn(7, 33)
    (expected,) = torch.autograd.grad(F.relu(x).square(), x, gradient)
    y = SquaredReLU.apply(x)  # type: ignore[no-untyped-call]
    (ours,) = torch.autograd.grad(y, x, gradient)
    assert torch.equal(y, F.relu(x).square()) and torch.equal(ours, expected)


@pytest.mark.parametrize("heads_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_cpu_and_its_gradients_are_those_of_torch_to_the_bit(
    dtype: torch.dtype, heads_last: bool
) -> None:
    torch.manual_seed(0)
    heads_first = torch.randn(5, 7, 3, 16).to(dtype).transpose(1, 2).requires_grad_()
    weight, gradient = torch.rand(16, requires_grad=True), torch.randn(5, 3, 7, 16)
    if heads_last:  # as attention lays out its gradients
        gradient = torch.randn(5, 7, 3, 16).transpose(1, 2)
    norm = RMSNorm(16, eps=1e-6)
    norm.weight = torch.nn.Parameter(weight.detach().clone())
    ours, torchs = norm(heads_first), F.rms_norm(heads_first.float(), [16], weight, 1e-6)
    assert torch.equal(ours, torchs) and ours.stride() == torchs.stride()
    found = torch.autograd.grad(ours, (heads_first, norm.weight), gradient)
    expected = torch.autograd.grad(torchs, (heads_first, weight), gradient)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("tie", [True, False])
def test_an_untied_embedding_is_as_loud_as_the_blocks_and_a_tied_one_quiet(tie: bool) -> None:
    """The standard error of a standard deviation of n normal numbers is 1/√(2n) of it; four of them are let pass."""
    weight = build(500, tie_embeddings=tie).embedding.weight
    assert weight.std().item() == pytest.approx(0.02 if tie else 1.0, rel=4 / math.sqrt(2 * weight.numel()))
