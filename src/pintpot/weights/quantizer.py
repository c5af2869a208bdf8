"""The transformers plug-in: after ``import pintpot.weights``, ``from_pretrained`` loads what Pintpot compressed.

It also compresses while loading a dense folder: ``from_pretrained(folder, quantization_config=PintpotConfig(...))``.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pintpot.core import registry
from pintpot.core.errors import CompositionError, ModelFolderError, PintpotError, UnsupportedModel
from pintpot.weights._base import Layout, WeightMethod, describe
from pintpot.weights.decoding import decoding, without_decoding
from pintpot.weights.formats import format_from_dict
from pintpot.weights.modules import place_
from pintpot.weights.ranked import RankedLayout
from pintpot.weights.targets import Target, find_targets
from pintpot.weights.undo import dequantize_

QUANT_METHOD = "pintpot"
FORMAT_VERSION = 2
READABLE = (1, 2)
"""Versions of the layout on disk that are read. The first has no formats: they follow from the technique."""

FAILURES: ContextVar[list[PintpotError] | None] = ContextVar("FAILURES", default=None)
"""What went wrong while compressing on the fly: transformers reports such errors without their text."""


@register_quantization_config(QUANT_METHOD)
class PintpotConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a compressed model.

    Args:
        technique: the registry key of the method. None where the weights are dense and only stored as ``storage``
            says.
        parameters: its hyperparameters; absent ones have the technique's defaults.
        weight_dtype: of the weights when they were compressed; settles the formats. None while not compressed yet.
        format_version: of the layout on disk.
        quant_method: always ``"pintpot"``.
        formats: the formats that occur, as ``Format.to_dict`` describes them, in tuples of the terms of one weight.
        layout: the number of the tuple of each parameter that is replaced. Both None where the technique tells.
        order: of a ranked layout, by the places of its parameters in ``layout``.
        storage: the registry key of the method by which the files hold the tensors without loss, if not as they are.

    Raises:
        ModelFolderError: for a layout written by a newer version.
        CompositionError: for an unknown technique or parameter.
    """

    def __init__(
        self,
        technique: str | None = "rtn",
        parameters: dict[str, Any] | None = None,
        weight_dtype: str | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        formats: list[list[dict[str, Any]]] | None = None,
        layout: dict[str, int] | None = None,
        order: list[int] | None = None,
        storage: str | None = None,
    ) -> None:
        if quant_method != QUANT_METHOD or format_version not in READABLE:
            raise ModelFolderError(
                f"the compressed format is {quant_method} {format_version}, and this version reads up to "
                f"{QUANT_METHOD} {FORMAT_VERSION}",
                hint="update pintpot, or compress the model again",
            )
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.technique = technique
        self.parameters = dict(parameters or {})
        self.weight_dtype = weight_dtype
        self.formats, self.layout, self.order = formats, layout, order
        self.storage = storage
        if technique is not None:
            self.method()

    @classmethod
    def of(
        cls, method: WeightMethod, weight_dtype: torch.dtype | None = None, layout: Layout | None = None
    ) -> PintpotConfig:
        """The configuration of a method, with all its hyperparameters and the formats written out."""
        name = None if weight_dtype is None else str(weight_dtype).removeprefix("torch.")
        return cls(method.name, asdict(method), name, **({} if layout is None else describe(layout)))

    def to_dict(self) -> dict[str, Any]:
        """What is written to ``config.json``."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "technique": self.technique,
            "parameters": dict(self.parameters),
            "weight_dtype": self.weight_dtype,
            **({} if self.layout is None else {"formats": self.formats, "layout": self.layout}),
            **({} if self.order is None else {"order": self.order}),
            **({} if self.storage is None else {"storage": self.storage}),
        }

    def read_layout(self) -> Layout | None:
        """The formats of every parameter, where they are written down.

        Raises:
            ModelFolderError: when they cannot be read.
        """
        if self.formats is None or self.layout is None:
            return None
        kinds = [tuple(format_from_dict(data) for data in formats) for formats in self.formats]
        names = list(self.layout)
        try:
            layout = {name: kinds[index] for name, index in self.layout.items()}
            return layout if self.order is None else RankedLayout(layout, [names[place] for place in self.order])
        except IndexError as error:
            raise ModelFolderError(
                "the quantization configuration names formats that it does not describe",
                hint="config.json was edited or cut off: compress the model again",
            ) from error

    def prepare_skeleton_(self, model: PreTrainedModel) -> None:
        """Replace the weights of a dense skeleton by empty storage of the recorded formats, where there are some."""
        if self.technique is None:
            return
        self.method().prepare_skeleton_(model, dtype=self.dtype, layout=self.read_layout())

    def method(self) -> WeightMethod:
        """The method that the configuration names."""
        built = None if self.technique is None else registry.get(self.technique).build(self.parameters)
        if not isinstance(built, WeightMethod):
            raise UnsupportedModel(
                f"{self.technique} does not compress weights",
                hint=f"one of: {', '.join(registry.techniques('weights'))}",
            )
        return built

    @property
    def dtype(self) -> torch.dtype | None:
        """The weights' dtype when they were compressed."""
        return None if self.weight_dtype is None else getattr(torch, self.weight_dtype)


