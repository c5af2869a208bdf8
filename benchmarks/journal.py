"""Runs of a long benchmark, each done once: kept in ``results/<name>.jsonl`` as they end, read back when run again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.rows import RESULTS, stamp

from pintpot.core.files import write_atomic


class Journal:
    """What has been measured, and how long the rest will take.

    Args:
        name: of the file.
        total: runs that there will be, for the estimate.
        again: measure anew what is there.
    """

    def __init__(self, name: str, total: int, *, again: bool = False) -> None:
        self._file = RESULTS / f"{name}.jsonl"
        self._again = again
        self._entries: dict[str, dict[str, Any]] = {}
        if self._file.is_file():
            lines = self._file.read_text(encoding="utf-8").splitlines()
            self._entries = {_key(entry["what"]): entry for entry in map(json.loads, lines)}
        self._total, self._done, self._measured, self._spent = total, 0, 0, 0.0

    def once(self, what: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures of one run, with its ``hardware``, ``versions``, ``commit`` and ``date``.

        Args:
            what: everything that decides the figures; a run that agrees in all of it is not repeated.
            measure: makes the figures.
        """
        key = _key(what)
        self._done += 1
        if key not in self._entries or self._again:
            start = time.perf_counter()
            found = stamp(measure())
            self._spent += time.perf_counter() - start
            self._measured += 1
            self._entries[key] = {"what": dict(what), "found": found}
            RESULTS.mkdir(exist_ok=True, parents=True)
            write_atomic(self._file, "".join(json.dumps(entry) + "\n" for entry in self._entries.values()))
            self._say(what, found)
        return dict(self._entries[key]["found"])

    def known(self, what: Mapping[str, Any]) -> dict[str, Any] | None:
        """The figures of a run that was measured before, or None; nothing is measured."""
        entry = self._entries.get(_key(what))
        return None if entry is None else dict(entry["found"])

    def _say(self, what: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        left = (self._total - self._done) * self._spent / self._measured
        named = ", ".join(str(what[key]) for key in ("way", "rate", "seed") if key in what)
        figures = ", ".join(f"{key} {value:.6g}" for key, value in found.items() if isinstance(value, int | float))
        print(f"[{self._done}/{self._total}] {named}: {figures}; about {left / 60:.0f} min left", flush=True)


def _key(what: Mapping[str, Any]) -> str:
    return json.dumps(what, sort_keys=True)
