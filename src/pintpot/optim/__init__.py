"""Optimizers that hold far less than AdamW, one short file a method; see ``_base`` for the algebra.

All are ordinary ``torch.optim.Optimizer`` classes for any training loop.
"""

from pintpot.optim._adamw import AdamW
from pintpot.optim._base import OptimExtra, OptimMethod
from pintpot.optim._engine import ProjectedOptimizer
from pintpot.optim._groups import projected_groups
from pintpot.optim._parameterize import Parameterization
from pintpot.optim._zeroth import GradientFreeMethod, ZerothOrderOptimizer
from pintpot.optim.apollo import Apollo, ApolloRule
from pintpot.optim.apollo_mini import ApolloMini, ApolloMiniRule
from pintpot.optim.baffle import Baffle, BaffleRule
from pintpot.optim.block_coordinate_descent import BlockCoordinateDescent, BlockCoordinateDescentRule
from pintpot.optim.cosmos import Cosmos, CosmosRule
from pintpot.optim.dct_low_rank import DctLowRank, DctLowRankRule
from pintpot.optim.fira import Fira, FiraRule
from pintpot.optim.frugal import Frugal, FrugalRule
from pintpot.optim.galore import GaLore, GaLoreRule
from pintpot.optim.gradnormlorp import GradNormLoRP
from pintpot.optim.just_one_byte import JustOneByte, JustOneByteRule
from pintpot.optim.lion import Lion
from pintpot.optim.lisa import Lisa, LisaRule
from pintpot.optim.lost import Lost
from pintpot.optim.mezo import Mezo, MezoRule
from pintpot.optim.natural_galore import NaturalGaLore, NaturalGaLoreRule
from pintpot.optim.owlore import OwLore, OwLoreRule
from pintpot.optim.q_galore import QGaLore, QGaLoreRule
from pintpot.optim.relora import ReLora
from pintpot.optim.sgd_momentum import SgdMomentum
from pintpot.optim.signsgd import SignSgd
from pintpot.optim.sltrain import SLTrain
from pintpot.optim.soap import Soap
from pintpot.optim.sst import Sst
from pintpot.optim.stochastic_rounding import StochasticRounding
from pintpot.optim.tpsgd import TpSgd, TpSgdRule
from pintpot.optim.zo2 import Zo2, Zo2Rule

TECHNIQUES = (
    "galore",
    "apollo",
    "apollo_mini",
    "fira",
    "q_galore",
    "frugal",
    "dct_low_rank",
    "natural_galore",
    "cosmos",
    "lisa",
    "owlore",
    "block_coordinate_descent",
    "mezo",
    "just_one_byte",
    "baffle",
    "tpsgd",
    "zo2",
    "sltrain",
    "lost",
    "sst",
    "relora",
    "gradnormlorp",
    "adamw_8bit",
    "adamw_4bit",
    "gradient_release",
    "lion",
    "sgd_momentum",
    "signsgd",
    "soap",
    "stochastic_rounding",
)

__all__ = [
    "TECHNIQUES",
    "AdamW",
    "Apollo",
    "ApolloMini",
    "ApolloMiniRule",
    "ApolloRule",
    "Baffle",
    "BaffleRule",
    "BlockCoordinateDescent",
    "BlockCoordinateDescentRule",
    "Cosmos",
    "CosmosRule",
    "DctLowRank",
    "DctLowRankRule",
    "Fira",
    "FiraRule",
    "Frugal",
    "FrugalRule",
    "GaLore",
    "GaLoreRule",
    "GradNormLoRP",
    "GradientFreeMethod",
    "JustOneByte",
    "JustOneByteRule",
    "Lion",
    "Lisa",
    "LisaRule",
    "Lost",
    "Mezo",
    "MezoRule",
    "NaturalGaLore",
    "NaturalGaLoreRule",
    "OptimExtra",
    "OptimMethod",
    "OwLore",
    "OwLoreRule",
    "Parameterization",
    "ProjectedOptimizer",
    "QGaLore",
    "QGaLoreRule",
    "ReLora",
    "SLTrain",
    "SgdMomentum",
    "SignSgd",
    "Soap",
    "Sst",
    "StochasticRounding",
    "TpSgd",
    "TpSgdRule",
    "ZerothOrderOptimizer",
    "Zo2",
    "Zo2Rule",
    "projected_groups",
]
