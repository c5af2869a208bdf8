"""MeZO: estimate the slope along one random direction from two forward passes, and step along it; keep only the seed.

Source:    Malladi et al. 2023, arXiv:2305.17333, algorithm 1 (MeZO-SGD); ``samples`` above 1 is n-SPSA.
Differs:   the way back from the last perturbation and the update are one pass over the weights, in float32 where the
           weights are narrower (the authors round twice, in the weights' dtype); what is not decayed is chosen by
           its dimensions, not its name.
Saves:     gradients, optimizer and activations, real: nothing is kept between the forward passes but integers.
           Temporaries are a few pieces of a million elements.
Shapes:    parameters of any shape.
Composes:  adapters, packed weights; not with packed states or gradient release, since there are neither.
Use when:  fine-tuning a pretrained model that fits for generation but not for a backward pass.
Not when:  pretraining, or when steps are dear: it takes many more of them than a method with gradients, with a
           learning rate about a hundred times lower.
"""

from __future__ import annotations

from dataclasses import dataclass

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.optim._tensors import mix_seed
from pintpot.optim._zeroth import GradientFreeMethod, Measure, Slope, ZerothOrderOptimizer


@technique(
    name="mezo",
    wing="optim",
    slot="optimizer",
    source=Source("Fine-Tuning Language Models with Just Forward Passes", arxiv="2305.17333", year=2023),
    accounts=(Account.GRADIENTS, Account.OPTIMIZER, Account.ACTIVATIONS),
    jobs=("finetune",),
    removes=("gradients", "whole_moments"),
    claims=(
        Claim(
            "parameters that can be trained (billions)",
            30,
            versus="2.7 with backpropagation",
            at="one A100 80GB",
            where="abstract",
        ),
    ),
    fidelity="the last way back and the update are rounded once, not twice; no decay of vectors, whatever their names",
)
@dataclass(frozen=True, kw_only=True)
class MezoRule(GradientFreeMethod):
    """Central differences along seeded normal directions.

    Attributes:
        epsilon: how far the parameters are moved to either side.
        samples: directions averaged in a step (n of n-SPSA).
        seed: from which the directions are drawn.
    """

    epsilon: float = 1e-3
    samples: int = 1
    seed: int = 0

    @property
    def forward_passes(self) -> int:
        """Two a direction."""
        return 2 * self.samples

    @property
    def draws(self) -> int:
        """On each way along a direction, and all once more at the end."""
        return 4 * self.samples - 1

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """Within 1 % of fine-tuning's accuracy on most tasks of the paper, in many more steps than a run here has."""
        return 0.3


class Mezo(ZerothOrderOptimizer):
    """MeZO as a torch optimizer: ``Mezo(model, lr=1e-6, epsilon=1e-3, samples=1, seed=0)``.

    See ``ZerothOrderOptimizer`` for the arguments and ``MezoRule`` for the hyperparameters.
    """

    method = MezoRule
    rule: MezoRule

    def _estimate(self, measure: Measure) -> list[Slope]:
        slopes = []
        for sample in self._draws(self.rule.samples):
            direction = mix_seed(self.rule.seed, self.steps, sample)
            slope = self._slope(direction, self.rule.epsilon, measure)
            slopes.append((direction, slope / self.rule.samples))
        return slopes


MezoRule.kind = Mezo
