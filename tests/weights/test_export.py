"""Exports: other programs' readers give the numbers that Pintpot stored."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pintpot import reference
from pintpot.cli.app import app
from pintpot.core.errors import CompositionError, OutputExists, UnsupportedModel
from pintpot.jobs.compress import compress
from pintpot.weights import load_compressed
from pintpot.weights.export import PackedFolder, export_folder
from pintpot.weights.export.compressed_tensors import into_words
from pintpot.weights.export.gguf import block_type, blocks
from pintpot.weights.formats import Dense, Grid, LowRank
from pintpot.weights.integrity import check_folder
from tests.architectures import tiny_model
from tests.folders import write_model

IDS = torch.arange(20).view(2, 10) + 3


def packed(root, architecture="llama", techniques="rtn(bits=4, group_size=32)", dtype=torch.float32):
    tiny_model(architecture, dtype=dtype).save_pretrained(root / "dense")
    compress(root / "dense", root / "packed", techniques=techniques)
    return root / "packed"


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_dense_again_gives_the_same_model(architecture, tmp_path):
    folder = packed(tmp_path, architecture)
    done = export_folder(folder, tmp_path / "out", "safetensors")
    plain, stored = AutoModelForCausalLM.from_pretrained(done.out), load_compressed(folder)
    assert "quantization_config" not in json.loads((done.out / "config.json").read_text())
    assert torch.allclose(logits(plain), logits(stored), atol=1e-5)
    assert check_folder(done.out).whole
    if architecture == "llama":
        name = "model.layers.1.mlp.down_proj"
        assert torch.equal(
            plain.get_submodule(name).weight, stored.get_submodule(name).weight.as_subclass(torch.Tensor)
        )


def test_a_coded_folder_is_decoded(tmp_path):
    write_model(tmp_path / "dense", dtype=torch.bfloat16)
    compress(tmp_path / "dense", tmp_path / "coded", techniques="zipnn")
    export_folder(tmp_path / "coded", tmp_path / "out", "safetensors")
    first, again = (AutoModelForCausalLM.from_pretrained(tmp_path / f).state_dict() for f in ("dense", "out"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("settings", ["bits=4, group_size=32", "bits=8, group_size=-1"])
def test_transformers_loads_compressed_tensors_with_the_same_logits(settings, tmp_path):
    pytest.importorskip("compressed_tensors")
    folder = packed(tmp_path, techniques=f"rtn({settings}, symmetric=True)")
    done = export_folder(folder, tmp_path / "out", "compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(done.out)
    assert torch.equal(logits(model), logits(load_compressed(folder)))


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_unpacks_asymmetric_grids_to_the_same_numbers(bits, tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file

    folder = packed(tmp_path, techniques=f"rtn(bits={bits}, group_size=32)")
    done = export_folder(folder, tmp_path / "out", "compressed-tensors")
    settings = json.loads((done.out / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    tensors = load_file(done.out / "model.safetensors")
    module = "model.layers.0.mlp.up_proj"
    own = {name.removeprefix(f"{module}."): t for name, t in tensors.items() if name.startswith(f"{module}.")}
    own["weight_scale"] = own["weight_scale"].float()
    found = PackedQuantizationCompressor.decompress(own, QuantizationScheme(**settings))["weight"]
    opened = PackedFolder.open(folder)
    assert torch.equal(found, opened.weight(opened.targets[f"{module}.weight"]))


@pytest.mark.parametrize(("bits", "columns"), [(4, 16), (4, 13), (8, 8), (8, 5)])
def test_words_hold_the_first_code_lowest(bits, columns):
    codes = torch.randint(0, 1 << bits, (3, columns), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    words = into_words(codes, bits)
    each = 32 // bits
    for row in range(3):
        for column in range(columns):
            word = int(words[row, column // each]) & 0xFFFFFFFF
            assert word >> (column % each * bits) & ((1 << bits) - 1) == codes[row, column]


GRIDS = [
    *(Grid(bits=b, group_size=g, symmetric=True) for b in (2, 3, 4, 6, 8) for g in (32, 64, -1)),
    *(Grid(bits=b, group_size=32) for b in (2, 4, 5, 6, 7)),
    Grid(bits=8, group_size=128, symmetric=True, scale_dtype="bfloat16"),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gguf_blocks_give_the_numbers_of_the_grid(grid):
    gguf = pytest.importorskip("gguf")
    weight = torch.randn(6, 160, generator=torch.Generator().manual_seed(1)).mul(0.05)
    weight[:, 32:64] += 0.2
    tensors = grid.encode(weight)
    kind, note = block_type((grid,), 160)
    assert note == ""
    made, exact = blocks(grid, tensors, 160)
    numbers = torch.from_numpy(gguf.quants.dequantize(made, gguf.GGMLQuantizationType[kind]))
    wanted = grid.decode(tensors, 160, torch.float32)
    if kind == "Q4_1":
        # The number of code 0 keeps 11 bits: an error of at most 2^-11 of the largest one.
        assert (numbers - wanted).abs().max() <= 2.0**-11 * wanted.abs().max()
    else:
        assert exact
        assert torch.equal(numbers, wanted)


@pytest.mark.parametrize(
    ("formats", "columns", "kind"),
    [
        ((Grid(bits=4, group_size=48),), 96, "F16"),
        ((Grid(bits=4, group_size=32),), 48, "F16"),
        ((Grid(bits=8, group_size=32),), 64, "Q8_0"),
        ((Grid(bits=4, group_size=32), LowRank(rank=2, factor=Dense(dtype=torch.float16))), 64, "F16"),
    ],
)
def test_gguf_says_what_it_rounds_again(formats, columns, kind):
    found, note = block_type(formats, columns)
    assert found == kind
    assert note


def turned(weight, heads):
    """Queries and keys as llama.cpp has them, from the two halves of each head."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(rows, columns)


