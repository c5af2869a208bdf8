"""decoupleQ: find the integers and the scales in turn, each the best for the other, and tune the scales block by block.

Source:    Guo et al. 2024, "decoupleQ", arXiv:2404.12759: layer-wise minimisation over integers and over scales with
           zeros of any value (not integers), in turn, then block-wise minimisation over scales, zeros and norms; the
           schedule is that of the authors' repository (run_llama.sh).
Differs:   integers are found by compensation (the authors' ``round_fn=gptq``), not by projected gradient descent (their
           first-level approximation); layers are calibrated block by block, not one after the other within a block;
           scales and zeros are rounded to 16 bits before each is judged; a block keeps what was tuned only where its
           output error fell, and norms are tuned only in models of 32 bits.
Saves:     weights, real: O * (packed_size(I) + 4 N) bytes a matrix: a scale and an offset of 16 bits a group. Finding
           them needs what gptq needs, one block's outputs, and one block's gradients for tuning.
Shapes:    weight (O, I); H (I, I); codes (O, I) packed; scale and offset (O, N).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  2 or 3 bits on a uniform grid, and minutes of work a block are there.
Not when:  4 bits or more, where gptq comes as near in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.kernels import unpack
from pintpot.weights._base import WeightMethod, risk_between
from pintpot.weights.compensation import compensate_, inverse_factor
from pintpot.weights.formats import Format, Grid, GroupOffset, Tensors
from pintpot.weights.formats.grouped import SCALE_DTYPES
from pintpot.weights.statistics import BlockCall, InputStatistics
from pintpot.weights.tuning import Tuning, tune_block_

RISES = (
    (8.5, 0.0001),
    (5.5, 0.003),
    (4.57, 0.0077),
    (4.36, 0.0112),
    (3.57, 0.055),
    (3.36, 0.063),
    (2.57, 0.38),
    (1.57, 6.2),
)
"""Bits a weight and the relative rise of perplexity on the embedded model (`results/weights.csv`, but for 5.5 bits)."""

RANGE_STEPS = 200
"""Into so many steps a group's range is cut, and shortened by one after the other..."""
MOST_SHORTENED = 0.8
"""...up to this share of it (the authors' ``grid`` and ``maxshrink``)."""

SOLVE_ELEMENTS = 1 << 22
"""Numbers in the linear systems of the rows that are solved together."""

NUDGE = 1e-6
"""Share of its mean diagonal that is added to a row's system, so that groups of equal codes have a solution."""


@technique(
    name="decoupleq",
    wing="weights",
    source=Source(
        "decoupleQ: Towards 2-bit Post-Training Uniform Quantization via decoupling Parameters into Integer and"
        " Floating Points",
        2024,
        "2404.12759",
    ),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim(
            "WikiText2 perplexity", 9.49, versus="16 bits", at="Llama-7B, 2 bits, whole rows", where="repository README"
        )
    ],
    fidelity="integers by compensation only; a tuned block is kept only where its output error fell",
)
@dataclass(frozen=True, kw_only=True)
class DecoupleQ(WeightMethod):
    """Integers and scales in turn.

    Attributes:
        bits: width of a code, 1 to 8.
        group_size: in-features that share a scale and an offset; -1 for a whole row.
        rounds: rounds of integers and scales; the first takes the scales from the groups' extremes, the second from a
            search of their ranges.
        damping: share of the mean diagonal of H that is added to it.
        epochs: passes over the texts in tuning a block; 0 for none.
        learning_rate: of tuning.
        norms: tune the norms too.
    """

    calibrated: ClassVar[bool] = True
    refines: ClassVar[bool] = True
    bits: int = 2
    group_size: int = 64
    rounds: int = 4
    damping: float = 0.01
    epochs: int = 4
    learning_rate: float = 1e-5
    norms: bool = True

    def __post_init__(self) -> None:
        Grid(bits=self.bits, group_size=self.group_size)
        if self.rounds < 1 or self.epochs < 0:
            raise CompositionError(
                f"decoupleq needs a round at least, and no fewer than 0 epochs: not {self.rounds} and {self.epochs}",
                hint="the defaults are rounds=4, epochs=4",
            )

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """A symmetric grid, and an offset a group that makes its zero any number."""
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        grid = Grid(bits=self.bits, group_size=self.group_size, symmetric=True, scale_dtype=scale)
        return grid, GroupOffset(group_size=self.group_size, scale_dtype=scale)

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """Integers and scales in turn; for the error of the weight itself where nothing is known of the inputs."""
        grid = formats[0]
        if len(formats) != 2 or not isinstance(grid, Grid) or not isinstance(formats[1], GroupOffset):
            return super().find(name, weight, formats)
        hessian = torch.eye(weight.shape[1], device=weight.device) if inputs is None else inputs.hessian.clone()
        hessian.diagonal().add_(self.damping * (float(hessian.diagonal().mean()) or 1.0))
        search = _Search(weight.float(), grid, hessian)
        search.alternate_(self.rounds)
        half = 1 << (grid.bits - 1)
        stored = grid.store(search.codes.add_(half).to(torch.uint8), search.scale, search.scale)
        return stored, {"offset": search.offset.to(SCALE_DTYPES[grid.scale_dtype])}

    def refine_block_(self, block: nn.Module, calls: Sequence[BlockCall], outputs: Sequence[Tensor]) -> None:
        """Tune scales, offsets and norms on the block's output."""
        if self.epochs:
            tuning = Tuning(learning_rate=self.learning_rate, epochs=self.epochs, norms=self.norms)
            tune_block_(block, calls, outputs, _rebuild, tuning)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[DecoupleQ]:
        """From the safest to the smallest."""
        for bits, group_size in ((4, 64), (4, 128), (3, 64), (3, 128), (2, 64), (2, 128)):
            yield cls(bits=bits, group_size=group_size)


