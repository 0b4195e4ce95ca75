"""The decoder-only transformer, its initialisation, and its key-value cache.

Tensor names end in their shape: B batch, S sequence, D model width, H query heads, K key-value heads, E head width,
F feed-forward width, V vocabulary, T cached positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- the name everyone reads
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llmtrain.config import ModelSection, RopeScalingSection
from llmtrain.model.document_mask import Documents, Mask, flex_attention, flex_suits, within_documents
from llmtrain.model.loss import linear_cross_entropy_sum, loss_and_correct
from llmtrain.model.short_attention import short_attention, suits_short_attention


@dataclass
class KVCache:
    """Keys and values of the positions seen so far, one pair for each layer, written in place."""

    max_positions: int
    length: int = 0
    keys: list[Tensor] = field(default_factory=list)  # each (B, K, max_positions, E)
    values: list[Tensor] = field(default_factory=list)
    ids: Tensor | None = None  # (B, length), where they say which document a position belongs to

    def see(self, ids_BS: Tensor) -> Tensor:
        """Append ids; return all so far."""
        self.ids = ids_BS if self.ids is None else torch.cat((self.ids, ids_BS), dim=1)
        return self.ids

    def extend(self, layer: int, key_BKSE: Tensor, value_BKSE: Tensor) -> tuple[Tensor, Tensor]:
        """Append S positions to a layer; return all its keys and values so far."""
        if layer == len(self.keys):
            batch, heads, _, width = key_BKSE.shape
            self.keys.append(key_BKSE.new_empty(batch, heads, self.max_positions, width))
            self.values.append(value_BKSE.new_empty(batch, heads, self.max_positions, width))
        end = self.length + key_BKSE.shape[2]
        self.keys[layer][:, :, self.length : end] = key_BKSE
        self.values[layer][:, :, self.length : end] = value_BKSE
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class Attention(nn.Module):
    """Causal grouped-query attention (Ainslie et al. 2023), optionally with normalised queries and keys."""

    def __init__(self, config: ModelSection):
        super().__init__()
        self.kv_heads = config.kv_heads or config.heads
        self.head_dim = config.head_width
        self.dropout = config.dropout
        self.q = nn.Linear(config.dim, config.query_width, bias=config.qkv_bias)
        self.k = nn.Linear(config.dim, config.key_width, bias=config.qkv_bias)
        self.v = nn.Linear(config.dim, config.key_width, bias=config.qkv_bias)
        self.out = nn.Linear(config.query_width, config.dim, bias=False)
        # Normalised heads bound the attention logits at any learning rate (Dehghani et al. 2023, section 3.1).
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.enable_gqa = self.kv_heads != config.heads

    def forward(
        self, x_BSD: Tensor, rotation: Tensor | None, cache: KVCache | None, layer: int, mask: Mask | None = None
    ) -> Tensor:
        """Attend from each position to itself and those before it, the cached ones included, or to those of `mask`."""
        q_BHSE = self.q_norm(self.q(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2))
        k_BKSE = self.k_norm(self.k(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2))
        v_BKSE = self.v(x_BSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if rotation is not None:
            q_BHSE, k_BKSE = rotate(q_BHSE, rotation), rotate(k_BKSE, rotation)
        q_BHSE, k_BKSE = q_BHSE.to(v_BKSE.dtype), k_BKSE.to(v_BKSE.dtype)
        if cache is not None:
            seen, new = cache.length, q_BHSE.shape[2]
            k_BKSE, v_BKSE = cache.extend(layer, k_BKSE, v_BKSE)
            if mask is None and seen and new > 1:
                mask = torch.ones(new, seen + new, dtype=torch.bool, device=x_BSD.device).tril(seen)
        has_dropout = self.training and self.dropout > 0
        is_plain = mask is None and cache is None and torch.is_grad_enabled() and not has_dropout
        if is_plain and suits_short_attention(q_BHSE, k_BKSE, v_BKSE):
            y_BHSE = short_attention(q_BHSE, k_BKSE, v_BKSE)
        elif mask is None or isinstance(mask, Tensor):
            y_BHSE = F.scaled_dot_product_attention(
                q_BHSE,
                k_BKSE,
                v_BKSE,
                attn_mask=mask,
                dropout_p=self.dropout if has_dropout else 0.0,
                is_causal=mask is None and q_BHSE.shape[2] == k_BKSE.shape[2],
                enable_gqa=self.enable_gqa,
            )
        else:
            y_BHSE = flex_attention(q_BHSE, k_BKSE, v_BKSE, mask, enable_gqa=self.enable_gqa)
        y_BSD: Tensor = self.out(y_BHSE.transpose(1, 2).flatten(2))
        return y_BSD


class SquaredReLU(torch.autograd.Function):
    """relu(x)², with a backward pass that does not mask again what is zero already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Keep relu(x) for the backward pass."""
        relu = F.relu(x)
        ctx.save_for_backward(relu)
        return relu.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """2 relu(x) times the gradient, bit for bit what autograd makes of `relu(x).square()`."""
        relu: Tensor = ctx.saved_tensors[0]
        return (gradient * relu).mul_(2)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020), GELU, or squared ReLU (So et al. 2021)."""

    def __init__(self, config: ModelSection):
        super().__init__()
        assert config.ff_dim is not None
        self.gate = nn.Linear(config.dim, config.ff_dim, bias=False) if config.activation == "swiglu" else None
        self.up = nn.Linear(config.dim, config.ff_dim, bias=False)
        self.down = nn.Linear(config.ff_dim, config.dim, bias=False)
        self.squared = config.activation == "relu2"

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Map each position on its own."""
        up_BSF = self.up(x_BSD)
        if self.gate is not None:
            hidden_BSF = F.silu(self.gate(x_BSD)) * up_BSF
        elif self.squared:
            hidden_BSF = SquaredReLU.apply(up_BSF)  # type: ignore[no-untyped-call]
        else:
            hidden_BSF = F.gelu(up_BSF)
        y_BSD: Tensor = self.down(hidden_BSF)
        return y_BSD


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream.

    What `recomputed` asks for (see `Transformer`) is in here, so that a compiled block knows of it: around one,
    selective checkpointing would see the compiler's own operators, and keep none of the products.
    """

    def __init__(self, config: ModelSection, layer: int, recomputed: str = "none"):
        super().__init__()
        self.layer, self.recomputed = layer, recomputed
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.ff_norm = make_norm(config)
        self.ff = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self._run: Callable[..., Tensor] = Block._whole

    def forward(
        self, x_BSD: Tensor, rotation: Tensor | None, cache: KVCache | None = None, mask: Mask | None = None
    ) -> Tensor:
        """Return the residual stream after this block."""
        # One token after another is no work for a compiler: each layer and length would be compiled anew, until it gave
        # up, on training too.
        if cache is not None:
            return self._forward(x_BSD, rotation, cache, mask)
        return self._run(self, x_BSD, rotation, mask)

    def compile(self, *how: Any, **named: Any) -> None:
        """Compile what is done with whole sequences; hooks around the block are not compiled with it."""
        # Not bound to this block: a copy of it has weights of its own.
        self._run = torch.compile(Block._whole, *how, **named)

    def _whole(self, x_BSD: Tensor, rotation: Tensor | None, mask: Mask | None) -> Tensor:
        if not self.training or self.recomputed == "none":
            return self._forward(x_BSD, rotation, None, mask)
        how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": self.dropout.p > 0}
        if self.recomputed == "selective":
            how["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
        y_BSD: Tensor = checkpoint(self._forward, x_BSD, rotation, None, mask, **how)
        return y_BSD

    def _forward(self, x_BSD: Tensor, rotation: Tensor | None, cache: KVCache | None, mask: Mask | None) -> Tensor:
        x_BSD = x_BSD + self.dropout(self.attention(self.attention_norm(x_BSD), rotation, cache, self.layer, mask))
        x_BSD = x_BSD + self.dropout(self.ff(self.ff_norm(x_BSD)))
        return x_BSD


class Head(nn.Linear):
    """Logits, or what is made of them; one module, so that whatever gathers a module's weights has them for both."""

    def forward(
        self,
        hidden_BSD: Tensor,
        targets_BS: Tensor | None = None,
        count_among: int | None = None,
        by_row: bool = False,
    ) -> Tensor:
        """See `Transformer.forward`."""
        if targets_BS is None:
            return super().forward(hidden_BSD)
        if count_among is None:
            return linear_cross_entropy_sum(hidden_BSD, self.weight, targets_BS, by_row)
        return loss_and_correct(hidden_BSD, self.weight, targets_BS, count_among)


class Transformer(nn.Module):
    """Token ids in, logits (or the summed loss) out.

    Args:
        config: resolved: `vocab_size`, `kv_heads`, `head_dim` and `ff_dim` are set.
        seq_len: longest sequence, in tokens; sizes the position tables.
        activation_checkpointing: `none`, `full` (keep only each block's input) or `selective` (keep the results of
            matrix products and attention, recompute the cheap rest).
        document_end: the id between documents, within which attention stays and positions count anew; None: of a
            sequence with several nothing is known, and it is one text.
        may_use_flex: whether flex_attention can be compiled where it suits.
    """

    def __init__(
        self,
        config: ModelSection,
        seq_len: int,
        activation_checkpointing: str = "none",
        document_end: int | None = None,
        *,
        may_use_flex: bool = True,
    ):
        super().__init__()
        assert config.vocab_size is not None
        self.config = config
        self.seq_len = seq_len
        self.document_end = document_end
        self.may_use_flex = may_use_flex
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.position = nn.Embedding(seq_len, config.dim) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer, activation_checkpointing) for layer in range(config.layers))
        self.norm = make_norm(config)
        self.head = Head(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        rotation = rotation_table(seq_len, config) if config.positions == "rope" else None
        self.register_buffer("rotation", rotation, persistent=False)
        self.rotation: Tensor | None

    def forward(
        self,
        ids_BS: Tensor,
        targets_BS: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
        count_among: int | None = None,
        by_row: bool = False,
    ) -> Tensor:
        """Predict the next token at every position.

        Args:
            ids_BS: int64 ids.
            targets_BS: int64 ids, -100 where there is no target; None asks for logits.
            cache: positions already seen; extended in place.
            last_only: logits of the last position only, (B, 1, V).
            count_among: see below; how many ids the tokenizer has, as those after them only pad the vocabulary.
            by_row: see below.

        Returns:
            the logits (B, S, V); with targets the loss summed over them, in nats (float32 scalar); `by_row` also over
            those of each row (float32 (1 + B,), of which only the first has a gradient); with `count_among` also the
            number of targets that have the highest logit of the first so many ids (float32 (2,), without a gradient).
        """
        hidden_BSD = self.hidden(ids_BS, cache)
        if last_only:
            hidden_BSD = hidden_BSD[:, -1:]
        out: Tensor = self.head(hidden_BSD, targets_BS, count_among, by_row)
        return out

    def hidden(self, ids_BS: Tensor, cache: KVCache | None = None) -> Tensor:
        """The normalised residual stream (B, S, D) after the last block."""
        begin = cache.length if cache is not None else 0
        end = begin + ids_BS.shape[1]
        if end > self.seq_len:
            raise ValueError(f"{end} positions, but the model was built for {self.seq_len}")
        x_BSD = self.embedding(ids_BS)
        documents = self._documents(ids_BS, x_BSD.dtype, cache) if self.document_end is not None else None
        if self.position is not None:
            x_BSD = x_BSD + (self.position(documents.positions) if documents else self.position.weight[begin:end])
        x_BSD = self.dropout(x_BSD)
        rotation, mask = None, documents.mask if documents else None
        if self.rotation is not None:  # (2, S, E), or (2, B, 1, S, E)
            rotation = self.rotation[:, documents.positions].unsqueeze(2) if documents else self.rotation[:, begin:end]
        for block in self.blocks:
            x_BSD = block(x_BSD, rotation, cache, mask)
        if cache is not None:
            cache.length = end
        normed_BSD: Tensor = self.norm(x_BSD)
        return normed_BSD

    def _documents(self, ids_BS: Tensor, dtype: torch.dtype, cache: KVCache | None) -> Documents:
        assert self.document_end is not None
        device = ids_BS.device
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        # Each other length would be compiled for itself, until torch gave up and made all scores.
        is_whole = cache is None and ids_BS.shape[1] == self.seq_len
        use_flex = self.may_use_flex and is_whole and flex_suits(device, self.config.head_width, self.config.dropout)
        seen_BT = ids_BS if cache is None else cache.see(ids_BS)
        return within_documents(seen_BT, ids_BS.shape[1], self.document_end, dtype, use_flex=use_flex)

    @torch.no_grad()
    def init_weights(self, opened: Callable[[list[nn.Parameter]], AbstractContextManager[Any]] = nullcontext) -> None:
        """Give every parameter its first value; a module type that is not listed here is an error.

        Matrices: normal with standard deviation 1/√fan_in, so that activations keep their size at any width; those that
        write to the residual stream divided by √(2 × layers), so that it does at any depth (Radford et al. 2019).
        An untied head starts at zero and its embedding at standard deviation 1, so that a token is as loud in the
        residual stream as what the blocks write. A tied one must be small beside that, or the head would predict that
        every token repeats; capped so that the first logits stay near zero. So the first loss is ln(vocab). Biases
        start at zero. Measured against other choices in docs/LOG.md.

        Args:
            opened: entered around each module's parameters while they are written; where they are cut over ranks, it
                makes them whole.
        """
        small = min(0.02, 0.3 * self.config.dim**-0.5)
        residual_scale = (2 * self.config.layers) ** -0.5
        for name, module in self.named_modules():
            parameters = list(module.parameters(recurse=False))
            if not parameters or (module is self.head and self.config.tie_embeddings):
                continue  # a tied head is the embedding itself
            with opened(parameters):
                match module:
                    case nn.Linear() if module is self.head:
                        nn.init.zeros_(module.weight)
                    case nn.Linear():
                        nn.init.normal_(module.weight, std=module.in_features**-0.5)
                        if module.bias is not None:
                            nn.init.zeros_(module.bias)
                        if name.endswith(("attention.out", "ff.down")):
                            module.weight.mul_(residual_scale)
                    case nn.Embedding() if module is self.embedding and not self.config.tie_embeddings:
                        nn.init.normal_(module.weight, std=1.0)
                    case nn.Embedding():
                        nn.init.normal_(module.weight, std=small)
                    case nn.RMSNorm() | nn.LayerNorm():
                        nn.init.ones_(module.weight)
                    case _:
                        raise TypeError(f"no initialisation for {type(module).__name__}")
        if self.rotation is not None:
            self.rotation.copy_(rotation_table(self.seq_len, self.config))


class RMSNorm(nn.RMSNorm):
    """RMSNorm in float32 whatever comes in: under autocast torch leaves it in bf16, unfused and imprecise."""

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root mean square over the last dimension."""
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return F.rms_norm(x.float(), list(self.normalized_shape), self.weight, self.eps)
        y: Tensor = NormedByRMS.apply(x.float(), self.weight, self.eps)  # type: ignore[no-untyped-call]
        return y


class NormedByRMS(torch.autograd.Function):
    """`F.rms_norm` on a CPU, where torch has no kernel for it: half the time, and kept as a kernel keeps it: its input
    and the root mean squares, not the quotient. To the bit the same result and gradients; but what autograd adds up
    with these it adds in another order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x (…, D) divided by the root mean square of each row, times weight (D,); laid out row by row."""
        x = x.contiguous()
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """As autograd differentiates the forward pass; a factor of 2 may be anywhere in a product."""
        x, weight, scale = ctx.saved_tensors
        of_weight = (gradient * (x * scale)).sum(tuple(range(x.dim() - 1)))
        of_quotient = gradient * weight
        of_scale = (of_quotient * x).sum(-1, keepdim=True)
        of_squares = (of_scale * -0.5 * scale.pow(3)) / x.shape[-1]
        return of_quotient.mul_(scale).add_(x * (of_squares * 2)), of_weight, None


def make_norm(config: ModelSection) -> nn.Module:
    """RMSNorm (Zhang and Sennrich 2019), or LayerNorm without bias."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.dim, eps=config.norm_eps)
    return nn.LayerNorm(config.dim, eps=config.norm_eps, bias=False)


def rotation_table(seq_len: int, config: ModelSection) -> Tensor:
    """Cosines and sines of rotary positions (Su et al. 2021): float32 (2, seq_len, head width)."""
    width = config.head_width
    frequencies: Tensor = config.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    if config.rope_scaling is not None:
        frequencies = stretch(frequencies, config.rope_scaling)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequencies).repeat(1, 2)
    return torch.stack((angles.cos(), angles.sin()))


def stretch(frequencies: Tensor, scaling: RopeScalingSection) -> Tensor:
    """Frequencies (radians a token) divided by up to `factor`, the low ones by all of it: Llama 3.1's rule, which is in
    its code only (meta-llama/llama-models, models/llama3/model.py, `apply_scaling`).
    """
    waves = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # that fit into the original length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((waves - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(x_BHSE: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs (i, i + E/2) of each head by the angle of its position; the order of pairs is Llama's."""
    cos_SE, sin_SE = rotation.unbind()
    first, second = x_BHSE.chunk(2, dim=-1)
    return x_BHSE * cos_SE + torch.cat((-second, first), dim=-1) * sin_SE


def _keep_products(_context: object, op: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    """Selective checkpointing: keep what is expensive to recompute for its size."""
    aten = torch.ops.aten
    expensive = {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten._scaled_mm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    }
    return CheckpointPolicy.MUST_SAVE if op in expensive else CheckpointPolicy.PREFER_RECOMPUTE
