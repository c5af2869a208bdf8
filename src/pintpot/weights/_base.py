"""The algebra of the weights wing: a weight is a sum of terms, and a method finds the terms.

Shapes: O out-features, I in-features, E matrices of a stack. A weight is (O, I), as in ``nn.Linear``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Ledger
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Technique
from pintpot.core.work import Work
from pintpot.core.workload import Compress, Workload
from pintpot.weights.formats import Format, Tensors
from pintpot.weights.ranked import RankedLayout
from pintpot.weights.statistics import BlockCall, InputStatistics

if TYPE_CHECKING:
    from pintpot.weights.examined import Replaced
    from pintpot.weights.targets import Target

Layout = Mapping[str, tuple[Format, ...]]
"""The formats of the terms of each parameter that is replaced, by its name; the others stay dense."""

Evidence = Mapping[str, Mapping[str, Tensor]]
"""What a method found in each parameter before it laid them out, by the parameter's name and a name of its own."""

Texts = Sequence[Tensor | Mapping[str, Tensor]]
"""What a model is run on to calibrate: batches of token ids int64 (B, T) without padding, or of any inputs by name."""


ROWS_AT_ONCE = 4
"""Sequences of texts that a model reads together when it is calibrated."""

SECONDS_A_NUMBER = 5e-6
"""What finding a number's code takes a method that looks at activations, on two cores: hours for billions of them."""


@dataclass(frozen=True)
class CompressionReport:
    """What compressing a model did.

    Attributes:
        compressed: parameter names (dense names) that were replaced.
        left_dense: matrices inside the blocks that were left as they were, with the reason.
        dense_bytes: bytes of the replaced parameters before.
        packed_bytes: bytes of their terms after.
    """

    compressed: tuple[str, ...]
    left_dense: tuple[tuple[str, str], ...]
    dense_bytes: int
    packed_bytes: int


