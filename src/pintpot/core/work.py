"""The work of a run, in bytes moved and operations done: what the time forecast is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class PhaseWork:
    """The work of one phase (one prefill, one decoded token, one training step).

    Attributes:
        read_bytes: bytes read from and written to device memory.
        flops: floating-point operations by dtype name (``"float32"``, ``"bfloat16"``).
        disk_bytes: bytes read from or written to disk.
        overhead_seconds: time that neither bytes nor operations explain, beside that of starting `operations`.
        product_bytes: of `read_bytes`, those of matrix products, which are moved while `flops` are done; the others
            are moved by operations that do little else, and their time adds up.
        dots: rows of the matrices of these products, each of which takes a moment however short it is.
        fresh_bytes: bytes of allocations so large that the operating system is asked for them each time.
        operations: operations started one by one from Python.
    """

    read_bytes: int = 0
    flops: Mapping[str, float] = field(default_factory=dict)
    disk_bytes: int = 0
    overhead_seconds: float = 0.0
    product_bytes: int = 0
    dots: int = 0
    fresh_bytes: int = 0
    operations: int = 0

    def plus(
        self,
        *,
        read_bytes: int = 0,
        flops: float = 0.0,
        dtype: str = "float32",
        disk_bytes: int = 0,
        overhead_seconds: float = 0.0,
    ) -> PhaseWork:
        """This work and some more (or, with negative figures, less)."""
        return replace(
            self,
            read_bytes=max(0, self.read_bytes + read_bytes),
            flops={**self.flops, dtype: max(0.0, self.flops.get(dtype, 0.0) + flops)},
            disk_bytes=max(0, self.disk_bytes + disk_bytes),
            overhead_seconds=self.overhead_seconds + overhead_seconds,
        )


@dataclass(frozen=True)
class Work:
    """The work of a job by phase: ``prefill`` and ``decode`` (one token), or ``step`` (one update)."""

    phases: Mapping[str, PhaseWork] = field(default_factory=dict)

    def plus(
        self,
        phase: str,
        *,
        read_bytes: int = 0,
        flops: float = 0.0,
        dtype: str = "float32",
        disk_bytes: int = 0,
        overhead_seconds: float = 0.0,
    ) -> Work:
        """More (or less) work in one phase; a phase that the job lacks is left out."""
        if phase not in self.phases:
            return self
        more = self.phases[phase].plus(
            read_bytes=read_bytes,
            flops=flops,
            dtype=dtype,
            disk_bytes=disk_bytes,
            overhead_seconds=overhead_seconds,
        )
        return replace(self, phases={**self.phases, phase: more})
