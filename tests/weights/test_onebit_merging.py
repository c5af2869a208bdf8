"""1bit-Merging: one folder that is nearly each of the models it was made of, at one bit a weight for each."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from pintpot.core.errors import CompositionError, ModelFolderError, OutputExists, ShapeError, UnsupportedModel
from pintpot.core.shape import ModelShape
from pintpot.kernels import packed_size
from pintpot.weights import CompressedLinear, compress_folder, load_compressed, route_, tasks_of
from pintpot.weights.export import export_folder
from pintpot.weights.formats import Dense, Routed, Signs
from pintpot.weights.integrity import check_folder
from pintpot.weights.merging import Tuned, average, merge_folders, plan_merge
from pintpot.weights.onebit_merging import OneBitMerging
from pintpot.weights.targets import find_targets
from tests.architectures import tiny_config
from tests.folders import same_weights, weights, write_model
from tests.tuned import TEXTS, tokens, write_tuned

TASKS = tuple(TEXTS)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> dict[str, Path]:
    return write_tuned(tmp_path_factory.mktemp("tuned"))


def models(tuned: dict[str, Path], **modules: str) -> list[Tuned]:
    return [Tuned(task, tuned[task], modules.get(task, "")) for task in TASKS]


@pytest.fixture(scope="module")
def merged(tuned, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "out"
    merge_folders(tuned["base"], models(tuned), out, OneBitMerging())
    return out


def logits(model, task: str) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(task)).logits.double()


def averaged(tuned: dict[str, Path]) -> torch.nn.Module:
    """The models' plain average."""
    model = AutoModelForCausalLM.from_pretrained(tuned["base"])
    parts = [weights(tuned[task]) for task in TASKS]
    model.load_state_dict({name: sum(part[name] for part in parts) / len(parts) for name in parts[0]})
    return model


def test_each_task_comes_nearer_to_its_model_than_the_base_and_the_average_do(tuned, merged):
    routed, mean = AutoModelForCausalLM.from_pretrained(merged), averaged(tuned)
    base = AutoModelForCausalLM.from_pretrained(tuned["base"])
    assert set(tasks_of(routed)) == set(TASKS)
    for task in TASKS:
        target = logits(AutoModelForCausalLM.from_pretrained(tuned[task]), task)
        route_(routed, task)
        lost = (logits(routed, task) - target).norm()
        assert lost < 0.6 * (logits(mean, task) - target).norm()
        assert lost < 0.6 * (logits(base, task) - target).norm()


def test_a_weight_is_the_bases_and_the_signs_of_the_difference_times_its_mean_magnitude(tuned, merged):
    model = load_compressed(merged)
    layer = model.model.layers[0].mlp.up_proj
    name = "model.layers.0.mlp.up_proj.weight"
    base = weights(tuned["base"])[name]
    assert torch.equal(layer.weight, base)
    for task in TASKS:
        route_(model, task)
        vector = (weights(tuned[task])[name] - base).double()
        expected = base.double() + torch.where(vector >= 0, 1.0, -1.0) * vector.abs().mean()
        torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-5, atol=1e-6)
    route_(model, {TASKS[0]: 0.5, TASKS[1]: 0.25})
    scales = [getattr(layer, f"term1_task{i}_scale").double() for i in range(2)]
    change = (layer.weight - base).double()
    expected = sorted({abs(a * 0.5 * scales[0] + b * 0.25 * scales[1]).item() for a in (-1, 1) for b in (-1, 1)})
    assert all(min(abs(found - e) for e in expected) < 1e-6 for found in change.abs().unique().tolist())
    route_(model, None)
    assert torch.equal(layer.weight, base)


def test_bytes_are_those_of_the_base_and_one_bit_a_weight_for_each_task(tuned, merged):
    plan = plan_merge(tuned["base"], models(tuned), OneBitMerging())
    stored, base = weights(merged), weights(tuned["base"])
    assert sum(tensor.nbytes for tensor in stored.values()) == plan.output_bytes
    matrices = [tensor for name, tensor in base.items() if "_proj" in name]
    own = sum(len(TASKS) * (tensor.shape[0] * packed_size(tensor.shape[1], 1) + 4) for tensor in matrices)
    assert plan.output_bytes == sum(tensor.nbytes for tensor in base.values()) + own
    assert plan.source_bytes == 4 * sum(tensor.nbytes for tensor in base.values())
    model = load_compressed(merged)
    assert sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) - plan.output_bytes == sum(
        b.nbytes for n, b in model.named_buffers() if "term" not in n
    )


