"""Decoders that read in zones: when a zone is full, a few memory tokens take the place of its keys and values.

A zone has ``compression_ratio * memory_tokens`` tokens, its reading zone. After them come memory tokens, which see the
reading zone and each other; later zones see the memories of those before them, and nothing else of them. With a cache
this happens while reading and generating: the zone's keys and values are dropped once its memory is there. Without a
cache the whole text is laid out in one sequence under a mask that says the same.

In training each memory is followed by repetition tokens that see nothing but it, and must give back its zone.

Shapes: B batch, T tokens of the text, L places of the laid-out sequence, Z tokens in a zone, M memory tokens, E hidden
size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from pintpot.cache.conversions.family import FamilyConfig, FamilyForCausalLM
from pintpot.core.errors import CompositionError, ShapeError

LAYER_TYPE = "pintpot_memory"
"""The name by which transformers makes our cache layers."""

READING, MEMORY, REPETITION = range(3)


@strict
class MemoryConfig(FamilyConfig):
    """A decoder of the Llama family that reads in zones.

    Attributes:
        memory_tokens: M, which stand for a zone.
        compression_ratio: tokens of a zone for each of them.
    """

    model_type = "pintpot_memory"

    memory_tokens: int = 8
    compression_ratio: int = 4

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("layer_types", None)
        super().__post_init__(**kwargs)
        self.layer_types = [LAYER_TYPE] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """All layers have the one type that is ours."""

    @property
    def zone_tokens(self) -> int:
        """Z."""
        return self.memory_tokens * self.compression_ratio


class MemoryLayer(DynamicLayer):
    """The keys and values of memories and of the zone that is being read; counts the tokens that were seen."""

    _layer_type = LAYER_TYPE
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    @property
    def stored(self) -> int:
        """Places that are held."""
        return int(self.keys.shape[-2]) if self.is_initialized and self.keys is not None else 0

    def get_seq_length(self) -> int:
        """Tokens that were seen, most of which are held no more."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What attention sees, which is what is held."""
        return self.stored + query_length, 0

    def forget_(self, tokens: int, after: int) -> None:
        """Drop ``tokens`` places, with ``after`` places behind them that stay."""
        for name in ("keys", "values"):
            held = getattr(self, name)
            end = held.shape[-2] - after
            setattr(self, name, torch.cat([held[..., : end - tokens, :], held[..., end:, :]], dim=-2))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Memories cannot be turned back into their zones.

        Raises:
            CompositionError: always, unless nothing is to be removed.
        """
        if tokens_to_remove:
            raise CompositionError(
                "a cache of memories cannot be cropped: the zones that they stand for are gone",
                hint="generate without assisted decoding, or begin with a new cache",
            )


@dataclass(frozen=True)
class Layout:
    """Where everything stands in one sequence of L places.

    Attributes:
        kind: reading, memory or repetition, int64 (L,).
        zone: which zone it belongs to, int64 (L,).
        position: its position in the text, int64 (L,): a memory token stands at the end of the tokens that it would
            stand for alone, a repetition token where the token is that it repeats.
        places: for each kind there is, its places, int64.
    """

    kind: Tensor
    zone: Tensor
    position: Tensor
    places: dict[int, Tensor]

    @classmethod
    def of(cls, tokens: int, config: MemoryConfig, *, repeat: bool, device: torch.device) -> Layout:
        """The places of a text; only full zones have memories, and the last one only if it is to be repeated."""
        size, ratio = config.zone_tokens, config.compression_ratio
        parts = []
        for zone in range(-(-tokens // size)):
            first, end = zone * size, min((zone + 1) * size, tokens)
            parts.append((READING, zone, range(first, end)))
            if end - first == size and (repeat or end < tokens):
                parts.append((MEMORY, zone, range(first + ratio - 1, end, ratio)))
                if repeat:
                    parts.append((REPETITION, zone, range(first, end)))
        rows = [(kind, zone, position) for kind, zone, positions in parts for position in positions]
        kind, zone, position = torch.tensor(rows, device=device).T
        places: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row[0], []).append(place)
        return cls(kind, zone, position, {k: torch.tensor(found, device=device) for k, found in places.items()})

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What each place sees, (1, 1, L, L): 0 where it does, the lowest number where it does not."""
        kind, zone, position = self.kind, self.zone, self.position
        same, before = zone[:, None] == zone, zone[:, None] > zone
        not_later = position[:, None] >= position
        like = kind[:, None] == kind
        reading, memory = kind == READING, kind == MEMORY
        sees = (like & same & not_later) | (reading[:, None] & memory & before)
        sees |= memory[:, None] & same & (reading | memory)
        sees |= (kind == REPETITION)[:, None] & memory & same
        return torch.zeros(sees.shape, dtype=dtype, device=kind.device).masked_fill(~sees, torch.finfo(dtype).min)[
            None, None
        ]


