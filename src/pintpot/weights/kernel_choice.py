"""Choices of a kernel: in which layout grids are held while a model runs, and by which operation they are read.

A kernel choice is the second part of the weights slot. A method, or a folder that was compressed before, says which
numbers there are; a kernel choice says how the same numbers lie in memory. It is applied when the weights are there,
changes nothing on disk, and adds no bytes but the padding of its layout.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account, Ledger, Moment
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Technique
from pintpot.core.work import Work
from pintpot.core.workload import Generate, Workload
from pintpot.weights.formats import BitPlanes, Format, Grid, Tensors
from pintpot.weights.formats._base import prefixed, within
from pintpot.weights.formats.relaid_grid import PACKED_AT_ONCE, PACKING_BYTES, RelaidGrid
from pintpot.weights.formats.wrapped import Wrapped
from pintpot.weights.modules import PackedStack, PackedTerms


@dataclass(frozen=True)
class _Change:
    """One term of a packed weight that is held in another format."""

    module: PackedTerms
    index: int
    layout: Format
    held: Format
    tensors: Tensors

    def matrices(self) -> Iterator[Tensors]:
        """The stored tensors of each matrix."""
        if not isinstance(self.module, PackedStack):
            yield self.tensors
            return
        for row in range(next(iter(self.tensors.values())).shape[0]):
            yield {name: tensor[row] for name, tensor in self.tensors.items()}

    def sizes(self) -> _Sizes:
        columns, each = self.module.columns, list(self.matrices())
        rows = self.layout.out_features(each[0])
        before, after = (len(each) * layout.nbytes(rows, columns) for layout in (self.layout, self.held))
        return _Sizes(self.held, len(each) * rows * columns, before, after)


@dataclass(frozen=True)
class _Sizes:
    """A term's format, its numbers, and its bytes before and after it was put into that format."""

    held: Format
    numel: int
    before: int
    after: int


_KEPT: dict[tuple[object, ...], tuple[_Sizes, ...]] = {}


@dataclass(frozen=True, kw_only=True)
class KernelChoice(Technique):
    """Holds packed weights in a layout of its own while a model runs, and so chooses what reads them."""

    @abstractmethod
    def held(self, layout: Format) -> Format | None:
        """The format in which terms of another are held; None leaves them as they are."""

    @abstractmethod
    def relaid(self, layout: Format, tensors: Tensors, in_features: int) -> Tensors:
        """The tensors of a term (O, I), stored in ``layout``, as ``held(layout)`` stores them. Changes none of them."""

    @abstractmethod
    def relative_operations(self, held: Format, rows: int) -> float:
        """Operations of a product with so many rows of input, where multiplying and adding each number is 1."""

    def apply_(self, model: nn.Module) -> None:
        """Put packed weights into the other layout in place, parameter by parameter: one is there twice at a time.

        Works on fake and meta tensors too.

        Raises:
            CompositionError: when there are none that can be put so.
        """
        found = False
        for change in self._changes(model):
            found = True
            made = [self.relaid(change.layout, tensors, change.module.columns) for tensors in change.matrices()]
            stack = isinstance(change.module, PackedStack)
            tensors = {name: torch.stack([m[name] for m in made]) for name in made[0]} if stack else made[0]
            change.module.replace_term(change.index, change.held, tensors)
        if not found:
            raise self._nothing_to_read()

    def _changes(self, model: nn.Module) -> Iterator[_Change]:
        for module in model.modules():
            if isinstance(module, PackedTerms):
                for index, (layout, tensors) in enumerate(list(module.stored())):
                    held = self.held(layout)
                    if held is not None:
                        yield _Change(module, index, layout, held, tensors)

    def _nothing_to_read(self) -> CompositionError:
        return CompositionError(
            f"{self.name} finds no packed weights that it can read",
            hint=f"add a method that packs into grids of few bits, for instance rtn(bits=4)*{self.name}",
        )

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """The padding of the layout, and at loading the one parameter that is there twice.

        What is packed is known of folders that were compressed before. Beside a method of the same run, no row is taken
        to need padding, and the temporaries at loading to be within those of packing.

        Raises:
            CompositionError: when no weights are packed, or none that can be read.
        """
        terms = self._terms(shape)
        if not terms and ledger.peak_of(Account.WEIGHTS) >= shape.weight_bytes:
            raise self._nothing_to_read()
        more = sum(term.after - term.before for term in terms)
        twice = max((term.after + PACKING_BYTES * min(PACKED_AT_ONCE, term.numel) for term in terms), default=0)

        def edit(moment: Moment) -> Moment:
            workspace = moment.of(Account.WORKSPACE)
            if moment.phase == "load":
                workspace = max(workspace, twice)
            weights = moment.of(Account.WEIGHTS) + more
            return moment.with_bytes(Account.WEIGHTS, weights).with_bytes(Account.WORKSPACE, workspace)

        return ledger.edit(edit)

    def work(self, work: Work, shape: ModelShape, workload: Workload) -> Work:
        """The operations of what a compressed folder holds; beside a method of the same run, the method's stay."""
        if not isinstance(workload, Generate):
            return work
        dtype, terms = str(shape.dtype).removeprefix("torch."), self._terms(shape)
        for phase, rows in (("prefill", workload.batch * workload.prompt_tokens), ("decode", workload.batch)):
            saved = sum(2.0 * rows * term.numel * (1.0 - self.relative_operations(term.held, rows)) for term in terms)
            work = work.plus(phase, flops=-saved, dtype=dtype)
        return work

    def _terms(self, shape: ModelShape) -> tuple[_Sizes, ...]:
        """What a compressed folder has that is held in another format; of a dense one nothing. Looked for once."""
        key = (type(shape), shape.identity, self)
        if key not in _KEPT:
            _KEPT[key] = tuple(change.sizes() for change in self._changes(shape.build("meta")))
        return _KEPT[key]

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """The defaults; ``predict`` refuses models of which nothing is packed."""
        yield cls()


