"""NVIDIA's kvpress on the cache benchmark's prompts, in an environment of its own; imports nothing of ours.

``python cache_kvpress.py PROMPTS RESULTS [--presses a,b]`` reads what ``cache_tasks.write_prompts`` wrote, and writes
as JSON what each prompt got under each press and share of the context, the bytes that the cache really held, and
seconds.
Run again it goes on where it stopped. As in kvpress's own pipeline, a press acts while the context is read; what is
asked is then read from the compressed cache, at the positions that follow the whole context.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

EAGER = ("ObservedAttentionPress",)
"""Presses that read attention weights, which only eager attention gives."""

ONE_BY_ONE = ("ChunkKV", "EntropyGated", "KVzip", "KVgrad", "KVCompose", "CriticalAda")
"""Presses that work on one prompt at a time."""

MASKED_AT_ONCE = 16
"""Tokens read together where heads keep different tokens: kvpress then looks for a key that none of them sees."""

ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)

PLAIN = (
    *("KeyDiffPress", "SnapKVPress", "LagKVPress", "ExpectedAttentionPress", "TOVAPress"),
    *("StreamingLLMPress", "KnormPress", "PyramidKVPress", "CompactorPress", "LeverageScorePress", "CURPress"),
    *("NonCausalAttnPress", "CapPress", "RandomPress"),
)
"""Presses that take a ratio and no other press, with their own defaults."""

WITH = {
    "LagKVPress": {"lag_size": 32},
    "SnapKVPress": {"window_size": 16},
    "PyramidKVPress": {"window_size": 16},
    "ExpectedAttentionPress": {"epsilon": 0.02},
    "KVzipPress": {"kvzip_plus_normalization": True},
}
"""Other settings: windows that suit a context of a thousand tokens, and what kvpress's own page recommends."""

WRAPPED = {
    "AdaKVPress": ("KeyDiffPress", "ExpectedAttentionPress", "SnapKVPress", "CompactorPress"),
    "BlockPress": ("KeyDiffPress",),
    "ChunkKVPress": ("SnapKVPress",),
    "CriticalKVPress": ("SnapKVPress",),
    "CriticalAdaKVPress": ("SnapKVPress",),
    "KeyRerotationPress": ("KeyDiffPress", "LeverageScorePress"),
    "MergingPress": ("SnapKVPress",),
}
"""Presses that change another press, and which."""

LAST = ("ObservedAttentionPress", "KVComposePress", "KVzipPress", "KVgradPress")
"""Presses that hold all attention weights, or read the context several times: they are slow, so they come last."""

Make = Callable[[float], Any]


def presses(stats: tuple[Tensor, Tensor]) -> dict[str, Make]:
    """Presses by name, made from a ratio.

    Args:
        stats: mean (L, H, D) and covariance (L, H, D, D) of the queries before rotation, for the press that has them
            from a calibration text.
    """

    def wrapped(outer: str, inner: str) -> Make:
        return lambda ratio: getattr(kvpress, outer)(getattr(kvpress, inner)(compression_ratio=ratio))

    def with_stats(ratio: float) -> Any:
        press = kvpress.ExpectedAttentionStatsPress(compression_ratio=ratio)
        press.mu, press.cov = stats
        return press

    def changed(name: str, settings: dict[str, Any]) -> Make:
        return lambda ratio: getattr(kvpress, name)(compression_ratio=ratio, **settings)

    found: dict[str, Make] = {name: changed(name, {}) for name in PLAIN}
    found |= {f"AdaKVPress({inner})": wrapped("AdaKVPress", inner) for inner in WRAPPED["AdaKVPress"]}
    found["ExpectedAttentionStatsPress"] = with_stats
    for name, settings in WITH.items():
        listed = ", ".join(f"{key}={value}" for key, value in settings.items())
        found[f"{name}({listed})"] = changed(name, settings)
    for outer, inners in WRAPPED.items():
        found |= {f"{outer}({inner})": wrapped(outer, inner) for inner in inners}
    found |= {name: changed(name, {}) for name in LAST}
    return dict(sorted(found.items(), key=lambda entry: entry[0].startswith(LAST)))


