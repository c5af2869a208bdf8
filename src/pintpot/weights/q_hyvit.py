"""Q-HyViT: grids for the layers of a hybrid vision transformer, chosen by how much the loss would curve for them.

Source:    Lee et al. 2023, "Q-HyViT", arXiv:2303.12557: scales by search over shares of the largest magnitude, errors
           of a layer's output weighted by squared gradients, and bridge blocks (what brings channels from convolutions
           into a transformer, and the first projections there), which stay rounded while later layers are fitted.
Differs:   built from the abstract, summaries of the paper and a description of the authors' code. Gradients are
           of the cross-entropy with classes drawn from the dense model's own prediction: those of the authors'
           divergence from it are zero until something is rounded. Errors are measured on a sample of each layer's
           inputs. Granularity and scheme are chosen for the inputs of every layer; weights are symmetric with
           a scale a row, also those of linear layers. Steps and zeros are stored for each in-feature whichever was
           chosen, so that bytes follow from shapes. Ranges always hold zero, so that no zero point overflows. Depthwise
           convolutions, the stem, the head, and the products inside attention stay in floating point.
Saves:     weights, real: O * (packed_size(I, 8) + 2) + 8 I bytes a matrix. Applying it needs the whole dense model and
           the activations of one batch of images with their gradients.
Shapes:    weight (O, I), a convolution's I its channels times its kernel; codes (O, I) packed; scale (O, 1); input_step
           and input_zero (I,).
Composes:  nothing that needs dense weights.
Use when:  a MobileViT in 8 or 6 bits, with activations that hardware can multiply in as many.
Not when:  only weights have to be small: rtn and gptq leave activations alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pintpot.core.errors import CompositionError, UnsupportedModel
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.weights._base import Evidence, Layout, Texts, WeightMethod, risk_between
from pintpot.weights.curved_rows import CurvedRows, draw_classes, observe_curved
from pintpot.weights.examined import ExaminedLayout, Replaced
from pintpot.weights.formats import Format, Grid, StaticInput, Tensors
from pintpot.weights.modules import place_
from pintpot.weights.statistics import BlockCall
from pintpot.weights.targets import Target

RISES = ((8.5, 0.018), (6.5, 0.02), (4.5, 0.084), (3.5, 0.21))
"""Bits a weight and the relative rise of the loss, of the tiny MobileViT in `results/weights.csv`; at 6 it fell."""

BRIDGE = (
    "conv_1x1.convolution",
    "transformer.layer.0.attention.attention.query",
    "transformer.layer.0.attention.attention.key",
    "transformer.layer.0.attention.attention.value",
    "transformer.layer.0.attention.qkv_proj.convolution",
)
"""The layers of a bridge block, by their names in a stage of MobileViT or of its second version."""


@technique(
    name="q-hyvit",
    wing="weights",
    source=Source(
        "Q-HyViT: Post-Training Quantization of Hybrid Vision Transformers with Bridge Block Reconstruction for IoT "
        "Systems",
        2023,
        "2303.12557",
    ),
    accounts=[Account.WEIGHTS],
    jobs=["compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim("accuracy gained (percent)", 17.73, versus="earlier methods", at="8 bits, average", where="abstract"),
        Claim("accuracy gained (percent)", 29.75, versus="earlier methods", at="6 bits, average", where="abstract"),
    ],
    fidelity="depthwise convolutions, stem, head and attention's products stay dense; classes are drawn for gradients; "
    "built from summaries of paper and code",
)
@dataclass(frozen=True, kw_only=True)
class QHyViT(WeightMethod):
    """Scales, granularity and scheme by search.

    Attributes:
        bits: of weights, 2 to 8.
        activation_bits: of the inputs of layers, 2 to 8.
        least_share: of the largest magnitude, the smallest that a grid may reach to.
        most_share: the largest.
        steps: shares that are tried lie so many steps apart, both ends included.
        rounds: how often the scales of weight and input are searched in turn.
        samples: rows of a layer's input, over all images, that errors are measured on.
    """

    calibrated: ClassVar[bool] = True
    examines: ClassVar[bool] = True
    looks_at_whole: ClassVar[bool] = True
    refines: ClassVar[bool] = True
    remembers: ClassVar[bool] = True
    model_types: ClassVar[tuple[str, ...]] = ("mobilevit", "mobilevitv2")
    bits: int = 8
    activation_bits: int = 8
    least_share: float = 0.01
    most_share: float = 1.2
    steps: int = 100
    rounds: int = 3
    samples: int = 1024

    def __post_init__(self) -> None:
        for bits in (self.bits, self.activation_bits):
            if not 2 <= bits <= 8:
                raise CompositionError(f"q-hyvit has 2 to 8 bits, not {bits}", hint="the paper has 8, and 6")
        if min(self.steps, self.rounds, self.samples) < 1 or not 0 < self.least_share < self.most_share:
            raise CompositionError(
                f"q-hyvit cannot try {self.steps} steps from {self.least_share} to {self.most_share}",
                hint="the defaults are least_share=0.01, most_share=1.2, steps=100, rounds=3, samples=1024",
            )

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """A symmetric grid with a scale a row, whose input is rounded."""
        return (self._format(dtype),)

    def _format(self, dtype: torch.dtype) -> StaticInput:
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        grid = Grid(bits=self.bits, group_size=-1, symmetric=True, scale_dtype=scale)
        return StaticInput(inner=grid, bits=self.activation_bits, symmetric=False, per_channel=True)

    def layout(self, targets: Sequence[Target], evidence: Evidence | None = None) -> Layout:
        """The same formats for all, with what was found for each.

        Raises:
            UnsupportedModel: when there is no bridge block, naming the first parameter.
        """
        if not any(_in_bridge(target) for target in targets):
            raise UnsupportedModel(
                f"q-hyvit does not know what to do with {targets[0].parameter}: there is no bridge block",
                hint=f"it is for models of the kinds {', '.join(self.model_types)}",
            )
        formats = super().layout(targets)
        return formats if evidence is None else ExaminedLayout(formats, evidence)

    def examine_model(self, model: PreTrainedModel, targets: Sequence[Target], texts: Texts) -> Evidence:
        """The scales of each weight, and the steps and zeros of its input, found in the order of the model."""
        self.layout(targets)
        classes = draw_classes(model, texts)
        dense = {target.module: model.get_submodule(target.module) for target in targets}
        found: dict[str, dict[str, Tensor]] = {}
        try:
            for stretch in _stretches(targets):
                seen = observe_curved(model, [t.module for t in stretch], texts, classes, self.samples)
                for target in stretch:
                    weight = target.rows(model.get_parameter(target.parameter).detach())
                    layout = self._format(target.dtype)
                    found[target.parameter] = self.search(weight.float(), seen.pop(target.module), layout)
                    if _in_bridge(target):
                        terms = (_stored(weight.float(), layout, found[target.parameter]),)
                        place_(model, target, (layout,), terms)
        finally:
            for name, module in dense.items():
                model.set_submodule(name, module)
        return found

    def search(self, weight: Tensor, seen: CurvedRows, layout: StaticInput) -> dict[str, Tensor]:
        """The ``share`` (O, 1), ``step`` (I,) and ``zero`` (I,) with the least error, over granularities and schemes.

        The share says how much of a row's largest magnitude its grid reaches to.

        Args:
            weight: float32 (O, I).
            seen: of the layer.
            layout: as ``terms`` gives it.
        """
        best: dict[str, Tensor] = {}
        least = torch.inf
        for low, high in (seen.range_of_all(), (seen.low, seen.high)):
            for symmetric in (True, False):
                found, error = self._search_in(weight, seen, layout, low, high, symmetric)
                if error < least:
                    best, least = found, error
        return best

    def _search_in(
        self, weight: Tensor, seen: CurvedRows, layout: StaticInput, low: Tensor, high: Tensor, symmetric: bool
    ) -> tuple[dict[str, Tensor], float]:
        """The best scales of weight and input in turn, for one granularity and scheme, and their error."""
        # From the largest down, so that nothing is cut off where it makes no difference.
        shares = torch.linspace(self.most_share, self.least_share, self.steps + 1, device=weight.device)
        wanted = seen.rows @ weight.t()
        input_grid = _grid_of_input(layout, low, high, symmetric)
        for _ in range(self.rounds):
            given = layout.round(seen.rows, *input_grid)
            errors = [seen.error(given @ _rounded(weight, layout, share).t() - wanted) for share in shares]
            best_share = shares[torch.stack(errors).argmin(0)][:, None]
            held = _rounded(weight, layout, best_share).t()
            tried = [_grid_of_input(layout, share * low, share * high, symmetric) for share in shares]
            sums = torch.stack([seen.error(layout.round(seen.rows, *own) @ held - wanted).sum() for own in tried])
            input_grid = tried[int(sums.argmin())]
        step, zero = (t.expand(weight.shape[1]).clone() for t in input_grid)
        return {"share": best_share, "step": step, "zero": zero}, float(sums.min())

    def retrain_block_(
        self,
        block: nn.Module,
        calls: Sequence[BlockCall],
        outputs: Sequence[Tensor],
        replaced: Sequence[Replaced],
    ) -> None:
        """Store what was found."""
        for own in replaced:
            layout = own.holder.formats[0]
            if own.evidence and isinstance(layout, StaticInput):
                for name, tensor in _stored(own.weight.float(), layout, own.evidence).items():
                    own.holder.get_buffer(f"term0_{name}").copy_(tensor)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[QHyViT]:
        """The paper's widths, for models that it is for."""
        if shape.config.model_type in cls.model_types:
            for bits in (8, 6):
                yield cls(bits=bits, activation_bits=bits)


