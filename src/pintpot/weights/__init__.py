"""The weights wing: weights as sums of packed terms. Importing it registers the format with transformers."""

from pintpot.weights._base import CompressionReport, WeightMethod
from pintpot.weights.formats import Dense, Format, Grid, LowRank, Scaled, Split, Transposed
from pintpot.weights.load import load_and_compress, load_compressed
from pintpot.weights.modules import CompressedExperts, CompressedLinear
from pintpot.weights.quantizer import PintpotConfig, PintpotQuantizer
from pintpot.weights.streaming import compress_folder
from pintpot.weights.undo import dequantize_

TECHNIQUES: tuple[str, ...] = ("awq", "gptq", "rtn")

__all__ = [
    "TECHNIQUES",
    "CompressedExperts",
    "CompressedLinear",
    "CompressionReport",
    "Dense",
    "Format",
    "Grid",
    "LowRank",
    "PintpotConfig",
    "PintpotQuantizer",
    "Scaled",
    "Split",
    "Transposed",
    "WeightMethod",
    "compress_folder",
    "dequantize_",
    "load_and_compress",
    "load_compressed",
]
