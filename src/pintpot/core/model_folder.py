"""Model folders in Hugging Face format, checked before any work starts, and read one tensor at a time.

Tensors are read by plain file reads at their offsets, never by mapping whole files into memory, so that a model may be
larger than the memory (or address space) of the process. Pickled weights are never opened.
"""

from __future__ import annotations

import json
import logging
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from pintpot.core import byte_planes
from pintpot.core.errors import ModelFolderError
from pintpot.core.shape import ModelShape

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHECKSUMS = "checksums.json"
"""The file with the checksum of each tensor, in folders that Pintpot wrote."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
MOST_HEADER_BYTES = 100_000_000
STORAGE = "pintpot_storage"
"""The key in a file's metadata that says how its tensors are stored, where not as they are."""
PLANES = "byte-planes"
"""What stands there when every tensor of the file is stored as ``byte_planes`` codes it."""
CHECK_ELEMENTS = 1 << 22
"""Numbers that ``check_finite`` looks at together."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        name: in the checkpoint.
        file: the safetensors file.
        dtype: as stored.
        shape: its sizes.
        offset: of its first byte in the file.
        nbytes: its size in memory.
        coded_bytes: its size in the file where it is stored as ``byte_planes`` codes it, and 0 where as it is.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    coded_bytes: int = 0

    @property
    def file_bytes(self) -> int:
        """Its size in the file."""
        return self.coded_bytes or self.nbytes

    def read_raw(self) -> bytearray:
        """Its bytes as they are in the file.

        Raises:
            ModelFolderError: when the file has become shorter since it was checked.
        """
        data = bytearray(self.file_bytes)
        with self.file.open("rb") as file:
            file.seek(self.offset)
            if file.readinto(data) != len(data):
                raise _corrupt(self.file, f"it ends inside the tensor {self.name}")
        return data

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            ModelFolderError: when the file has become shorter since it was checked, or what was coded is damaged.
        """
        if self.file_bytes == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        data = self.read_raw()
        if not self.coded_bytes:
            return torch.frombuffer(data, dtype=self.dtype).reshape(self.shape)
        try:
            return byte_planes.decode(np.frombuffer(data, np.uint8), DTYPES)
        except ModelFolderError as error:
            raise _corrupt(self.file, f"{self.name}: {error.message}") from error


