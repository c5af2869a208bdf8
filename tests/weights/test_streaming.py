"""Compressing folders: bounded memory, resumable after a kill, nothing half-written."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from pintpot.core.errors import BudgetError, CompositionError, ModelFolderError, OutputExists, UnsupportedModel
from pintpot.core.shape import ModelShape
from pintpot.jobs.compress import compress
from pintpot.weights import PintpotConfig, compress_folder, load_and_compress, load_compressed
from pintpot.weights.rtn import RTN
from tests.architectures import tiny_model

METHOD = RTN(bits=4, group_size=32)
SMALL_SHARD = 40_000


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    (tmp_path / "dense" / "README.md").write_text("# A model\n")
    (tmp_path / "dense" / "modeling.py").write_text("raise SystemExit")
    return tmp_path / "dense"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_folder_holds_everything_and_no_code(dense: Path, tmp_path: Path):
    seen = []
    compress_folder(dense, tmp_path / "out", METHOD, shard_bytes=SMALL_SHARD, progress=lambda *a: seen.append(a))
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json", "README.md"} <= names
    assert "modeling.py" not in names
    assert len([n for n in names if n.endswith(".safetensors")]) > 2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "pintpot"
    assert config["quantization_config"]["format_version"] == 2
    assert config["dtype"] == "float32"
    assert "pintpot" in (tmp_path / "out" / "README.md").read_text()
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert not (tmp_path / "out.partial").exists()


def test_shards_of_any_size_hold_the_same_model(dense: Path, tmp_path: Path):
    for out, size in (("one", 1 << 30), ("many", SMALL_SHARD)):
        compress_folder(dense, tmp_path / out, METHOD, shard_bytes=size)
    one, many = (load_compressed(tmp_path / out).state_dict() for out in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[k], many[k]) for k in one)


def test_transformers_loads_it_in_another_dtype(dense: Path, tmp_path: Path):
    compress_folder(dense, tmp_path / "out", METHOD)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert model.model.norm.weight.dtype is torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.term0_scale.dtype is torch.float16
    assert model(input_ids=torch.arange(5)[None]).logits.dtype is torch.bfloat16
    quick = AutoModelForCausalLM.from_pretrained(dense, quantization_config=PintpotConfig("rtn", {"bits": 4}))
    assert quick.config.quantization_config.parameters["bits"] == 4
    assert hasattr(quick.model.layers[0].mlp.up_proj, "term0_packed")


KILLED = """
import os, signal, sys
from pintpot.weights import streaming
from pintpot.weights.rtn import RTN
left = int(sys.argv[3])
inner = streaming.CompressionPlan.encoded
def encoded(plan, origin):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return inner(plan, origin)
streaming.CompressionPlan.encoded = encoded
streaming.compress_folder(sys.argv[1], sys.argv[2], RTN(bits=4, group_size=32), shard_bytes=40_000)
"""


def test_killed_and_resumed_equals_uninterrupted(dense: Path, tmp_path: Path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    done = subprocess.run([sys.executable, "-c", KILLED, dense, out, "13"], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    finished = sorted(json.loads((partial / "compress.json").read_text())["shards"])
    assert finished
    stamps = {name: (partial / name).stat().st_mtime_ns for name in finished}

    with pytest.raises(OutputExists, match="another model, or with other settings"):
        compress_folder(dense, out, RTN(bits=3, group_size=32), shard_bytes=SMALL_SHARD)
    # A finished shard that was damaged meanwhile is made again; the others are kept as they are.
    damaged = partial / finished[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\\0")
    compress_folder(dense, out, METHOD, shard_bytes=SMALL_SHARD)
    compress_folder(dense, tmp_path / "straight", METHOD, shard_bytes=SMALL_SHARD)
    assert contents(out) == contents(tmp_path / "straight")
    assert all((out / name).stat().st_mtime_ns == stamps[name] for name in finished[1:])


def test_existing_output_and_stray_partial_are_refused(dense: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(OutputExists):
        compress_folder(dense, out, METHOD)
    assert contents(out) == {"mine.txt": b"keep"}
    shutil.rmtree(out)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("keep")
    with pytest.raises(OutputExists, match="not an unfinished compression"):
        compress_folder(dense, out, METHOD)
    assert contents(tmp_path / "out.partial") == {"mine.txt": b"keep"}


def test_too_little_disk_is_found_before_starting(dense: Path, tmp_path: Path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(BudgetError, match="would be written"):
        compress(dense, tmp_path / "out", techniques="rtn4")
    assert not list(tmp_path.glob("out*"))


def test_nan_is_named_when_compressing_and_when_loading(tmp_path: Path):
    model = tiny_model("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[2, 3, 4] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    with pytest.raises(ModelFolderError, match=r"layers\.1\..*experts\.2\.w2.* NaN or Inf"):
        compress_folder(tmp_path / "bad", tmp_path / "out", METHOD)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelFolderError, match=r"experts.* NaN or Inf"):
        load_and_compress(tmp_path / "bad", METHOD)


def test_half_a_compressed_model_is_refused(dense: Path, tmp_path: Path):
    compress_folder(dense, tmp_path / "out", METHOD)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    gone = tensors.pop("model.layers.0.mlp.up_proj.term0_scale")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelFolderError, match=r"missing keys: model\.layers\.0\.mlp\.up_proj\.term0_scale"):
        load_compressed(tmp_path / "out")
    save_file({**tensors, "model.layers.0.mlp.up_proj.term0_scale": gone, "odd": gone.clone()}, file, {"format": "pt"})
    with pytest.raises(ModelFolderError, match="unexpected keys: odd"):
        load_compressed(tmp_path / "out")
    save_file({**tensors, "model.layers.0.mlp.up_proj.term0_scale": gone[:3].clone()}, file, {"format": "pt"})
    with pytest.raises(ModelFolderError):
        load_compressed(tmp_path / "out")


def test_folders_that_are_not_ours_and_newer_ones(dense: Path, tmp_path: Path):
    with pytest.raises(ModelFolderError, match="not a model that Pintpot compressed"):
        load_compressed(dense)
    compress_folder(dense, tmp_path / "out", METHOD)
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["format_version"] = 99
    file.write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match="reads up to pintpot 2"):
        load_compressed(tmp_path / "out")


def test_the_job_takes_one_weights_technique(dense: Path, tmp_path: Path):
    done = compress(dense, tmp_path / "out", techniques="rtn(bits=3, group_size=32)")
    assert done.method == RTN(bits=3, group_size=32)
    assert done.output_bytes < done.source_bytes
    assert done.to_dict()["compressed_parameters"] == 14
    size = sum(e.stat().st_size for e in (tmp_path / "out").glob("*.safetensors"))
    assert 0 <= size - done.output_bytes < 10_000
    for wrong in (None, (), (RTN(), RTN(bits=3))):
        with pytest.raises(CompositionError):
            compress(dense, tmp_path / "other", techniques=wrong)
    with pytest.raises(UnsupportedModel, match="compressed already"):
        compress(tmp_path / "out", tmp_path / "other", techniques="rtn4")


LIMITED = """
import resource, sys
import torch
torch.set_num_threads(1)
from transformers import LlamaForCausalLM
from pintpot.weights import compress_folder
from pintpot.weights.rtn import RTN
held = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmSize"))
extra, size = int(sys.argv[3]), int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_AS, (held + extra, held + extra))
try:
    bytearray(size)
except MemoryError:
    compress_folder(sys.argv[1], sys.argv[2], RTN(bits=4))
else:
    raise SystemExit("the limit is not in force")
"""


def test_a_model_larger_than_the_address_space_that_is_left(tmp_path: Path):
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_attention_heads=8, num_hidden_layers=8, vocab_size=1024
    )
    shape = ModelShape.from_config(config, torch.bfloat16)
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path / "dense")
    rows = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    tensors = {p.name: rows.repeat(-(-p.numel // 64), 1)[: p.numel].reshape(p.shape) for p in shape.parameters}
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    del tensors
    size, extra = shape.weight_bytes, 64 << 20
    assert size > 3 * extra

    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path / "dense", tmp_path / "out", str(extra), str(size)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 0.3 * size
