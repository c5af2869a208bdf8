"""Pretraining by a recipe, a YAML file by which one command repeats the whole run.

A recipe names the text, the tokenizer's size, the model's shape, the optimizer and the stages of a length curriculum,
with tasks mixed into the text. The folder that comes out is a plain transformers folder with a model card, the
training curve and the recipe in it. It appears under its name only when complete; until then checkpoints stand beside
it, and the same command resumes from them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from pintpot.core.errors import DataError, ShapeError
from pintpot.core.expression import parse
from pintpot.core.files import new_folder, refuse_existing, require_disk
from pintpot.core.workload import Pretrain
from pintpot.jobs.assemble import Composition, Rates, dress, undress
from pintpot.jobs.batches import Batches, Curriculum, Mixture, PackedText, Rows
from pintpot.jobs.muon import MuonWithAdamW
from pintpot.jobs.recipe import STANDARD_LIBRARY, Recipe, TechniquesRecipe, adjusted, dump_recipe, read_recipe
from pintpot.jobs.text import seed_everything
from pintpot.jobs.text_training import trained_by, usual_learning_rate
from pintpot.jobs.training import TrainResult, TrainSettings, train, warmup_stable_decay
from pintpot.ledger.predict import Assembled
from pintpot.reference.evaluate import full_figures, quick_figures
from pintpot.reference.initialize import initialize_looking_back_
from pintpot.reference.material import Material, prepare
from pintpot.reference.report import Report, write_report
from pintpot.reference.tasks import CopyRows, RecallRows
from pintpot.reference.tokenizer import as_transformers

CHECKPOINTS = ".checkpoints"
"""Ending of the folder, beside the output, that holds the checkpoints while training."""

_KEPT_CHECKPOINTS = 2
_FEWEST_WORDS = 20
_STATE_BYTES_PER_PARAMETER = 12


def pretrain_recipe(
    recipe: Path, out: Path, *, seed: int | None = None, steps: int | None = None, progress: bool = True
) -> TrainResult:
    """Train a model by a recipe and write its folder; the same call resumes a run that was stopped.

    Args:
        recipe: a recipe file.
        out: the model folder to make; must not exist.
        seed: instead of the recipe's.
        steps: train only about so many steps, every stage shortened alike.
        progress: show progress.

    Raises:
        PlanError: when the recipe is wrong.
        CompositionError: when its techniques cannot be used together, or not for this.
        ShapeError: when the recipe's model cannot be built.
        DataError: when there is too little text.
        OutputExists: when `out` is there already.
        BudgetError: when the disk cannot hold the checkpoints.
        Interrupted: after Ctrl-C or SIGTERM, with a checkpoint written.
    """
    refuse_existing(out)
    plan = adjusted(read_recipe(recipe), seed, steps)
    composition = recipe_composition(plan)
    torch.set_num_threads(plan.threads)
    text_folder = None if plan.text == STANDARD_LIBRARY else recipe.parent / plan.text
    material = prepare(text_folder=text_folder, vocabulary_tokens=plan.vocabulary_tokens)
    seed_everything(plan.seed)
    model = build_model(plan, material.tokenizer)
    checkpoints = out.with_name(out.name + CHECKPOINTS)
    require_disk(checkpoints, (_KEPT_CHECKPOINTS + 1) * _STATE_BYTES_PER_PARAMETER * model.num_parameters())
    workload = recipe_workload(plan)
    total, longest = workload.steps, workload.tokens
    live = recipe_training(model, plan, composition, workload)
    result = train(
        live.model,
        recipe_batches(plan, material),
        trained_by(live),
        warmup_stable_decay(warmup=plan.schedule.warmup_steps, decay=plan.schedule.decay_steps, steps=total),
        TrainSettings(
            checkpoints=checkpoints,
            checkpoint_every=plan.checkpoint_every,
            keep_checkpoints=_KEPT_CHECKPOINTS,
            validate_every=plan.validate_every,
            run={"recipe": plan.model_dump(mode="json", by_alias=True), "text": material.hashes["training"]},
            progress=progress,
        ),
        validate=lambda module: quick_figures(module, material, longest=longest),
        around_step=live.scope,
    )
    undress(model, composition)
    with new_folder(out) as partial:
        save_model(model, material.tokenizer, partial)
        _report(partial, plan, material, result, longest)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return result


def build_model(recipe: Recipe, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """The model of a recipe, randomly initialised from the global generator, float32.

    Raises:
        ShapeError: when the recipe's model fields do not make a model.
    """
    shape: dict[str, Any] = dict(recipe.model)
    size = tokenizer.get_vocab_size()
    try:
        config = LlamaConfig(
            vocab_size=size, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0, **shape
        )
        model = LlamaForCausalLM(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(
            f"the recipe's model cannot be built: {error}", hint="give the fields of a transformers LlamaConfig"
        ) from error
    if recipe.looking_back:
        initialize_looking_back_(model, embedding_std=recipe.embedding_std, seed=recipe.seed)
    return model


def recipe_batches(recipe: Recipe, material: Material) -> Batches:
    """The curriculum of a recipe.

    Raises:
        DataError: when the text has too few words for the recall and copy rows that the recipe asks for.
    """
    stages: list[Batches] = []
    words = len(material.vocabulary.words)
    if words < _FEWEST_WORDS and any(stage.recall or stage.copy_rows for stage in recipe.stages):
        raise DataError(
            f"the text gives only {words} words that are one token, too few for recall and copying",
            hint="give more text or a larger vocabulary, or set recall and copy to 0 in every stage",
        )
    for number, stage in enumerate(recipe.stages):
        seed = recipe.seed * 1000 + number * 10
        tokens = stage.tokens
        text, filler = (
            PackedText(material.training_tokens, sequence_tokens=tokens, seed=seed + part) for part in (0, 1)
        )
        recall = RecallRows(filler, material.vocabulary, sequence_tokens=tokens, seed=seed + 2)
        copies = CopyRows(material.vocabulary, sequence_tokens=tokens, seed=seed + 3)
        parts: list[tuple[Rows, int]]
        parts = [(text, stage.text), (recall, stage.recall), (copies, stage.copy_rows)]
        stages.append(Mixture(parts, steps=stage.steps))
    return Curriculum(stages)


def recipe_workload(recipe: Recipe) -> Pretrain:
    """The sizes of a recipe's run: its longest rows, and the most of them in a batch."""
    return Pretrain(
        batch=max(1, *(stage.text + stage.recall + stage.copy_rows for stage in recipe.stages)),
        tokens=max(stage.tokens for stage in recipe.stages),
        steps=sum(stage.steps for stage in recipe.stages),
    )


