"""Operations on packed storage: each a plain torch definition for any device, and on the CPU a compiled kernel."""

from pintpot.kernels import ops_grid as ops_grid
from pintpot.kernels import ops_tables as ops_tables
from pintpot.kernels.blocks import AdamRates, Packed, packed_adam_, packed_adam_serves
from pintpot.kernels.grid import dequantize, grid_matmul, workspace_bytes
from pintpot.kernels.packing import pack, packed_size, restore, unpack

__all__ = [
    "AdamRates",
    "Packed",
    "dequantize",
    "grid_matmul",
    "pack",
    "packed_adam_",
    "packed_adam_serves",
    "packed_size",
    "restore",
    "unpack",
    "workspace_bytes",
]