class _Encode(ConversionOps):
    """Encodes a dense parameter as it is loaded, and puts the packed module in its place."""

    def __init__(self, quantizer: PintpotQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        model: PreTrainedModel,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        for name in list(input_dict):
            value = input_dict.pop(name)
            target = self.quantizer.targets[name]
            weight = value[0] if isinstance(value, list) else value
            del value
            formats = self.quantizer.layout[name]
            try:
                place_(model, target, formats, target.encode(self.quantizer.method, formats, weight))
            except PintpotError as error:
                failures = FAILURES.get()
                if failures is not None:
                    failures.append(error)
                raise
            if missing_keys is not None:
                missing_keys.discard(name)
        return {}


@register_quantizer(QUANT_METHOD)
class PintpotQuantizer(HfQuantizer):
    """Prepares skeletons for compressed folders, and compresses dense ones while they are loaded."""

    quantization_config: PintpotConfig

    def __init__(self, quantization_config: PintpotConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if quantization_config.technique is not None:
            self.method = quantization_config.method()
        self.targets: dict[str, Target] = {}
        self.layout: Layout = {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.pre_quantized:
            self.quantization_config.prepare_skeleton_(model)
            return model
        if self.method.works_on_blocks or self.method.examines:
            raise CompositionError(
                f"{self.method.name} looks at the whole model before it compresses, not at one parameter as it arrives",
                hint="use pintpot.weights.load_and_compress(folder, method, texts=...), or compress the folder first",
            )
        targets = find_targets(model)[0]
        self.layout = self.method.layout(targets)
        self.targets = {t.parameter: t for t in targets if t.parameter in self.layout}
        own = PintpotConfig.of(self.method, targets[0].dtype, self.layout)
        self.quantization_config.__dict__.update(own.__dict__)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """The rules that make parameters of what the files hold, with decoding first where the files are coded."""
        rules = super().update_weight_conversions(weight_conversions, model)
        return rules if self.quantization_config.storage is None else decoding(rules)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # What was loaded is not coded any more, and is saved like any other model.
        if self.quantization_config.storage is not None:
            self.quantization_config.storage = None
            rules: Any = model._weight_conversions
            model.__dict__["_weight_conversions"] = without_decoding(rules)
        if self.quantization_config.technique is None:
            self.remove_quantization_config(model)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is to be encoded while it is loaded."""
        return param_name in self.targets

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that encodes a parameter."""
        return _Encode(self)

    def is_serializable(self) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on the frozen packed weights."""
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # transformers takes it from the configuration, where saving a model leaves its name.
        return dequantize_(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def mark_(model: PreTrainedModel, method: WeightMethod, layout: Layout) -> None:
    """Record on a model how it was compressed, so that ``save_pretrained`` writes it down."""
    config = PintpotConfig.of(method, model.dtype, layout)
    quantizer = PintpotQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model.quantization_method = config.quant_method  # type: ignore[assignment]
    model.is_quantized = True  # type: ignore[assignment]
    quantizer.postprocess_model(model)
