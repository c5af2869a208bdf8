import json

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MixtralConfig, T5Config

from pintpot.core.errors import ModelFolderError, UnsupportedModel
from pintpot.core.shape import ModelShape, block_names

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
LLAMA = LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2)


def test_parameters_are_those_of_the_real_model():
    shape = ModelShape.from_config(LLAMA, torch.bfloat16)
    real = shape.build("cpu")
    assert {p.name: p.shape for p in shape.parameters} == {n: tuple(p.shape) for n, p in real.named_parameters()}
    assert shape.weight_bytes == sum(p.numel() * 2 for p in real.parameters())


def test_kinds_and_blocks():
    shape = ModelShape.from_config(LLAMA)
    assert len(list(shape.linears())) == 3 * 7
    kinds = {p.name: p.kind for p in shape.parameters}
    assert kinds["model.embed_tokens.weight"] == "embedding"
    assert kinds["model.layers.1.input_layernorm.weight"] == "norm"
    assert kinds["lm_head.weight"] == "linear"
    assert {p.block for p in shape.parameters if p.name.startswith("model.layers.2.")} == {"model.layers.2"}


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (LLAMA, 3),
        (GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64), 2),
        (T5Config(num_layers=2, d_model=32, d_kv=8, d_ff=64, num_heads=4, vocab_size=64), 4),
        (MixtralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2), 3),
    ],
    ids=lambda v: type(v).__name__,
)
def test_block_names(config, count):
    assert len(block_names(ModelShape.from_config(config).build())) == count


def test_fingerprint_is_of_the_architecture_only():
    same = ModelShape.from_config(LLAMA, torch.bfloat16, name="elsewhere")
    other = ModelShape.from_config(LlamaConfig(**{**SMALL, "hidden_size": 64}, num_attention_heads=4))
    assert same.fingerprint == ModelShape.from_config(LLAMA).fingerprint != other.fingerprint


def test_from_folder_errors(tmp_path):
    with pytest.raises(ModelFolderError, match="does not exist"):
        ModelShape.from_folder(tmp_path / "nowhere")
    with pytest.raises(ModelFolderError, match=r"no config\.json"):
        ModelShape.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelFolderError, match="not valid JSON"):
        ModelShape.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-thing"}))
    with pytest.raises(UnsupportedModel, match="does not know this architecture"):
        ModelShape.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UnsupportedModel, match="not a model that Pintpot can run"):
        ModelShape.from_folder(tmp_path).build()


def test_from_folder_reads_the_saved_dtype(tmp_path):
    ModelShape.from_config(LLAMA, torch.bfloat16).build("cpu").save_pretrained(tmp_path)
    shape = ModelShape.from_folder(tmp_path)
    assert shape.dtype == torch.bfloat16
    assert shape.fingerprint == ModelShape.from_config(LLAMA).fingerprint
