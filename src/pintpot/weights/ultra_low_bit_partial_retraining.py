"""ULB-SAPR: learn the clipping of 2-bit groups and low-rank adapters, and hold the weights that matter in place.

Source:    "Enhancing Ultra-Low-Bit Quantization of Large Language Models Through Saliency-Aware Partial Retraining"
           2025, arXiv:2504.13932, and the repository TokuyuSou/ULB-SAPR, on top of ApiQ (Liao et al. 2024,
           arXiv:2402.05147): block by block, the ends of each group (sigmoids of learnt numbers times its extremes)
           and adapters of rank 64 are trained on the block's output, and rounded weights are held near the dense ones
           by the sum of squared differences times the squared gradients of the model's loss.
Differs:   a block is to give what the dense block gives for the same, compressed inputs (the authors' ``aug_loss``),
           not also what the dense model gives there. The regulariser's weight is relative to the output error at the
           start, because neither scale carries over to another model. The rank is at most a 64th of a matrix's smaller
           side, the authors' share in Llama 2 7B, so that adapters stay small; they have 16 bits, and no scale of their
           own. A block keeps what was trained only where its output error fell. Learning rates are four times the
           authors', who calibrate on 128 sequences and so make more steps.
Saves:     weights, real: rtn's bytes in groups of 64, and 2 R (O + I) for the adapters. Squared gradients take 4 bytes
           for each weight of the model until it is packed, which needs the whole dense model in memory once.
Shapes:    weight (O, I); codes (O, I) packed; scale and zero (O, N); adapters (O, R) and (R, I).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  2 or 3 bits, the dense model fits in memory, and there are minutes of work for each block.
Not when:  4 bits or more, where gptq comes as near in a fraction of the time, or little text to calibrate on: on the
           embedded model decoupleq comes nearer in the same bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Source, technique
from pintpot.core.workload import Compress, Workload
from pintpot.weights._base import Evidence, Layout, Texts, WeightMethod, risk_between
from pintpot.weights.examined import ExaminedLayout, Replaced
from pintpot.weights.forecast import targets_of
from pintpot.weights.formats import Dense, Format, Grid, LowRank, Tensors
from pintpot.weights.gradients import each_gradient, samples
from pintpot.weights.paused import hidden_of
from pintpot.weights.statistics import BlockCall, InputStatistics
from pintpot.weights.targets import Target
from pintpot.weights.trained import round_through
from pintpot.weights.tuning import multiplying, output_error

RISES = ((8.7, 0.0002), (4.7, 0.011), (3.7, 0.078), (2.9, 0.48), (2.6, 0.63), (2.5, 0.74))
"""Bits a weight and the relative rise of perplexity, of the embedded model in `results/weights.csv`."""

SMALLEST_SHARE = 64
"""The rank is at most the smaller side divided by this."""

OPEN = 4.0
"""What a group's ends start from: a sigmoid of 0.98 of its extremes (the authors' ``init_value``)."""


@technique(
    name="ultra-low-bit-partial-retraining",
    wing="weights",
    source=Source(
        "Enhancing Ultra-Low-Bit Quantization of Large Language Models Through Saliency-Aware Partial Retraining",
        2025,
        "2504.13932",
    ),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    fidelity="targets are the dense block's outputs on compressed inputs alone; the regulariser's weight is relative",
)
@dataclass(frozen=True, kw_only=True)
class UltraLowBitPartialRetraining(WeightMethod):
    """Learnt clipping and adapters, with a regulariser weighted by saliency.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: in-features that share a scale and a zero; -1 for a whole row.
        rank: of the adapters, at most.
        regularisation: weight of the regulariser; at 1 it counts at the start as much as the output error. 0 is ApiQ.
        epochs: passes over the texts in training a block; 0 leaves it as it was rounded.
        learning_rate: of the adapters.
        clipping_rate: learning rate of the clipping.
        weight_decay: of both.
    """

    calibrated: ClassVar[bool] = True
    examines: ClassVar[bool] = True
    looks_at_whole: ClassVar[bool] = True
    refines: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    bits: int = 2
    group_size: int = 64
    rank: int = 64
    regularisation: float = 0.3
    epochs: int = 20
    learning_rate: float = 2e-3
    clipping_rate: float = 2e-2
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        Grid(bits=self.bits, group_size=self.group_size)
        if self.bits < 2 or self.rank < 1 or self.epochs < 0 or self.regularisation < 0:
            raise CompositionError(
                f"{self.name} needs 2 bits, a rank of 1, and no negative epochs or regularisation",
                hint="the defaults are bits=2, rank=64, epochs=20, regularisation=0.3",
            )

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """A grid and adapters of 16 bits."""
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        rank = max(1, min(self.rank, min(out_features, in_features) // SMALLEST_SHARE))
        grid = Grid(bits=self.bits, group_size=self.group_size, scale_dtype=scale)
        return grid, LowRank(rank=rank, factor=Dense(dtype=getattr(torch, scale)))

    def layout(self, targets: Sequence[Target], evidence: Evidence | None = None) -> Layout:
        """The same formats for all, with the saliencies that training needs."""
        formats = super().layout(targets)
        return formats if evidence is None else ExaminedLayout(formats, evidence)

    def examine_model(self, model: PreTrainedModel, targets: Sequence[Target], texts: Texts) -> Evidence:
        """The mean over samples of each weight's squared gradient, float32 in the weight's shape."""
        if not (self.regularisation and self.epochs):
            return {}
        named = {t.parameter: t for t in targets}
        found = {t.parameter: {"saliency": torch.zeros(t.shape)} for t in targets}
        count = 0

        def take(name: str, gradient: Tensor) -> None:
            found[name]["saliency"] += named[name].rows(gradient).float().square().cpu()

        for text in samples(texts):
            each_gradient(model, list(named), text, take)
            count += 1
        for own in found.values():
            own["saliency"] /= max(1, count)
        return found

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """Where training starts: codes to nearest, and adapters whose product is zero (their right sides are not)."""
        grid, adapters = formats[0], formats[-1]
        if len(formats) != 2 or not isinstance(adapters, LowRank):
            return super().find(name, weight, formats)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        rows, columns = weight.shape
        right = (2 * torch.rand((adapters.rank, columns), generator=generator) - 1) / columns**0.5
        left = weight.new_zeros((rows, adapters.rank), dtype=torch.float32)
        return grid.encode(weight), adapters.encode_factors(left, right.to(weight.device))

    def retrain_block_(
        self,
        block: nn.Module,
        calls: Sequence[BlockCall],
        outputs: Sequence[Tensor],
        replaced: Sequence[Replaced],
    ) -> None:
        """Train clipping and adapters on the block's output; undone where the stored numbers turn out no better."""
        layers = [_Layer(own) for own in replaced if self._knows(own.holder.formats)]
        if not (self.epochs and layers):
            return
        held = [buffer for layer in layers for buffer in layer.holder.buffers(recurse=False)]
        kept = [buffer.clone() for buffer in held]
        before = output_error(block, calls, outputs)
        with multiplying({layer.holder: layer.multiply for layer in layers}):
            self._train_(block, calls, outputs, layers)
        for layer in layers:
            layer.store_()
        if not output_error(block, calls, outputs) < before:
            for buffer, old in zip(held, kept, strict=True):
                buffer.copy_(old)

    @staticmethod
    def _knows(formats: tuple[Format, ...]) -> bool:
        return [type(f) for f in formats] == [Grid, LowRank]

    def _train_(
        self, block: nn.Module, calls: Sequence[BlockCall], outputs: Sequence[Tensor], layers: Sequence[_Layer]
    ) -> None:
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for layer in layers for p in (layer.left, layer.right)], "lr": self.learning_rate},
                {"params": [p for layer in layers for p in (layer.low, layer.high)], "lr": self.clipping_rate},
            ],
            weight_decay=self.weight_decay,
        )
        drift = float(_drift(layers))
        share = self.regularisation * output_error(block, calls, outputs) / len(calls) / drift if drift > 0 else 0.0
        singles = [sample for call in calls for sample in call.samples()]
        wanted = [part for output in outputs for part in output.split(1)]
        with torch.enable_grad():
            for _ in range(self.epochs):
                for call, output in zip(singles, wanted, strict=True):
                    for layer in layers:
                        layer.round_()
                    loss = functional.mse_loss(hidden_of(block(*call.args, **call.kwargs)).float(), output.float())
                    if share:
                        loss = loss + share * _drift(layers)
                    optimizer.zero_grad()
                    # Where no layer's product took part, there is nothing to learn from.
                    if loss.requires_grad:
                        loss.backward(inputs=[p for group in optimizer.param_groups for p in group["params"]])
                        optimizer.step()

    def applying_bytes(self, shape: ModelShape, workload: Compress) -> int:
        """As of every method, and the saliencies."""
        return super().applying_bytes(shape, workload) + 4 * sum(t.numel for t in targets_of(shape))

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[UltraLowBitPartialRetraining]:
        """From the safest to the smallest."""
        for bits, group_size in ((4, 64), (3, 64), (2, 32), (2, 64), (2, 128)):
            yield cls(bits=bits, group_size=group_size)


