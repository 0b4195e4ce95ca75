"""Train a small Llama with the `transformers` Trainer: `python hf_trainer.py SPEC.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokens import Windows
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


def make_trainer(spec: dict[str, Any]) -> Trainer:
    config = LlamaConfig(
        vocab_size=spec["vocab_size"],
        hidden_size=spec["dim"],
        intermediate_size=spec["ff_dim"],
        num_hidden_layers=spec["layers"],
        num_attention_heads=spec["heads"],
        max_position_embeddings=spec["seq_len"],
        tie_word_embeddings=True,
    )
    arguments = TrainingArguments(
        output_dir=spec["out"],
        per_device_train_batch_size=spec["batch"],
        max_steps=spec["steps"],
        logging_steps=spec["every"],
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,  # a line for each record instead of a bar
        use_cpu=spec["device"] == "cpu",
    )
    windows = Windows(spec["tokens"], spec["seq_len"])
    return Trainer(LlamaForCausalLM(config), arguments, data_collator=collate, train_dataset=windows)


if __name__ == "__main__":
    make_trainer(json.loads(Path(sys.argv[1]).read_text())).train()
