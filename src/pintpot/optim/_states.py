"""The ``states`` part: how moments are kept between steps, whole or in blocks of 8 or 4 bits.

Shapes: a moment of any shape, seen flat; N elements in B = ceil(N / block) blocks. Codes are uint8, (N,) at 8 bits and
(ceil(N / 2),) at 4, each block scaled by the float32 largest magnitude in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pintpot.kernels import AdamRates, Packed, packed_adam_, packed_adam_serves
from pintpot.optim._project import State
from pintpot.optim._tensors import CHUNK_NUMEL, strips

SCALE = "_scale"
"""What is added to a moment's name for the scales of its blocks."""


class States(ABC):
    """How the moments of an inner rule are kept.

    Moments are read and written in *pieces* (slices of the flat moment that begin at a multiple of a block), so that
    what is unpacked at once stays small.
    """

    @abstractmethod
    def start_(self, state: State, name: str, like: Tensor, shape: torch.Size) -> None:
        """Put a moment of zeros of this shape into ``state``."""

    @abstractmethod
    def read(self, state: State, name: str, shape: torch.Size, piece: slice | None = None) -> Tensor:
        """The moment in ``shape``, or a flat piece of it. A change of the result is kept only by ``write_``."""

    @abstractmethod
    def write_(self, state: State, name: str, value: Tensor, piece: slice | None = None) -> None:
        """Keep a moment, or a flat piece of it."""

    @abstractmethod
    def nbytes(self, numel: int, dtype: torch.dtype) -> int:
        """Bytes of a moment of so many elements for a parameter of this dtype."""

    def has_adam(self, state: State, names: Sequence[str], *tensors: Tensor) -> bool:
        """Whether there is an ``adam_`` for these moments, and for parameters and gradients like ``tensors``."""
        return False

    def adam_(self, state: State, names: Sequence[str], parameter: Tensor, gradient: Tensor, rates: AdamRates) -> None:
        """A step of AdamW on moments as they are kept.

        Args:
            state: holds the moments.
            names: of the first and the second moment.
            parameter: is moved in place; has the moments' shape.
            gradient: of the same shape.
            rates: those of the step.

        Raises:
            NotImplementedError: where ``has_adam`` says no.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class DenseStates(States):
    """Tensors of the parameter's dtype, updated in place."""

    def start_(self, state: State, name: str, like: Tensor, shape: torch.Size) -> None:
        """A tensor of zeros, laid out as the parameter where it has the parameter's shape."""
        state[name] = torch.zeros_like(like) if shape == like.shape else like.new_zeros(shape)

    def read(self, state: State, name: str, shape: torch.Size, piece: slice | None = None) -> Tensor:
        """The tensor itself."""
        stored: Tensor = state[name]
        return stored if piece is None else stored.view(-1)[piece]

    def write_(self, state: State, name: str, value: Tensor, piece: slice | None = None) -> None:
        """Nothing: it was changed in place."""

    def nbytes(self, numel: int, dtype: torch.dtype) -> int:
        """All elements in the dtype."""
        return numel * dtype.itemsize


