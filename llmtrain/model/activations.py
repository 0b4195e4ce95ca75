"""Bytes of activations at each moment of a forward and backward pass, as formulas.

The count is that of Korthikanti et al. 2022, section 4 ("Reducing Activation Recomputation in Large Transformer
Models"): go through a block and add up what autograd saves for the backward pass. Theirs is a model all in 16 bits with
the scores of attention kept; here the residual stream and the norms are float32, products are in the run's precision,
and attention keeps its result and a sum for each row instead of scores (Dao et al. 2022, section 3.1). Each term was
read off the operators of a real step; tests/model/test_activations.py compares the sums.

A compiled block keeps what torch's partitioner chose from the graphs of its forward and backward pass (min-cut,
torch/_functorch/partitioners.py): results of products and attention, what these read, one number a row of each norm;
what lies between is made again by the kernels that need it. The choice knows operators and sizes, and no device, so
tests/model/test_compiled_activations.py looks it up on any machine, with the operators of a GPU.

Letters: T tokens of a micro-batch, D width, Q width of all queries, K of all keys, F feed-forward width, V
vocabulary, L layers, and h bytes of a product (2 under bf16 autocast, else 4).
"""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config import ModelSection, default_ff_dim
from llmtrain.model.limits import LONGEST_SHORT, MOST_SCORES, tokens_at_once, tokens_in_float32


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank. Never all at once: `stream`, `attention` and `feed_forward` grow block by
    block in the forward pass and shrink in the backward pass; for the rest, when it is there is said beside it.
    """

    stream: float  # float32: what each block gets from the one before
    attention: float  # kept by all blocks, norm and projections included
    feed_forward: float  # likewise
    recomputed: float  # what checkpointing makes again for one block, while its backward pass runs
    gradients: float  # of activations, while the backward pass is in one block
    output: float  # the last block's result and the final norm's, until the backward pass has left the loss
    output_gradients: float  # while the backward pass is in the final norm
    loss: float  # at the loss, forward: logits and what is made of them, and gradients if they are made at once
    loss_gradients: float  # at the loss, backward

    @property
    def kept(self) -> float:
        """What all blocks keep from their forward to their backward pass."""
        return self.stream + self.attention + self.feed_forward


def activation_memory(
    config: ModelSection,
    seq_len: int,
    micro_batch: int,
    precision: str = "bf16",
    checkpointing: str = "none",
    *,
    device: str = "cuda",
    compiled: bool = False,
) -> Activations:
    """Bytes of activations by part, without dropout.

    Attention is taken for one that keeps no scores: torch's flash, memory-efficient and cuDNN kernels on a GPU, and its
    flash kernel on a CPU; there, in bf16 and over short sequences, for one that makes a limited number of them backward
    (llmtrain/model/short_attention.py). Where torch has none of these it falls back to one that keeps several float32
    tensors of heads × seq_len² for each sequence, which is not counted here: with dropout on a CPU, and on a GPU with
    grouped keys in float32.

    Args:
        config: with `vocab_size` set.
        seq_len: tokens in a sequence.
        micro_batch: sequences.
        precision: `bf16` or `fp32`.
        checkpointing: `training.activation_checkpointing`.
        device: `cpu`, or one on which RMSNorm is one kernel; backward, several hold one tensor more.
        compiled: whether the blocks are. What they keep is exact; `gradients` are those of the order in which torch
            2.13 puts a block's backward pass on a CPU, and have not been compared with a GPU's kernels.
    """
    assert config.vocab_size is not None
    tokens = float(seq_len * micro_batch)
    width = (_CompiledWidths if compiled else _Widths)(config, 2 if precision == "bf16" else 4)
    attention, feed_forward, again = width.attention(), width.feed_forward(), 0.0
    if checkpointing == "full":
        attention, feed_forward, again = 0.0, 0.0, attention + feed_forward
    elif checkpointing == "selective":
        attention, feed_forward = width.attention_products(), width.feed_forward_products()
        again = width.attention() + width.feed_forward() - attention - feed_forward + width.never_read()
    float_stream = 4.0 * config.dim
    in_attention, in_feed_forward = width.gradients(checkpointing)
    most = tokens * max(in_attention, in_feed_forward)
    if device == "cpu" and precision == "bf16" and seq_len <= LONGEST_SHORT:
        # By then what the feed-forward kept has gone.
        short = width.short_attention(seq_len, micro_batch) + tokens * width.beside_attention()
        most = max(most, short - tokens * width.feed_forward())
    loss, loss_gradients = _loss(config, tokens, width.product, device)
    return Activations(
        stream=tokens * config.layers * float_stream,
        attention=tokens * config.layers * attention,
        feed_forward=tokens * config.layers * feed_forward,
        recomputed=tokens * again,
        gradients=tokens * float_stream + most,
        output=tokens * (2 * float_stream + width.norm()),
        output_gradients=tokens * float_stream * (3 if device == "cpu" and config.norm == "rmsnorm" else 2),
        loss=loss,
        loss_gradients=loss_gradients,
    )


class _Widths:
    """Bytes for each token that parts of a block keep for the backward pass."""

    def __init__(self, config: ModelSection, product: int):
        self.config = config
        self.product = product  # h
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.queries, self.keys = config.query_width, config.key_width
        self.ff_dim = config.ff_dim or default_ff_dim(config.dim, config.activation)
        self.ups = 2 if config.activation == "swiglu" else 1

    def norm(self) -> float:
        """A norm of the residual stream, beside its input: mean and root mean square."""
        return 8.0 if self.config.norm == "layernorm" else 4.0

    def norm_result(self, readers: int) -> float:
        """What products read of a norm's float32 result: autocast casts it anew for each of them."""
        return self.config.dim * (2.0 * readers if self.product == 2 else 4.0)

    def attention(self) -> float:
        queries, keys, product = self.queries, self.keys, self.product
        qkv = product * (queries + 2 * keys)
        # Attention's result for its own backward pass and for the projection's; a copy where heads were laid out first,
        # as the norm of queries does. And a float32 sum for each row of scores.
        result = product * queries * (2 if self.config.qk_norm else 1) + 4.0 * self.heads
        normed = 0.0
        if self.config.qk_norm:  # of what it reads, in float32
            heads = self.heads + self.kv_heads
            normed = 4.0 * (queries + keys + heads)
        return self.norm() + self.norm_result(3) + qkv + normed + result

    def feed_forward(self) -> float:
        """With the residual stream between attention and feed-forward.

        SwiGLU keeps gate, silu(gate), up and their product; the others what their function reads or makes, and makes.
        """
        inner = 4 if self.config.activation == "swiglu" else 2
        stream = 4.0 * self.config.dim
        return stream + self.norm() + self.norm_result(self.ups) + inner * self.product * self.ff_dim

    def attention_products(self) -> float:
        """What selective checkpointing keeps: results of the four products and of attention."""
        return self.product * (2.0 * self.queries + self.config.dim + 2 * self.keys) + 4.0 * self.heads

    def feed_forward_products(self) -> float:
        return self.product * (self.ups * self.ff_dim + self.config.dim)

    def never_read(self) -> float:
        """Of what selective checkpointing kept, which is taken out of store one by one: the last product."""
        return float(self.product * self.config.dim)

    def gradients(self, _checkpointing: str) -> tuple[float, float]:
        """Beyond what is kept and made again, when most is there: nothing that counts in attention; in the feed-forward
        the gradients of SwiGLU's two factors, or of the one function.
        """
        return 0.0, float(self.ups * self.product * self.ff_dim)

    def beside_attention(self) -> float:
        """Of gradients, while attention's are made on a CPU."""
        return 0.0

    def short_attention(self, seq_len: int, micro_batch: int) -> float:
        """Of a micro-batch, in all: gradients of what attention was given and made, and for as many key-value heads as
        go at once float32 scores and their gradients, what was given, and gradients of that before they are added up.
        """
        gradients = self.product * (2.0 * self.queries + 2 * self.keys) * seq_len * micro_batch
        groups = self.heads // self.kv_heads
        fitting = MOST_SCORES // (groups * seq_len**2)
        rows, columns = min(micro_batch, max(1, fitting // self.kv_heads)), max(1, min(self.kv_heads, fitting))
        query_values = groups * seq_len * self.queries // self.heads
        return gradients + 4.0 * rows * columns * (2 * groups * seq_len**2 + (6 + 2 / groups) * query_values)


class _CompiledWidths(_Widths):
    """The same of a compiled block."""

    def __init__(self, config: ModelSection, product: int):
        super().__init__(config, product)
        self.stream = float(product * config.dim)  # as products read or make it; autocast's casts are one
        self.normed_heads = config.qk_norm * product * (self.queries + self.keys)  # the products that are normed

    def attention(self) -> float:
        sums = 4.0 * (self.heads + self.config.qk_norm * (self.heads + self.kv_heads))
        given = self.product * (self.queries + 2 * self.keys)
        # Its result once more where heads were laid out first, as above.
        result = self.product * self.queries * (2 if self.config.qk_norm else 1)
        return self.norm() + self.stream + self.normed_heads + given + result + sums

    def feed_forward(self) -> float:
        """With attention's projection, from which the residual stream is made again."""
        return 2 * self.stream + self.norm() + (self.ups + 1) * self.product * self.ff_dim

    def attention_products(self) -> float:
        return self.product * (2.0 * self.queries + 2 * self.keys) + 4.0 * self.heads

    def feed_forward_products(self) -> float:
        """With attention's projection; the last product is read by nothing, and so not kept."""
        return self.stream + self.ups * self.product * self.ff_dim

    def never_read(self) -> float:
        return 0.0

    def gradients(self, checkpointing: str) -> tuple[float, float]:
        """A block's backward pass is one graph, in an order of its own: the first kernels make again all that the
        feed-forward needs, and its gradients beside that; where attention's pass through the rotation and the norm of
        heads, they are there before and after it, in float32 in between.
        """
        config, inner = self.config, self.product * self.ff_dim
        cast = self.stream if self.product == 2 else 0.0  # of the residual stream's gradient
        inner_gradients = {"none": self.ups - 1, "selective": 2 * self.ups, "full": 2 * self.ups - 1}[checkpointing]
        in_feed_forward = cast + inner_gradients * inner
        whole = self.attention() + self.feed_forward()
        if checkpointing == "selective":  # of which all beside the inner gradients is made after them
            in_feed_forward -= whole - self.attention_products() - self.feed_forward_products()
        turned = 4.0 * (config.positions == "rope") * (self.queries + self.keys)
        # Read by gradients of weights: a norm's result, what is normed, attention's result and its projection.
        read = 2 * self.stream + self.normed_heads + self.product * self.queries
        made = self.product * (self.queries + 2 * self.keys) + turned + self.normed_heads
        # And three gradients of what a norm gave, for as many products read it.
        in_attention = read + made + 3 * self.stream + self.beside_attention() - whole
        return in_attention, in_feed_forward

    def beside_attention(self) -> float:
        """The gradient of the residual stream behind it, and its cast."""
        return 4.0 * self.config.dim + (self.stream if self.product == 2 else 0.0)


def _loss(config: ModelSection, tokens: float, product: int, device: str) -> tuple[float, float]:
    """Bytes at the loss forward and backward; see llmtrain/model/loss.py."""
    assert config.vocab_size is not None
    vocab, dim = config.vocab_size, config.dim
    if product == 4 and tokens <= tokens_at_once(vocab):
        # Forward: the logits and their log-probabilities. Backward: these, their gradient, the logits' gradient.
        return tokens * 8.0 * vocab, tokens * 12.0 * vocab
    cast = 2.0 * vocab * dim if product == 2 else 0.0  # of the head's weight
    cast_hidden = 2.0 * dim if product == 2 else 0.0
    at_once = min(tokens, tokens_at_once(vocab))
    # Whole gradients of the hidden states and the weight are filled part by part; the first part makes the weight's. In
    # a part: the logits (later their gradient), and of some of them float32 copies, log-probabilities beside; or a
    # product that is added to the weight's.
    of_hidden, of_weight = 4.0 * tokens * dim, 4.0 * vocab * dim
    later = min(at_once, tokens - at_once)
    of_a_row = 8.0 if product == 2 else 4.0  # of one that is in float32
    in_float32 = tokens_in_float32(vocab, device)
    part = (product * at_once + of_a_row * min(at_once, in_float32)) * vocab
    if later:
        part = max(part, (product * later + of_a_row * min(later, in_float32)) * vocab + of_weight)
    part = max(part, product * at_once * vocab + of_weight + cast)
    return of_hidden + cast + at_once * cast_hidden + part, of_hidden + of_weight