def test_what_has_no_vectors_of_a_task_is_the_average(tuned, tmp_path: Path):
    chosen = models(tuned, letters="attention", numbers="mlp", words="mlp")
    merge_folders(tuned["base"], chosen, tmp_path / "out", OneBitMerging())
    model = load_compressed(tmp_path / "out")
    parts = {task: weights(tuned[task]) for task in TASKS}
    for module, tasks in (("self_attn.q_proj", ("letters",)), ("mlp.up_proj", ("numbers", "words"))):
        name = f"model.layers.1.{module}"
        layer = model.get_submodule(name)
        dense = torch.stack([part[f"{name}.weight"] for part in parts.values()]).double().mean(0).float()
        assert layer.formats == (Dense(), Routed(inner=Signs(), tasks=tasks))
        assert torch.equal(layer.term0_dense, dense)
        for index, task in enumerate(tasks):
            separates = parts[task][f"{name}.weight"] - dense
            assert torch.equal(getattr(layer, f"term1_task{index}_signs"), Signs().encode(separates)["signs"])
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        mean = torch.stack([part[name] for part in parts.values()]).double().mean(0).float()
        assert torch.equal(model.get_parameter(name), mean)
    route_(model, "letters")
    assert model.model.layers[0].mlp.up_proj.formats[1].weights == (0.0, 0.0)


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "llama", "mixtral", "opt", "phi", "t5"])
def test_attention_and_mlp_are_told_apart(name):
    two = [Tuned("talk", Path(), "attention"), Tuned("sums", Path(), "mlp")]
    targets, _ = find_targets(ModelShape.from_config(tiny_config(name)).build("meta"))
    found = {t.parameter: OneBitMerging().formats_for(t, two)[1].tasks for t in targets}
    assert set(found.values()) == {("talk",), ("sums",)}
    for parameter, tasks in found.items():
        assert tasks == (("talk",) if re.search("attn|attention", parameter, re.IGNORECASE) else ("sums",))


def test_equal_numbers_have_themselves_as_their_average():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        numbers = torch.randn(1000, generator=generator).to(dtype)
        for count in (2, 3, 7):
            assert torch.equal(average([numbers] * count, numbers), numbers)
    ids = torch.arange(3)
    assert average([ids + 1], ids) is ids


def test_is_loaded_saved_checked_and_made_dense(tuned, merged, tmp_path: Path):
    found = check_folder(merged)
    assert found.whole
    assert found.compared == found.tensors > 0
    model = AutoModelForCausalLM.from_pretrained(merged)
    shared = logits(model, "words")
    route_(model, "words")
    routed = logits(model, "words")
    assert not torch.equal(shared, routed)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert same_weights(merged, tmp_path / "saved")
    assert torch.equal(logits(again, "words"), shared)
    model.dequantize()
    torch.testing.assert_close(logits(model, "words"), routed, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, CompressedLinear) for module in model.modules())
    assert "route_(model, task)" in (merged / "README.md").read_text()


def test_an_adapter_learns_on_a_task_and_is_merged_into_it(merged):
    model = load_compressed(merged)
    route_(model, "words")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model(input_ids=tokens("words"), labels=tokens("words")).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    adapted = logits(model, "words")
    torch.testing.assert_close(logits(model.merge_and_unload(), "words"), adapted, rtol=1e-4, atol=1e-4)


def test_is_exported_as_what_the_tasks_share(tuned, merged, tmp_path: Path):
    export_folder(merged, tmp_path / "out", "safetensors")
    assert same_weights(tmp_path / "out", tuned["base"])


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_matrices_of_other_models_and_stacks_of_them(name, tmp_path: Path):
    base, other, again = (write_model(tmp_path / str(i), name, seed=seed) for i, seed in enumerate((0, 1, 0)))
    merge_folders(base, [Tuned("other", other), Tuned("again", again)], tmp_path / "out", OneBitMerging())
    model, dense = load_compressed(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(base)
    # All but the matrices differs from the base, because it is averaged; what is left of the other model is compared.
    route_(model, "again")
    packed = [m for m in model.modules() if hasattr(m, "formats")]
    assert all(layout.tasks == ("other", "again") for m in packed for layout in m.formats[1:])
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if "term" not in k}, strict=False)
    torch.testing.assert_close(logits(model, "words"), logits(dense, "words"), rtol=1e-4, atol=1e-4)
    route_(model, "other")
    assert not torch.allclose(logits(model, "words"), logits(dense, "words"), atol=0.01)


