"""Quamba: a Mamba whose weights and activations have 8 bits, with clipped inputs and mixed outputs of the scan.

Source:    Chiang et al. 2024, "Quamba", arXiv:2410.13229: static steps for whole tensors, the percentile that clips the
           scan's input x, and the Hadamard transform of its output; percentile, running mean and the places that are
           rounded from the authors' code.
Differs:   A, D, the convolution's weight (4 numbers a channel) and the normalisations stay as they are, where the
           authors round them too; embedding and head stay dense. Widths that are no power of 2 are mixed in blocks of
           the greatest power of 2 that divides them. Products are made in floating point.
Saves:     weights, real: O * (packed_size(I, 8) + 2) bytes a matrix, 4 more for the step of its input and 24 a block.
           Applying it needs one dense block and the texts' hidden states.
Shapes:    weight (O, I); codes (O, I) packed; scale (O, 1), all equal; input_step (1,); steps (6,).
Composes:  activations, adapters on the frozen base; not with anything that needs dense weights.
Use when:  a Mamba in 8 bits, with activations that hardware can multiply in 8 bits too.
Not when:  only weights have to be small: rtn and gptq keep activations, and reach 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account, Ledger
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload
from pintpot.kernels.hadamard import power_of_two
from pintpot.weights._base import Evidence, Layout, WeightMethod, risk_between
from pintpot.weights.formats import Format, Grid, Rotated, StaticInput, Tensors
from pintpot.weights.quantised_mamba import ROUNDED, QuantisedMixer
from pintpot.weights.statistics import BlockCall, InputStatistics
from pintpot.weights.targets import Target, require_parts

RISES = ((8.1, 0.001), (6.1, 0.004), (4.1, 0.044), (3.1, 0.335))
"""Bits a weight and the relative rise of perplexity, of the tiny Mamba in `results/weights.csv`."""

PARTS = ("mixer.in_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj")
"""The matrices of a mixer; there may be no others."""

NEW_SHARE = 0.01
"""Of a text's percentile in the running one."""


