"""What a job does, in sizes only; techniques are never part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from pintpot.core.errors import PlanError, ShapeError
from pintpot.core.ledger import Tier
from pintpot.core.units import format_bytes, parse_bytes


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes of one job. ``job`` is the word used on the command line and in plans."""

    job: ClassVar[str] = ""
    training: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ShapeError(
                    f"{self.job}: {field.name} must be at least 1, not {getattr(self, field.name)}",
                    hint=f"give {field.name} a positive count",
                )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form, with the job's name."""
        return {"job": self.job, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Generate(Workload):
    """Generate ``new_tokens`` after a prompt of ``prompt_tokens``, ``batch`` sequences at once."""

    job: ClassVar[str] = "generate"
    batch: int = 1
    prompt_tokens: int = 512
    new_tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class Train(Workload):
    """``batch`` sequences of ``tokens`` in each forward and backward pass, ``steps`` updates."""

    training: ClassVar[bool] = True
    batch: int = 1
    tokens: int = 512
    steps: int = 100


@dataclass(frozen=True, kw_only=True)
class Finetune(Train):
    """Train a model that already exists."""

    job: ClassVar[str] = "finetune"


@dataclass(frozen=True, kw_only=True)
class Pretrain(Train):
    """Train a model from random weights."""

    job: ClassVar[str] = "pretrain"


@dataclass(frozen=True, kw_only=True)
class Compress(Workload):
    """Write a smaller model. ``samples`` texts of ``tokens`` calibrate a method; ``batch`` of them at once train it."""

    job: ClassVar[str] = "compress"
    batch: int = 1
    tokens: int = 512
    samples: int = 128


WORKLOADS: dict[str, type[Workload]] = {w.job: w for w in (Generate, Finetune, Pretrain, Compress)}


def workload_from_dict(data: Mapping[str, Any]) -> Workload:
    """The workload that ``to_dict`` wrote; unknown jobs and keys are refused.

    Raises:
        PlanError: when the job or one of its sizes is unknown.
    """
    sizes = dict(data)
    job = sizes.pop("job", None)
    if job not in WORKLOADS:
        raise PlanError(f"unknown job {job!r}", hint=f"one of: {', '.join(WORKLOADS)}")
    kind = WORKLOADS[job]
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(sizes) - known)
    if unknown:
        raise PlanError(f"{job} has no size called {', '.join(unknown)}", hint=f"it has: {', '.join(sorted(known))}")
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise PlanError(f"{job}: {name} must be a whole number, not {value!r}", hint="write a count")
    return kind(**sizes)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes allowed per tier; ``None`` means that the tier is not limited."""

    device: int | None = None
    host: int | None = None
    disk: int | None = None

    @classmethod
    def of(
        cls, device: str | int | None = None, host: str | int | None = None, disk: str | int | None = None
    ) -> Budget:
        """A budget from sizes as people write them (``"6GiB"``)."""
        sizes = [None if size is None else parse_bytes(size) for size in (device, host, disk)]
        return cls(device=sizes[0], host=sizes[1], disk=sizes[2])

    def limit(self, tier: Tier) -> int | None:
        """The bytes allowed on a tier, or ``None``."""
        return {Tier.DEVICE: self.device, Tier.HOST: self.host, Tier.DISK: self.disk}[tier]

    def to_dict(self) -> dict[str, int]:
        """The limited tiers in bytes."""
        return {name: size for name, size in asdict(self).items() if size is not None}

    def __str__(self) -> str:
        return ", ".join(f"{tier} {format_bytes(size)}" for tier, size in self.to_dict().items()) or "no limit"
