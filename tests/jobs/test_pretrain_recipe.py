from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from pintpot.core.errors import CompositionError, DataError, OutputExists, PlanError, ShapeError
from pintpot.jobs.pretrain_recipe import CHECKPOINTS, build_model, pretrain_recipe, recipe_batches
from pintpot.jobs.recipe import adjusted, dump_recipe, read_recipe
from pintpot.reference import recipe_path
from pintpot.reference.evaluate import exact_matches
from pintpot.reference.material import Material, prepare
from pintpot.reference.tasks import NO_LOSS, Prompt, make_copy_prompt

RECIPE = {
    "name": "tiny",
    "seed": 1,
    "threads": 1,
    "text": "texts",
    "vocabulary_tokens": 600,
    "model": {
        "hidden_size": 112,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "rope_theta": 500000.0,
    },
    "looking_back": True,
    "embedding_std": 1.0,
    "optimizer": {"matrix_learning_rate": 0.005, "other_learning_rate": 0.02, "weight_decay": 0.1},
    "schedule": {"warmup_steps": 2, "decay_steps": 3},
    "stages": [
        {"tokens": 64, "steps": 4, "text": 1, "recall": 1, "copy": 1},
        {"tokens": 128, "steps": 2, "text": 1, "recall": 1},
    ],
    "validate_every": 3,
    "checkpoint_every": 2,
}


