"""A vision transformer's block in whole numbers: what ``i_vit`` puts in the place of the dense block.

Between blocks the whole numbers travel as floats times their scale, which loses nothing, because the model itself hands
the hidden states on. Shapes: B images, T tokens, C channels, K heads, D their size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pintpot.core.values import has_values
from pintpot.kernels import unpack
from pintpot.weights.integer_arithmetic import LARGEST, dyadic, integer_norm, rescale, shift_gelu, shiftmax
from pintpot.weights.modules import CompressedLinear

SMALLEST = 1e-8
"""Magnitude that a tensor is taken to have at least."""

WORD, LONG_WORD = 8, 16
"""Bits of the inputs of products, and of the residual stream."""


class Rescale(nn.Module):
    """Whole numbers of one scale (or one a channel) to words of another.

    Args:
        channels: 1, or C.
        bits: of the words.
    """

    multiplier: Tensor
    shift: Tensor

    def __init__(self, channels: int, bits: int, device: torch.device) -> None:
        super().__init__()
        self.bits = bits
        for name in ("multiplier", "shift"):
            self.register_buffer(name, torch.zeros(channels, dtype=torch.int32, device=device))

    def set_(self, ratio: Tensor) -> None:
        """The old scale over the new."""
        multiplier, shift = dyadic(ratio)
        self.multiplier.copy_(multiplier)
        self.shift.copy_(shift)

    def forward(self, numbers: Tensor) -> Tensor:
        """int64 (..., C) of at most 38 bits -> int64 of ``bits`` bits."""
        return rescale(numbers, self.multiplier, self.shift, self.bits)


class IntegerLinear(nn.Module):
    """Words of 8 bits times a packed matrix of 8 bits, summed in 32, with a bias, rescaled to words.

    Args:
        packed: with a symmetric grid of 8 bits and one scale a row; its bias becomes whole numbers in ``set_``.
        bits: of the result.
    """

    bias: Tensor

    def __init__(self, packed: CompressedLinear, bits: int = WORD) -> None:
        super().__init__()
        self.matrix = packed
        device = self._stored("packed").device
        self.register_buffer("bias", torch.zeros(packed.out_features, dtype=torch.int32, device=device))
        self.rescale = Rescale(packed.out_features, bits, device)

    def set_(self, input_scale: float, scale: float) -> None:
        """The scales of input and output."""
        rows = self._stored("scale").double().flatten()
        if self.matrix.bias is not None:
            self.bias.copy_((self.matrix.bias.double() / (rows * input_scale)).round().clamp(-LARGEST, LARGEST))
        self.drop_bias_()
        self.rescale.set_(rows * input_scale / scale)

    def _stored(self, name: str) -> Tensor:
        return next(self.matrix.stored())[1][name]

    def drop_bias_(self) -> None:
        """Let go of the bias in floating point."""
        self.matrix.register_parameter("bias", None)

    def forward(self, numbers: Tensor) -> Tensor:
        """int64 (..., I) of 8 bits -> int64 (..., O)."""
        codes = unpack(self._stored("packed"), WORD, self.matrix.in_features).int() - (1 << (WORD - 1))
        out: Tensor = self.rescale((numbers.int() @ codes.t()).long() + self.bias)
        return out


class IntegerNorm(nn.Module):
    """Layer normalisation of words of 16 bits, rescaled to words of 8.

    Args:
        old: the dense layer normalisation.
    """

    offset: Tensor

    def __init__(self, old: nn.LayerNorm) -> None:
        super().__init__()
        device = old.weight.device
        self.register_buffer("offset", torch.zeros(old.weight.shape, dtype=torch.int64, device=device))
        self.rescale = Rescale(old.weight.shape[0], WORD, device)

    def set_(self, old: nn.LayerNorm, scale: float) -> None:
        """The numbers of a dense layer normalisation, and the scale of the output."""
        weight = old.weight.detach().double()
        # A channel that the weight nearly takes away keeps a little of itself, so that its bias can be a multiple.
        least = weight.abs().max() / 64
        weight = torch.where(weight.abs() < least, least.copysign(weight), weight)
        unit = weight.shape[0] ** 0.5 / (1 << 30)
        self.offset.copy_((old.bias.detach().double() / (weight * unit)).round())
        self.rescale.set_(weight * unit / scale)

    def forward(self, numbers: Tensor) -> Tensor:
        """int64 (..., C) of 16 bits -> int64 of 8."""
        out: Tensor = self.rescale(integer_norm(numbers, self.offset))
        return out


class IntegerViTLayer(nn.Module):
    """The block: attention and two dense layers, each behind a normalisation and beside a residual stream.

    Args:
        block: with packed weights, whose parts are taken over.
        softmax_bits: of the attention's shares.
        gelu_bits: of the sigmoid in GELU.
    """

    scales: Tensor

    def __init__(self, block: nn.Module, softmax_bits: int, gelu_bits: int) -> None:
        super().__init__()
        attention: Any = block.attention
        mlp: Any = block.mlp
        self.heads, self.head_dim = attention.num_attention_heads, attention.head_dim
        self.softmax_bits, self.gelu_bits = softmax_bits, gelu_bits
        self.norm1 = IntegerNorm(block.layernorm_before)  # type: ignore[arg-type]
        self.norm2 = IntegerNorm(block.layernorm_after)  # type: ignore[arg-type]
        self.query, self.key = IntegerLinear(attention.q_proj), IntegerLinear(attention.k_proj)
        self.value = IntegerLinear(attention.v_proj)
        self.out, self.up = IntegerLinear(attention.o_proj, LONG_WORD), IntegerLinear(mlp.fc1)
        self.down = IntegerLinear(mlp.fc2, LONG_WORD)
        device = self.norm1.offset.device
        self.score, self.context, self.activation = (Rescale(1, WORD, device) for _ in range(3))
        self.first_stream, self.first_branch = (Rescale(1, LONG_WORD, device) for _ in range(2))
        self.second_stream, self.second_branch = (Rescale(1, LONG_WORD, device) for _ in range(2))
        # Of the block's input, the attention's scores, what GELU is given, and the block's output.
        self.register_buffer("scales", torch.zeros(4, device=device))

    @torch.no_grad()
    def set_(self, block: Any, largest: Mapping[str, float]) -> None:
        """Fix every scale.

        Args:
            block: the dense one, for its normalisations.
            largest: magnitude of what each part is given or gives, by the names that ``observe`` in ``i_vit`` gives.
        """
        step = {n: max(v, SMALLEST) / ((1 << (_bits_of(n) - 1)) - 1) for n, v in largest.items()}
        # What is stored in 32 bits is what everything is reckoned with.
        self.scales.copy_(torch.tensor([step[name] for name in ("input", "score", "up", "output")]))
        step |= dict(zip(("input", "score", "up", "output"), self.scales.tolist(), strict=True))
        one = torch.ones(1, dtype=torch.float64)
        self.norm1.set_(block.layernorm_before, step["norm1"])
        for name in ("query", "key", "value"):
            getattr(self, name).set_(step["norm1"], step[name])
        self.score.set_(one * step["query"] * step["key"] * self.head_dim**-0.5 / step["score"])
        self.context.set_(one * step["value"] / (1 << (self.softmax_bits - 1)) / step["context"])
        self.out.set_(step["context"], step["out"])
        self.first_branch.set_(one * step["out"] / step["middle"])
        self.first_stream.set_(one * step["input"] / step["middle"])
        self.norm2.set_(block.layernorm_after, step["norm2"])
        self.up.set_(step["norm2"], step["up"])
        self.activation.set_(one * step["up"] / (1 << (self.gelu_bits - 1)) / step["activation"])
        self.down.set_(step["activation"], step["down"])
        self.second_branch.set_(one * step["down"] / step["output"])
        self.second_stream.set_(one * step["middle"] / step["output"])

    def drop_biases_(self) -> None:
        """Let go of the biases in floating point, where there is nothing to set."""
        for module in self.modules():
            if isinstance(module, IntegerLinear):
                module.drop_bias_()

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """``hidden_states`` (B, T, C) -> (B, T, C); there is no mask in a vision transformer."""
        if not has_values(hidden_states):
            return torch.empty_like(hidden_states)
        into, _, _, out_of = self.scales.tolist()
        top = 1 << (LONG_WORD - 1)
        words = (hidden_states.double() / into).round().long().clamp(-top, top - 1)
        return (self.compute(words).double() * out_of).to(hidden_states.dtype)

    def compute(self, stream: Tensor) -> Tensor:
        """Words of 16 bits (B, T, C) -> words of 16 bits, in whole numbers alone."""
        _, score_scale, up_scale, _ = self.scales.tolist()
        branch = self.out(self._attend(self.norm1(stream), score_scale))
        stream = _sum(self.first_stream(stream), self.first_branch(branch))
        active = shift_gelu(self.up(self.norm2(stream)), up_scale, self.gelu_bits)
        branch = self.down(self.activation(active))
        return _sum(self.second_stream(stream), self.second_branch(branch))

    def _attend(self, words: Tensor, score_scale: float) -> Tensor:
        query, key, value = (
            part(words).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2).int()
            for part in (self.query, self.key, self.value)
        )
        scores = self.score((query @ key.transpose(-1, -2)).long())
        shares = shiftmax(scores, score_scale, self.softmax_bits).int()
        context = (shares @ value).long().transpose(1, 2).flatten(2)
        out: Tensor = self.context(context)
        return out


def _bits_of(name: str) -> int:
    return LONG_WORD if name in ("input", "out", "middle", "down", "output") else WORD


def _sum(first: Tensor, second: Tensor) -> Tensor:
    top = 1 << (LONG_WORD - 1)
    return (first + second).clamp(-top, top - 1)
