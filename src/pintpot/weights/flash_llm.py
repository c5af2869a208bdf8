"""Flash-LLM: load a sparse weight tile by tile, and multiply each tile as a dense one.

Source:    Xia et al. 2023, "Flash-LLM", arXiv:2309.10285 (Tiled-CSL storage; load as sparse, compute as dense), and the
           authors' code for the layout of a tile (128 x 64, 16 bits for a number and 16 for its place).
Differs:   the tensor-core kernel with its ordering of a tile's numbers for shared memory, and their padding to fours,
           are left out: rows of tiles are made dense one after the other and given to the processor's own product,
           and for few rows of input a compiled kernel multiplies the kept numbers where they are, without any tile.
           The paper takes pruned models; pruned here in one go, by the scores of Wanda over the whole matrix with the
           compensation of SparseGPT.
Saves:     weights, real: 4 n + 4 (T + 1) bytes for n kept numbers in T tiles, less than dense 16-bit weights where
           less than half is kept. Products need some rows of tiles dense, at most 16 MiB. Pruning needs one block, and
           4 I^2 bytes a layer for the inputs' second moments.
Shapes:    weight (O, I); values (n,), places (n,), starts (T + 1,).
Composes:  caches, activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  the model was trained to be sparse, with a fifth of its numbers or fewer left, anywhere in a matrix.
Not when:  the model was not: cutting four fifths in one go ruins it; or half is kept: a bitmap takes half the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import WeightMethod, risk_between
from pintpot.weights.formats import Format, Tensors, Tiled
from pintpot.weights.pruning import RISES, cut_with_compensation, input_weighted_score
from pintpot.weights.statistics import InputStatistics


@technique(
    name="flash-llm",
    wing="weights",
    source=Source(
        "Flash-LLM: Enabling Cost-Effective and Highly-Efficient Large Generative Model Inference with Unstructured "
        "Sparsity",
        2023,
        "2309.10285",
    ),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "finetune", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim("speed-up of the sparse product", 2.9, versus="Sputnik", at="on average", where="abstract"),
        Claim("tokens per GPU-second", 3.8, versus="DeepSpeed", at="OPT-30B to 175B, at most", where="abstract"),
    ],
    fidelity="tiles are made dense in ordinary operations, not in a tensor-core kernel, and not at all for few rows of"
    " input; pruned in one go",
)
@dataclass(frozen=True, kw_only=True)
class FlashLLM(WeightMethod):
    """Tiles of kept numbers.

    Attributes:
        kept_fraction: share of a matrix that is kept.
        tile_rows: out-features of a tile.
        tile_columns: in-features of a tile.
        damping: share of the mean diagonal of H that is added to it.
    """

    calibrated: ClassVar[bool] = True
    drops: ClassVar[bool] = True
    kept_fraction: float = 0.2
    tile_rows: int = 128
    tile_columns: int = 64
    damping: float = 0.01

    def __post_init__(self) -> None:
        Tiled(kept_fraction=self.kept_fraction, tile_rows=self.tile_rows, tile_columns=self.tile_columns)

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """Tiles over the whole matrix."""
        return (
            Tiled(
                out_features_held=out_features,
                kept_fraction=self.kept_fraction,
                tile_rows=self.tile_rows,
                tile_columns=self.tile_columns,
                dtype=torch.bfloat16 if dtype is torch.bfloat16 else torch.float16,
            ),
        )

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """What scores highest in the matrix; by magnitude where nothing is known of the inputs."""
        layout = formats[0]
        if not isinstance(layout, Tiled):
            return super().find(name, weight, formats)
        dense = weight.float()
        mask = layout.choose(input_weighted_score(dense, inputs))
        if inputs is not None:
            dense = cut_with_compensation(dense, mask, inputs.hessian, self.damping)
        return (layout.encode_with(dense, mask),)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From what is kept; large models lose less than the small one that it was measured on."""
        return risk_between(RISES, self.kept_fraction)

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[FlashLLM]:
        """From the safest to the smallest."""
        for kept in (0.45, 0.4, 0.3, 0.2, 0.1):
            yield cls(kept_fraction=kept)
