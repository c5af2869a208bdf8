"""T-MAC: products with codes of few bits by looking up sums of inputs, one bit plane after the other.

Source:    Wei et al. 2024, "T-MAC", arXiv:2407.00088, and the authors' repository microsoft/T-MAC: bits taken for
           signs, tables of the 16 signed sums of four inputs, of which 8 are computed and mirrored; tables rounded to
           8 bits with a step for 64 inputs; entries found by byte shuffles and added up in 16 bits.
Differs:   32 rows of codes lie together for all processors, and no tile sizes are tuned for each; tables are computed
           once for a product and shared by its threads. The authors' fast aggregation, which rounds sums and is off by
           default, is left out. Products with more than 8 rows of input use dense strips of the same numbers.
Saves:     workspace, real: products with few rows of input make no weight dense, as those of grids do. The weights stay
           the bytes that they were (planes are padded to 32 rows). At loading one parameter is there twice.
Shapes:    planes (ceil(O / 32), bits, Q, 16), Q quads of four columns; scale (O, N); zero (O, N) packed; tables
           (B, Q, 16).
Composes:  methods that leave grids of 1 to 4 bits (rtn, gptq, awq and others), and folders that they wrote; caches;
           generation only.
Use when:  1 to 4 bits, few sequences at once, on a CPU: time falls with the number of bits.
Not when:  outputs must be those of the grid to the last bit: 8-bit tables cost about 0.7 % of each product's size. Or
           prompts are long and answers short: planes are made dense more slowly than grids.
"""

from __future__ import annotations

from dataclasses import dataclass

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.kernels.grid import FEW_ROWS
from pintpot.weights.kernel_choice import BitPlaneKernel

RISK = 0.001
"""Relative rise of perplexity that tables of 8 bits cost: the largest of five on the embedded model, rtn with 2 to 4
bits in groups of 32 to 128, with every product looked up (8,192 held-out tokens, context 512); the others are below
0.0005."""


@technique(
    name="t-mac",
    wing="weights",
    part="kernel",
    source=Source(
        "T-MAC: CPU Renaissance via Table Lookup for Low-Bit LLM Deployment on Edge", 2024, arxiv="2407.00088"
    ),
    accounts=[Account.WORKSPACE],
    claims=[
        Claim("throughput, times", 4.0, versus="llama.cpp", at="up to; low-bit Llama and BitNet", where="abstract"),
        Claim("reduction of energy", 0.70, versus="llama.cpp", at="low-bit Llama and BitNet", where="abstract"),
    ],
    fidelity="one layout for all processors instead of tuned tiles; no fast aggregation",
)
@dataclass(frozen=True, kw_only=True)
class TMac(BitPlaneKernel):
    """Bit planes and 8-bit tables."""

    def of_bits(self, bits: int, rows: int) -> float:
        """A look-up and a sum for four bits of one plane; many rows are multiplied as numbers."""
        return bits / 4 if rows <= FEW_ROWS else 1.0

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """That of the tables."""
        return RISK
