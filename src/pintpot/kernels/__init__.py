"""Operations on packed storage: each a plain torch definition for any device, and on the CPU a compiled kernel."""

from pintpot.kernels import ops_attend as ops_attend
from pintpot.kernels import ops_factors as ops_factors
from pintpot.kernels import ops_grid as ops_grid
from pintpot.kernels import ops_lookup as ops_lookup
from pintpot.kernels import ops_rounding as ops_rounding
from pintpot.kernels import ops_row_tiles as ops_row_tiles
from pintpot.kernels import ops_tables as ops_tables
from pintpot.kernels import ops_tiles as ops_tiles
from pintpot.kernels import planes as planes
from pintpot.kernels.attend import (
    Attended,
    Float8Block,
    PackedBlock,
    RotatedBlock,
    RotatedLayout,
    attend_fp8,
    attend_packed,
    attend_rotated,
    attend_serves,
    attended,
    capped,
    reads_packed,
)
from pintpot.kernels.blocks import AdamRates, Packed, packed_adam_, packed_adam_serves
from pintpot.kernels.grid import dequantize, grid_matmul, workspace_bytes
from pintpot.kernels.lookup import dequantize_planes, lut_matmul, pack_planes
from pintpot.kernels.low_rank import low_rank_matmul, low_rank_workspace
from pintpot.kernels.packing import pack, packed_size, restore, unpack
from pintpot.kernels.sparse import GridNumbers, sparse_decode, sparse_matmul, sparse_matmul_serves
from pintpot.kernels.tiled import tiled_matmul, tiled_matmul_serves
from pintpot.kernels.tiles import dequantize_tiles, pack_tiles, tiles_matmul

__all__ = [
    "AdamRates",
    "Attended",
    "Float8Block",
    "GridNumbers",
    "Packed",
    "PackedBlock",
    "RotatedBlock",
    "RotatedLayout",
    "attend_fp8",
    "attend_packed",
    "attend_rotated",
    "attend_serves",
    "attended",
    "capped",
    "dequantize",
    "dequantize_planes",
    "dequantize_tiles",
    "grid_matmul",
    "lut_matmul",
    "low_rank_matmul",
    "low_rank_workspace",
    "pack",
    "pack_planes",
    "pack_tiles",
    "packed_adam_",
    "packed_adam_serves",
    "packed_size",
    "reads_packed",
    "restore",
    "sparse_decode",
    "sparse_matmul",
    "sparse_matmul_serves",
    "tiled_matmul",
    "tiled_matmul_serves",
    "tiles_matmul",
    "unpack",
    "workspace_bytes",
]
