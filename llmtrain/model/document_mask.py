"""Attention that stays within documents, for windows that hold several: each token sees only its own, from its start.

An input position belongs to the document of the token that it predicts: the end-of-document id, which closes one, opens
the next. So no target is lost, the first token of a document is learned too (from the id that `generate` begins with),
and everything follows from the input ids, on the device. What a window begins with, up to its first end-of-document id,
is the rest of a document.

Two ways give the same to rounding. The reference, on any device: scaled_dot_product_attention with a mask. On CUDA:
flex_attention (Dong et al. 2024), which leaves out the blocks of keys that are no query's, so less is computed the
shorter documents are.

Letters as in transformer.py; N is the number of blocks of `BLOCK` positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # positions in a block of flex_attention, its default; the last one may be shorter
LEAST_HEAD_DIM = 16  # of flex_attention's kernels

Mask: TypeAlias = "Tensor | BlockMask"


@dataclass(frozen=True)
class Documents:
    """Of a micro-batch."""

    positions: Tensor  # (B, S) int64, of each token in its document
    mask: Mask


def within_documents(ids_BT: Tensor, new: int, document_end: int, dtype: torch.dtype, *, use_flex: bool) -> Documents:
    """Find the documents, and make the mask that all layers share.

    Args:
        ids_BT: input ids, those in a cache first.
        new: how many of them, S, are new; those attend.
        document_end: the id that closes a document and opens the next.
        dtype: of queries; the reference adds its mask to their scores.
        use_flex: as `flex_suits` says, and nothing is cached.
    """
    begins_BT = document_begins(ids_BT, document_end)
    index_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    positions_BS = (index_T - begins_BT)[:, -new:]
    return Documents(positions_BS, block_mask(begins_BT) if use_flex else _added_mask(begins_BT, index_T, new, dtype))


def document_begins(ids_BT: Tensor, document_end: int) -> Tensor:
    """(B, T) int64: the index at which the document of each input begins. It never falls along T."""
    return (_repeated_begins if ids_BT.device.type == "cpu" else _scanned_begins)(ids_BT, document_end)


def _scanned_begins(ids_BT: Tensor, document_end: int) -> Tensor:
    """Without a number that the host would have to wait for."""
    index_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    return (index_T * (ids_BT == document_end)).cummax(-1).values


def _repeated_begins(ids_BT: Tensor, document_end: int) -> Tensor:
    """Each of the few begins as often as its document is long: half the time of the scan, on the CPU."""
    rows, length = ids_BT.shape
    is_bound = np.ones(rows * length + 1, np.bool_)  # a document or a row begins here, or the last one ends
    begins_BT = is_bound[:-1].reshape(rows, length)
    np.equal(ids_BT.numpy(), document_end, out=begins_BT)
    begins_BT[:, :1] = True
    bounds = is_bound.nonzero()[0]
    firsts = bounds[:-1] % length
    return torch.from_numpy(firsts.repeat(bounds[1:] - bounds[:-1]).reshape(rows, length))


def flex_suits(device: torch.device, head_dim: int, dropout: float) -> bool:
    """Whether flex_attention has a kernel for it: only on CUDA, and it knows no dropout."""
    return device.type == "cuda" and head_dim >= LEAST_HEAD_DIM and not dropout


def _added_mask(begins_BT: Tensor, index_T: Tensor, new: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, S, T): 0 where a query may look, else -inf.

    Of the queries' dtype: a bool mask is turned into such a one by every layer, and every layer keeps its own.
    """
    same_BST = begins_BT[:, -new:, None] == begins_BT[:, None, :]
    seen_BST = same_BST & (index_T[-new:, None] >= index_T)
    added_BST = torch.zeros(seen_BST.shape, dtype=dtype, device=seen_BST.device)
    return added_BST.masked_fill_(~seen_BST, -torch.inf)[:, None]


def block_mask(begins_BS: Tensor) -> BlockMask:
    """The same for flex_attention, from the blocks' first and last documents: nothing of the size S × S is made.

    Begins never fall along a row, so a block of keys before a block of queries has something for it exactly where its
    last document is their first, and has nothing else where its first is also their last.
    """
    from torch.nn.attention.flex_attention import BlockMask

    seq_len = begins_BS.shape[1]
    last_N = torch.arange(BLOCK - 1, seq_len + BLOCK - 1, BLOCK, device=begins_BS.device)
    first_BN, last_BN = begins_BS[:, ::BLOCK], begins_BS[:, last_N.clamp(max=seq_len - 1)]
    before_NN = torch.ones(len(last_N), len(last_N), dtype=torch.bool, device=begins_BS.device).tril(-1)
    whole_N1 = (last_N < seq_len)[:, None]  # what is beyond the end must be masked
    full_BNN = (first_BN[:, None, :] == last_BN[:, :, None]) & before_NN & whole_N1
    some_BNN = (last_BN[:, None, :] == first_BN[:, :, None]) & before_NN
    partial_BNN = (some_BNN & ~full_BNN) | torch.eye(len(last_N), dtype=torch.bool, device=begins_BS.device)
    return BlockMask.from_kv_blocks(
        *_in_order(partial_BNN),
        *_in_order(full_BNN),
        BLOCK_SIZE=BLOCK,
        mask_mod=_looks(begins_BS),
        seq_lengths=(seq_len, seq_len),
    )


def _in_order(blocks_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """For each block of queries how many blocks of keys it has, and which: these first. (B, 1, N), (B, 1, N, N)."""
    blocks_B1NN = blocks_BNN[:, None].int()
    return blocks_B1NN.sum(-1, dtype=torch.int32), blocks_B1NN.argsort(dim=-1, descending=True, stable=True).int()


def _looks(begins_BS: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a query may look at a key, within a block that is neither full nor empty."""

    def looks(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (begins_BS[row, query] == begins_BS[row, key])

    return looks


def flex_attention(q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: BlockMask, *, enable_gqa: bool) -> Tensor:
    """Attention (B, H, S, E) under a block mask, by a kernel that is compiled at its first use.

    In a block that is compiled itself it is a part of that.
    """
    attend = _flex_attention() if torch.compiler.is_compiling() else _compiled()
    y_BHSE: Tensor = attend(q_BHSE, k_BKSE, v_BKSE, block_mask=mask, enable_gqa=enable_gqa)
    return y_BHSE


def _flex_attention() -> Any:
    from torch.nn.attention import flex_attention as flex

    return flex.flex_attention


@cache
def _compiled() -> Any:
    return torch.compile(_flex_attention(), dynamic=False)  # uncompiled it would make all scores
