"""Numbers as codes on a table of levels, with a scale for each block; and Adam on moments that are kept so.

Shapes: N elements in B = ceil(N / block) blocks. ``codes`` uint8, (N,) at 8 bits and (ceil(N / 2),) at 4, the first
of two in the low half; ``scales`` float32 (B,), the largest magnitude of each block; ``levels`` float32 (256,), or
(256, 2) at 4 bits: the numbers of both halves of a byte; ``table`` uint8 (65536,), the code of each bfloat16 number.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.kernels import native


@dataclass(frozen=True)
class Packed:
    """Packed numbers and the tables of their levels (see the top of the file for the shapes)."""

    codes: Tensor
    scales: Tensor
    levels: Tensor
    table: Tensor
    bits: int
    block: int

    def decode(self, numel: int) -> Tensor:
        """The numbers, float32 (numel,)."""
        # At 4 bits the levels of both numbers of a byte come from one look-up.
        numbers = self.levels.index_select(0, self.codes.int()).view(-1)[:numel]
        return self._blocks(numbers).mul_(self.scales[:, None]).view(-1)[:numel]

    def encode_(self, numbers: Tensor) -> None:
        """Store numbers (N,): each becomes the level nearest to its rounding to bfloat16."""
        numel = numbers.numel()
        blocks = self._blocks(numbers.float())
        scales = blocks.abs().amax(dim=-1)
        self.scales.copy_(scales)
        ratios = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).view(-1)[:numel]
        codes = self.table.index_select(0, _bits_of(ratios))
        if self.bits == 4:
            codes = functional.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
            codes = codes[:, 0] | (codes[:, 1] << 4)
        self.codes.copy_(codes)

    def _blocks(self, flat: Tensor) -> Tensor:
        missing = -flat.numel() % self.block
        return (functional.pad(flat, (0, missing)) if missing else flat).view(-1, self.block)


@dataclass(frozen=True)
class AdamRates:
    """What one step of AdamW takes beside tensors; ``step`` is its number, from 1."""

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float = 0.0


def packed_adam_serves(first: Packed, second: Packed, *tensors: Tensor) -> bool:
    """Whether there is a compiled ``packed_adam_`` for these moments, and parameters and gradients like ``tensors``."""
    return (
        all(tensor.dtype in (torch.float32, torch.bfloat16) for tensor in tensors)
        and first.block <= _MOST_BLOCK
        and native.serves(*tensors, first.codes, first.scales, second.codes, second.scales)
    )


def packed_adam_(parameter: Tensor, gradient: Tensor, first: Packed, second: Packed, rates: AdamRates) -> None:
    """One step of AdamW in place on a parameter whose moments are packed; no temporary tensors where it is compiled.

    The arithmetic is in float32. A parameter of 16 bits is rounded after the decay and again after the move.

    Args:
        parameter: (N,) or any shape.
        gradient: the same number of elements, float32 or bfloat16.
        first: the packed first moment.
        second: the packed second moment, of the same bits and block.
        rates: learning rate, betas, epsilon, decay and step.
    """
    if not packed_adam_serves(first, second, parameter, gradient):
        packed_adam_definition_(parameter, gradient, first, second, rates)
        return
    torch.ops.pintpot.packed_adam_(
        parameter,
        gradient,
        [first.codes, first.scales, second.codes, second.scales],
        [first.levels, first.table, second.levels, second.table],
        [first.bits, first.block, rates.step],
        [rates.lr, *rates.betas, rates.eps, rates.weight_decay],
    )


def packed_adam_definition_(
    parameter: Tensor, gradient: Tensor, first: Packed, second: Packed, rates: AdamRates
) -> None:
    """What ``packed_adam_`` does, in plain torch."""
    beta1, beta2 = rates.betas
    change = gradient.reshape(-1).float()
    mean, square = first.decode(change.numel()), second.decode(change.numel())
    mean.lerp_(change, 1 - beta1)
    square.mul_(beta2).addcmul_(change, change, value=1 - beta2)
    below = square.sqrt().div_((1 - beta2**rates.step) ** 0.5).add_(rates.eps).mul_(1 - beta1**rates.step)
    if rates.weight_decay:
        parameter.mul_(1 - rates.lr * rates.weight_decay)
    parameter.add_((mean / below).view(parameter.shape), alpha=-rates.lr)
    first.encode_(mean)
    second.encode_(square)


def _bits_of(numbers: Tensor) -> Tensor:
    """The 16 bits of each number rounded to bfloat16, int32."""
    return numbers.to(torch.bfloat16).view(torch.int16).int().bitwise_and_(0xFFFF)


_MOST_BLOCK = 1024
"""Elements of a block for which the compiled kernel has room."""


class _Moment(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "scales", "levels", "table")]


class _Adam(ctypes.Structure):
    _fields_ = [
        ("parameter", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("first", _Moment),
        ("second", _Moment),
        *((name, ctypes.c_int64) for name in ("parameter_dtype", "gradient_dtype")),
        *((name, ctypes.c_int64) for name in ("numel", "block", "bits", "step", "threads")),
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")),
    ]


def _packed_adam(
    parameter: Tensor,
    gradient: Tensor,
    moments: list[Tensor],
    tables: list[Tensor],
    sizes: list[int],
    rates: list[float],
) -> None:
    bits, block, step = sizes
    held = [t.data_ptr() for t in (*moments, *tables)]
    native.call(
        "adam",
        _Adam(
            parameter.data_ptr(),
            gradient.data_ptr(),
            _Moment(held[0], held[1], held[4], held[5]),
            _Moment(held[2], held[3], held[6], held[7]),
            native.DTYPES[parameter.dtype],
            native.DTYPES[gradient.dtype],
            parameter.numel(),
            block,
            bits,
            step,
            torch.get_num_threads(),
            *rates,
        ),
    )


native.register(
    "packed_adam_(Tensor(a!) parameter, Tensor gradient, Tensor(b!)[] moments, Tensor[] tables, int[] sizes,"
    " float[] rates) -> ()",
    _packed_adam,
    lambda *args: None,
)
