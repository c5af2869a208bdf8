"""Export to GGUF, the format of llama.cpp: blocks of 32 numbers with a scale, and the model's settings in one file.

A grid becomes a block type that gives the same numbers where there is one:

=====================================  ======  ==========================================
grid, groups a multiple of 32          type    numbers
=====================================  ======  ==========================================
symmetric, up to 4 bits                Q4_0    the same
asymmetric, up to 4 bits               Q4_1    what the code 0 stands for is rounded to float16
symmetric, 5 to 8 bits                 Q8_0    the same
asymmetric, 5 to 7 bits                Q8_0    the same
asymmetric, 8 bits                     Q8_0    rounded again, to the block's own scale
=====================================  ======  ==========================================

Scales of bfloat16 become float16, which hardly ever changes them. Everything else that is packed is written in float16,
and what is dense as it is (vectors in float32). What is not exact is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pintpot.core.errors import MissingExtra, UnsupportedModel
from pintpot.core.files import PARTIAL
from pintpot.core.parameter_map import Origin
from pintpot.kernels import unpack
from pintpot.weights.export._base import Exported, PackedFolder
from pintpot.weights.export._vocabulary import add_vocabulary
from pintpot.weights.formats import Format, Grid, Tensors
from pintpot.weights.streaming import Progress
from pintpot.weights.targets import Target

BLOCK = 32
ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2"}
"""The architecture in llama.cpp for each of transformers that is exported."""

Load = Callable[[], NDArray[np.uint8]]
"""Gives the bytes of a tensor, uint8 (rows, bytes of a row)."""

Inexact = dict[str, list[str]]
"""The parameters whose numbers change, by how they do."""

DENSE_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class _Part:
    """One tensor of the file.

    Attributes:
        name: in GGUF.
        shape: of its numbers.
        kind: the GGUF type.
        load: gives its bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: Any
    load: Load


