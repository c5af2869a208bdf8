"""Row tiles: grids laid out anew for the processor when they are loaded, so that a lane of a vector has a row.

Source:    the practice of llama.cpp ("repacking" of weights in ggml's CPU backend) and of libraries of matrix products.
Differs:   llama.cpp interleaves 4 or 8 rows of blocks that hold their own scales, and rounds inputs to 8 bits; here 16
           rows, scales apart, and inputs as exact as their dtype unless ``int8_inputs`` is set.
Saves:     workspace, real: as for grids, products with few rows of input make no weight dense. The weights stay the
           bytes that they were, but for zeros of asymmetric grids, which take a byte each. At loading one parameter is
           there twice.
Shapes:    tiles (ceil(O / 16), ceil(I / 32), bits, 64); scale (O * N,); zero (O * N,).
Composes:  methods that leave grids with groups of a multiple of 32 or of whole rows, and folders that they wrote;
           caches; generation only.
Use when:  decoding on a processor with AVX-512 and its integer products: what is read is one stream of memory, and
           no sum goes across lanes.
Not when:  there are none (weights are then made dense in strips), or prompts are long and answers short: tiles are made
           dense more slowly than grids.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Source, Technique, technique
from pintpot.core.workload import Workload
from pintpot.kernels import native
from pintpot.kernels.grid import FEW_ROWS
from pintpot.kernels.row_tiles import BLOCK
from pintpot.weights.formats import Format, Grid, RowTiles
from pintpot.weights.kernel_choice import GridKernel

INT8_RISK = 0.001
"""Relative rise of perplexity that 8-bit inputs are reckoned with: that of T-MAC's tables, whose error is as large."""


@technique(
    name="row-tiles",
    wing="weights",
    part="kernel",
    source=Source("Repacking of weights in ggml's CPU backend (llama.cpp)", 2024),
    accounts=[Account.WORKSPACE],
    fidelity="16 rows, scales apart; inputs are not rounded unless asked for",
)
@dataclass(frozen=True, kw_only=True)
class RowTilesKernel(GridKernel):
    """Grids in tiles of rows.

    Attributes:
        int8_inputs: round the inputs of products with few rows to 8 bits, which is faster where arithmetic and not
            memory is the limit.
    """

    int8_inputs: bool = False

    def of_grid(self, grid: Grid) -> RowTiles | None:
        """``RowTiles`` for groups of whole blocks, and for whole rows."""
        whole = grid.group_size == -1 or grid.group_size % BLOCK == 0
        return RowTiles(**asdict(grid), int8_inputs=self.int8_inputs) if whole else None

    def relative_operations(self, held: Format, rows: int) -> float:
        """Instructions for each number, relative to those of a grid; many rows are multiplied as numbers."""
        if rows > FEW_ROWS:
            return 1.0
        return 0.5 if self.int8_inputs else 0.75

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """None, but for 8-bit inputs."""
        return INT8_RISK if self.int8_inputs else 0.0

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """The defaults, where the processor has the kernel."""
        if native.path() == "avx512":
            yield cls()
