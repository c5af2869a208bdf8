"""What a layer of the cache gives the model to attend to, and layers that attend to the tokens of an earlier one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from pintpot.cache._base import Call
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError

if TYPE_CHECKING:
    from pintpot.cache.layer import CacheLayer


class Handle:
    """What a layer gives the model in place of keys and values: only Pintpot's attention can read it.

    Attributes:
        layer: who attends.
        tokens: new tokens that the layer does not hold yet, or None.
    """

    __slots__ = ("layer", "tokens")

    def __init__(self, layer: CacheLayer | SharedLayer, tokens: Tokens | None) -> None:
        self.layer = layer
        self.tokens = tokens

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise CompositionError(
            "the model reads its cache without Pintpot's attention",
            hint="wrap generation in `with pintpot.cache.use_cache_attention(model):`; a model that does not go "
            "through transformers' attention interface cannot use these caches",
        )


@dataclass
class Lent:
    """The new tokens of a layer, to which layers above may attend as well.

    Attributes:
        call: the layer's own.
        tokens: those that it does not hold yet, or None.
        readers: layers that have yet to attend.
    """

    call: Call
    tokens: Tokens | None
    readers: int


class SharedLayer(CacheLayerMixin):
    """A layer that attends to the tokens of an earlier one; these are given over when all their readers have.

    Args:
        owner: the earlier layer.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, owner: CacheLayer) -> None:
        super().__init__()
        self.owner = owner
        owner.readers += 1

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]  # a class attribute there
        """As the earlier layer."""
        return self.owner.is_croppable

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is held, so sizes do not matter."""
        self.is_initialized = True

    def update(  # type: ignore[override]  # a handle stands for the tensors
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Handle, Handle]:
        """Let the layer's own keys and values go, and give the handle from which Pintpot's attention reads."""
        self.is_initialized = True
        handle = Handle(self, None)
        return handle, handle

    def attend(self, handle: Handle, call: Call) -> Tensor:
        """See ``CacheLayer.lend``."""
        return self.owner.lend(call)

    def nbytes(self) -> int:
        """Nothing."""
        return 0

    def get_seq_length(self) -> int:
        """As the earlier layer."""
        return self.owner.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As the earlier layer."""
        return self.owner.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        """As the earlier layer."""
        return self.owner.get_max_length()

    def reset(self) -> None:
        """The earlier layer forgets; here is nothing."""
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """The earlier layer forgets; here is nothing."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The earlier layer's sequences are put in order; here are none."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """The earlier layer's sequences are repeated; here are none."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """The earlier layer's sequences are chosen; here are none."""

    def offload(self) -> None:
        """As the earlier layer, which cannot."""
        self.owner.offload()

    def prefetch(self) -> None:
        """As ``offload``."""
        self.offload()
