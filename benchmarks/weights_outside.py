"""A public package that compresses weights, in an environment of its own; imports nothing of ours.

``python -P weights_outside.py JOB`` reads a JSON file with ``tool``, ``folder``, ``modules``, ``settings``, ``texts``
(a safetensors file with ``input_ids``), ``path`` (more of sys.path) and ``out``. It writes ``out``, the compressed
model's numbers in float32, and ``out.json``: bytes of the matrices as they are stored, seconds of compressing, and the
growth of resident bytes.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

State = dict[str, Tensor]

SEQUENCES_AT_ONCE = 8
SCALE_BYTES = 2
"""What a scale counts where it was computed in float32: the packages store it in the dtype of a 16-bit model."""


def status_bytes(field: str) -> int:
    """A figure of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def load(folder: str, dtype: torch.dtype) -> nn.Module:
    """The dense model, of the class that its configuration names."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def held(tensor: Tensor) -> int:
    """Bytes of what a tensor really holds, where it is one of a package's own kinds."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    return sum(held(getattr(tensor, name)) for name in names) if names else tensor.nbytes


def torchao(model: nn.Module, job: dict[str, Any]) -> tuple[State, int, float]:
    """Weight-only quantisation by torchao; what it does not pack is counted as it is held."""
    from torchao import quantization

    bits, group = job["settings"]["bits"], job["settings"]["group_size"]
    wanted, begin = set(job["modules"]), time.perf_counter()

    def quantize(config: Any, names: set[str]) -> None:
        quantization.quantize_(model, config, filter_fn=lambda module, name: name in names)

    if bits == 8:
        quantize(quantization.Int8WeightOnlyConfig(), wanted)
    else:
        for size in {dividing(model, name, group) for name in wanted}:
            same = {name for name in wanted if dividing(model, name, group) == size}
            kind, groups = getattr(torch, f"int{bits}"), quantization.PerGroup(size)
            quantize(quantization.IntxWeightOnlyConfig(weight_dtype=kind, granularity=groups), same)
    seconds = time.perf_counter() - begin
    weights = {name: model.get_submodule(name).weight for name in wanted}
    state = {f"{name}.weight": weight.dequantize().float() for name, weight in weights.items()}
    return state, sum(held(weight.data) for weight in weights.values()), seconds


def dividing(model: nn.Module, name: str, group: int) -> int:
    """The largest halving of a group size that divides a layer's input, as these packages want it."""
    columns = model.get_submodule(name).weight.shape[1]
    while columns % group:
        group //= 2
    return group


def llmcompressor(model: nn.Module, job: dict[str, Any]) -> tuple[State, int, float]:
    """GPTQ or AWQ by llm-compressor with its defaults, stored by compressed-tensors and read again."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.cuda.is_available():
        # AWQ pins memory for transfers to an accelerator, which fails where there is none (0.14).
        IntermediatesCache.pin_memory = lambda *_: None
    settings, ids = job["settings"], load_file(job["texts"])["input_ids"]
    groups: dict[str, Any] = {}
    for size in sorted({dividing(model, name, settings["group_size"]) for name in job["modules"]}):
        names = [name for name in job["modules"] if dividing(model, name, settings["group_size"]) == size]
        weights = {"num_bits": settings["bits"], "type": "int", "symmetric": False, "strategy": "group"}
        groups[f"group_{size}"] = {
            "targets": [f"re:^{re.escape(name)}$" for name in names],
            "weights": {**weights, "group_size": size},
        }
    quantizer = GPTQModifier if settings["method"] == "gptq" else QuantizationModifier
    recipe = [AWQModifier()] if settings["method"] == "awq" else []
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    begin = time.perf_counter()
    oneshot(
        model=model,
        dataset=rows,
        recipe=[*recipe, quantizer(config_groups=groups, ignore=[])],
        max_seq_length=ids.shape[1],
        batch_size=SEQUENCES_AT_ONCE,
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    seconds = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_compressed=True)
        tensors = {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}
        size = sum(
            tensor.numel() * SCALE_BYTES if tensor.is_floating_point() else tensor.nbytes
            for name, tensor in tensors.items()
            if name.rpartition(".")[0] in set(job["modules"]) and ".weight" in name
        )
        plain = transformers.CompressedTensorsConfig(dequantize=True)
        stored = type(model).from_pretrained(folder, quantization_config=plain, dtype=torch.float32)
        kept = {name: tensor.float() for name, tensor in stored.state_dict().items() if tensor.is_floating_point()}
    return {name: t for name, t in kept.items() if not name.endswith(("_scale", "_zero_point"))}, size, seconds


TOOLS: dict[str, tuple[Callable[[nn.Module, dict[str, Any]], tuple[State, int, float]], torch.dtype]] = {
    "torchao": (torchao, torch.float16),
    "llm-compressor": (llmcompressor, torch.float32),
}


def main() -> None:
    """Do the job."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.path += job["path"]
    torch.manual_seed(0)
    run, dtype = TOOLS[job["tool"]]
    model = load(job["folder"], dtype)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status_bytes("VmRSS")
    state, size, seconds = run(model, job)
    peak = status_bytes("VmHWM") - before
    figures = {"matrix_bytes": size, "seconds": round(seconds, 3), "peak_bytes": peak}
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in state.items()}, job["out"])
    Path(f"{job['out']}.json").write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
