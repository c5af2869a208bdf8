"""What some techniques must find out about a model beforehand, on text: fitted once, kept in a file, checked at use.

A calibrated technique has a field ``calibration``, the file. Its tensors reach a store as ``place.tensors`` and a keep
as ``seen.place.tensors``.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PretrainedConfig, PreTrainedModel

from pintpot.cache._base import CacheTechnique, Call, Place
from pintpot.cache.dense import Dense
from pintpot.cache.forecast import places_of
from pintpot.cache.geometry import FULL, has_full_attention, layer_kinds
from pintpot.cache.layer import CacheLayer
from pintpot.cache.rotary import rotary_of
from pintpot.cache.shared import Handle
from pintpot.core.errors import CompositionError, DataError
from pintpot.core.files import write_atomic
from pintpot.core.ledger import Ledger
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Generate, Workload


@dataclass(frozen=True)
class LayerSample:
    """What one layer with full attention met on calibration text.

    Attributes:
        place: which layer.
        module: its attention module.
        inputs: what attention was given, (B, T, hidden).
        queries: (B, H, T, D), rotated where the model rotates.
        keys: (B, K, T, D), likewise.
        values: (B, K, T, D).
        call: scaling and capping of the scores, with the same queries.
    """

    place: Place
    module: nn.Module
    inputs: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    call: Call

    @property
    def positions(self) -> Tensor:
        """int64 (1, 1, T)."""
        return torch.arange(self.keys.shape[2], device=self.keys.device)[None, None]

    def unrotated_keys(self) -> Tensor:
        """The keys before rotation, float32; as they are in a model without rotary positions."""
        rotary = self.place.rotary
        return self.keys.float() if rotary is None else rotary.unrotate(self.keys, self.positions)


@dataclass(frozen=True, kw_only=True)
class Calibrated(CacheTechnique):
    """A technique that must be fitted to a model.

    Attributes:
        calibration: the file of what was found; empty before.
        free_after_fit: hyperparameters that what is found does not depend on, and which may change at use.
    """

    free_after_fit: ClassVar[tuple[str, ...]] = ()
    same_at_every_depth: ClassVar[bool] = False
    calibration: str = ""

    def needs_calibration(self, config: PretrainedConfig) -> bool:
        """Whether it cannot do without for this model; some only do better with one."""
        return True

    @property
    def fitted_as(self) -> str:
        """The expression of what a calibration depends on."""
        free: dict[str, Any] = {
            f.name: f.default for f in fields(self) if f.name in ("calibration", *self.free_after_fit)
        }
        return str(replace(self, **free))

    @property
    def command(self) -> str:
        """What to run for a calibration."""
        return f"pintpot calibrate MODEL '{self.fitted_as}' OUT"

    def require_calibration(self, config: PretrainedConfig) -> None:
        """Refuse to be used without a calibration.

        Raises:
            CompositionError: when there is none, and it cannot do without for this model.
        """
        if not self.calibration and self.needs_calibration(config):
            raise CompositionError(
                f"{self.name} must be calibrated for the model first",
                hint=f"run {self.command}, then use {self.name}(calibration=OUT)",
            )

    def predict(self, ledger: Ledger, shape: ModelShape, workload: Workload) -> Ledger:
        """See ``CacheTechnique.predict``.

        Raises:
            CompositionError: when it is not calibrated, so that nothing is planned that could not run.
        """
        if isinstance(workload, Generate) and has_full_attention(shape.config):
            self.require_calibration(shape.config)
        return super().predict(ledger, shape, workload)

    @abstractmethod
    def fit(self, model: PreTrainedModel, texts: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """What is found for each layer with full attention.

        Args:
            model: in evaluation mode, with its own attention.
            texts: token ids, int64 (B, T) each.
        """

    @abstractmethod
    def calibration_bytes(self, place: Place, dtype: torch.dtype) -> int:
        """Bytes of what is found for a layer."""


@dataclass(frozen=True)
class Calibration:
    """What was found for a model.

    Attributes:
        technique: as an expression, without the file.
        model: the model's fingerprint.
        layers: tensors by name for each layer with full attention.
    """

    technique: str
    model: str
    layers: tuple[Mapping[str, Tensor], ...]

    def write(self, path: str | Path) -> None:
        """Write the file, wholly or not at all."""
        flat = {f"{i}.{name}": t.contiguous() for i, found in enumerate(self.layers) for name, t in found.items()}
        about = {"technique": self.technique, "model": self.model, "layers": len(self.layers)}
        write_atomic(path, save(flat, metadata={"pintpot_calibration": json.dumps(about)}))


def calibrate(model: PreTrainedModel, technique: CacheTechnique, texts: Sequence[Tensor]) -> Calibration:
    """Fit a technique to a model.

    Raises:
        CompositionError: when it needs no calibration.
        DataError: when there is no text.
    """
    if not isinstance(technique, Calibrated):
        raise CompositionError(f"{technique.name} needs no calibration", hint="use it as it is")
    if not texts or min(text.shape[-1] for text in texts) < 2:
        raise DataError("there is no text to calibrate on", hint="give at least a few hundred tokens")
    found = tuple(technique.fit(model, texts))
    return Calibration(technique.fitted_as, ModelShape.from_config(model.config).fingerprint, found)


def read_calibration(path: str | Path) -> Calibration:
    """Read a file that ``Calibration.write`` wrote.

    Raises:
        DataError: when it is not there or not such a file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {})["pintpot_calibration"])
            layers: list[dict[str, Tensor]] = [{} for _ in range(int(about["layers"]))]
            for key in file.keys():  # noqa: SIM118  # not a mapping
                number, _, name = key.partition(".")
                layers[int(number)][name] = file.get_tensor(key)
    except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
        raise DataError(
            f"{path} is not a calibration file ({error})", hint="write one with: pintpot calibrate MODEL TECHNIQUE OUT"
        ) from error
    return Calibration(str(about["technique"]), str(about["model"]), tuple(layers))


