"""LUT Tensor Core: matrix units that look sums of inputs up instead of multiplying, as a model of their time.

Source:    Mo et al. 2024, "LUT Tensor Core", arXiv:2408.06003, and its hardware description in the authors' repository
           microsoft/T-MAC (sv_lut_array): units for 2 inputs, 64 outputs and 4 in-features, tables of 8 sums of which
           the others are the opposites, one adder of 16-bit floats an output, one bit of the weights a cycle.
Differs:   no such hardware is there: products are computed by t-mac's kernel, and only the forecast of time is that of
           the unit. It is compared with four multipliers and four adders an output by their areas and energies in
           45 nm (Horowitz 2014, "Computing's energy problem"); the authors synthesise theirs in 28 nm. Tables,
           selectors and registers are in neither figure: tables serve 64 outputs. So density comes out at 8.8 times
           that of multiplying for 1 bit, and energy at 15.0; others report 20.9 and 11.2 of the paper, whose abstract
           says more than a magnitude for both and whose tables could not be seen. Writing the tables is taken to be
           part of what comes before, as the authors' compiler arranges it.
Saves:     nothing, simulated: operations of products, 8.8 / bits times fewer. The bytes are those of t-mac.
Shapes:    as t-mac.
Composes:  as t-mac; in the place of t-mac.
Use when:  asking what such a unit would do for a compressed model.
Not when:  deciding what to run: no machine has it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pintpot.core.ledger import Account
from pintpot.core.technique import Claim, Saving, Source, technique
from pintpot.kernels.lookup import QUAD
from pintpot.weights.kernel_choice import BitPlaneKernel

ADDER_AREA, MULTIPLIER_AREA = 1360.0, 1640.0
"""Square micrometres of an adder and a multiplier of 16-bit floats in 45 nm (Horowitz 2014)."""
ADDER_ENERGY, MULTIPLIER_ENERGY = 0.4, 1.1
"""Picojoules of an operation of each, in 45 nm at 0.9 V (Horowitz 2014)."""


@technique(
    name="lut-tensor-core",
    wing="weights",
    part="kernel",
    source=Source(
        "LUT Tensor Core: Lookup Table Enables Efficient Low-Bit LLM Inference Acceleration", 2024, arxiv="2408.06003"
    ),
    accounts=[Account.WORKSPACE],
    claims=[
        Claim("compute density, times", 20.9, versus="tensor cores", at="1 bit, 16-bit floats", where="second-hand"),
        Claim("energy efficiency, times", 11.2, versus="tensor cores", at="1 bit, 16-bit floats", where="second-hand"),
        Claim("density and efficiency, times, more than", 10.0, versus="tensor cores", where="abstract"),
    ],
    saving=Saving.SIMULATED,
    fidelity="a model of adders and multipliers alone; its density is 0.42 of the reported one, its energy 1.34 of it",
)
@dataclass(frozen=True, kw_only=True)
class LutTensorCore(BitPlaneKernel):
    """The unit's time on the bit planes of t-mac."""

    def compute_density(self, bits: int) -> float:
        """Products a second and area, relative to multipliers and adders of the same floats."""
        return QUAD * (MULTIPLIER_AREA + ADDER_AREA) / (bits * ADDER_AREA)

    def energy_efficiency(self, bits: int) -> float:
        """Products a joule, likewise."""
        return QUAD * (MULTIPLIER_ENERGY + ADDER_ENERGY) / (bits * ADDER_ENERGY)

    def of_bits(self, bits: int, rows: int) -> float:
        """The time of a matrix unit that takes the same area as the one that multiplies."""
        return 1.0 / self.compute_density(bits)
