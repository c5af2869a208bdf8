"""LUQ: very few bits for the blocks whose outputs have little entropy, 4 for the others.

Source:    Bhatnagar et al. 2025, "LUQ", arXiv:2509.23729: a layer's functional complexity is the entropy of its output
           activations, from which of 100 clusters each token's falls into; layers of low entropy bear very few bits.
Differs:   the few bits are 2, by GPTQ, where the authors take a method of about one bit; a share of the blocks is
           given, where the authors lower one block after the other until the loss is too great; texts of tokens only
           unless inputs with images are given.
Saves:     weights, real: as rtn at each block's width. Choosing needs the whole dense model in memory, and at most 4096
           tokens' outputs of each block.
Shapes:    block outputs (B, T, H); weight (O, I); codes (O, I) packed; scale and zero (O, N).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  less than 4 bits a weight are wanted of a deep model, above all one that reads images too.
Not when:  all blocks' outputs are alike, as in shallow models: the entropy then tells little.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import Texts, risk_between
from pintpot.weights.by_block import ByBlock
from pintpot.weights.clustering import cluster, nearest
from pintpot.weights.paused import hidden_of, inputs_of
from pintpot.weights.targets import Target

RISES = ((8.2, 0.0002), (5.2, 0.008), (4.2, 0.025), (3.3, 0.3), (2.3, 3.0))
"""Bits a weight and the relative rise of perplexity."""

MOST_TOKENS = 4096
"""Tokens whose outputs are clustered."""


@technique(
    name="luq",
    wing="weights",
    source=Source("LUQ: Layerwise Ultra-Low Bit Quantization for Multimodal Large Language Models", 2025, "2509.23729"),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim("less memory, percent", 40.0, versus="4 bits", at="LLaVA-1.5, under 10 % of MME lost", where="abstract"),
        Claim("less memory, percent", 31.0, versus="4 bits", at="Qwen-2.5-VL, the same", where="abstract"),
    ],
    fidelity="2 bits by GPTQ instead of one bit; a given share of the blocks",
)
@dataclass(frozen=True, kw_only=True)
class LUQ(ByBlock):
    """Widths by the entropy of what blocks give.

    Attributes:
        large_bits: width of the codes in the blocks of much entropy.
        small_bits: in the others.
        large_fraction: share of the blocks that get the large width.
        group_size: in-features that share a scale; -1 for a whole row.
        clusters: that outputs are told apart by.
    """

    clusters: int = 100

    def scores(self, model: PreTrainedModel, blocks: Mapping[str, Sequence[Target]], texts: Texts) -> dict[str, float]:
        """The entropy of each block's outputs over the tokens, in nats."""
        found: dict[str, list[Tensor]] = {block: [] for block in blocks}

        def keep(block: str, module: nn.Module, args: Any, output: Any) -> None:
            rows = hidden_of(output).detach().float().flatten(0, -2)
            left = MOST_TOKENS - sum(len(part) for part in found[block])
            # Evenly spread over the batch, so that no text is left out.
            found[block].append(rows[:: max(1, -(-len(rows) // max(1, left)))][: max(0, left)])

        handles = [model.get_submodule(block).register_forward_hook(partial(keep, block)) for block in blocks]
        try:
            with torch.no_grad():
                for text in texts:
                    model(**inputs_of(model, text))
        finally:
            for handle in handles:
                handle.remove()
        return {block: entropy(torch.cat(parts), self.clusters) for block, parts in found.items()}

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[LUQ]:
        """From the safest to the smallest."""
        for large, small in ((8, 4), (5, 4), (4, 3), (4, 2), (3, 2)):
            yield cls(large_bits=large, small_bits=small)


def entropy(rows: Tensor, clusters: int) -> float:
    """Of the clusters that rows (N, H), float32, fall into, in nats."""
    entries = cluster(rows, min(clusters, len(rows)))
    counts = torch.bincount(nearest(rows, entries)).double()
    shares = counts[counts > 0] / len(rows)
    return float(-(shares * shares.log()).sum())
