"""Vectors of numbers as indices into a codebook, and of what that leaves over into a second one.

Bytes of a weight (O, I), with N = ceil(I / V) vectors a row, B bits an index and e bytes a number of the codebook:
``O * size(N, B) + 2^B * V * e`` and the same again for a residual codebook, where ``size(N, B)`` is
``packed_size(N, B)``, and ``packed_size(N, 8) + packed_size(N, B - 8)`` for more than 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.core.errors import ShapeError
from pintpot.kernels import pack, packed_size
from pintpot.kernels.tables import Book, codebook_decode, codebook_matmul, codebook_matmul_transposed, few_rows
from pintpot.weights.clustering import cluster, nearest
from pintpot.weights.formats._base import Format, Storage, Tensors, decodes_in_place, file_name
from pintpot.weights.formats.grid import SCALE_DTYPES

BOOKS = ("", "residual_")
"""What stands before the names of a codebook's tensors."""


@file_name("codebook")
@dataclass(frozen=True, kw_only=True)
class Codebook(Format):
    """Each run of ``vector_length`` numbers of a row is an entry of the codebook, plus one of the residual codebook.

    A weight has one codebook; parts of it with codebooks of their own are parts of a ``Split`` or a ``SplitInput``.

    Attributes:
        vector_length: V; the last vector of a row may hold fewer numbers.
        index_bits: B, 1 to 16; the codebook has ``2 ** B`` entries.
        residual_bits: of the residual codebook's index, 1 to 16; 0 for none.
        entry_dtype: of the codebooks, ``"float16"`` or ``"bfloat16"``.
    """

    vector_length: int = 8
    index_bits: int = 8
    residual_bits: int = 0
    entry_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.vector_length < 1:
            raise ShapeError(f"vectors have at least one number, not {self.vector_length}", hint="for instance 8")
        if not 1 <= self.index_bits <= 16 or not 0 <= self.residual_bits <= 16:
            raise ShapeError(
                f"indices have 1 to 16 bits (or none for a residual), not {self.index_bits} and {self.residual_bits}",
                hint="shorten the vectors instead for more bits a weight",
            )
        if self.entry_dtype not in SCALE_DTYPES:
            raise ShapeError(
                f"codebooks cannot be stored as {self.entry_dtype!r}", hint=f"one of: {', '.join(SCALE_DTYPES)}"
            )

    @property
    def stages(self) -> tuple[int, ...]:
        """Bits of an index into each codebook."""
        return (self.index_bits, self.residual_bits) if self.residual_bits else (self.index_bits,)

    def count(self, in_features: int) -> int:
        """N, the vectors of a row."""
        return -(-in_features // self.vector_length)

    def book_bytes(self) -> int:
        """Bytes of the codebooks alone."""
        return sum(2**bits for bits in self.stages) * self.vector_length * SCALE_DTYPES[self.entry_dtype].itemsize

    def storage(self, out_features: int, in_features: int) -> Storage:
        """``index``, for wide indices ``high`` (the bits above the eighth), and ``entries``; likewise residual."""
        stored: Storage = {}
        count = self.count(in_features)
        for name, bits in zip(BOOKS, self.stages, strict=False):
            stored[f"{name}index"] = ((out_features, packed_size(count, min(bits, 8))), torch.uint8)
            if bits > 8:
                stored[f"{name}high"] = ((out_features, packed_size(count, bits - 8)), torch.uint8)
            stored[f"{name}entries"] = ((2**bits, self.vector_length), SCALE_DTYPES[self.entry_dtype])
        return stored

    def vectors(self, weight: Tensor) -> Tensor:
        """The vectors (O, N, V) of numbers (O, I), the last of a row filled up with zeros."""
        padded = functional.pad(weight, (0, -weight.shape[-1] % self.vector_length))
        return padded.unflatten(-1, (-1, self.vector_length))

    def fit(self, vectors: Tensor, bits: int, importance: Tensor | None = None, iterations: int = 100) -> Tensor:
        """Entries for vectors (..., V), float32 (2^bits, V): numbers that the entries' dtype holds exactly.

        Args:
            vectors: float32.
            bits: of an index.
            importance: weight of each vector (...).
            iterations: most of k-means.
        """
        weights = None if importance is None else importance.reshape(-1)
        found = cluster(vectors.reshape(-1, self.vector_length), 2**bits, weights, iterations=iterations)
        dtype = SCALE_DTYPES[self.entry_dtype]
        return found.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype).float()

    def encode(self, weight: Tensor) -> Tensors:
        """By k-means of the vectors, all alike important."""
        rest = self.vectors(weight.float())
        books, indices = [], []
        for bits in self.stages:
            books.append(self.fit(rest, bits))
            indices.append(nearest(rest.flatten(0, 1), books[-1]).view(rest.shape[:2]))
            rest = rest - books[-1][indices[-1]]
        return self.store(books, indices)

    def store(self, books: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensors:
        """The stored tensors of codebooks as ``fit`` gives them, and indices (O, N) into each."""
        stored: Tensors = {}
        for name, bits, book, index in zip(BOOKS, self.stages, books, indices, strict=False):
            stored[f"{name}index"] = pack((index & 255).to(torch.uint8), min(bits, 8))
            if bits > 8:
                stored[f"{name}high"] = pack((index >> 8).to(torch.uint8), bits - 8)
            stored[f"{name}entries"] = book.to(SCALE_DTYPES[self.entry_dtype])
        return stored

    def decode(self, tensors: Mapping[str, Tensor], in_features: int, dtype: torch.dtype) -> Tensor:
        """The entries that the indices name, and those of the residual added."""
        return codebook_decode(self.books(tensors), in_features, dtype)

    def books(self, tensors: Mapping[str, Tensor]) -> list[Book]:
        """The codebooks with their indices, as the kernels take them."""
        return [
            Book(tensors[f"{name}index"], tensors.get(f"{name}high"), tensors[f"{name}entries"])
            for name, _ in zip(BOOKS, self.stages, strict=False)
        ]

    def multiplies_packed(self) -> bool:
        """It does."""
        return True

    def multiplies_packed_transposed(self) -> bool:
        """It does."""
        return True

    def multiply_few(self, flat: Tensor, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """By looking up a small tile of the weight at a time."""
        return codebook_matmul(flat, self.books(tensors)) if few_rows(flat, *tensors.values()) else None

    def multiply_few_transposed(self, flat: Tensor, tensors: Mapping[str, Tensor], in_features: int) -> Tensor | None:
        """Likewise."""
        if not few_rows(flat, *tensors.values()):
            return None
        return codebook_matmul_transposed(flat, self.books(tensors), in_features)

    def rows(self, tensors: Mapping[str, Tensor], rows: slice) -> Tensors:
        """The indices of the rows, and all entries."""
        return {name: t if name.endswith("entries") else t[rows] for name, t in tensors.items()}

    def out_features(self, tensors: Mapping[str, Tensor]) -> int:
        """O."""
        return int(tensors["index"].shape[0])

    def row_bytes(self, in_features: int, dtype: torch.dtype) -> int:
        """The numbers alone where they are decoded by a compiled kernel.

        Otherwise these (twice with a residual), and for each vector its index; wide ones take shape in three pieces.
        """
        if decodes_in_place(dtype):
            return in_features * dtype.itemsize
        count, wide = self.count(in_features), max(self.stages) > 8
        numbers = count * self.vector_length * dtype.itemsize
        taking_shape = count * (13 if wide else 5)
        if len(self.stages) == 1:
            return max(numbers + 4 * count, taking_shape)
        return numbers + max(numbers + 4 * count, taking_shape)

    def workspace(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """A strip of rows, and the codebooks in ``dtype`` where plain torch makes them another than the stored one."""
        if decodes_in_place(dtype):
            return super().workspace(out_features, in_features, dtype)
        entries = SCALE_DTYPES[self.entry_dtype]
        cast = 0 if dtype is entries else 2 ** max(self.stages) * self.vector_length * dtype.itemsize
        return super().workspace(out_features, in_features, dtype) + cast
