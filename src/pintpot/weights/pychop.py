"""Pychop: linear layers as arithmetic of fewer bits would compute them, to see what a number format costs in quality.

Source:    Carson and Chen 2025, "Pychop: Emulating Low-Precision Arithmetic in Numerical Methods and Neural Networks",
           arXiv:2504.07835, and the authors' package (0.6.2): its formats, its rounding modes and its quantised linear
           layer, which rounds weight, bias and output and passes gradients straight through.
Differs:   of a model's layers only those with matrices in the blocks are rounded (of a layer of experts the weights and
           the sum that comes out). What lies above a format's range becomes infinite or the largest number as IEEE 754
           says, exact numbers stay under rounding to odd, and ties go towards zero or away from it on both sides, where
           the package does otherwise. Gradients of clipped numbers are zero. Random rounding draws from Philox by the
           place of a number. Outputs of a model in 16 bits have been rounded to its dtype before. CADNA's rounding,
           microscaling and block floating point, faults, and the element-wise functions of the package are left out.
Saves:     weights, simulated: rounded numbers are kept in the model's dtype, and no byte is freed. Generation holds one
           rounded layer beside the model, training all of them and the outputs before rounding.
Shapes:    weights of any shape, biases (O,), outputs (..., O).
Composes:  caches, optimizers with their states, activations, in training of the matrices themselves; not with packed
           weights or adapters.
Use when:  a format, a rounding mode or hardware with either is to be tried before it is built.
Not when:  memory is to be saved: minifloat-ptq and qfx-fixed-point store what they round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from pintpot.core.errors import CompositionError, UnsupportedModel
from pintpot.core.ledger import Account, Ledger
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Saving, Source, technique
from pintpot.core.work import Work
from pintpot.core.workload import Train, Workload
from pintpot.kernels import native
from pintpot.kernels.rounding import FixedPoint, Integer, NumberFormat, Rounding, format_named, round_to
from pintpot.weights._base import risk_between
from pintpot.weights.arithmetic import Arithmetic
from pintpot.weights.forecast import targets_of
from pintpot.weights.targets import find_targets

RISES = ((10.0, 0.00001), (7.0, 0.0001), (3.0, 0.0045), (2.0, 0.031), (1.0, 0.157))
"""Bits of a significand beside 5 bits of exponent, and the relative rise of the embedded model's perplexity."""
RANGE_LOST = {4: 0.2, 3: 0.8, 2: 3.0}
"""Bits of a significand that fewer bits of exponent are as bad as losing, by the same measure."""
INTEGER_LOST, FRACTION_LOST = 5.0, 5.0
"""Bits of an integer over the numbers' range, or of a fraction, that give no bits of a significand."""

PLAIN_BYTES = 56
"""Of temporaries for each number that is rounded without the compiled kernel."""


