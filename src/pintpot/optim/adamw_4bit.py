"""AdamW-4bit: keep an optimizer's moments as 4-bit codes, with a scale for each block of 128.

Source:    Li et al. 2023, arXiv:2309.01507, sec. 3 and 4 (signed dynamic exponent for the first moment, linear without
           zero for the second).
Differs:   the second moment of matrices is scaled by blocks of 128, where the paper takes the smaller of row and column
           maxima; small tensors are quantised too.
Saves:     optimizer, real: 1/2 + 4/128 bytes an element of a moment instead of 4 (or 2). One block of moments (on
           the CPU, by the compiled kernel) or one batch of them is unpacked at a time.
Shapes:    moments of any shape, seen flat in blocks.
Composes:  any rule of the optimizer slot that keeps whole moments (alone: AdamW), gradient release, adapters.
Use when:  8 bits are still too many, and the update should stay AdamW's.
Not when:  the budget holds 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pintpot.core.ledger import Account, Ledger
from pintpot.core.shape import ModelShape
from pintpot.core.technique import TRAINING, Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.optim._base import OptimExtra, packed_states


@technique(
    name="adamw-4bit",
    wing="optim",
    slot="optimizer",
    part="states",
    source=Source("Memory Efficient Optimizers with 4-bit States", arxiv="2309.01507", year=2023),
    accounts=(Account.OPTIMIZER,),
    jobs=TRAINING,
    needs=("whole_moments",),
    claims=(Claim("optimizer bytes saved (fraction)", 0.875, versus="32-bit AdamW", where="section 3"),),
    fidelity="second moment by blocks of 128 instead of row and column maxima; no exception for small tensors",
)
@dataclass(frozen=True, kw_only=True)
class FourBitStates(OptimExtra):
    """Moments of 4 bits; nothing to set."""

    @property
    def extras(self) -> Mapping[str, Any]:
        """``state_bits=4``."""
        return {"state_bits": 4}

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """The ``optimizer`` account as if all of it were moments."""
        return packed_states(ledger, shape, workload, 4)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """The paper finds little difference in fine-tuning; pretraining is harder on the moments."""
        return 0.003 if workload.job == "finetune" else 0.01
