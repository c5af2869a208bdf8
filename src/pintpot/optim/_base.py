"""The optimizer wing: a protocol by which each method names its parts, which ``_engine`` runs.

    select blocks x project x inner rule x residual, the moments kept in some states

Shapes: parameters of any shape. Those that are projected are matrices or stacks of matrices, seen by the parts
with the smaller side first (see ``_project``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import nn

from pintpot.core.errors import ShapeError
from pintpot.core.expression import parse
from pintpot.core.ledger import Account, Ledger, Moment
from pintpot.core.shape import ModelShape, ParameterShape
from pintpot.core.technique import Technique
from pintpot.core.work import Work
from pintpot.core.workload import Pretrain, Workload
from pintpot.optim._engine import ProjectedOptimizer
from pintpot.optim._groups import is_matrix, split_shape
from pintpot.optim._inner import Adam, Inner
from pintpot.optim._project import Project, Whole
from pintpot.optim._residual import Drop, Residual
from pintpot.optim._select import Select
from pintpot.optim._states import TABLE_BYTES, States, states_of
from pintpot.optim._tensors import CHUNK_NUMEL, chunks

UNPACKED_BYTES = 24
"""Temporaries for one element of a packed moment while it is read, updated and written: six float32 numbers."""

PRETRAINING_RATIO = 5.0
"""The usual learning rate of pretraining over that of fine-tuning: AdamW's 1e-3 over 2e-4."""


@dataclass(frozen=True, kw_only=True)
class OptimMethod(Technique):
    """A technique of the ``optimizer`` slot. Its fields are hyperparameters of parameter groups.

    Attributes:
        usual_learning_rate: for fine-tuning a language model, where none is given.
        usual_pretraining_rate: for training one from random weights; ``PRETRAINING_RATIO`` times that when ``None``.
        streams: whether it trains weights that stay on disk; ``optimizer`` then takes them as ``store``.
    """

    usual_learning_rate: ClassVar[float] = 2e-4
    usual_pretraining_rate: ClassVar[float | None] = None
    streams: ClassVar[bool] = False

    @classmethod
    def learning_rate_of(cls, job: str) -> float:
        """The learning rate that is usual for a job."""
        if job != Pretrain.job:
            return cls.usual_learning_rate
        return cls.usual_pretraining_rate or PRETRAINING_RATIO * cls.usual_learning_rate

    @abstractmethod
    def optimizer(
        self, model: nn.Module, *, lr: float, weight_decay: float = 0.0, **extras: Any
    ) -> torch.optim.Optimizer:
        """An optimizer of the model's trainable parameters.

        Args:
            model: what is trained.
            lr: learning rate.
            weight_decay: decoupled from the gradient.
            **extras: what the techniques of the slot's other parts add (see ``OptimExtra``).

        Raises:
            CompositionError: for an extra that the method does not take.
        """

    def check(self) -> None:
        """Refuse hyperparameters that make no sense.

        Raises:
            ShapeError: naming the first one.
        """


@dataclass(frozen=True, kw_only=True)
class OptimExtra(Technique):
    """A technique that changes how any rule of the slot is run: how its states are kept, when gradients go.

    Attributes:
        rate_factor: what a method's usual learning rate is multiplied by.
    """

    rate_factor: ClassVar[float] = 1.0

    @property
    @abstractmethod
    def extras(self) -> Mapping[str, Any]:
        """Arguments for ``OptimMethod.optimizer``."""


