"""AQUA-KV: store only what cannot be predicted from the layer below, rounded to 2 to 4 bits.

Source:    Shutova et al. 2025, "Cache Me If You Must: Adaptive Key-Value Quantization for Large Language Models",
           arXiv:2501.19392; rounding by HIGGS, arXiv:2411.17525; sizes as in the authors' code.
Differs:   groups that are rounded together are the greatest power of 2 that divides a layer's keys, up to 1,024 (the
           authors fill up to 1,024 with zeros); grids are found by Lloyd's algorithm instead of read from a table.
           Tokens leave the window 128 at a time.
Saves:     kv_cache, real: bits for each number, and a scale for each group of each token, beside the predictors. While
           a prompt is read, the tokens of one layer wait densely for the layer above. Attending hands one layer's keys
           and values, dense, from layer to layer (workspace, as long as the cache).
Shapes:    E numbers of the keys of a token, all heads together, F of its values; predictors (E, E) and (F, E + F).
Composes:  any keep that keeps the same number of tokens in all layers; the lowest layer chooses them for all. Tokens
           that a keep has pending stand for the window.
Use when:  2 to 3 bits with hardly any loss; many layers; a text for calibration is at hand.
Not when:  contexts are short beside the predictors (about 3 E numbers squared for each layer), or speed matters most.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pintpot.cache._base import LayerSizes, Place, Store
from pintpot.cache.calibration import Calibrated, sample_layer
from pintpot.cache.geometry import FULL, has_full_attention, layer_kinds
from pintpot.cache.higgs import DISTANCES_AT_ONCE, code_bytes, decode, encode, group_of, normal_grid
from pintpot.cache.predicted import KEYS, VALUES, PredictedState, heads_together, predict
from pintpot.cache.rows import BLOCK_TOKENS, position_bytes, room_for
from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload

RISK = {4: 0.001, 3: 0.004, 2: 0.01, 1: 0.1}
"""Relative rise of perplexity by bits; guesses, below KIVI's as the paper has them below 1 % at 2 to 2.5 bits."""

DAMPING = 1e-3
"""Added to the diagonal of the inputs' second moments, over its mean (the authors' ``percdamp``)."""


