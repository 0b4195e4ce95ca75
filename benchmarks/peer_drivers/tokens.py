"""Windows of a file of uint16 token ids, for the trainers that want a `Dataset`."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset


class Windows(Dataset[torch.Tensor]):
    """Consecutive windows of `length` ids, int64."""

    def __init__(self, path: str, length: int):
        self.ids = np.memmap(path, dtype=np.uint16, mode="r")
        self.length = length

    def __len__(self) -> int:
        return len(self.ids) // self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        begin = index * self.length
        return torch.from_numpy(self.ids[begin : begin + self.length].astype(np.int64))
