"""Counting work: the bytes, operations and launches of code, from the shapes of the tensors that it touches.

It watches every operation (a `TorchDispatchMode`), on real or on fake tensors, and needs no formula per architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Size, Tensor, ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pintpot.core.units import MiB
from pintpot.core.work import PhaseWork

LARGE_ALLOCATION_BYTES = 32 * MiB
"""From here on the C allocator of Linux maps new pages at each allocation, and each page is cleared at first touch
(`M_MMAP_THRESHOLD` grows by itself up to this size)."""

_aten = ops.aten
_ROWS_ONLY = {_aten.embedding, _aten.index, _aten.index_select, _aten.gather}
"""These read as much as they give, not the whole table that they read from."""

_LINEAR = {_aten.mm, _aten.addmm}
_NO_BYTES = {
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten._unsafe_view,
    _aten.detach,
}


def _attention_flops(query: Size, key: Size, value: Size, causal: bool) -> float:
    """Two products; a causal mask over as many queries as keys leaves half of each."""
    batch, heads, queries, width = query
    keys = key[-2]
    share = 0.5 if causal and queries == keys else 1.0
    return 2.0 * batch * heads * queries * keys * (width + value[-1]) * share


def _attention_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> float:
    causal = rest[1] if len(rest) > 1 else named.get("is_causal", False)
    return _attention_flops(query.shape, key.shape, value.shape, causal)


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **_: Any) -> float:
    """Five products instead of two."""
    return 2.5 * _attention_flops(query.shape, key.shape, value.shape, rest[3])


_CPU_ATTENTION: Mapping[Any, Callable[..., float]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""What torch's own table of formulas lacks."""


class WorkCounter(TorchDispatchMode):
    """Sums the work of all operations while active.

    A write counts twice, because a processor reads a line of memory before it overwrites part of it.

    Attributes:
        operations: operations started, views included.
        flops: floating-point operations of matrix products, convolutions and attention, by dtype name.
        moved_bytes: bytes read and written by all operations.
        product_bytes: of these, those of the operations that `flops` counts.
        dots: rows of the matrices of linear layers, in all of their products.
        fresh_bytes: bytes of allocations of at least `LARGE_ALLOCATION_BYTES`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.flops: dict[str, float] = {}
        self.moved_bytes = 0
        self.product_bytes = 0
        self.dots = 0
        self.fresh_bytes = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not compiled, and so not wrapped: the wrapper would import torch's compiler, which takes seconds."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "prim":
            # Questions about a tensor, which only fake ones ask.
            return result
        self.operations += 1
        packet = func._overloadpacket
        if func.is_view or packet in _NO_BYTES:
            return result
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        moved = self._move(packet, inputs, outputs)
        flops = _flops(packet, args, kwargs, result)
        if flops:
            self.product_bytes += moved
            if packet in _LINEAR:
                self.dots += outputs[0].shape[-1]
            dtype = str(outputs[0].dtype).removeprefix("torch.")
            self.flops[dtype] = self.flops.get(dtype, 0.0) + flops
        return result

    def work(self) -> PhaseWork:
        """What was counted so far."""
        return PhaseWork(
            read_bytes=self.moved_bytes,
            flops=dict(self.flops),
            product_bytes=self.product_bytes,
            dots=self.dots,
            fresh_bytes=self.fresh_bytes,
            operations=self.operations,
        )

    def _move(self, packet: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
        read = {t.untyped_storage()._cdata: _touched(t) for t in inputs}
        written = 0
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if storage._cdata in read:
                written += _touched(tensor)
                continue
            written += 2 * storage.nbytes()
            if tensor.device.type == "cpu" and storage.nbytes() >= LARGE_ALLOCATION_BYTES:
                self.fresh_bytes += storage.nbytes()
        moved = written + (written // 2 if packet in _ROWS_ONLY else sum(read.values()))
        self.moved_bytes += moved
        return moved


def _flops(packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> float:
    if packet in _CPU_ATTENTION:
        return _CPU_ATTENTION[packet](*args, **kwargs)
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=result))
    return 0.0


def _touched(tensor: Tensor) -> int:
    """Bytes of a tensor; those that several elements share (an expanded tensor) count once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
