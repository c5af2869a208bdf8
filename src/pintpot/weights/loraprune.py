"""LoRAPrune: learn adapters, let them tell which heads and channels matter, and take the others out for good.

Source:    Zhang et al. 2023, "LoRAPrune", arXiv:2305.18403, and the authors' code: the importance of a weight from the
           adapters' weights and gradients, ``|(B' A + B A' - B' A') * (W + s B A)|`` with ``'`` for gradients, summed
           over a head or channel and over the layers that it goes through, averaged over steps with 0.9; a share that
           rises cubically; equal shares in every layer.
Differs:   the first tenth of the layers and the last are pruned like the others, because a transformers configuration
           has one number of heads and of channels for all. Where queries share keys and values, what is taken out is a
           head of keys and values with its queries. Adapters are on all seven layers of a block.
Saves:     weights, real: the pruned model is an ordinary smaller one. Pruning takes the dense model in 32 bits, its
           activations in training, and 16 bytes for each number of the adapters; no gradient of a weight is held, but
           one layer's product of the adapters at a time.
Shapes:    weight (O, I); A (r, I), B (O, r); importance (heads of keys and values,) and (channels,).
Composes:  everything, as what comes out is a dense model.
Use when:  plain smaller matrices are wanted, and there is text to train on.
Not when:  there is none, or a grid is small enough: it loses far less for the same bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from pintpot.core.errors import CompositionError, DataError, UnsupportedModel
from pintpot.core.ledger import Account, Ledger, Moment, Tier
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Compress, Workload
from pintpot.weights._base import CompressionReport, Texts, risk_between
from pintpot.weights.by_training import ByTraining, Follower, follow_, observe_
from pintpot.weights.forecast import kept_bytes, targets_of
from pintpot.weights.gradients import loss_on
from pintpot.weights.targets import Target, find_targets

RISES = ((0.9, 0.0005), (0.8, 0.0015), (0.7, 3.4), (0.5, 5.6))
"""Share of heads and channels that is kept, and the relative rise of perplexity, of the embedded model after 300 steps
in `results/weights.csv`, where the first fell; 0.7 from a shorter run. From there on one of its two heads of keys and
values is left."""

INTO = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
"""Layers of each part of a block whose out-features are pruned."""
OUT = {"self_attn": "o_proj", "mlp": "down_proj"}
"""The layer after them, whose in-features go with those."""
COUNTS = {"self_attn": "num_key_value_heads", "mlp": "intermediate_size"}
"""What the configuration calls the number of what is taken out."""
LAYERS = tuple(f"{part}.{layer}" for part in INTO for layer in (*INTO[part], OUT[part]))
"""All of them, by their names in a block."""
HINT = "give a dense model of the Llama family: Llama, Mistral, Qwen, Gemma"


class AdaptedLinear(nn.Module):
    """A frozen linear layer with an adapter, some of whose out-features are zero.

    Args:
        old: the dense layer, whose parameters are shared.
        rank: of the adapter.
        scale: of the adapter's product.
        generator: of the adapter's first factor.
    """

    mask: Tensor

    def __init__(self, old: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scale = old.requires_grad_(False), scale
        device = old.weight.device
        first = torch.randn((rank, old.in_features), generator=generator) / old.in_features**0.5
        self.first = nn.Parameter(first.to(device))
        self.second = nn.Parameter(torch.zeros((old.out_features, rank), device=device))
        self.register_buffer("mask", torch.ones(old.out_features, device=device))

    def forward(self, input: Tensor) -> Tensor:
        """``input`` (..., I) -> (..., O)."""
        change = functional.linear(functional.linear(input.to(self.first.dtype), self.first), self.second)
        return (self.base(input) + self.scale * change.to(input.dtype)) * self.mask.to(input.dtype)

    def weight(self) -> Tensor:
        """The dense weight with the adapter in it, (O, I)."""
        return self.base.weight.detach().float() + self.scale * (self.second @ self.first).detach()

    def importance(self) -> Tensor:
        """Of each number of the weight, (O, I), from the adapter's gradients."""
        if self.first.grad is None or self.second.grad is None:
            raise DataError("the adapters have no gradients yet", hint="run a backward pass before")
        gradient = self.second.grad @ self.first + (self.second - self.second.grad) @ self.first.grad
        return (gradient * self.weight()).abs_()


