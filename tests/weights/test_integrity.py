"""``pintpot check``: a flipped bit is found, and the tensor that it is in is named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pintpot.cli.app import app
from pintpot.core.model_folder import open_model
from pintpot.jobs.compress import compress
from pintpot.weights.integrity import check_folder
from tests.architectures import tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    tiny_model("llama").save_pretrained(root / "dense", max_shard_size="100KB")
    compress(root / "dense", root / "packed", techniques="rtn4")
    compress(root / "packed", root / "coded", techniques="zipnn")
    return root


def run(folder):
    result = CliRunner().invoke(app, ["check", str(folder), "--json"])
    return result.exit_code, json.loads(result.stdout) if result.exit_code < 2 else result.output


@pytest.mark.parametrize("name", ["dense", "packed", "coded"])
def test_whole_folders(name, folders):
    code, record = run(folders / name)
    assert (code, record["whole"], record["faults"]) == (0, True, {})
    assert record["compared_with_checksums"] == (0 if name == "dense" else record["tensors"])
    assert record["bytes"] == open_model(folders / name).file_bytes


@pytest.mark.parametrize("name", ["packed", "coded"])
def test_a_flipped_bit_anywhere_names_its_tensor(name, folders, tmp_path):
    entries = list(open_model(folders / name).entries.values())
    for entry in entries[:: len(entries) // 3]:
        for place in (0, entry.file_bytes - 1):
            shutil.copytree(folders / name, tmp_path / "copy")
            with (tmp_path / "copy" / entry.file.name).open("r+b") as file:
                file.seek(entry.offset + place)
                byte = file.read(1)[0]
                file.seek(-1, 1)
                file.write(bytes([byte ^ 4]))
            code, record = run(tmp_path / "copy")
            assert code == 1
            assert list(record["faults"]) == [entry.name]
            shutil.rmtree(tmp_path / "copy")


def test_dense_folders_are_searched_for_what_is_not_finite(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = check_folder(tmp_path)
    assert list(found.faults) == ["model.layers.1.mlp.up_proj.weight"]
    assert "NaN" in found.faults["model.layers.1.mlp.up_proj.weight"]


def test_packed_tensors_that_are_missing_are_named_without_checksums_too(folders, tmp_path):
    shutil.copytree(folders / "packed", tmp_path / "copy")
    (tmp_path / "copy" / "checksums.json").unlink()
    file = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.term0_packed"
    del tensors[name]
    other = "model.layers.0.mlp.down_proj.term0_scale"
    tensors[other] = tensors[other].to(torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
    assert set(check_folder(tmp_path / "copy").faults) == {name, other}


def test_what_cannot_be_opened_is_an_error(folders, tmp_path):
    shutil.copytree(folders / "packed", tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    code, output = run(tmp_path / "copy")
    assert code == 2
    assert "corrupt" in output
    (tmp_path / "copy" / "checksums.json").write_text("[]")
    assert run(tmp_path / "copy")[0] == 2