class _Layer:
    """A packed layer in training: (..., O, I), float32; stacks of experts have a dimension before.

    Args:
        replaced: with a grid and adapters.
    """

    def __init__(self, replaced: Replaced) -> None:
        self.holder = replaced.holder
        grid, adapters = self.holder.formats
        assert isinstance(grid, Grid)
        assert isinstance(adapters, LowRank)
        self.grid, self.adapters = grid, adapters
        self.dense = replaced.weight.detach().float()
        found = replaced.evidence.get("saliency")
        self.saliency = None if found is None else found.to(self.dense.device)
        size = grid.group(self.dense.shape[-1])
        groups = functional.pad(self.dense, (0, -self.dense.shape[-1] % size)).unflatten(-1, (-1, size))
        self.bottom, self.top = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        self.low = nn.Parameter(torch.full_like(self.bottom, OPEN))
        self.high = nn.Parameter(torch.full_like(self.top, OPEN))
        stored = self.holder.get_buffer("term1_left_dense"), self.holder.get_buffer("term1_right_dense")
        self.left, self.right = (nn.Parameter(tensor.detach().float().clone()) for tensor in stored)
        self.round_()

    def _steps(self) -> tuple[Tensor, Tensor, Tensor]:
        """The codes, float32, and the scales and zeros as they are stored; gradients reach the ends of the groups."""
        grid, last = self.grid, (1 << self.grid.bits) - 1
        low, high = torch.sigmoid(self.low) * self.bottom, torch.sigmoid(self.high) * self.top
        scale, zero = grid.settle(low.detach(), high.detach())
        raw = (high - low) / last
        scale = raw + (scale - raw).detach()
        columns = self.dense.shape[-1]
        codes = round_through(self.dense / grid.by_column(scale, columns)) + grid.by_column(zero, columns)
        return codes.clamp(0, last), scale, zero

    def round_(self) -> None:
        """Make the rounded weight for what the ends of the groups are now."""
        codes, scale, zero = self._steps()
        columns = self.dense.shape[-1]
        self.rounded = (codes - self.grid.by_column(zero, columns)) * self.grid.by_column(scale, columns)

    def drift(self) -> Tensor:
        """Squared distance of the rounded weight from the dense one, weighted by saliency; 0 where that is unknown."""
        if self.saliency is None:
            return self.rounded.new_zeros(())
        return (self.saliency * (self.rounded - self.dense).square()).sum()

    def multiply(self, input: Tensor, row: int | None = None) -> Tensor:
        """As the packed layer's, differentiable in what is trained."""
        rounded, left, right = (t if row is None else t[row] for t in (self.rounded, self.left, self.right))
        return functional.linear(input, (rounded + left @ right).to(input.dtype))

    @torch.no_grad()
    def store_(self) -> None:
        """Put what was learnt into the packed layer."""
        codes, scale, zero = self._steps()
        columns, groups = codes.shape[-1], scale.shape[-1]
        stored = self.grid.store(
            codes.reshape(-1, columns).to(torch.uint8), scale.reshape(-1, groups), zero.reshape(-1, groups)
        )
        stored = {f"term0_{name}": tensor for name, tensor in stored.items()}
        for name, tensor in {**stored, "term1_left_dense": self.left, "term1_right_dense": self.right}.items():
            buffer = self.holder.get_buffer(name)
            buffer.copy_(tensor.reshape(buffer.shape))


def _drift(layers: Sequence[_Layer]) -> Tensor:
    return torch.stack([layer.drift() for layer in layers]).sum()
