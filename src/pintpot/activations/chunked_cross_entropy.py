"""Chunked cross-entropy: make the loss from hidden states and the head's weight a chunk at a time, never all logits.

Source:    Luo et al. 2024, "Mini-sequence Transformer", arXiv:2407.15892, sec. 3.2 (the LM head by mini-sequences).
Differs:   the chunks and the product are torch's ``linear_cross_entropy``, which makes the gradients in the forward
           pass; the paper's mini-sequences of the feed-forward layers are left to checkpointing.
Saves:     activations, real: ``tokens x vocabulary`` logits, their float32 copy and their gradient; instead one chunk
           of them and the head's gradient (vocabulary x hidden) from the loss on.
Shapes:    hidden states (batch, tokens, hidden), head weight (vocabulary, hidden), labels (batch, tokens).
Composes:  any optimizer, adapters, checkpointing, packed weights; the head itself must be a plain linear layer.
Use when:  the vocabulary is large against the hidden size: the logits are then the largest tensor of a step.
Not when:  a step has few tokens: the head's gradient is then larger than the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import LinearCrossEntropyOptions, functional

from pintpot.activations._base import ActivationMethod
from pintpot.core.errors import CompositionError, UnsupportedModel
from pintpot.core.heap import give_back
from pintpot.core.ledger import Account, Ledger, Moment
from pintpot.core.shape import ModelShape
from pintpot.core.technique import TRAINING, Source, technique
from pintpot.core.workload import Train, Workload

SCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Settings of models that change their logits after the head."""


@technique(
    name="chunked-cross-entropy",
    wing="activations",
    slot="activations",
    part="loss",
    source=Source(
        "Mini-Sequence Transformer: Optimizing Intermediate Memory for Long Sequences Training",
        arxiv="2407.15892",
        year=2024,
    ),
    accounts=(Account.ACTIVATIONS,),
    jobs=TRAINING,
    needs=("gradients",),
    fidelity="the LM head only; gradients made in the forward pass",
)
@dataclass(frozen=True, kw_only=True)
class ChunkedCrossEntropy(ActivationMethod):
    """The loss without the logits; the chunks are torch's choice, so there is nothing to set."""

    exact: ClassVar[bool] = False

    def scope(
        self, model: nn.Module, workload: Workload, budget_bytes: int | None = None
    ) -> AbstractContextManager[None]:
        """See ``ActivationMethod.scope``. Where gradients are on, the output's ``logits`` are hidden states instead."""
        if not isinstance(workload, Train):
            raise CompositionError(f"chunked-cross-entropy has nothing to do in {workload.job}", hint="leave it out")
        return _scope(model)

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """The ``activations`` account without the logits kept, and with the head's gradient."""
        if not isinstance(workload, Train):
            return ledger
        text = shape.config.get_text_config(decoder=True)
        tokens, width = workload.batch * workload.tokens, shape.dtype.itemsize
        copies = 4 if width == 4 else width + 4 + 4
        change = text.vocab_size * (text.hidden_size * width - tokens * copies)

        def edit(moment: Moment) -> Moment:
            return moment.with_bytes(Account.ACTIVATIONS, moment.of(Account.ACTIVATIONS) + change)

        return ledger.edit(edit, phases=("forward", "backward"))

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """None: the loss and its gradients are the same numbers up to rounding."""
        return 0.0


@contextmanager
def _scope(model: nn.Module) -> Iterator[None]:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    head = _head_of(base)
    plain_forward: Callable[[Tensor], Tensor] = head.forward
    plain_loss = base.loss_function
    own_loss = base.__dict__.get("_loss_function")
    waiting: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return plain_forward(hidden)
        waiting.append(hidden)
        return hidden

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **more: Any) -> Tensor:
        if not waiting or logits.shape != waiting[-1].shape:
            plain: Tensor = plain_loss(logits, labels, vocab_size, **more)
            return plain
        waiting.clear()
        give_back()
        made = _loss(logits, head, labels, **more)
        give_back()
        return made

    head.__dict__["forward"] = forward
    base.loss_function = loss
    try:
        yield
        if waiting:
            raise UnsupportedModel(
                f"{type(base).__name__} makes its loss by itself, not by its loss function",
                hint="leave out chunked-cross-entropy",
            )
    finally:
        head.__dict__.pop("forward")
        if own_loss is None:
            del base._loss_function
        else:
            base._loss_function = own_loss


def _loss(
    hidden: Tensor,
    head: nn.Linear,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The causal language model's loss as transformers defines it, from hidden states (batch, tokens, hidden)."""
    if shift_labels is None:
        shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    made: Tensor = functional.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]).to(head.weight.dtype),
        head.weight,
        shift_labels.reshape(-1).to(hidden.device),
        linear_bias=head.bias,
        ignore_index=ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
        options=LinearCrossEntropyOptions(),
    )
    return made if num_items_in_batch is None else made / num_items_in_batch


def _head_of(base: Any) -> nn.Linear:
    """The head of a causal language model whose logits are its product and nothing more.

    Raises:
        UnsupportedModel: for any other model.
    """
    name = type(base).__name__
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if type(head) is not nn.Linear or base.config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{name} has no plain linear head over a causal language model", hint="leave out chunked-cross-entropy"
        )
    text = base.config.get_text_config(decoder=True)
    changed = [field for field in SCALED if getattr(text, field, None) not in (None, 1.0)]
    if changed:
        raise UnsupportedModel(
            f"{name} changes its logits after the head ({', '.join(changed)})", hint="leave out chunked-cross-entropy"
        )
    return head
