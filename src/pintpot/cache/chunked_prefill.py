"""Chunked prefill: read a prompt in pieces, so that no temporary is as long as the prompt.

Source:    Agrawal et al. 2023, "SARATHI: Efficient LLM Inference by Piggybacking Decodes with Chunked Prefills",
           arXiv:2308.16369, Section 4.2.
Differs:   no decoding of other requests rides along with the pieces.
Saves:     activations and workspace of the prefill, real: they are those of one piece. The weights are read once for
           each piece.
Shapes:    pieces (B, at most piece_tokens).
Composes:  any cache. With one that evicts, tokens of a piece see only what was kept of the pieces before; with any
           other the result is that of reading the prompt at once.
Use when:  the prompt is long and its activations, not the cache, are the peak.
Not when:  the prompt is no longer than a piece.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from pintpot.cache.forecast import FACT, PIECE_FACT, parts_of, predict_cache
from pintpot.core.errors import CompositionError, ShapeError
from pintpot.core.ledger import Account, Ledger, Moment
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Source, Technique, technique
from pintpot.core.work import Work
from pintpot.core.workload import Generate, Workload

CHUNK_TOKENS = 512
"""Tokens of a prompt that are read together."""


@technique(
    name="chunked-prefill",
    wing="cache",
    part="prefill",
    source=Source(
        "SARATHI: Efficient LLM Inference by Piggybacking Decodes with Chunked Prefills", year=2023, arxiv="2308.16369"
    ),
    accounts=[Account.ACTIVATIONS, Account.WORKSPACE],
    fidelity="no decoding of other requests rides along",
)
@dataclass(frozen=True, kw_only=True)
class ChunkedPrefill(Technique):
    """Reading in pieces.

    Attributes:
        piece_tokens: tokens that are read together.
    """

    piece_tokens: int = CHUNK_TOKENS

    def __post_init__(self) -> None:
        if self.piece_tokens < 1:
            raise CompositionError(
                f"chunked-prefill cannot read {self.piece_tokens} tokens at a time",
                hint="for instance piece_tokens=512",
            )

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """Temporaries of a piece, in place of the prompt's, and what its attention makes of one layer's whole cache.

        That is the mask, and keys and values repeated for every query head.
        """
        if not isinstance(workload, Generate) or workload.prompt_tokens <= self.piece_tokens:
            return ledger
        share = self.piece_tokens / workload.prompt_tokens
        config = shape.config.get_text_config(decoder=True)
        repeated = 2 * getattr(config, "hidden_size", 0) * shape.dtype.itemsize
        whole = workload.batch * workload.prompt_tokens * (self.piece_tokens + repeated)

        def smaller(moment: Moment) -> Moment:
            for account in (Account.ACTIVATIONS, Account.WORKSPACE):
                moment = moment.with_bytes(account, int(moment.of(account) * share))
            return moment.with_bytes(Account.WORKSPACE, moment.of(Account.WORKSPACE) + whole)

        ledger = ledger.edit(smaller, ("prefill",))
        ledger = replace(ledger, facts={**ledger.facts, PIECE_FACT: self.piece_tokens})
        parts = parts_of(str(ledger.facts.get(FACT, ""))).named()
        return predict_cache(parts[0], ledger, shape, workload) if parts else ledger

    def work(self, work: Work, shape: ModelShape, workload: Workload) -> Work:
        """Weights are read once more for every further piece."""
        if not isinstance(workload, Generate):
            return work
        further = -(-workload.prompt_tokens // self.piece_tokens) - 1
        return work.plus("prefill", read_bytes=further * shape.weight_bytes)

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[ChunkedPrefill]:
        """Pieces of 1,024 down to 64 tokens, where the prompt is longer."""
        for piece in (1024, 512, 256, 128, 64):
            if (
                isinstance(workload, Generate)
                and workload.prompt_tokens > piece
                and not shape.config.is_encoder_decoder
            ):
                yield cls(piece_tokens=piece)


@torch.no_grad()
def prefill_in_pieces(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: Cache,
    chunk_tokens: int = CHUNK_TOKENS,
    *,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Read a prompt into a cache, some tokens at a time.

    With a cache that evicts, tokens of later pieces see only what was kept of the earlier ones; with any other the
    result is that of reading the prompt at once.

    Args:
        model: with the attention that the cache needs (``use_cache_attention``).
        input_ids: int64 (B, T).
        cache: what was read before, or empty. Grows by T tokens.
        chunk_tokens: tokens of a piece.
        attention_mask: (B, tokens in the cache + T), 0 for padding.

    Returns:
        Logits (B, V) after the last token.

    Raises:
        ShapeError: when there is no token, or no room for one in a piece.
    """
    if chunk_tokens < 1 or input_ids.shape[-1] < 1:
        raise ShapeError(
            f"cannot read {input_ids.shape[-1]} tokens in pieces of {chunk_tokens}", hint="give at least one of each"
        )
    takes_last = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": 1} if takes_last else {}
    seen = cache.get_seq_length()
    logits = torch.empty(0)
    for start in range(0, input_ids.shape[-1], chunk_tokens):
        piece = input_ids[:, start : start + chunk_tokens]
        mask = None if attention_mask is None else attention_mask[:, : seen + start + piece.shape[-1]]
        logits = model(input_ids=piece, attention_mask=mask, past_key_values=cache, use_cache=True, **options).logits[
            :, -1
        ]
    return logits
