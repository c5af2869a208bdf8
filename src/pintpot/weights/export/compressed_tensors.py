"""Export to compressed-tensors, the format of vLLM and llm-compressor: integers of 4 or 8 bits in groups.

``weight_packed`` int32 holds the codes of a row, lowest bits first; ``weight_scale`` the scales, ``weight_zero_point``
the zeros packed along the rows, and ``weight_shape`` the sizes. The numbers are the same as before.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pintpot.core.errors import UnsupportedModel
from pintpot.core.parameter_map import Origin
from pintpot.kernels import unpack
from pintpot.weights.export._base import Exported, PackedFolder
from pintpot.weights.export._writing import Step, dense_step, origin_of, write_folder
from pintpot.weights.formats import Format, Grid, Tensors
from pintpot.weights.formats.grid import SCALE_DTYPES
from pintpot.weights.shards import TensorPlan
from pintpot.weights.streaming import Progress
from pintpot.weights.targets import Target

BITS = (4, 8)
"""Widths that the programs which read the format have products for."""


def export_compressed_tensors(packed: PackedFolder, out: str | Path, progress: Progress | None = None) -> Exported:
    """Write a folder in the format ``pack-quantized``.

    Args:
        packed: what is exported.
        out: the folder to write; it must not exist.
        progress: told how far it is.

    Raises:
        UnsupportedModel: naming what has no counterpart, and why.
    """
    _refuse(packed)
    steps = [dense_step(packed, origin) for origin in packed.dense]
    steps += [_step(packed, target) for target in packed.targets.values()]
    size = write_folder(packed, out, steps, partial(_load, packed=packed), _configuration(packed), progress)
    notes: list[str] = []
    if not all(_grid(packed, target).symmetric for target in packed.targets.values()):
        notes.append(
            "transformers 5.23 with compressed-tensors 0.20 loads packed zeros only with "
            "quantization_config=CompressedTensorsConfig(dequantize=True)"
        )
    scales = {SCALE_DTYPES[_grid(packed, t).scale_dtype] for t in packed.targets.values()}
    own = {target.dtype for target in packed.targets.values()}
    if torch.float32 not in own and scales != own:
        notes.append("scales are rounded when the model is loaded in bfloat16; load it in float16 for exact ones")
    return Exported(Path(out), "compressed-tensors", size, tuple(notes))


def _grid(packed: PackedFolder, target: Target) -> Grid:
    layout = packed.layout[target.parameter][0]
    if not isinstance(layout, Grid):
        raise UnsupportedModel(f"{target.parameter} is not a grid", hint="export to safetensors")
    return layout


def _obstacle(packed: PackedFolder, target: Target) -> str:
    """Why a parameter has no counterpart, or an empty string."""
    formats: tuple[Format, ...] = packed.layout[target.parameter]
    layout = formats[0]
    if type(packed.model.get_submodule(target.module)) is not nn.Linear:
        return "it is not in a linear layer"
    if len(formats) != 1 or not isinstance(layout, Grid):
        return f"it is held as {' + '.join(f.kind for f in formats)}, not as one grid"
    if layout.bits not in BITS:
        return f"it has {layout.bits} bits, not 4 or 8"
    if target.shape[-1] % layout.group(target.shape[-1]):
        return f"rows of {target.shape[-1]} are not a multiple of the group of {layout.group_size}"
    return ""


def _refuse(packed: PackedFolder) -> None:
    reasons = {name: _obstacle(packed, target) for name, target in packed.targets.items()}
    bad = {name: reason for name, reason in reasons.items() if reason}
    if bad or not packed.targets:
        name = next(iter(bad), "")
        what = f"{name}: {bad[name]} (and {len(bad) - 1} more parameters)" if bad else "no parameter is packed"
        raise UnsupportedModel(
            f"{packed.opened.path} cannot be written as compressed-tensors: {what}",
            hint="compress with rtn, gptq or another method of plain grids in 4 or 8 bits, or export to safetensors",
        )


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _step(packed: PackedFolder, target: Target) -> Step:
    grid, (rows, columns) = _grid(packed, target), target.shape
    groups = columns // grid.group(columns)
    plans = [
        TensorPlan(f"{target.module}.weight_packed", (rows, _words(columns, grid.bits)), torch.int32),
        TensorPlan(f"{target.module}.weight_scale", (rows, groups), SCALE_DTYPES[grid.scale_dtype]),
        TensorPlan(f"{target.module}.weight_shape", (2,), torch.int64),
    ]
    if not grid.symmetric:
        plans.append(TensorPlan(f"{target.module}.weight_zero_point", (_words(rows, grid.bits), groups), torch.int32))
    return origin_of(packed, target.parameter), tuple(plans)


def _load(origin: Origin, packed: PackedFolder) -> dict[str, Tensor]:
    target = packed.targets.get(origin.names[0])
    if target is None:
        return origin.load()
    (_, tensors), *_ = packed.stored(target)
    made = _converted(_grid(packed, target), tensors, target)
    return {f"{target.module}.{name}": tensor for name, tensor in made.items()}


def _converted(grid: Grid, tensors: Tensors, target: Target) -> Tensors:
    columns = target.shape[-1]
    made = {
        "weight_packed": into_words(unpack(tensors["packed"], grid.bits, columns), grid.bits),
        "weight_scale": tensors["scale"],
        "weight_shape": torch.tensor(target.shape),
    }
    if not grid.symmetric:
        zero = unpack(tensors["zero"], grid.bits, tensors["scale"].shape[-1])
        made["weight_zero_point"] = into_words(zero.t().contiguous(), grid.bits).t().contiguous()
    return made


def into_words(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 (R, C) of 4 or 8 bits, the first in the lowest bits of each int32: (R, ceil(C * bits / 32))."""
    padded = functional.pad(codes, (0, -codes.shape[-1] % (32 // bits)))
    if bits == 4:
        padded = padded[:, 0::2] | padded[:, 1::2] << 4
    words = padded.contiguous().view(-1, 4)
    # On a machine whose words begin with their highest byte the bytes change places, so that the words are the same.
    ordered = words if sys.byteorder == "little" else words.flip(-1).contiguous()
    return ordered.view(torch.int32).view(codes.shape[0], -1)


def _configuration(packed: PackedFolder) -> dict[str, Any]:
    kinds: dict[tuple[int, bool, int], list[str]] = defaultdict(list)
    for target in packed.targets.values():
        grid, columns = _grid(packed, target), target.shape[-1]
        group = -1 if grid.group(columns) == columns else grid.group(columns)
        kinds[grid.bits, grid.symmetric, group].append(target.module)
    linear = [name for name, module in packed.model.named_modules() if isinstance(module, nn.Linear)]
    taken = {target.module for target in packed.targets.values()}
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(kinds) == 1 else modules,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "channel" if group == -1 else "group",
                "group_size": None if group == -1 else group,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for index, ((bits, symmetric, group), modules) in enumerate(kinds.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linear if name not in taken],
    }
