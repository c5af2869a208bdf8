"""As much of a compressed folder whose terms are ranked as fits into a size."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch

from pintpot.core.errors import CompositionError
from pintpot.core.model_folder import ModelFolder, TensorEntry
from pintpot.weights._base import Layout
from pintpot.weights.quantizer import PintpotConfig
from pintpot.weights.ranked import RankedLayout
from pintpot.weights.targets import find_targets


@dataclass(frozen=True)
class Fitting:
    """A part of a ranked folder.

    Attributes:
        opened: the folder, with the configuration of the part.
        left_off: the tensors in its files that do not belong to the part.
    """

    opened: ModelFolder
    left_off: frozenset[str]


def fit(opened: ModelFolder, size_bytes: int, dtype: torch.dtype | None = None) -> Fitting:
    """The terms of a folder that are worth most, as far as they fit; only headers are read.

    Args:
        opened: the compressed folder.
        size_bytes: most bytes of all tensors.
        dtype: of the dense parameters; as stored by default.

    Raises:
        BudgetError: when the size is too small for the first term of each weight.
        CompositionError: when the folder's terms are not ranked.
    """
    config = PintpotConfig(**(opened.quantization or {}))
    layout = config.read_layout()
    if not isinstance(layout, RankedLayout):
        raise CompositionError(
            f"{opened.path} has one size only: {config.technique} does not rank its terms",
            hint="leave the size out, or compress with bitstack, whose folders can be loaded in any size",
        )
    targets, _ = find_targets(opened.shape(config.dtype).build("meta"), config.dtype)
    holders = {target.holder: target.parameter for target in targets}
    places = {name: _place(name, holders) for name in opened.entries}
    sizes = {name: [0] * len(formats) for name, formats in layout.items()}
    dense = 0
    for name, entry in opened.entries.items():
        place = places[name]
        if place is None:
            dense += _held_bytes(entry, dtype)
        else:
            sizes[place[0]][place[1]] += entry.nbytes
    kept = layout.within(sizes, size_bytes - dense)
    left_off = {name for name, place in places.items() if place is not None and place[1] >= len(kept[place[0]])}
    return Fitting(_with_layout(opened, config, kept), frozenset(left_off))


def _place(name: str, holders: dict[str, str]) -> tuple[str, int] | None:
    """The parameter and the number of the term that a stored tensor belongs to."""
    holder, _, tensor = name.rpartition(".")
    if holder not in holders or not tensor.startswith("term"):
        return None
    return holders[holder], int(tensor.removeprefix("term").partition("_")[0])


def _held_bytes(entry: TensorEntry, dtype: torch.dtype | None) -> int:
    as_stored = dtype is None or not entry.dtype.is_floating_point
    return entry.nbytes if as_stored or dtype is None else entry.nbytes // entry.dtype.itemsize * dtype.itemsize


def _with_layout(opened: ModelFolder, own: PintpotConfig, layout: Layout) -> ModelFolder:
    """The folder as if it had been written with another layout."""
    config = copy.deepcopy(opened.config)
    config.quantization_config = PintpotConfig.of(own.method(), own.dtype, layout).to_dict()
    return replace(opened, config=config)