def write_recipe(folder: Path, **changes: object) -> Path:
    """A recipe and its texts: words of six letters, so that many words are one token."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefghijklmnop"), 6)) for _ in range(60)]
    (folder / "texts").mkdir(exist_ok=True)
    for number in range(3):
        lines = [" " + " ".join(random.choice(words, 6)) for _ in range(150)]
        (folder / "texts" / f"{number}.txt").write_text("\n".join(lines))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}, sort_keys=False))
    return path


def material_of(recipe: Path) -> Material:
    return prepare(text_folder=recipe.parent / "texts", vocabulary_tokens=600)


def test_a_recipe_gives_a_plain_folder_the_same_each_time(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    result = pretrain_recipe(recipe, tmp_path / "one", progress=False)
    pretrain_recipe(recipe, tmp_path / "two", progress=False)
    files = {file.name for file in (tmp_path / "one").iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "README.md", "curve.csv", "curve.png"}
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in files)
    for name in sorted(files - {"README.md", "curve.csv", "curve.png"}):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert not (tmp_path / f"one{CHECKPOINTS}").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert model.dtype == torch.bfloat16
    ids = AutoTokenizer.from_pretrained(tmp_path / "one")("abc def", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= ids.shape[1] + 3
    assert result.steps == 6
    card = (tmp_path / "one" / "README.md").read_text()
    assert "recall at" not in card or "%" in card
    assert "2.txt" in card
    rows = (tmp_path / "one" / "curve.csv").read_text().splitlines()
    assert len(rows) == 7
    assert "bits_per_byte" in rows[0]
    assert read_recipe(tmp_path / "one" / "recipe.yaml") == read_recipe(recipe)


def test_an_existing_output_is_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(OutputExists):
        pretrain_recipe(tmp_path / "absent.yaml", tmp_path / "out")


def test_wrong_recipes_name_the_field(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read"):
        read_recipe(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(PlanError, match="not YAML"):
        read_recipe(tmp_path / "bad.yaml")
    with pytest.raises(PlanError, match="colour"):
        read_recipe(write_recipe(tmp_path, colour="red"))
    with pytest.raises(PlanError, match=r"stages\.0\.tokens"):
        read_recipe(write_recipe(tmp_path, stages=[{"tokens": 8, "steps": 1, "text": 1}]))


def test_models_and_texts_that_do_not_serve_are_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model={**RECIPE["model"], "hidden_size": 64})
    with pytest.raises(ShapeError, match="too small to begin with"):
        build_model(read_recipe(recipe), material_of(recipe).tokenizer)
    for file in (tmp_path / "texts").iterdir():
        file.write_text("ab ba\n" * 200)
    with pytest.raises(DataError, match="too few for recall"):
        recipe_batches(read_recipe(recipe), material_of(recipe))


def test_shortening_keeps_every_stage(tmp_path: Path) -> None:
    recipe = read_recipe(recipe_path())
    short = adjusted(recipe, 11, 30)
    assert short.seed == 11
    assert len(short.stages) == len(recipe.stages)
    assert abs(sum(stage.steps for stage in short.stages) - 30) <= len(short.stages)
    assert adjusted(recipe, None, None) == recipe
    (tmp_path / "again.yaml").write_text(dump_recipe(short))
    assert read_recipe(tmp_path / "again.yaml") == short


def test_batches_mix_text_recall_and_copies_by_stage(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    batches = recipe_batches(read_recipe(recipe), material_of(recipe))
    assert len(batches) == 6
    assert batches[0].input_ids.shape == (3, 64)
    assert batches[5].input_ids.shape == (2, 128)
    assert (batches[0].labels[0] != NO_LOSS).all()
    assert (batches[0].labels[1] == NO_LOSS).any()
    assert (batches[0].labels[2] == NO_LOSS).any()
    again = recipe_batches(read_recipe(recipe), material_of(recipe))
    assert torch.equal(again[4].input_ids, batches[4].input_ids)


def test_looking_back_copies_before_any_training(tmp_path: Path) -> None:
    material = material_of(write_recipe(tmp_path))
    full = read_recipe(recipe_path())
    shape = {**full.model, "num_hidden_layers": 2, "intermediate_size": 32}
    prompts = [make_copy_prompt(material.vocabulary, tokens=20, seed=seed) for seed in range(60)]
    first_words = [Prompt(prompt.input_ids, prompt.answer[:1]) for prompt in prompts]
    found = {}
    for looking_back in (False, True):
        torch.manual_seed(0)
        recipe = full.model_copy(update={"model": shape, "looking_back": looking_back})
        found[looking_back] = sum(exact_matches(build_model(recipe, material.tokenizer).eval(), first_words))
    assert found[False] <= 3
    assert found[True] >= 15


def test_a_recipe_may_name_techniques(tmp_path: Path) -> None:
    optimizer = {"techniques": "galore(rank=8)*adamw-8bit*sublinear-checkpointing"}
    recipe = write_recipe(tmp_path, optimizer=optimizer, looking_back=False)
    result = pretrain_recipe(recipe, tmp_path / "out", progress=False)
    assert max(row["learning_rate"] for row in result.curve) == pytest.approx(1e-2)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert read_recipe(tmp_path / "out" / "recipe.yaml") == read_recipe(recipe)
    chosen = {**optimizer, "learning_rate": 0.003}
    slower = pretrain_recipe(write_recipe(tmp_path, optimizer=chosen), tmp_path / "slower", progress=False)
    assert max(row["learning_rate"] for row in slower.curve) == pytest.approx(0.003)


def test_techniques_that_a_recipe_cannot_use_are_refused_first(tmp_path: Path) -> None:
    for techniques in ("lora", "galore*apollo", "mezo", "nothing"):
        recipe = write_recipe(tmp_path, optimizer={"techniques": techniques})
        with pytest.raises(CompositionError):
            pretrain_recipe(recipe, tmp_path / "out", progress=False)
    with pytest.raises(PlanError, match=r"optimizer\.techniques\.matrix_learning_rate"):
        read_recipe(write_recipe(tmp_path, optimizer={"techniques": "galore", "matrix_learning_rate": 0.1}))
    with pytest.raises(PlanError, match=r"optimizer\.muon\.colour"):
        read_recipe(write_recipe(tmp_path, optimizer={**RECIPE["optimizer"], "colour": 1}))
    assert not (tmp_path / "out").exists()
