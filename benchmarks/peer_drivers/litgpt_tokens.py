"""Token files for `litgpt pretrain --data litgpt_tokens.TokenFiles`, in the process that trains."""

from __future__ import annotations

from typing import Any

import torch
from litgpt.data import DataModule
from tokens import Windows
from torch.utils.data import DataLoader


class TokenFiles(DataModule):
    def __init__(self, train: str, val: str):
        super().__init__()
        self.train, self.val = train, val

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int = -1) -> None:
        self.batch_size, self.length = batch_size, max_seq_length + 1  # the next token as well

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(Windows(self.train, self.length), batch_size=self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[torch.Tensor]:
        return DataLoader(Windows(self.val, self.length), batch_size=self.batch_size)
