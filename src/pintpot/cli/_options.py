"""Options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder (Hugging Face format), or a hub name.")]
DeviceMemory = Annotated[
    str | None, typer.Option("--device-memory", metavar="SIZE", help="Most device memory to use, such as 6GiB.")
]
HostMemory = Annotated[
    str | None, typer.Option("--host-memory", metavar="SIZE", help="Most host memory to use beside a GPU.")
]
Disk = Annotated[str | None, typer.Option("--disk", metavar="SIZE", help="Most disk space to use.")]
Techniques = Annotated[
    str | None,
    typer.Option("--techniques", metavar="EXPR", help="Use these, such as 'rtn4*lagkv*kivi2' (see `techniques`)."),
]
CacheExpression = Annotated[
    str | None, typer.Option("--cache", metavar="EXPR", help="Use these for the KV cache, such as 'lagkv*kivi2'.")
]
WeightsSize = Annotated[
    str | None,
    typer.Option("--weights-size", metavar="SIZE", help="Load so much of a folder compressed with bitstack."),
]
PlanFile = Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="Run this plan (see `plan`).")]
DataType = Annotated[
    str | None, typer.Option("--dtype", metavar="NAME", help="float32, bfloat16 or float16; the model's own if absent.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]
Json = Annotated[bool, typer.Option("--json", help="Print the facts as JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]
Batch = Annotated[int | None, typer.Option("--batch", help="Sequences at once.")]
PromptTokens = Annotated[int | None, typer.Option("--prompt-tokens", help="Length of the prompt (generate).")]
NewTokens = Annotated[int | None, typer.Option("--new-tokens", help="Tokens to generate (generate).")]
Tokens = Annotated[int | None, typer.Option("--tokens", help="Length of a training sequence (training).")]
Steps = Annotated[int | None, typer.Option("--steps", help="Updates (training).")]

SequenceTokens = Annotated[int, typer.Option("--tokens", help="Length of the packed sequences.")]
Sequences = Annotated[int, typer.Option("--batch", help="Sequences in each pass.")]
Accumulate = Annotated[int, typer.Option("--accumulate", help="Passes in one update.")]
Updates = Annotated[int | None, typer.Option("--steps", help="Updates; by --epochs if absent.")]
Epochs = Annotated[float, typer.Option("--epochs", help="How often each text is seen.")]
LearningRate = Annotated[
    float | None,
    typer.Option("--learning-rate", "--lr", help="The highest, after warm-up; by default the optimizer's usual."),
]
WeightDecay = Annotated[float, typer.Option("--weight-decay", help="Decoupled from the gradient.")]
Validation = Annotated[float, typer.Option("--validation", help="Share of the documents held out.")]
ValidateEvery = Annotated[int, typer.Option("--validate-every", help="Updates between validations.")]
CheckpointEvery = Annotated[int, typer.Option("--checkpoint-every", help="Updates between checkpoints.")]
Measure = Annotated[bool, typer.Option("--measure", help="Show measured beside predicted memory.")]


def joined(techniques: str | None, cache: str | None) -> str | None:
    """One expression from the general one and that of the cache; ``None`` when neither is given."""
    given = [text for text in (techniques, cache) if text]
    return "*".join(given) if given else None


@dataclass(frozen=True, kw_only=True)
class Show:
    """What is printed beside the answer."""

    json: bool = False
    quiet: bool = False
    measure: bool = False
