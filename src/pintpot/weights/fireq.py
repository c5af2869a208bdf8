"""FireQ: 4-bit weights with 8-bit float scales, 8-bit float inputs, and keys smoothed in the pairs that rotate.

Source:    Baek et al. 2025, "FireQ", arXiv:2505.20839, and the authors' repository llm-fireq/fireq: groups of 128
           symmetric integers with scales in e4m3 and one scale for the whole matrix against their underflow, weights
           scaled by input channel to equal ranges, inputs in e4m3 by token; and rows of the key projection divided by
           the largest norm of each pair of channels that rotary positions turn, rows of the query projection
           multiplied by it.
Differs:   scales of input channels are kept beside each weight instead of folded into what comes before it. The
           matrix's scale is the power of two that brings the largest group's scale near e4m3's largest number. Keys are
           smoothed before rotation only, all pairs of them: the authors treat the pairs of a head's three largest
           channels after it, which no weight can do. Rounding keys and values is a cache's business. Products with
           few inputs are the compiled ones of grids, which read packed integers; inputs are rounded in torch before.
           The authors' kernels are for GPUs that multiply floats of 8 bits.
Saves:     weights, real: O * (packed_size(I) + N) + 2 I + 4 bytes a matrix, a byte a group. Finding them needs one
           block, and runs it once more on the texts.
Shapes:    weight (O, I); codes (O, I) packed; scale (O, N); input scales (I,); keys (..., K, D), pairs (i, i + D / 2).
Composes:  caches, above all those that round keys; activations, adapters on the frozen base; not with anything that
           needs dense weights.
Use when:  hardware multiplies floats of 8 bits, and the cache rounds keys to few bits.
Not when:  inputs can stay in 16 bits: gptq and awq then lose less in the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import WeightMethod, risk_between
from pintpot.weights.formats import Float8Input, Float8Scales, Format, Scaled, Tensors
from pintpot.weights.statistics import BlockCall, InputStatistics
from pintpot.weights.targets import head_width

RISES = ((8.2, 0.0035), (6.2, 0.0075), (5.2, 0.024), (4.33, 0.055), (4.17, 0.082), (3.17, 0.63), (2.17, 160.0))
"""Bits a weight and the relative rise of perplexity on the embedded model (`results/weights.csv`)."""

ROTATED = ("gemma", "gemma2", "llama", "mistral", "mixtral", "qwen2")
"""Models whose positions turn channel i of a whole head with channel i + D / 2, with nothing between it and the key
projection."""


@technique(
    name="fireq",
    wing="weights",
    source=Source(
        "FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM Inference Acceleration",
        2025,
        arxiv="2505.20839",
    ),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim("speed-up of feed-forward layers", 1.68, versus="QServe", at="Llama2-7B", where="abstract"),
        Claim("speed-up of the prefill", 1.26, versus="QServe", at="Llama3-8B", where="abstract"),
    ],
    fidelity="keys smoothed before rotation only; scales of input channels kept beside each weight; kernels for CPUs",
)
@dataclass(frozen=True, kw_only=True)
class FireQ(WeightMethod):
    """Integers with 8-bit float scales, 8-bit float inputs, smooth keys.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: in-features that share a scale; -1 for a whole row.
        key_size: the largest norm of a pair of a key's channels, once it is smoothed (the authors' ``alpha``).
    """

    calibrated: ClassVar[bool] = True
    rearranges: ClassVar[bool] = True
    bits: int = 4
    group_size: int = 128
    key_size: float = 1.0

    def __post_init__(self) -> None:
        Float8Scales(bits=self.bits, group_size=self.group_size)
        if self.key_size <= 0:
            raise CompositionError(f"keys cannot have the size {self.key_size}", hint="the default is key_size=1.0")

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """A grid of the scaled weight, whose scaled input is rounded."""
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        grid = Float8Scales(bits=self.bits, group_size=self.group_size)
        return (Scaled(inner=Float8Input(inner=grid), scale_dtype=scale),)

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """To nearest, with all input channels brought to one range."""
        (scaled,) = formats
        if not isinstance(scaled, Scaled):
            return super().find(name, weight, formats)
        return (scaled.encode_with(weight.float(), channel_scales(weight.float())),)

    @torch.no_grad()
    def rearrange_block_(self, block: nn.Module, calls: Sequence[BlockCall] = ()) -> None:
        """Bring the pairs of keys to one size, where the positions are known to turn pairs; queries make up for it."""
        for attention, width in _attentions(block):
            sizes = key_sizes(block, attention, calls, width)
            if sizes is not None:
                scale = torch.where(sizes > 0, self.key_size / sizes, 1.0)
                smooth_(attention, scale)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[FireQ]:
        """From the safest to the smallest."""
        for bits, group_size in ((8, 128), (6, 128), (5, 128), (4, 32), (4, 128), (3, 128)):
            yield cls(bits=bits, group_size=group_size)


def channel_scales(weight: Tensor) -> Tensor:
    """The range of each input channel (I,) of a weight (O, I), around 1; 1 for channels of zeros."""
    ranges = weight.abs().amax(0)
    ranges = torch.where(ranges > 0, ranges / ranges.max().clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    # Kept in 16 bits: a channel of hardly anything is brought nearer to the others, not all the way.
    return ranges.clamp(min=2.0**-10).mul_(2.0**5)


def key_sizes(block: nn.Module, attention: nn.Module, calls: Sequence[BlockCall], width: int) -> Tensor | None:
    """The largest norm of each pair of key channels (K, D / 2) over all tokens; None where the block is never run."""
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor, ...], keys: Tensor) -> None:
        pairs = keys.float().unflatten(-1, (-1, 2, width // 2)).norm(dim=-2)
        largest = pairs.flatten(0, -3).amax(0)
        seen[:] = [torch.maximum(seen[0], largest) if seen else largest]

    handle = attention.get_submodule("k_proj").register_forward_hook(look)
    try:
        for call in calls:
            block(*call.args, **call.kwargs)
    finally:
        handle.remove()
    return seen[0] if seen else None


def smooth_(attention: nn.Module, scale: Tensor) -> None:
    """Multiply key channels by a scale for each pair (K, D / 2), and divide query channels by it.

    Args:
        attention: with ``q_proj`` and ``k_proj``; queries of consecutive heads share a head of keys.
        scale: positive.
    """
    by_channel = torch.cat([scale, scale], -1)
    keys, queries = (attention.get_submodule(name) for name in ("k_proj", "q_proj"))
    weight: Tensor = queries.weight  # type: ignore[assignment]
    shared = weight.shape[0] // by_channel.numel()
    by_query = by_channel[:, None].expand(-1, shared, -1)
    for layer, factor in ((keys, by_channel.flatten()), (queries, 1 / by_query.flatten())):
        for own in layer.parameters(recurse=False):
            own.copy_(own.float() * (factor[:, None] if own.dim() == 2 else factor))


def _attentions(block: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Attentions whose pairs are known, with the width of a head."""
    for module in block.modules():
        children = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if {"q_proj", "k_proj"} <= children and kind in ROTATED:
            yield module, head_width(module)
