"""The parameters of a model that a method replaces: of linear layers, convolutions and experts inside the blocks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate
from transformers.pytorch_utils import Conv1D

from pintpot.core.errors import UnsupportedModel
from pintpot.core.model_folder import check_finite
from pintpot.core.shape import block_names
from pintpot.core.values import has_values
from pintpot.weights.formats import Format, Tensors
from pintpot.weights.statistics import InputStatistics

if TYPE_CHECKING:
    from pintpot.weights._base import WeightMethod


@dataclass(frozen=True)
class Target:
    """One dense parameter that a method replaces.

    Attributes:
        parameter: its name in the dense model.
        module: the module that is replaced.
        holder: the module that holds the packed terms afterwards.
        shape: (O, I), or (E, O, I) for experts; a convolution's in-features are its channels times its kernel.
        transposed: the dense parameter is stored as (I, O).
        dtype: of the dense parameter when it is compressed, which settles the formats.
        block: the block that it is in.
        head_dim: the width of a head, where the layer is one of an attention; else 0.
    """

    parameter: str
    module: str
    holder: str
    shape: tuple[int, ...]
    transposed: bool
    dtype: torch.dtype
    block: str = ""
    head_dim: int = 0

    @property
    def matrices(self) -> int:
        """Number of matrices in the parameter."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    def rows(self, weight: Tensor) -> Tensor:
        """The dense parameter's numbers in the order of ``shape``."""
        return weight.t() if self.transposed else weight.reshape(self.shape)

    def encode(
        self,
        method: WeightMethod,
        formats: tuple[Format, ...],
        weight: Tensor,
        seen: Sequence[InputStatistics | None] | None = None,
    ) -> tuple[Tensors, ...]:
        """The stored tensors for the dense parameter's numbers.

        Args:
            method: what finds them.
            formats: of the terms of one matrix.
            weight: the dense parameter.
            seen: for each matrix the statistics of its inputs, where there are any.

        Raises:
            ModelFolderError: when the parameter holds NaN or Inf.
        """
        dense = self.rows(weight)
        if has_values(weight):
            check_finite(self.parameter, dense)
        if len(self.shape) == 2:
            return method.find(self.parameter, dense, formats, seen[0] if seen else None)
        terms: tuple[Tensors, ...] = ()
        for index, matrix in enumerate(dense):
            found = method.find(self.parameter, matrix, formats, seen[index] if seen else None)
            terms = terms or tuple(
                {name: t.new_empty((self.matrices, *t.shape)) for name, t in term.items()} for term in found
            )
            for term, part in zip(terms, found, strict=True):
                for name, tensor in part.items():
                    term[name][index] = tensor
        return terms

    def empty(self, formats: tuple[Format, ...], like: Tensor) -> tuple[Tensors, ...]:
        """Stored tensors with nothing in them, on the device of ``like``."""
        stack = self.shape[:-2]
        return tuple(
            {
                name: like.new_empty((*stack, *shape), dtype=dtype)
                for name, (shape, dtype) in layout.storage(*self.shape[-2:]).items()
            }
            for layout in formats
        )

    def nbytes(self, formats: tuple[Format, ...]) -> int:
        """Bytes of the packed terms, exactly."""
        return self.matrices * sum(layout.nbytes(*self.shape[-2:]) for layout in formats)


def find_targets(
    model: nn.Module, dtype: torch.dtype | None = None
) -> tuple[tuple[Target, ...], tuple[tuple[str, str], ...]]:
    """The matrices inside the blocks that can be replaced, and those that cannot, with the reason.

    Args:
        model: a dense model, on any device.
        dtype: of the weights that are or were compressed, where it is not the model's.

    Raises:
        UnsupportedModel: when there are none, or naming every linear layer of a kind that is not plain.
    """
    blocks = block_names(model)
    targets: list[Target] = []
    dense: list[tuple[str, str]] = []
    refused: list[str] = []
    for name, module in model.named_modules():
        block = next((b for b in blocks if name.startswith(f"{b}.")), "")
        if not block:
            continue
        if type(module) is nn.Linear or type(module) is Conv1D:
            weight, transposed = module.weight, type(module) is Conv1D
            shape = tuple(weight.shape[::-1] if transposed else weight.shape)
            width = head_width(model.get_submodule(name.rpartition(".")[0]))
            targets.append(Target(f"{name}.weight", name, name, shape, transposed, dtype or weight.dtype, block, width))
        elif is_plain_convolution(module):
            weight = module.weight
            shape = (weight.shape[0], weight[0].numel())
            targets.append(Target(f"{name}.weight", name, name, shape, False, dtype or weight.dtype, block))
        elif isinstance(module, nn.Linear | Conv1D):
            refused.append(f"{name} ({type(module).__name__})")
        elif is_plain_experts(module):
            for own, held in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
                weight = getattr(module, own)
                shape, holder = tuple(weight.shape), f"{name}.{held}"
                targets.append(Target(f"{name}.{own}", name, holder, shape, False, dtype or weight.dtype, block))
        else:
            kind = type(module).__name__
            dense += [(f"{name}.{n}", f"{kind} is not a linear layer") for n, p in _matrices(module)]
    if refused or not targets:
        cause = (
            f"cannot compress {', '.join(refused)}" if refused else "there is no linear layer in a block to compress"
        )
        raise UnsupportedModel(
            f"{type(model).__name__}: {cause}",
            hint="compress a plain transformers model: not yet compressed, and without adapters",
        )
    return tuple(targets), tuple(dense)


def require_parts(targets: Sequence[Target], parts: Collection[str], method: WeightMethod) -> None:
    """Refuse matrices that a method for certain kinds of models does not know.

    Args:
        targets: the parameters that would be replaced.
        parts: the modules that it knows, by their names in a block.
        method: for the message.

    Raises:
        UnsupportedModel: naming the first parameter that is in none of them.
    """
    for target in targets:
        if target.module.removeprefix(f"{target.block}.") not in parts:
            raise UnsupportedModel(
                f"{method.name} does not know what to do with {target.parameter}",
                hint=f"it is for models of the kinds {', '.join(method.model_types)}",
            )


def head_width(attention: nn.Module) -> int:
    """The width of the heads of an attention; 0 for other modules."""
    widths = (getattr(attention, name, 0) for name in ("head_dim", "key_value_proj_dim"))
    return next((width for width in widths if isinstance(width, int) and width), 0)


def _matrices(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in module.named_parameters(recurse=False) if p.dim() >= 2)


def is_plain_convolution(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a convolution that is the product of a matrix with patches of its input."""
    plain = type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros"
    return plain and not isinstance(module.padding, str)


def is_plain_experts(module: nn.Module) -> bool:
    """Whether a module holds experts in the layout that ``CompressedExperts`` computes."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    plain = names == {"gate_up_proj", "down_proj"} and getattr(module, "_apply_gate", None) is not None
    if not plain or getattr(type(module), "_apply_gate", None) is not _default_apply_gate:
        return False
    odd = ("is_transposed", "has_bias", "has_post_expert_norm")
    return (
        getattr(module, "has_gate", False)
        and getattr(module, "is_concatenated", False)
        and not any(getattr(module, flag, True) for flag in odd)
    )
