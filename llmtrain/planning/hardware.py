"""GPUs as data: speed, memory and links, of each kind that `plan` knows.

Where the numbers come from:

- Peaks, bandwidth of the memory, and NVLink: the vendor's datasheets (NVLink and PCIe: half of the quoted sum of both
  directions).
- Memory: the total that torch names when it is full ("has a total capacity of 79.11 GiB"), from threads of people who
  ran out of it. It is more than the nominal size where that counts 10^9 bytes, and less where error correction takes a
  part of the memory itself (L4, L40S, A10G). Looked up: H100 79.11 (vllm 27508), A100 79.25 (OOTDiffusion 235), L4
  22.03 (evo2 190), L40S 44.42 (Step-Video-T2V 8), RTX 4090 23.52 (SoulX-FlashTalk 5), B200 178.35 (torchao 4002); the
  others are quoted from memory.
- `matmul_share`: the fastest matrix product anybody found (Bekman, "Machine Learning Engineering", table of maximum
  achievable matmul FLOPS, bf16); for kinds that are not in that table, the 0.80 of most that are.
- `attention_share`: FlashAttention-2 with heads of 128, forward and backward (Dao 2023, section 4.1): on an A100 73 and
  63 % of the peak, which is 65 % over both; on an H100 335 TFLOP/s, as it does not use what is new there. Kinds that
  were not measured there get the A100's share, or the H100's if they are newer.
- `network`: the vendor's own machine with eight (DGX A100: eight links of 200 Gb/s; DGX H100, H200, B200: 400). Cards
  on PCIe have no such machine; 25 Gb/s each, 200 Gb/s for eight, is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from llmtrain.errors import UserError, nearest
from llmtrain.model.cost import BF16_PEAK_FLOPS


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU; bytes, bytes/s in one direction, FLOP/s."""

    name: str  # as the driver reports it
    memory: float  # what tensors can have of it
    memory_bandwidth: float
    multiprocessors: int
    float32_flops: float  # without tensor cores: torch multiplies float32 in full
    matmul_share: float  # of the bf16 peak, by the best product
    attention_share: float  # likewise, by FlashAttention-2 over long sequences
    link: float  # to the others in its machine: NVLink through a switch, else PCIe
    has_nvlink: bool
    host_link: float  # PCIe
    network: float  # to other machines

    @property
    def bf16_flops(self) -> float:
        """Dense peak."""
        return BF16_PEAK_FLOPS[self.name]


GIGA, TERA = 1e9, 1e12
TENSOR_SHARE = 0.94  # of the memory; the rest is for CUDA, NCCL and the allocator: an estimate
_AMPERE_ATTENTION, _HOPPER_ATTENTION = 0.65, 335 / 989


def _gpu(
    name: str,
    *,
    memory: float,
    bandwidth: float,
    multiprocessors: int,
    float32: float,
    products: float = 0.80,
    attention: float = _AMPERE_ATTENTION,
    nvlink: float | None = None,
    pcie: float = 32,
    network: float = 3.125,
) -> Gpu:
    """TFLOP/s for float32, GiB of memory as torch counts it, GB/s for the rest."""
    return Gpu(
        name=name,
        memory=memory * 2**30 * TENSOR_SHARE,
        memory_bandwidth=bandwidth * GIGA,
        multiprocessors=multiprocessors,
        float32_flops=float32 * TERA,
        matmul_share=products,
        attention_share=attention,
        link=(nvlink or pcie) * GIGA,
        has_nvlink=nvlink is not None,
        host_link=pcie * GIGA,
        network=network * GIGA,
    )


_A100 = partial(_gpu, multiprocessors=108, float32=19.5)
_A100_SXM = partial(_A100, products=0.869, nvlink=300, network=25)
_A100_PCIE = partial(_A100, products=0.811)
_HOPPER_SXM = partial(
    _gpu, multiprocessors=132, float32=67, products=0.803, attention=_HOPPER_ATTENTION, nvlink=450, pcie=64, network=50
)
_CARD = partial(_gpu, memory=23.5)
GPUS: dict[str, Gpu] = {
    "a100-40gb": _A100_SXM("NVIDIA A100-SXM4-40GB", memory=39.4, bandwidth=1555),
    "a100": _A100_SXM("NVIDIA A100-SXM4-80GB", memory=79.2, bandwidth=2039),
    "a100-pcie-40gb": _A100_PCIE("NVIDIA A100-PCIE-40GB", memory=39.4, bandwidth=1555),
    "a100-pcie": _A100_PCIE("NVIDIA A100 80GB PCIe", memory=79.2, bandwidth=1935),
    "a10g": _CARD("NVIDIA A10G", memory=22.0, bandwidth=600, multiprocessors=80, float32=35),
    "l4": _CARD("NVIDIA L4", memory=22.0, bandwidth=300, multiprocessors=58, float32=30.3),
    "l40s": _CARD("NVIDIA L40S", memory=44.4, bandwidth=864, multiprocessors=142, float32=91.6),
    "h100": _HOPPER_SXM("NVIDIA H100 80GB HBM3", memory=79.1, bandwidth=3350),
    "h100-pcie": _gpu(
        "NVIDIA H100 PCIe", memory=79.1, bandwidth=2000, multiprocessors=114, float32=51, attention=_HOPPER_ATTENTION,
        pcie=64,
    ),
    "h200": _HOPPER_SXM("NVIDIA H200", memory=139.8, bandwidth=4800),
    "b200": _gpu(
        "NVIDIA B200", memory=178.3, bandwidth=8000, multiprocessors=148, float32=80, products=0.776,
        attention=_HOPPER_ATTENTION, nvlink=900, pcie=64, network=50,
    ),
    "rtx3090": _CARD("NVIDIA GeForce RTX 3090", bandwidth=936, multiprocessors=82, float32=35.6),
    "rtx4090": _CARD("NVIDIA GeForce RTX 4090", bandwidth=1008, multiprocessors=128, float32=82.6),
}  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """Return the kind by its short name or by the one that the driver reports, in any case.

    Raises:
        UserError: not known; the known ones are named.
    """
    by_name = {**GPUS, **{gpu.name: gpu for gpu in GPUS.values()}}
    for known, gpu in by_name.items():
        if known.casefold() == name.casefold():
            return gpu
    hint = nearest(name.casefold(), list(GPUS))
    known_ones = "" if hint.startswith("known") else f" known: {', '.join(GPUS)}"
    raise UserError(f"--gpu '{name}' is not known: {hint}{known_ones}")
