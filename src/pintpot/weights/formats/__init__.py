"""Formats: how the terms of a weight are stored and multiplied. Importing this makes every format known by its name."""

from pintpot.weights.formats._base import FORMATS, Format, Storage, Tensors, file_name, format_from_dict
from pintpot.weights.formats.bit_planes import BitPlanes
from pintpot.weights.formats.codebook import Codebook
from pintpot.weights.formats.dense import Dense
from pintpot.weights.formats.float8_input import Float8Input
from pintpot.weights.formats.float8_scales import Float8Scales
from pintpot.weights.formats.grid import Grid
from pintpot.weights.formats.group_offset import GroupOffset
from pintpot.weights.formats.leading import Leading
from pintpot.weights.formats.level_grid import LevelGrid
from pintpot.weights.formats.low_rank import LowRank
from pintpot.weights.formats.register_tiles import RegisterTiles
from pintpot.weights.formats.rotated import Rotated
from pintpot.weights.formats.rounded_input import RoundedInput
from pintpot.weights.formats.routed import Routed
from pintpot.weights.formats.row_tiles import RowTiles
from pintpot.weights.formats.scaled import Scaled
from pintpot.weights.formats.sign_rank import SignRank
from pintpot.weights.formats.signed_input import SignedInput
from pintpot.weights.formats.signs import Signs
from pintpot.weights.formats.sparse import Sparse
from pintpot.weights.formats.split import Split
from pintpot.weights.formats.split_input import SplitInput
from pintpot.weights.formats.static_input import StaticInput
from pintpot.weights.formats.ternary import Ternary
from pintpot.weights.formats.tiled import Tiled
from pintpot.weights.formats.transposed import Transposed

__all__ = [
    "FORMATS",
    "BitPlanes",
    "Codebook",
    "Dense",
    "Float8Input",
    "Float8Scales",
    "Format",
    "Grid",
    "GroupOffset",
    "Leading",
    "LevelGrid",
    "LowRank",
    "RegisterTiles",
    "Rotated",
    "RowTiles",
    "RoundedInput",
    "Routed",
    "Scaled",
    "SignRank",
    "SignedInput",
    "Signs",
    "Sparse",
    "Split",
    "SplitInput",
    "StaticInput",
    "Storage",
    "Tensors",
    "Ternary",
    "Tiled",
    "Transposed",
    "file_name",
    "format_from_dict",
]
