"""The demonstration: a trained model made to fit where it does not fit by itself, everything measured on the spot.

Generation: the value planted in a long prompt must be recalled within a budget that the plain run exceeds.
Fine-tuning: a held-out loss must be reached within a budget that plain AdamW training exceeds.
Each budget is a share of what the plain run was measured to need; the planner chooses the techniques.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pintpot import reference
from pintpot.core.errors import OutputExists
from pintpot.core.expression import expression
from pintpot.core.files import write_atomic
from pintpot.core.ledger import Ledger
from pintpot.core.plan import Plan
from pintpot.core.units import KiB, format_bytes
from pintpot.core.workload import Budget, Finetune
from pintpot.jobs.choose import Wish, choose
from pintpot.jobs.finetune import FinetuneSettings, finetune
from pintpot.jobs.generate import generate
from pintpot.jobs.generator import GenerateSettings
from pintpot.jobs.measure_run import measure_run
from pintpot.ledger.report import html as write_html
from pintpot.ledger.report import picture
from pintpot.reference.corpus import read_corpus, standard_library
from pintpot.reference.material import encode_documents
from pintpot.reference.tasks import Prompt, make_recall_prompt, task_vocabulary
from pintpot.reference.tokenizer import load_tokenizer

SUMMARY = "demo.json"
"""The file that marks a folder as an earlier demonstration's, which may be replaced."""

