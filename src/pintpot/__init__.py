"""Pintpot: a quart of model into a pint pot of memory.

The public names are loaded when they are first used, so that ``import pintpot`` costs nothing, touches no
accelerator and changes no global of another library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pintpot._version import __version__

if TYPE_CHECKING:
    from pintpot import cache
    from pintpot.core.errors import PintpotError
    from pintpot.core.ledger import Account, Ledger, Tier
    from pintpot.core.plan import Plan
    from pintpot.core.registry import techniques
    from pintpot.core.shape import ModelShape
    from pintpot.core.workload import Budget, Compress, Finetune, Generate, Pretrain
    from pintpot.jobs.assemble import apply
    from pintpot.jobs.calibrate import calibrate_file
    from pintpot.jobs.choose import Wish
    from pintpot.jobs.compress import compress
    from pintpot.jobs.convert import ConvertSettings, convert
    from pintpot.jobs.finetune import FinetuneSettings, finetune
    from pintpot.jobs.generate import generate
    from pintpot.jobs.generator import GenerateSettings
    from pintpot.jobs.load import load
    from pintpot.jobs.merge import merge
    from pintpot.jobs.plan import plan
    from pintpot.jobs.pretrain import PretrainSettings, pretrain
    from pintpot.jobs.pretrain_recipe import pretrain_recipe
    from pintpot.jobs.sampling import Sampling
    from pintpot.jobs.simulate import simulate
    from pintpot.ledger.measure import measure
    from pintpot.planner.plan_file import read_plan, write_plan

_HOME = {
    "PintpotError": "core.errors",
    "Account": "core.ledger",
    "Ledger": "core.ledger",
    "Tier": "core.ledger",
    "Plan": "core.plan",
    "techniques": "core.registry",
    "ModelShape": "core.shape",
    "Budget": "core.workload",
    "Compress": "core.workload",
    "Finetune": "core.workload",
    "Generate": "core.workload",
    "Pretrain": "core.workload",
    "apply": "jobs.assemble",
    "calibrate_file": "jobs.calibrate",
    "Wish": "jobs.choose",
    "compress": "jobs.compress",
    "ConvertSettings": "jobs.convert",
    "convert": "jobs.convert",
    "FinetuneSettings": "jobs.finetune",
    "GenerateSettings": "jobs.generator",
    "PretrainSettings": "jobs.pretrain",
    "Sampling": "jobs.sampling",
    "finetune": "jobs.finetune",
    "generate": "jobs.generate",
    "load": "jobs.load",
    "merge": "jobs.merge",
    "plan": "jobs.plan",
    "pretrain": "jobs.pretrain",
    "pretrain_recipe": "jobs.pretrain_recipe",
    "simulate": "jobs.simulate",
    "measure": "ledger.measure",
    "read_plan": "planner.plan_file",
    "write_plan": "planner.plan_file",
}

__all__ = [
    "Account",
    "Budget",
    "Compress",
    "ConvertSettings",
    "Finetune",
    "FinetuneSettings",
    "Generate",
    "GenerateSettings",
    "Ledger",
    "ModelShape",
    "PintpotError",
    "Plan",
    "Pretrain",
    "PretrainSettings",
    "Sampling",
    "Tier",
    "Wish",
    "__version__",
    "apply",
    "cache",
    "calibrate_file",
    "compress",
    "convert",
    "finetune",
    "generate",
    "load",
    "measure",
    "merge",
    "plan",
    "pretrain",
    "pretrain_recipe",
    "read_plan",
    "simulate",
    "techniques",
    "write_plan",
]


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it (PEP 562)."""
    if name == "cache":  # the package itself, which can be called
        return importlib.import_module("pintpot.cache")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted(__all__)
