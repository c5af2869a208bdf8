"""Operations on packed storage: each a plain torch definition for any device, and on the CPU a compiled kernel."""

from pintpot.kernels import ops_attend as ops_attend
from pintpot.kernels import ops_grid as ops_grid
from pintpot.kernels.attend import (
    Attended,
    Float8Block,
    PackedBlock,
    attend_fp8,
    attend_packed,
    attend_serves,
    reads_packed,
)
from pintpot.kernels import ops_lookup as ops_lookup
from pintpot.kernels.blocks import AdamRates, Packed, packed_adam_, packed_adam_serves
from pintpot.kernels.grid import dequantize, grid_matmul, workspace_bytes
from pintpot.kernels.lookup import dequantize_planes, lut_matmul, pack_planes
from pintpot.kernels.packing import pack, packed_size, restore, unpack

__all__ = [
    "AdamRates",
    "Attended",
    "Float8Block",
    "Packed",
    "PackedBlock",
    "attend_fp8",
    "attend_packed",
    "attend_serves",
    "dequantize",
    "dequantize_planes",
    "grid_matmul",
    "lut_matmul",
    "pack",
    "pack_planes",
    "packed_adam_",
    "packed_adam_serves",
    "packed_size",
    "reads_packed",
    "restore",
    "unpack",
    "workspace_bytes",
]
