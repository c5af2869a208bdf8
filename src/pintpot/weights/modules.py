"""Modules that hold packed weights, and putting them in the place of dense ones.

The stored tensors of term ``i`` are buffers called ``term<i>_<name>`` (``term0_packed``, ``term0_scale`` ...); these
names are the names in checkpoints and do not change.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from pintpot.core.values import has_values
from pintpot.weights.formats import Format, Tensors
from pintpot.weights.targets import Target


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
    columns: int
    """In-features of each matrix."""

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

    def replace_term(self, index: int, layout: Format, tensors: Tensors) -> None:
        """Hold one term in another format; the tensors that it was stored in are dropped."""
        prefix = f"term{index}_"
        for name in [name for name in self._buffers if name.startswith(prefix)]:
            delattr(self, name)
        for name, tensor in tensors.items():
            self.register_buffer(f"{prefix}{name}", tensor)
        self.formats = (*self.formats[:index], layout, *self.formats[index + 1 :])

    def multiply(self, input: Tensor, row: int | None = None) -> Tensor:
        """``input`` (..., I) times the transposed sum of terms: (..., O)."""
        return _added(layout.matmul(input, tensors) for layout, tensors in self.stored(row))


def _added(terms: Iterator[Tensor]) -> Tensor:
    """The sum of terms in their dtype, in float32 on the way, with one term beside it in memory at a time."""
    first = next(terms)
    total = first
    for term in terms:
        total = total.to(torch.promote_types(first.dtype, torch.float32)) + term
    return total.to(first.dtype)


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
        if stored is not None and not has_values(stored):
            return stored.new_empty((self.out_features, self.in_features), dtype=self.dtype)
        dense = _added(layout.decode(tensors, self.in_features, self.dtype) for layout, tensors in self.stored())
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


class CompressedConv2d(PackedTerms, nn.Conv2d):
    """A convolution of one group whose weight (O, I * height * width) is a sum of packed terms.

    Its product is that of the patches that the kernel sees, which for a moment take height * width times the input.

    Args:
        old: the dense convolution, whose sizes and bias it takes over.
    """

    def __init__(self, old: nn.Conv2d) -> None:
        nn.Module.__init__(self)
        self.dtype = old.weight.dtype
        for name in nn.Conv2d.__constants__:
            setattr(self, name, getattr(old, name))
        self.register_parameter("bias", old.bias)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weight (O, I, height, width), made anew at each access."""
        columns = self.in_channels * self.kernel_size[0] * self.kernel_size[1]
        dense = _added(layout.decode(tensors, columns, self.dtype) for layout, tensors in self.stored())
        return dense.view(self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` (B, I, height, width) -> (B, O, height, width)."""
        out = self.multiply(patches_of(self, input))
        out = out if self.bias is None else out.add_(self.bias)
        places = [
            (input.shape[2 + a] + 2 * int(self.padding[a]) - self.dilation[a] * (self.kernel_size[a] - 1) - 1)
            // self.stride[a]
            + 1
            for a in range(2)
        ]
        return out.transpose(1, 2).unflatten(-1, places)

    def extra_repr(self) -> str:
        """The sizes and the terms."""
        terms = " + ".join(str(layout) for layout in self.formats)
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, {terms}"


def patches_of(convolution: nn.Conv2d, input: Tensor) -> Tensor:
    """What a convolution's kernel sees at each place of its input (B, I, height, width): (B, places, columns)."""
    patches = functional.unfold(
        input,
        convolution.kernel_size,
        convolution.dilation,
        convolution.padding,  # type: ignore[arg-type]  # never a word: such convolutions are left dense
        convolution.stride,
    )
    return patches.transpose(1, 2)


def rows_of(module: nn.Module, input: Tensor) -> Tensor:
    """What a module multiplies its weight by (..., columns), given its input."""
    return patches_of(module, input) if isinstance(module, nn.Conv2d) else input


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


def place_(model: nn.Module, target: Target, formats: tuple[Format, ...], terms: tuple[Tensors, ...]) -> None:
    """Put packed terms in the place of a dense parameter; the dense parameter is dropped."""
    old = model.get_submodule(target.module)
    new: nn.Module
    if isinstance(old, nn.Conv2d):
        new = CompressedConv2d(old)
        new.hold(formats, terms)
    elif target.holder == target.module:
        new = CompressedLinear(
            target.shape[-1],
            target.shape[-2],
            old.bias,  # type: ignore[arg-type]
            old.weight.dtype,  # type: ignore[arg-type]
            target.transposed,
        )
        new.hold(formats, terms)
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
    model.get_submodule(target.holder).columns = target.shape[-1]  # type: ignore[assignment]
