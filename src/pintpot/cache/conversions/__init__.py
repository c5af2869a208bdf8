"""Conversions: models whose cache is smaller by their architecture. Importing this registers it with transformers.

After it, ``AutoModelForCausalLM.from_pretrained`` loads the folders that ``pintpot convert`` writes.
"""

from pintpot.cache.conversions._base import Conversion
from pintpot.cache.conversions.latent import LatentConfig, LatentForCausalLM
from pintpot.cache.conversions.loma import LoMA
from pintpot.cache.conversions.memory import MemoryConfig, MemoryForCausalLM
from pintpot.cache.conversions.transmla import TransMLA
from pintpot.cache.conversions.x_ecomla import XEcoMLA

__all__ = [
    "Conversion",
    "LatentConfig",
    "LatentForCausalLM",
    "LoMA",
    "MemoryConfig",
    "MemoryForCausalLM",
    "TransMLA",
    "XEcoMLA",
]