@technique(
    name="quamba",
    wing="weights",
    source=Source("Quamba: A Post-Training Quantization Recipe for Selective State Space Models", 2024, "2410.13229"),
    accounts=[Account.WEIGHTS],
    jobs=["generate", "compress"],
    removes=["dense_weights", "matrix_gradients"],
    claims=[
        Claim("average accuracy lost (points)", 0.9, versus="dense", at="Mamba 2.8B, 8 bits", where="abstract"),
        Claim("lower generation latency (times)", 1.72, versus="dense", at="Mamba 2.8B, Orin Nano", where="abstract"),
    ],
    fidelity="A, D and the convolution's weight stay in floating point",
)
@dataclass(frozen=True, kw_only=True)
class Quamba(WeightMethod):
    """Mamba in 8 bits.

    Attributes:
        bits: of weights, 2 to 8; the paper has 8.
        percentile: share of the magnitudes of the scan's input that is not clipped.
        rotate: mix the scan's output before it is rounded.
    """

    calibrated: ClassVar[bool] = True
    refines: ClassVar[bool] = True
    converts: ClassVar[bool] = True
    model_types: ClassVar[tuple[str, ...]] = ("mamba",)
    bits: int = 8
    percentile: float = 0.99999
    rotate: bool = True

    def __post_init__(self) -> None:
        Grid(bits=self.bits)
        if not 0.5 < self.percentile <= 1:
            raise CompositionError(
                f"quamba clips above a percentile between 0.5 and 1, not {self.percentile}", hint="for instance 0.99999"
            )

    def terms(self, name: str, out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Format, ...]:
        """Words with one step; the first and the last matrix round their input, the last one mixes it before."""
        scale = "bfloat16" if dtype is torch.bfloat16 else "float16"
        grid: Format = Grid(bits=self.bits, group_size=-1, symmetric=True, scale_dtype=scale)
        layer = name.split(".")[-2]
        if layer == "in_proj":
            return (StaticInput(inner=grid),)
        if layer == "out_proj":
            rounded = StaticInput(inner=grid)
            return (Rotated(inner=rounded, block=power_of_two(in_features)) if self.rotate else rounded,)
        return (grid,)

    def layout(self, targets: Sequence[Target], evidence: Evidence | None = None) -> Layout:
        """Every matrix of the mixers.

        Raises:
            UnsupportedModel: naming the first parameter that is none of them.
        """
        require_parts(targets, PARTS, self)
        return super().layout(targets, evidence)

    def find(
        self, name: str, weight: Tensor, formats: tuple[Format, ...], inputs: InputStatistics | None = None
    ) -> tuple[Tensors, ...]:
        """Rounded to nearest with one step for the whole matrix."""
        return (_encode(weight.float(), formats[0]),)

    @torch.no_grad()
    def converted_block(self, block: nn.Module, calls: Sequence[BlockCall] = ()) -> nn.Module:
        """The block with a mixer that rounds, whose steps fit its activations on the texts."""
        mixer = QuantisedMixer(block.mixer)
        block.mixer = mixer.train(block.training)
        if calls:
            _set_steps_(block, calls, self.percentile)
        return block

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """As every method, and the steps of each block."""
        steps = len(ROUNDED) * 4 * int(shape.config.num_hidden_layers)
        packed = super().predict(ledger, shape, workload)
        if workload.job == "compress":
            return packed
        return packed.edit(lambda moment: moment.with_bytes(Account.WEIGHTS, moment.of(Account.WEIGHTS) + steps))

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From bits a weight; large models lose less than small ones."""
        return risk_between(RISES, self.bits_a_weight(shape))

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Quamba]:
        """From the safest to the smallest, for models that it is for."""
        if shape.config.model_type in cls.model_types:
            for bits in (8, 6, 4):
                yield cls(bits=bits)


def _encode(weight: Tensor, layout: Format) -> Tensors:
    """The stored tensors of a weight (O, I) with one step, inside the formats that treat the input."""
    if isinstance(layout, Rotated):
        return {f"inner_{name}": t for name, t in _encode(layout.mix(weight), layout.inner).items()}
    if isinstance(layout, StaticInput):
        return layout.encode_with(_encode(weight, layout.inner), torch.zeros(1, device=weight.device))
    if not isinstance(layout, Grid):
        return layout.encode(weight)
    top = weight.abs().amax().expand(weight.shape[0], 1)
    scale, zero = layout.settle(-top, top)
    return layout.store(layout.round(weight, scale, zero), scale, zero)


def _set_steps_(block: nn.Module, calls: Sequence[BlockCall], share: float) -> None:
    """Run a block on texts, with nothing rounded, and set every step by what it saw."""
    mixer: Any = block.mixer
    seen: dict[str, Tensor] = {}

    def take(name: str, tensor: Tensor) -> None:
        found = tensor.float().abs().amax()
        seen[name] = torch.maximum(seen[name], found) if name in seen else found

    def before_scan(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        found = percentile(args[0].abs(), share)
        seen["scanned"] = seen["scanned"] + NEW_SHARE * (found - seen["scanned"]) if "scanned" in seen else found
        parts = out.split([mixer.rank, mixer.states, mixer.states], dim=-1)
        for name, part in zip(ROUNDED[3:], parts, strict=True):
            take(name, part)

    def after_first(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        take("in_proj", args[0])
        for name, part in zip(ROUNDED[:2], out.chunk(2, dim=-1), strict=True):
            take(name, part)

    def before_last(module: Any, args: tuple[Any, ...]) -> None:
        layout = module.formats[0]
        take("out_proj", layout.mix(args[0].float()) if isinstance(layout, Rotated) else args[0])

    with ExitStack() as stack:
        hook: Callable[..., Any]
        for part, hook in ((mixer.in_proj, after_first), (mixer.x_proj, before_scan)):
            stack.callback(part.register_forward_hook(hook).remove)
        stack.callback(mixer.out_proj.register_forward_pre_hook(before_last).remove)
        for call in calls:
            block(*call.args, **call.kwargs)
    half = (1 << 7) - 1
    mixer.steps.copy_(torch.stack([seen[name] for name in ROUNDED]) / half)
    for name in ("in_proj", "out_proj"):
        for place, tensor in getattr(mixer, name).named_buffers():
            if place.endswith("input_step"):
                tensor.copy_(seen[name] / half)


def percentile(numbers: Tensor, share: float) -> Tensor:
    """The number below which so large a share of them is, between two of them in proportion."""
    flat = numbers.float().flatten()
    place = (flat.numel() - 1) * share
    above = flat.numel() - 1 - int(place)
    top = flat.topk(above + 1).values
    return top[-1] + (place - int(place)) * (top[max(above - 1, 0)] - top[-1])