def tensors_for(technique: CacheTechnique | None, config: PretrainedConfig, dtype: torch.dtype | None) -> list[Any]:
    """The tensors of a technique for each layer with full attention; empty dictionaries where it needs none.

    Raises:
        CompositionError: when there is no calibration, or one for another model or other hyperparameters.
        DataError: when the file cannot be read.
    """
    if not isinstance(technique, Calibrated) or not (technique.calibration or technique.needs_calibration(config)):
        return [{}] * sum(layer.kind == FULL for layer in layer_kinds(config))
    return [{name: _typed(t, dtype) for name, t in layer.items()} for layer in found_for(technique, config).layers]


def found_for(technique: Calibrated, config: PretrainedConfig) -> Calibration:
    """What was found for a technique and this model, in tensors that have values during rehearsals too.

    Raises:
        CompositionError: when there is no calibration, or one for another model or other hyperparameters.
        DataError: when the file cannot be read.
    """
    command = technique.command
    technique.require_calibration(config)
    file = Path(technique.calibration).expanduser().resolve()
    found = _read_once(str(file), file.stat().st_mtime_ns if file.is_file() else 0)
    if found.model != ModelShape.from_config(config).fingerprint:
        raise CompositionError(f"{technique.calibration} was made for another model", hint=f"run {command}")
    if found.technique != technique.fitted_as:
        raise CompositionError(
            f"{technique.calibration} was made for {found.technique}",
            hint=f"use these hyperparameters, or run {command}",
        )
    return found


def _typed(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    given = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if active_fake_mode() is not None:
        return torch.empty(tensor.shape, dtype=given)
    return tensor.to(given)


@lru_cache(maxsize=4)
def _read_once(path: str, written: int) -> Calibration:
    """The file's contents, read again when it was written again."""
    # Files cannot be read into tensors without bytes, and what is read once serves real runs too.
    with unset_fake_temporarily():
        return read_calibration(path)


class _Recorder(CacheLayer):
    """A dense layer that notes what it meets."""

    def attend(self, handle: Handle, call: Call) -> Tensor:
        """See ``CacheLayer.attend``."""
        self.call = call
        return super().attend(handle, call)


@torch.no_grad()
def sample_layer(model: PreTrainedModel, text: Tensor, index: int) -> LayerSample:
    """What one layer with full attention meets when the model reads a text.

    One layer's tensors are held at a time; sampling all layers reads the text once for each.

    Args:
        model: in evaluation mode.
        text: token ids (B, T).
        index: the layer's number among those with full attention.
    """
    # Imported here because building a cache asks this module for calibrations.
    from pintpot.cache.attention import use_cache_attention
    from pintpot.cache.build import PintpotCache, build_cache

    cache = build_cache(model.config)
    kinds = layer_kinds(model.config)
    place = places_of(kinds, None, None)[index].but(rotary=rotary_of(model.config, FULL))
    number = [i for i, layer in enumerate(kinds) if layer.kind == FULL][index]
    recorder = _Recorder(Dense(), place=place)
    layers: list[Any] = [*cache.layers[:number], recorder, *cache.layers[number + 1 :]]
    inputs: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, "layer_idx", None) == number:
            inputs[:] = [kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]]

    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in model.modules() if hasattr(m, "layer_idx")]
    try:
        with use_cache_attention(model):
            model(text, past_key_values=PintpotCache(layers, None, Dense()), use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    keys, values = recorder.stored.whole() or (torch.empty(0), torch.empty(0))
    call = recorder.call
    return LayerSample(place, call.module, inputs[0], call.query, keys, values, call)
