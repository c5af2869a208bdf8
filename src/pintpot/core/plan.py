"""The plan: techniques for one model, workload and budget, with what they are predicted to cost."""

from __future__ import annotations

from dataclasses import dataclass

from pintpot.core.ledger import Ledger
from pintpot.core.technique import Technique
from pintpot.core.workload import Budget, Workload


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a plan is for.

    Attributes:
        name: its folder or hub name.
        fingerprint: of its architecture.
        dtype: that dense weights are held in.
        size_bytes: most bytes of the tensors that are loaded, of a folder that can be loaded in any size; None for all.
    """

    name: str
    fingerprint: str
    dtype: str
    size_bytes: int | None = None


@dataclass(frozen=True)
class Forecast:
    """Predicted speed; ``None`` where the job has no such phase.

    Attributes:
        prefill_seconds: for the whole prompt.
        decode_seconds: for one token of each sequence.
        step_seconds: for one update.
        bound_by: what takes most of each phase (``"memory"``, ``"arithmetic"``, ``"launches"`` or ``"disk"``).
    """

    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    step_seconds: float | None = None
    bound_by: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Rejection:
    """A technique, or a configuration of one, that the planner did not choose, and why."""

    technique: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be run. Read and written as YAML by ``pintpot.planner``.

    Attributes:
        model: which model it is for.
        workload: the sizes of the job.
        budget: the bytes allowed.
        techniques: in the order in which they are applied.
        predicted: the ledger of the run.
        forecast: the speed.
        risk: expected relative rise of perplexity.
        rejected: what was not chosen, and why.
        fits: whether the predicted peaks are within the budget.
        seed: for every random choice of the run.
    """

    model: ModelIdentity
    workload: Workload
    budget: Budget
    techniques: tuple[Technique, ...]
    predicted: Ledger
    forecast: Forecast | None = None
    risk: float = 0.0
    rejected: tuple[Rejection, ...] = ()
    fits: bool = True
    seed: int = 0

    def in_slot(self, slot: str) -> tuple[Technique, ...]:
        """The techniques that fill one slot."""
        return tuple(t for t in self.techniques if t.facts.slot == slot)
