"""The weights wing: weights as sums of packed terms. Importing it registers the format with transformers."""

from pintpot.weights._base import CompressionReport, WeightMethod
from pintpot.weights.formats import Dense, Format, Grid, LowRank, Scaled, Split, Transposed
from pintpot.weights.load import load_and_compress, load_compressed
from pintpot.weights.modules import CompressedExperts, CompressedLinear
from pintpot.weights.quantizer import PintpotConfig, PintpotQuantizer
from pintpot.weights.routing import route_, tasks_of
from pintpot.weights.sorting import sort_terms_
from pintpot.weights.streaming import compress_folder
from pintpot.weights.undo import dequantize_

TECHNIQUES: tuple[str, ...] = (
    "adadim",
    "awq",
    "bipft",
    "bitstack",
    "blast",
    "clover",
    "decoupleq",
    "denseshift",
    "edkm",
    "endor",
    "fireq",
    "flash_llm",
    "flashsvd",
    "gptq",
    "gqsa",
    "greenformers",
    "i_vit",
    "learnable_codebooks",
    "loraprune",
    "lord",
    "low_rank_ctr",
    "lpvit",
    "luq",
    "lut_tensor_core",
    "minifloat_ptq",
    "mixllm",
    "onebit",
    "onebit_merging",
    "pams",
    "pychop",
    "q_bert",
    "q_hyvit",
    "qfx_fixed_point",
    "quamba",
    "row_tiles",
    "rtn",
    "sail",
    "svdquant",
    "t_mac",
    "tilus",
    "ultra_low_bit_partial_retraining",
    "vptq",
    "welore",
    "zeroquant_v2_lorc",
    "zipnn",
)

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
    "route_",
    "sort_terms_",
    "tasks_of",
]
