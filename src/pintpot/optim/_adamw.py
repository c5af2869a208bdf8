"""Plain AdamW in the engine: the rule that packed states and released gradients act on when no other is named."""

from __future__ import annotations

from dataclasses import dataclass

from pintpot.optim._base import ProjectedMethod
from pintpot.optim._engine import ProjectedOptimizer


@dataclass(frozen=True, kw_only=True)
class AdamWRule(ProjectedMethod):
    """AdamW over all parameters; not a technique of its own, since it is what every other is compared with."""


class AdamW(ProjectedOptimizer):
    """AdamW whose moments may be packed and whose gradients may be released: ``AdamW(model, state_bits=8)``.

    See ``ProjectedOptimizer`` for the arguments.
    """

    method = AdamWRule


AdamWRule.kind = AdamW
