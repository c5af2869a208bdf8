"""Tilus: codes of any width in the order in which the threads of a GPU take them into their registers.

Source:    Ding et al. 2025, arXiv:2504.12984, and the authors' repository NVIDIA/tilus, examples/quantization: weights
           are laid out once in tiles of 16 by 16, in which each thread's codes, for the operand of a product of 16-bit
           numbers, are whole bytes without gaps; a kernel loads bytes and takes them for codes in place.
Differs:   the layout and a kernel that reads it, not the virtual machine and its language: the kernel is in Triton,
           which does not say which thread holds what, so that operands still pass through shared memory. A thread's
           bytes alternate with the others' one by one (in the authors' kernel in runs of up to 16); scales stay where
           the grid has them; parts along the in-features are added in a fixed order by a second kernel, not one after
           the other under a lock; tile sizes are not tuned. Grids may have zeros (the authors' are symmetric).
Saves:     workspace, real: products with few rows of input make no weight dense, as those of grids do. The weights stay
           the bytes that they were (padded to tiles). At loading one parameter is there twice.
Shapes:    tiles (ceil(I / 16), ceil(O / 16), 32 * bits); scale (O, N); zero (O, N) packed.
Composes:  methods that leave grids in groups of a multiple of 64 or of whole rows (rtn, gptq, awq and others), and
           folders that they wrote; caches; generation only.
Use when:  a GPU, few sequences at once, widths that are no power of 2.
Not when:  there is no GPU: dense strips of the same numbers are multiplied, slower than the grid's own kernel. The
           planner offers it for GPUs only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, Technique, technique
from pintpot.core.workload import Workload
from pintpot.kernels import gpu
from pintpot.kernels.tiles import STEP
from pintpot.weights.formats import Format, Grid, RegisterTiles
from pintpot.weights.kernel_choice import GridKernel


@technique(
    name="tilus",
    wing="weights",
    part="kernel",
    source=Source(
        "Tilus: A Virtual Machine for Arbitrary Low-Precision GPGPU Computation in LLM Serving",
        2025,
        arxiv="2504.12984",
    ),
    accounts=[Account.WORKSPACE],
    claims=[
        Claim("speed, times", 1.75, versus="Triton", where="abstract"),
        Claim("speed, times", 2.61, versus="Ladder", where="abstract"),
        Claim("speed, times", 1.29, versus="QuantLLM", where="abstract"),
        Claim("speed, times", 1.03, versus="Marlin", where="abstract"),
    ],
    fidelity="its layout of weights and a kernel for it in Triton, not the virtual machine",
)
@dataclass(frozen=True, kw_only=True)
class Tilus(GridKernel):
    """Grids in tiles of registers."""

    def of_grid(self, grid: Grid) -> RegisterTiles | None:
        """``RegisterTiles`` for groups that a step of the kernel does not cut, and for whole rows."""
        whole = grid.group_size == -1 or grid.group_size % STEP == 0
        return RegisterTiles(**asdict(grid)) if whole else None

    def relative_operations(self, held: Format, rows: int) -> float:
        """Each number is multiplied as it was."""
        return 1.0

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """The defaults, where there is a GPU that has the kernel."""
        if gpu.ready():
            yield cls()
