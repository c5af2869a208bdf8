"""SAIL: products of few inputs by tables in compute-capable SRAM beside each slice of a processor's cache, modelled.

Source:    Zhang et al. 2025, "SAIL", arXiv:2509.25853: tables of the sums of all subsets of some weights, built once
           and looked up by one bit of as many inputs after the other, for all inputs of a batch; patterns of inputs
           that come again are not computed again.
Differs:   no such hardware is there: products are computed by t-mac's kernel, and only the forecast of time is a model,
           of additions in the SRAM. The number of arrays, their clock and cycles could not be seen (only the abstract
           and summaries), so that the paper's 10.7 times a Neoverse-N1 is not reproduced: the model counts additions
           with tables, one for a whole batch, and without. That patterns save 13.8 % is taken from the paper, not
           computed, and so is the area (2 %). Four weights a table and inputs of 8 bits are assumed. Type conversion
           in the SRAM is not modelled. Weights come from memory as before.
Saves:     nothing, simulated: additions of products with few inputs. The bytes are those of t-mac.
Shapes:    as t-mac.
Composes:  as t-mac; in the place of t-mac.
Use when:  asking what such a cache would do for a compressed model and a batch.
Not when:  deciding what to run: no machine has it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.technique import Claim, Saving, Source, technique
from pintpot.weights.kernel_choice import BitPlaneKernel

PATTERNS_SAVE = 0.138
"""Share of cycles that recurring patterns of inputs save (abstract)."""
AREA_OVERHEAD = 0.02
"""Hardware that is added, as a share (abstract)."""


@technique(
    name="sail",
    wing="weights",
    part="kernel",
    source=Source("SAIL: SRAM-Accelerated LLM Inference System with Lookup-Table-based GEMV", 2025, arxiv="2509.25853"),
    accounts=[Account.WORKSPACE],
    claims=[
        Claim("speed-up", 10.7, versus="ARM Neoverse-N1", at="up to; simulated", where="abstract"),
        Claim("tokens for a dollar, times", 19.9, versus="ARM Neoverse-N1", at="up to; simulated", where="abstract"),
        Claim("tokens for a dollar, times", 7.04, versus="NVIDIA V100", at="up to; simulated", where="abstract"),
        Claim("cycles saved by patterns", PATTERNS_SAVE, versus="tables without them", where="abstract"),
        Claim("hardware overhead", AREA_OVERHEAD, versus="the processor", where="abstract"),
    ],
    saving=Saving.SIMULATED,
    fidelity="a count of additions; arrays, clock and cycles could not be seen, so that no time is reproduced",
)
@dataclass(frozen=True, kw_only=True)
class Sail(BitPlaneKernel):
    """The additions of tables in SRAM, on the bit planes of t-mac.

    Attributes:
        table_weights: weights of a table (the authors' number of basis weights).
        input_bits: of each input, which are taken one by one.
    """

    table_weights: int = 4
    input_bits: int = 8

    def __post_init__(self) -> None:
        if min(self.table_weights, self.input_bits) < 1 or self.table_weights > 8:
            raise CompositionError(
                f"no tables of {self.table_weights} weights for {self.input_bits} bits", hint="use 1 to 8 weights"
            )

    def additions(self, rows: int) -> float:
        """Additions for the weights of a table and so many inputs, those of the table itself included.

        Sums of one weight, and of none, are there without any.
        """
        table = (1 << self.table_weights) - self.table_weights - 1
        return table + rows * self.input_bits * (1.0 - PATTERNS_SAVE)

    def additions_without_tables(self, rows: int) -> float:
        """Additions for as many weights and inputs, one for each weight and bit."""
        return float(self.table_weights * rows * self.input_bits)

    def of_bits(self, bits: int, rows: int) -> float:
        """Additions with tables, relative to those without. The width of the weights makes both equally wide."""
        return self.additions(rows) / self.additions_without_tables(rows)