class Units(Follower):
    """Heads of keys and values, or channels, of one block: what is taken out together.

    Args:
        into: the layers whose out-features they are.
        out: the layer whose in-features they are.
        count: how many there are.
        method: says when how many are kept.
    """

    average: Tensor
    kept: Tensor
    updates: Tensor

    def __init__(self, into: Sequence[AdaptedLinear], out: AdaptedLinear, count: int, method: LoRAPrune) -> None:
        super().__init__()
        # In a tuple, because they are parts of the block and not of this module.
        self.layers = (*into, out)
        self.count, self.method = count, method
        device = out.mask.device
        self.register_buffer("average", torch.zeros(count, device=device))
        self.register_buffer("kept", torch.ones(count, dtype=torch.bool, device=device))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def observe_(self) -> None:
        """Take in the importance that the gradients give."""
        *into, out = self.layers
        sums = [layer.importance().reshape(self.count, -1).sum(1) for layer in into]
        sums.append(out.importance().reshape(len(out.mask), self.count, -1).sum((0, 2)))
        now = torch.stack([total / (total.norm() + 1e-8) for total in sums]).sum(0)
        self.average.mul_(0.9).add_(now, alpha=0.1)
        self.updates += 1

    def follow_(self, progress: float) -> None:
        """Prune when it is due; once the schedule is through, all that goes is gone."""
        if int(self.updates) % self.method.every == 0 or progress >= 1 - self.method.cooldown:
            self.prune_(self.method.kept_at(progress, self.count))

    @torch.no_grad()
    def prune_(self, kept: int) -> None:
        """Leave so many of the most important; what is gone stays gone."""
        score = self.average.masked_fill(~self.kept, -1.0)
        self.kept.zero_()[score.argsort(descending=True, stable=True)[:kept]] = True
        for layer in self.layers[:-1]:
            layer.mask.copy_(self.spread(len(layer.mask)))

    def spread(self, features: int) -> Tensor:
        """Which of a layer's features are left, bool."""
        return self.kept.repeat_interleave(features // self.count)


@dataclass(frozen=True)
class Adapted:
    """What became of a model.

    Attributes:
        units: what can be taken out of each part of a block, by the part's name.
        frozen: the parameters that could be trained before and are not now.
    """

    units: Mapping[str, Units]
    frozen: tuple[nn.Parameter, ...]


@technique(
    name="loraprune",
    wing="weights",
    source=Source("LoRAPrune: Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning", 2023, "2305.18403"),
    accounts=[Account.WEIGHTS],
    jobs=["compress"],
    claims=[
        Claim("WikiText2 perplexity, lower by", 8.0, versus="LLM-Pruner", at="LLaMA, half pruned", where="abstract"),
        Claim("memory of pruning, less by %", 52.6, versus="LLM-Pruner", at="LLaMA, half pruned", where="abstract"),
    ],
    fidelity="every layer is pruned alike; heads of keys and values go with their queries",
)
@dataclass(frozen=True, kw_only=True)
class LoRAPrune(ByTraining[Adapted]):
    """Heads and channels by importance, taken out while adapters are trained.

    Attributes:
        kept_fraction: share of heads and of channels that is kept.
        rank: of the adapters.
        alpha: the adapters' scale times the rank.
        warmup: share of the steps before anything is pruned.
        cooldown: share of the steps after the last is pruned.
        every: steps between prunings.
        learning_rate: of AdamW.
        seed: of the adapters.
    """

    kept_fraction: float = 0.5
    rank: int = 8
    alpha: float = 16.0
    warmup: float = 0.1
    cooldown: float = 0.1
    every: int = 10
    learning_rate: float = 3e-4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.kept_fraction <= 1 or self.warmup < 0 or self.cooldown < 0 or self.warmup + self.cooldown >= 1:
            raise CompositionError(
                f"loraprune cannot keep {self.kept_fraction} with {self.warmup} of the steps before pruning and "
                f"{self.cooldown} after",
                hint="a share above 0, up to 1; the defaults are warmup=0.1, cooldown=0.1",
            )
        if min(self.rank, self.every) < 1:
            raise CompositionError("loraprune needs a rank and steps of 1 or more", hint="the defaults are 8 and 10")

    def kept(self, units: int) -> int:
        """How many of so many are kept."""
        return max(1, int(self.kept_fraction * units + 0.5))

    def kept_at(self, progress: float, units: int) -> int:
        """How many of so many are left when this share of the training is done."""
        end = 1 - self.cooldown
        done = min(1.0, max(0.0, (progress - self.warmup) / (end - self.warmup)))
        return units - int((units - self.kept(units)) * (1 - (1 - done) ** 3) + 1e-6)

    def check(self, shape: ModelShape) -> None:
        """Refuse a model whose blocks are not those of Llama, or whose configuration does not settle their sizes."""
        config, found = shape.config, _layers(shape)
        for name in (f"{t.block}.{layer}" for t in targets_of(shape) for layer in LAYERS):
            if name not in found:
                raise UnsupportedModel(f"loraprune: {config.model_type} has no linear layer {name}", hint=HINT)
        counts: dict[str, Any] = {part: getattr(config, name, None) for part, name in COUNTS.items()}
        smaller = _layers(self.pruned_shape(shape)) if all(isinstance(n, int) for n in counts.values()) else {}
        for name, target in found.items():
            count = counts[name.split(".")[-2]]
            if not smaller or smaller[name].numel * count != target.numel * self.kept(count):
                raise UnsupportedModel(
                    f"loraprune: the configuration of {config.model_type} does not settle the size of {name}", hint=HINT
                )

    def prepare_(self, model: PreTrainedModel, texts: Texts = ()) -> Adapted:
        """Adapters in the place of every block's layers, and the heads and channels of each block.

        Raises:
            UnsupportedModel: naming the first layer that is not as it should be.
        """
        self.check(ModelShape.from_config(model.config, model.dtype))
        frozen = tuple(parameter for parameter in model.parameters() if parameter.requires_grad)
        generator = torch.Generator().manual_seed(self.seed)
        units = {}
        for block in dict.fromkeys(target.block for target in find_targets(model)[0]):
            for part in INTO:
                *into, out = (
                    self._adapter_(model, f"{block}.{part}.{layer}", generator) for layer in (*INTO[part], OUT[part])
                )
                own = Units(into, out, getattr(model.config, COUNTS[part]), self)
                model.get_submodule(f"{block}.{part}").add_module("units", own)
                units[f"{block}.{part}"] = own
        for parameter in frozen:
            parameter.requires_grad_(False)
        return Adapted(units, frozen)

    def _adapter_(self, model: nn.Module, name: str, generator: torch.Generator) -> AdaptedLinear:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        new = AdaptedLinear(old, self.rank, self.alpha / self.rank, generator)
        model.set_submodule(name, new)
        return new

    @torch.no_grad()
    def finish_(self, model: PreTrainedModel, prepared: Adapted, skeleton: nn.Module) -> CompressionReport:
        """Ordinary layers of what is left."""
        for parameter in prepared.frozen:
            parameter.requires_grad_(True)
        for part, own in prepared.units.items():
            kind = part.rpartition(".")[2]
            *into, out = own.layers
            for name, layer in zip(INTO[kind], into, strict=True):
                _place_(model, f"{part}.{name}", layer, own.spread(len(layer.mask)), None)
            _place_(model, f"{part}.{OUT[kind]}", out, None, own.spread(out.base.in_features))
            del model.get_submodule(part).units
        for name, size in self._sizes(model.config).items():
            setattr(model.config, name, size)
        targets, dense = find_targets(skeleton)
        pruned = [t for t in targets if t.module.removeprefix(f"{t.block}.") in LAYERS]
        return CompressionReport(
            compressed=tuple(t.parameter for t in pruned),
            left_dense=(*dense, *((t.parameter, "no heads or channels") for t in targets if t not in pruned)),
            dense_bytes=sum(t.numel * t.dtype.itemsize for t in pruned),
            packed_bytes=sum(model.get_parameter(t.parameter).numel() * t.dtype.itemsize for t in pruned),
        )

    def prune_(self, model: PreTrainedModel, texts: Texts, epochs: int = 1) -> PreTrainedModel:
        """Train adapters on texts, prune, and make the model an ordinary smaller one, in place.

        Args:
            model: of the Llama family, dense.
            texts: batches of token ids int64 (B, T), each a step.
            epochs: passes over them.

        Returns:
            The model, which ``save_pretrained`` writes as any other.

        Raises:
            UnsupportedModel: naming the first layer that is not as it should be.
            DataError: when there are no texts.
        """
        if not texts:
            raise DataError("loraprune learns from text, and there is none", hint="give batches of token ids")
        skeleton = ModelShape.from_config(model.config, model.dtype).build("meta")
        prepared = self.prepare_(model)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=self.learning_rate)
        steps = epochs * len(texts)
        for step in range(steps):
            with torch.enable_grad():
                loss_on(model, texts[step % len(texts)]).backward()
            observe_(model)
            optimizer.step()
            optimizer.zero_grad()
            follow_(model, (step + 1) / steps)
        self.finish_(model, prepared, skeleton)
        return model

    def _sizes(self, config: PretrainedConfig) -> Mapping[str, int]:
        """What changes in a configuration."""
        heads = self.kept(config.num_key_value_heads)
        return {
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "num_attention_heads": heads * (config.num_attention_heads // config.num_key_value_heads),
            "num_key_value_heads": heads,
            "intermediate_size": self.kept(config.intermediate_size),
        }

    def pruned_shape(self, shape: ModelShape) -> ModelShape:
        """The smaller model as shapes."""
        config = copy.deepcopy(shape.config)
        for name, size in self._sizes(config).items():
            setattr(config, name, size)
        return ModelShape.from_config(config, shape.dtype)

    def trained_numel(self, shape: ModelShape) -> int:
        """The adapters' numbers."""
        return self.rank * sum(sum(t.shape) for t in _layers(shape).values())

    def applying_bytes(self, shape: ModelShape, workload: Compress) -> int:
        """The model in 32 bits, adapters with gradients and Adam's moments, and activations or a layer's importance.

        Beside the matrices' inputs and outputs and the logits, a pass keeps a quarter as much again.
        """
        layers = tuple(_layers(shape).values())
        kept = kept_bytes(shape, layers, workload.batch * workload.tokens, torch.float32) * 5 // 4
        return 4 * shape.numel + 16 * self.trained_numel(shape) + max(kept, 16 * max(t.numel for t in layers))

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """The smaller model's weights; of compressing, its phase and the folder.

        Raises:
            UnsupportedModel: as ``check`` does.
        """
        self.check(shape)
        pruned = self.pruned_shape(shape).weight_bytes
        if isinstance(workload, Compress):
            apply = Moment("apply", {}).with_bytes(Account.WORKSPACE, self.applying_bytes(shape, workload))
            return Ledger("predicted", (apply.with_bytes(Account.CHECKPOINT, pruned, Tier.DISK),))
        return ledger.add(Account.WEIGHTS, pruned - shape.weight_bytes)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From what is kept, after training."""
        return risk_between(RISES, self.kept_fraction)

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterator[LoRAPrune]:
        """From the safest to the smallest."""
        for kept in (0.9, 0.8, 0.7, 0.5):
            yield cls(kept_fraction=kept)


def _layers(shape: ModelShape) -> dict[str, Target]:
    """The layers that are adapted, by name."""
    linear = (target for target in targets_of(shape) if target.matrices == 1 and not target.transposed)
    return {t.module: t for t in linear if t.module.removeprefix(f"{t.block}.") in LAYERS}


def _place_(model: nn.Module, name: str, layer: AdaptedLinear, rows: Tensor | None, columns: Tensor | None) -> None:
    """Put an ordinary layer of what is left in an adapted one's place."""
    weight, bias = layer.weight(), layer.base.bias
    weight = weight if rows is None else weight[rows]
    weight = weight if columns is None else weight[:, columns]
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    old = layer.base.weight
    new.weight = nn.Parameter(weight.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    if bias is not None:
        left = bias if rows is None else bias[rows]
        new.bias = nn.Parameter(left.detach().clone(), requires_grad=bias.requires_grad)
    model.set_submodule(name, new.train(layer.training))
