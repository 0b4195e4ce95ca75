"""Overlapping windows in which every target counts once, with as much before it as the model can see.

Windows that do not overlap let a target see half a window on average, and the first one nothing. Here each window
begins `stride` tokens after the last and only its last `stride` targets count, which have at least `seq_len` - `stride`
inputs before their own (the sliding window of "Perplexity of fixed-length models" in the documentation of Hugging Face
transformers; Baevski and Auli 2019, section 4.3). The last window ends with the stream, so it is as long as the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from llmtrain.data.order import Int64s
from llmtrain.data.shards import TokenStream


@dataclass(frozen=True)
class SlidingWindows:
    """The windows over a stream, which may be shorter than one.

    Args:
        stream: the tokens; two at least.
        longest: inputs of a window, where the stream has so many.
        stride: at most `longest`, with which windows do not overlap but for the last.
    """

    stream: TokenStream
    longest: int
    stride: int

    @property
    def seq_len(self) -> int:
        """Inputs of one window, and targets."""
        return min(self.longest, self._targets)

    @property
    def _targets(self) -> int:
        return len(self.stream) - 1

    def __len__(self) -> int:
        return 1 - (self.seq_len - self._targets) // self.stride

    def _ends(self, ids: Int64s) -> Int64s:
        """How many targets of the stream are in each window or before it."""
        return np.minimum(self.seq_len + ids * self.stride, self._targets)

    def gather(self, ids: Int64s) -> torch.Tensor:
        """Read windows `ids` as (len(ids), seq_len + 1) tokens in the stored dtype; row[1:] are the targets."""
        return torch.from_numpy(self.stream.gather(self._ends(ids) - self.seq_len, self.seq_len + 1))

    def counted(self, ids: Int64s) -> Int64s:
        """How many targets at the end of each window count, (len(ids),): all that were in none before."""
        return self._ends(ids) - np.where(ids > 0, self._ends(ids - 1), 0)
