"""XQuant: store what attention is given, in a few bits, and make keys and values from it again.

Source:    Tomar et al. 2025, "XQuant: Breaking the Memory Wall for LLM Inference with KV Cache Rematerialization",
           arXiv:2508.10395.
Differs:   where the input is larger than keys and values together (grouped queries), the model keeps its projections
           and the singular vectors of W_k and W_v are held beside them. Scales of the latents' keys are found over the
           tokens of a channel, as in KIVI, with a window of one group.
Saves:     kv_cache, real: bits + 32 / group_size bits for each number of the input (or of the latents), instead of 16
           for each of the keys and values. Attending makes 256 tokens float32 at a time.
Shapes:    inputs (B, 1, T, hidden), packed (B, 1, T, bytes); latents (B, 1, T, K * D) each for keys and values.
Composes:  any keep; its heads then keep the same tokens, which come from one input.
Use when:  every query head has its own keys and values: the input is half of them, and is easier to round.
Not when:  decoding is bound by arithmetic: each step multiplies all stored tokens by W_k and W_v.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from pintpot.cache._base import Call, LayerSizes, Place, Store, StoreState
from pintpot.cache.calibration import Calibrated, LayerSample, sample_layer
from pintpot.cache.forecast import places_of
from pintpot.cache.geometry import FULL, has_full_attention, layer_kinds
from pintpot.cache.inputs import InputLatentState, InputState
from pintpot.cache.kivi import KIVI
from pintpot.cache.latent import latent_bytes, open_latents
from pintpot.cache.rematerialize import Projections, check_projections
from pintpot.cache.rows import BLOCK_TOKENS, position_bytes, room_for
from pintpot.cache.token_grid import TokenGrid
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.work import Work
from pintpot.core.workload import Generate, Workload

RISK = {8: 0.0, 7: 0.0001, 6: 0.0002, 5: 0.0006, 4: 0.0019, 3: 0.0086, 2: 0.058, 1: 1.0}
"""Relative rise of perplexity by bits: at 8, 4, 3 and 2 bits as measured on the embedded model (whose input is larger
than its keys and values), between them by the logarithm; 1 bit is a guess."""

PAPER = Source(
    "XQuant: Breaking the Memory Wall for LLM Inference with KV Cache Rematerialization", year=2025, arxiv="2508.10395"
)


@technique(
    name="xquant",
    wing="cache",
    part="store",
    source=PAPER,
    accounts=[Account.KV_CACHE],
    claims=[
        Claim("memory of the cache", 2.0, versus="keys and values", at="same bits", where="abstract"),
        Claim("memory of the cache", 7.7, versus="FP16", at="less than 0.1 of perplexity", where="abstract"),
    ],
    fidelity="singular vectors beside the model's own projections; latents of keys packed as in KIVI",
    needs=("even_heads",),
)
@dataclass(frozen=True, kw_only=True)
class XQuant(Calibrated, Store):
    """Quantised inputs of attention.

    Attributes:
        bits: width of a code, 1 to 8.
        group_size: numbers that share a scale, at most: channels of a token's input; tokens for latents of keys, for
            which it must be a power of 2 up to 256.
        calibration: the file of the singular vectors; needed where the input is larger than keys and values.
    """

    needs_inputs: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = True
    shared_tokens: ClassVar[str] = "heads"
    bits: int = 4
    group_size: int = 128

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise CompositionError(
                f"{self.name} has 1 to 8 bits, not {self.bits}", hint=f"for instance {self.name}(bits=4)"
            )
        if self.group_size < 1 or BLOCK_TOKENS % self.group_size:
            raise CompositionError(
                f"{self.name}: group_size must be a power of 2 up to {BLOCK_TOKENS}, not {self.group_size}",
                hint=f"for instance {self.name}(group_size=128)",
            )

    def latents(self) -> KIVI:
        """How latents are stored."""
        return KIVI(bits=self.bits, group_size=self.group_size, residual_length=self.group_size)

    def check(self, tokens: Tokens, call: Call, place: Place) -> None:
        """See ``Store.check``."""
        check_projections(tokens, call, place)

    def granule(self, place: Place) -> int:
        """See ``Store.granule``."""
        return self.latents().granule(latent_place(place)) if has_large_input(place.sizes) else 1

    def open(self, place: Place) -> StoreState:
        """See ``Store.open``."""
        if has_large_input(place.sizes):
            return InputLatentState(open_latents(self.latents(), latent_place(place)), place)
        return InputState(TokenGrid.of(self.bits, self.group_size, place.sizes.hidden), place)

    def predict_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.predict_bytes``."""
        if not tokens:
            return 0
        if has_large_input(place.sizes):
            return latent_bytes(self.latents(), tokens, latent_place(place), place, batch, dtype)
        grid = TokenGrid.of(self.bits, self.group_size, place.sizes.hidden)
        return batch * room_for(tokens, place) * (grid.token_bytes + position_bytes(place, 1))

    def chunk_bytes(self, sizes: LayerSizes, batch: int) -> int:
        """Codes and numbers of one block's inputs, and its keys or values before and after rotation."""
        made = sizes.heads * max(sizes.key_dim, sizes.value_dim)
        if has_large_input(sizes):
            return max(BLOCK_TOKENS, 2 * self.group_size) * batch * made * (1 + 4 * 4)
        return BLOCK_TOKENS * batch * (sizes.hidden * (1 + 2 * 4) + made * 3 * 4)

    def work(self, work: Work, shape: ModelShape, workload: Workload) -> Work:
        """See ``CacheTechnique.work``: the projections of all stored tokens are done anew at each step."""
        work = super().work(work, shape, workload)
        if not isinstance(workload, Generate) or not has_full_attention(shape.config):
            return work
        tokens = workload.batch * (workload.prompt_tokens + workload.new_tokens // 2)
        flops = 0
        for place in places_of(layer_kinds(shape.config), None, None):
            made = place.sizes.heads * (place.sizes.key_dim + place.sizes.value_dim)
            flops += 2 * tokens * made * (made // 2 if has_large_input(place.sizes) else place.sizes.hidden)
        return work.plus("decode", flops=float(flops), dtype=str(shape.dtype).removeprefix("torch."))

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From the table."""
        return RISK[self.bits]

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[XQuant]:
        """8 to 2 bits; none for a model without full attention."""
        if has_full_attention(shape.config):
            for bits in (8, 4, 3, 2):
                yield cls(bits=bits)

    def needs_calibration(self, config: PretrainedConfig) -> bool:
        """See ``Calibrated.needs_calibration``: for singular vectors only."""
        return any(layer.kind == FULL and has_large_input(layer.sizes) for layer in layer_kinds(config))

    @torch.no_grad()
    def fit(self, model: PreTrainedModel, texts: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """See ``Calibrated.fit``: singular vectors of the projections; of the text only two tokens are read."""
        layers = len(places_of(layer_kinds(model.config), None, None))
        return [self.factors(sample_layer(model, texts[0][:1, :2], index)) for index in range(layers)]

    def factors(self, sample: LayerSample) -> dict[str, Tensor]:
        """``W = U (S Vᵀ)`` of both projections of a layer, with their biases."""
        found: dict[str, Tensor] = {}
        made = Projections(sample.module, sample.place.sizes)
        for name, project in (("key", made.keys), ("value", made.values)):
            weight, bias = made.weight(project, sample.inputs)
            left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
            for part, factor in (("down", left), ("up", values[:, None] * right), ("bias", bias)):
                found[f"{name}_{part}"] = factor.to(sample.inputs.dtype).contiguous()
        return found

    def calibration_bytes(self, place: Place, dtype: torch.dtype) -> int:
        """See ``Calibrated.calibration_bytes``."""
        sizes = place.sizes
        if not (self.calibration or has_large_input(sizes)):
            return 0
        widths = [sizes.heads * dim for dim in (sizes.key_dim, sizes.value_dim)]
        return dtype.itemsize * sum(min(sizes.hidden, w) * (sizes.hidden + w) + w for w in widths)


def has_large_input(sizes: LayerSizes) -> bool:
    """Whether the input of attention is larger than keys and values together."""
    return sizes.hidden > sizes.heads * (sizes.key_dim + sizes.value_dim)


def latent_place(place: Place) -> Place:
    """A layer's place, for the store of its latents."""
    sizes = place.sizes
    return place.but(sizes=LayerSizes(1, sizes.heads * sizes.key_dim, sizes.heads * sizes.value_dim))
