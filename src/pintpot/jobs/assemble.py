"""From a plan's techniques to live objects: the one place where wings meet, and the order they are applied in.

Order:   weights (packed while loading), their kernel, adapters, cache attention, parameters, optimizer, activations.
         The same code dresses a real model and a fake one, so that what is simulated is what is run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import Cache, PreTrainedModel

from pintpot.activations._base import ActivationMethod
from pintpot.adapters._base import AdapterMethod
from pintpot.cache import build_cache, use_cache_attention
from pintpot.cache._base import Keep, LayerSharing, Store
from pintpot.cache.chunked_prefill import ChunkedPrefill
from pintpot.cache.residue import Residue
from pintpot.core.errors import CompositionError, PlanError
from pintpot.core.heap import return_freed_memory
from pintpot.core.plan import Plan
from pintpot.core.shape import ModelShape
from pintpot.core.slots import check
from pintpot.core.technique import Technique
from pintpot.core.workload import Generate, Pretrain, Workload
from pintpot.jobs.calibration_texts import calibration_texts
from pintpot.jobs.dtypes import DTYPES
from pintpot.jobs.load import load, no_progress_bars
from pintpot.jobs.model_source import model_folder
from pintpot.jobs.streamed import load_streamed
from pintpot.ledger.predict import Assembled, Build
from pintpot.optim._adamw import AdamWRule
from pintpot.optim._base import OptimExtra, OptimMethod
from pintpot.optim._parameterize import Parameterization
from pintpot.optim._stream import BlockStore
from pintpot.weights import load_and_compress
from pintpot.weights._base import WeightMethod
from pintpot.weights.arithmetic import Arithmetic
from pintpot.weights.kernel_choice import KernelChoice

Scope = Callable[[], AbstractContextManager[Any]]
"""What makes the context around the passes of a job."""


@dataclass(frozen=True)
class Rates:
    """What an optimizer needs beside its technique."""

    learning_rate: float = 1e-4
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Composition:
    """The techniques of a run, each in its place; ``None`` means the plain way."""

    weights: WeightMethod | None = None
    kernel: KernelChoice | None = None
    arithmetic: Arithmetic | None = None
    keep: Keep | None = None
    store: Store | None = None
    layers: LayerSharing | None = None
    residue: Residue | None = None
    prefill: ChunkedPrefill | None = None
    parameters: Parameterization | None = None
    optimizer: OptimMethod | None = None
    states: OptimExtra | None = None
    release: OptimExtra | None = None
    rule: OptimExtra | None = None
    rounding: OptimExtra | None = None
    activations: ActivationMethod | None = None
    loss: ActivationMethod | None = None
    adapters: AdapterMethod | None = None

    @classmethod
    def of(cls, techniques: Iterable[Technique], job: str) -> Composition:
        """The techniques in their places.

        Raises:
            CompositionError: when two cannot stand together, one does not serve the job, or one has no place here.
        """
        chosen = tuple(techniques)
        check(chosen, job)
        places: dict[str, Technique] = {}
        for technique in chosen:
            name = _PLACES.get((technique.facts.slot, technique.facts.part))
            if name is None:
                raise CompositionError(
                    f"{technique.name} has no place in {job}", hint="leave it out of the expression or the plan"
                )
            places[name] = technique
        return cls(**places)  # type: ignore[arg-type]  # each part of a slot has its own type

    @property
    def changes_cache(self) -> bool:
        """Whether generation needs a cache of ours."""
        return any(part is not None for part in (self.keep, self.store, self.layers, self.residue))

    @property
    def extras(self) -> dict[str, Any]:
        """Arguments for the optimizer from the techniques beside its method."""
        chosen = (self.states, self.release, self.rule, self.rounding)
        return {key: value for extra in chosen if extra is not None for key, value in extra.extras.items()}


_PLACES: dict[tuple[str, str], str] = {
    ("weights", ""): "weights",
    ("weights", "kernel"): "kernel",
    ("weights", "arithmetic"): "arithmetic",
    ("cache", "keep"): "keep",
    ("cache", "store"): "store",
    ("cache", "layers"): "layers",
    ("cache", "residue"): "residue",
    ("cache", "prefill"): "prefill",
    ("optimizer", "parameters"): "parameters",
    ("optimizer", ""): "optimizer",
    ("optimizer", "states"): "states",
    ("optimizer", "release"): "release",
    ("optimizer", "rule"): "rule",
    ("optimizer", "rounding"): "rounding",
    ("activations", ""): "activations",
    ("activations", "loss"): "loss",
    ("adapters", ""): "adapters",
}
"""The field of ``Composition`` for each part of a slot."""


def assemble(
    folder: Path,
    plan: Plan,
    rates: Rates | None = None,
    shape: ModelShape | None = None,
    *,
    place: Path | None = None,
) -> Assembled:
    """The plan's job on the model of a folder, ready to run.

    Args:
        folder: a dense model folder, or one that was compressed before. Pretraining reads its configuration only, and
            begins from random weights of the global generator.
        plan: what to apply.
        rates: the optimizer's, for training.
        shape: what to pretrain, when not what the folder says.
        place: a folder for weights that stay on disk while they are trained; a temporary one when absent.

    Raises:
        ModelFolderError: when the folder is incomplete, corrupt or unsafe.
        CompositionError: when the techniques cannot be applied to it.
    """
    composition = Composition.of(plan.techniques, plan.workload.job)
    if plan.budget.device is not None:
        # A budget is one of tensors; without this the process may take twice as much.
        return_freed_memory()
    dtype = DTYPES[plan.model.dtype]
    store: BlockStore | None = None
    if isinstance(plan.workload, Pretrain):
        model = (shape or ModelShape.from_folder(folder, dtype)).build("cpu")
    elif composition.optimizer is not None and composition.optimizer.streams:
        model, store = load_streamed(folder, dtype, place)
    else:
        model = _load(folder, composition, plan)
    return dress(model, composition, plan.workload, rates, seed=plan.seed, store=store)


def apply(plan: Plan, model: str | Path | None = None, rates: Rates | None = None) -> Assembled:
    """The plan's job, ready to run: model, cache or optimizer, and scope, with every technique applied.

    Args:
        plan: what to apply.
        model: a model folder or hub name; the one that the plan names when absent.
        rates: the optimizer's, for training.

    Raises:
        PlanError: when the plan was written for another model.
        PintpotError: as ``assemble`` does.
    """
    folder = model_folder(model or plan.model.name)
    shape = ModelShape.from_folder(folder)
    if shape.fingerprint != plan.model.fingerprint:
        raise PlanError(
            f"the plan was written for another model ({plan.model.name}), not for {folder}",
            hint="make a plan for this model with: pintpot plan",
        )
    return assemble(folder, plan, rates)


def fake_build(techniques: Iterable[Technique], workload: Workload, rates: Rates | None = None) -> Build:
    """The same job as ``assemble`` makes, on a model of a given shape without weights, for simulation."""
    composition = Composition.of(techniques, workload.job)

    def build(shape: ModelShape) -> Assembled:
        model = shape.build("cpu")
        if composition.weights is not None:
            composition.weights.prepare_skeleton_(model)
        with torch.device("meta"):
            trained = _adapted(model, composition, workload)
        _materialise_(trained)
        return dress(model, composition, workload, rates, trained)

    return build


def dress(
    model: PreTrainedModel,
    composition: Composition,
    workload: Workload,
    rates: Rates | None = None,
    trained: nn.Module | None = None,
    *,
    seed: int = 0,
    store: BlockStore | None = None,
) -> Assembled:
    """Apply all techniques but the weights', which are part of loading, to a real or a fake model.

    Args:
        model: the model.
        composition: the techniques.
        workload: the sizes of the job.
        rates: the optimizer's, for training.
        trained: the model with its adapters, when they are attached already.
        seed: what new parameters are drawn from.
        store: where the weights are that are not in the model.
    """
    if not workload.training:
        if composition.kernel is not None:
            composition.kernel.apply_(model)
        cache = _cache(model, composition, workload)
        piece = None if composition.prefill is None else composition.prefill.piece_tokens
        scope = _together(_arithmetic(model, composition), _attention(model, composition))
        return Assembled(model=model.eval(), cache=cache, scope=scope, piece_tokens=piece)
    trained = trained if trained is not None else _adapted(model, composition, workload)
    if composition.parameters is not None:
        composition.parameters.prepare_(trained, seed)
    optimizer = _optimizer(trained, composition, rates or Rates(), {} if store is None else {"store": store})
    if composition.parameters is not None:
        composition.parameters.follow_(trained, optimizer)
    scope = _together(_arithmetic(model, composition), _activations(trained, composition, workload))
    return Assembled(model=trained.train(), optimizer=optimizer, scope=scope)


def undress(model: nn.Module, composition: Composition) -> None:
    """Give a trained model its ordinary layers back, before it is saved."""
    if composition.parameters is not None:
        composition.parameters.finish_(model)


def _adapted(model: PreTrainedModel, composition: Composition, workload: Workload) -> nn.Module:
    """The model that is trained: with adapters attached, if there are any."""
    if workload.training and composition.adapters is not None:
        return composition.adapters.attach(model)
    if workload.training and composition.weights is not None:
        raise CompositionError(
            f"{composition.weights.name} leaves no weights to train", hint="add adapters: for instance lora"
        )
    return model


def _materialise_(model: nn.Module) -> None:
    """Give parameters on the meta device, as adapters made for a fake model are, fake storage on the CPU.

    peft moves adapters to the device of their layer by ``Module.to``, which torch cannot do to fake tensors; those
    on the meta device it leaves where they are.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "meta":
                empty = torch.empty_like(parameter, device="cpu")
                setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))