def library() -> Any:
    """The ``gguf`` package.

    Raises:
        MissingExtra: when it is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise MissingExtra(
            "GGUF files are written with the package 'gguf', which is not installed",
            hint='pip install "pintpot[export]"',
        ) from error
    return gguf


def export_gguf(packed: PackedFolder, out: str | Path, progress: Progress | None = None) -> Exported:
    """Write one GGUF file, with one parameter in memory at a time.

    Args:
        packed: what is exported.
        out: the file to write; it must not exist.
        progress: told how far it is, in bytes written.

    Raises:
        MissingExtra: when the package ``gguf`` is not installed.
        UnsupportedModel: when llama.cpp has no counterpart of the architecture or of a setting of it.
    """
    gguf = library()
    config = packed.opened.config
    _refuse(config)
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    inexact: Inexact = {}
    parts = list(_parts(gguf, packed, names, inexact))
    target = Path(out)
    temporary = target.with_name(target.name + PARTIAL)
    writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[architecture])
    _add_settings(gguf, writer, config, packed.opened.path.name)
    notes = add_vocabulary(gguf, writer, packed.opened.path, config)
    total = sum(_bytes(gguf, part) for part in parts)
    for part in parts:
        rows = (*part.shape[:-1], _row_bytes(gguf, part))
        writer.add_tensor_info(part.name, rows, np.dtype(np.uint8), _bytes(gguf, part), part.kind)
    done = 0
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for part in parts:
            writer.write_tensor_data(part.load())
            done += _bytes(gguf, part)
            if progress is not None:
                progress(done, total)
        writer.close()
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    if getattr(config, "sliding_window", None):
        notes.append("llama.cpp does not limit attention to the model's sliding window: keep to shorter contexts")
    notes += [f"{note}: {found[0]} and {len(found) - 1} more" for note, found in inexact.items()]
    return Exported(target, "gguf", total, tuple(notes))


def _refuse(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    reasons = []
    if config.model_type not in ARCHITECTURES:
        reasons.append(f"the architecture is {config.model_type}, not one of {', '.join(ARCHITECTURES)}")
    if rope.get("rope_type", "default") != "default":
        reasons.append(f"its rotary embedding is scaled ({rope['rope_type']})")
    if getattr(config, "mlp_bias", False):
        reasons.append("its feed-forward layers have biases")
    if reasons:
        raise UnsupportedModel(
            f"this model is not exported to GGUF: {'; '.join(reasons)}", hint="export it to safetensors"
        )


def _row_bytes(gguf: Any, part: _Part) -> int:
    block, size = gguf.GGML_QUANT_SIZES[part.kind]
    return int(part.shape[-1] // block * size)


def _bytes(gguf: Any, part: _Part) -> int:
    return int(np.prod(part.shape[:-1], dtype=np.int64)) * _row_bytes(gguf, part)


def _parts(gguf: Any, packed: PackedFolder, names: Any, inexact: Inexact) -> Iterator[_Part]:
    """The tensors of the file; loading them gathers which are not exact, by what is not."""
    config = packed.opened.config
    for origin in packed.dense:
        for name in origin.names:
            entry = origin.entries[0][1]
            vector = packed.model.state_dict()[name].dim() == 1
            kind = "F32" if vector else DENSE_TYPES.get(entry.dtype, "F16")
            shape = tuple(packed.model.state_dict()[name].shape)
            yield _Part(_named(names, name), shape, gguf.GGMLQuantizationType[kind], _dense(origin, name, kind, config))
    for name, target in packed.targets.items():
        kind, note = block_type(packed.layout[name], target.shape[-1])
        load = _quantised(gguf, packed, target, inexact) if not note else _again(gguf, packed, target, kind)
        if note:
            inexact.setdefault(note, []).append(name)
        yield _Part(_named(names, name), target.shape, gguf.GGMLQuantizationType[kind], load)


def _named(names: Any, name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    found = names.get_name(stem)
    if found is None:
        raise UnsupportedModel(f"llama.cpp has no place for {name}", hint="export it to safetensors")
    return f"{found}.{leaf}"


def block_type(formats: tuple[Format, ...], in_features: int) -> tuple[str, str]:
    """The GGUF type for a packed parameter, and why it is rounded anew, or an empty string where it is not.

    Args:
        formats: of its terms.
        in_features: I.
    """
    layout = formats[0]
    if len(formats) != 1 or not isinstance(layout, Grid):
        return "F16", f"{' + '.join(f.kind for f in formats)} has no counterpart and is written in float16"
    if in_features % BLOCK or (layout.group(in_features) % BLOCK and layout.group(in_features) != in_features):
        return "F16", f"groups of {layout.group(in_features)} in rows of {in_features} are written in float16"
    if layout.bits <= 4:
        return "Q4_0" if layout.symmetric else "Q4_1", ""
    return "Q8_0", "asymmetric grids of 8 bits are rounded again" if layout.bits == 8 and not layout.symmetric else ""


def _again(gguf: Any, packed: PackedFolder, target: Target, kind: str) -> Load:
    """Loads a packed parameter and rounds its numbers anew."""

    def load() -> NDArray[np.uint8]:
        order = _row_order(target.parameter, target.shape[0], packed.opened.config)
        found: NDArray[np.uint8] = gguf.quants.quantize(
            packed.weight(target).float()[order].numpy(), gguf.GGMLQuantizationType[kind]
        )
        return found.view(np.uint8).reshape(target.shape[0], -1)

    return load


def _quantised(gguf: Any, packed: PackedFolder, target: Target, inexact: Inexact) -> Load:
    """Loads a grid as blocks that hold its own codes."""

    def load() -> NDArray[np.uint8]:
        order = _row_order(target.parameter, target.shape[0], packed.opened.config)
        (layout, tensors), *_ = packed.stored(target)
        if not isinstance(layout, Grid):
            raise UnsupportedModel(f"{target.parameter} is not a grid", hint="export it to safetensors")
        rows = {name: tensor[order] for name, tensor in tensors.items()}
        found, exact = blocks(layout, rows, target.shape[-1])
        if not exact:
            inexact.setdefault("a block's numbers in float16 are rounded", []).append(target.parameter)
        return found

    return load


def blocks(grid: Grid, tensors: Tensors, in_features: int) -> tuple[NDArray[np.uint8], bool]:
    """The rows of a grid as blocks with its own codes: uint8 (O, bytes of a row), and whether the numbers are the same.

    Args:
        grid: the format.
        tensors: stored.
        in_features: I, a multiple of 32.
    """
    rows = tensors["packed"].shape[0]
    codes = unpack(tensors["packed"], grid.bits, in_features).view(rows, -1, BLOCK)
    scale = grid.by_column(tensors["scale"], in_features)[:, ::BLOCK].float()
    if grid.symmetric:
        zero = torch.full_like(scale, 1 << (grid.bits - 1))
    else:
        stored = unpack(tensors["zero"], grid.bits, tensors["scale"].shape[-1])
        zero = grid.by_column(stored, in_features)[:, ::BLOCK].float()
    lowest = -zero * scale
    ends = [scale, lowest] if grid.bits <= 4 and not grid.symmetric else [scale]
    parts = [end.half()[..., None].view(torch.uint8) for end in ends]
    if grid.bits > 4:
        parts.append((codes.to(torch.int16) - zero.to(torch.int16)[..., None]).to(torch.int8).view(torch.uint8))
    else:
        parts.append(_nibbles(codes + (8 - (1 << (grid.bits - 1))) if grid.symmetric else codes))
    exact = all(bool((end.half().float() == end).all()) for end in ends)
    return torch.cat(parts, -1).view(rows, -1).numpy(), exact


def _nibbles(codes: Tensor) -> Tensor:
    """Codes of 4 bits (O, B, 32), the first half of a block in the low bits: uint8 (O, B, 16)."""
    return codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4


def _dense(origin: Origin, name: str, kind: str, config: Any) -> Load:
    def load() -> NDArray[np.uint8]:
        tensor = origin.load()[name]
        tensor = tensor[_row_order(name, tensor.shape[0], config)]
        wanted = next(dtype for dtype, known in DENSE_TYPES.items() if known == kind)
        rows = tensor.to(wanted).contiguous()
        found: NDArray[np.uint8] = rows.view(torch.uint8).numpy()
        return found

    return load


def _row_order(name: str, rows: int, config: Any) -> Tensor:
    """The order of rows in llama.cpp: for Llama its rotary embedding turns neighbours in a head, not halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    order = torch.arange(rows)
    if heads is None or ARCHITECTURES[config.model_type] != "LLAMA":
        return order
    return order.view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def _add_settings(gguf: Any, writer: Any, config: Any, name: str) -> None:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.GUESSED)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