Say = Callable[[str], None]
"""Shows one line to whoever watches."""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What is demonstrated.

    Attributes:
        model: the folder of the model.
        prompt_tokens: length of the prompt in which a value is planted.
        depths: where it is planted, one prompt each (0 the beginning, 1 the end).
        generate_share: the budget for generation, as a share of the plain run's measured peak.
        finetune_share: the same for fine-tuning.
        finetune: how to fine-tune.
        loss_share: the held-out loss to reach, as a share of the loss before.
        seed: of every random choice.
    """

    model: Path
    prompt_tokens: int = 1000
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    generate_share: float = 0.4
    finetune_share: float = 0.4
    finetune: FinetuneSettings = field(
        default_factory=lambda: FinetuneSettings(
            tokens=256, batch=4, steps=40, learning_rate=2e-3, validation_fraction=0.1, checkpoint_every=1000
        )
    )
    loss_share: float = 0.75
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Part:
    """One half of the demonstration.

    Attributes:
        title: what it is.
        budget: the bytes allowed.
        plain: the measured ledger of the plain run.
        plan: what the planner chose.
        measured: the measured ledger of the planned run.
        quality: what is shown beside the memory, as a sentence.
        good: whether the quality is what was promised.
    """

    title: str
    budget: Budget
    plain: Ledger
    plan: Plan
    measured: Ledger
    quality: str
    good: bool

    @property
    def passed(self) -> bool:
        """Whether the plain run exceeds the budget, the planned one keeps it, and the quality is right."""
        limit = self.budget.device or 0
        return self.plain.peak_bytes() > limit >= self.measured.peak_bytes() and self.good

    def to_dict(self) -> dict[str, Any]:
        """JSON-able facts."""
        return {
            "title": self.title,
            "budget_bytes": self.budget.device,
            "plain_bytes": self.plain.peak_bytes(),
            "techniques": expression(self.plan.techniques),
            "predicted_bytes": self.plan.predicted.peak_bytes(),
            "measured_bytes": self.measured.peak_bytes(),
            "quality": self.quality,
            "passed": self.passed,
        }


def demo(out: Path, settings: DemoSettings | None = None, say: Say = lambda line: None) -> tuple[Part, ...]:
    """Run both halves and write pictures, pages, plans and a summary into a folder.

    Args:
        out: the folder; one that an earlier demonstration wrote is replaced.
        settings: what to demonstrate; on the embedded model when absent.
        say: shows progress.

    Raises:
        OutputExists: when the folder holds something else.
    """
    settings = settings or DemoSettings(model=reference.path())
    with _replacing(out) as folder:
        parts = (_generation(settings, say), _finetuning(settings, folder, say))
        for name, part in zip(("generate", "finetune"), parts, strict=True):
            ledgers = {"plain": part.plain, "predicted": part.plan.predicted, "measured": part.measured}
            picture(folder / f"{name}.png", ledgers, part.budget, part.title)
            write_html(folder / f"{name}.html", ledgers, part.budget, part.title)
        write_atomic(folder / SUMMARY, json.dumps([part.to_dict() for part in parts], indent=1))
    return parts


def _generation(settings: DemoSettings, say: Say) -> Part:
    tokenizer = load_tokenizer(settings.model)
    prompts = _recall_prompts(settings)
    new_tokens = max(len(prompt.answer) for prompt in prompts)
    ids = [prompt.input_ids.tolist() for prompt in prompts]
    generating = GenerateSettings(new_tokens=new_tokens, stop_at_end=False)
    say(f"generating after prompts of {settings.prompt_tokens} tokens, plain")
    plain = generate(settings.model, ids, settings=generating, wish=Wish(techniques="none"), measure=True)
    budget = _budget(plain.measured, settings.generate_share)
    say(f"plain: {_peak(plain.measured)} measured. Planning for {budget}")
    done = generate(
        settings.model, ids, settings=generating, wish=Wish(budget=budget, seed=settings.seed), measure=True
    )
    say(f"with {expression(done.plan.techniques)}: {_peak(done.measured)} measured")
    right, right_plain = (
        sum(list(c.tokens) == p.answer.tolist() for c, p in zip(run.completions, prompts, strict=True))
        for run in (done, plain)
    )
    asked = tokenizer.decode(prompts[0].input_ids[-8:].tolist())
    example = f"...{asked.strip()} ->{done.completions[0].text!r}"
    return Part(
        title=f"generation after {settings.prompt_tokens} tokens",
        budget=budget,
        plain=_ledger(plain.measured),
        plan=done.plan,
        measured=_ledger(done.measured),
        quality=f"{right} of {len(prompts)} planted values recalled (plain {right_plain}), e.g. {example}",
        good=right >= right_plain and right > 0,
    )


def _finetuning(settings: DemoSettings, folder: Path, say: Say) -> Part:
    training = settings.finetune
    data = folder / "data.jsonl"
    write_atomic(data, "".join(json.dumps({"text": text}) + "\n" for text in _unseen_texts()))
    workload = Finetune(batch=training.batch, tokens=training.tokens, steps=training.steps or 1)
    say(f"fine-tuning on {training.batch} x {training.tokens} tokens a step, plain AdamW, two steps")
    plain = measure_run(choose(settings.model, workload, Wish(techniques="none")))
    budget = _budget(plain, settings.finetune_share)
    say(f"plain: {_peak(plain)} measured. Planning for {budget}")
    wish = Wish(budget=budget, seed=settings.seed)
    done = finetune(
        settings.model, data, folder / "finetuned", settings=training, wish=wish, measure=True, progress=False
    )
    say(f"with {expression(done.plan.techniques)}: {_peak(done.measured)} measured")
    before, after = done.loss_before or math.nan, done.loss_after or math.nan
    goal = settings.loss_share * before
    return Part(
        title=f"fine-tuning on {training.batch} x {training.tokens} tokens",
        budget=budget,
        plain=plain,
        plan=done.plan,
        measured=_ledger(done.measured),
        quality=f"held-out loss {before:.3f} -> {after:.3f} in {done.training.steps} steps (goal {goal:.3f})",
        good=after <= goal,
    )


def _recall_prompts(settings: DemoSettings) -> list[Prompt]:
    """One prompt for each depth, in text that the model was not trained on."""
    tokenizer = load_tokenizer(settings.model)
    vocabulary = task_vocabulary(tokenizer)
    _, held_out = read_corpus()
    filler = encode_documents(tokenizer, held_out)
    return [
        make_recall_prompt(filler, vocabulary, tokens=settings.prompt_tokens, depth=depth, seed=settings.seed + place)
        for place, depth in enumerate(settings.depths)
    ]


def _unseen_texts() -> Iterator[str]:
    """Character tables of the standard library: text that every Python carries and the model never saw."""
    for file in sorted((standard_library() / "encodings").glob("cp*.py")):
        yield file.read_text(encoding="utf-8")


def _budget(ledger: Ledger | None, share: float) -> Budget:
    """A share of a measured peak, as a round number of 256 KiB."""
    step = 256 * KiB
    return Budget(device=math.floor(_ledger(ledger).peak_bytes() * share / step) * step)


def _ledger(ledger: Ledger | None) -> Ledger:
    return ledger if ledger is not None else Ledger("measured")


def _peak(ledger: Ledger | None) -> str:
    return format_bytes(_ledger(ledger).peak_bytes())


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """The output folder, emptied when an earlier demonstration wrote it.

    Raises:
        OutputExists: when it holds something else.
    """
    if out.exists() and any(out.iterdir()) and not (out / SUMMARY).is_file():
        raise OutputExists(f"{out} holds something else", hint="choose another folder with --out")
    fresh = out.with_name(out.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    shutil.rmtree(out, ignore_errors=True)
    fresh.replace(out)