@dataclass(frozen=True, kw_only=True)
class GridKernel(KernelChoice):
    """A kernel that reads grids in a layout of its own, also where their input is scaled, mixed or rounded."""

    @abstractmethod
    def of_grid(self, grid: Grid) -> RelaidGrid | None:
        """The format that holds a grid's numbers; None where the kernel cannot read them."""

    def held(self, layout: Format) -> Format | None:
        """That of ``of_grid`` in the place of ``Grid``."""
        if isinstance(layout, Grid):
            return self.of_grid(layout)
        if isinstance(layout, Wrapped):
            inner = self.held(layout.inner)
            return None if inner is None else replace(layout, inner=inner)
        return None

    def relaid(self, layout: Format, tensors: Tensors, in_features: int) -> Tensors:
        """The codes in the other layout; all other tensors are the same ones."""
        if isinstance(layout, Wrapped):
            inner = self.relaid(layout.inner, within(layout.prefix, tensors), in_features)
            own = {name: tensors[name] for name in layout.own_storage(in_features)}
            return {**prefixed(layout.prefix, inner), **own}
        held = self.of_grid(layout) if isinstance(layout, Grid) else None
        return tensors if held is None else held.relaid(tensors, in_features)


@dataclass(frozen=True, kw_only=True)
class BitPlaneKernel(GridKernel):
    """A kernel that reads bit planes: grids of 1 to 4 bits."""

    def of_grid(self, grid: Grid) -> BitPlanes | None:
        """``BitPlanes``, of up to 4 bits."""
        return BitPlanes.of(grid)

    def relative_operations(self, held: Format, rows: int) -> float:
        """Those of ``of_bits`` for the width of the planes."""
        while isinstance(held, Wrapped):
            held = held.inner
        return self.of_bits(held.bits, rows) if isinstance(held, BitPlanes) else 1.0

    @abstractmethod
    def of_bits(self, bits: int, rows: int) -> float:
        """What ``relative_operations`` says, for codes of so many bits."""
