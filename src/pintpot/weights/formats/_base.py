"""What a format is: how one term of a weight is stored and multiplied.

Shapes: O out-features, I in-features. A weight is (O, I), as in ``nn.Linear``. The stored tensors of a term are a
flat dictionary; a format that holds other formats puts a prefix before the names of theirs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from pintpot.core.errors import ModelFolderError, ShapeError
from pintpot.core.values import has_values
from pintpot.kernels import native

Tensors = dict[str, Tensor]
"""The stored tensors of one term, by their names in the format."""

Storage = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each stored tensor."""

STRIP_BYTES = 16 << 20
"""Most bytes of a weight that a product makes dense at a time (or one row's worth, where a row alone is more)."""

FORMATS: dict[str, type[Format]] = {}
"""Every format by its name in files."""


@dataclass(frozen=True, kw_only=True)
class Format(ABC):
    """How one term of a weight is stored and multiplied. Holds no tensors itself, only the layout."""

    kind: ClassVar[str]
    """Its name in files; it does not change."""

    @abstractmethod
    def storage(self, out_features: int, in_features: int) -> Storage:
        """Shape and dtype of each stored tensor for a weight (O, I).

        Raises:
            ShapeError: when the format cannot hold a weight of this shape.
        """

    @abstractmethod
    def encode(self, weight: Tensor) -> Tensors:
        """The stored tensors that come nearest to ``weight`` (O, I), from its numbers alone."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The numbers (O, I) that stored tensors stand for, in ``dtype``."""

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Bytes of all stored tensors, exactly."""
        stored = self.storage(out_features, in_features).values()
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in stored)

    def matmul(self, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """``input`` (..., I) times the transposed weight: (..., O), differentiable in ``input``.

        Unless a format knows better, strips of rows are decoded one after the other, and again for the backward pass;
        few rows of input are multiplied by ``multiply_few`` where it can.
        """
        return multiply_by_strips(self, input, tensors)

    def multiplies_packed(self) -> bool:
        """Whether a compiled kernel multiplies few rows of input by what is stored, without workspace."""
        return False

    def multiplies_packed_transposed(self) -> bool:
        """Whether one multiplies them by the weight itself, not its transpose, likewise."""
        return False

    def multiply_few(self, flat: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """The product of few rows of input (rows, I) by a kernel that makes no row of the weight dense.

        Returns:
            (rows, O); None where there is no such kernel for these tensors, and strips are decoded.
        """
        return None

    def multiply_few_transposed(self, flat: Tensor, tensors: Mapping[str, Tensor], in_features: int) -> Tensor | None:
        """Few rows of input (rows, O) times the weight itself, (rows, I), likewise; see ``multiply_few``."""
        return None

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> Tensors:
        """The stored tensors of some of the rows; unless overridden each tensor's first dimension is O."""
        return {name: tensor[rows] for name, tensor in tensors.items()}

    def rows_together(self) -> int:
        """Rows of which ``rows`` takes only multiples (the last of a weight may be fewer)."""
        return 1

    def out_features(self, tensors: Mapping[str, Tensor]) -> int:
        """O, from the stored tensors; unless overridden the length of the first."""
        return next(iter(tensors.values())).shape[0]

    def row_bytes(self, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of temporaries in decoding one row: unless overridden its codes (a byte each) and its numbers."""
        return in_features * (1 + dtype.itemsize)

    def workspace(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of temporaries that ``matmul`` needs beside its output for many rows of input; few never need more."""
        row = self.row_bytes(in_features, dtype)
        return min(out_features, rows_at_once(row, self.rows_together())) * row

    def check(self, out_features: int, in_features: int) -> None:
        """Refuse a shape that the format cannot hold.

        Raises:
            ShapeError: saying why.
        """
        self.storage(out_features, in_features)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description, which ``format_from_dict`` reads."""
        return {"format": self.kind, **{f.name: _plain(getattr(self, f.name)) for f in fields(self)}}


F = TypeVar("F", bound=type[Format])


def file_name(kind: str) -> Callable[[F], F]:
    """Class decorator that gives a format its name in files.

    Args:
        kind: the name.

    Raises:
        ShapeError: when another format has it.
    """

    def register(cls: F) -> F:
        if FORMATS.get(kind, cls).__qualname__ != cls.__qualname__:
            raise ShapeError(f"two formats are called {kind!r}", hint="give one of them another name")
        cls.kind = kind
        FORMATS[kind] = cls
        return cls

    return register


def format_from_dict(data: Mapping[str, Any]) -> Format:
    """The format that ``Format.to_dict`` described.

    Raises:
        ModelFolderError: when there is no such format, or it has no such field.
    """
    values = {name: _read(value) for name, value in data.items() if name != "format"}
    kind = FORMATS.get(str(data.get("format")))
    known = set() if kind is None else {f.name for f in fields(kind)}
    if kind is None or not set(values) <= known:
        raise ModelFolderError(
            f"unknown weight format {dict(data)!r}", hint="update pintpot, or compress the model again"
        )
    return kind(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, Format):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, torch.dtype) else value


def _read(value: Any) -> Any:
    if isinstance(value, Mapping):
        return format_from_dict(value)
    if isinstance(value, list):
        return tuple(_read(part) for part in value)
    return getattr(torch, value[6:]) if isinstance(value, str) and value.startswith("torch.") else value


def rows_at_once(row_bytes: int, together: int = 1) -> int:
    """Rows that are dense together: a multiple of those that cannot be parted."""
    return max(1, STRIP_BYTES // max(1, row_bytes) // together) * together


def decodes_in_place(dtype: torch.dtype) -> bool:
    """Whether compiled kernels decode into numbers of this dtype, with no temporaries but these."""
    return dtype in native.DTYPES and native.built()


def strips(layout: Format, out_features: int, in_features: int, operand: Tensor) -> Iterator[slice]:
    """Rows that are dense together. For an operand without values the first strip stands for all: they cost alike."""
    step = rows_at_once(layout.row_bytes(in_features, operand.dtype), layout.rows_together())
    starts = range(0, out_features, step)
    for start in starts if has_values(operand) else starts[:1]:
        yield slice(start, start + step)


class _ByStrips(torch.autograd.Function):
    """Saves only the packed storage; backward decodes it again."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, layout: Format, names: tuple[str, ...], *stored: Tensor) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.layout, ctx.names, ctx.in_features = layout, names, flat.shape[-1]
        return _product(flat, layout, dict(zip(names, stored, strict=True)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, layout = gradients[0], ctx.layout
        tensors = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        back = gradient.new_zeros((gradient.shape[0], ctx.in_features))
        for rows in strips(layout, gradient.shape[1], ctx.in_features, gradient):
            back.addmm_(gradient[:, rows], _strip(layout, tensors, rows, ctx.in_features, gradient))
        return back, *[None] * (2 + len(ctx.names))


def _product(flat: Tensor, layout: Format, tensors: Mapping[str, Tensor]) -> Tensor:
    few = layout.multiply_few(flat, tensors)
    if few is not None:
        return few
    in_features, out_features = flat.shape[-1], layout.out_features(tensors)
    out = flat.new_empty((flat.shape[0], out_features))
    for rows in strips(layout, out_features, in_features, flat):
        torch.mm(flat, _strip(layout, tensors, rows, in_features, out).t(), out=out[:, rows])
    return out


def _strip(layout: Format, tensors: Mapping[str, Tensor], rows: slice, in_features: int, outputs: Tensor) -> Tensor:
    """Some rows made dense, without what a format may decode below the last one of ``outputs`` (N, O)."""
    dense = layout.decode(layout.rows(tensors, rows), in_features, outputs.dtype)
    return dense[: outputs.shape[1] - rows.start]


def multiply_by_strips(layout: Format, input: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """``input`` (..., I) times a stored weight, of which at most ``STRIP_BYTES`` are dense at a time.

    Args:
        layout: of the weight.
        input: in the dtype in which the product is computed.
        tensors: stored.

    Returns:
        (..., O) in the dtype of ``input``; differentiable in ``input`` only.
    """
    flat = input.reshape(-1, input.shape[-1])
    if torch.is_grad_enabled() and input.requires_grad:
        out: Tensor = _ByStrips.apply(flat, layout, tuple(tensors), *tensors.values())
    else:
        out = _product(flat, layout, tensors)
    return out.reshape(*input.shape[:-1], out.shape[-1])


def prefixed(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a prefix before each name."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def within(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Those whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
