"""Who gets which bits: formats for every parameter so that all together take at most given bytes and lose least.

The choice is exact for the errors that it is given: a mixed-integer program with one choice for each parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor

from pintpot.core.errors import BudgetError
from pintpot.core.technique import Facts
from pintpot.core.units import format_bytes
from pintpot.weights._base import Evidence, Layout, WeightMethod
from pintpot.weights.formats import Format
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.targets import Target

GAP = 1e-3
"""How near to the best choice the program must come, relative to its error."""

SECONDS = 60.0
"""After which it takes the best choice found."""

SAMPLE_ROWS = 512
"""Rows of a matrix, twice as many at most, that errors are estimated on."""


@dataclass(frozen=True)
class Choice:
    """One way to hold a parameter.

    Attributes:
        formats: of its terms; none where it stays dense.
        nbytes: of all its matrices.
        error: what it costs, in any unit that can be added over parameters.
    """

    formats: tuple[Format, ...]
    nbytes: int
    error: float


def allocate(choices: Mapping[str, Sequence[Choice]], budget_bytes: int) -> Layout:
    """The choices with the least sum of errors within a budget.

    Raises:
        BudgetError: when even the smallest choices do not fit, saying what they need.
    """
    names = list(choices)
    least = sum(min(c.nbytes for c in choices[name]) for name in names)
    if least > budget_bytes:
        raise BudgetError(
            f"the matrices need at least {format_bytes(least)} with these formats, and may have "
            f"{format_bytes(max(0, budget_bytes))}",
            hint="allow a larger size, or choose a method with fewer bits",
        )
    every = [(row, choice) for row, name in enumerate(names) for choice in choices[name]]
    sizes = np.array([choice.nbytes for _, choice in every], dtype=float)
    errors = np.array([choice.error for _, choice in every], dtype=float)
    rows = np.array([row for row, _ in every])
    one_each = csr_array((np.ones(len(every)), (rows, np.arange(len(every)))), shape=(len(names), len(every)))
    solved = milp(
        errors / max(errors.max(), 1e-30),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None] / budget_bytes, ub=1)],
        integrality=np.ones(len(every)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if solved.x is None:
        raise BudgetError(f"no allocation was found: {solved.message}", hint="allow a slightly larger size")
    picked = {row: choice for (row, choice), share in zip(every, solved.x, strict=True) if share > 0.5}
    return {name: picked[row].formats for row, name in enumerate(names) if picked[row].formats}


@dataclass(frozen=True, kw_only=True)
class Sized(WeightMethod):
    """A method whose layout is allocated to given bytes among several of its configurations.

    Not a technique by itself: its layout is handed to the method that finds the numbers. What the budget holds dense
    stays dense. The cost of a choice is the
    squared error of a layer's output relative to the output, by rounding to nearest in the choice's formats.

    Attributes:
        candidates: configurations of one method.
        budget_bytes: of all matrices together.
    """

    facts: ClassVar[Facts]
    examines: ClassVar[bool] = True
    candidates: tuple[WeightMethod, ...] = ()
    budget_bytes: int = 0

    @property
    def calibrated(self) -> bool:  # type: ignore[override]
        """As the method is."""
        return self.candidates[0].calibrated

    @property
    def name(self) -> str:
        """The method's."""
        return self.candidates[0].name

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """Those of the first candidate."""
        return self.candidates[0].terms(name, out_features, in_features, dtype)

    def examine(self, name: str, weight: Tensor, inputs: InputStatistics | None) -> dict[str, Tensor]:
        """The relative error of each candidate, on rows from all over the matrix."""
        dense = weight[:: max(1, weight.shape[0] // SAMPLE_ROWS)].float()
        power = torch.ones(dense.shape[1]) if inputs is None else inputs.hessian.diagonal()
        whole = float((dense.square() @ power).sum()) or 1.0
        errors = []
        for candidate in self.candidates:
            rounded = torch.zeros_like(dense)
            for layout in candidate.terms(name, dense.shape[0], dense.shape[1], weight.dtype):
                stored = layout.encode(dense - rounded)
                rounded += layout.decode(stored, dense.shape[1], torch.float32)
            errors.append(float(((dense - rounded).square() @ power).sum()) / whole)
        return {"errors": torch.tensor(errors)}

    def layout(self, targets: Sequence[Target], evidence: Evidence | None = None) -> Layout:
        """The allocation; the first candidate's formats for all where nothing was examined."""
        if evidence is None:
            return super().layout(targets)
        choices: dict[str, list[Choice]] = {}
        for target in targets:
            errors = evidence[target.parameter]["errors"].tolist()
            dense = Choice((), target.numel * target.dtype.itemsize, 0.0)
            choices[target.parameter] = [dense] + [
                Choice(formats, target.nbytes(formats), error)
                for candidate, error in zip(self.candidates, errors, strict=True)
                for formats in [candidate.terms(target.parameter, target.shape[-2], target.shape[-1], target.dtype)]
            ]
        return allocate(choices, self.budget_bytes)
