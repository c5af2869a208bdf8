"""I-ViT: a vision transformer's blocks compute in whole numbers and shifts alone.

Source:    Li and Gu 2022, "I-ViT", arXiv:2207.01405: dyadic rescaling, Shiftmax, ShiftGELU and I-LayerNorm; widths and
           constants from the authors' code.
Differs:   scales are the largest magnitudes on the calibration images, and nothing is trained, where the authors
           fine-tune with running ranges. The blocks are whole numbers; what embeds the patches before them and
           classifies after them stays as it is, and blocks hand their words on as floats times a scale. Exponentials
           keep at most 22 digits, so that their reciprocal in 31 bits keeps 8, and their numbers get 4 more bits;
           ShiftGELU takes each number's own part above zero out of the exponential and not the row's largest, with
           which numbers far below it lost their sigmoid. Rescaling rounds halves up.
Saves:     weights, real: O * (I + 2) bytes a matrix, and 12 O for biases and multipliers. Applying it needs one dense
           block and the calibration images' hidden states.
Shapes:    weight (O, I); codes (O, I) of 8 bits; words of the residual stream (B, T, C) of 16 bits.
Composes:  nothing that looks into blocks (adapters, caches): they are other modules now.
Use when:  a ViT or DeiT runs where there is no floating point.
Not when:  floats are at hand: torch has no fast products of whole numbers on a CPU or a GPU, and a block takes about
           five times as long as in floating point (results/weights.csv).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pintpot.core.errors import UnsupportedModel
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import Evidence, Layout, WeightMethod
from pintpot.weights.formats import Format, Grid
from pintpot.weights.integer_vit import IntegerViTLayer
from pintpot.weights.statistics import BlockCall
from pintpot.weights.targets import Target, require_parts

RISE = 0.016
"""Relative rise of the loss, of the tiny transformer in `results/weights.csv`."""

PARTS = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
"""The matrices of a block that can be computed in whole numbers; there may be no others."""


@technique(
    name="i-vit",
    wing="weights",
    source=Source("I-ViT: Integer-only Quantization for Efficient Vision Transformer Inference", 2022, "2207.01405"),
    accounts=[Account.WEIGHTS],
    jobs=["compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[Claim("speed-up (times)", 3.72, versus="floating point", at="TVM on a GPU, at least", where="abstract")],
    fidelity="scales by calibration without fine-tuning; patch embedding and classifier stay in floating point",
)
@dataclass(frozen=True, kw_only=True)
class IViT(WeightMethod):
    """Blocks in whole numbers.

    Attributes:
        softmax_bits: of the attention's shares, with a sign, 8 to 16.
        gelu_bits: of the sigmoid in GELU, with a sign, 8 to 16.
    """

    calibrated: ClassVar[bool] = True
    refines: ClassVar[bool] = True
    converts: ClassVar[bool] = True
    model_types: ClassVar[tuple[str, ...]] = ("vit", "deit")
    softmax_bits: int = 16
    gelu_bits: int = 8

    def __post_init__(self) -> None:
        if not (8 <= self.softmax_bits <= 16 and 8 <= self.gelu_bits <= 16):
            raise UnsupportedModel(
                f"shares of {self.softmax_bits} and {self.gelu_bits} bits do not fit the sums of 32 bits",
                hint="choose 8 to 16 bits",
            )

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """Signed words of 8 bits with a scale a row."""
        return (Grid(bits=8, group_size=-1, symmetric=True),)

    def layout(self, targets: Sequence[Target], evidence: Evidence | None = None) -> Layout:
        """Every matrix of a ViT's blocks.

        Raises:
            UnsupportedModel: naming the first parameter that is none of them.
        """
        require_parts(targets, PARTS, self)
        return super().layout(targets, evidence)

    @torch.no_grad()
    def converted_block(self, block: nn.Module, calls: Sequence[BlockCall] = ()) -> nn.Module:
        """The block in whole numbers, with scales that fit its activations on the calibration images.

        Raises:
            UnsupportedModel: when the block's activation is not GELU.
        """
        activation = str(block.mlp.config.hidden_act)  # type: ignore[union-attr]
        if activation != "gelu":
            raise UnsupportedModel(
                f"i-vit computes GELU in whole numbers, not {activation}", hint="choose rtn, which keeps activations"
            )
        largest = observe(block, calls) if calls else {}
        made = IntegerViTLayer(block, self.softmax_bits, self.gelu_bits)
        if calls:
            made.set_(block, largest)
        else:
            made.drop_biases_()
        return made.train(block.training)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """That of 8 bits for weights and activations."""
        return RISE

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[IViT]:
        """One, for models that it is for."""
        if shape.config.model_type in cls.model_types:
            yield cls()


def observe(block: Any, calls: Sequence[BlockCall]) -> dict[str, float]:
    """The largest magnitude of everything that a block in whole numbers rescales, by its name there."""
    largest: dict[str, float] = {}
    seen: dict[str, Tensor] = {}

    def take(name: str, tensor: Tensor) -> None:
        seen[name] = tensor
        largest[name] = max(largest.get(name, 0.0), float(tensor.abs().max()))

    with _watching(block, take):
        for call in calls:
            take("input", call.args[0] if call.args else call.kwargs["hidden_states"])
            take("output", block(*call.args, **call.kwargs))
            heads = [seen[n].unflatten(-1, (-1, block.attention.head_dim)).transpose(1, 2) for n in ("query", "key")]
            take("score", heads[0] @ heads[1].transpose(-1, -2) * block.attention.head_dim**-0.5)
    return largest


@contextmanager
def _watching(block: Any, take: Any) -> Iterator[None]:
    """A context in which a dense block's parts report what they are given and give."""
    attention, mlp = block.attention, block.mlp
    given = {"middle": block.layernorm_after, "context": attention.o_proj, "activation": mlp.fc2}
    gives = {
        "norm1": block.layernorm_before,
        "norm2": block.layernorm_after,
        "query": attention.q_proj,
        "key": attention.k_proj,
        "value": attention.v_proj,
        "out": attention.o_proj,
        "up": mlp.fc1,
        "down": mlp.fc2,
    }
    with ExitStack() as stack:
        for name, part in given.items():
            hook = part.register_forward_pre_hook(lambda module, args, name=name: take(name, args[0]))
            stack.callback(hook.remove)
        for name, part in gives.items():
            hook = part.register_forward_hook(lambda module, args, out, name=name: take(name, out))
            stack.callback(hook.remove)
        yield