class MemoryForCausalLM(FamilyForCausalLM):
    """A decoder of the Llama family that reads in zones, with the embeddings of its two special tokens."""

    config_class = MemoryConfig
    config: MemoryConfig

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.special_tokens = nn.Embedding(2, config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As of other causal models; positions follow from the tokens that the cache has seen, whatever is given.

        Raises:
            ShapeError: for padded sequences.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ShapeError(
                "a model that reads in zones cannot take padded sequences", hint="give sequences of equal length"
            )
        embedded: Tensor = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.use_cache if use_cache is None else use_cache:
            past_key_values = DynamicCache(config=self.config) if past_key_values is None else past_key_values
            hidden = self._read(embedded, past_key_values)
        else:
            hidden, layout = self.lay_out(embedded, repeat=False)
            hidden = hidden[:, layout.places[READING]]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        kwargs.pop("position_ids", None)
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def lay_out(self, embedded: Tensor, *, repeat: bool) -> tuple[Tensor, Layout]:
        """The last hidden states (B, L, E) of a text (B, T, E) with its memories, and where everything stands."""
        layout = Layout.of(embedded.shape[1], self.config, repeat=repeat, device=embedded.device)
        places = torch.where(layout.kind == READING, layout.position, layout.kind - 1 + embedded.shape[1])
        special = self.special_tokens.weight.to(embedded.dtype).expand(len(embedded), -1, -1)
        laid_out = torch.cat([embedded, special], dim=1)[:, places]
        result = self.model(
            inputs_embeds=laid_out,
            position_ids=layout.position[None],
            attention_mask=layout.mask(embedded.dtype),
            use_cache=False,
        )
        return result.last_hidden_state, layout

    def _read(self, embedded: Tensor, cache: Cache) -> Tensor:
        """The last hidden states (B, T, E) of further tokens; zones that they fill stay in the cache as memories."""
        layers = _memory_layers(cache, self.config)
        size, done, hidden = self.config.zone_tokens, 0, []
        while done < embedded.shape[1]:
            seen = layers[0].seen
            piece = embedded[:, done : done + size - seen % size]
            hidden.append(self._attend(piece, torch.arange(seen, seen + piece.shape[1]), cache, layers, READING))
            done += piece.shape[1]
            for layer in layers:
                layer.seen += piece.shape[1]
            if layers[0].seen % size == 0:
                self._remember(layers[0].seen - size, cache, layers, len(embedded))
        return torch.cat(hidden, dim=1)

    def _remember(self, first: int, cache: Cache, layers: list[MemoryLayer], batch: int) -> None:
        """Read the memory tokens of the zone that begins with token ``first``, and drop its keys and values."""
        count, ratio = self.config.memory_tokens, self.config.compression_ratio
        memory = self.special_tokens.weight[:1].expand(batch, count, -1)
        positions = torch.arange(first + ratio - 1, first + count * ratio, ratio)
        self._attend(memory.to(self.model.embed_tokens.weight.dtype), positions, cache, layers, MEMORY)
        for layer in layers:
            layer.forget_(self.config.zone_tokens, count)

    def _attend(self, piece: Tensor, positions: Tensor, cache: Cache, layers: list[MemoryLayer], kind: int) -> Tensor:
        count, stored = piece.shape[1], layers[0].stored
        sees = torch.ones(count, stored + count, dtype=torch.bool, device=piece.device)
        if kind == READING:
            sees[:, stored:].tril_()
        else:
            sees[:, : stored - self.config.zone_tokens] = False
        mask = torch.zeros(sees.shape, dtype=piece.dtype, device=piece.device)
        mask = mask.masked_fill(~sees, torch.finfo(piece.dtype).min)
        result = self.model(
            inputs_embeds=piece,
            position_ids=positions.to(piece.device)[None],
            attention_mask=mask[None, None],
            past_key_values=cache,
            use_cache=True,
        )
        states: Tensor = result.last_hidden_state
        return states


def _memory_layers(cache: Cache, config: MemoryConfig) -> list[MemoryLayer]:
    layers = [layer for layer in cache.layers if isinstance(layer, MemoryLayer)]
    if len(layers) != config.num_hidden_layers:
        raise CompositionError(
            "this model needs a cache that knows its memories",
            hint="leave the cache out, or make it by DynamicCache(config=model.config)",
        )
    return layers


AutoConfig.register(MemoryConfig.model_type, MemoryConfig, exist_ok=True)
AutoModelForCausalLM.register(MemoryConfig, MemoryForCausalLM, exist_ok=True)
