"""Slower tiers under a cache: rows of numbers in host memory or in a file, of which a few are fetched at a time.

Host memory (pinned) stands under a model on a GPU. Under a model in host memory it is a file without a name, which is
gone when it is closed, whatever ends the process.

Shapes: B batch, K key-value heads, T tokens, n chosen tokens, W numbers of a row. Rows lie in blocks of
``BLOCK_TOKENS`` tokens, in each block head by head and in each head token by token: a block is one read, and tokens
that follow one another are one too.
"""

from __future__ import annotations

import copy
import errno
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pintpot.cache._base import LayerSizes
from pintpot.core.errors import BudgetError, CompositionError
from pintpot.core.ledger import Tier
from pintpot.core.units import format_bytes

BLOCK_TOKENS = 256
"""Tokens of a block, and by which a tier grows."""

FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has numbers, and not only a shape."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def tier_below(folder: str, device: torch.device | None = None) -> Tier:
    """Where a cache puts what it does not hold.

    Args:
        folder: disk is asked for by naming one.
        device: that the model is on; the one that torch would use where not given.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device.type
    return Tier.DISK if folder or kind == "cpu" else Tier.HOST


def tier_bytes(tokens: int, heads: int, width: int, batch: int, dtype: torch.dtype) -> int:
    """Bytes that a tier takes for ``tokens`` rows of each head."""
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS * batch * heads * width * dtype.itemsize


@dataclass(frozen=True)
class Runs:
    """Chosen tokens that lie one behind the other, in the tier and where they go: arrays of equal length.

    Attributes:
        block: in which block.
        head: of which sequence and head, counted together.
        inside: first token in the block.
        count: tokens.
        target: first row where they go.
    """

    block: np.ndarray
    head: np.ndarray
    inside: np.ndarray
    count: np.ndarray
    target: np.ndarray

    @classmethod
    def of(cls, chosen: Tensor, wanted: Tensor | None) -> Runs:
        """The runs among chosen tokens (B, K, n), those left out for which ``wanted`` is False."""
        tokens = chosen.detach().cpu().numpy().reshape(-1)
        target = np.arange(tokens.size)
        if wanted is not None:
            target = np.flatnonzero(wanted.detach().cpu().numpy().reshape(-1))
            tokens = tokens[target]
        begins = np.ones(tokens.size, dtype=bool)
        begins[1:] = (
            (np.diff(tokens) != 1)
            | (np.diff(target) != 1)
            | (tokens[1:] % BLOCK_TOKENS == 0)
            | (target[1:] % chosen.shape[-1] == 0)
        )
        starts = np.flatnonzero(begins)
        first, target = tokens[starts], target[starts]
        counts = np.diff(np.append(starts, tokens.size))
        return cls(first // BLOCK_TOKENS, target // chosen.shape[-1], first % BLOCK_TOKENS, counts, target)

    def __iter__(self) -> Iterator[tuple[int, int, int, int, int]]:
        columns = (self.block, self.head, self.inside, self.count, self.target)
        return zip(*(column.tolist() for column in columns), strict=True)


class Rows(ABC):
    """Rows of one layer on a slower tier: appended in order, read by blocks or one by one.

    Args:
        like: gives batch, heads, width, dtype and device: (B, K, any, W).

    Attributes:
        tokens: rows of each head so far.
    """

    def __init__(self, like: Tensor) -> None:
        self.batch, self.heads, _, self.width = like.shape
        self.dtype, self.device = like.dtype, like.device
        self.tokens = 0

    @property
    def blocks(self) -> int:
        """Blocks that are begun."""
        return -(-self.tokens // BLOCK_TOKENS)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * self.dtype.itemsize

    def nbytes(self) -> int:
        """Bytes on the tier, the last block's spare room included."""
        return tier_bytes(self.tokens, self.heads, self.width, self.batch, self.dtype)

    def append(self, rows: Tensor) -> None:
        """Put rows (B, K, T, W) behind those that are there.

        Raises:
            BudgetError: when the tier is full.
        """
        position = 0
        while position < rows.shape[2]:
            block, inside = divmod(self.tokens, BLOCK_TOKENS)
            count = min(BLOCK_TOKENS - inside, rows.shape[2] - position)
            self._write(block, inside, rows[:, :, position : position + count])
            self.tokens += count
            position += count

    def block(self, index: int) -> Tensor:
        """All rows of one block, on the device: (B, K, up to ``BLOCK_TOKENS``, W)."""
        return self._read(index)[:, :, : self.tokens - index * BLOCK_TOKENS].to(self.device, non_blocking=True)

    def gather(self, chosen: Tensor, out: Tensor | None = None, wanted: Tensor | None = None) -> Tensor:
        """Some rows of each head, on the device.

        Args:
            chosen: numbers of tokens, int64 (B, K, n).
            out: has rows (B, K, n, W) already; is written to, or not.
            wanted: which rows are to be fetched, bool (B, K, n); the others are ``out``'s.

        Returns:
            (B, K, n, W).
        """
        if out is None:
            out = torch.empty((*chosen.shape, self.width), dtype=self.dtype, device=self.device)
        if not has_values(out):
            return out
        direct = self.device.type == "cpu"
        target = out if direct else self._host((*chosen.shape, self.width))
        numbers = _bytes_of(target).reshape(-1, self.row_bytes)
        for block, head, inside, count, row in Runs.of(chosen, wanted):
            self._copy(block, head, inside, numbers[row : row + count])
        if direct:
            return target
        fetched = target.to(self.device, non_blocking=True)
        return fetched if wanted is None else torch.where(wanted[..., None], fetched, out)

    def _host(self, shape: tuple[int, ...]) -> Tensor:
        """Host memory that a GPU can copy from while it computes, where there is one."""
        return torch.empty(shape, dtype=self.dtype, pin_memory=self.device.type == "cuda" and torch.cuda.is_available())

    @abstractmethod
    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put the sequences in another order, or some of them there more than once: see ``StoreState``."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """What is held in host memory."""

    @abstractmethod
    def _write(self, block: int, inside: int, rows: Tensor) -> None:
        """Write rows (B, K, n, W) that stay within one block."""

    @abstractmethod
    def _read(self, block: int) -> Tensor:
        """One block with its spare room: (B, K, BLOCK_TOKENS, W) in host memory."""

    @abstractmethod
    def _copy(self, block: int, head: int, inside: int, target: np.ndarray) -> None:
        """Fill bytes (n, row_bytes) with the rows from ``inside`` on."""


class HostRows(Rows):
    """Rows in host memory, pinned where the model is on a GPU."""

    def __init__(self, like: Tensor) -> None:
        super().__init__(like)
        self._blocks: list[Tensor] = []

    def tensors(self) -> Iterator[Tensor]:
        """See ``Rows.tensors``."""
        yield from self._blocks

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``Rows.over_batch_``."""
        for index, block in enumerate(self._blocks):
            changed = change(block)
            self._blocks[index] = self._host(tuple(changed.shape)).copy_(changed)
            self.batch = changed.shape[0]

    def _write(self, block: int, inside: int, rows: Tensor) -> None:
        if block == len(self._blocks):
            self._blocks.append(self._host((self.batch, self.heads, BLOCK_TOKENS, self.width)))
        self._blocks[block][:, :, inside : inside + rows.shape[2]].copy_(rows)

    def _read(self, block: int) -> Tensor:
        return self._blocks[block]

    def _copy(self, block: int, head: int, inside: int, target: np.ndarray) -> None:
        source = _bytes_of(self._blocks[block]).reshape(-1, BLOCK_TOKENS, self.row_bytes)
        target[:] = source[head, inside : inside + len(target)]


