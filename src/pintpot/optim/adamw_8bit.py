"""AdamW-8bit: keep an optimizer's moments as 8-bit codes on a dynamic tree, with a scale for each block of 256.

Source:    Dettmers et al. 2021, arXiv:2110.02861, sec. 2 (block-wise dynamic quantisation).
Differs:   blocks of 256 elements, as in the authors' later package, where the paper has 2,048; a value takes the level
           nearest to its rounding to bfloat16; small tensors are quantised too.
Saves:     optimizer, real: 1 + 4/256 bytes an element of a moment instead of 4 (or 2). One block of moments (on the
           CPU, by the compiled kernel) or one batch of them is unpacked at a time.
Shapes:    moments of any shape, seen flat in blocks.
Composes:  any rule of the optimizer slot that keeps whole moments (alone: AdamW), gradient release, adapters.
Use when:  AdamW's states do not fit, and nothing else about training should change.
Not when:  the states are small already (APOLLO-Mini, adapters of low rank).
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
    name="adamw-8bit",
    wing="optim",
    slot="optimizer",
    part="states",
    source=Source("8-bit Optimizers via Block-wise Quantization", arxiv="2110.02861", year=2021),
    accounts=(Account.OPTIMIZER,),
    jobs=TRAINING,
    needs=("whole_moments",),
    claims=(Claim("optimizer bytes saved (fraction)", 0.75, versus="32-bit AdamW", where="section 2"),),
    fidelity="blocks of 256; no exception for small tensors",
)
@dataclass(frozen=True, kw_only=True)
class EightBitStates(OptimExtra):
    """Moments of 8 bits; nothing to set."""

    @property
    def extras(self) -> Mapping[str, Any]:
        """``state_bits=8``."""
        return {"state_bits": 8}

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """The ``optimizer`` account as if all of it were moments."""
        return packed_states(ledger, shape, workload, 8)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """The paper finds no difference in quality; not zero, so that it is not chosen for nothing."""
        return 0.001
