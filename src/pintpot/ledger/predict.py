"""Prediction: the steps of a job run on tensors that have shapes and no bytes, watched by the tracker that measures.

Nothing is loaded and nothing is computed: the model is built from its configuration under `FakeTensorMode`, and the
same functions that the jobs run (`pintpot.ledger.steps`) run on it. Techniques are included by giving a `Build`
that applies them. Deep models are traced at three small depths and continued (`pintpot.ledger.depth`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.optim import AdamW, Optimizer
from transformers import Cache

from pintpot.core.errors import UnsupportedModel
from pintpot.core.ledger import Ledger, Moment
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Generate, Train, Workload
from pintpot.ledger.depth import extend, layers_of, shallow_depths, with_depth
from pintpot.ledger.fakes import MissingShapes, PassThroughCache
from pintpot.ledger.reach import base_model
from pintpot.ledger.steps import Progress, choose, decode, prefill, train_step
from pintpot.ledger.timeline import Sample
from pintpot.ledger.tracker import Tracker


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """A job ready to run, with its techniques applied; real or made of fake tensors.

    Attributes:
        model: the model, on the device where it runs.
        optimizer: over the model's trainable parameters; None for generation.
        cache: makes an empty cache for one generation; None lets the model make its own.
        scope: makes the context around each forward and backward pass of training, or around a generation.
        piece_tokens: tokens of a prompt that are read at once; None reads all.
    """

    model: nn.Module
    optimizer: Optimizer | None = None
    cache: Callable[[], Cache] | None = None
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    piece_tokens: int | None = None

    def prefill(self, input_ids: Tensor) -> Progress:
        """Read a prompt (batch, tokens) into a new cache, inside ``scope``."""
        cache = None if self.cache is None else self.cache()
        return prefill(self.model, input_ids, cache, self.piece_tokens)


Build = Callable[[ModelShape], Assembled]
"""Builds a job on a model of the given shape, by `shape.build("cpu")`; called inside `FakeTensorMode`, where that
allocates nothing. The shape may have fewer layers than the model that is asked about."""


def simulate(build: Build, shape: ModelShape, workload: Workload, *, extrapolate: bool = True) -> Ledger:
    """The predicted ledger of a job: one moment for each phase (its peak), in the phases' order.

    Phases are `load` (the model and nothing else; the peak of loading or compressing is the technique's own figure),
    then `prefill` and `decode` (of its first and last token, the larger), or `forward`, `backward` and `step` (of
    two steps, the larger).

    Args:
        build: makes the job. It and the job's steps may not look at values: there are none.
        shape: the model.
        workload: a `Generate`, `Finetune` or `Pretrain`.
        extrapolate: trace a deep model at three small depths instead of whole. Where the three do not line up, it is
            traced whole anyway. Set it to False for jobs that do different things at different depths.

    Raises:
        UnsupportedModel: when the model's code needs values to know what to compute.
    """
    depths = shallow_depths(shape.config) if extrapolate else None
    if depths is not None:
        traces = [trace(build, with_depth(shape, depth), workload, None) for depth in depths]
        moments = extend(traces, depths, layers_of(shape.config))
        if moments is not None:
            return _ledger(moments, shape, workload, depths)
    return _ledger([s.moment() for s in trace(build, shape, workload, 2048)], shape, workload, None)


def baseline(shape: ModelShape, workload: Workload) -> Ledger:
    """The predicted ledger of the plain job: all weights dense, the model's own cache, AdamW over all parameters."""
    return _baseline(_Key(shape), workload)


def plain(workload: Workload) -> Build:
    """Builds the plain job, with nothing applied."""

    def build(shape: ModelShape) -> Assembled:
        model = shape.build("cpu")
        if not workload.training:
            return Assembled(model=model)
        return Assembled(model=model, optimizer=AdamW(model.parameters()))

    return build


class _Key:
    """A shape as a key."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.identity = shape.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.identity == other.identity


@lru_cache(maxsize=256)
def _baseline(key: _Key, workload: Workload) -> Ledger:
    return simulate(plain(workload), key.shape, workload)


def _ledger(moments: list[Moment], shape: ModelShape, workload: Workload, depths: tuple[int, ...] | None) -> Ledger:
    peaks: dict[str, Moment] = {}
    for moment in moments:
        if moment.phase not in peaks or moment.total() > peaks[moment.phase].total():
            peaks[moment.phase] = Moment(moment.phase, moment.cells)
    facts = {
        "model": shape.name,
        "fingerprint": shape.fingerprint,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "workload": workload.to_dict(),
        "traced_layers": list(depths) if depths else "all",
    }
    return Ledger("predicted", tuple(peaks.values()), facts=facts)


def trace(build: Build, shape: ModelShape, workload: Workload, samples: int | None) -> list[Sample]:
    """The samples of a job's run on fake tensors: at most about `samples` of them, or one for every allocation."""
    try:
        with FakeTensorMode(), MissingShapes():
            job = build(shape)
            with Tracker(samples=samples) as tracker:
                tracker.register(job.model, job.optimizer)
                tracker.forget()
                tracker.note()
                if isinstance(workload, Generate):
                    _generate(job, workload, tracker)
                elif isinstance(workload, Train):
                    _train(job, workload)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UnsupportedModel(
            f"the memory of {type(shape.config).__name__} cannot be predicted: {error} needs values",
            hint="measure the job instead: pintpot ledger",
        ) from error
    return [s for s in tracker.timeline.samples if s.phase != _SKIPPED]


_SKIPPED = "skipped"


def _generate(job: Assembled, workload: Generate, tracker: Tracker) -> None:
    """The prefill, and the decoding of the first and of the last token.

    The first counts too: where the cache keeps only a part of the prompt, it may still stand beside the whole.
    """
    prompt = _tokens(workload.batch, workload.prompt_tokens)
    with torch.no_grad(), job.scope():
        progress = job.prefill(prompt)
        next_token = choose(progress)
        if workload.new_tokens > 2:
            progress = decode(job.model, next_token, progress)
        between = workload.new_tokens - 3
        # A state of constant size needs no filling.
        if between > 0 and not getattr(job.model, "_is_stateful", False):
            with tracker.phase(_SKIPPED):
                progress = decode(job.model, _tokens(workload.batch, between), progress)
        if workload.new_tokens > 1:
            choose(decode(job.model, next_token, progress))


def _train(job: Assembled, workload: Train) -> None:
    """Two steps: the first makes the optimizer's state, the second runs beside it."""
    if job.optimizer is None:
        raise UnsupportedModel("a training job was built without an optimizer", hint="give Assembled an optimizer")
    tokens = _tokens(workload.batch, workload.tokens)
    inputs = {} if base_model(job.model).config.is_encoder_decoder else PassThroughCache.inputs(job.model)
    for _ in range(min(2, workload.steps)):
        train_step(job.model, job.optimizer, tokens, tokens, scope=job.scope, inputs=inputs)


def _tokens(batch: int, tokens: int) -> Tensor:
    return torch.zeros(batch, tokens, dtype=torch.long)