@torch.no_grad()
def query_statistics(model: PreTrainedModel, texts: Tensor, sinks: int = 4) -> tuple[Tensor, Tensor]:
    """Mean (L, H, D) and covariance (L, H, D, D) of queries before rotation, on texts (N, T) but for first tokens."""
    layers = model.model.layers
    seen: list[list[Tensor]] = [[] for _ in layers]
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out[:, sinks:]))
        for layer, kept in zip(layers, seen, strict=True)
    ]
    for text in texts.split(8):
        model.model(text, use_cache=False)
    for hook in hooks:
        hook.remove()
    heads = model.config.num_attention_heads
    queries = torch.stack([torch.cat(kept).flatten(0, 1).unflatten(-1, (heads, -1)).transpose(0, 1) for kept in seen])
    mean = queries.mean(dim=-2)
    centred = queries - mean.unsqueeze(-2)
    return mean, centred.transpose(-2, -1) @ centred / (queries.shape[-2] - 1)


class Prompts:
    """The file of prompts."""

    def __init__(self, file: Path) -> None:
        with safe_open(file, "pt") as opened:
            self.facts = opened.metadata()
            self.tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
        held = b"".join(name.encode() + ids.numpy().tobytes() for name, ids in self.tensors.items())
        self.digest = hashlib.sha256(held).hexdigest()[:12]
        self.ratios = [round(1 - float(kept), 6) for kept in self.facts["fractions"].split(",")]

    def tasks(self) -> Iterator[tuple[str, str, str]]:
        """Place, metric and unit of each task."""
        for task in range(int(self.facts["tasks"])):
            yield str(task), self.facts[f"{task}/metric"], self.facts[f"{task}/unit"]

    def readings(self, task: str, one_by_one: bool) -> Iterator[tuple[Tensor, list[tuple[Tensor, Tensor]]]]:
        """Context (B, C), and for each turn what is fed (B, F) and answered (B, A)."""
        for batch in range(int(self.facts[f"{task}/batches"])):
            place = f"{task}/{batch}"
            context = self.tensors[f"{place}/context"]
            turns = []
            while f"{place}/{len(turns)}/fed" in self.tensors:
                turns.append(tuple(self.tensors[f"{place}/{len(turns)}/{part}"] for part in ("fed", "answer")))
            size = 1 if one_by_one else len(context)
            for start in range(0, len(context), size):
                here = slice(start, start + size)
                yield context[here], [(fed[here], answer[here]) for fed, answer in turns]


def held_bytes(cache: DynamicCache) -> int:
    """Bytes of all storages of a cache."""
    tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def read(model: PreTrainedModel, cache: DynamicCache, ids: Tensor, position: int) -> Tensor:
    """Logits (B, S, V) of tokens (B, S) that stand at ``position``, and the cache with them.

    A mask made for one length does not suit layers that hold different numbers of tokens: these read token by token.
    """
    uneven = len({layer.keys.shape[-2] for layer in cache.layers}) > 1
    masked = any(getattr(layer.self_attn, "masked_key_indices", None) is not None for layer in model.model.layers)
    size = 1 if uneven else MASKED_AT_ONCE if masked else ids.shape[1]
    places = torch.arange(position, position + ids.shape[1])[None]
    pieces = zip(*(part.split(size, dim=1) for part in (ids, places)), strict=False)
    logits = [
        model(piece, past_key_values=cache, position_ids=place.expand(len(ids), -1)).logits for piece, place in pieces
    ]
    return torch.cat(logits, dim=1)


