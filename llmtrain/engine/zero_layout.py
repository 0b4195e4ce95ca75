"""Where ZeRO keeps what it updates: for each parameter, which part of it this rank owns and where that lies.

DeepSpeed flattens the parameters of an optimizer group into one float32 tensor and gives each rank a contiguous part.
Stages 1 and 2 cut the whole group, so a part may begin in the middle of a parameter; stage 3 cuts every parameter into
slices of ceil(numel / world_size), the last one padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class OwnedSlice:
    """This rank's part of one parameter."""

    group: int  # index of the flat tensor
    offset: int  # where it begins in the flat tensor
    start: int  # where it begins in the flattened parameter
    numel: int


class ZeroLayout:
    """The flat tensors of a ZeRO optimizer and the slices of parameters in them."""

    def __init__(self, zero: Any, stage: int, rank: int):
        self._zero, self._stage, self._rank = zero, stage, rank

    @property
    def flats(self) -> list[Tensor]:
        """The float32 tensors that this rank updates, 1-D."""
        flats: list[Tensor] = (
            self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups
        )
        return flats

    def owned(self, parameter: Any) -> OwnedSlice | None:
        """This rank's part of a parameter of the model; None where it owns nothing of it."""
        if self._stage == 3:
            group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            slice_numel = parameter.ds_tensor.ds_numel
            start = self._rank * slice_numel
            numel = min(slice_numel, parameter.ds_numel - start)
            return OwnedSlice(group, offset, start, numel) if numel > 0 else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        master, place = mapping.hp_fragment_address, mapping.lp_fragment_address
        return OwnedSlice(mapping.param_group_index, master.start, place.start, place.numel)

    def members(self, group: int) -> list[tuple[torch.Size, OwnedSlice | None]]:
        """The parameters that lie in a flat tensor of the ranks together: their shapes, and this rank's parts."""
        groups = self._zero.fp16_groups if self._stage == 3 else self._zero.bit16_groups
        return [(getattr(member, "ds_shape", member.shape), self.owned(member)) for member in groups[group]]

    def state(self, group: int) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's tensors for one flat tensor, by slot: as long as it, or one number."""
        for slot, value in sorted(self._zero.optimizer.state.get(self.flats[group], {}).items()):
            if isinstance(value, Tensor):
                yield slot, value

    def make_state(self) -> None:
        """Let the optimizer make its state, by a step that changes nothing: learning rate and gradients are zero."""
        for param_group in self._zero.optimizer.param_groups:
            param_group["lr"] = 0.0
        for group, flat in enumerate(self.flats):
            gradient, flat.grad = flat.grad, flat.new_zeros(flat.shape)
            self._zero._optimizer_step(group)
            flat.grad = gradient

    def publish(self) -> None:
        """Copy the flat tensors, which were written, to the weights that the model computes with, on all ranks."""
        if self._stage != 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()  # or what a forward pass left whole would stay as it was
        for group in range(len(self.flats)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        persistent = self._zero.persistent_parameters  # small ones, which stage 3 keeps whole everywhere
        if persistent:
            persistent[0].all_gather(persistent)
