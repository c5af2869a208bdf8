"""Sublinear checkpointing: keep the hidden state at a few blocks, and recompute the blocks between when needed.

Source:    Chen et al. 2016, arXiv:1604.06174, section 4 (segments; the square-root rule for equal blocks).
Differs:   the segments are the exact best for the bytes of each block, its boundary and the head, where the paper
           gives a greedy planner under a guessed budget; a block is kept rather than recomputed where that does
           not raise the peak; no recursion to O(log n).
Saves:     activations, real: from L blocks' saved tensors to about 2 sqrt(L) for equal blocks.
Shapes:    hidden states (batch, tokens, hidden); anything else the model passes between its blocks.
Composes:  any optimizer, any adapters, packed weights (their dense forms are made again and not kept).
Use when:  the activations do not fit: long sequences, large batches.
Not when:  the budget holds the plain step: up to one more forward pass is computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from pintpot.activations._base import ActivationMethod
from pintpot.activations._profile import step_bytes
from pintpot.activations._replay import recomputed
from pintpot.activations._segments import (
    Bound,
    Segments,
    StepBytes,
    fewest_recomputed,
    instants,
    lowest_peak,
    lowest_total,
)
from pintpot.core.errors import BudgetError, CompositionError
from pintpot.core.ledger import Account, Ledger
from pintpot.core.shape import ModelShape, block_names
from pintpot.core.technique import TRAINING, Claim, Source, technique
from pintpot.core.units import format_bytes
from pintpot.core.work import Work
from pintpot.core.workload import Train, Workload

_CHOSEN: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, ...], Segments]] = weakref.WeakKeyDictionary()
"""Segments already chosen for a model, because a scope may be entered for every step."""


@technique(
    name="sublinear-checkpointing",
    wing="activations",
    source=Source("Training Deep Nets with Sublinear Memory Cost", arxiv="1604.06174", year=2016),
    accounts=(Account.ACTIVATIONS,),
    jobs=TRAINING,
    needs=("gradients",),
    claims=(
        Claim("additional running time (fraction)", 0.30, versus="plain training", at="1,000-layer residual network"),
        Claim("feature map memory (GB)", 7.0, versus="48", at="1,000-layer residual network", where="abstract"),
    ),
    fidelity="segments by exact dynamic programming instead of the greedy planner; no recursion",
)
@dataclass(frozen=True, kw_only=True)
class SublinearCheckpointing(ActivationMethod):
    """Segments of blocks that are recomputed; which ones is computed, so there is nothing to set."""

    def scope(
        self, model: nn.Module, workload: Workload, budget_bytes: int | None = None
    ) -> AbstractContextManager[Segments]:
        """See ``ActivationMethod.scope``; the context's value is the chosen segments (tuples of block numbers).

        Gradients are those of the plain step bit for bit, dropout included.

        Raises:
            CompositionError: on entering, when the model's own checkpointing is switched on.
        """
        return _scope(model, workload, budget_bytes)

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """The ``activations`` account of the forward and backward phases, and ``gradients`` at the backward peak."""
        if not isinstance(workload, Train):
            return ledger
        step = shape_bytes(shape, workload.batch, workload.tokens)
        moments = instants(step, choose(step, None))
        # Adapters may have made the gradients of this ledger fewer than the plain model's.
        every = step.head_gradients + sum(b.gradients for b in step.blocks)
        share = ledger.phase("step").of(Account.GRADIENTS) / every
        peak = max(moments, key=lambda m: m.activations + share * m.gradients)
        changed = ledger.set(Account.ACTIVATIONS, moments[0].activations, phases=("forward",))
        changed = changed.set(Account.ACTIVATIONS, peak.activations, phases=("backward",))
        return changed.set(Account.GRADIENTS, int(share * peak.gradients), phases=("backward",))

    def work(self, work: Work, shape: ModelShape, workload: Workload) -> Work:
        """One more forward pass through the recomputed blocks."""
        if not isinstance(workload, Train):
            return work
        segments = choose(shape_bytes(shape, workload.batch, workload.tokens), None)
        names = sorted({p.block for p in shape.parameters if p.block})
        share = sum(len(s) for s in segments) / max(1, len(names))
        weights = [p for p in shape.parameters if p.block and len(p.shape) > 1]
        flops = 2.0 * share * sum(p.numel for p in weights) * workload.batch * workload.tokens
        dtype = str(shape.dtype).removeprefix("torch.")
        return work.plus("step", read_bytes=int(share * sum(p.nbytes for p in weights)), flops=flops, dtype=dtype)


@lru_cache(maxsize=256)
def choose(step: StepBytes, budget_bytes: int | None) -> Segments:
    """The segments to recompute; remembered, because the planner asks many times.

    Without a budget: the least peak with gradients, which pile up during the backward pass; of the choices that reach
    it the least peak of what is kept; of those the fewest recomputed blocks. Within a budget: the fewest recomputed.

    Args:
        step: bytes of a training step by block.
        budget_bytes: the most that may be kept for the backward pass.

    Raises:
        BudgetError: when no choice meets the budget.
    """
    bound = Bound(activations=float("inf") if budget_bytes is None else budget_bytes)
    if budget_bytes is None:
        total = lowest_total(step)
        bound = Bound(lowest_peak(step, total), total)
    segments = fewest_recomputed(step, bound)
    if segments is None:
        raise BudgetError(
            f"activations need at least {format_bytes(lowest_peak(step))} with sublinear-checkpointing, "
            f"and may use {format_bytes(int(bound.activations))}",
            hint="use a smaller batch or shorter sequences",
        )
    return segments


_SHAPE_BYTES: dict[tuple[str, str, str, int, int], StepBytes] = {}
"""Bytes already found for a shape: the planner asks many times."""


def shape_bytes(shape: ModelShape, batch: int, tokens: int) -> StepBytes:
    """The bytes of a training step of a model's shape with all parameters trainable; remembered."""
    attention = str(getattr(shape.config, "_attn_implementation", ""))
    key = (shape.fingerprint, str(shape.dtype), attention, batch, tokens)
    if key not in _SHAPE_BYTES:
        _SHAPE_BYTES[key] = step_bytes(shape.build("meta"), batch, tokens)
    return _SHAPE_BYTES[key]


@contextmanager
def _scope(model: nn.Module, workload: Workload, budget_bytes: int | None) -> Iterator[Segments]:
    if not isinstance(workload, Train):
        raise CompositionError(f"sublinear-checkpointing has nothing to do in {workload.job}", hint="leave it out")
    own = [name for name, module in model.named_modules() if getattr(module, "gradient_checkpointing", False) is True]
    if own:
        raise CompositionError(
            f"the model checkpoints by itself ({own[0] or 'the whole model'})",
            hint="switch it off with model.gradient_checkpointing_disable()",
        )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    limit = -1 if budget_bytes is None else budget_bytes
    key = (workload.batch, workload.tokens, trainable, limit)
    known = _CHOSEN.setdefault(model, {})
    if key not in known:
        known[key] = choose(step_bytes(model, workload.batch, workload.tokens), budget_bytes)
    blocks = [model.get_submodule(name) for name in block_names(model)]
    with recomputed(blocks, known[key]):
        yield known[key]
