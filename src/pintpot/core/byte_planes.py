"""Tensors stored without loss in fewer bytes: the bytes of each place together, each plane under an entropy code.

The exponents of trained weights take few values and their mantissas look random, so numbers of 16 and 32 bits are cut
into a plane of exponents, a plane of signs with the leading seven mantissa bits, and the lower bytes as they are. Other
types are cut into the bytes of their numbers. Planes are coded by zstandard in chunks, almost without matches, so that
what remains is its Huffman coder; a chunk that would not become smaller is stored as it is.

A stored tensor, all integers little-endian::

    8 bytes   MAGIC
    uint32    length of the description
    JSON      {"dtype": name in safetensors, "shape": sizes, "chunk": numbers}, with spaces up to a multiple of 4
    uint32    bytes of each plane of each chunk, chunk by chunk (equal to the chunk's length: stored as it is)
    the planes of the first chunk, of the second ...
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from pintpot.core.errors import ModelFolderError

MAGIC = b"PPplane1"
CHUNK = 1 << 17
"""Numbers whose planes are coded together: as many as a block of zstandard has bytes, so that a plane has one code."""

CHUNK_UNSAID = 1 << 16
"""The chunk of a stored tensor whose description has none."""

GROUP = 1 << 20
"""Numbers that a thread takes at a time: a multiple of every chunk."""

WORTH = 0.98
"""A plane is stored coded when its code has at most this fraction of its bytes."""

DESCRIPTION_BYTES = 4096
"""Most bytes before the table of a stored tensor."""

# No search for matches to speak of: a table of 64 places, and matches of at least 7 bytes.
_PARAMETERS = zstandard.ZstdCompressionParameters(
    window_log=17,
    chain_log=6,
    hash_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    strategy=zstandard.STRATEGY_FAST,
    write_checksum=False,
)

Bytes = NDArray[np.uint8]


def encode(tensor: Tensor, dtype_name: str) -> list[bytes]:
    """The stored form of a tensor, in pieces that follow one another.

    Args:
        tensor: any dtype, contiguous, on the CPU.
        dtype_name: of its dtype in safetensors.
    """
    raw = _raw(tensor)
    width = tensor.dtype.itemsize
    starts = range(0, tensor.numel(), GROUP)
    groups = _mapped(lambda start: _encode_group(raw[start * width : (start + GROUP) * width], tensor.dtype), starts)
    planes = [plane for group in groups for plane in group]
    description = {"dtype": dtype_name, "shape": list(tensor.shape), "chunk": CHUNK}
    text = json.dumps(description, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    table = np.array([len(plane) for plane in planes], dtype="<u4").tobytes()
    return [MAGIC + struct.pack("<I", len(text)) + text, table, *planes]


@dataclass(frozen=True)
class Description:
    """What a stored tensor says of itself.

    Attributes:
        dtype_name: in safetensors.
        shape: of the tensor.
        chunk: numbers whose planes are coded together.
        begin: where its table begins.
    """

    dtype_name: str
    shape: tuple[int, ...]
    chunk: int
    begin: int


def describe(start: bytes) -> Description:
    """What a stored tensor says of itself.

    Args:
        start: its first ``DESCRIPTION_BYTES``, or all of it.

    Raises:
        ModelFolderError: when it is not a stored tensor.
    """
    try:
        (length,) = struct.unpack_from("<I", start, len(MAGIC))
        begin = len(MAGIC) + 4
        data = json.loads(start[begin : begin + length])
        if start[: len(MAGIC)] != MAGIC:
            raise ValueError("it begins with other bytes")
        shape = tuple(int(n) for n in data["shape"])
        if min(shape, default=0) < 0:
            raise ValueError("a size is negative")
        chunk = int(data.get("chunk", CHUNK_UNSAID))
        if chunk < 1 or GROUP % chunk:
            raise ValueError(f"its chunks have {chunk} numbers")
        return Description(str(data["dtype"]), shape, chunk, begin + length)
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise _damaged(f"it does not begin as one ({error})") from error


def decode(stored: Bytes, dtypes: dict[str, torch.dtype]) -> Tensor:
    """The tensor that was stored, in memory of its own.

    Args:
        stored: all its bytes, uint8 (n,).
        dtypes: by their names in safetensors.

    Raises:
        ModelFolderError: when the bytes are damaged.
    """
    said = describe(stored[:DESCRIPTION_BYTES].tobytes())
    if said.dtype_name not in dtypes:
        raise _damaged(f"its dtype is {said.dtype_name!r}")
    dtype, count = dtypes[said.dtype_name], math.prod(said.shape)
    width, begin = dtype.itemsize, said.begin
    after = begin + 4 * width * -(-count // said.chunk)
    if len(stored) < after:
        raise _damaged("its table is cut off")
    table = np.frombuffer(stored[begin:after].tobytes(), "<u4")
    bounds = list(accumulate(table.tolist(), initial=after))
    if len(stored) != bounds[-1]:
        raise _damaged("it has another length than its table calls for")
    tensor = torch.empty(said.shape, dtype=dtype)
    raw, per_group = _raw(tensor), GROUP // said.chunk * width

    def fill(group: int) -> None:
        own = bounds[group * per_group : (group + 1) * per_group + 1]
        planes = [stored[a:b] for a, b in pairwise(own)]
        _decode_group(planes, raw[group * GROUP * width : (group + 1) * GROUP * width], dtype, said.chunk)

    _mapped(fill, range(-(-count // GROUP)))
    return tensor


def _raw(tensor: Tensor) -> Bytes:
    found: Bytes = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return found


def _mapped(call: Callable[[int], Any], items: Sequence[int]) -> list[Any]:
    """The results in order, by as many threads as torch may use; they do not depend on how many these are."""
    threads = min(torch.get_num_threads(), len(items))
    if threads < 2:
        return [call(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(call, items))


def _encode_group(raw: Bytes, dtype: torch.dtype) -> list[bytes]:
    compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
    found: list[bytes] = []
    for chunk in _chunks(raw, CHUNK * dtype.itemsize):
        for plane in _split(chunk, dtype):
            code = compressor.compress(plane.data)
            found.append(code if len(code) <= WORTH * len(plane) else plane.tobytes())
    return found


def _decode_group(planes: list[Bytes], raw: Bytes, dtype: torch.dtype, chunk_numbers: int) -> None:
    decompressor = zstandard.ZstdDecompressor()
    ways, exponents = dtype.itemsize, _split_exponents(dtype)
    for index, chunk in enumerate(_chunks(raw, chunk_numbers * ways)):
        length = len(chunk) // ways
        parts = [_plane(plane, length, decompressor) for plane in planes[index * ways : (index + 1) * ways]]
        if exponents:
            _joiner(parts, chunk)
        else:
            for place, plane in zip(reversed(range(ways)), parts, strict=True):
                chunk[place::ways] = plane


def _plane(stored: Bytes, length: int, decompressor: zstandard.ZstdDecompressor) -> Bytes:
    if len(stored) == length:
        return stored
    try:
        # A frame that calls for more is damaged, and is not given the memory.
        if zstandard.frame_content_size(stored[:18].tobytes()) != length:
            raise _damaged("a plane has another length than its chunk")
        plane: Bytes = np.frombuffer(decompressor.decompress(stored.data), np.uint8)
    except zstandard.ZstdError as error:
        raise _damaged(f"a plane cannot be decoded ({error})") from error
    return plane


def _chunks(raw: Bytes, step: int) -> Iterator[Bytes]:
    return (raw[start : start + step] for start in range(0, len(raw), step))


def _split_exponents(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize in (2, 4)


def _split(chunk: Bytes, dtype: torch.dtype) -> list[Bytes]:
    """The planes of a chunk, the one with the exponents first."""
    width = dtype.itemsize
    if not _split_exponents(dtype):
        return [np.ascontiguousarray(chunk[place::width]) for place in reversed(range(width))]
    whole: NDArray[Any] = chunk.view("<u4" if width == 4 else "<u2")
    top = (whole >> 16).astype(np.uint16) if width == 4 else whole
    signs = top >> 8
    signs &= 0x80
    signs |= top & 0x7F
    lower = [whole.astype(np.uint8), (whole >> 8).astype(np.uint8)][::-1] if width == 4 else []
    return [(top >> 7).astype(np.uint8), signs.astype(np.uint8), *lower]


def join_exponents(planes: Sequence[Bytes], chunk: Bytes) -> None:
    """Put the planes of floats of 16 or 32 bits together again.

    Args:
        planes: as many as a number has bytes, uint8 (n,), the one with the exponents first.
        chunk: where the numbers are written, as bytes.
    """
    length, width = len(planes[0]), len(planes)
    whole: NDArray[Any] = chunk.view("<u4" if width == 4 else "<u2")
    signs = np.empty(length, np.uint16)
    top = whole if width == 2 else np.empty(length, np.uint16)
    # As signed numbers the signs fill all bits above the mantissa; the mask keeps the highest.
    np.copyto(signs.view("<i2"), planes[1].view(np.int8))
    signs &= 0x807F
    np.multiply(planes[0], np.uint16(128), out=top, dtype=np.uint16)
    top |= signs
    if width == 4:
        np.multiply(top, np.uint32(1 << 16), out=whole, dtype=np.uint32)
        np.multiply(planes[2], np.uint16(256), out=top, dtype=np.uint16)
        top |= planes[3]
        whole |= top


Joiner = Callable[[Sequence[Bytes], Bytes], None]
_joiner: Joiner = join_exponents


def join_by(joiner: Joiner) -> None:
    """Have floats put together by another function that does what ``join_exponents`` does (a compiled one)."""
    global _joiner
    _joiner = joiner


def _damaged(what: str) -> ModelFolderError:
    return ModelFolderError(f"a losslessly stored tensor is damaged: {what}", hint="download or write the folder again")
