"""AWQ: before rounding, enlarge the input channels that carry large activations, so that they lose less.

Source:    Lin et al. 2023, "AWQ", arXiv:2306.00978, sec. 3.2 (scales ``s = magnitude ** a``, the best of a grid of
           ``a``), and the authors' search for the range of each group (clipping).
Differs:   each layer has scales of its own, kept beside its weight, and is judged by its own output error on all
           calibration tokens; the authors fold one scale for all layers with the same input into what comes before
           them, and judge by the output of the attention or the whole network part on a sample of tokens. Of
           1,024 outputs and more, the scales are judged on 512 to 1,023 that lie evenly apart.
Saves:     weights, real: rtn's bytes and 2 I more a matrix. Finding the scales needs one block and 4 I^2 bytes a layer.
Shapes:    weight (O, I); input scales (I,); codes (O, I) packed; scale and zero (O, N).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  4 or 3 bits and few calibration texts, or texts unlike those of use: nothing is fitted to them but scales.
Not when:  2 bits, where codebooks or compensation lose less.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import WeightMethod, risk_between
from pintpot.weights.formats import Format, Grid, Scaled, Tensors
from pintpot.weights.ranges import MOST_CUT, best_ranges, searching_bytes
from pintpot.weights.statistics import InputStatistics

RISES = (
    (8.35, 0.0002),
    (5.35, 0.0081),
    (4.46, 0.0196),
    (4.31, 0.027),
    (3.72, 0.082),
    (3.46, 0.109),
    (2.68, 0.72),
    (2.31, 1.41),
)
"""Bits a weight and the relative rise of perplexity, of the embedded model in `results/weights.csv`."""

EXPONENTS = tuple(i / 20 for i in range(20))
"""Of the inputs' magnitudes, those that are tried."""

JUDGED = 512
"""Rows of a weight that its scales are judged on; each row is a rounding problem of its own."""


@technique(
    name="awq",
    wing="weights",
    source=Source("AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023, "2306.00978"),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim("WikiText2 perplexity", 5.60, versus="5.47 dense", at="Llama-2-7B, 4 bits in 128s", where="table 4"),
        Claim("WikiText2 perplexity", 6.24, versus="5.47 dense", at="Llama-2-7B, 3 bits in 128s", where="table 4"),
    ],
    fidelity="scales of each layer's own, searched by its own output error",
)
@dataclass(frozen=True, kw_only=True)
class AWQ(WeightMethod):
    """Scales and ranges by search, then rounding to nearest.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: in-features that share a scale; -1 for a whole row.
        clip: search the range of each group too; never that of queries and keys, whose products it would bias.
        most_cut: the largest share of a group's range that is cut off.
    """

    calibrated: ClassVar[bool] = True
    bits: int = 4
    group_size: int = 128
    clip: bool = True
    most_cut: float = MOST_CUT

    def __post_init__(self) -> None:
        Grid(bits=self.bits, group_size=self.group_size)

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """A grid of the scaled weight."""
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        grid = Grid(bits=self.bits, group_size=self.group_size, scale_dtype=scale)
        return (Scaled(inner=grid, scale_dtype=scale),)

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """The scales with the least output error, and then the ranges; ones where nothing is known of the inputs."""
        layout = formats[0]
        if inputs is None or not isinstance(layout, Scaled) or not isinstance(layout.inner, Grid):
            return super().find(name, weight, formats)
        dense = weight.float()
        scale = best_scale(dense, layout, inputs)
        stored = layout.encode_with(dense, scale)
        if self.clip and not _is_query_or_key(name):
            kept = stored["input_scale"].float()
            grid, scaled = layout.inner, dense / kept
            low, high = best_ranges(scaled, grid, inputs.hessian * kept[:, None] * kept, self.most_cut)
            step, zero = grid.settle(low, high)
            stored |= {f"inner_{k}": t for k, t in grid.store(grid.round(scaled, step, zero), step, zero).items()}
        return (stored,)

    def finding_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Seven matrices like the weight in 32 bits and its codes, or two and a search; Hessians of scaled inputs."""
        numbers, group = out_features * in_features, Grid(group_size=self.group_size).group(in_features)
        searching = searching_bytes(out_features, in_features, group) + 4 * group * (in_features + -in_features % group)
        return max(29 * numbers, 9 * numbers + searching) + 4 * in_features**2

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[AWQ]:
        """From the safest to the smallest."""
        for bits, group_size in ((8, 128), (5, 128), (4, 64), (4, 128), (3, 32), (3, 64), (2, 32)):
            yield cls(bits=bits, group_size=group_size)


def best_scale(weight: Tensor, layout: Scaled, inputs: InputStatistics) -> Tensor:
    """The scales (I,) of the input channels, of those tried, with the least mean squared output error.

    The weight is divided by them before it is rounded: small ones make a channel large.
    """
    judged = weight[:: max(1, weight.shape[0] // JUDGED)]
    best, least = torch.ones_like(inputs.magnitude), torch.inf
    for exponent in EXPONENTS:
        enlarged = inputs.magnitude.pow(exponent).clamp(min=1e-4)
        scale = (enlarged.max() * enlarged.min()).sqrt() / enlarged
        rounded = layout.decode(layout.encode_with(judged, scale), judged.shape[1], torch.float32)
        error = float(inputs.error(judged - rounded).sum())
        if error < least:
            best, least = scale, error
    return best


def _is_query_or_key(name: str) -> bool:
    layer = name.split(".")[-2] if name.endswith(".weight") else name.split(".")[-1]
    return any(part in layer.lower() for part in ("q_", "k_", "qkv", "query", "key", "wq", "wk", "c_attn"))
