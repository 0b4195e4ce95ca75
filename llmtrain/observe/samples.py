"""What the model writes while it learns: from each configured prompt, with the same luck every time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.config import RunConfig
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.model.sampling import SamplingOptions, prompt_ids, sample
from llmtrain.model.transformer import Transformer

_TEMPERATURE = 0.8


class Samples:
    """The prompts as ids, read once; where no samples are asked for there are none, and the tokenizer is not loaded.

    Raises:
        UserError: a prompt has a character that the tokenizer lacks.
        CorruptError: the tokenizer is damaged.
    """

    def __init__(self, tokenizer_folder: Path, config: RunConfig):
        training = config.training
        self._seed, self._length = config.run.seed, training.sample_tokens
        self._prompts: list[tuple[str, list[int]]] = []
        if training.sample_every:
            self._tokenizer = load_tokenizer(tokenizer_folder)  # imports its library
            begins = config.data.document_mask
            self._prompts = [
                (text, prompt_ids(self._tokenizer, text, begins_document=begins)) for text in training.sample_prompts
            ]

    def write(
        self, model: Transformer, device: torch.device, through: Callable[[Iterator[Tensor]], Iterator[Tensor]]
    ) -> Iterator[tuple[str, str]]:
        """Yield each prompt, and what is written after it; `through` goes through the tokens and may take note."""
        options = SamplingOptions(temperature=_TEMPERATURE, vocab_size=self._tokenizer.vocab_size)
        for prompt, ids in self._prompts:
            prompt_BS = torch.tensor([ids], device=device)
            tokens = through(sample(model, prompt_BS, options, seeds=[self._seed]))
            written = [int(token) for token in itertools.islice(tokens, self._length)]
            yield prompt, self._tokenizer.decode(written)
