"""What a technique is: one published method, with its hyperparameters and its declared facts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, TypeVar

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account, Ledger
from pintpot.core.shape import ModelShape
from pintpot.core.work import Work
from pintpot.core.workload import Workload


class Saving(StrEnum):
    """Whether the measured ledger shows the saving, or the method only imitates it."""

    REAL = "real"
    SIMULATED = "simulated"


@dataclass(frozen=True)
class Source:
    """The paper of a technique. A practice without a paper names where it is defined in ``title``."""

    title: str
    year: int
    arxiv: str = ""
    doi: str = ""

    @property
    def link(self) -> str:
        """Where to read it, or an empty string."""
        if self.arxiv:
            return f"https://arxiv.org/abs/{self.arxiv}"
        return f"https://doi.org/{self.doi}" if self.doi else ""


@dataclass(frozen=True)
class Claim:
    """A figure that the paper states.

    Attributes:
        metric: what was measured, with its unit.
        figure: the number.
        versus: what it was compared with.
        at: the conditions under which it holds.
        where: the table, figure or section of the paper.
    """

    metric: str
    figure: float
    versus: str
    at: str = ""
    where: str = ""


@dataclass(frozen=True)
class Facts:
    """What a technique declares about itself; everything else (lists, docs, tests) is derived from it.

    Attributes:
        name: the registry key, as on the command line.
        wing: the package it lives in.
        slot: the concern of a run that it fills; at most one technique for each ``(slot, part)``.
        part: its place in the wing's algebra (``keep`` and ``store`` in a cache); two techniques of one
            slot compose exactly when their parts differ.
        source: the paper.
        accounts: the accounts whose bytes it lowers.
        jobs: the jobs that it can serve.
        needs: features of the run that it relies on (``dense_weights``, ``matrix_gradients`` ...).
        removes: features of the run that it takes away from the others.
        beside: a part of its slot without which it has nothing to do.
        claims: figures from the paper.
        saving: real, or simulated.
        fidelity: how it departs from the paper, or ``"none"``.
    """

    name: str
    wing: str
    slot: str
    part: str
    source: Source
    accounts: tuple[Account, ...]
    jobs: tuple[str, ...]
    needs: frozenset[str] = frozenset()
    removes: frozenset[str] = frozenset()
    beside: str = ""
    claims: tuple[Claim, ...] = ()
    saving: Saving = Saving.REAL
    fidelity: str = "none"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        data = asdict(self)
        data["needs"], data["removes"] = sorted(self.needs), sorted(self.removes)
        data["source"]["link"] = self.source.link
        return data


@dataclass(frozen=True, kw_only=True)
class Technique:
    """Base of all techniques: a frozen dataclass whose fields are the paper's hyperparameters.

    A wing's ``_base.py`` adds the protocol by which jobs use it. The three methods here are all that the
    planner knows, and each has a default that changes nothing.
    """

    facts: ClassVar[Facts]
    same_at_every_depth: ClassVar[bool] = True
    """Whether every block of a model is treated alike, so that a few of them tell what happens in a deep model."""

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """The ledger of the run with this technique, from that of the run without it."""
        return ledger

    def work(self, work: Work, shape: ModelShape, workload: Workload) -> Work:
        """The bytes moved and operations done with this technique, from those without it."""
        return work

    def seconds_to_apply(self, shape: ModelShape, workload: Workload) -> float:
        """About how long applying it takes at the start of a run, beyond loading the model; 0.0 where that is nothing.

        The planner does not offer what takes long; named by the user, it is applied all the same.
        """
        return 0.0

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """Expected cost in quality: relative rise of perplexity (0.02 = 2 %), 0.0 for lossless methods."""
        return 0.0

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """The configurations that the planner may choose from; the defaults alone unless overridden."""
        yield cls()

    @property
    def name(self) -> str:
        """The registry key."""
        return self.facts.name

    def parameters(self) -> dict[str, Any]:
        """The hyperparameters that differ from the defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def __str__(self) -> str:
        settings = ", ".join(f"{k}={v!r}".replace("'", "") for k, v in self.parameters().items())
        return f"{self.name}({settings})" if settings else self.name

    @classmethod
    def build(cls, parameters: Mapping[str, Any]) -> Technique:
        """An instance from named hyperparameters; unknown names and wrong types are refused.

        Raises:
            CompositionError: naming the parameter and what exists.
        """
        known = {f.name: f for f in fields(cls)}
        for name, value in parameters.items():
            if name not in known:
                raise CompositionError(
                    f"{cls.facts.name} has no parameter {name!r}",
                    hint=f"it has: {', '.join(known) or 'none'}",
                )
            default = known[name].default
            if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
                raise CompositionError(
                    f"{cls.facts.name}: {name} must be {type(default).__name__}, not {value!r}",
                    hint=f"the default is {name}={default!r}",
                )
        return cls(**parameters)


T = TypeVar("T", bound=type[Technique])
TRAINING = ("finetune", "pretrain")


@dataclass
class Catalogue:
    """The registered techniques by name."""

    entries: dict[str, type[Technique]] = field(default_factory=dict)

    def add(self, kind: type[Technique]) -> None:
        """Register a class.

        Raises:
            CompositionError: when another class has the name.
        """
        name = kind.facts.name
        other = self.entries.get(name)
        if other is not None and other.__qualname__ + other.__module__ != kind.__qualname__ + kind.__module__:
            raise CompositionError(
                f"two techniques are called {name!r}: {other.__module__} and {kind.__module__}",
                hint="give one of them another name",
            )
        self.entries[name] = kind


CATALOGUE = Catalogue()


def technique(
    *,
    name: str,
    wing: str,
    source: Source,
    accounts: Iterable[Account],
    slot: str = "",
    part: str = "",
    jobs: Iterable[str] = ("generate",),
    needs: Iterable[str] = (),
    removes: Iterable[str] = (),
    beside: str = "",
    claims: Iterable[Claim] = (),
    saving: Saving = Saving.REAL,
    fidelity: str = "none",
) -> Callable[[T], T]:
    """Class decorator that gives a technique its facts and registers it. See ``Facts`` for the fields.

    Raises:
        CompositionError: when the name is taken, or the class is not a frozen dataclass whose every
            field has a default.
    """
    facts = Facts(
        name=name,
        wing=wing,
        slot=slot or wing,
        part=part,
        source=source,
        accounts=tuple(accounts),
        jobs=tuple(jobs),
        needs=frozenset(needs),
        removes=frozenset(removes),
        beside=beside,
        claims=tuple(claims),
        saving=saving,
        fidelity=fidelity,
    )

    def register(kind: T) -> T:
        try:
            kind()
        except TypeError as error:
            raise CompositionError(
                f"technique {name!r}: every hyperparameter needs a default ({error})",
                hint="give each field the paper's default",
            ) from error
        own = vars(kind).get("__dataclass_params__")
        if own is None or not own.frozen:
            raise CompositionError(
                f"technique {name!r} must be a frozen dataclass",
                hint="put @dataclass(frozen=True, kw_only=True) under @technique(...)",
            )
        kind.facts = facts
        CATALOGUE.add(kind)
        return kind

    return register
