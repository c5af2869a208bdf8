"""Measuring a run: `with pintpot.measure(model=model, optimizer=optimizer) as run: ...; run.ledger`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pintpot.core.ledger import Account, Ledger, Tier
from pintpot.core.workload import Budget
from pintpot.ledger.process import ProcessMemory
from pintpot.ledger.tracker import Tracker


class Run:
    """A run being measured, or that was."""

    def __init__(self, tracker: Tracker, process: ProcessMemory, budget: Budget) -> None:
        self.tracker = tracker
        self.budget = budget
        self._process = process
        self._start = time.perf_counter()
        self._seconds: float | None = None
        self._disk_bytes = 0

    def register(self, model: nn.Module | None = None, optimizer: Optimizer | None = None) -> None:
        """Recognise a model or an optimizer made only now, and the weights that it keeps on disk."""
        self.tracker.register(model, optimizer)
        self._disk_bytes += getattr(getattr(optimizer, "store", None), "disk_bytes", 0)

    def assign(self, value: Any, account: Account) -> None:
        """Say which account the tensors reachable from `value` belong to."""
        self.tracker.assign(value, account)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Name the phase of a block of code; otherwise the model's and optimizer's calls tell it."""
        return self.tracker.phase(name)

    def current_bytes(self, tier: Tier = Tier.DEVICE) -> int:
        """Bytes held now."""
        return self.tracker.current_bytes(tier)

    @property
    def ledger(self) -> Ledger:
        """What was measured, so far or in all; `process_bytes` and `written_bytes` are known at the end."""
        seconds = time.perf_counter() - self._start if self._seconds is None else self._seconds
        facts: dict[str, Any] = {"seconds": round(seconds, 3)}
        if self._process.written_bytes is not None:
            facts["written_bytes"] = self._process.written_bytes
        if self.budget.to_dict():
            facts["budget"] = self.budget.to_dict()
        ledger = self.tracker.ledger()
        if self._disk_bytes:
            ledger = ledger.set(Account.WEIGHTS, self._disk_bytes, Tier.DISK)
        return replace(ledger, process_bytes=self._process.growth_bytes, facts=facts)

    @property
    def within_budget(self) -> bool:
        """Whether the peaks were within the budget on every tier it limits."""
        ledger = self.ledger
        limits = ((tier, self.budget.limit(tier)) for tier in (Tier.DEVICE, Tier.HOST))
        return all(limit is None or ledger.peak_bytes(tier) <= limit for tier, limit in limits)

    def finish(self) -> None:
        """Keep the time that the run took."""
        self._seconds = time.perf_counter() - self._start


@contextmanager
def measure(
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    *,
    budget: Budget | str | int | None = None,
) -> Iterator[Run]:
    """Measure the memory of whatever runs inside, by account, over time, with the process's own figure beside it.

    Costs some time for every operation and removes all of its hooks at the end; nothing outside the run is touched.

    Args:
        model: whose weights, gradients and caches to tell apart; more can be registered on the run.
        optimizer: whose state to tell apart.
        budget: noted in the ledger, and what `within_budget` compares with; a size is that of the device.
    """
    limit = budget if isinstance(budget, Budget) else Budget.of(budget)
    tracker = Tracker()
    tracker.register(model, optimizer)
    process = ProcessMemory(tracker.device)
    run = Run(tracker, process, limit)
    try:
        with process, tracker:
            tracker.note()
            yield run
    finally:
        run.finish()