def test_a_gguf_file_holds_the_model(tmp_path):
    gguf = pytest.importorskip("gguf")
    write_model(tmp_path / "dense", hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16)
    compress(tmp_path / "dense", tmp_path / "packed", techniques="rtn(bits=6, group_size=32)")
    result = CliRunner().invoke(
        app, ["export", str(tmp_path / "packed"), str(tmp_path / "m.gguf"), "--to", "gguf", "--json"]
    )
    assert result.exit_code == 0, result.output
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["llama.embedding_length"].contents() == 64
    found = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    opened = PackedFolder.open(tmp_path / "packed")
    names = {"mlp.down_proj": ("ffn_down", 0), "self_attn.v_proj": ("attn_v", 0), "self_attn.q_proj": ("attn_q", 4)}
    for name, (short, heads) in names.items():
        wanted = opened.weight(opened.targets[f"model.layers.1.{name}.weight"]).numpy()
        assert np.array_equal(found[f"blk.1.{short}.weight"], turned(wanted, heads) if heads else wanted)
    state = load_compressed(tmp_path / "packed").state_dict()
    assert np.array_equal(found["token_embd.weight"], state["model.embed_tokens.weight"].numpy())
    assert np.array_equal(found["output_norm.weight"], state["model.norm.weight"].numpy())
    notes = json.loads(result.stdout)["notes"]
    assert len(notes) == 1
    assert "give llama.cpp token ids" in notes[0]


def test_a_gguf_file_holds_the_vocabulary(tmp_path):
    gguf = pytest.importorskip("gguf")
    done = export_folder(reference.path(), tmp_path / "m.gguf", "gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    vocabulary = json.loads((reference.path() / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert all(tokens[index] == token for token, index in vocabulary.items() if index)
    assert fields["tokenizer.ggml.token_type"].contents()[0] == gguf.TokenType.CONTROL
    assert " ".join(["Ġ", "Ġ"]) == fields["tokenizer.ggml.merges"].contents()[0]
    assert done.nbytes == sum(int(t.n_bytes) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors)


def test_refusals_say_why(tmp_path):
    folder = packed(tmp_path, techniques="rtn(bits=3, group_size=32)")
    with pytest.raises(UnsupportedModel, match="it has 3 bits, not 4 or 8"):
        export_folder(folder, tmp_path / "out", "compressed-tensors")
    with pytest.raises(UnsupportedModel, match="no parameter is packed"):
        export_folder(tmp_path / "dense", tmp_path / "out", "compressed-tensors")
    with pytest.raises(CompositionError, match="no export to 'onnx'"):
        export_folder(folder, tmp_path / "out", "onnx")
    with pytest.raises(OutputExists):
        export_folder(folder, tmp_path / "dense", "safetensors")
    assert not (tmp_path / "out").exists()
    other = packed(tmp_path / "other", "gpt2")
    with pytest.raises(UnsupportedModel, match="not in a linear layer"):
        export_folder(other, tmp_path / "out", "compressed-tensors")
    pytest.importorskip("gguf")
    with pytest.raises(UnsupportedModel, match="the architecture is gpt2"):
        export_folder(other, tmp_path / "out.gguf", "gguf")
