"""Parameters that FSDP2 has spread over processes: what of them is here, the whole of one, and agreement.

Elementwise rules work on what is here. A projection needs the whole matrix: its gradient is gathered, one batch at a
time, every process makes the same update with the same small state, and each keeps its own rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether the tensor is spread over processes. Asking does not import what spreads them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part that is here; of an ordinary tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, gathered from the processes; an ordinary tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def keep_(parameter: Tensor, value: Tensor) -> None:
    """Put the part that belongs here of a whole value, the same on every process, into a sharded parameter."""
    if is_sharded(parameter):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = parameter.device_mesh
        same = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        parameter.to_local().copy_(same.redistribute(placements=parameter.placements).to_local())


def everywhere(fine: bool, parameters: Iterable[Tensor]) -> bool:
    """Whether something holds on all processes that share any of the parameters."""
    sharded = next((p for p in parameters if is_sharded(p)), None)
    if sharded is None:
        return fine
    verdict = torch.tensor(float(fine), device=local(sharded).device)
    for group in sharded.device_mesh.get_all_groups():
        distributed.all_reduce(verdict, op=distributed.ReduceOp.MIN, group=group)
    return bool(verdict)