@dataclass(frozen=True)
class ModelFolder:
    """A checked model folder.

    Attributes:
        path: the folder.
        config: its transformers configuration.
        entries: the tensors by their names in the checkpoint.
        ignored: files of pickled weights that stand beside the safetensors and are not opened.
    """

    path: Path
    config: PretrainedConfig
    entries: Mapping[str, TensorEntry]
    ignored: tuple[str, ...] = ()

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype in which most weights are stored (by bytes), floating-point ones only."""
        sizes: Counter[torch.dtype] = Counter()
        for entry in self.entries.values():
            if entry.dtype.is_floating_point:
                sizes[entry.dtype] += entry.nbytes
        return sizes.most_common(1)[0][0] if sizes else torch.float32

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def file_bytes(self) -> int:
        """Bytes of all tensors in the files; fewer than ``weight_bytes`` where they are stored coded."""
        return sum(entry.file_bytes for entry in self.entries.values())

    @property
    def coded(self) -> bool:
        """Whether the tensors are stored coded, without loss."""
        return any(entry.coded_bytes for entry in self.entries.values())

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The quantization configuration of an already compressed folder, or None."""
        found = getattr(self.config, "quantization_config", None)
        return None if found is None else dict(found if isinstance(found, dict) else found.to_dict())

    def shape(self, dtype: torch.dtype | None = None) -> ModelShape:
        """The model as shapes, in the stored dtype unless another is given."""
        return ModelShape.from_config(self.config, dtype or self.dtype, str(self.path))

    def tensors(self, *, finite: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, one in memory at a time, refusing NaN and Inf unless told otherwise.

        Raises:
            ModelFolderError: naming the first tensor that is not finite.
        """
        for name, entry in self.entries.items():
            tensor = entry.read()
            if finite:
                check_finite(name, tensor)
            yield name, tensor


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a floating-point tensor that holds NaN or Inf; looks at a bounded number of elements at a time.

    Raises:
        ModelFolderError: naming the tensor.
    """
    if not tensor.is_floating_point():
        return
    for block in tensor.reshape(-1).split(CHECK_ELEMENTS):
        # The extremes are NaN when any element is, and finding them takes no temporaries.
        extremes = torch.aminmax(block.float() if block.dtype.itemsize == 1 else block) if block.numel() else ()
        if not all(torch.isfinite(extreme) for extreme in extremes):
            raise ModelFolderError(
                f"the tensor {name} holds NaN or Inf",
                hint="the checkpoint is damaged or its training diverged; use another one",
            )


def open_model(path: str | Path, *, tokenizer: bool = False, match: bool = True) -> ModelFolder:
    """Check a model folder completely (reading headers only) and open it.

    Args:
        path: the folder.
        tokenizer: whether the job needs a tokenizer, so that its absence is refused.
        match: compare tensor names and shapes with what the configuration calls for. Compressed folders are not
            compared here but when they are loaded.

    Raises:
        ModelFolderError: for a missing, incomplete, corrupt or unsafe folder, naming the file and the way out.
        UnsupportedModel: when transformers does not know the architecture.
    """
    folder = Path(path)
    if folder.is_file():
        raise ModelFolderError(f"{folder} is a file, not a model folder", hint="give the folder that it is in")
    config = ModelShape.from_folder(folder).config
    pickles = tuple(sorted({file.name for pattern in PICKLES for file in folder.glob(pattern)}))
    files = _weight_files(folder, pickles)
    entries: dict[str, TensorEntry] = {}
    for file, names in files.items():
        found = read_header(file)
        missing = sorted(names - set(found))
        if missing:
            raise _corrupt(
                file, f"the index says that it holds {missing[0]} (and {len(missing) - 1} more), but it does not"
            )
        entries.update(found)
    if not entries:
        raise ModelFolderError(f"{folder} holds no tensors", hint="download or save the model again")
    if pickles:
        logger.warning("%s: not opened, because pickled files can run code: %s", folder, ", ".join(pickles))
    if tokenizer and not has_tokenizer(folder):
        raise ModelFolderError(
            f"{folder} has no tokenizer",
            hint="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        )
    opened = ModelFolder(folder, config, entries, pickles)
    if match and opened.quantization is None:
        # Imported here because it builds on this module.
        from pintpot.core.parameter_map import map_parameters

        map_parameters(opened, opened.shape().build("meta"))
    return opened


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _weight_files(folder: Path, pickles: tuple[str, ...]) -> dict[Path, set[str]]:
    """The safetensors files of a folder, each with the tensors that the index expects in it."""
    index = folder / INDEX
    if index.is_file():
        try:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise _corrupt(index, f"it is not an index of shards ({error})") from error
        files: dict[Path, set[str]] = {}
        for name, file in named:
            if not isinstance(file, str) or Path(file).name != file:
                raise _corrupt(index, f"the shard of {name} is not the name of a file in the folder")
            files.setdefault(folder / file, set()).add(name)
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelFolderError(
                f"{folder} lacks {', '.join(missing)}, which its index names",
                hint="the download is incomplete: fetch the missing shards",
            )
        return files
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: set()}
    stray = [file.name for file in sorted(folder.glob("*.safetensors"))]
    if stray:
        raise ModelFolderError(
            f"{folder} holds {', '.join(stray[:3])} but neither {SINGLE} nor {INDEX}",
            hint="fetch the missing index, or rename a single file to model.safetensors",
        )
    if pickles:
        raise ModelFolderError(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), never loaded because they can run code",
            hint="convert them to safetensors on a machine where you trust them, or download the safetensors version",
        )
    raise ModelFolderError(
        f"{folder} has a configuration but no weights", hint="fetch the *.safetensors files of the model"
    )


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, checked against the file's size; coded ones as they are when decoded.

    Raises:
        ModelFolderError: when the file is truncated or corrupt, or coded in a way that is not known.
    """
    entries, storage = read_plain_header(file)
    if storage not in (None, PLANES):
        raise ModelFolderError(
            f"{file} is stored as {storage!r}, which this version cannot read", hint="update pintpot"
        )
    return entries if storage is None else {name: _decoded_entry(entry) for name, entry in entries.items()}


def read_plain_header(file: Path) -> tuple[dict[str, TensorEntry], str | None]:
    """The tensors of a safetensors file as they lie there, and how they are coded, if they are.

    Raises:
        ModelFolderError: when the file is truncated or corrupt.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= min(MOST_HEADER_BYTES, size - 8):
            raise _corrupt(file, "its header is cut off or is not a safetensors header")
        raw = handle.read(length)
    try:
        header = json.loads(raw)
        storage = (header.pop("__metadata__", None) or {}).get(STORAGE)
        entries = {name: _entry(file, name, data, 8 + length) for name, data in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _corrupt(file, f"its header cannot be read ({error})") from error
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != end:
            raise _corrupt(file, f"the data of {entry.name} is not where its header says")
        end += entry.nbytes
    if end != size:
        raise _corrupt(file, f"it has {size} bytes and its header calls for {end}")
    return entries, storage


def _decoded_entry(entry: TensorEntry) -> TensorEntry:
    """What a tensor that is stored coded is when it is decoded; reads its beginning."""
    with entry.file.open("rb") as handle:
        handle.seek(entry.offset)
        start = handle.read(min(entry.nbytes, byte_planes.DESCRIPTION_BYTES))
    try:
        said = byte_planes.describe(start)
        dtype = DTYPES[said.dtype_name]
    except (ModelFolderError, KeyError) as error:
        raise _corrupt(entry.file, f"{entry.name} is not a coded tensor") from error
    nbytes = torch.Size(said.shape).numel() * dtype.itemsize
    return replace(entry, dtype=dtype, shape=said.shape, nbytes=nbytes, coded_bytes=entry.nbytes)


def header_of(entries: Iterable[TensorEntry], metadata: Mapping[str, str] | None = None) -> bytes:
    """The header of a safetensors file of these tensors, whose bytes follow one another in this order.

    Args:
        entries: as they lie in the file (coded ones are bytes there).
        metadata: beside the format.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for entry in entries:
        span = [end, end + entry.nbytes]
        header[entry.name] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": span}
        end = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _entry(file: Path, name: str, data: Mapping[str, Any], start: int) -> TensorEntry:
    first, last = (int(x) for x in data["data_offsets"])
    entry = TensorEntry(
        name, file, DTYPES[data["dtype"]], tuple(int(n) for n in data["shape"]), start + first, last - first
    )
    if min(entry.shape, default=0) < 0 or entry.nbytes != torch.Size(entry.shape).numel() * entry.dtype.itemsize:
        raise ValueError(f"the bytes of {name} do not fit its shape")
    return entry


def _corrupt(file: Path, what: str) -> ModelFolderError:
    return ModelFolderError(f"{file} is corrupt: {what}", hint="download or save this file again")
