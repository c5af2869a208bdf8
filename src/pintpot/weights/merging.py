"""Merging fine-tuned models of one base into one folder, in the memory of one parameter of each.

A merged folder is a compressed folder like any other: each parameter that a method names is a sum of terms, one of
which holds something of each task (``formats.Routed``). Whatever the method does not name is the average of the
fine-tuned models. It is written as compressing writes, shard by shard, and resumed after a kill.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from pintpot.core.errors import CompositionError, ModelFolderError, UnsupportedModel
from pintpot.core.files import refuse_existing
from pintpot.core.model_folder import ModelFolder, open_model
from pintpot.core.parameter_map import Origin, map_parameters
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Technique
from pintpot.core.workload import Workload
from pintpot.weights._base import CompressionReport, Layout, WeightMethod
from pintpot.weights.formats import Format, Tensors
from pintpot.weights.load import refuse_compressed
from pintpot.weights.routing import tasks_in
from pintpot.weights.streaming import (
    SHARD_BYTES,
    CompressionPlan,
    Progress,
    plan_compression,
    stored_names,
    write_compressed,
)
from pintpot.weights.targets import Target, find_targets

TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""What a task may be called."""

OWN_TO_EACH = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Entries of configurations in which models of one base may differ: nothing that is computed depends on them."""


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model.

    Attributes:
        task: what it is called in the merged one.
        folder: its dense folder.
        modules: which modules get terms of its own, in the words of the method; where the method says if empty.
    """

    task: str
    folder: Path
    modules: str = ""


@dataclass(frozen=True, kw_only=True)
class MergeMethod(WeightMethod):
    """A technique that merges models. A base: it says how a parameter is held, and finds the numbers."""

    @abstractmethod
    def formats_for(self, target: Target, models: Sequence[Tuned]) -> tuple[Format, ...]:
        """The formats of the terms of one parameter; none where the average of the models is to stand.

        Raises:
            CompositionError: for modules that the method does not know.
        """

    @abstractmethod
    def find_merged(
        self, formats: tuple[Format, ...], base: Tensor, tuned: Mapping[str, Tensor]
    ) -> tuple[Tensors, ...]:
        """The stored tensors of the terms of one weight.

        Args:
            formats: of its terms.
            base: (O, I), of the base model.
            tuned: the same weight of each fine-tuned model, by task.
        """

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """None: one model alone is not merged.

        Raises:
            CompositionError: saying how models are merged.
        """
        raise CompositionError(f"{self.name} merges several models", hint="use pintpot merge BASE MODEL MODEL OUT")

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """None: the planner has one model."""
        return ()


@dataclass(frozen=True)
class MergePlan(CompressionPlan):
    """What merging will write, known before it starts.

    Attributes:
        method: how.
        models: the fine-tuned models.
        opened: their checked folders, in the same order.
        theirs: for each of them, where every parameter comes from.
    """

    method: MergeMethod
    models: tuple[Tuned, ...] = ()
    opened: tuple[ModelFolder, ...] = ()
    theirs: tuple[Mapping[str, Origin], ...] = ()

    @property
    def sources(self) -> tuple[ModelFolder, ...]:
        """The base and the fine-tuned models."""
        return (self.source, *self.opened)

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors of all sources."""
        return sum(source.weight_bytes for source in self.sources)

    @property
    def card(self) -> tuple[str, str]:
        """The title and the first sentence of what the output's model card says of it."""
        tasks = ", ".join(f"`{model.task}`" for model in self.models)
        switch = "`pintpot.weights.route_(model, task)` switches to a task once it is loaded."
        return "Merged with Pintpot", f"Models of the tasks {tasks}, by `{self.method}`. {switch}"

    @torch.no_grad()
    def encoded(self, origin: Origin) -> dict[str, Tensor]:
        """The output tensors of one origin, by name."""
        base = origin.load()
        tuned = {m.task: _load(o, origin) for m, o in zip(self.models, self.theirs, strict=True)}
        made: dict[str, Tensor] = {}
        for name in list(base):
            parts = {task: tensors.pop(name) for task, tensors in tuned.items()}
            target = self.targets.get(name)
            if target is None:
                made[name] = average(parts.values(), base.pop(name))
            else:
                made |= stored_names(target, _terms(self.method, target, self.layout[name], base.pop(name), parts))
        return made


def _load(theirs: Mapping[str, Origin], origin: Origin) -> dict[str, Tensor]:
    """The parameters of an origin in another model.

    Raises:
        ModelFolderError: naming the other model's folder, which the base's tensors share their names with.
    """
    found: dict[str, Tensor] = {}
    for name in origin.names:
        if name not in found:
            try:
                found |= theirs[name].load()
            except ModelFolderError as error:
                folder = theirs[name].entries[0][1].file.parent
                raise ModelFolderError(f"{folder}: {error.message}", hint=error.hint) from error
    return found


def average(tensors: Collection[Tensor], like: Tensor) -> Tensor:
    """The mean of tensors, in the dtype of ``like``; where that holds no real numbers, ``like`` itself."""
    if not like.is_floating_point():
        return like
    # Wide enough that the sum of equal numbers is exact, and their mean the number itself.
    total = torch.zeros(like.shape, dtype=torch.float32 if like.dtype.itemsize < 4 else torch.float64)
    for tensor in tensors:
        total += tensor
    return total.div_(len(tensors)).to(like.dtype)


