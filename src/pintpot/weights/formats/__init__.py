"""Formats: how the terms of a weight are stored and multiplied. Importing this makes every format known by its name."""

from pintpot.weights.formats._base import FORMATS, Format, Storage, Tensors, file_name, format_from_dict
from pintpot.weights.formats.dense import Dense
from pintpot.weights.formats.grid import Grid
from pintpot.weights.formats.low_rank import LowRank
from pintpot.weights.formats.rounded_input import RoundedInput
from pintpot.weights.formats.scaled import Scaled
from pintpot.weights.formats.split import Split
from pintpot.weights.formats.transposed import Transposed

__all__ = [
    "FORMATS",
    "Dense",
    "Format",
    "Grid",
    "LowRank",
    "RoundedInput",
    "Scaled",
    "Split",
    "Storage",
    "Tensors",
    "Transposed",
    "file_name",
    "format_from_dict",
]
