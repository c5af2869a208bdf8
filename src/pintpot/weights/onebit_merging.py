"""1bit-Merging: several fine-tuned models of one base held as the base and one bit a weight for each, chosen by task.

Source:    Liu et al. 2025, "1bit-Merging: Dynamic Quantized Merging for Large Language Models", arXiv:2502.10743, of
           which only the abstracts of both versions could be read. 1-bit task vectors are made as in the authors' code
           of BitDelta (Liu et al. 2024, arXiv:2402.10193): the signs of the difference to the base, and its mean
           magnitude for each matrix.
Differs:   what the abstracts leave open was decided here. Which modules of a task have a 1-bit vector is the user's
           choice (the abstract names attention for chat models, MLPs for mathematics and code), all matrices of the
           blocks by default. Where every task has one, the weight is the base's and the task's vector. Where some have
           none, it is the average of the fine-tuned models, and the vectors of the others are of what separates them
           from it. All else (embeddings, norms, heads) is that average. The task is named by the user: a router that
           chooses by the input is not there, as nothing could be read of the paper's. Scales are not distilled
           afterwards.
Saves:     weights, real: O * packed_size(I, 1) + 4 bytes a matrix for each task beside the base's, instead of a model
           for each. Merging reads one parameter of each model at a time.
Shapes:    weight (O, I); signs (O, I) packed, and a scale, for each task.
Composes:  caches, activations, adapters on the frozen base and task; not with anything that needs dense weights.
Use when:  several fine-tuned models of one base are wanted at hand, one at a time or one after the other.
Not when:  there is one model only (compress it), or much was trained outside the matrices of the blocks, or so far from
           the base that the differences are no smaller than its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.technique import Claim, Source, technique
from pintpot.weights.formats import Dense, Format, Routed, Signs, Tensors
from pintpot.weights.merging import MergeMethod, Tuned, average
from pintpot.weights.targets import Target

MODULES = ("all", "attention", "mlp")
"""Where a task has vectors: in all matrices of the blocks, in those of attentions, or in the others."""


def _require_known(modules: str) -> None:
    if modules not in MODULES:
        raise CompositionError(
            f"a task has vectors in {', '.join(MODULES)}, not in {modules!r}", hint=f"one of: {', '.join(MODULES)}"
        )


@technique(
    name="1bit-merging",
    wing="weights",
    source=Source("1bit-Merging: Dynamic Quantized Merging for Large Language Models", 2025, "2502.10743"),
    accounts=[Account.WEIGHTS],
    jobs=["merge"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim(
            "percent of the performance kept",
            94.53,
            versus="task-specific routing",
            at="storage 55.02 %; Mistral 7B, chat, mathematics and code",
            where="abstract, version 2",
        )
    ],
    fidelity="from the abstracts alone: tasks are chosen by name and not by a router, modules by the user; the rest is "
    "the average of the models",
)
@dataclass(frozen=True, kw_only=True)
class OneBitMerging(MergeMethod):
    """A base and 1-bit task vectors.

    Attributes:
        modules: where tasks have vectors unless they say otherwise: ``"all"``, ``"attention"`` or ``"mlp"``.
    """

    modules: str = "all"

    def __post_init__(self) -> None:
        _require_known(self.modules)

    def formats_for(self, target: Target, models: Sequence[Tuned]) -> tuple[Format, ...]:
        """The dense numbers that tasks share, and signs for each task that has a vector here."""
        part = "attention" if target.head_dim else "mlp"
        chosen = {model.task: model.modules or self.modules for model in models}
        for modules in chosen.values():
            _require_known(modules)
        tasks = tuple(task for task, modules in chosen.items() if modules in ("all", part))
        return (Dense(dtype=target.dtype), Routed(inner=Signs(), tasks=tasks)) if tasks else ()

    def find_merged(
        self, formats: tuple[Format, ...], base: Tensor, tuned: Mapping[str, Tensor]
    ) -> tuple[Tensors, ...]:
        """What is shared, and the signs of what separates each task's weight from it."""
        dense, routed = formats
        if not isinstance(routed, Routed):
            raise CompositionError(f"{self.name} holds a sum of tasks, not {routed}", hint="leave the layout to it")
        shared = dense.encode(base if len(routed.tasks) == len(tuned) else average(tuned.values(), base))
        held = dense.decode(shared, base.shape[-1], torch.float32)
        vectors = [routed.inner.encode(tuned[task].float() - held) for task in routed.tasks]
        return shared, routed.store(vectors)
