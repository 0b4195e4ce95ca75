"""Text to `.bin` and `.idx` as Megatron-LM's tools/preprocess_data_fast.py does it, for `benchmarks.prepare`.

    python megatron_prepare.py MEGATRON TOKENIZER

MEGATRON is a checkout, TOKENIZER a folder that `transformers` reads. The tool's own file needs Python 3.12 and all that
training needs, so its steps stand here, a few calls of megatron.core. Told on standard input what to do, a line of JSON
each, [JSONL file, prefix of the output], it answers in a line with the seconds that it took. What is imported is by
then.
"""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import Namespace

# Of `_add_tokenizer_args`: what `build_tokenizer` asks for, as the tool's test sets it.
TOKENIZER = {
    "tokenizer_type": "HuggingFaceTokenizer",
    "use_gigatoken": True,
    "tokenizer_hf_no_include_special_tokens": True,
    "tokenizer_hf_no_use_fast": False,
    "trust_remote_code": False,
    "chat_template": None,
    "vocab_file": None,
    "merge_file": None,
    "special_tokens": None,
    "metadata_path": None,
    "pad_vocab_size": False,
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints
    sys.path.insert(0, sys.argv[1])
    import transformers  # noqa: F401 -- which the tokenizer imports when it is built
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    for line in sys.stdin:
        source, prefix = json.loads(line)
        began = time.perf_counter()
        tokenizer = build_tokenizer(Namespace(**TOKENIZER, tokenizer_model=sys.argv[2]))
        documents = tokenizer.tokenize_files(source, "text")
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
        builder.add_documents(documents, eod_token=tokenizer.eod)
        builder.finalize(f"{prefix}.idx")
        print(json.dumps(time.perf_counter() - began), file=answers, flush=True)


if __name__ == "__main__":
    main()
