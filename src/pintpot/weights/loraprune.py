"""LoRAPrune: learn adapters, let them tell which heads and channels matter, and take the others out for good.

Source:    Zhang et al. 2023, "LoRAPrune", arXiv:2305.18403, and the authors' code: the importance of a weight from the
           adapters' weights and gradients, ``|(B' A + B A' - B' A') * (W + s B A)|`` with ``'`` for gradients, summed
           over a head or channel and over the layers that it goes through, averaged over steps with 0.9; a share that
           rises cubically; equal shares in every layer.
Differs:   the first tenth of the layers and the last are pruned like the others, because a transformers configuration
           has one number of heads and of channels for all. Where queries share keys and values, what is taken out is a
           head of keys and values with its queries. Adapters are on all seven layers of a block.
Saves:     weights, real: the pruned model is an ordinary smaller one. Pruning takes the dense model, its activations in
           training, and 16 bytes for each number of the adapters; no gradient of a weight is held, but one layer's
           product of the adapters at a time.
Shapes:    weight (O, I); A (r, I), B (O, r); importance (heads of keys and values,) and (channels,).
Composes:  everything, as what comes out is a dense model.
Use when:  plain smaller matrices are wanted, and there is text to train on.
Not when:  there is none, or a grid is small enough: it loses far less for the same bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from pintpot.core.errors import CompositionError, DataError, UnsupportedModel
from pintpot.core.ledger import Account, Ledger
from pintpot.core.shape import ModelShape, block_names
from pintpot.core.technique import Claim, Source, Technique, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import Texts, risk_between
from pintpot.weights.gradients import loss_on

RISES = ((0.9, 0.04), (0.8, 0.1), (0.7, 0.35), (0.5, 1.6))
"""Share of heads and channels that is kept, and the relative rise of perplexity after training."""

INTO = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Layers whose out-features are pruned."""
OUT = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
"""The layer after them, whose in-features go with those."""


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