@dataclass(frozen=True, kw_only=True)
class ProjectedMethod(OptimMethod):
    """A method of the algebra. Without a projection all parameters follow AdamW."""

    kind: ClassVar[type[ProjectedOptimizer]]

    state_bits: ClassVar[int] = 32
    """How the moments are kept when nothing else is asked for (see ``STATE_BITS``)."""

    def project(self) -> Project | None:
        """The projection of weight matrices."""
        return None

    def residual(self) -> Residual | None:
        """What becomes of the gradient outside the subspace; needed with a projection."""
        return None

    def select(self) -> Select | None:
        """The rule that chooses the blocks to train; all of them without one."""
        return None

    @property
    def refresh_steps(self) -> int:
        """Steps between two choices of the subspace."""
        return 1

    @property
    def base_seed(self) -> int:
        """What the seeds of a random projection start from."""
        return 0

    def inner(self, betas: tuple[float, float], eps: float) -> Inner:
        """The rule that updates small gradients; Adam unless overridden."""
        return Adam(betas=betas, eps=eps)

    def optimizer(self, model: nn.Module, *, lr: float, weight_decay: float = 0.0, **extras: Any) -> ProjectedOptimizer:
        """The torch optimizer of this method with these hyperparameters."""
        return self.kind(model, lr=lr, weight_decay=weight_decay, **extras, **asdict(self))

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """The ``optimizer`` account of every phase of training and the ``workspace`` of the update, in closed form.

        With a selection, ``gradients`` too are those of the largest choice, unless the rule looks at all of them.
        """
        if not workload.training:
            return ledger
        changed = replace(ledger, facts={**ledger.facts, OPTIMIZER_FACT: str(self)})
        changed = changed.set(Account.OPTIMIZER, self.state_bytes(shape), phases=("forward", "backward", "step"))
        changed = changed.set(Account.WORKSPACE, self.workspace_bytes(shape), phases=("step",))
        select = self.select()
        if select is None or select.looks:
            return changed
        share = self._most_at_once(shape, {p.name: p.nbytes for p in shape.parameters}) / shape.weight_bytes

        def fewer(moment: Moment) -> Moment:
            return moment.with_bytes(Account.GRADIENTS, int(share * moment.of(Account.GRADIENTS)))

        return changed.edit(fewer, phases=("backward", "step"))

    def state_bytes(self, shape: ModelShape, rule: Inner | None = None, bits: int | None = None) -> int:
        """Bytes kept between steps: the moments of each small matrix, and what projection, rule and residual keep.

        A matrix of sides S <= L at rank R takes ``2 R L`` elements for Adam, and ``S R`` more where the basis is
        stored; every other parameter takes twice its own elements. With a selection, the most of any choice.

        Args:
            shape: the model.
            rule: what takes the place of the method's own inner rule.
            bits: how moments are kept, if not as the method says.
        """
        matrices, plain = self._ways(shape, rule)
        states = states_of(bits or self.state_bits)
        moments = Adam.moments if rule is None or rule.by_matrix else rule.moments
        sizes = {p.name: len(moments) * states.nbytes(p.numel, p.dtype) for p in plain}
        inner = rule or self.inner(Adam.betas, Adam.eps)
        sizes |= {p.name: _small_state_bytes(p, inner, *way, states) for p, way in matrices}
        return self._most_at_once(shape, sizes)

    def workspace_bytes(self, shape: ModelShape, rule: Inner | None = None) -> int:
        """The most bytes of temporaries during one update (see ``state_bytes``)."""
        matrices, plain = self._ways(shape, rule)
        unpacked = UNPACKED_BYTES if self.state_bits != 32 else 0
        most = 0
        if plain:
            size = max(p.dtype.itemsize for p in plain)
            most = (2 * size + unpacked) * min(CHUNK_NUMEL, sum(p.numel for p in plain))
        inner = rule or self.inner(Adam.betas, Adam.eps)
        projected = [p for p, _ in matrices]
        sides = [_sides(p) for p in projected]
        ranks = [project.rank_of(side) for (_, (project, _)), (side, _) in zip(matrices, sides, strict=True)]
        small = [torch.Size((*p.shape[:-2], r, n)) for p, r, (_, n) in zip(projected, ranks, sides, strict=True)]
        largest = [inner.largest(shape, side) for shape, (side, _) in zip(small, sides, strict=True)]
        for batch in chunks(largest):
            size = max(projected[i].dtype.itemsize for i in batch)
            held = sum(3 * size * small[i].numel() + unpacked * largest[i] for i in batch)
            most = max(most, held)
            for i in batch:
                count = projected[i].numel // (sides[i][0] * sides[i][1])
                project, residual = matrices[i][1]
                native, double = project.workspace_numel(*sides[i])
                own = inner.workspace_numel(ranks[i], sides[i][1])
                extra = count * (native * size + 4 * max(own, residual.workspace_numel(*sides[i])))
                extra += project.copies_bytes(*sides[i], projected[i].dtype) if count == 1 else 0
                most = max(most, held + extra, count * double * 8)
        return most

    def work(self, work: Work, shape: ModelShape, workload: Workload) -> Work:
        """AdamW's traffic less the moments that are gone, and the products with the basis."""
        project = self.project()
        if not workload.training or project is None:
            return work
        moved, flops = 0, 0.0
        for p in self._split(shape)[0]:
            side, long = _sides(p)
            rank = project.rank_of(side)
            moved += (4 * p.numel // side * rank - 3 * p.numel) * p.dtype.itemsize
            refresh = self.refresh_flops(side, long) * (p.numel // (side * long)) / self.refresh_steps
            flops += project.flops(side, long) * (p.numel // (side * long)) + refresh
        return work.plus("step", read_bytes=moved, flops=flops, dtype=str(shape.dtype).removeprefix("torch."))

    def refresh_flops(self, side: int, long: int) -> float:
        """Operations to choose the subspace of one matrix."""
        project = self.project()
        return project.refresh_flops(side, long) if project is not None else 0.0

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """The default, and ranks of a half, a quarter (the paper's) and an eighth of the smallest projected side."""
        sides = [min(p.shape[-2:]) for p in split_shape(shape)[0]]
        ranks = {max(1, min(sides) // part) for part in (2, 4, 8)} if sides else set()
        yield cls()
        default = {f.name: f.default for f in fields(cls)}.get("rank")
        for rank in sorted(ranks - {default}) if default is not None else ():
            yield cls.build({"rank": rank})

    def check(self) -> None:
        """Refuse ranks and intervals below 1 and scales that are not positive."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str | bool):
                continue
            if (field.name != "seed" and value <= 0) or value < 0:
                raise ShapeError(f"{field.name} must be positive, not {value}", hint=f"default: {field.default}")

    def _split(self, shape: ModelShape) -> tuple[list[ParameterShape], list[ParameterShape]]:
        """The parameters that are projected, and the others."""
        return split_shape(shape) if self.project() is not None else ([], list(shape.parameters))

    def _ways(
        self, shape: ModelShape, rule: Inner | None
    ) -> tuple[list[tuple[ParameterShape, tuple[Project, Residual]]], list[ParameterShape]]:
        """The matrices with what they go through, and the parameters that follow the plain rule."""
        project, residual = self.project(), self.residual()
        projected, plain = self._split(shape)
        ways = [(p, (project, residual)) for p in projected if project is not None and residual is not None]
        if rule is not None and rule.by_matrix:
            ways += [(p, (Whole(), Drop(1.0))) for p in plain if is_matrix(p.shape)]
            plain = [p for p in plain if not is_matrix(p.shape)]
        return ways, plain

    def _most_at_once(self, shape: ModelShape, sizes: Mapping[str, int]) -> int:
        """The most bytes of parameters, given by name, that are trained at once."""
        select = self.select()
        if select is None:
            return sum(sizes.values())
        blocks: dict[str, int] = defaultdict(int)
        for p in shape.parameters:
            blocks[p.block] += sizes[p.name]
        return blocks.pop("", 0) + sum(sorted(blocks.values())[-select.active :])


OPTIMIZER_FACT = "optimizer"
"""Under this name a predicted ledger says of which techniques its ``optimizer`` account is."""


@dataclass(frozen=True, kw_only=True)
class RuleExtra(OptimExtra):
    """A technique whose inner rule takes Adam's place in any method that has none of its own."""

    @abstractmethod
    def rule(self) -> Inner:
        """The inner rule with these hyperparameters."""

    @property
    def extras(self) -> Mapping[str, Any]:
        """The rule."""
        return {"inner": self.rule()}

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """The states of this rule instead of Adam's, and its temporaries.

        Where the ledger does not say whose states they are (a plain AdamW's, or adapters'), all are taken as moments.
        """
        if not workload.training:
            return ledger
        rule = self.rule()
        method, _ = _composed(ledger, shape)
        if method is None and not rule.by_matrix:
            kept = len(rule.moments) / len(Adam.moments)
            return ledger.edit(lambda m: m.with_bytes(Account.OPTIMIZER, int(kept * m.of(Account.OPTIMIZER))))
        method = method or ProjectedMethod()
        named = "*".join(name for name in (ledger.facts.get(OPTIMIZER_FACT), str(self)) if name)
        ledger = replace(ledger, facts={**ledger.facts, OPTIMIZER_FACT: named})
        ledger = ledger.set(Account.OPTIMIZER, method.state_bytes(shape, rule), phases=("forward", "backward", "step"))
        more = method.workspace_bytes(shape, rule) - method.workspace_bytes(shape)
        return ledger.add(Account.WORKSPACE, more, phases=(phase_of_update(ledger),))


def packed_states(ledger: Ledger, shape: ModelShape, workload: Workload, bits: int) -> Ledger:
    """A ledger whose moments are packed; where it does not say whose they are, all of its ``optimizer`` account.

    Its ``workspace`` has the tables of the levels, and in the update (in the backward pass, where gradients are
    released) the unpacked moments.
    """
    if not workload.training:
        return ledger
    itemsize, states = shape.dtype.itemsize, states_of(bits)
    method, rule = _composed(ledger, shape)
    exact = None if method is None else method.state_bytes(shape, rule, bits)

    def pack(moment: Moment) -> Moment:
        numel = moment.of(Account.OPTIMIZER) // itemsize
        size = states.nbytes(numel, shape.dtype) if exact is None else exact
        return moment.with_bytes(Account.OPTIMIZER, size) if numel else moment

    unpacked = UNPACKED_BYTES * min(CHUNK_NUMEL, ledger.peak_of(Account.OPTIMIZER) // itemsize)
    ledger = ledger.edit(pack).add(Account.WORKSPACE, TABLE_BYTES, phases=("forward", "backward", "step"))
    return ledger.add(Account.WORKSPACE, unpacked, phases=(phase_of_update(ledger),))


def _composed(ledger: Ledger, shape: ModelShape) -> tuple[ProjectedMethod | None, Inner | None]:
    """The method and the rule whose states the ``optimizer`` account is, where the ledger says so and that holds."""
    named = parse(ledger.facts[OPTIMIZER_FACT]) if OPTIMIZER_FACT in ledger.facts else ()
    rule = next((t.rule() for t in named if isinstance(t, RuleExtra)), None)
    method = next((t for t in named if isinstance(t, ProjectedMethod)), ProjectedMethod())
    holds = bool(named) and ledger.peak_of(Account.OPTIMIZER) == method.state_bytes(shape, rule)
    return (method, rule) if holds else (None, None)


def phase_of_update(ledger: Ledger) -> str:
    """The backward pass where gradients are released."""
    return "backward" if ledger.phase("step").of(Account.GRADIENTS) == 0 else "step"


def _small_state_bytes(p: ParameterShape, inner: Inner, project: Project, residual: Residual, states: States) -> int:
    side, long = _sides(p)
    rank = project.rank_of(side)
    count = p.numel // (side * long)
    small = torch.Size((*p.shape[:-2], rank, long))
    moments = sum(states.nbytes(inner.shape_of(name, small, side).numel(), p.dtype) for name in inner.moments)
    more = (part.state_bytes(side, long, p.dtype) for part in (project, residual))
    return moments + count * (inner.state_bytes(rank, long, p.dtype) + sum(more))


def _sides(p: ParameterShape) -> tuple[int, int]:
    side, long = sorted(p.shape[-2:])
    return side, long
