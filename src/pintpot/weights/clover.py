"""CLOVER: turn the space within each attention head so that its leading directions carry most, and drop the others.

Source:    Meng et al. 2024, "CLOVER", arXiv:2411.17426: the singular value decomposition of each head's product of
           value and output weights, and of query and key weights, whose factors take the four weights' places.
Differs:   the same number of directions stays in every head. Of models with rotary positions only values and outputs
           are pruned, because a rotation stands between queries and keys. Heads that share keys and values are
           decomposed together. The cache keeps the head's full width (dropped channels are zeros in it); training the
           singular values is left to adapters.
Saves:     weights, real: of the attention's matrices all but the share that is asked for, less the four matrices' if
           positions are rotary. Finding them needs one block, and the singular vectors of matrices as wide as a head.
Shapes:    for a head of width D and a model of width H: value (D, H), output (H, D), their product (H, H) of rank D.
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  heads are wide for what they do (encoders of speech, gpt2's queries and keys).
Not when:  a whole model must shrink: the feed-forward, most of its bytes, stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from pintpot.core.errors import ShapeError, UnsupportedModel
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import Evidence, Layout, WeightMethod, risk_between
from pintpot.weights.factorised import kept_share
from pintpot.weights.formats import Dense, Format, Leading
from pintpot.weights.statistics import BlockCall
from pintpot.weights.targets import Target, head_width

RISES = ((15.8, 0.035), (15.5, 0.1), (15.1, 0.44), (14.6, 2.0))
"""Bits that are left of 16 for each number, dense matrices and all, and the relative rise of perplexity."""


@dataclass(frozen=True)
class Projections:
    """What the layers of an attention are called.

    Attributes:
        query: whose out-features are queries; where the others have the same name, keys and values too.
        key: of the keys.
        value: of the values.
        output: whose in-features are the heads.
        rotary: whether positions rotate queries and keys.
    """

    query: str
    key: str
    value: str
    output: str
    rotary: bool = False

    @property
    def names(self) -> set[str]:
        """All of them."""
        return {self.query, self.key, self.value, self.output}


KINDS = (
    Projections("q_proj", "k_proj", "v_proj", "o_proj", rotary=True),
    Projections("q_proj", "k_proj", "v_proj", "dense", rotary=True),
    Projections("q_proj", "k_proj", "v_proj", "out_proj"),
    Projections("q", "k", "v", "o"),
    Projections("c_attn", "c_attn", "c_attn", "c_proj"),
)
"""Attentions that it knows."""


@technique(
    name="clover",
    wing="weights",
    source=Source(
        "CLOVER: Constrained Learning with Orthonormal Vectors for Eliminating Redundancy", 2024, arxiv="2411.17426"
    ),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim(
            "parameters of the encoder's attention saved, %",
            46.42,
            versus="dense, without training",
            at="Whisper-large-v3",
            where="abstract",
        )
    ],
    fidelity="one number of directions for all heads; singular values are not trained; the cache is not narrowed",
)
@dataclass(frozen=True, kw_only=True)
class Clover(WeightMethod):
    """Heads with fewer directions.

    Attributes:
        kept_fraction: of the width of each head.
    """

    rearranges: ClassVar[bool] = True
    drops: ClassVar[bool] = True
    model_types: ClassVar[tuple[str, ...]] = (
        "gemma2",
        "gemma3_text",
        "gpt2",
        "llama",
        "mistral",
        "opt",
        "phi",
        "qwen2",
        "qwen3",
        "t5",
    )
    kept_fraction: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.kept_fraction < 1:
            raise ShapeError(
                f"kept_fraction is a share of the heads' width, not {self.kept_fraction}",
                hint="for instance clover(kept_fraction=0.5)",
            )

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """Of a matrix by itself nothing can be said."""
        raise ShapeError(
            f"clover cannot lay out {name} alone",
            hint="give kept_fraction, not a size: an attention's layers go together",
        )

    def layout(self, targets: Sequence[Target], evidence: Evidence | None = None) -> Layout:
        """The leading channels of every head.

        Raises:
            UnsupportedModel: naming the first layer of a block whose attention it does not know.
        """
        found = _kinds(targets)
        layout: dict[str, tuple[Format, ...]] = {}
        for target in targets:
            parent, _, own = target.module.rpartition(".")
            if target.block not in {block for block, _ in found}:
                raise UnsupportedModel(
                    f"clover does not know the attention of {target.block}, which holds {target.parameter}",
                    hint=f"it is for models of the kinds {', '.join(self.model_types)}",
                )
            kind = found.get((target.block, parent))
            if kind is not None and not (kind.rotary and own in (kind.query, kind.key)):
                kept = max(1, int(self.kept_fraction * target.head_dim))
                inner = Dense(dtype=target.dtype)
                layout[target.parameter] = (
                    Leading(inner=inner, size=target.head_dim, kept=kept, inputs=own == kind.output),
                )
        return layout

    @torch.no_grad()
    def rearrange_block_(self, block: nn.Module, calls: Sequence[BlockCall] = ()) -> None:
        """Order the directions of every head by what they carry; the block computes what it did."""
        for module in block.modules():
            children = {name for name, child in module.named_children() if hasattr(child, "weight")}
            kind = next((kind for kind in KINDS if kind.names <= children), None)
            width = head_width(module)
            if kind is not None and width:
                _order_values_(module, kind, width)
                if not kind.rotary:
                    _order_keys_(module, kind, width)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From the share of the matrices' bytes that is left."""
        return risk_between(RISES, 16 * kept_share(self, shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Clover]:
        """From the safest to the smallest."""
        if shape.config.model_type in cls.model_types:
            for fraction in (0.875, 0.75, 0.625, 0.5, 0.375, 0.25):
                yield cls(kept_fraction=fraction)


def _kinds(targets: Sequence[Target]) -> dict[tuple[str, str], Projections]:
    """The attentions, by block and module."""
    children: dict[tuple[str, str], set[str]] = {}
    for target in targets:
        parent, _, own = target.module.rpartition(".")
        if target.head_dim:
            children.setdefault((target.block, parent), set()).add(own)
    pairs = ((place, kind) for place, own in children.items() for kind in KINDS if kind.names <= own)
    return dict(pairs)


def ordered(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (M, D) and (D, N) of the same product, whose D directions are its singular vectors, the leading first.

    Each singular value's root goes to either side. Only matrices of D x D are decomposed.
    """
    left_basis, left_rest = torch.linalg.qr(left.double())
    right_basis, right_rest = torch.linalg.qr(right.double().t())
    u, values, v = torch.linalg.svd(left_rest @ right_rest.t())
    root = values.sqrt()
    found = left_basis @ (u[:, : len(root)] * root), (root[:, None] * v[: len(root)]) @ right_basis.t()
    missing = left.shape[1] - len(root)
    return functional.pad(found[0], (0, missing)), functional.pad(found[1], (0, 0, 0, missing))


def _order_values_(attention: nn.Module, kind: Projections, width: int) -> None:
    value, bias = _held(attention, kind, "value")
    output, _ = _held(attention, kind, "output")
    values, outputs = value.unflatten(0, (-1, width)), output.unflatten(1, (-1, width))
    # Weights of attention add up to one for each query, so that a bias of values is one more input that is always one.
    biases = None if bias is None else bias.unflatten(0, (-1, width))
    shared = outputs.shape[1] // values.shape[0]
    for head, own in enumerate(values):
        readers = outputs[:, head * shared : (head + 1) * shared]
        right = own if biases is None else torch.cat([own, biases[head][:, None]], 1)
        left, right = ordered(readers.reshape(-1, width), right)
        readers.copy_(left.reshape(readers.shape))
        own.copy_(right[:, : own.shape[1]])
        if biases is not None:
            biases[head].copy_(right[:, -1])


def _order_keys_(attention: nn.Module, kind: Projections, width: int) -> None:
    queries, keys = (_with_bias(attention, kind, role, width) for role in ("query", "key"))
    shared = queries.shape[0] // keys.shape[0]
    for head, own in enumerate(keys):
        readers = queries[head * shared : (head + 1) * shared]
        left, right = ordered(readers.transpose(1, 2).reshape(-1, width), own)
        readers.copy_(left.reshape(shared, -1, width).transpose(1, 2))
        own.copy_(right)
    for role, changed in (("query", queries), ("key", keys)):
        weight, bias = _held(attention, kind, role)
        weight.copy_(changed[..., : weight.shape[1]].flatten(0, 1))
        if bias is not None:
            bias.copy_(changed[..., -1].flatten())


def _with_bias(attention: nn.Module, kind: Projections, role: str, width: int) -> Tensor:
    """A copy of the heads' weights (heads, D, H), with the bias as one more in-feature where there is one."""
    weight, bias = _held(attention, kind, role)
    both = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
    return both.unflatten(0, (-1, width)).double()


def _held(attention: nn.Module, kind: Projections, role: str) -> tuple[Tensor, Tensor | None]:
    """The weight (O, I) and the bias of a role, to be changed in place."""
    layer = attention.get_submodule(getattr(kind, role))
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    bias: Tensor | None = None if layer.bias is None else layer.bias.detach()  # type: ignore[operator]
    weight = weight.t() if isinstance(layer, Conv1D) else weight
    if kind.query != kind.key or role == "output":
        return weight, bias
    index = ("query", "key", "value").index(role)
    return weight.chunk(3)[index], None if bias is None else bias.chunk(3)[index]