def _rebuild(formats: tuple[Format, ...], terms: Sequence[Tensors], in_features: int) -> Tensor:
    grid, offset = formats
    assert isinstance(grid, Grid)
    assert isinstance(offset, GroupOffset)
    codes = unpack(terms[0]["packed"], grid.bits, in_features).float() - (1 << (grid.bits - 1))
    return codes * grid.by_column(terms[0]["scale"], in_features) + offset.by_column(terms[1]["offset"], in_features)


class _Search:
    """The best integers, scales and offsets of each row so far, with the row's error ``(Q - W) H (Q - W)^T``.

    Args:
        weight: float32 (O, I).
        grid: symmetric; gives the groups, the widths and the dtype of scales.
        hessian: damped (I, I).
    """

    def __init__(self, weight: Tensor, grid: Grid, hessian: Tensor) -> None:
        self.weight, self.grid, self.hessian = weight, grid, hessian
        self.bottom, self.top = -(1 << (grid.bits - 1)), (1 << (grid.bits - 1)) - 1
        columns = weight.shape[1]
        self.size = grid.group(columns)
        self.order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        self.factor = inverse_factor(hessian, order=self.order)
        groups = self._groups(weight)
        # A padded column is 0, and 0 need not be in the range of a group whose zero is any number.
        real = self._groups(torch.ones((1, columns), device=weight.device)) > 0
        self.low = groups.where(real, torch.inf).amin(-1)
        self.high = groups.where(real, -torch.inf).amax(-1)
        self.scale, self.offset = self._between(1.0)
        self.codes = self._nearest(weight, self.scale, self.offset)
        self.error = self._error(self.codes, self.scale, self.offset)

    def alternate_(self, rounds: int) -> None:
        """Integers for scales, and scales for integers, row by row kept where the error falls, until none does."""
        self._take(self._compensated(self.scale, self.offset), self.scale, self.offset)
        for index in range(rounds - 1):
            scale, offset = self._ranges() if index == 0 else (self.scale, self.offset)
            if not self._take(self._compensated(scale, offset), scale, offset):
                break
            if not self._take(self.codes, *self._solve(self.codes)):
                break

    def _take(self, codes: Tensor, scale: Tensor, offset: Tensor) -> bool:
        """Keep what has a smaller error; says whether any row has."""
        error = self._error(codes, scale, offset)
        better = (error < self.error)[:, None]
        self.codes, self.scale = torch.where(better, codes, self.codes), torch.where(better, scale, self.scale)
        self.offset, self.error = torch.where(better, offset, self.offset), torch.minimum(error, self.error)
        return bool(better.any())

    def _groups(self, of_columns: Tensor) -> Tensor:
        return functional.pad(of_columns, (0, -of_columns.shape[-1] % self.size)).unflatten(-1, (-1, self.size))

    def _stored(self, numbers: Tensor) -> Tensor:
        return numbers.to(SCALE_DTYPES[self.grid.scale_dtype]).float()

    def _between(self, share: float) -> tuple[Tensor, Tensor]:
        """Scale and offset of groups whose ends are at a share of their extremes."""
        scale = self._stored((self.high - self.low).mul(share / (self.top - self.bottom)).clamp(min=1e-7))
        return scale, self._stored(self.low * share - scale * self.bottom)

    def _nearest(self, weight: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        columns = weight.shape[1]
        rest = weight - self.grid.by_column(offset, columns)
        return rest.div_(self.grid.by_column(scale, columns)).round_().clamp_(self.bottom, self.top)

    def _value(self, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        columns = codes.shape[1]
        return codes * self.grid.by_column(scale, columns) + self.grid.by_column(offset, columns)

    def _error(self, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        difference = self._value(codes, scale, offset) - self.weight
        return ((difference @ self.hessian) * difference).sum(-1)

    def _ranges(self) -> tuple[Tensor, Tensor]:
        """Ends of groups, one share for all of a row, with the least error to the nearest; and the best scales then."""
        scale, offset = self._between(1.0)
        codes = self._nearest(self.weight, scale, offset)
        best = self._error(codes, scale, offset)
        for step in range(1, int(RANGE_STEPS * MOST_SHORTENED)):
            tried = self._between(1 - step / RANGE_STEPS)
            nearest = self._nearest(self.weight, *tried)
            error = self._error(nearest, *tried)
            better = (error < best)[:, None]
            scale, offset = torch.where(better, tried[0], scale), torch.where(better, tried[1], offset)
            codes, best = torch.where(better, nearest, codes), torch.minimum(error, best)
        solved = self._solve(codes)
        better = (self._error(codes, *solved) < best)[:, None]
        return torch.where(better, solved[0], scale), torch.where(better, solved[1], offset)

    def _compensated(self, scale: Tensor, offset: Tensor) -> Tensor:
        """The integers by compensation, columns of large inputs first."""
        columns = self.weight.shape[1]
        steps = self.grid.by_column(scale, columns)[:, self.order]
        steps = torch.where(steps == 0, 1e-12, steps)
        offsets = self.grid.by_column(offset, columns)[:, self.order]
        codes = torch.empty_like(self.weight)

        def round_columns(own: slice, numbers: Tensor) -> Tensor:
            code = ((numbers - offsets[:, own]) / steps[:, own]).round_().clamp_(self.bottom, self.top)
            codes[:, self.order[own]] = code
            return code * steps[:, own] + offsets[:, own]

        compensate_(self.weight[:, self.order], self.factor, round_columns)
        return codes

    def _solve(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The scales and offsets (O, N) with the least error for integers: a system of 2 N numbers for each row."""
        groups = self.grid.groups(codes.shape[1])
        step = max(1, SOLVE_ELEMENTS // (4 * groups * groups + groups * self.size))
        parts = [self._solve_rows(codes[i : i + step], self.weight[i : i + step]) for i in range(0, len(codes), step)]
        scale, offset = torch.cat(parts).chunk(2, dim=1)
        return self._stored(scale), self._stored(offset)

    def _solve_rows(self, codes: Tensor, weight: Tensor) -> Tensor:
        columns = codes.shape[1]
        moments = self.hessian.double()
        grouped = self._groups(codes.double())
        groups = grouped.shape[1]
        wanted = self._groups(weight.double() @ moments)
        system = weight.new_empty((len(codes), 2 * groups, 2 * groups), dtype=torch.float64)
        summed = self._groups(moments).sum(-1)
        system[:, groups:, groups:] = self._groups(summed.t()).sum(-1)
        for index in range(groups):
            own = slice(index * self.size, min((index + 1) * self.size, columns))
            row = self._groups(codes[:, own].double() @ moments[own])
            system[:, index, :groups] = (row * grouped).sum(-1)
            system[:, index, groups:] = system[:, groups:, index] = row.sum(-1)
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal += NUDGE * diagonal.mean(-1, keepdim=True)
        right = torch.cat([(wanted * grouped).sum(-1), wanted.sum(-1)], dim=1)
        return torch.linalg.solve(system, right).float()
