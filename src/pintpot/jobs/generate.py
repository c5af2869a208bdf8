"""Generation: from prompts to text, within the memory that was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pintpot.core.files import refuse_existing
from pintpot.core.ledger import Ledger
from pintpot.core.plan import Plan
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Generate
from pintpot.jobs.assemble import assemble
from pintpot.jobs.choose import Wish, choose, require_fit
from pintpot.jobs.generator import (
    Completion,
    GenerateSettings,
    Generator,
    Prompt,
    Speed,
    encode_prompt,
    require_length,
)
from pintpot.jobs.load import load_tokenizer
from pintpot.jobs.model_source import model_folder
from pintpot.jobs.prompt_files import complete_file, read_prompts
from pintpot.ledger.measure import Run
from pintpot.ledger.measure import measure as measure_memory
from pintpot.weights import route_


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a generation gave.

    Attributes:
        completions: one for each prompt, in order; empty when they went to a file.
        plan: what was run, with the predicted ledger.
        speed: seconds and tokens.
        measured: the ledger of the run, when it was measured.
        written: lines written to the output file, those of earlier calls included.
    """

    completions: tuple[Completion, ...]
    plan: Plan
    speed: Speed
    measured: Ledger | None = None
    written: int = 0


def generate(
    model: str | Path,
    prompts: Prompt | Sequence[Prompt],
    *,
    settings: GenerateSettings | None = None,
    wish: Wish | None = None,
    measure: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue prompts.

    Args:
        model: a model folder or hub name.
        prompts: a text, or a list of texts, conversations (tuples of turns) or token id lists.
        settings: how many tokens and how they are chosen.
        wish: the memory budget, techniques or plan.
        measure: record the measured ledger.
        on_text: called with each new piece of text of a single prompt as it comes.

    Raises:
        PintpotError: for bad input, each kind with its own class and a hint.
    """
    settings = settings or GenerateSettings()
    listed: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts  # type: ignore[assignment]
    with ExitStack() as stack:
        generator, plan, run = prepare(model, listed, settings, wish or Wish(), stack if measure else None)
        if on_text is not None and len(listed) == 1:
            completions = [generator.complete_streaming(listed[0], on_text)]
        else:
            completions = generator.complete(listed)
    measured = None if run is None else run.ledger
    return Generation(completions=tuple(completions), plan=plan, speed=generator.speed, measured=measured)


def generate_file(
    model: str | Path,
    prompts: Path,
    out: Path,
    *,
    settings: GenerateSettings | None = None,
    wish: Wish | None = None,
    measure: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Generation:
    """Continue the prompts of a JSON Lines file into another one; the same call resumes a run that was stopped.

    Args:
        model: a model folder or hub name.
        prompts: lines with ``prompt`` or ``text`` (a text), or ``messages`` (a conversation).
        out: the file to write; each line is the prompt's with ``completion`` added.
        settings: how many tokens and how they are chosen.
        wish: the memory budget, techniques or plan.
        measure: record the measured ledger.
        progress: called with the lines done and the lines in all.

    Raises:
        PintpotError: for bad input, each kind with its own class and a hint.
        Interrupted: after Ctrl-C; the lines done are kept.
    """
    settings = settings or GenerateSettings()
    refuse_existing(out)
    lines = read_prompts(prompts)
    with ExitStack() as stack:
        asked = [line.prompt for line in lines]
        generator, plan, run = prepare(model, asked, settings, wish or Wish(), stack if measure else None)
        complete_file(
            lines,
            out,
            generator.complete,
            batch=settings.batch,
            progress=lambda done: progress(done, len(lines)),
        )
    measured = None if run is None else run.ledger
    return Generation(completions=(), plan=plan, speed=generator.speed, measured=measured, written=len(lines))


def prepare(
    model: str | Path,
    prompts: Sequence[Prompt],
    settings: GenerateSettings,
    wish: Wish,
    measuring: ExitStack | None = None,
) -> tuple[Generator, Plan, Run | None]:
    """A generator for these prompts and the plan it follows; every check comes before the weights are loaded.

    Args:
        model: a model folder or hub name.
        prompts: what will be continued.
        settings: how.
        wish: the memory budget, techniques or plan.
        measuring: what the measurement, from before the weights are loaded on, is entered into; None for none.
    """
    folder = model_folder(model)
    tokenizer = load_tokenizer(folder)
    config: Any = ModelShape.from_folder(folder).config
    lengths = Counter(len(encode_prompt(tokenizer, prompt)) for prompt in prompts)
    longest = max(lengths)
    require_length(config, longest, settings.new_tokens)
    batch = min(settings.batch, max(lengths.values()))
    workload = Generate(batch=batch, prompt_tokens=longest, new_tokens=settings.new_tokens)
    plan = require_fit(choose(folder, workload, wish, settings.task))
    run = None if measuring is None else measuring.enter_context(measure_memory(budget=plan.budget))
    with nullcontext() if run is None else run.phase("load"):
        live = assemble(folder, plan)
    if settings.task is not None:
        route_(live.model, settings.task)
    if run is not None:
        run.register(live.model)
    return Generator(live, tokenizer, settings), plan, run
