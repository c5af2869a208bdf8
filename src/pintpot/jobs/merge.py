"""The merge job: a base model and models that were fine-tuned from it in, one folder that can be any of them out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pintpot.core.errors import CompositionError, UnsupportedModel
from pintpot.core.expression import parse
from pintpot.core.files import refuse_existing
from pintpot.core.model_folder import has_tokenizer
from pintpot.core.slots import check
from pintpot.core.technique import Technique
from pintpot.jobs.compress import progress_bar
from pintpot.jobs.load import read_tokenizer
from pintpot.jobs.model_source import model_folder
from pintpot.weights.merging import MergeMethod, Tuned, plan_merge
from pintpot.weights.streaming import write_compressed

JOB = "merge"
METHOD = "1bit-merging"


@dataclass(frozen=True)
class Merged:
    """What a merge job did.

    Attributes:
        folder: the folder that was written.
        method: how.
        tasks: the names by which the models are chosen.
        source_bytes: bytes of all tensors of the base and the fine-tuned models.
        output_bytes: bytes of all tensors of the output.
        shared_bytes: bytes of those that are not of one task alone.
        seconds: of this run (the last one, if it was resumed).
    """

    folder: Path
    method: MergeMethod
    tasks: tuple[str, ...]
    source_bytes: int
    output_bytes: int
    shared_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "folder": str(self.folder),
            "technique": str(self.method),
            "tasks": list(self.tasks),
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "shared_bytes": self.shared_bytes,
            "seconds": round(self.seconds, 3),
        }


def merge(
    base: str | Path,
    models: Mapping[str, str | Path] | Sequence[Tuned],
    out: str | Path,
    *,
    technique: str | Technique = METHOD,
    progress: bool = False,
    check_disk: bool = True,
) -> Merged:
    """Merge models that were fine-tuned from one base into one folder; run again to resume.

    Takes the memory of one parameter of each model. The output is loaded like a compressed folder, and
    ``pintpot.weights.route_(model, task)`` or ``pintpot generate OUT --task TASK`` switches it to a task.

    Args:
        base: the dense folder or hub name of the model that all were made of; its tokenizer and settings go along.
        models: the fine-tuned models' folders or hub names by task, or with where each has terms of its own.
        out: the folder to write; it must not exist.
        technique: how, or an expression such as ``"1bit-merging(modules=mlp)"``.
        progress: show a progress bar on stderr.
        check_disk: refuse to start when the disk cannot hold the output.

    Raises:
        CompositionError: when the technique does not merge, or tasks are not named once each.
        UnsupportedModel: when a model is compressed, or is not of the base's architecture, sizes or vocabulary.
        PintpotError: as ``pintpot.weights.merging.merge_folders`` does.
    """
    refuse_existing(out)
    method = _method(technique)
    source = model_folder(base)
    named = [Tuned(task, Path(folder)) for task, folder in models.items()] if isinstance(models, Mapping) else models
    tuned = [replace(model, folder=model_folder(model.folder)) for model in named]
    start = time.monotonic()
    plan = plan_merge(source, tuned, method)
    require_same_tokenizer(source, [model.folder for model in tuned])
    with progress_bar(progress, f"merging into {Path(out).name}") as step:
        write_compressed(plan, out, progress=step, check_disk=check_disk)
    return Merged(
        folder=Path(out),
        method=method,
        tasks=tuple(model.task for model in tuned),
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        shared_bytes=plan.output_bytes
        - sum(plan.targets[name].nbytes(terms[1:]) for name, terms in plan.layout.items()),
        seconds=time.monotonic() - start,
    )


def require_same_tokenizer(base: Path, others: Sequence[Path]) -> None:
    """Refuse models whose tokenizers give other ids than the base's; folders without a tokenizer are not compared.

    Raises:
        UnsupportedModel: naming the folder, and a token that differs.
    """
    if not has_tokenizer(base):
        return
    ours = read_tokenizer(base).get_vocab()
    for folder in others:
        theirs = read_tokenizer(folder).get_vocab() if has_tokenizer(folder) else ours
        wrong = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        if wrong:
            raise UnsupportedModel(
                f"the tokenizer of {folder} is not that of {base}: {wrong[0]!r} is {theirs.get(wrong[0])}, not "
                f"{ours.get(wrong[0])} ({len(wrong)} tokens differ)",
                hint="merge models that were fine-tuned without changing the base's vocabulary",
            )


def _method(technique: str | Technique) -> MergeMethod:
    chosen = parse(technique) if isinstance(technique, str) else (technique,)
    check(chosen, JOB)
    if len(chosen) != 1 or not isinstance(chosen[0], MergeMethod):
        raise CompositionError("merging takes exactly one technique that merges", hint=f"for instance {METHOD}")
    return chosen[0]