def _in_bridge(target: Target) -> bool:
    return target.module.removeprefix(f"{target.block}.") in BRIDGE


def _stretches(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """The layers in the model's order, cut after each part of a bridge block: what is fitted together."""
    own: list[Target] = []
    for target, after in zip_longest(targets, targets[1:]):
        own.append(target)
        beside = after is not None and after.module.rpartition(".")[0] == target.module.rpartition(".")[0]
        if after is None or (_in_bridge(target) and not beside):
            yield own
            own = []


def _codes(weight: Tensor, layout: StaticInput, share: Tensor) -> tuple[Grid, tuple[Tensor, Tensor, Tensor]]:
    """The grid of a weight float32 (O, I), and codes, scales and zeros on it that reach to a share of each row."""
    grid = layout.inner
    assert isinstance(grid, Grid)
    top = weight.abs().amax(1, keepdim=True) * share
    scale, zero = grid.settle(-top, top)
    return grid, (grid.round(weight, scale, zero), scale, zero)


def _rounded(weight: Tensor, layout: StaticInput, share: Tensor) -> Tensor:
    grid, codes = _codes(weight, layout, share)
    return grid.value(*codes)


def _stored(weight: Tensor, layout: StaticInput, found: Mapping[str, Tensor]) -> Tensors:
    grid, codes = _codes(weight, layout, found["share"])
    return layout.encode_with(grid.store(*codes), found["step"], found["zero"])


def _grid_of_input(layout: StaticInput, low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Step and zero of inputs in a range; a symmetric grid is one whose zero is in the middle."""
    if not symmetric:
        return layout.fit(low, high)
    middle = 1 << (layout.bits - 1)
    step = torch.maximum(-low, high) / (middle - 1)
    return step, torch.full_like(step, middle)