def _terms(
    method: MergeMethod, target: Target, formats: tuple[Format, ...], base: Tensor, tuned: Mapping[str, Tensor]
) -> tuple[Tensors, ...]:
    """The stored tensors of a parameter, which may be a stack of matrices."""
    rows, theirs = target.rows(base), {task: target.rows(weight) for task, weight in tuned.items()}
    if len(target.shape) == 2:
        return method.find_merged(formats, rows, theirs)
    found = [
        method.find_merged(formats, matrix, {task: weight[index] for task, weight in theirs.items()})
        for index, matrix in enumerate(rows)
    ]
    return tuple(
        {name: torch.stack([terms[index][name] for terms in found]) for name in found[0][index]}
        for index in range(len(formats))
    )


def plan_merge(
    base: str | Path, models: Sequence[Tuned], method: MergeMethod, *, shard_bytes: int = SHARD_BYTES
) -> MergePlan:
    """Check the folders and lay out what merging them will write; reads only headers.

    Args:
        base: the dense folder of the model that all were made of.
        models: the fine-tuned ones.
        method: how to merge.
        shard_bytes: most bytes in an output file.

    Raises:
        CompositionError: when tasks are named twice or in a way that cannot be read, or one has no terms of its own.
        ModelFolderError: when a folder is damaged, incomplete or unsafe.
        UnsupportedModel: when a model is compressed, or is not of the base's kind and sizes.
    """
    _check_tasks(models)
    source = open_model(base, match=False)
    opened = tuple(open_model(model.folder, match=False) for model in models)
    for folder in (source, *opened):
        refuse_compressed(folder)
    for folder in opened:
        require_same(source, folder)
    skeleton = source.shape().build("meta")
    theirs = tuple({name: origin for origin in map_parameters(f, skeleton) for name in origin.names} for f in opened)
    found, _ = find_targets(skeleton)
    every = {target.parameter: method.formats_for(target, models) for target in found}
    layout = {name: formats for name, formats in every.items() if formats}
    plan = plan_compression(source.path, method, layout=layout, shard_bytes=shard_bytes)
    _require_terms(models, layout)
    for folder, origins in zip(opened, theirs, strict=True):
        _require_all(folder, origins, plan)
    own = {field.name: getattr(plan, field.name) for field in fields(CompressionPlan)}
    return MergePlan(**own, models=tuple(models), opened=opened, theirs=theirs)


def merge_folders(
    base: str | Path,
    models: Sequence[Tuned],
    out: str | Path,
    method: MergeMethod,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    check_disk: bool = True,
) -> CompressionReport:
    """Merge fine-tuned models of one base into a new folder; killed, it goes on where it stopped when called again.

    Peak memory is the largest parameter of every model, twice in 32 bits, and its terms.

    Args:
        base: the dense folder of the model that all were made of; the output has its tokenizer and settings.
        models: the fine-tuned ones.
        out: the folder to write; it must not exist. Until the end it is called ``<out>.partial``.
        method: how to merge.
        shard_bytes: most bytes in an output file.
        progress: told how far it is, in bytes of the base.
        check_disk: refuse to start when the disk cannot hold the output.

    Raises:
        OutputExists: when the output exists, or an unfinished one of another run stands in its place.
        BudgetError: when the disk is too small.
        PintpotError: as ``plan_merge`` does.
    """
    refuse_existing(out)
    plan = plan_merge(base, models, method, shard_bytes=shard_bytes)
    return write_compressed(plan, out, progress=progress, check_disk=check_disk)


def _check_tasks(models: Sequence[Tuned]) -> None:
    names = [model.task for model in models]
    wrong = [name for name in names if not TASK.fullmatch(name)]
    cause = "there is nothing to merge" if not models else "two tasks have one name"
    if wrong:
        cause = f"{', '.join(map(repr, wrong))} cannot be the name of a task"
    if not models or wrong or len(set(names)) < len(names):
        raise CompositionError(
            cause, hint="give each model as name=folder, with letters, digits, - and _ in a name of its own"
        )


def _require_terms(models: Sequence[Tuned], layout: Layout) -> None:
    held = tasks_in(layout.values())
    lost = [model.task for model in models if model.task not in held]
    if lost:
        raise CompositionError(
            f"nothing of {', '.join(lost)} would be kept: the model has no modules of the kind that was named",
            hint="let it have terms of its own in all modules",
        )


def require_same(base: ModelFolder, other: ModelFolder) -> None:
    """Refuse a model that was not made of the base: another architecture, other sizes or other settings.

    Raises:
        UnsupportedModel: naming the entries of ``config.json`` that differ, with both values.
    """
    ours, theirs = base.config.to_dict(), other.config.to_dict()
    compared = (ours.keys() & theirs.keys()) - OWN_TO_EACH
    wrong = sorted((name != "model_type", name) for name in compared if ours[name] != theirs[name])
    if wrong:
        shown = "; ".join(f"{name} is {theirs[name]!r}, not {ours[name]!r}" for _, name in wrong[:3])
        raise UnsupportedModel(
            f"{other.path} was not made of {base.path}: {shown}{'; ...' if len(wrong) > 3 else ''}",
            hint="merge models that were fine-tuned from one base without changing its sizes or its vocabulary",
        )


def _require_all(folder: ModelFolder, origins: Mapping[str, Origin], plan: CompressionPlan) -> None:
    missing = [name for origin in plan.origins for name in origin.names if name not in origins]
    if missing:
        raise ModelFolderError(
            f"{folder.path} lacks {missing[0]} (and {len(missing) - 1} more parameters) of the base",
            hint="save the fine-tuned model as a whole, with adapters merged into it",
        )