class DiskRows(Rows):
    """Rows in a file without a name. A file of shapes alone (a rehearsal) is never opened.

    Args:
        like: see ``Rows``.
        folder: where the file is; the system's folder for temporary files where empty.

    Raises:
        CompositionError: when there is no such folder, or it cannot be written to.
    """

    def __init__(self, like: Tensor, folder: str = "") -> None:
        super().__init__(like)
        self.folder = os.path.expanduser(folder) or tempfile.gettempdir()
        self._file = _open(self.folder) if has_values(like) else None

    def tensors(self) -> Iterator[Tensor]:
        """See ``Rows.tensors``."""
        yield from ()

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``Rows.over_batch_``: the file is written anew, block by block."""
        other = self._changed(change)
        self._file, self.batch = other._file, other.batch

    def __deepcopy__(self, memo: dict[int, Any]) -> DiskRows:
        """The same rows in a file of their own."""
        return self._changed(lambda held: held)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> DiskRows:
        batch = change(torch.arange(self.batch)).shape[0]
        other = copy.copy(self)
        other.batch = batch
        if self._file is not None:
            other._file, other.tokens = _open(self.folder), 0
            for index in range(self.blocks):
                other.append(change(self._read(index)))
            other.tokens = self.tokens
        return other

    @property
    def _head_bytes(self) -> int:
        """Bytes of one head in a block."""
        return BLOCK_TOKENS * self.row_bytes

    @property
    def _block_bytes(self) -> int:
        return self.batch * self.heads * self._head_bytes

    def _write(self, block: int, inside: int, rows: Tensor) -> None:
        rows = rows.detach().cpu().contiguous()
        if self._file is None:
            return
        numbers = _bytes_of(rows).reshape(self.batch * self.heads, -1)
        start = block * self._block_bytes
        try:
            if not inside:
                _claim(self._file.fileno(), start, self._block_bytes)
            if numbers.size == self._block_bytes:
                self._put(numbers.reshape(-1), start)
                return
            for head, row in enumerate(numbers):
                self._put(row, start + head * self._head_bytes + inside * self.row_bytes)
        except OSError as error:
            if error.errno not in FULL_ERRORS:
                raise
            raise BudgetError(
                f"there is no room for {format_bytes(start + self._block_bytes)} of cache in {self.folder} "
                f"({error.strerror})",
                hint="free some space there, or name another folder: folder=/path/to/it",
            ) from error

    def _put(self, numbers: np.ndarray, offset: int) -> None:
        done = 0
        while self._file is not None and done < numbers.size:
            done += os.pwrite(self._file.fileno(), numbers[done:].data, offset + done)

    def _get(self, numbers: np.ndarray, offset: int) -> None:
        done = 0
        while self._file is not None and done < numbers.size:
            got = os.preadv(self._file.fileno(), [numbers[done:].data], offset + done)
            if not got:
                raise OSError(errno.EIO, f"the cache's file in {self.folder} has become shorter")
            done += got

    def _read(self, block: int) -> Tensor:
        rows = torch.empty((self.batch, self.heads, BLOCK_TOKENS, self.width), dtype=self.dtype)
        if self._file is not None:
            self._get(_bytes_of(rows).reshape(-1), block * self._block_bytes)
        return rows

    def _copy(self, block: int, head: int, inside: int, target: np.ndarray) -> None:
        offset = block * self._block_bytes + head * self._head_bytes + inside * self.row_bytes
        self._get(target.reshape(-1), offset)


def open_rows(like: Tensor, folder: str) -> Rows:
    """Empty rows on the tier below the device of ``like`` (B, K, any, W)."""
    below_device = tier_below(folder, like.device)
    return DiskRows(like, folder) if below_device is Tier.DISK else HostRows(like)


def row_width(sizes: LayerSizes) -> int:
    """Numbers of a row that holds a key and a value."""
    return sizes.key_dim + sizes.value_dim


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """A contiguous tensor in host memory as bytes, not copied."""
    found: np.ndarray = tensor.view(torch.uint8).numpy()
    return found


def _open(folder: str) -> Any:
    try:
        return tempfile.TemporaryFile(dir=folder, buffering=0)
    except OSError as error:
        raise CompositionError(
            f"the cache cannot have a file in {folder} ({error.strerror})",
            hint="name a folder that is there and can be written to: folder=/path/to/it",
        ) from error


def _claim(file: int, offset: int, size: int) -> None:
    """Claim room, so that a full disk is found before anything is half written."""
    try:
        os.posix_fallocate(file, offset, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(file, offset + size)