@dataclass
class _Units:
    """Heads of keys and values, or channels, of one block: what is taken out together.

    Attributes:
        into: the layers whose out-features they are.
        out: the layer whose in-features they are.
        count: how many there are.
        average: of their importance.
        kept: bool, those that are left.
    """

    into: tuple[AdaptedLinear, ...]
    out: AdaptedLinear
    count: int
    average: Tensor = field(init=False)
    kept: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.average = torch.zeros(self.count, device=self.out.mask.device)
        self.kept = torch.ones(self.count, dtype=torch.bool, device=self.out.mask.device)

    @torch.no_grad()
    def observe_(self) -> None:
        """Take in the importance that the last gradients give."""
        parts = [layer.importance() for layer in self.into] + [self.out.importance().t()]
        sums = [part.reshape(self.count, -1).sum(1) for part in parts]
        now = torch.stack([total / (total.norm() + 1e-8) for total in sums]).sum(0)
        self.average.mul_(0.9).add_(now, alpha=0.1)

    def prune_(self, kept: int) -> None:
        """Leave so many of the most important; what is gone stays gone."""
        score = self.average.masked_fill(~self.kept, -1.0)
        self.kept.zero_()[score.argsort(descending=True, stable=True)[:kept]] = True
        for layer in self.into:
            layer.mask.copy_(self.spread(len(layer.mask)))

    def spread(self, features: int) -> Tensor:
        """Which of a layer's features are left, bool."""
        return self.kept.repeat_interleave(features // self.count)


@technique(
    name="loraprune",
    wing="weights",
    source=Source("LoRAPrune: Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning", 2023, "2305.18403"),
    accounts=[Account.WEIGHTS],
    jobs=(),
    claims=[
        Claim("WikiText2 perplexity, lower by", 8.0, versus="LLM-Pruner", at="LLaMA, half pruned", where="abstract"),
        Claim("memory of pruning, less by %", 52.6, versus="LLM-Pruner", at="LLaMA, half pruned", where="abstract"),
    ],
    fidelity="every layer is pruned alike; heads of keys and values go with their queries",
)
@dataclass(frozen=True, kw_only=True)
class LoRAPrune(Technique):
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
        units = self._adapt_(model)
        trained = [p for own in units for layer in (*own.into, own.out) for p in (layer.first, layer.second)]
        adapters = {id(parameter) for parameter in trained}
        frozen = [p for p in model.parameters() if id(p) not in adapters]
        wanted = [p.requires_grad for p in frozen]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate)
        for parameter in frozen:
            parameter.requires_grad_(False)
        steps = epochs * len(texts)
        for step in range(steps):
            with torch.enable_grad():
                loss_on(model, texts[step % len(texts)]).backward()
            for own in units:
                own.observe_()
            if step % self.every == 0 or step == steps - 1:
                for own in units:
                    own.prune_(self._kept_at(step + 1 if step == steps - 1 else step, steps, own.count))
            optimizer.step()
            optimizer.zero_grad()
        for parameter, before in zip(frozen, wanted, strict=True):
            parameter.requires_grad_(before)
        self._shrink_(model, units)
        return model

    def _kept_at(self, step: int, steps: int, count: int) -> int:
        begin, end = self.warmup * steps, (1 - self.cooldown) * steps
        done = min(1.0, max(0.0, (step - begin) / max(1e-9, end - begin)))
        return count - int((count - self.kept(count)) * (1 - (1 - done) ** 3) + 1e-6)

    def _adapt_(self, model: PreTrainedModel) -> list[_Units]:
        """Adapters in the place of every block's layers; heads and channels of each block."""
        names = block_names(model)
        for name in (f"{block}.{layer}" for block in names for kind in INTO for layer in (*INTO[kind], OUT[kind])):
            if type(_find(model, name)) is not nn.Linear:
                raise UnsupportedModel(
                    f"loraprune: {type(model).__name__} has no linear layer {name}",
                    hint="give a dense model of the Llama family: Llama, Mistral, Qwen, Gemma",
                )
        generator = torch.Generator().manual_seed(self.seed)
        units = []
        for block in names:
            for kind, layers in INTO.items():
                made = [self._adapter_(model, f"{block}.{layer}", generator) for layer in (*layers, OUT[kind])]
                channels = len(made[0].mask)
                heads = model.config.num_key_value_heads if kind == "attention" else channels
                units.append(_Units(tuple(made[:-1]), made[-1], heads))
        return units

    def _adapter_(self, model: nn.Module, name: str, generator: torch.Generator) -> AdaptedLinear:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        new = AdaptedLinear(old, self.rank, self.alpha / self.rank, generator)
        model.set_submodule(name, new)
        return new

    @torch.no_grad()
    def _shrink_(self, model: PreTrainedModel, units: Iterable[_Units]) -> None:
        places = {module: name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
        for own in units:
            for layer in own.into:
                _place_(model, places[layer], layer, own.spread(len(layer.mask)), None)
            _place_(model, places[own.out], own.out, None, own.spread(own.out.base.in_features))
        for name, size in self._sizes(model.config).items():
            setattr(model.config, name, size)

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

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """The smaller model's weights."""
        return ledger.add(Account.WEIGHTS, self.pruned_shape(shape).weight_bytes - shape.weight_bytes)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From what is kept, after training."""
        return risk_between(RISES, self.kept_fraction)

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterator[LoRAPrune]:
        """From the safest to the smallest."""
        for kept in (0.9, 0.8, 0.7, 0.5):
            yield cls(kept_fraction=kept)


def _find(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _place_(model: nn.Module, name: str, layer: AdaptedLinear, rows: Tensor | None, columns: Tensor | None) -> None:
    """Put an ordinary layer of what is left in an adapted one's place."""
    weight, bias = layer.weight(), layer.base.bias
    weight = weight if rows is None else weight[rows]
    weight = weight if columns is None else weight[:, columns]
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    new.weight = nn.Parameter(weight.to(layer.base.weight.dtype).contiguous())
    if bias is not None:
        new.bias = nn.Parameter((bias if rows is None else bias[rows]).detach().clone())
    model.set_submodule(name, new.train(layer.training))
