"""ZipNN: store the exponents of the weights apart from their mantissas, and code the planes without loss.

Source:    Hershcovitch et al. 2024, arXiv:2411.05239 (byte grouping, exponent extraction, Huffman coding of planes).
Differs:   planes are coded by zstandard with next to no search for matches, whose Huffman coder is of the family that
           the authors use, in chunks of 131072 numbers; each tensor is coded for itself and can be read alone; whether
           a plane is worth coding is tried for every chunk, not foretold from the first; differences between models,
           for which the authors have another mode, are not coded.
Saves:     checkpoint, real: a third of bfloat16 weights, about a sixth of float32 and float16 ones; how much depends on
           the numbers. Nothing in memory: a loaded model is what it was, bit for bit.
Shapes:    any tensor of any dtype.
Composes:  packed folders of the other methods, as a second compression of the folder that they wrote.
Use when:  models are kept or sent, and no number may change.
Not when:  memory is short rather than disk: the model that is loaded is as large as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.core import byte_planes
from pintpot.core.ledger import Account, Ledger, Moment, Tier
from pintpot.core.model_folder import DTYPE_NAMES
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights.storage import StorageMethod

KEPT: Mapping[torch.dtype, float] = {torch.bfloat16: 0.67, torch.float32: 0.82, torch.float16: 0.85}
"""Fraction of its bytes that a trained model was measured to keep, by the dtype of its weights."""


@technique(
    name="zipnn",
    wing="weights",
    source=Source("ZipNN: Lossless Compression for AI Models", 2024, arxiv="2411.05239"),
    accounts=(Account.CHECKPOINT,),
    jobs=("compress",),
    claims=(
        Claim("fraction of the model's size saved", 0.33, "the model as it is", "popular models, often", "abstract"),
    ),
    fidelity="the entropy coder is zstandard's; each tensor is coded for itself",
)
@dataclass(frozen=True, kw_only=True)
class ZipNN(StorageMethod):
    """Lossless storage in byte planes. It has no hyperparameters."""

    def encode(self, tensor: Tensor) -> list[bytes]:
        """The pieces of the tensor's stored form; see ``core.byte_planes``."""
        return byte_planes.encode(tensor, DTYPE_NAMES[tensor.dtype])

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """An estimate of the folder, from what models of the dtype were measured to keep, and one tensor in memory."""
        kept = KEPT.get(shape.dtype, 1.0)
        largest = max(parameter.nbytes for parameter in shape.parameters)
        moment = Moment("apply", {}).with_bytes(Account.WORKSPACE, round(largest * (1 + kept)))
        return Ledger(
            "predicted", (moment.with_bytes(Account.CHECKPOINT, round(shape.weight_bytes * kept), Tier.DISK),)
        )
