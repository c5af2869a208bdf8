"""Models that are compressed block by block: what each block is given, and how much is in memory."""

import json
from pathlib import Path

import pytest
import torch

from pintpot.core.errors import DataError, UnsupportedModel
from pintpot.core.model_folder import open_model
from pintpot.core.parameter_map import map_parameters
from pintpot.weights import compress_folder, load_compressed
from pintpot.weights.folder_blocks import FolderBlocks
from pintpot.weights.gptq import GPTQ
from pintpot.weights.paused import PausedPass
from pintpot.weights.replace import observe
from pintpot.weights.rtn import RTN
from pintpot.weights.targets import find_targets
from tests.architectures import tiny_model

METHOD = GPTQ(bits=4, group_size=32)


def texts(count: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 256, (2, 24), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "opt", "mamba", "t5"])
def test_layers_are_seen_with_the_inputs_of_an_ordinary_pass(architecture):
    model = tiny_model(architecture)
    targets, _ = find_targets(model)
    expected: dict[str, torch.Tensor] = {}
    handles = []
    for target in targets:

        def hook(module, args, name=target.parameter):
            rows = args[0].reshape(-1, args[0].shape[-1])
            expected[name] = expected.get(name, 0) + rows.T @ rows

        handles.append(model.get_submodule(target.module).register_forward_pre_hook(hook))
    with torch.no_grad():
        for text in texts():
            more = {"decoder_input_ids": text} if model.config.is_encoder_decoder else {}
            model(input_ids=text, **more)
    for handle in handles:
        handle.remove()
    names = []
    with torch.no_grad(), PausedPass(model, texts()) as paused:
        for name in paused:
            own = [t for t in targets if t.block == name]
            seen, _ = observe(model, name, own, paused)
            for target in own:
                statistics = seen[target.parameter][0]
                if statistics is None:
                    # Mamba multiplies by the weight of one layer itself.
                    assert target.module.endswith("dt_proj")
                    continue
                found = statistics.hessian * statistics.tokens
                torch.testing.assert_close(found, expected[target.parameter], rtol=1e-3, atol=1e-3)
            names.append(name)
            paused.advance()
    assert len(names) == len({t.block for t in targets})


def test_every_expert_is_seen_with_the_tokens_that_it_is_given():
    model = tiny_model("mixtral")
    targets, _ = find_targets(model)
    with torch.no_grad(), PausedPass(model, texts()) as paused:
        name = next(iter(paused))
        seen, _ = observe(model, name, [t for t in targets if t.block == name], paused)
    experts = seen[f"{name}.mlp.experts.gate_up_proj"]
    tokens = [0 if s is None else s.tokens for s in experts]
    assert len(tokens) == 4
    assert sum(tokens) == 2 * 2 * 24 * model.config.num_experts_per_tok
    down = seen[f"{name}.mlp.experts.down_proj"]
    assert [0 if s is None else s.tokens for s in down] == tokens


def test_later_blocks_see_what_the_compressed_ones_before_give():
    """With 2 bits in the first block, the second must be fitted to other inputs than the dense model's."""
    model = tiny_model("llama")
    targets, _ = find_targets(model)
    second = next(t for t in targets if t.block == "model.layers.1")
    found = []
    for compress in (False, True):
        model = tiny_model("llama")
        with torch.no_grad(), PausedPass(model, texts()) as paused:
            for name in paused:
                if name == "model.layers.1":
                    seen, _ = observe(model, name, [second], paused)
                    found.append(seen[second.parameter][0].hessian)
                elif compress:
                    for parameter in model.get_submodule(name).parameters():
                        parameter.mul_(0.5)
                paused.advance()
    assert (found[0] - found[1]).norm() > 0.05 * found[0].norm()


def test_one_block_at_a_time_is_in_memory(tmp_path: Path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    opened = open_model(tmp_path / "dense")
    blocks = FolderBlocks(opened, map_parameters(opened, opened.shape().build("meta")))

    def held() -> int:
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in blocks.model.parameters()}
        return sum(storages.values())

    outside = held()
    blocks.fill_("model.layers.0")
    block = sum(p.nbytes for p in blocks.model.get_submodule("model.layers.0").parameters())
    assert held() >= outside + block - 1024
    blocks.drop_("model.layers.0")
    assert held() <= outside + 1024
    assert block > 10 * 1024


def test_goes_on_at_the_block_where_it_was_stopped(tmp_path: Path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    compress_folder(tmp_path / "dense", tmp_path / "whole", METHOD, texts=texts(), shard_bytes=40_000)
    shards: list[int] = []

    def stop(done: int, total: int) -> None:
        shards.append(done)
        if done > total * 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_folder(tmp_path / "dense", tmp_path / "out", METHOD, texts=texts(), shard_bytes=40_000, progress=stop)
    partial = tmp_path / "out.partial"
    before = {f.name: f.stat().st_mtime_ns for f in partial.glob("*.safetensors")}
    assert before
    compress_folder(tmp_path / "dense", tmp_path / "out", METHOD, texts=texts(), shard_bytes=40_000)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    after = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("*.safetensors")}
    assert all(after[name] == stamp for name, stamp in before.items())


def test_formats_are_written_down_for_each_parameter(tmp_path: Path):
    """A folder whose parameters have formats of their own is loaded with these, whatever the method says now."""
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    targets, _ = find_targets(tiny_model("llama"))
    wide, narrow = RTN(bits=8, group_size=32), RTN(bits=3, group_size=32)
    layout = {
        t.parameter: (narrow if index % 2 else wide).terms(t.parameter, *t.shape, t.dtype)
        for index, t in enumerate(targets)
        if index
    }
    report = compress_folder(tmp_path / "dense", tmp_path / "out", narrow, layout=layout)
    assert targets[0].parameter in dict(report.left_dense)
    model = load_compressed(tmp_path / "out")
    assert type(model.get_submodule(targets[0].module)) is torch.nn.Linear
    assert model.get_submodule(targets[1].module).formats == layout[targets[1].parameter]
    assert model.get_submodule(targets[2].module).formats == layout[targets[2].parameter]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(config["formats"]) == 2


def test_folders_of_the_first_version_are_read(tmp_path: Path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    compress_folder(tmp_path / "dense", tmp_path / "out", RTN(bits=4, group_size=32))
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    settings = config["quantization_config"]
    del settings["formats"], settings["layout"]
    settings["format_version"] = 1
    ids = torch.arange(10)[None] + 3
    expected = load_compressed(tmp_path / "out")(ids).logits
    file.write_text(json.dumps(config))
    assert torch.equal(load_compressed(tmp_path / "out")(ids).logits, expected)


def test_a_failing_pass_is_reported_and_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    with pytest.raises(IndexError):
        METHOD.quantize_model_(model, [torch.full((1, 8), 999)])
    assert model(torch.arange(8)[None]).logits.shape == (1, 8, 256)
    assert not any("forward" in block.__dict__ for block in model.model.layers)


def test_blocks_that_the_texts_do_not_reach_are_named():
    model = tiny_model("t5")
    encode = model.get_encoder()
    model.forward = encode.forward
    with pytest.raises(UnsupportedModel, match=r"never calls decoder\.block\.0"):
        METHOD.quantize_model_(model, [{"input_ids": torch.arange(8)[None] + 3}])


def test_activations_that_overflow_are_named():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("inf"))
    with pytest.raises(DataError, match=r"layers\.0\.self_attn\.q_proj"):
        METHOD.quantize_model_(model, texts(1))
