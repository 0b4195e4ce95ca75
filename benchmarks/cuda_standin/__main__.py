"""Run a command on GPUs that are not there: the host's side of CUDA is real, kernels do nothing.

    python -m benchmarks.cuda_standin [--gpus 2] COMMAND ...
    python -m benchmarks.cuda_standin --gpus 2 python -m benchmarks.gpu_memory

For a torch that was built for CUDA, on a Linux machine without a GPU, with `g++` and `nm`. Losses are then nothing, and
times are the host's alone. What is to be trusted is what does not depend on values: which operators run, the bytes
that torch's allocator holds, when the host would wait, and that compiled blocks compile (Triton's compiler is real).
Not there: cuDNN, CUPTI (so no `training.profile`), CUDA graphs, peers that write into each other's memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = {"libcudart_standin.so": HERE / "runtime.cpp", "libcuda.so.1": HERE / "driver.cpp"}
ASKED_FOR = r"\b(?:__cuda|cuda|cublas|nccl)\w+"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if not args.command:
        parser.error("which command?")
    found = importlib.util.find_spec("torch")
    libraries = Path(str(found and found.origin)).parent / "lib"
    if not (libraries / "libtorch_cuda.so").exists():
        parser.error("the torch of this python is not built for CUDA")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, libraries)
        paths = {"LD_LIBRARY_PATH": [folder], "PYTHONPATH": [HERE.parents[1], HERE / "site"]}
        joined = {key: os.pathsep.join([*map(str, value), os.environ.get(key, "")]) for key, value in paths.items()}
        environment = {
            **os.environ, **joined, "LD_PRELOAD": str(folder / "libcudart_standin.so"),
            "TRITON_LIBCUDA_PATH": name, "STANDIN_GPUS": str(args.gpus),
        }  # fmt: skip
        return subprocess.run(args.command, env=environment, check=False).returncode


def build(folder: Path, libraries: Path) -> None:
    """Make both libraries there; of what torch asks for and the sources do not have, functions that answer 0."""
    site = libraries.parents[1]
    headers = [*site.glob("nvidia/*/include"), site / "triton/backends/nvidia/include"]  # the first have no crt/
    asked = set[str]()
    for library in ("libtorch_cuda.so", "libc10_cuda.so", "libtorch_python.so"):
        told = subprocess.run(
            ["nm", "-D", "--undefined-only", libraries / library], check=True, capture_output=True, text=True
        )
        asked |= set(re.findall(ASKED_FOR, told.stdout))
    driver = set[str]()
    for header in headers[:-1]:
        if (header / "cuda.h").exists():
            declared = re.findall(r"CUresult CUDAAPI (cu\w+)\(", (header / "cuda.h").read_text())
            driver |= {name + ending for name in declared for ending in ("", "_v2", "_v3", "_ptsz")}
    for (name, source), wanted in zip(SOURCES.items(), (asked, driver), strict=True):
        rest = folder / f"{source.stem}_rest.c"
        there = set(re.findall(r"\b\w+(?=\()", source.read_text()))
        rest.write_text("".join(f"int {function}(void) {{ return 0; }}\n" for function in sorted(wanted - there)))
        subprocess.run(["gcc", "-c", "-fPIC", "-w", rest, "-o", rest.with_suffix(".o")], check=True)
        linked = [f"-L{folder}", "-l:libcudart_standin.so"] if source.stem == "driver" else []
        subprocess.run(
            ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", *(f"-I{header}" for header in headers), source,
             rest.with_suffix(".o"), *linked, "-ldl", "-o", folder / name], check=True,
        )  # fmt: skip
    (folder / "libcuda.so").symlink_to("libcuda.so.1")


if __name__ == "__main__":
    sys.exit(main())