@dataclass(frozen=True)
class BlockStates(States):
    """Codes of 8 or 4 bits with one scale a block.

    At 8 bits the levels are the dynamic tree of Dettmers et al. 2021 (arXiv:2110.02861, sec. 2.2). At 4 bits they are
    those of Li et al. 2023 (arXiv:2309.01507, sec. 3): the tree for signed moments, evenly spaced ones without zero for
    unsigned.
    A value becomes the level nearest to its rounding to bfloat16, by one look-up.

    Attributes:
        bits: 8 or 4.
        block: elements that share a scale, even.
        unsigned: names of the moments that are never negative.
        tables: those made so far, by kind, sign and device; an optimizer has its own.
    """

    bits: int
    block: int
    unsigned: tuple[str, ...] = ("exp_avg_sq",)
    tables: dict[tuple[str, bool, torch.device], Tensor] = field(default_factory=dict, compare=False, repr=False)

    def start_(self, state: State, name: str, like: Tensor, shape: torch.Size) -> None:
        """Any codes, times scales of zero."""
        numel = shape.numel()
        state[name] = torch.zeros(self._code_bytes(numel), dtype=torch.uint8, device=like.device)
        state[name + SCALE] = torch.zeros(-(-numel // self.block), dtype=torch.float32, device=like.device)

    def read(self, state: State, name: str, shape: torch.Size, piece: slice | None = None) -> Tensor:
        """The numbers that the codes stand for, float32."""
        if piece is None and shape.numel() > CHUNK_NUMEL:
            whole = torch.empty(shape, dtype=torch.float32, device=state[name].device)
            for part in strips(shape.numel(), CHUNK_NUMEL, whole):
                whole.view(-1)[part] = self.read(state, name, shape, part)
            return whole
        start, stop = (0, shape.numel()) if piece is None else (piece.start, piece.stop)
        numbers = self._packed(state, name, start, stop).decode(stop - start)
        return numbers.view(shape) if piece is None else numbers

    def write_(self, state: State, name: str, value: Tensor, piece: slice | None = None) -> None:
        """Encode."""
        if piece is None and value.numel() > CHUNK_NUMEL:
            for part in strips(value.numel(), CHUNK_NUMEL, value):
                self.write_(state, name, value.reshape(-1)[part], part)
            return
        start, stop = (0, value.numel()) if piece is None else (piece.start, piece.stop)
        self._packed(state, name, start, stop).encode_(value.reshape(-1))

    def has_adam(self, state: State, names: Sequence[str], *tensors: Tensor) -> bool:
        """Where the compiled kernel takes them."""
        return packed_adam_serves(*self._both(state, names, tensors[0].numel()), *tensors)

    def adam_(self, state: State, names: Sequence[str], parameter: Tensor, gradient: Tensor, rates: AdamRates) -> None:
        """Without more than a block unpacked at a time."""
        packed_adam_(parameter, gradient, *self._both(state, names, parameter.numel()), rates)

    def nbytes(self, numel: int, dtype: torch.dtype) -> int:
        """Codes and scales, whatever the parameter's dtype."""
        return self._code_bytes(numel) + 4 * -(-numel // self.block)

    def _both(self, state: State, names: Sequence[str], numel: int) -> tuple[Packed, Packed]:
        first, second = (self._packed(state, name, 0, numel) for name in names)
        return first, second

    def _packed(self, state: State, name: str, start: int, stop: int) -> Packed:
        """Elements ``start`` (a multiple of a block) to ``stop`` of a moment, in its storage."""
        codes = state[name][self._code_bytes(start) : self._code_bytes(stop)]
        scales = state[name + SCALE][start // self.block : -(-stop // self.block)]
        levels, table = (self._table(kind, name, codes.device) for kind in ("levels", "codes"))
        return Packed(codes, scales, levels, table, self.bits, self.block)

    def _table(self, kind: str, name: str, device: torch.device) -> Tensor:
        """``levels``, float32 (256,) or at 4 bits (256, 2), or ``codes``, uint8 (65536,), for a moment."""
        unsigned = name in self.unsigned
        if (kind, unsigned, device) not in self.tables:
            levels = torch.tensor(levels_of(self.bits, unsigned), dtype=torch.float32, device=device)
            if kind == "codes":
                self.tables[kind, unsigned, device] = _codes(levels)
            elif self.bits == 4:
                high, low = torch.meshgrid(levels, levels, indexing="ij")
                self.tables[kind, unsigned, device] = torch.stack((low, high), dim=-1).view(-1, 2)
            else:
                self.tables[kind, unsigned, device] = levels
        return self.tables[kind, unsigned, device]

    def _code_bytes(self, numel: int) -> int:
        return numel if self.bits == 8 else -(-numel // 2)


STATE_BITS = (32, 8, 4)
"""The kinds of states; 32 stands for the parameter's own dtype."""
TABLE_BYTES = 2 * ((1 << 16) + 8 * 256)
"""Bytes of an optimizer's tables at the most: codes and levels of signed and unsigned moments."""


def states_of(bits: int) -> States:
    """New states of one of the kinds."""
    return DenseStates() if bits == 32 else BlockStates(bits=bits, block={8: 256, 4: 128}[bits])


def levels_of(bits: int, unsigned: bool) -> list[float]:
    """The numbers from -1 (or 0) to 1 that codes stand for, ascending, 2 ** bits of them."""
    if unsigned and bits == 4:
        return [(place + 1) / 16 for place in range(16)]
    tree: list[float] = [0.0, 1.0]
    for decade in range(bits - 1):
        # Each decade has twice the levels of the one below it, and twice as many again where no sign is needed.
        count = 2 << decade if unsigned else 1 << decade
        middles = [(0.1 + 0.9 * (place + 0.5) / count) * 10.0 ** (decade - bits + 2) for place in range(count)]
        tree += middles if unsigned else [*middles, *(-middle for middle in middles)]
    return sorted(tree)


def _codes(levels: Tensor) -> Tensor:
    """The code of the nearest level by the 16 bits of a bfloat16 number, uint8 (65536,)."""
    every = torch.arange(1 << 16, dtype=torch.int32, device=levels.device).to(torch.int16).view(torch.bfloat16).float()
    every = torch.nan_to_num(every, nan=0.0).clamp(-1, 1)
    return torch.bucketize(every, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
