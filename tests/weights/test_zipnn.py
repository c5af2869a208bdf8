"""Lossless storage of folders: what is loaded is what was stored, through every way of loading."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pintpot import reference
from pintpot.core.errors import CompositionError, ModelFolderError, UnsupportedModel
from pintpot.core.ledger import Account, Tier
from pintpot.core.model_folder import open_model
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Compress
from pintpot.jobs.compress import compress
from pintpot.jobs.load import load
from pintpot.jobs.simulate import simulate
from pintpot.weights import load_and_compress, load_compressed
from pintpot.weights.rtn import RTN
from pintpot.weights.zipnn import ZipNN
from tests.architectures import TINY, tiny_model


def same(first, second) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("architecture", sorted(TINY))
def test_every_architecture_loads_bit_for_bit(architecture, tmp_path):
    model = tiny_model(architecture, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    auto = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    plain = auto.from_pretrained(tmp_path / "dense")
    ZipNN().store_folder(tmp_path / "dense", tmp_path / "coded", shard_bytes=60_000)
    loaded = auto.from_pretrained(tmp_path / "coded")
    assert same(loaded, plain)
    assert same(load_compressed(tmp_path / "coded"), plain)
    assert same(load(tmp_path / "coded"), plain)
    loaded.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert same(auto.from_pretrained(tmp_path / "again"), plain)


def test_a_trained_model_loses_a_third_and_no_bit(tmp_path):
    done = compress(reference.path(), tmp_path / "coded", techniques="zipnn")
    assert done.output_bytes < 0.68 * done.source_bytes
    opened, plain = open_model(tmp_path / "coded"), open_model(reference.path())
    assert opened.file_bytes == done.output_bytes
    assert opened.weight_bytes == plain.weight_bytes == done.source_bytes
    # One tensor alone, without the others.
    name = next(iter(plain.entries))
    assert torch.equal(opened.entries[name].read(), plain.entries[name].read())
    predicted = simulate(ModelShape.from_folder(reference.path()), Compress(), [ZipNN()])
    assert predicted.peak_of(Account.CHECKPOINT, Tier.DISK) == pytest.approx(done.output_bytes, rel=0.02)


def test_another_dtype_is_cast_to_while_loading(tmp_path):
    compress(reference.path(), tmp_path / "coded", techniques="zipnn")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "coded", dtype=torch.float32)
    assert wide.dtype is torch.float32
    assert same(wide, AutoModelForCausalLM.from_pretrained(reference.path(), dtype=torch.float32))


def test_packed_folders_are_stored_too_and_coded_ones_packed(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "dense")
    compress(tmp_path / "dense", tmp_path / "packed", techniques=[RTN(group_size=32)])
    compress(tmp_path / "packed", tmp_path / "both", techniques="zipnn")
    compress(tmp_path / "dense", tmp_path / "coded", techniques="zipnn")
    compress(tmp_path / "coded", tmp_path / "again", techniques=[RTN(group_size=32)])
    packed = load_compressed(tmp_path / "packed")
    assert same(load_compressed(tmp_path / "both"), packed)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "both"), packed)
    assert same(load_compressed(tmp_path / "again"), packed)
    assert open_model(tmp_path / "both").file_bytes < open_model(tmp_path / "packed").file_bytes


def test_refusals(tmp_path):
    compress(reference.path(), tmp_path / "coded", techniques="zipnn")
    with pytest.raises(UnsupportedModel, match="stored coded already"):
        compress(tmp_path / "coded", tmp_path / "twice", techniques="zipnn")
    with pytest.raises(UnsupportedModel, match="not decoded and compressed at once"):
        load_and_compress(tmp_path / "coded", RTN())
    with pytest.raises(CompositionError, match="in no given size"):
        compress(reference.path(), tmp_path / "sized", techniques="zipnn", size="2MiB")
    file = tmp_path / "coded" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[data.index(b"PPplane1") + 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ModelFolderError, match="is not a coded tensor"):
        open_model(tmp_path / "coded")