def score(unit: str, logits: Tensor, answer: Tensor) -> list[float]:
    """What each prompt gets, as in ``cache_tasks.score``."""
    if unit == "perplexity":
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), answer, reduction="none")
        return [round(float(nats), 5) for nats in losses.mean(dim=1)]
    right = logits.argmax(-1) == answer
    shares = right.all(dim=1).float() if unit == "accuracy" else right.float().mean(dim=1)
    return [round(float(share), 5) for share in shares]


def measure(model: PreTrainedModel, make: Callable[[], Any], prompts: Prompts, task: str, one: bool) -> dict[str, Any]:
    """Scores of each prompt and question, bytes of one sequence after all was read, seconds."""
    unit = prompts.facts[f"{task}/unit"]
    scores, size, begin = [], 0, time.perf_counter()
    for context, turns in prompts.readings(task, one):
        # kvpress draws from the global generator.
        torch.manual_seed(0)
        press, cache = make(), DynamicCache()
        # KVgrad asks for gradients; nothing else makes any.
        with torch.set_grad_enabled(type(press).__name__ == "KVgradPress"), press(model) if press else nullcontext():
            model.model(input_ids=context, past_key_values=cache)
        rotated_anew = isinstance(press, kvpress.KeyRerotationPress)
        position = cache.get_seq_length() if rotated_anew else context.shape[1]
        found = []
        with torch.no_grad():
            for fed, answer in turns:
                logits = read(model, cache, fed, position)
                found.append(score(unit, logits[:, -answer.shape[1] :], answer))
                position += fed.shape[1]
        scores += [list(prompt) for prompt in zip(*found, strict=True)]
        size = max(size, held_bytes(cache) // len(context))
    return {"scores": scores, "bytes": size, "seconds": round(time.perf_counter() - begin, 2)}


def load(folder: str, eager: bool = False) -> PreTrainedModel:
    """The model in float32."""
    kind = "eager" if eager else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=kind).eval()
    return model.requires_grad_(False)


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def load_results(file: Path, prompts: Prompts) -> dict[str, Any]:
    """What was measured before on the same prompts."""
    versions = " ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "kvpress"))
    hardware = f"{processor()}, {torch.get_num_threads()} threads"
    if file.is_file():
        results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if results["prompts"] == prompts.digest and results["versions"] == versions:
            return results
    return {"prompts": prompts.digest, "versions": versions, "hardware": hardware, "runs": []}


def save(file: Path, results: dict[str, Any]) -> None:
    """Replace the file as a whole."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(results), encoding="utf-8")
    os.replace(partial, file)


def main() -> None:
    """Measure every press at every ratio on every task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--presses", default="", help="names, comma-separated; all by default")
    options = parser.parse_args()
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    prompts = Prompts(options.prompts)
    results = load_results(options.results, prompts)
    model = load(prompts.facts["model"])
    found = presses(query_statistics(model, prompts.tensors["calibration"]))
    wanted = options.presses.split(",") if options.presses else list(found)
    runs = [("none", 0.0), *((name, ratio) for name in wanted for ratio in prompts.ratios)]
    done = {(run["press"], run["ratio"], run["metric"]) for run in results["runs"]}
    for index, (name, ratio) in enumerate(runs):
        used = load(prompts.facts["model"], eager=True) if name in EAGER else model
        make = (lambda name=name, ratio=ratio: found[name](ratio)) if name != "none" else (lambda: None)
        for task, metric, _ in prompts.tasks():
            if (name, ratio, metric) in done:
                continue
            try:
                figures = measure(used, make, prompts, task, name.startswith(ONE_BY_ONE))
            except ERRORS as error:
                figures = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            results["runs"].append({"press": name, "ratio": ratio, "metric": metric, **figures})
            save(options.results, results)
            shown = figures.get("error") or f"{figures['bytes']} bytes, {figures['seconds']} s"
            print(f"[{index + 1}/{len(runs)}] {name} {ratio:g} {metric}: {shown}", flush=True)


if __name__ == "__main__":
    main()