def recipe_composition(recipe: Recipe) -> Composition:
    """The techniques of a recipe; none where it names Muon's learning rates.

    Raises:
        CompositionError: when they cannot be used together, or not for pretraining.
    """
    chosen = recipe.optimizer
    return Composition.of(parse(chosen.techniques) if isinstance(chosen, TechniquesRecipe) else (), Pretrain.job)


def recipe_training(model: LlamaForCausalLM, recipe: Recipe, composition: Composition, workload: Pretrain) -> Assembled:
    """The model with the optimizer and the techniques of a recipe."""
    chosen = recipe.optimizer
    if isinstance(chosen, TechniquesRecipe):
        usual = usual_learning_rate(parse(chosen.techniques), Pretrain.job)
        rates = Rates(chosen.learning_rate or usual, chosen.weight_decay)
        return dress(model, composition, workload, rates, seed=recipe.seed)
    optimizer = MuonWithAdamW(
        model,
        matrix_learning_rate=chosen.matrix_learning_rate,
        other_learning_rate=chosen.other_learning_rate,
        weight_decay=chosen.weight_decay,
    )
    return Assembled(model=model, optimizer=optimizer)


def save_model(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a plain transformers folder: weights in bfloat16, config, generation config and tokenizer."""
    model.bfloat16()
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=False)
    model.save_pretrained(folder)
    as_transformers(tokenizer, context_tokens=model.config.max_position_embeddings).save_pretrained(folder)


def _report(folder: Path, plan: Recipe, material: Material, result: TrainResult, longest: int) -> None:
    """Measure the model as it was saved and write card, curve and recipe into its folder."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    report = Report(
        name=plan.name,
        recipe=dump_recipe(plan),
        curve=result.curve,
        figures=full_figures(model, material, longest=longest),
        hashes=material.hashes,
        held_out=[document.name for document in material.held_out],
        parameters=model.num_parameters(),
        context_tokens=longest,
        looking_back=plan.looking_back,
    )
    write_report(folder, report)
