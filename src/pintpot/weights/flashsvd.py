"""FlashSVD: factorised feed-forwards that work through the tokens in tiles, so that nothing wide ever lies there whole.

Source:    Shao et al. 2025, "FlashSVD", arXiv:2508.01506: inference with singular-value factors where the intermediate
           of the feed-forward is made, used and dropped tile by tile.
Differs:   tiles are of tokens, in plain operations; the authors also tile the intermediate's width, in fused GPU
           kernels. The factors are the singular vectors of each weight at one share of the parity rank (the paper takes
           those of any method). Attention is left as it is: in a decoder its keys and values are what the cache holds.
Saves:     weights, real: all but the share that is asked for. Activations, real: of a prompt's feed-forward only a
           tile's worth, which the planner learns from its rehearsal, not from the closed form. Applying it needs one
           dense matrix and its singular vectors.
Shapes:    weight (O, I); factors (O, R) and (R, I); hidden states (..., T, H), of which tile_tokens at a time are
           widened.
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights. With gradients
           the feed-forward runs whole.
Use when:  prompts are long, intermediates are wide, and factors have been chosen over rounding.
Not when:  tokens are decoded one at a time: there is nothing to tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pintpot.core.errors import ShapeError, UnsupportedModel
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import Evidence, Layout
from pintpot.weights.factorised import FactorisedMethod
from pintpot.weights.statistics import BlockCall
from pintpot.weights.targets import Target

FEED_FORWARDS = (
    {"gate_proj", "up_proj", "down_proj"},
    {"c_fc", "c_proj"},
    {"fc1", "fc2"},
    {"wi", "wo"},
    {"wi_0", "wi_1", "wo"},
)
"""What the layers of a feed-forward are called, in the kinds of models that have a module for it."""


@technique(
    name="flashsvd",
    wing="weights",
    source=Source("FlashSVD: Memory-Efficient Inference with Streaming for Low-Rank Models", 2025, arxiv="2508.01506"),
    accounts=[Account.WEIGHTS, Account.ACTIVATIONS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim(
            "peak activation memory saved, %", 70.2, versus="factors without tiles", at="BERT-Base", where="abstract"
        ),
        Claim("transient memory saved, %", 75.0, versus="factors without tiles", at="BERT-Base", where="abstract"),
    ],
    fidelity="the feed-forward only, tiled by tokens; no fused kernels",
)
@dataclass(frozen=True, kw_only=True)
class FlashSVD(FactorisedMethod):
    """Factors, and feed-forwards in tiles.

    Attributes:
        kept_fraction: of each layer's bytes.
        tile_tokens: tokens that are widened together.
    """

    converts: ClassVar[bool] = True
    model_types: ClassVar[tuple[str, ...]] = (
        "gemma2",
        "gemma3_text",
        "gpt2",
        "llama",
        "mistral",
        "phi",
        "qwen2",
        "qwen3",
        "t5",
    )
    rises: ClassVar[tuple[tuple[float, float], ...]] = (
        (15.5, 0.25),
        (14.2, 0.55),
        (11.1, 1.9),
        (8.0, 8.0),
        (4.0, 40.0),
    )
    kept_fraction: float = 0.5
    tile_tokens: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.kept_fraction < 1 or self.tile_tokens < 1:
            raise ShapeError(
                f"flashsvd keeps a share of the bytes and has tiles of 1 token or more, not {self.kept_fraction} and "
                f"{self.tile_tokens}",
                hint="for instance flashsvd(kept_fraction=0.5, tile_tokens=128)",
            )

    def rank(self, out_features: int, in_features: int) -> int:
        """The share of the rank at which the factors are as large as the matrix; 0 leaves it dense."""
        return int(self.kept_fraction * out_features * in_features / (out_features + in_features))

    def layout(self, targets: Sequence[Target], evidence: Evidence | None = None) -> Layout:
        """Every weight that gets smaller.

        Raises:
            UnsupportedModel: when a block has no feed-forward of a known form, naming its first layer.
        """
        children: dict[tuple[str, str], set[str]] = {}
        for target in targets:
            parent, _, own = target.module.rpartition(".")
            children.setdefault((target.block, parent), set()).add(own)
        tiled = {block for (block, parent), own in children.items() if own in FEED_FORWARDS and parent != block}
        for target in targets:
            if target.block not in tiled:
                raise UnsupportedModel(
                    f"flashsvd finds no feed-forward module in {target.block}, which holds {target.parameter}",
                    hint=f"it is for models of the kinds {', '.join(self.model_types)}; greenformers takes any",
                )
        return super().layout(targets, evidence)

    def converted_block(self, block: nn.Module, calls: Sequence[BlockCall] = ()) -> nn.Module:
        """The block with a feed-forward that works in tiles."""
        for name, module in list(block.named_modules()):
            if name and _layers(module) in FEED_FORWARDS:
                block.set_submodule(name, TiledFeedForward(module, self.tile_tokens))
        return block

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[FlashSVD]:
        """From the safest to the smallest."""
        if shape.config.model_type in cls.model_types:
            for fraction in (0.9, 0.75, 0.6, 0.5, 0.4, 0.3):
                yield cls(kept_fraction=fraction)


class TiledFeedForward(nn.Module):
    """A feed-forward that runs on a few tokens at a time. Its layers keep their names.

    Args:
        whole: one that treats each token by itself.
        tile_tokens: tokens that it is given at a time.
    """

    def __init__(self, whole: nn.Module, tile_tokens: int) -> None:
        super().__init__()
        # Not a child: its layers are this module's own, in one dictionary, so that what replaces one reaches both.
        self.__dict__["whole"] = whole
        self._modules = whole._modules
        self.tile_tokens = tile_tokens
        self.training = whole.training

    def __getattr__(self, name: str) -> Any:
        """Attributes of the feed-forward that models look at, such as its activation."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["whole"], name)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., T, H) -> (..., T, H); whole where gradients are wanted, which need all of it."""
        whole: nn.Module = self.__dict__["whole"]
        rows = hidden.reshape(-1, hidden.shape[-1])
        if torch.is_grad_enabled() or rows.shape[0] <= self.tile_tokens:
            out: Tensor = whole(hidden)
            return out
        out = torch.empty_like(rows)
        for start in range(0, rows.shape[0], self.tile_tokens):
            tile = slice(start, start + self.tile_tokens)
            out[tile] = whole(rows[tile])
        return out.view(hidden.shape)


def _layers(module: nn.Module) -> set[str]:
    """The names of a module's children that hold numbers."""
    return {name for name, child in module.named_children() if any(True for _ in _held(child))}


def _held(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
