"""The operation on grids in tiles, which ``tiles.py`` defines. GPUs have a kernel; the CPU has the definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pintpot.kernels import native
from pintpot.kernels.tiles import check_tiles, tiles_matmul_definition


def _shape(input: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Tensor:
    check_tiles(tiles, scale, bits, input.shape[-1])
    return input.new_empty((*input.shape[:-1], scale.shape[0]))


native.register(
    "tiles_matmul(Tensor input, Tensor tiles, Tensor scale, Tensor? zero, int bits, int group_size) -> Tensor",
    tiles_matmul_definition,
    _shape,
)


@register_flop_formula(torch.ops.pintpot.tiles_matmul)
def _flops(input: torch.Size, tiles: torch.Size, scale: torch.Size, *rest: object, **named: object) -> int:
    """A product and a sum for each number of the matrix and each input."""
    return 2 * input.numel() * scale[0]
