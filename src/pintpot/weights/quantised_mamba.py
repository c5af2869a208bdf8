"""A Mamba mixer whose activations are words of 8 bits: what ``quamba`` puts in the place of the dense mixer.

Shapes: B texts, T tokens, I channels, N states, R the rank of the time step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache
from transformers.models.mamba import modeling_mamba as mamba

from pintpot.weights.formats import StaticInput

ROUNDED = ("convolved", "gate", "scanned", "time_step", "input_matrix", "output_matrix")
"""The activations that the mixer rounds, in the order of their steps: what goes into the convolution, into the gate,
and into the scan (x, delta's projection, B and C)."""

WORD = StaticInput(bits=8)


class QuantisedMixer(nn.Module):
    """The mixer with packed matrices and rounded activations; the scan itself, its states and A and D are exact.

    Args:
        mixer: whose parts are taken over.
    """

    steps: Tensor

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        self.layer_idx, self.activation = mixer.layer_idx, mixer.activation
        self.rank, self.states = mixer.time_step_rank, mixer.ssm_state_size
        self.kernel = mixer.conv_kernel_size
        self.scan_options = {
            "use_mambapy": mixer.use_mambapy,
            "use_associative_scan": mixer.use_associative_scan,
        }
        self.conv1d, self.in_proj, self.x_proj = mixer.conv1d, mixer.in_proj, mixer.x_proj
        self.dt_proj, self.out_proj = mixer.dt_proj, mixer.out_proj
        self.A_log, self.D = mixer.A_log, mixer.D
        self.register_buffer("steps", torch.zeros(len(ROUNDED), device=self.D.device))

    def rounded(self, name: str, numbers: Tensor) -> Tensor:
        """Numbers on the grid that belongs to a name; as they are while its step is zero. The gradient passes."""
        place = ROUNDED.index(name)
        found = WORD.round(numbers.detach(), self.steps[place : place + 1])
        return numbers + (found - numbers.detach()) if numbers.requires_grad else found

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``hidden_states`` (B, T, C) -> (B, T, C)."""
        masked = mamba.apply_mask_to_padding_states(hidden_states, attention_mask)
        inner, gate = self.in_proj(masked).transpose(1, 2).chunk(2, dim=1)
        gate = self.rounded("gate", gate)
        convolved = self._convolve(self.rounded("convolved", inner), cache_params)
        scanned = mamba.apply_mask_to_padding_states(convolved.transpose(1, 2), attention_mask)
        scanned = self.rounded("scanned", scanned)
        parts = self.x_proj(scanned).split([self.rank, self.states, self.states], dim=-1)
        time_step, enter, leave = (self.rounded(n, p) for n, p in zip(ROUNDED[3:], parts, strict=True))
        delta = functional.linear(time_step, self.dt_proj.weight.to(time_step.dtype))
        out = self._scan(scanned, delta, enter, leave, gate, cache_params)
        projected: Tensor = self.out_proj(out.transpose(1, 2).to(hidden_states.dtype))
        return projected

    def _convolve(self, inner: Tensor, cache: Cache | None) -> Tensor:
        """The causal convolution and its activation: (B, I, T) -> (B, I, T)."""
        weight, bias, tokens = self.conv1d.weight.squeeze(1), self.conv1d.bias, inner.shape[-1]
        state = None if cache is None else cache.get_conv_state(self.layer_idx, state_idx=0)
        if cache is not None and state is not None and tokens == 1 and not cache.is_recording_past(self.layer_idx):
            found: Tensor = mamba.causal_conv1d_update(inner, state, weight, bias, activation=self.activation)
            return found
        if cache is not None:
            inner = cache.update_conv_state(inner, self.layer_idx, conv_kernel_size=self.kernel)
        found = mamba.causal_conv1d_fn(inner, weight, bias, activation=self.activation)
        return found[:, :, -tokens:]

    def _scan(
        self, scanned: Tensor, delta: Tensor, enter: Tensor, leave: Tensor, gate: Tensor, cache: Cache | None
    ) -> Tensor:
        """The gated scan: x and delta (B, T, I), B and C (B, T, N), gate (B, I, T) -> (B, I, T)."""
        decay, bias = -self.A_log.float().exp(), self.dt_proj.bias.float()
        state = None if cache is None else cache.get_recurrent_state(self.layer_idx, state_idx=0)
        if state is not None and scanned.shape[1] == 1:
            one: Tensor = mamba.mamba_selective_state_update(
                state,
                scanned[:, 0],
                delta[:, 0],
                decay,
                enter[:, 0],
                leave[:, 0],
                self.D,
                z=gate[..., 0],
                dt_bias=bias,
                dt_softplus=True,
            )
            return one.unsqueeze(-1)
        found = mamba.mamba_selective_scan(
            scanned.transpose(1, 2),
            delta.transpose(1, 2),
            decay,
            enter.transpose(1, 2),
            leave.transpose(1, 2),
            D=self.D.float(),
            z=gate,
            delta_bias=bias,
            delta_softplus=True,
            return_last_state=cache is not None,
            **self.scan_options,
        )
        if cache is None:
            plain: Tensor = found
            return plain
        out, last = found
        cache.update_recurrent_state(last, self.layer_idx)
        result: Tensor = out
        return result
