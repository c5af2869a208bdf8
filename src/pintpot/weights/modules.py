"""Modules that hold packed weights, and putting them in the place of dense ones.

The stored tensors of term ``i`` are buffers called ``term<i>_<name>`` (``term0_packed``, ``term0_scale`` ...); these
names are the names in checkpoints and do not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, is_fake
from transformers import PreTrainedModel
from transformers.integrations.moe import _default_apply_gate
from transformers.pytorch_utils import Conv1D

from pintpot.core.errors import UnsupportedModel
from pintpot.core.model_folder import check_finite
from pintpot.core.shape import block_names
from pintpot.weights._base import CompressionReport, Format, Tensors, WeightMethod


class _WritableWeight(Tensor):
    """A dequantised weight; assigning to its ``data`` encodes the new numbers into the module it came from.

    This is what lets code that updates weights in place, such as merging of adapters, reach packed storage.
    """

    _owner: CompressedLinear

    # Results of operations are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self._owner.encode_(value)


class PackedTerms(nn.Module):
    """Holds the stored tensors of a sum of terms as buffers. A base of the modules below."""

    formats: tuple[Format, ...]

    def hold(self, formats: tuple[Format, ...], terms: tuple[Tensors, ...]) -> None:
        """Register the stored tensors as buffers."""
        self.formats = formats
        for index, tensors in enumerate(terms):
            for name, tensor in tensors.items():
                self.register_buffer(f"term{index}_{name}", tensor)

    def stored(self, row: int | None = None) -> Iterator[tuple[Format, Tensors]]:
        """Each term's format and stored tensors (of one matrix of a stack, if ``row`` is given)."""
        for index, layout in enumerate(self.formats):
            prefix = f"term{index}_"
            yield (
                layout,
                {
                    name.removeprefix(prefix): tensor if row is None else tensor[row]
                    for name, tensor in self._buffers.items()
                    if name.startswith(prefix) and tensor is not None
                },
            )

    def multiply(self, input: Tensor, row: int | None = None) -> Tensor:
        """``input`` (..., I) times the transposed sum of terms: (..., O)."""
        parts = [layout.matmul(input, tensors) for layout, tensors in self.stored(row)]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


class CompressedLinear(PackedTerms, nn.Linear):
    """A linear layer whose weight is a sum of packed terms.

    Args:
        in_features: I.
        out_features: O.
        bias: the layer's bias parameter, or None.
        dtype: of the dequantised ``weight``.
        transposed: whether the dense layer was a ``Conv1D``, which stores its weight (I, O).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        transposed: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.dtype, self.transposed = dtype, transposed
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weight (O, I), made anew at each access; assigning to its ``.data`` encodes it again.

        Of a layer whose stored tensors have only shapes, it is a tensor that has only a shape.
        """
        stored = next(iter(self._buffers.values()))
        if stored is not None and (stored.is_meta or is_fake(stored)):
            return stored.new_empty((self.out_features, self.in_features), dtype=self.dtype)
        parts = [layout.decode(tensors, self.in_features, self.dtype) for layout, tensors in self.stored()]
        dense = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        writable = dense.as_subclass(_WritableWeight)
        writable._owner = self
        return writable

    @torch.no_grad()
    def encode_(self, weight: Tensor) -> None:
        """Replace the stored numbers by those of ``weight`` (O, I), in the same formats."""
        rest = weight.as_subclass(Tensor)
        for layout, tensors in self.stored():
            for name, tensor in layout.encode(rest).items():
                tensors[name].copy_(tensor)
            rest = rest - layout.decode(tensors, self.in_features, rest.dtype) if len(self.formats) > 1 else rest

    def forward(self, input: Tensor) -> Tensor:
        """``input`` (..., I) -> (..., O)."""
        out = self.multiply(input)
        return out if self.bias is None else out.add_(self.bias)

    def extra_repr(self) -> str:
        """The sizes and the terms."""
        terms = " + ".join(str(layout) for layout in self.formats)
        return f"in_features={self.in_features}, out_features={self.out_features}, {terms}"


class PackedStack(PackedTerms):
    """A stack of E matrices (E, O, I) in packed form."""


class CompressedExperts(nn.Module):
    """The experts of a mixture-of-experts layer with packed weights, one expert's at a time made dense.

    On fake and meta tensors the routing is unknown; tokens are then taken to be spread evenly over experts.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.num_experts: int = int(experts.num_experts)  # type: ignore[arg-type]
        self.act_fn = experts.act_fn
        self.gate_up = PackedStack()
        self.down = PackedStack()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states`` (T, H), ``top_k_index`` and ``top_k_weights`` (T, k) -> (T, H)."""
        out = torch.zeros_like(hidden_states)
        flat, weights = top_k_index.reshape(-1), top_k_weights.reshape(-1)
        order = flat.argsort(stable=True)
        for expert, positions in enumerate(order.split(self._counts(flat))[: self.num_experts]):
            if positions.shape[0] == 0:
                continue
            tokens = positions // top_k_index.shape[-1]
            gate, up = self.gate_up.multiply(hidden_states[tokens], expert).chunk(2, dim=-1)
            part = self.down.multiply(self.act_fn(gate) * up, expert)  # type: ignore[operator]
            out.index_add_(0, tokens, (part * weights[positions, None]).to(out.dtype))
        return out

    def _counts(self, flat: Tensor) -> list[int]:
        """Assignments to each expert, and to none (an index past the last expert)."""
        if flat.is_meta or isinstance(flat, FakeTensor):
            share, extra = divmod(flat.shape[0], self.num_experts)
            return [share + (e < extra) for e in range(self.num_experts)] + [0]
        counts: list[int] = torch.bincount(flat, minlength=self.num_experts + 1).tolist()
        return counts


