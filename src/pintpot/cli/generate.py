"""``pintpot generate``: continue a prompt, or a file of prompts, within a memory budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pintpot.cli import _options


def command(
    model: _options.Model,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", metavar="FILE", help="Read the prompt from a text file.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a message; use the chat template.")] = False,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="JSONL", help="Many prompts: prompt, text or messages a line.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="JSONL", help="Where the completions of --prompts go.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="NAME", help="Of a merged model: which of its tasks (see `merge`).")
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", help="Most tokens to generate.")] = 128,
    batch: Annotated[int, typer.Option("--batch", help="Prompts at once.")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Choose among so many tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Choose among the tokens of this probability.")] = 1.0,
    device_memory: _options.DeviceMemory = None,
    host_memory: _options.HostMemory = None,
    disk: _options.Disk = None,
    weights_size: _options.WeightsSize = None,
    dtype: _options.DataType = None,
    techniques: _options.Techniques = None,
    cache: _options.CacheExpression = None,
    plan: _options.PlanFile = None,
    measure: _options.Measure = False,
    seed: _options.Seed = 0,
    json: _options.Json = False,
    quiet: _options.Quiet = False,
) -> None:
    """Continue a prompt, streaming the text; or complete a JSON Lines file of prompts."""
    from pintpot.cli._generate import Source, run
    from pintpot.core.workload import Budget
    from pintpot.jobs.choose import Wish
    from pintpot.jobs.generate import GenerateSettings
    from pintpot.jobs.sampling import Sampling

    run(
        model,
        Source(prompt=prompt, prompt_file=prompt_file, chat=chat, prompts=prompts, out=out),
        GenerateSettings(
            new_tokens=new_tokens,
            batch=batch,
            sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
            task=task,
        ),
        Wish(
            budget=Budget.of(device_memory, host_memory, disk),
            techniques=_options.joined(techniques, cache),
            plan=plan,
            weights_size=weights_size,
            dtype=dtype,
            seed=seed,
        ),
        _options.Show(json=json, quiet=quiet, measure=measure),
    )
