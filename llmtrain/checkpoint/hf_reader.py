"""A Hugging Face model folder as weights to start from: any slice of any parameter, from safetensors only.

Nothing in the folder is run or unpickled, and no file outside it is named. It has no hashes, so what can be checked is
that every tensor is there, in its shape and in a type that is known, and that its bytes are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError

from llmtrain.checkpoint.hf_writer import INDEX, WEIGHTS
from llmtrain.checkpoint.tensor_reader import Wish, read_file, read_header
from llmtrain.config import RunConfig
from llmtrain.data.shards import FileInfo, Report
from llmtrain.data.sources import TrainingData
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.engine import Fragment
from llmtrain.errors import CorruptError, UserError
from llmtrain.hf_config import HF_CONFIG, architecture_of, attention_window, has_output_biases, model_keys, read_json
from llmtrain.model.hf_layout import OUTPUT_BIAS, llama_name, parameter_shapes

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_THREADS = 4
# Values of another type are held until they are converted; so many bytes of them at a time, by each thread.
_BATCH_BYTES = 128 << 20
_DERIVED = (".rotary_emb.inv_freq",)  # in folders of old versions: follows from the config


class _Entry(BaseModel):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_HEADER = TypeAdapter(dict[str, _Entry | dict[str, str]])


class HuggingFaceReader:
    """A Hugging Face folder, opened by its config and the headers of its files.

    Raises:
        UserError: it has no safetensors, lacks a file, or holds a model that ours cannot be.
        CorruptError: a header is damaged.
    """

    world_size = 1

    def __init__(self, folder: Path):
        self.folder = folder
        self._config = read_json(folder / HF_CONFIG)
        self.model = model_keys(self._config, str(folder / HF_CONFIG))
        self._places: dict[str, tuple[str, _Entry]] = {}  # file and shape of each tensor
        identity = hashlib.sha256(repr(sorted(self.model.items())).encode())
        listed = _listed(folder)
        for name in sorted(set(listed.values())) or [WEIGHTS]:
            header, entries = _read_entries(folder / name)
            identity.update(name.encode() + header)
            # A tensor that the index puts elsewhere is none of this file's.
            self._places |= {key: (name, entry) for key, entry in entries.items() if listed.get(key, name) == name}
        if missing := listed.keys() - self._places.keys():
            key = min(missing)
            raise UserError(f"{folder / INDEX}: '{key}' is not in {listed[key]}, where it should be")
        self.digest = identity.hexdigest()

    def check_records(self, report: Report = lambda _bytes: None) -> list[str]:
        """Nothing is left to check: the headers have been read."""
        return []

    def tensor_files(self) -> list[FileInfo]:
        """The files with a recorded hash: none."""
        return []

    def accept(self, config: RunConfig, data: TrainingData) -> None:
        """Check that these weights can start a run.

        Raises:
            UserError: another tokenizer, another model, or tensors that do not fit; says which.
        """
        own = config.model.model_dump()
        for key, theirs in self.model.items():
            if (ours := own[key]) != theirs:
                raise UserError(f"model.init_from {self.folder}: its {key} is {theirs}, this run's is {ours}")
        window = attention_window(self._config, str(self.folder / HF_CONFIG))
        if window is not None and config.data.seq_len > window:
            raise UserError(
                f"model.init_from {self.folder}: a token sees the {window} before it (sliding_window), here all of "
                f"data.seq_len={config.data.seq_len}; choose a seq_len of at most {window}"
            )
        self._check_tensors(parameter_shapes(config.model, config.data.seq_len))
        self._check_tokenizer(data)

    def summary(self) -> str:
        """What the weights are, in a line."""
        stored = sorted({_DTYPES[entry.dtype] for _, entry in self._places.values() if entry.dtype in _DTYPES})
        cast = ", trained as float32" if stored != ["float32"] else ""
        architecture = architecture_of(self._config, HF_CONFIG)
        return f"starting with the weights of {self.folder}: {architecture}, stored in {' and '.join(stored)}{cast}"

    def load(
        self,
        wanted: Iterable[Fragment],
        check: Collection[str],
        *,
        is_shared: bool = False,
        report: Report = lambda _bytes: None,
    ) -> list[str]:
        """Fill the fragments' values, converted to their type; see `CheckpointReader.load`.

        Args:
            wanted: any slices of the weights.
            check: nothing: no file has a recorded hash.
            is_shared: other ranks read the same files.
            report: called with the number of bytes that were read.

        Returns:
            one line for each file that is wrong.
        """
        wishes: dict[str, list[Wish]] = {}
        for fragment in wanted:
            name = llama_name(fragment.name.removeprefix("model/"))
            file, entry = self._place(name)
            numel = fragment.values.numel()
            if numel:
                whole = math.prod(entry.shape)
                wishes.setdefault(file, []).append(Wish(name, whole, fragment.start, fragment.values, entry.shape))

        def read(batch: tuple[str, list[Wish]]) -> str | None:
            path = self.folder / batch[0]
            try:
                read_file(path, batch[1], whole=False, is_shared=is_shared, report=report)
            except OSError as error:
                return f"{path}: cannot be read ({error.strerror})"
            except CorruptError as error:
                return str(error)
            return None

        batches = [(file, batch) for file, own in wishes.items() for batch in _batches(own)]
        with ThreadPoolExecutor(max_workers=_THREADS) as pool:
            return [line for line in pool.map(read, batches) if line]

    def _place(self, name: str) -> tuple[str, _Entry]:
        if name not in self._places:
            raise UserError(f"{self.folder}: has no tensor '{name}', which its architecture has")
        return self._places[name]

    def _check_tensors(self, shapes: dict[str, tuple[int, ...]]) -> None:
        expected = {llama_name(name): shape for name, shape in shapes.items()}
        for name, shape in expected.items():
            file, entry = self._place(name)
            if entry.shape != shape:
                raise UserError(
                    f"{self.folder / file}: '{name}' has shape {list(entry.shape)}, by {HF_CONFIG} it has {list(shape)}"
                )
            if entry.dtype not in _DTYPES:
                raise UserError(
                    f"{self.folder / file}: '{name}' is stored as {entry.dtype}; weights can be read from "
                    f"{', '.join(_DTYPES)}"
                )
        may_be_there = {"lm_head.weight"} if self.model["tie_embeddings"] else set()  # a copy of the embedding
        for name in self._places.keys() - expected.keys() - may_be_there:
            if has_output_biases(self._config) and name.endswith(OUTPUT_BIAS):
                self._check_zero(name)
            elif not name.endswith(_DERIVED):
                raise UserError(f"{self.folder}: has a tensor '{name}', which this model does not have")

    def _check_zero(self, name: str) -> None:
        file, entry = self._place(name)
        values = torch.empty(math.prod(entry.shape))
        wish = Wish(name, values.numel(), 0, values, entry.shape)
        try:
            read_file(self.folder / file, [wish], whole=False, is_shared=True, report=lambda _bytes: None)
        except OSError as error:
            raise UserError(f"{self.folder / file}: cannot be read ({error.strerror})") from error
        if values.any():
            raise UserError(
                f"{self.folder / file}: '{name}' is not zero, but this model has no bias there (attention_bias), only "
                "on queries, keys and values"
            )

    def _check_tokenizer(self, data: TrainingData) -> None:
        from llmtrain.data.tokenizer_same import first_difference  # which most runs need not load

        theirs = load_tokenizer(self.folder)
        if difference := first_difference(theirs, load_tokenizer(data.tokenizer_folder)):
            raise UserError(
                f"model.init_from {self.folder}: its tokenizer is not that of {data.where}: {difference}; prepare the "
                f"data with --tokenizer {self.folder}"
            )


def _listed(folder: Path) -> dict[str, str]:
    """The file of each tensor by the index; empty where there is one file, which counts first, as for transformers."""
    if (folder / WEIGHTS).is_file():
        return {}
    if not (folder / INDEX).is_file():
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        why = f"; {others[0]} is a pickle, which can run any code when it is read, so it never is" if others else ""
        raise UserError(f"{folder}: has no {WEIGHTS} and no {INDEX}{why}; save the model as safetensors")
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{folder / INDEX}: its weight_map must name a file for each tensor")
    for name in sorted(set(places.values())):
        # By its name: in the hub's own cache the files are links to elsewhere.
        if PurePosixPath(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise UserError(f"{folder / INDEX}: names '{name}', which is no .safetensors file of the folder; refused")
        if not (folder / name).is_file():
            raise UserError(f"{folder / INDEX}: names {name}, which is not there; copy the folder again")
    return places


def _read_entries(path: Path) -> tuple[bytes, dict[str, _Entry]]:
    """The header of a file as it is, and what it says of each tensor."""
    try:
        size = path.stat().st_size
        header = read_header(path, size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        entries = _HEADER.validate_json(header)
    except ValidationError as error:
        raise CorruptError(f"{path}: cannot be read: its header is wrong: {error.errors()[0]['msg']}") from error
    tensors = {key: entry for key, entry in entries.items() if isinstance(entry, _Entry)}
    end = 8 + len(header) + max((entry.data_offsets[1] for entry in tensors.values()), default=0)
    if end > size:
        raise CorruptError(f"{path}: ends at byte {size:,} of {end:,}; copy it again")
    return header, tensors


def _batches(wishes: Sequence[Wish]) -> Iterator[list[Wish]]:
    batch: list[Wish] = []
    size = 0
    for wish in wishes:
        batch.append(wish)
        size += wish.into.nbytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
