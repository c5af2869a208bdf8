"""What a method found before it packed anything, kept until a block is trained again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from pintpot.weights.formats import Format

if TYPE_CHECKING:
    from pintpot.weights.modules import PackedTerms


class ExaminedLayout(dict[str, tuple[Format, ...]]):
    """The formats of each parameter's terms, with what was examined of it. Only the formats are written to files.

    Args:
        formats: by parameter, as in any layout.
        evidence: by parameter, small or large tensors by names of the method's own.
    """

    def __init__(self, formats: Mapping[str, tuple[Format, ...]], evidence: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__(formats)
        self.evidence = evidence


@dataclass(frozen=True)
class Replaced:
    """A parameter whose place packed terms have taken.

    Attributes:
        holder: of the packed terms.
        weight: the numbers that they stand for, (O, I) or (E, O, I), in the dense model's dtype; not to be changed.
        evidence: what the method examined of it; empty where its layout came from elsewhere.
    """

    holder: PackedTerms
    weight: Tensor
    evidence: Mapping[str, Tensor]