@dataclass(frozen=True)
class Target:
    """One dense parameter that a method replaces.

    Attributes:
        parameter: its name in the dense model.
        module: the module that is replaced.
        holder: the module that holds the packed terms afterwards.
        shape: (O, I), or (E, O, I) for experts.
        transposed: the dense parameter is stored as (I, O).
        dtype: of the dense parameter when it is compressed, which settles the formats.
    """

    parameter: str
    module: str
    holder: str
    shape: tuple[int, ...]
    transposed: bool
    dtype: torch.dtype

    @property
    def matrices(self) -> int:
        """Number of matrices in the parameter."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    def formats(self, method: WeightMethod) -> tuple[Format, ...]:
        """The formats of the terms of one matrix."""
        return method.terms(self.parameter, self.shape[-2], self.shape[-1], self.dtype)

    def encode(self, method: WeightMethod, weight: Tensor) -> tuple[tuple[Format, ...], tuple[Tensors, ...]]:
        """Formats and stored tensors for the dense parameter's numbers.

        Raises:
            ModelFolderError: when the parameter holds NaN or Inf.
        """
        rows = (weight.t() if self.transposed else weight).reshape(-1, self.shape[-1])
        if not (weight.is_meta or isinstance(weight, FakeTensor)):
            check_finite(self.parameter, rows)
        formats = self.formats(method)
        return formats, self._stack(method.find(self.parameter, rows, formats))

    def empty(self, method: WeightMethod, like: Tensor) -> tuple[tuple[Format, ...], tuple[Tensors, ...]]:
        """Formats and stored tensors with nothing in them, on the device of ``like``."""
        formats = self.formats(method)
        rows = self.shape[-2] * self.matrices
        terms = tuple(
            {
                name: like.new_empty(shape, dtype=dtype)
                for name, (shape, dtype) in f.storage(rows, self.shape[-1]).items()
            }
            for f in formats
        )
        return formats, self._stack(terms)

    def _stack(self, terms: tuple[Tensors, ...]) -> tuple[Tensors, ...]:
        if len(self.shape) == 2:
            return terms
        return tuple({name: t.unflatten(0, self.shape[:2]) for name, t in tensors.items()} for tensors in terms)

    def nbytes(self, method: WeightMethod) -> int:
        """Bytes of the packed terms, exactly."""
        formats = self.formats(method)
        return self.matrices * sum(layout.nbytes(self.shape[-2], self.shape[-1]) for layout in formats)


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
    prefixes = tuple(f"{name}." for name in block_names(model))
    targets: list[Target] = []
    dense: list[tuple[str, str]] = []
    refused: list[str] = []
    for name, module in model.named_modules():
        if not name.startswith(prefixes):
            continue
        if type(module) is nn.Linear or type(module) is Conv1D:
            weight, transposed = module.weight, type(module) is Conv1D
            shape = tuple(weight.shape[::-1] if transposed else weight.shape)
            targets.append(Target(f"{name}.weight", name, name, shape, transposed, dtype or weight.dtype))
        elif isinstance(module, nn.Linear | Conv1D):
            refused.append(f"{name} ({type(module).__name__})")
        elif _is_plain_experts(module):
            for own, held in (("gate_up_proj", "gate_up"), ("down_proj", "down")):
                weight = getattr(module, own)
                shape = tuple(weight.shape)
                targets.append(Target(f"{name}.{own}", name, f"{name}.{held}", shape, False, dtype or weight.dtype))
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


def _matrices(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in module.named_parameters(recurse=False) if p.dim() >= 2)


def _is_plain_experts(module: nn.Module) -> bool:
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


def place_(model: nn.Module, target: Target, formats: tuple[Format, ...], terms: tuple[Tensors, ...]) -> None:
    """Put packed terms in the place of a dense parameter; the dense parameter is dropped."""
    old = model.get_submodule(target.module)
    if target.holder == target.module:
        new: nn.Module = CompressedLinear(
            target.shape[-1],
            target.shape[-2],
            old.bias,  # type: ignore[arg-type]
            old.weight.dtype,  # type: ignore[arg-type]
            target.transposed,
        )
        new.hold(formats, terms)  # type: ignore[operator]
    elif isinstance(old, CompressedExperts):
        new = old
    else:
        new = CompressedExperts(old)
    if new is not old:
        new.train(old.training)
        # Keeps transformers from initialising, after loading, what was just filled.
        new._is_hf_initialized = True  # type: ignore[assignment]
        model.set_submodule(target.module, new)
    if target.holder != target.module:
        model.get_submodule(target.holder).hold(formats, terms)  # type: ignore[operator]


@torch.no_grad()
def compress_(
    model: PreTrainedModel, method: WeightMethod, *, empty: bool = False, dtype: torch.dtype | None = None
) -> CompressionReport:
    """Replace the weights of a model by packed terms (with nothing in them if ``empty``), one at a time."""
    targets, dense = find_targets(model, dtype)
    weights = {t.parameter: model.get_parameter(t.parameter) for t in targets}
    for target in targets:
        weight = weights.pop(target.parameter)
        formats, terms = target.empty(method, weight) if empty else target.encode(method, weight.detach())
        del weight
        place_(model, target, formats, terms)
    return report_of(method, targets, dense)


def report_of(
    method: WeightMethod, targets: tuple[Target, ...], dense: tuple[tuple[str, str], ...]
) -> CompressionReport:
    """The report of replacing these targets."""
    return CompressionReport(
        compressed=tuple(t.parameter for t in targets),
        left_dense=dense,
        dense_bytes=sum(t.numel * t.dtype.itemsize for t in targets),
        packed_bytes=sum(t.nbytes(method) for t in targets),
    )
