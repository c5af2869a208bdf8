"""The loss of a distillation: how far a student's next tokens are from a teacher's.

Shapes: B batch, T tokens; logits (B, T, vocabulary).
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

NO_LOSS = -100
"""The label that carries no loss."""


class Distillation(nn.Module):
    """A student with the loss of a distillation, ``kl_weight * KL(teacher, student) + ce_weight * cross-entropy``.

    Args:
        student: trained.
        teacher: run without gradients, always in evaluation mode; not a part of this module.
        kl_weight: of the mean divergence of the next token.
        ce_weight: of the student's own loss.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, kl_weight: float, ce_weight: float) -> None:
        super().__init__()
        self.student = student
        self.teacher = (teacher.eval(),)
        self.kl_weight = kl_weight
        self.ce_weight = ce_weight

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """The loss of texts, int64 (B, T); tokens with the label -100 carry none."""
        with torch.no_grad():
            taught = self.teacher[0](input_ids=input_ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        result = self.student(input_ids=input_ids, labels=labels if self.ce_weight else None, use_cache=False)
        learnt = result.logits[:, :-1].float().log_softmax(-1)
        divergence = (taught.exp() * (taught - learnt)).sum(-1)
        loss = self.kl_weight * divergence[labels[:, 1:] != NO_LOSS].mean()
        return SimpleNamespace(loss=loss + self.ce_weight * result.loss if self.ce_weight else loss)
