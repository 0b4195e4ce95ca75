"""Sample text from a run or a checkpoint: to the terminal as it is written, as JSON, or prompt by prompt."""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from llmtrain.checkpoint.load import TrainedModel, load_model
from llmtrain.errors import UserError, run_main
from llmtrain.model.sampling import SamplingOptions, prompt_ids, sample
from llmtrain.model.writer import Sample, Writer
from llmtrain.observe.formats import printable
from llmtrain.parsers import QUIT
from llmtrain.parsers import generate_parser as parser

# Samples written side by side: more would need the memory of as many key-value caches.
ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Request:
    """What is asked for, for any prompt."""

    options: SamplingOptions
    max_new_tokens: int
    stops: tuple[str, ...]
    samples: int
    seed: int | None  # None: another one for each prompt

    def write(self, trained: TrainedModel, prompt: str, show: Callable[[str], None]) -> list[Sample]:
        """Continue a prompt.

        Args:
            trained: the model.
            prompt: may be empty: the model then begins a document.
            show: gets the prompt, then what follows piece by piece; nothing where several samples are written at once.

        Raises:
            UserError: the prompt has a character that the tokenizer lacks.
        """
        tokenizer = trained.tokenizer
        start = prompt_ids(tokenizer, prompt, begins_document=trained.config.data.document_mask)
        if self.samples > 1:
            show = _ignore
        show(prompt)
        first = secrets.randbelow(2**32) if self.seed is None else self.seed
        writers = [Writer(tokenizer, start, self.stops, first + index) for index in range(self.samples)]
        with trained.engine.evaluating() as model:
            for begin in range(0, self.samples, ROWS_AT_ONCE):
                batch = writers[begin : begin + ROWS_AT_ONCE]
                prompt_BS = torch.tensor([start], device=trained.engine.device).expand(len(batch), -1)
                seeds = range(first + begin, first + begin + len(batch))
                chosen = sample(model, prompt_BS, self.options, seeds)
                for ids_B in itertools.islice(chosen, self.max_new_tokens):
                    for writer, token in zip(batch, ids_B.tolist(), strict=True):
                        if writer.ended is None:
                            show(writer.add(token))
                    if all(writer.ended for writer in batch):
                        break
                for writer in batch:
                    show(writer.out_of_length())
        return [writer.sample() for writer in writers]


def _ignore(_text: str) -> None:
    pass


class Screen:
    """Standard output: text appears at once, and cannot command a terminal."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()

    def show(self, text: str) -> None:
        """Print without a line break."""
        print(printable(text) if self._is_terminal else text, end="", flush=True)

    def answer(self, request: Request, trained: TrainedModel, prompt: str) -> None:
        """Print the prompt and its continuation, or several under headings."""
        written = request.write(trained, prompt, self.show)
        if request.samples == 1:
            self.show("\n")
            return
        for number, sample_ in enumerate(written, start=1):
            self.show(f"--- sample {number} of {request.samples}, seed {sample_.seed}\n{prompt}{sample_.text}\n")

    def converse(self, request: Request, trained: TrainedModel) -> None:
        """Read prompts, one a line, and answer each; an answer is ended by Ctrl-C, the session by Ctrl-D."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 -- gives input() its editing keys and its history
        self.show(f"Each line is a prompt of its own. Ctrl-C ends an answer, {QUIT} or Ctrl-D the session.\n")
        while True:
            try:
                line = input("> ")
            except EOFError:
                self.show("\n")
                return
            if line.strip() == QUIT:
                return
            try:
                self.answer(request, trained, line)
            except UserError as error:
                print(f"llmtrain: error: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                self.show("\n")


def _as_json(trained: TrainedModel, prompt: str, samples: list[Sample]) -> str:
    return json.dumps(
        {
            "checkpoint": str(trained.reader.folder),
            "step": trained.reader.manifest.step,
            "prompt": prompt,
            "samples": [asdict(sample_) for sample_ in samples],
        }
    )


def _request(args: Namespace, trained: TrainedModel) -> Request:
    options = SamplingOptions(
        temperature=0.0 if args.greedy else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        vocab_size=trained.tokenizer.vocab_size,
    )
    return Request(options, args.max_new_tokens, tuple(args.stop), args.num_samples, args.seed)


def main(argv: list[str]) -> None:
    """`llmtrain generate`."""
    args = parser().read(argv)
    if "" in args.stop:
        raise UserError("--stop: an empty text would end every sample at once")
    if args.interactive and (args.json or args.prompt):
        raise UserError("--interactive reads its prompts from the terminal; leave --prompt and --json out")
    with load_model(args.path) as trained:
        request = _request(args, trained)
        if args.interactive:
            Screen().converse(request, trained)
        elif args.json:
            print(_as_json(trained, args.prompt, request.write(trained, args.prompt, _ignore)))
        else:
            Screen().answer(request, trained, args.prompt)


if __name__ == "__main__":
    sys.exit(run_main(main))