@technique(
    name="pychop",
    wing="weights",
    part="arithmetic",
    source=Source(
        "Pychop: Emulating Low-Precision Arithmetic in Numerical Methods and Neural Networks", 2025, "2504.07835"
    ),
    accounts=(Account.WEIGHTS,),
    jobs=("generate", "finetune"),
    needs=("dense_weights", "matrix_gradients"),
    saving=Saving.SIMULATED,
    fidelity="layers with matrices in the blocks only; overflow, ties and rounding to odd as IEEE 754 has them",
)
@dataclass(frozen=True, kw_only=True)
class Pychop(Arithmetic):
    """Linear layers in another arithmetic.

    Attributes:
        format: of the numbers: a name of ``kernels.rounding.format_named``.
        rounding: how they are rounded, a name of ``kernels.rounding.Rounding``.
        weights: round weights and biases.
        activations: round outputs.
        seed: of random rounding. A generation draws for its weights once, training for every step anew.
    """

    format: str = "fp16"
    rounding: str = "nearest"
    weights: bool = True
    activations: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        format_named(self.format)
        if self.rounding not in tuple(Rounding) or not (self.weights or self.activations):
            raise CompositionError(
                f"pychop has nothing to round, or not {self.rounding!r}",
                hint=f"round weights, activations or both, by one of {', '.join(Rounding)}",
            )

    @property
    def layout(self) -> NumberFormat:
        """The format itself."""
        return format_named(self.format)

    def scope_of(self, model: PreTrainedModel) -> Callable[[], AbstractContextManager[None]]:
        """The scope in which the layers of a model are rounded."""
        return Emulation(self, model).scope

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """Rounded copies: of one layer in generation, of all in training, with the outputs before rounding."""
        targets = targets_of(shape)
        sizes = [t.numel * t.dtype.itemsize for t in targets]
        plain = PLAIN_BYTES * max(t.numel for t in targets) if not native.built() else 0
        if not isinstance(workload, Train):
            more = (max(sizes) + plain) * self.weights
            return ledger.add(Account.WORKSPACE, more, phases=("prefill", "decode"))
        ledger = ledger.add(Account.WORKSPACE, plain * self.weights, phases=("forward",))
        outputs = sum(t.shape[-2] for t in targets if t.matrices == 1) * workload.batch * workload.tokens
        kept = sum(sizes) * self.weights + outputs * shape.dtype.itemsize * self.activations
        return ledger.add(Account.ACTIVATIONS, kept, phases=("forward", "backward"))

    def work(self, work: Work, shape: ModelShape, workload: Workload) -> Work:
        """Each pass reads the weights once more, and writes and reads the rounded ones."""
        more = 2 * sum(t.numel * t.dtype.itemsize for t in targets_of(shape)) * self.weights
        phases = ("step",) if isinstance(workload, Train) else ("prefill", "decode")
        for phase in phases:
            work = work.plus(phase, read_bytes=more)
        return work

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """From the bits of a significand, or what is as good; nearest rounding of weights and outputs is assumed."""
        layout = self.layout
        if isinstance(layout, Integer):
            return risk_between(RISES, layout.bits - INTEGER_LOST)
        if isinstance(layout, FixedPoint):
            return risk_between(RISES, layout.fraction_bits - FRACTION_LOST)
        return risk_between(RISES, layout.significand_bits - RANGE_LOST.get(layout.exponent_bits, 0.0))


class Emulation:
    """A model's layers, and the hooks that round them.

    Args:
        settings: what is rounded, and how.
        model: with dense weights.

    Raises:
        UnsupportedModel: when a layer's weight is not dense.
    """

    def __init__(self, settings: Pychop, model: PreTrainedModel) -> None:
        try:
            targets, _ = find_targets(model)
        except UnsupportedModel as error:
            raise UnsupportedModel(
                f"pychop rounds dense layers, and {error.message}", hint="give it a dense model"
            ) from error
        self.settings, self.model, self.layout = settings, model, settings.layout
        self.layers = {target.module: model.get_submodule(target.module) for target in targets}
        self.passes = 0

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Rounds what layers hold and give, inside."""
        with ExitStack() as stack:
            stack.callback(self.model.register_forward_pre_hook(self._count).remove)
            for number, layer in enumerate(self.layers.values()):
                if self.settings.weights:
                    hide, show = self._weights_of(number)
                    stack.callback(layer.register_forward_pre_hook(hide).remove)
                    stack.callback(layer.register_forward_hook(show, always_call=True).remove)
                if self.settings.activations:
                    stack.callback(layer.register_forward_hook(self._outputs_of(number)).remove)
            yield

    def _count(self, *call: object) -> None:
        # Passes are counted by calls of the whole model, so that one that is made again for its gradient draws alike.
        self.passes += 1

    def _round(self, numbers: Tensor, place: int, draw: int) -> Tensor:
        stream = (draw << 32) | place
        return round_to(numbers, self.layout, self.settings.rounding, seed=self.settings.seed, stream=stream)

    def _weights_of(self, number: int) -> tuple[Callable[..., None], Callable[..., None]]:
        """Hooks that put rounded numbers before a layer's parameters, and take them away again."""

        def hide(layer: nn.Module, *call: object) -> None:
            draw = self.passes if layer.training else 0
            for place, (name, parameter) in enumerate(layer.named_parameters(recurse=False)):
                # An attribute of the object itself is found before the parameter of that name.
                layer.__dict__[name] = self._round(parameter, 8 * number + place + 1, draw)

        def show(layer: nn.Module, *call: object) -> None:
            for name, _ in layer.named_parameters(recurse=False):
                layer.__dict__.pop(name, None)

        return hide, show

    def _outputs_of(self, number: int) -> Callable[..., Any]:
        def replace(layer: nn.Module, inputs: object, output: Tensor) -> Tensor:
            return self._round(output, 8 * number, self.passes)

        return replace
