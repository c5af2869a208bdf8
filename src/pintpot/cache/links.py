"""What one layer of a cache knows of the others."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, cast

from torch import Tensor

from pintpot.cache._base import StoreState

if TYPE_CHECKING:
    from pintpot.cache.layer import CacheLayer


class Agreement:
    """What the lowest layer has chosen, for stores in which all layers hold the same tokens."""

    def __init__(self) -> None:
        self.chosen: Tensor | None = None
        self._rows: dict[int, Agreement] = {}

    def of_row(self, row: int) -> Agreement:
        """The agreement on one sequence of a padded batch."""
        return self._rows.setdefault(row, Agreement())


class Below:
    """Gives the store of the layer below one, which it does not keep alive: a cache is freed as soon as it is let go.

    Args:
        layer: the layer above.
    """

    def __init__(self, layer: CacheLayer) -> None:
        self._layer = weakref.ref(layer)

    def __call__(self) -> StoreState:
        """The store."""
        return cast("CacheLayer", cast("CacheLayer", self._layer()).lower).stored
