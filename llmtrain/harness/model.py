"""A trained model as lm-evaluation-harness asks for one: how likely is a text after another, and what comes next.

Texts become ids as in training: no special id but the one that ends documents, which stands before a text that begins
(and before every one of a model with `data.document_mask`, as in `generate`). Of what is longer than the model sees the
end is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llmtrain.checkpoint.load import TrainedModel
from llmtrain.errors import UserError
from llmtrain.model.sampling import SamplingOptions, prompt_ids, sample
from llmtrain.model.writer import Writer

_Pair = tuple[Any, list[int], list[int]]  # (whatever it was made of, ids before, ids to be scored)
Item = TypeVar("Item")
MAX_NEW_TOKENS = 256  # of an answer whose task does not say, lm_eval's own default


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval is not typed
    """See the protocol of `lm_eval.api.model.LM`; of several ranks each answers everything, for ZeRO needs all in step.

    Args:
        trained: the model.
        rows: of a batch.
    """

    def __init__(self, trained: TrainedModel, rows: int):
        super().__init__()
        self._trained, self._rows = trained, rows

    @property
    def max_length(self) -> int:
        """Inputs that the model sees at once."""
        return self._trained.config.data.seq_len

    @property
    def eot_token_id(self) -> int:
        """The id that ends documents, and stands before a text that begins."""
        return self._trained.tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        """Tells one tokenizer from another."""
        return self._trained.reader.manifest.tokenizer_sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, and no others.

        Raises:
            UserError: a character that the tokenizer lacks.
        """
        ids: list[int] = self._trained.tokenizer.encode(string).tolist()
        return ids

    def _loglikelihood_tokens(self, requests: Sequence[_Pair], **_: Any) -> list[tuple[float, bool]]:
        """The log-probability of the second ids of each after the first, and whether they are the most likely ones.

        Raises:
            UserError: the second are more than the model sees.
        """
        begins = self._trained.config.data.document_mask
        scored: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Long ones first: a batch is padded to its longest, and what does not fit into memory shows at once.
        order = sorted(range(len(requests)), key=lambda at: -len(requests[at][1]) - len(requests[at][2]))
        with self._trained.engine.evaluating() as model:
            for batch in _in_batches(order, self._rows):
                pairs = []
                for at in batch:
                    _text, before, after = requests[at]
                    if len(after) > self.max_length:
                        raise UserError(
                            f"--tasks: an answer has {len(after)} tokens, and this model sees {self.max_length} at once"
                        )
                    if begins and before[:1] != [self.eot_token_id]:
                        before = [self.eot_token_id, *before]
                    pairs.append(([*before, *after], len(after)))
                for at, score in zip(batch, self._score(model, pairs), strict=True):
                    scored[at] = score
        return scored

    def _score(self, model: torch.nn.Module, pairs: Sequence[tuple[list[int], int]]) -> Iterator[tuple[float, bool]]:
        """Of (ids, how many of the last are scored), each cut to what the model sees."""
        seq_len = self.max_length
        rows = [ids[-seq_len - 1 :] for ids, _ in pairs]
        width = max(map(len, rows)) - 1
        inputs_BS = torch.zeros(len(rows), width, dtype=torch.int64)
        for row, ids in zip(inputs_BS, rows, strict=True):
            row[: len(ids) - 1] = torch.tensor(ids[:-1])  # what follows pads; it is after all that is looked at
        logits_BSV = model(inputs_BS.to(self._trained.engine.device))[..., : self._trained.tokenizer.vocab_size]
        for ids, (_, count), logits_SV in zip(rows, pairs, logits_BSV, strict=True):
            log_p_NV = logits_SV[len(ids) - 1 - count : len(ids) - 1].float().log_softmax(-1)
            targets_N = torch.tensor(ids[len(ids) - count :], dtype=torch.int64, device=log_p_NV.device)
            nats = log_p_NV.gather(1, targets_N[:, None]).sum().item()
            yield nats, bool((log_p_NV.argmax(-1) == targets_N).all())

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text; each token once, in windows that begin with the one before."""
        windows: list[tuple[int, list[int], list[int]]] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            cut = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.max_length, context_len=1)
            windows += [(number, *make_disjoint_window(window)) for window in cut]
        totals = [0.0] * len(requests)
        for (number, _, _), (nats, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += nats
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop string, the end of a document or the longest length.

        Raises:
            UserError: a task asks for something that `llmtrain generate` has not.
        """
        return [self._write(*request.args) for request in requests]

    def _write(self, context: str, asked: dict[str, Any]) -> str:
        options = dict(normalize_gen_kwargs(asked, MAX_NEW_TOKENS))
        until, tokens = options.pop("until", None) or [], options.pop("max_gen_toks")
        is_greedy = not options.pop("do_sample", False)
        temperature = float(options.pop("temperature", 1.0) or 0.0)
        chosen = SamplingOptions(
            temperature=0.0 if is_greedy else temperature,
            top_k=options.pop("top_k", None),
            top_p=options.pop("top_p", None),
            vocab_size=self._trained.tokenizer.vocab_size,
        )
        if options:
            raise UserError(f"--tasks: a task asks to generate with {', '.join(options)}, which llmtrain has not")
        tokenizer, mask = self._trained.tokenizer, self._trained.config.data.document_mask
        start = prompt_ids(tokenizer, context, begins_document=mask)
        writer = Writer(tokenizer, start, [until] if isinstance(until, str) else until, seed=0)
        with self._trained.engine.evaluating() as model:
            prompt_BS = torch.tensor([start], device=self._trained.engine.device)
            for ids_B in itertools.islice(sample(model, prompt_BS, chosen, [0]), tokens):
                writer.add(int(ids_B[0]))
                if writer.ended:
                    break
            writer.out_of_length()
        return writer.sample().text


def _in_batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[begin : begin + size] for begin in range(0, len(items), size))
