"""XQuant-CL: store how what attention is given differs from the layer below, in very few bits.

Source:    Tomar et al. 2025, "XQuant: Breaking the Memory Wall for LLM Inference with KV Cache Rematerialization",
           arXiv:2508.10395, XQuant-CL.
Differs:   the sum over the layers below is formed for each chunk that is attended to, instead of carried from layer to
           layer for all tokens: nothing is held for it, and the work grows with the number of layers. Where the input
           is larger than keys and values together, the vectors of [W_k | W_v] are held beside the projections.
Saves:     kv_cache, real: bits + 32 / group_size bits for each number of the input. Attending makes 256 tokens' inputs
           float32 at a time.
Shapes:    differences (B, 1, T, hidden), or (B, 1, T, K * 2 D) in the coordinates of the singular vectors.
Composes:  any keep that keeps as much in all layers; all heads and layers then keep the same tokens.
Use when:  memory alone counts, in models whose layers change little of what they are given.
Not when:  decoding must be fast: each layer reads all those below it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from pintpot.cache._base import LayerSizes, Place
from pintpot.cache.calibration import LayerSample
from pintpot.cache.geometry import has_full_attention
from pintpot.cache.inputs import InputState
from pintpot.cache.rematerialize import Projections
from pintpot.cache.rows import BLOCK_TOKENS, position_bytes, room_for
from pintpot.cache.token_grid import TokenGrid
from pintpot.cache.xquant import PAPER, RISK, XQuant, has_large_input
from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, technique
from pintpot.core.workload import Workload


@technique(
    name="xquant-cl",
    wing="cache",
    part="store",
    source=PAPER,
    accounts=[Account.KV_CACHE],
    claims=[
        Claim("memory of the cache", 10.0, versus="FP16", at="0.01 of perplexity", where="abstract"),
        Claim("memory of the cache", 12.5, versus="FP16", at="0.1 of perplexity", where="abstract"),
    ],
    fidelity="the sum over the layers is formed anew for each chunk",
    needs=("even_layers", "even_heads", "every_layer"),
)
@dataclass(frozen=True, kw_only=True)
class XQuantCL(XQuant):
    """Quantised differences between the inputs of layers.

    Attributes:
        bits: width of a difference's code.
        first_layers: lowest layers, which store their inputs as they are; at least 1.
        first_bits: width of their codes.
        group_size: channels of a token that share a scale, at most.
    """

    shared_tokens: ClassVar[str] = "layers"
    bits: int = 3
    first_layers: int = 3
    first_bits: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_layers < 1 or not 1 <= self.first_bits <= 8:
            raise CompositionError(
                f"xquant-cl: {self.first_layers} first layers of {self.first_bits} bits cannot be",
                hint="for instance xquant-cl(first_layers=3, first_bits=4)",
            )

    def grid(self, place: Place) -> TokenGrid:
        """How a layer is packed."""
        bits = self.first_bits if place.index < self.first_layers else self.bits
        return TokenGrid.of(bits, self.group_size, latent_width(place.sizes))

    def granule(self, place: Place) -> int:
        """See ``Store.granule``."""
        return 1

    def open(self, place: Place) -> XQuantCLState:
        """See ``Store.open``."""
        return XQuantCLState(self.grid(place), place, place.index >= self.first_layers)

    def predict_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.predict_bytes``."""
        row = self.grid(place).token_bytes + position_bytes(place, 1)
        return batch * room_for(tokens, place) * row

    def chunk_bytes(self, sizes: LayerSizes, batch: int) -> int:
        """Codes and numbers of one block's inputs, the sum of them so far, and its keys or values."""
        made = sizes.heads * max(sizes.key_dim, sizes.value_dim)
        return BLOCK_TOKENS * batch * (sizes.hidden * (1 + 3 * 4) + made * 3 * 4)

    def decode_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.decode_bytes``: on average half of the layers are read, unpacked and added up, twice."""
        numbers = tokens * batch * place.sizes.hidden
        return (place.layers + 1) * (self.predict_bytes(tokens, place, batch, dtype) + numbers * (2 + 7 * 4))

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """Of the first layers' rounding, twice what ``xquant`` has by its bits, and a little of the differences'.

        On the embedded model (six layers, three of them first ones at 4 bits) 0.44 % at differences of 4 bits, 0.45 %
        at 3 and 0.46 % at 2.
        """
        return 2.3 * RISK[self.first_bits] + 0.004 * RISK[self.bits]

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[XQuantCL]:
        """4 to 2 bits; none for a model without full attention."""
        if has_full_attention(shape.config):
            for bits in (4, 3, 2):
                yield cls(bits=bits)

    def factors(self, sample: LayerSample) -> dict[str, Tensor]:
        """The left singular vectors of ``[W_k | W_v]``."""
        made = Projections(sample.module, sample.place.sizes)
        both = [made.weight(project, sample.inputs)[0].float() for project in (made.keys, made.values)]
        left = torch.linalg.svd(torch.cat(both, dim=-1), full_matrices=False)[0]
        return {"down": left.to(sample.inputs.dtype).contiguous()}

    def calibration_bytes(self, place: Place, dtype: torch.dtype) -> int:
        """See ``Calibrated.calibration_bytes``."""
        sizes = place.sizes
        held = self.calibration or has_large_input(sizes)
        return dtype.itemsize * sizes.hidden * latent_width(sizes) if held else 0


def latent_width(sizes: LayerSizes) -> int:
    """Numbers that are packed of a token."""
    return sizes.heads * (sizes.key_dim + sizes.value_dim) if has_large_input(sizes) else sizes.hidden


class XQuantCLState(InputState):
    """Packed differences to the layer below.

    Args:
        grid: how.
        place: which layer.
        differs: whether differences are packed, or inputs as they are.
    """

    def __init__(self, grid: TokenGrid, place: Place, differs: bool) -> None:
        super().__init__(grid, place)
        self.differs = differs

    def residue(self, inputs: Tensor) -> Tensor:
        """See ``InputState.residue``."""
        start = self.tokens
        left = inputs - self._below(start, start + inputs.shape[2]) if self.differs else inputs
        down = self.place.tensors.get("down")
        return left if down is None else left @ down.float()

    def estimate(self, start: int, stop: int) -> Tensor:
        """See ``InputState.estimate``: the layers below added up."""
        packed, down = super().estimate(start, stop), self.place.tensors.get("down")
        own = packed if down is None else packed @ down.float().T
        return own.add_(self._below(start, stop)) if self.differs else own

    def _below(self, start: int, stop: int) -> Tensor:
        """What the layer below gives for tokens that it holds already."""
        if self.place.below is None:
            raise ValueError("the lowest layer has none below")
        return cast(XQuantCLState, self.place.below()).estimate(start, stop)