@dataclass(frozen=True, kw_only=True)
class WeightMethod(Technique):
    """A technique that replaces weight matrices by sums of terms.

    A method gives the formats (``terms``, or ``layout`` where they differ from one parameter to the next) and the
    numbers in them (``find``). What it must know of a model's activations it declares, and is given.

    Compression in place is not undone: the dense weights are gone (load the dense folder again, or call
    ``model.dequantize()`` for ordinary layers that hold the rounded weights).
    """

    calibrated: ClassVar[bool] = False
    """Whether ``find`` needs the statistics of inputs, and so texts."""

    examines: ClassVar[bool] = False
    """Whether ``layout`` needs evidence, which a pass over the model with ``examine`` gathers before."""

    looks_at_whole: ClassVar[bool] = False
    """Whether the evidence comes from ``examine_model``, which needs the whole model in memory, and not from
    ``examine``."""

    refines: ClassVar[bool] = False
    """Whether ``refine_block_`` changes a block after its weights were replaced."""

    remembers: ClassVar[bool] = False
    """Whether ``retrain_block_`` takes the place of ``refine_block_`` in a method that refines. The dense weights of a
    block, and what an ``ExaminedLayout`` holds, stay in memory for it."""

    rearranges: ClassVar[bool] = False
    """Whether ``rearrange_block_`` changes a block before its weights are packed."""

    corrects_bias: ClassVar[bool] = False
    """Whether the mean error that packing makes in a layer's output is taken out of its bias, where it has one. Needs
    the statistics of inputs."""

    converts: ClassVar[bool] = False
    """Whether ``converted_block`` gives other modules. Then folders are compressed with the packed model in memory."""

    model_types: ClassVar[tuple[str, ...]] = ()
    """The kinds of models (``config.model_type``) that it is for; any where empty."""

    drops: ClassVar[bool] = False
    """Whether it drops directions or numbers, so that random weights, which have none to spare, do not come near."""

    @abstractmethod
    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """The formats of the terms of one weight, from its name, shape and dtype alone.

        Raises:
            ShapeError: when a weight of this shape cannot be held so.
        """

    def layout(self, targets: Sequence[Target], evidence: Evidence | None = None) -> Layout:
        """The formats of every parameter; those of ``terms`` unless overridden.

        Args:
            targets: the parameters that can be replaced.
            evidence: what ``examine`` found; None where only shapes are known, and a layout of the same bytes is
                wanted for prediction.
        """
        return {t.parameter: self.terms(t.parameter, t.shape[-2], t.shape[-1], t.dtype) for t in targets}

    def examine(self, name: str, weight: Tensor, inputs: InputStatistics | None) -> dict[str, Tensor]:
        """What ``layout`` must know of one weight (O, I); small tensors by names of the method's own.

        Args:
            name: the parameter's.
            weight: its numbers; of a stack, one matrix after the other along O.
            inputs: where the method is calibrated; of a stack, those of its first matrix that met any.
        """
        return {}

    def examine_model(self, model: PreTrainedModel, targets: Sequence[Target], texts: Texts) -> Evidence:
        """What ``layout`` must know that only the whole model tells: gradients of its loss, what its blocks give.

        Called once, before anything is replaced, where the method ``examines`` and ``looks_at_whole``.

        Args:
            model: dense, all in memory, in evaluation mode. It must be left as it was.
            targets: the parameters that can be replaced.
            texts: what the model reads.
        """
        return {}

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """The stored tensors of the terms of ``weight`` (O, I).

        Each term encodes what the terms before it left over; methods with another objective override this.

        Args:
            name: the parameter's.
            weight: its numbers.
            formats: of its terms, as the layout says; they may differ from ``terms``.
            inputs: of the layer, where the method is calibrated. None for a method that is not, and for experts that
                met no token.
        """
        found: list[Tensors] = []
        rest = weight
        for index, layout in enumerate(formats):
            found.append(layout.encode(rest))
            if index + 1 < len(formats):
                rest = rest - layout.decode(found[-1], rest.shape[-1], rest.dtype)
        return tuple(found)

    @property
    def works_on_blocks(self) -> bool:
        """Whether a block's parameters must be in memory together when they are packed."""
        return self.calibrated or self.refines or self.rearranges or self.converts

    def rearrange_block_(self, block: nn.Module, calls: Sequence[BlockCall] = ()) -> None:
        """Change a dense block so that it computes what it did, and is packed with less loss.

        Args:
            block: with dense weights. Its parameters keep their names, shapes and dtypes.
            calls: how the model calls it, where the method is calibrated or refines.
        """

    def refine_block_(self, block: nn.Module, calls: Sequence[BlockCall], outputs: Sequence[Tensor]) -> None:
        """Change what a block holds so that its outputs come nearer to the dense block's.

        Args:
            block: with packed weights.
            calls: how the model calls it, once for each batch of texts.
            outputs: hidden states that the dense block gave for these calls.
        """

    def retrain_block_(
        self,
        block: nn.Module,
        calls: Sequence[BlockCall],
        outputs: Sequence[Tensor],
        replaced: Sequence[Replaced],
    ) -> None:
        """Do what ``refine_block_`` does, with the dense weights at hand, where the method ``remembers``.

        Args:
            block: with packed weights.
            calls: how the model calls it, once for each batch of texts.
            outputs: hidden states that the dense block gave for these calls.
            replaced: its parameters that were packed.
        """

    def converted_block(self, block: nn.Module, calls: Sequence[BlockCall] = ()) -> nn.Module:
        """What takes the place of a block when its weights are packed, where the method ``converts``.

        Args:
            block: with packed weights, whose parts may be taken over.
            calls: how the model calls it. None where there are only shapes: then the structure is what counts.
        """
        return block

    def quantize_model_(self, model: PreTrainedModel, texts: Texts = ()) -> CompressionReport:
        """Replace the weights of a model in place, one matrix at a time.

        Works on fake and meta tensors too where no texts are needed (then only shapes are computed). Marks the model
        so that ``save_pretrained`` writes a folder that ``from_pretrained`` loads.

        Args:
            model: dense.
            texts: what to calibrate on, where the method is calibrated or examines activations.

        Raises:
            UnsupportedModel: naming every module that cannot be compressed.
            ModelFolderError: naming the first parameter that holds NaN or Inf.
            CompositionError: when texts are needed and there are none.
        """
        # Imported here because both modules build on this one.
        from pintpot.weights.quantizer import mark_
        from pintpot.weights.replace import compress_

        self.require_texts(texts)
        report, layout = compress_(model, self, texts)
        mark_(model, self, layout)
        return report

    def prepare_skeleton_(
        self, model: PreTrainedModel, *, dtype: torch.dtype | None = None, layout: Layout | None = None
    ) -> CompressionReport:
        """Replace the weights of a model by empty packed storage on the weights' own device.

        For meta and fake models (prediction), and for models whose storage is loaded afterwards.

        Args:
            model: the dense skeleton.
            dtype: of the weights when they were compressed, where the skeleton has another.
            layout: the formats, where they are known; otherwise those that shapes alone tell.

        Raises:
            UnsupportedModel: naming every module that cannot be compressed.
        """
        from pintpot.weights.replace import empty_

        return empty_(model, self, layout, dtype)

    def require_texts(self, texts: Texts) -> None:
        """Refuse to go on without texts where the method needs them.

        Raises:
            CompositionError: saying how to give some.
        """
        if self.calibrated and not texts:
            raise CompositionError(
                f"{self.name} looks at what the layers are given when the model reads text, and there is none",
                hint="give texts: with --data on the command line, or texts=[token ids] in Python",
            )

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """Packed instead of dense matrices, the product's workspace, and the peak of applying it."""
        from pintpot.weights.forecast import packed_ledger

        return packed_ledger(self, ledger, shape, workload)

    def work(self, work: Work, shape: ModelShape, workload: Workload) -> Work:
        """Packed bytes are read instead of dense ones; for products of many rows they are made dense part by part."""
        from pintpot.weights.forecast import packed_work

        return packed_work(self, work, shape, workload)

    def finding_bytes(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bytes of temporaries that ``find`` makes for a weight (O, I) of a dtype, beside what it is given and gives.

        Unless overridden those of rounding rows to nearest, and for a calibrated method of two copies in 32 bits of
        the weight and of its inputs' second moments.
        """
        from pintpot.weights.forecast import encoding_bytes

        copies = 8 * (in_features**2 + out_features * in_features) if self.calibrated else 0
        return copies + encoding_bytes(out_features, in_features, dtype)

    def applying_bytes(self, shape: ModelShape, workload: Compress) -> int:
        """Most bytes of tensors that are held at a time while a folder is compressed, the model's own among them."""
        from pintpot.weights.forecast import compression_peak

        return compression_peak(self, shape, workload)

    def seconds_to_apply(self, shape: ModelShape, workload: Workload) -> float:
        """A rough figure for methods that look at activations: they are meant to be applied once, into a folder."""
        ahead = workload.job == "compress" or not (self.works_on_blocks or self.examines)
        return 0.0 if ahead else SECONDS_A_NUMBER * shape.numel

    def bits_a_weight(self, shape: ModelShape) -> float:
        """Stored bits for each number that is replaced, scales and all."""
        from pintpot.weights.forecast import stored_bits

        return stored_bits(self, shape)

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Technique]:
        """The configurations that the planner may choose from, from the safest to the smallest."""
        yield cls()


def describe(layout: Layout) -> dict[str, Any]:
    """A layout in JSON: every tuple of formats once, and its number for each parameter; an order by their numbers."""
    kinds = list(dict.fromkeys(layout.values()))
    places = {name: index for index, name in enumerate(layout)}
    return {
        "formats": [[layout_.to_dict() for layout_ in formats] for formats in kinds],
        "layout": {name: kinds.index(formats) for name, formats in layout.items()},
        **({"order": [places[name] for name in layout.order]} if isinstance(layout, RankedLayout) else {}),
    }


def risk_between(measured: Sequence[tuple[float, float]], bits: float) -> float:
    """The relative rise of perplexity at so many bits a weight, between measured ones.

    Args:
        measured: bits a weight, falling, and the rise at each. Between two of them, and beyond the last, the rise's
            logarithm is taken to be linear.
        bits: stored for each weight, scales and all.
    """
    last = len(measured) - 2
    index = next((i for i in range(last) if bits >= measured[i + 1][0]), last)
    (more, low), (fewer, high) = measured[index], measured[index + 1]
    slope = (math.log(high) - math.log(low)) / (more - fewer)
    return math.exp(math.log(low) + slope * (more - bits))
