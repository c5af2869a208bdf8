"""Recipes: everything that decides a pretraining run, in a YAML file that is checked when read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveInt, Tag, ValidationError

from pintpot.core.errors import PlanError

STANDARD_LIBRARY = "standard-library"
"""The `text` of a recipe that trains on the running Python's standard library."""

_EXAMPLE = "compare it with the recipe of the reference model, src/pintpot/reference/recipe.yaml"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OptimizerRecipe(_Strict):
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""

    matrix_learning_rate: float = Field(gt=0)
    other_learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)


class TechniquesRecipe(_Strict):
    """Techniques of the training wings, as on the command line; AdamW where none of them is a rule.

    Without a learning rate, the rule's usual one for pretraining.
    """

    techniques: str
    learning_rate: float | None = Field(default=None, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)


def _kind_of_optimizer(value: Any) -> str:
    names = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return "techniques" if "techniques" in names else "muon"


class ScheduleRecipe(_Strict):
    """Linear warm-up, a stable part, linear decay to zero."""

    warmup_steps: PositiveInt
    decay_steps: PositiveInt


class Stage(_Strict):
    """Steps with rows of one length; `text`, `recall` and `copy` count the rows of each kind in a batch."""

    tokens: int = Field(ge=64)
    steps: PositiveInt
    text: int = Field(ge=0)
    recall: int = Field(default=0, ge=0)
    copy_rows: int = Field(default=0, ge=0, alias="copy")


class Recipe(_Strict):
    """Everything that decides a pretraining run.

    With `looking_back` the run begins from weights that can already copy what followed an earlier occurrence, with
    embeddings of standard deviation `embedding_std`; else from the usual random ones.
    """

    name: str
    seed: int
    threads: PositiveInt
    text: str
    vocabulary_tokens: int = Field(ge=300)
    model: dict[str, int | float]
    looking_back: bool = False
    embedding_std: float = Field(default=0.05, gt=0)
    optimizer: Annotated[
        Annotated[OptimizerRecipe, Tag("muon")] | Annotated[TechniquesRecipe, Tag("techniques")],
        Discriminator(_kind_of_optimizer),
    ]
    schedule: ScheduleRecipe
    stages: list[Stage] = Field(min_length=1)
    validate_every: int = Field(ge=0)
    checkpoint_every: PositiveInt


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        PlanError: when it cannot be read or says something else than a recipe may.
    """
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise PlanError(f"cannot read the recipe {path}: {error.strerror}", hint=_EXAMPLE) from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlanError(f"{path} is not YAML: {error}", hint=_EXAMPLE) from None
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise PlanError(f"{path}: {wrong}", hint=_EXAMPLE) from None


def adjusted(recipe: Recipe, seed: int | None, steps: int | None) -> Recipe:
    """The recipe with another seed, or shortened.

    Args:
        recipe: the recipe.
        seed: instead of its own, when given.
        steps: about so many in all, every stage and the schedule shortened alike, when given.
    """
    if seed is not None:
        recipe = recipe.model_copy(update={"seed": seed})
    if steps is None:
        return recipe
    share = steps / sum(stage.steps for stage in recipe.stages)
    stages = [stage.model_copy(update={"steps": max(1, round(stage.steps * share))}) for stage in recipe.stages]
    schedule = ScheduleRecipe(
        warmup_steps=max(1, round(recipe.schedule.warmup_steps * share)),
        decay_steps=max(1, round(recipe.schedule.decay_steps * share)),
    )
    return recipe.model_copy(update={"stages": stages, "schedule": schedule})


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `read_recipe` reads."""
    return yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True), sort_keys=False)
