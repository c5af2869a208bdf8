"""OneBit: one bit for each sign, two vectors for all magnitudes, and training until the signs fit.

Source:    Xu et al. 2024, "OneBit", arXiv:2402.11295: the decomposition into signs and a matrix of rank one, and
           distillation on outputs and hidden states; weights of the losses and the signs' gradient from the authors'
           code.
Differs:   no normalisation is put behind each product, so that a packed weight stays a weight and an untrained model
           is the decomposition of the dense one; the text is the user's own, not text that the teacher wrote.
Saves:     weights, real: O * packed_size(I, 1) + 2 r (O + I) bytes a matrix, r = 1 in the paper. Training holds the
           dense model twice (student and teacher) with gradients and moments.
Shapes:    weight (O, I); signs (O, I) packed; left (O, r); right (r, I).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  1 bit a weight is all there is, and text and time to train on it for long.
Not when:  2 bits or more fit, or there is no time to train: the untrained starting point says little.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import risk_between
from pintpot.weights.formats import Format, SignRank, Tensors
from pintpot.weights.formats.sign_rank import leading_factors
from pintpot.weights.statistics import InputStatistics
from pintpot.weights.trained import StandIn, TrainedMethod

RISES = ((3.0, 0.6), (1.5, 1.3), (1.17, 1.72))
"""Bits a weight and the relative rise of perplexity: the last of the embedded model, the others guesses."""

NO_LOSS = -100
"""The label of tokens that carry no loss."""

START = 0.01
"""Magnitude of the trained number behind each sign at the start, as in the authors' code: it turns over easily."""


@technique(
    name="onebit",
    wing="weights",
    source=Source("OneBit: Towards Extremely Low-bit Large Language Models", 2024, "2402.11295"),
    accounts=[Account.WEIGHTS],
    jobs=["compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim("WikiText2 perplexity", 10.20, versus="5.68 dense", at="LLaMA-7B", where="the authors' repository"),
        Claim("WikiText2 perplexity", 9.76, versus="5.47 dense", at="Llama-2-7B", where="the authors' repository"),
    ],
    fidelity="without the normalisation behind each product; trained on the user's text",
)
@dataclass(frozen=True, kw_only=True)
class OneBit(TrainedMethod):
    """Signs and two vectors, trained by distillation.

    Attributes:
        rank: of the magnitudes; the paper has 1.
        divergence_weight: of the divergence from the teacher's next tokens, summed over a text.
        hidden_weight: of the squared distance of hidden states of length one, summed over layers.
    """

    learning_rate: ClassVar[float] = 4e-4
    rank: int = 1
    divergence_weight: float = 0.01
    hidden_weight: float = 1.0

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """Signs times a matrix of low rank."""
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        return (SignRank(rank=min(self.rank, out_features, in_features), scale_dtype=scale),)

    def stand_in(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> StandIn:
        """The decomposition of the dense weight, to be trained."""
        layout = formats[0]
        if len(formats) != 1 or not isinstance(layout, SignRank):
            raise CompositionError(
                f"onebit trains signs and factors, not {formats}", hint="leave the layout to the method"
            )
        return _Signed(weight, layout)

    def objective(self, student: PreTrainedModel, teacher: PreTrainedModel) -> nn.Module:
        """Divergence from the teacher's next tokens, and the distance of the directions of hidden states."""
        return SignDistillation(student, teacher, self.divergence_weight, self.hidden_weight)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[OneBit]:
        """From the safest to the smallest."""
        for rank in (4, 2, 1):
            yield cls(rank=rank)


class _Signed(StandIn):
    """Signs of trained numbers (O, I), and trained factors."""

    def __init__(self, weight: Tensor, layout: SignRank) -> None:
        super().__init__()
        left, right = leading_factors(weight.float().abs(), layout.rank)
        self.latent = nn.Parameter(torch.where(weight >= 0, START, -START).to(weight.dtype))
        self.left = nn.Parameter(left.to(weight.dtype))
        self.right = nn.Parameter(right.to(weight.dtype))

    def weight(self) -> Tensor:
        signs: Tensor = SignOf.apply(self.latent)
        return signs * (self.left @ self.right)

    @torch.no_grad()
    def terms(self, formats: tuple[Format, ...]) -> tuple[Tensors, ...]:
        layout: Any = formats[0]
        return (layout.store(self.latent, self.left, self.right),)


class SignOf(torch.autograd.Function):
    """Signs, zero as positive, with the gradient of ``tanh`` and a thousandth more."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor) -> Tensor:
        """-1 and 1."""
        ctx.save_for_backward(latent)
        return torch.where(latent >= 0, 1.0, -1.0).to(latent.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Largest where the latent number is small."""
        (latent,) = ctx.saved_tensors
        return gradients[0] * (1.001 - latent.tanh().square())


class SignDistillation(nn.Module):
    """A student with the loss of OneBit's distillation.

    Args:
        student: trained.
        teacher: run without gradients, always in evaluation mode; not a part of this module.
        divergence_weight: of the divergence of the next tokens, summed over a text.
        hidden_weight: of the squared distance of hidden states, each scaled to length one, summed over layers.
    """

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, divergence_weight: float, hidden_weight: float
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = (teacher.eval(),)
        self.divergence_weight, self.hidden_weight = divergence_weight, hidden_weight

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """The loss of texts, int64 (B, T); tokens with the label -100 carry none."""
        with torch.no_grad():
            taught = self.teacher[0](input_ids=input_ids, output_hidden_states=True, use_cache=False)
        learnt = self.student(input_ids=input_ids, output_hidden_states=True, use_cache=False)
        counted = labels != NO_LOSS
        target = taught.logits[:, :-1].float().log_softmax(-1)
        divergence = (target.exp() * (target - learnt.logits[:, :-1].float().log_softmax(-1))).sum(-1)
        loss = self.divergence_weight * divergence[counted[:, 1:]].sum() / input_ids.shape[0]
        # The last state is what the logits are made of, which the divergence has already.
        for old, new in zip(taught.hidden_states[:-1], learnt.hidden_states[:-1], strict=True):
            apart = functional.normalize(old.float(), dim=-1) - functional.normalize(new.float(), dim=-1)
            loss = loss + self.hidden_weight * apart.square().sum(-1)[counted].mean()
        return SimpleNamespace(loss=loss)
