"""Measuring a machine: short runs of what models are made of."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig

from pintpot.core.shape import ModelShape
from pintpot.core.units import MiB
from pintpot.ledger import machine as record
from pintpot.ledger import steps
from pintpot.ledger.work_counter import LARGE_ALLOCATION_BYTES, WorkCounter

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW_ROWS = (1, 8)
"""Rows of products that are limited by how fast matrices are read."""
MANY_ROWS = (64, 512)
"""Rows of products that are limited by arithmetic."""

_READ_BYTES = {"cpu": 96 * MiB, "cuda": 1024 * MiB}
_DISK_BYTES = 64 * MiB
_LARGE_BYTES = {"cpu": 128 * MiB, "cuda": 1024 * MiB}
_LONG_ROW, _SHORT_ROW = 8192, 512
"""Columns of the large matrices: from long rows the rate of reading, from short ones what each row takes."""
_LEAST_SECONDS = 1e-12
_MEDIUM = {"cpu": 1024, "cuda": 8192}
_IN_CACHE = {"cpu": 512, "cuda": 2048}
_REPEAT_SECONDS = 0.3
_MOST_REPEATS = 200

Progress = Callable[[str, float], None]
"""Told what is measured now, and the share of the whole that is done."""


def measure_machine(progress: Progress | None = None) -> record.Machine:
    """Measure this machine, with as many threads as torch uses now, in under 20 s.

    Args:
        progress: told what is being measured.
    """
    tell = progress or (lambda what, done: None)
    kind = record.device_kind()
    folder = record.cache_folder()
    tell("memory", 0.0)
    read = _read_rate(kind)
    with _one_thread():
        single = _read_rate(kind)
    fresh = _fresh_rate() if kind == "cpu" else 0.0
    flops: dict[str, dict[str, float]] = {}
    stream: dict[str, dict[str, float]] = {}
    dots: dict[str, dict[str, float]] = {}
    for place, dtype in enumerate(DTYPES):
        name = str(dtype).removeprefix("torch.")
        tell(f"{name} products", 0.1 + 0.25 * place)
        flops[name] = _arithmetic(dtype, kind)
        stream[name], dots[name] = _reading(dtype, kind)
    tell("small operations", 0.85)
    small = _small_op_seconds(kind)
    tell("disk", 0.9)
    disk_read, disk_write = _disk_rates(folder)
    tell("done", 1.0)
    return record.Machine(
        host=platform.node(),
        kind=kind,
        device=record.device_name(kind),
        threads=torch.get_num_threads(),
        memory_bytes=record.memory_bytes(kind),
        disk_free_bytes=record.disk_free_bytes(folder),
        read_bytes_per_second=read,
        single_read_bytes_per_second=single,
        fresh_bytes_per_second=fresh,
        matmul_flops=flops,
        matmul_bytes_per_second=stream,
        matmul_dot_seconds=dots,
        small_op_seconds=small,
        disk_read_bytes_per_second=disk_read,
        disk_write_bytes_per_second=disk_write,
        versions=record.versions(),
    )


def best_seconds(run: Callable[[], object], *, seconds: float = _REPEAT_SECONDS, kind: str = "cpu") -> float:
    """The shortest of several runs, of which there are as many as fit into some seconds (two at least)."""
    _timed(run, kind)
    best = _timed(run, kind)
    end = time.perf_counter() + seconds
    for _ in range(_MOST_REPEATS):
        if time.perf_counter() > end:
            break
        best = min(best, _timed(run, kind))
    return best


def clock(kind: str = "cpu") -> Callable[[], float]:
    """The clock for code on this device: the processor's time on one thread, which other programs do not stretch."""
    return time.process_time if kind == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _timed(run: Callable[[], object], kind: str) -> float:
    now = clock(kind)
    start = now()
    run()
    if kind == "cuda":
        torch.cuda.synchronize()
    return now() - start


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read_rate(kind: str) -> float:
    data = torch.ones(_READ_BYTES[kind] // 4, device=kind)
    return data.nbytes / best_seconds(data.sum, seconds=0.5, kind=kind)


def _fresh_rate() -> float:
    """Bytes per second of mapping memory: the first writing of an allocation against the second."""
    count = 2 * LARGE_ALLOCATION_BYTES
    data = torch.zeros(count, dtype=torch.uint8)
    again = best_seconds(lambda: data.fill_(1))
    first = best_seconds(lambda: torch.empty(count, dtype=torch.uint8).fill_(1))
    return count / (first - again) if first > again else 0.0


def _arithmetic(dtype: torch.dtype, kind: str) -> dict[str, float]:
    """Operations per second by rows."""
    small = _matrix(_IN_CACHE[kind], _IN_CACHE[kind], dtype, kind)
    medium = _matrix(_MEDIUM[kind], _MEDIUM[kind], dtype, kind)
    matrices = {**dict.fromkeys(FEW_ROWS, small), **dict.fromkeys(MANY_ROWS, medium)}
    return {str(rows): 2.0 * rows * m.numel() / _product_seconds(m, rows, kind) for rows, m in matrices.items()}


def _reading(dtype: torch.dtype, kind: str) -> tuple[dict[str, float], dict[str, float]]:
    """For few rows, the rate at which large matrices are read, and the seconds that each of their rows takes."""
    rates: dict[str, float] = {}
    dots: dict[str, float] = {}
    numel = _LARGE_BYTES[kind] // dtype.itemsize
    long = _matrix(numel // _LONG_ROW, _LONG_ROW, dtype, kind)
    short = long.view(-1, _SHORT_ROW)
    for rows in FEW_ROWS:
        slow, fast = (_product_seconds(matrix, rows, kind) for matrix in (short, long))
        each = max(_LEAST_SECONDS, (slow - fast) / (short.shape[0] - long.shape[0]))
        rates[str(rows)] = long.nbytes / max(fast - each * long.shape[0], fast / 2)
        dots[str(rows)] = each
    return rates, dots


def _matrix(rows: int, columns: int, dtype: torch.dtype, kind: str) -> Tensor:
    # Ones, because random numbers of this size take longer to make than all that is measured with them.
    return torch.full((rows, columns), 0.01, dtype=dtype, device=kind)


def _product_seconds(matrix: Tensor, rows: int, kind: str) -> float:
    left = _matrix(rows, matrix.shape[1], matrix.dtype, kind)
    with torch.no_grad():
        return best_seconds(lambda: functional.linear(left, matrix), kind=kind)


def _small_op_seconds(kind: str) -> float:
    """Seconds per operation of a model so small that starting operations is all that takes time."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=6,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        model = ModelShape.from_config(config, torch.float32).build(kind)
    progress = steps.prefill(model, torch.zeros(1, 8, dtype=torch.long, device=kind))
    token = steps.choose(progress)
    seconds = best_seconds(lambda: steps.choose(steps.decode(model, token, progress)), seconds=0.5, kind=kind)
    with WorkCounter() as counter:
        steps.choose(steps.decode(model, token, progress))
    return seconds / counter.operations


def _disk_rates(folder: Path) -> tuple[float, float]:
    """Bytes per second of (reading, writing) a file that the page cache does not hold; it is removed."""
    size = min(_DISK_BYTES, record.disk_free_bytes(folder) // 4)
    block = os.urandom(MiB)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        start = time.perf_counter()
        for _ in range(max(1, size // MiB)):
            file.write(block)
        os.fsync(file.fileno())
        write = file.tell() / (time.perf_counter() - start)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(MiB):
            pass
        return file.tell() / (time.perf_counter() - start), write