def test_an_interrupted_merge_goes_on_where_it_stopped(tuned, tmp_path: Path):
    out, small = tmp_path / "out", 40_000
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_folders(tuned["base"], models(tuned), out, OneBitMerging(), shard_bytes=small, progress=stop)
    finished = json.loads((tmp_path / "out.partial" / "compress.json").read_text())["shards"]
    assert finished
    with pytest.raises(OutputExists, match="another model, or with other settings"):
        merge_folders(tuned["base"], models(tuned)[:2], out, OneBitMerging(), shard_bytes=small)
    stamps = {name: (tmp_path / "out.partial" / name).stat().st_mtime_ns for name in finished}
    merge_folders(tuned["base"], models(tuned), out, OneBitMerging(), shard_bytes=small)
    merge_folders(tuned["base"], models(tuned), tmp_path / "straight", OneBitMerging(), shard_bytes=small)
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    files = {file.name: file.read_bytes() for file in (tmp_path / "straight").iterdir()}
    assert files == {file.name: file.read_bytes() for file in out.iterdir()}


def test_models_of_another_kind_or_size_are_refused_and_the_entry_is_named(tuned, tmp_path: Path):
    base = tuned["base"]
    cases = {
        "model_type is 'gpt2', not 'llama'": write_model(tmp_path / "gpt2", "gpt2"),
        "intermediate_size is 96, not 128": write_model(tmp_path / "wide", intermediate_size=96),
        "vocab_size is 300, not 257": write_model(tmp_path / "long", vocab_size=300),
    }
    for says, folder in cases.items():
        with pytest.raises(UnsupportedModel, match=says):
            merge_folders(base, [Tuned("a", tuned["words"]), Tuned("b", folder)], tmp_path / "out", OneBitMerging())
    assert not (tmp_path / "out").exists()


def test_a_damaged_model_is_named_and_nothing_is_left(tuned, tmp_path: Path):
    damaged = AutoModelForCausalLM.from_pretrained(tuned["words"])
    damaged.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    damaged.save_pretrained(tmp_path / "damaged")
    with pytest.raises(ModelFolderError, match=r"damaged: the tensor model.layers.1.mlp.up_proj.weight holds NaN"):
        merge_folders(tuned["base"], [Tuned("a", tmp_path / "damaged")], tmp_path / "out", OneBitMerging())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["damaged"]


def test_what_cannot_be_merged_or_routed_says_so(tuned, merged, tmp_path: Path):
    base, words = tuned["base"], tuned["words"]
    for chosen, says in (
        ([], "nothing to merge"),
        ([Tuned("a", words), Tuned("a", words)], "one name"),
        ([Tuned("a.b", words)], "'a.b' cannot be the name"),
        ([Tuned("a", words, "heads")], "not in 'heads'"),
    ):
        with pytest.raises(CompositionError, match=says):
            plan_merge(base, chosen, OneBitMerging())
    mamba = write_model(tmp_path / "mamba", "mamba")
    with pytest.raises(CompositionError, match="nothing of a would be kept"):
        plan_merge(mamba, [Tuned("a", mamba, "attention"), Tuned("b", mamba)], OneBitMerging())
    with pytest.raises(UnsupportedModel, match="compressed already"):
        plan_merge(merged, [Tuned("a", words)], OneBitMerging())
    with pytest.raises(CompositionError, match="pintpot merge"):
        compress_folder(base, tmp_path / "out", OneBitMerging())
    with pytest.raises(CompositionError, match="'heads'"):
        OneBitMerging(modules="heads")
    with pytest.raises(ModelFolderError):
        plan_merge(base, [Tuned("a", tmp_path / "nothing")], OneBitMerging())
    with pytest.raises(CompositionError, match="no task called sums"):
        route_(load_compressed(merged), "sums")
    with pytest.raises(CompositionError, match="no tasks to choose from"):
        route_(AutoModelForCausalLM.from_pretrained(base), "words")
    for wrong in ({"tasks": ()}, {"tasks": ("a", "a")}, {"tasks": ("a", "b"), "weights": (1.0,)}):
        with pytest.raises(ShapeError, match="do not belong"):
            Routed(**wrong)
