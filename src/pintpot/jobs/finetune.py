"""Fine-tuning: from a model folder and some text to a folder that transformers (or peft, for adapters) loads.

See ``text_training`` for what it shares with pretraining: planning, checkpoints, resuming, what is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pintpot.core.errors import CompositionError
from pintpot.core.files import refuse_existing
from pintpot.core.model_folder import open_model
from pintpot.core.plan import Plan
from pintpot.core.workload import Finetune, Train
from pintpot.jobs.assemble import Rates, assemble
from pintpot.jobs.choose import Wish
from pintpot.jobs.load import load_tokenizer
from pintpot.jobs.model_source import model_folder
from pintpot.jobs.text import TextSettings, encode_parts, read_parts
from pintpot.jobs.text_training import TextJob, TextResult, train_on_text
from pintpot.ledger.predict import Assembled


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TextSettings):
    """How to fine-tune: as ``TextSettings``, and what becomes of adapters.

    Attributes:
        merge: fold adapters into the weights and write a whole model.
    """

    merge: bool = False


@dataclass(frozen=True, kw_only=True)
class FinetuneJob(TextJob):
    """Training of a model that exists.

    Attributes:
        merge: fold adapters into the weights before saving.
    """

    workload: ClassVar[type[Train]] = Finetune

    merge: bool = False

    def check(self, plan: Plan) -> None:
        """Refuse a merge of nothing, or into packed weights."""
        if self.merge and not plan.in_slot("adapters"):
            raise CompositionError("there are no adapters to merge", hint="drop --merge, or use adapters such as lora")
        if self.merge and plan.in_slot("weights"):
            raise CompositionError(
                "adapters cannot be merged into packed weights without rounding them away",
                hint="drop --merge and keep the adapter folder",
            )

    def assemble(self, plan: Plan, rates: Rates, place: Path) -> Assembled:
        """The model of the folder with the plan applied."""
        return assemble(self.source, plan, rates, place=place)

    def finished(self, model: Any, plan: Plan) -> Any:
        """The adapters, or the whole model in the dtype of the folder."""
        if self.merge:
            model = model.merge_and_unload()
        if self.merge or not plan.in_slot("adapters"):
            model.to(open_model(self.source, match=False).dtype)
        return model


def finetune(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    settings: FinetuneSettings | None = None,
    wish: Wish | None = None,
    measure: bool = False,
    progress: bool = True,
) -> TextResult:
    """Fine-tune a model; the same call resumes a run that was stopped.

    Args:
        model: a model folder or hub name.
        data: JSON Lines with ``text`` or ``messages``, a text file, or a folder of them.
        out: the folder to write; must not exist.
        settings: how to train.
        wish: the memory budget, techniques or plan.
        measure: record the measured ledger.
        progress: show progress.

    Raises:
        PintpotError: for bad input, each kind with its own class and a hint; nothing half-written is left.
        Interrupted: after Ctrl-C or SIGTERM, with a checkpoint written.
    """
    settings, wish = settings or FinetuneSettings(), wish or Wish()
    refuse_existing(out)
    folder = model_folder(model)
    job = FinetuneJob(source=folder, tokenizer=load_tokenizer(folder), merge=settings.merge)
    text = encode_parts(read_parts(data, settings, wish.seed), job.tokenizer, settings)
    return train_on_text(job, text, out, settings, wish, measure=measure, progress=progress)