def _load(folder: Path, composition: Composition, plan: Plan) -> PreTrainedModel:
    dtype = DTYPES[plan.model.dtype]
    if composition.weights is not None:
        with no_progress_bars():
            texts = calibration_texts(folder, composition.weights, seed=plan.seed)
            return load_and_compress(folder, composition.weights, dtype=dtype, texts=texts)
    return load(folder, dtype, size_bytes=plan.model.size_bytes)


def _cache(model: PreTrainedModel, composition: Composition, workload: Workload) -> Callable[[], Cache] | None:
    if not composition.changes_cache:
        return None
    tokens = workload.prompt_tokens + workload.new_tokens if isinstance(workload, Generate) else None
    return partial(
        build_cache,
        model.config,
        keep=composition.keep,
        store=composition.store,
        layers=composition.layers,
        residue=composition.residue,
        tokens=tokens,
        dtype=model.dtype,
    )


def _attention(model: PreTrainedModel, composition: Composition) -> Scope:
    if not composition.changes_cache:
        return nullcontext
    return partial(use_cache_attention, model)


def _arithmetic(model: PreTrainedModel, composition: Composition) -> Scope:
    return nullcontext if composition.arithmetic is None else composition.arithmetic.scope_of(model)


def _optimizer(model: nn.Module, composition: Composition, rates: Rates, more: Mapping[str, Any]) -> Optimizer:
    extras = dict(more) | composition.extras
    own = None if composition.parameters is None else composition.parameters.rule()
    chosen = composition.optimizer or own
    if chosen is not None or extras:
        rule = chosen or AdamWRule()
        return rule.optimizer(model, lr=rates.learning_rate, weight_decay=rates.weight_decay, **extras)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return AdamW(trained, lr=rates.learning_rate, weight_decay=rates.weight_decay)


def _activations(model: nn.Module, composition: Composition, workload: Workload) -> Scope:
    methods = (composition.loss, composition.activations)
    return _together(*(partial(method.scope, model, workload) for method in methods if method is not None))


def _together(*scopes: Scope) -> Scope:
    """A scope inside all of some scopes, the first of them outermost."""

    @contextmanager
    def scope() -> Iterator[None]:
        with ExitStack() as stack:
            for each in scopes:
                stack.enter_context(each())
            yield

    return scope
