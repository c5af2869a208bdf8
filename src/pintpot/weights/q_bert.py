"""Q-BERT: more bits for the blocks in which the loss is most curved, by the largest eigenvalue of its Hessian.

Source:    Shen et al. 2019, "Q-BERT", arXiv:1909.05840: a block's sensitivity is ``|mean| + std`` over parts of the
           data of its Hessian's largest eigenvalue, found by power iteration; the most sensitive blocks get more bits;
           groups of a matrix's outputs have ranges of their own.
Differs:   no fine-tuning after rounding: GPTQ's compensation stands in for it. Groups are single outputs (the finest
           of the paper's) or less. Products with the Hessian are differences of two gradients. Only the matrices of
           blocks are packed, not embeddings or activations. A share of the blocks gets more bits, not all that look
           sensitive, so that bytes follow from shapes.
Saves:     weights, real: as rtn at each block's width. Choosing needs the whole dense model in memory, the activations
           of one batch, and one block's matrices four times in 32 bits.
Shapes:    weight (O, I); codes (O, I) packed; scale and zero (O, N).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  blocks differ in how much they matter, and the dense model fits in memory with room for gradients.
Not when:  the model does not fit dense: gptq at one width, or an allocation to a size, needs one block at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import Texts, risk_between
from pintpot.weights.by_block import ByBlock
from pintpot.weights.gradients import each_gradient
from pintpot.weights.targets import Target

RISES = ((8.2, 0.0002), (5.2, 0.008), (4.2, 0.025), (3.3, 0.3), (2.3, 3.0))
"""Bits a weight and the relative rise of perplexity."""

STEP, STEP_16 = 1e-3, 3e-2
"""How far weights of 32 and of 16 bits are moved for a difference of gradients, relative to their norm."""

Vectors = dict[str, Tensor]


@technique(
    name="q-bert",
    wing="weights",
    source=Source("Q-BERT: Hessian Based Ultra Low Precision Quantization of BERT", 2019, "1909.05840"),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim("loss of performance in percent, at most", 2.3, versus="baseline", at="BERT, 2 bits", where="abstract"),
        Claim("compression of the parameters", 13.0, versus="32 bits", at="BERT, 2 bits", where="abstract"),
    ],
    fidelity="compensation instead of fine-tuning; groups of single outputs; a fixed share of blocks gets more bits",
)
@dataclass(frozen=True, kw_only=True)
class QBERT(ByBlock):
    """Widths by the curvature of the loss.

    Attributes:
        large_bits: width of the codes in the most sensitive blocks.
        small_bits: in the others.
        large_fraction: share of the blocks that get the large width.
        group_size: in-features that share a scale; -1 for a whole row.
        parts: batches of the data on each of which eigenvalues are found.
        iterations: of the power iteration.
    """

    group_size: int = -1
    parts: int = 4
    iterations: int = 10

    def scores(self, model: PreTrainedModel, blocks: Mapping[str, Sequence[Target]], texts: Texts) -> dict[str, float]:
        """``|mean| + std`` of each block's largest eigenvalues."""
        found = {}
        for block, targets in blocks.items():
            names = [t.parameter for t in targets]
            values = torch.tensor(
                [largest_eigenvalue(model, names, text, self.iterations) for text in texts[: self.parts]]
            )
            found[block] = float(values.mean().abs() + values.std(correction=0))
        return found

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[QBERT]:
        """From the safest to the smallest."""
        for large, small in ((8, 6), (8, 4), (6, 4), (4, 3), (4, 2), (3, 2)):
            yield cls(large_bits=large, small_bits=small)


def largest_eigenvalue(
    model: PreTrainedModel, names: Sequence[str], text: Tensor | Mapping[str, Tensor], iterations: int
) -> float:
    """The eigenvalue of largest magnitude of the loss's Hessian over some parameters, by power iteration.

    Args:
        model: whole; its parameters are moved, and put back bit for bit.
        names: of the parameters.
        text: what the loss is on.
        iterations: products with the Hessian.
    """
    generator = torch.Generator().manual_seed(0)
    start = {n: torch.randn(model.get_parameter(n).shape, generator=generator) for n in names}
    vector = _scaled({n: t.to(model.get_parameter(n).device) for n, t in start.items()})
    value = 0.0
    for _ in range(iterations):
        product = hessian_product(model, vector, text)
        value = sum(float((vector[n] * product[n]).sum()) for n in names)
        if _norm(product) == 0:
            break
        vector = _scaled(product)
    return value


def hessian_product(model: PreTrainedModel, vector: Vectors, text: Tensor | Mapping[str, Tensor]) -> Vectors:
    """The Hessian of the loss on a text times a vector of norm 1, from two gradients.

    Args:
        model: whole; its parameters are moved, and put back bit for bit.
        vector: float32, by the parameters' names.
        text: what the loss is on.
    """
    kept = {name: model.get_parameter(name).detach().clone() for name in vector}
    step = (STEP if all(t.dtype is torch.float32 for t in kept.values()) else STEP_16) * _norm(kept)
    found = {name: torch.zeros_like(t) for name, t in vector.items()}
    try:
        for sign in (1, -1):
            for name, old in kept.items():
                model.get_parameter(name).data.copy_(old.float() + sign * step * vector[name])

            def take(name: str, gradient: Tensor, sign: int = sign) -> None:
                found[name] += gradient.float() * (sign / (2 * step))

            each_gradient(model, list(vector), text, take)
    finally:
        for name, old in kept.items():
            model.get_parameter(name).data.copy_(old)
    return found


def _norm(vectors: Mapping[str, Tensor]) -> float:
    return sum(float(t.float().square().sum()) for t in vectors.values()) ** 0.5


def _scaled(vectors: Vectors) -> Vectors:
    norm = _norm(vectors) or 1.0
    return {name: t / norm for name, t in vectors.items()}
