"""What this machine can do: the rates from which run times are forecast, measured once and kept in a file.

Rates are the best of a few repetitions, so that other work on the machine disturbs them little; a forecast is for a
machine that does nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from pintpot._version import __version__
from pintpot.core.files import write_atomic

SCHEMA = 2
"""Raised when what is measured changes, so that older files are measured again."""

Table = Mapping[str, Mapping[str, float]]
"""Rates by dtype name and by number of rows (written as text, as JSON keys are)."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The rates of one machine with one number of threads.

    Attributes:
        host: its name.
        kind: ``"cpu"`` or ``"cuda"``: where tensors are held and computed with.
        device: the processor's name.
        threads: threads of one operation on the CPU.
        memory_bytes: all memory of the device.
        disk_free_bytes: free space where the cache folder is.
        read_bytes_per_second: reading memory with all threads.
        single_read_bytes_per_second: the same with one thread.
        fresh_bytes_per_second: first use of newly mapped memory, beyond the time of writing it; 0.0 where that costs
            nothing.
        matmul_flops: operations per second of products of a matrix with some rows, by dtype; for few rows on matrices
            that stay in the processor's cache, so that reading them is not part of it.
        matmul_bytes_per_second: rate at which products with few rows read matrices that are larger than the cache.
        matmul_dot_seconds: what each row of a matrix adds to these products, beyond reading it.
        small_op_seconds: starting one operation from Python, among the modules of a small model.
        disk_read_bytes_per_second: reading a file that is not in memory.
        disk_write_bytes_per_second: writing a file until it is safe.
        versions: of what the rates depend on.
    """

    host: str
    kind: str
    device: str
    threads: int
    memory_bytes: int
    disk_free_bytes: int
    read_bytes_per_second: float
    single_read_bytes_per_second: float
    fresh_bytes_per_second: float
    matmul_flops: Table
    matmul_bytes_per_second: Table
    matmul_dot_seconds: Table
    small_op_seconds: float
    disk_read_bytes_per_second: float
    disk_write_bytes_per_second: float
    versions: Mapping[str, str]

    def product_flops(self, dtype: str, rows: int) -> float:
        """Operations per second of products with so many rows (float32's where the dtype was not measured)."""
        return _between(self.matmul_flops.get(dtype) or self.matmul_flops["float32"], rows)

    def product_bytes_per_second(self, dtype: str, rows: int) -> float:
        """Rate at which products with so many rows read their matrices; beyond those measured, the memory's."""
        table = self.matmul_bytes_per_second.get(dtype) or self.matmul_bytes_per_second["float32"]
        if rows > max(int(count) for count in table):
            return self.read_bytes_per_second
        return _between(table, rows)

    def dot_seconds(self, dtype: str, rows: int) -> float:
        """What each row of a matrix adds to products with so many rows; beyond those measured, nothing."""
        table = self.matmul_dot_seconds.get(dtype) or self.matmul_dot_seconds["float32"]
        return 0.0 if rows > max(int(count) for count in table) else _between(table, rows)


def machine(refresh: bool = False, *, measure: Callable[[], Machine] | None = None) -> Machine:
    """The rates of this machine: from the cache folder, or measured now (under 20 s) and kept there.

    They are kept for each host, processor, number of threads and version of torch. A file that cannot be read is
    measured again.

    Args:
        refresh: measure even where there are figures.
        measure: how; `pintpot.ledger.machine_rates.measure_machine` when absent.
    """
    file = cache_folder() / f"machine-{_key()}.json"
    kept = None if refresh else _read(file)
    if kept is not None:
        return kept
    # Imported late: it builds a small model, and with it comes the model library.
    from pintpot.ledger.machine_rates import measure_machine

    measured = (measure or measure_machine)()
    write_atomic(file, json.dumps(asdict(measured), indent=2) + "\n")
    return measured


def cache_folder() -> Path:
    """Where facts about this machine are kept: ``$PINTPOT_CACHE``, else ``pintpot`` in the user's cache folder.

    Where that cannot be written to, a folder of this user among the temporary files.
    """
    own = os.environ.get("PINTPOT_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "pintpot"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        usable = False
    else:
        usable = os.access(folder, os.W_OK)
    if not usable:
        folder = Path(tempfile.gettempdir()) / f"pintpot-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def device_kind() -> str:
    """``"cuda"`` where torch can use a GPU, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(kind: str) -> str:
    """The name of the GPU, or of the processor."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def memory_bytes(kind: str) -> int:
    """All memory of the device."""
    if kind == "cuda":
        return int(torch.cuda.get_device_properties().total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions() -> dict[str, str]:
    """Versions that the rates depend on."""
    return {"pintpot": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}


def disk_free_bytes(folder: Path) -> int:
    """Free space of the disk that a folder is on."""
    return shutil.disk_usage(folder).free


def from_dict(data: Any) -> Machine:
    """The record that ``asdict`` made.

    Raises:
        ValueError: when it is something else.
    """
    kinds = {f.name: f.type for f in fields(Machine)}
    if not isinstance(data, dict) or set(data) != set(kinds):
        raise ValueError("not a machine record")
    for name, value in data.items():
        kind = kinds[name]
        good = {
            "str": isinstance(value, str),
            "int": _is_number(value) and value == int(value),
            "float": _is_number(value),
            "Table": _is_table(value),
        }.get(str(kind), isinstance(value, dict))
        if not good:
            raise ValueError(f"{name} of a machine record cannot be {value!r}")
    return Machine(**data)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_table(value: Any) -> bool:
    rows = list(value.values()) if isinstance(value, dict) and "float32" in value else [None]
    return all(
        isinstance(row, dict) and row and all(k.isdigit() and _is_number(v) and v > 0 for k, v in row.items())
        for row in rows
    )


def _read(file: Path) -> Machine | None:
    try:
        return from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _key() -> str:
    kind = device_kind()
    facts = [SCHEMA, platform.node(), kind, device_name(kind), str(torch.__version__), torch.get_num_threads()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _between(table: Mapping[str, float], rows: int) -> float:
    """The value at so many rows, from those measured around it, linear in the logarithms; the outermost beyond."""
    points = sorted((math.log(int(count)), math.log(value)) for count, value in table.items())
    place = math.log(max(1, rows))
    if place <= points[0][0]:
        return math.exp(points[0][1])
    for (left, low), (right, high) in pairwise(points):
        if place <= right:
            return math.exp(low + (high - low) * (place - left) / (right - left))
    return math.exp(points[-1][1])