@technique(
    name="aqua-kv",
    wing="cache",
    part="store",
    source=Source(
        "Cache Me If You Must: Adaptive Key-Value Quantization for Large Language Models", year=2025, arxiv="2501.19392"
    ),
    accounts=[Account.KV_CACHE],
    claims=[
        Claim(
            "relative error of perplexity, below",
            0.01,
            versus="full cache",
            at="Llama 3.2, 2 to 2.5 bits a value",
            where="abstract",
        ),
    ],
    fidelity="own grids; groups without padding",
    needs=("even_layers", "even_heads", "every_layer"),
)
@dataclass(frozen=True, kw_only=True)
class AquaKV(Calibrated, Store):
    """Prediction across layers, and rounding of what remains.

    Attributes:
        bits: of a number, 1 to 4.
        first_bits: of a number in the lowest layer, which is not predicted.
        sink_tokens: first tokens, which stay as they are.
        window_tokens: recent tokens that wait as they are until so many have gathered.
    """

    needs_rotary: ClassVar[bool] = True
    shared_tokens: ClassVar[str] = "layers"
    waiting_layers: ClassVar[int] = 1
    bits: int = 2
    first_bits: int = 4
    sink_tokens: int = 4
    window_tokens: int = 128

    def __post_init__(self) -> None:
        if not (1 <= self.bits <= 4 and 1 <= self.first_bits <= 4):
            raise CompositionError(
                f"aqua-kv has 1 to 4 bits, not {self.bits} and {self.first_bits}", hint="for instance aqua-kv(bits=3)"
            )
        if self.sink_tokens < 0 or self.window_tokens < 1:
            raise CompositionError(
                f"aqua-kv cannot have {self.sink_tokens} first tokens and a window of {self.window_tokens}",
                hint="the authors use sink_tokens=4 and window_tokens=128",
            )

    def unit(self, place: Place) -> int:
        """Tokens that are packed together, beside recent ones that wait elsewhere."""
        return max(1, self.window_tokens - place.recent_tokens)

    def bits_of(self, place: Place) -> int:
        """Bits of a number in this layer."""
        return self.bits if place.index else self.first_bits

    def granule(self, place: Place) -> int:
        """See ``Store.granule``."""
        return self.unit(place)

    def open(self, place: Place) -> PredictedState:
        """See ``Store.open``."""
        return PredictedState(place, self.sink_tokens, self.unit(place))

    def predict_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.predict_bytes``."""
        if not tokens:
            return 0
        sizes, unit, bits = place.sizes, self.unit(place), self.bits_of(place)
        packed = max(0, tokens - self.sink_tokens) // unit * unit
        numbers = (sizes.heads * sizes.key_dim, sizes.heads * sizes.value_dim)
        token = position_bytes(place, 1) + sum(code_bytes(n, bits) + 2 * (n // group_of(n)) for n in numbers)
        waiting = (unit - 1) * position_bytes(place, 1) * batch
        dense = sizes.dense_bytes(self.sink_tokens + unit - 1, batch, dtype)
        return dense + waiting + room_for(packed, place) * batch * token

    def calibration_bytes(self, place: Place, dtype: torch.dtype) -> int:
        """See ``CacheTechnique.calibration_bytes``: the grid, and above the lowest layer the predictors."""
        keys, values = (place.sizes.heads * dim for dim in (place.sizes.key_dim, place.sizes.value_dim))
        predictors = keys * (keys + 1) + values * (keys + values + 1) if place.index else 0
        return (2 * 4 ** self.bits_of(place) + predictors) * dtype.itemsize

    def chunk_bytes(self, sizes: LayerSizes, batch: int) -> int:
        """Numbers of one block in float32: codes, predictions, keys and values; or distances from the grid."""
        numbers = BLOCK_TOKENS * batch * sizes.heads * (sizes.key_dim + sizes.value_dim) * 4
        return max(numbers * 3, numbers + DISTANCES_AT_ONCE * 4)

    def handed_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.handed_bytes``: one layer's keys and values."""
        return place.sizes.dense_bytes(tokens, batch, dtype)

    def decode_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.decode_bytes``.

        Codes become numbers, are turned back (about ten passes), predicted and rotated.
        """
        numbers = place.sizes.dense_bytes(tokens, batch, torch.float32)
        return self.predict_bytes(tokens, place, batch, dtype) + 16 * numbers

    @torch.no_grad()
    def fit(self, model: PreTrainedModel, texts: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """See ``Calibrated.fit``: layer by layer, from what is left of the layer below after rounding."""
        count = sum(layer.kind == FULL for layer in layer_kinds(model.config))
        found: list[dict[str, Tensor]] = []
        below: list[tuple[Tensor, Tensor]] = []
        for index in range(count):
            samples = [sample_layer(model, text, index) for text in texts]
            keys = [heads_together(sample.unrotated_keys()) for sample in samples]
            values = [heads_together(sample.values.float()) for sample in samples]
            grid = normal_grid(self.bits if index else self.first_bits)
            layer: dict[str, Tensor] = {"grid": grid.to(values[0].device, copy=True)}
            if index:
                layer |= regression(KEYS, [k for k, _ in below], keys)
            keys = [rounded(KEYS, layer, [k for k, _ in below][i : i + 1], k) for i, k in enumerate(keys)]
            inputs = [torch.cat([k, v], dim=-1) for k, (_, v) in zip(keys, below, strict=False)]
            if index:
                layer |= regression(VALUES, inputs, values)
            values = [rounded(VALUES, layer, inputs[i : i + 1], v) for i, v in enumerate(values)]
            below = list(zip(keys, values, strict=True))
            found.append(layer)
        return found

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From the table."""
        return RISK[self.bits]

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[AquaKV]:
        """4 to 2 bits; none for a model without full attention."""
        if has_full_attention(shape.config):
            for bits in (4, 3, 2):
                yield cls(bits=bits)


def regression(name: str, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, Tensor]:
    """The damped linear map with an offset that predicts targets (B, T, F) from inputs (B, T, E) best, in squares."""
    moments: Tensor | None = None
    products: Tensor | None = None
    for given, wanted in zip(inputs, targets, strict=True):
        rows = torch.cat([given, torch.ones_like(given[..., :1])], dim=-1).flatten(0, 1).double()
        moment, product = rows.T @ rows, rows.T @ wanted.flatten(0, 1).double()
        moments = moment if moments is None else moments + moment
        products = product if products is None else products + product
    if moments is None or products is None:
        raise ValueError("a regression needs at least one text")
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(
        len(moments), dtype=moments.dtype, device=moments.device
    )
    solved = torch.linalg.solve(damped, products).float()
    return {f"{name}_weight": solved[:-1].T.contiguous(), f"{name}_offset": solved[-1].clone()}


def rounded(name: str, layer: dict[str, Tensor], inputs: Sequence[Tensor], states: Tensor) -> Tensor:
    """States (B, T, F) as they come back from the cache, predicted from the inputs if there are any."""
    predicted = predict(name, layer, inputs[0]) if inputs else torch.zeros_like(states)
    codes, scale = encode(states - predicted, layer["grid"], torch.float32)
    return predicted + decode(codes, scale, layer["grid"], states.shape[-1])
