"""Seconds of the collective operations between ranks, from the speeds of their links.

Rings (Patarasuk and Yuan 2009): to gather or to reduce and scatter n bytes over R ranks, each rank passes on
(R − 1)/R × n bytes in R − 1 hops; to all-reduce does both. NCCL lays as many rings as a machine has network links, so
that each machine passes bytes on through all of them at once; the slower of the two kinds of links decides. A hop costs
time however little it carries.

The constants are NCCL's own model (src/graph/tuning.cc of 2.19, hwLat and baseLat: ring, protocol Simple), and the
shares of a link's speed that its benchmark reaches on machines with eight A100 or H100 (nccl-tests, "bus bandwidth":
230 to 240 of 300 GB/s, 360 to 370 of 450; 42 to 46 of 50 GB/s for each network link).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmtrain.planning.hardware import Gpu

LINK_SHARE, NETWORK_SHARE = 0.80, 0.85
BASE_S = 8.4e-6
NVLINK_HOP_S, PCIE_HOP_S, NETWORK_HOP_S = 3.4e-6, 5.7e-6, 14.0e-6
TREE_SHARE = 0.92  # of a ring's bandwidth


@dataclass(frozen=True)
class Links:
    """What connects the ranks; bytes/s in one direction, for each of them."""

    ranks: int
    per_machine: int
    inside: float
    network: float
    inside_hop_s: float

    @property
    def machines(self) -> int:
        """So many, the last perhaps not full."""
        return -(-self.ranks // self.per_machine)

    @property
    def _pass_on(self) -> float:
        """Bytes/s at which a rank passes on what goes round.

        A ring leaves and enters a machine once: each of its ranks' network links carries a ring of its own.
        """
        inside = self.inside * LINK_SHARE
        if self.machines == 1:
            return inside
        return min(inside, self.network * NETWORK_SHARE * min(self.ranks, self.per_machine))

    @property
    def _latency_s(self) -> float:
        between = self.machines - 1
        return BASE_S + (self.ranks - 1 - between) * self.inside_hop_s + between * NETWORK_HOP_S

    def gather_s(self, size: float) -> float:
        """Seconds to give all ranks the `size` bytes of which each has a part; also those to reduce and scatter."""
        if self.ranks == 1 or not size:
            return 0.0
        return self._latency_s + size * (self.ranks - 1) / self.ranks / self._pass_on

    def all_reduce_s(self, size: float) -> float:
        """Seconds until all ranks have the sum of their `size` bytes."""
        ring = 2 * self.gather_s(size)
        if self.machines == 1 or not size:
            return ring
        deep = math.ceil(math.log2(self.machines)) * NETWORK_HOP_S
        hops = (min(self.ranks, self.per_machine) - 1) * self.inside_hop_s + deep
        return min(ring, BASE_S + 2 * hops + 2 * size / self._pass_on / TREE_SHARE)


def links_between(gpu: Gpu, ranks: int, per_machine: int, network: float | None = None) -> Links:
    """Links of so many GPUs of a kind.

    Args:
        gpu: the kind.
        ranks: GPUs in all.
        per_machine: GPUs in a machine.
        network: bytes/s for each GPU in one direction; None: what is usual with this kind.
    """
    hop_s = NVLINK_HOP_S if gpu.has_nvlink else PCIE_HOP_S
    return Links(ranks, per_machine, gpu.link, gpu.network if network is None else network, hop_s)
