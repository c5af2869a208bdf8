"""Optimizers that hold far less than AdamW, one short file a method; see ``_base`` for the algebra.

All are ordinary ``torch.optim.Optimizer`` classes for any training loop.
"""

from pintpot.optim._adamw import AdamW
from pintpot.optim._base import OptimExtra, OptimMethod
from pintpot.optim._engine import ProjectedOptimizer
from pintpot.optim._groups import projected_groups
from pintpot.optim.apollo import Apollo, ApolloRule
from pintpot.optim.apollo_mini import ApolloMini, ApolloMiniRule
from pintpot.optim.fira import Fira, FiraRule
from pintpot.optim.galore import GaLore, GaLoreRule
from pintpot.optim.lisa import Lisa, LisaRule

TECHNIQUES = ("galore", "apollo", "apollo_mini", "fira", "lisa", "adamw_8bit", "adamw_4bit", "gradient_release")

__all__ = [
    "TECHNIQUES",
    "AdamW",
    "Apollo",
    "ApolloMini",
    "ApolloMiniRule",
    "ApolloRule",
    "Fira",
    "FiraRule",
    "GaLore",
    "GaLoreRule",
    "Lisa",
    "LisaRule",
    "OptimExtra",
    "OptimMethod",
    "ProjectedOptimizer",
    "projected_groups",
]
