"""A model as shapes alone: what prediction and planning know of it, with no weights loaded."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from pintpot.core.errors import ModelFolderError, UnsupportedModel

_NOT_ARCHITECTURE = {
    "_name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "quantization_config",
}

OWN_ARCHITECTURES = {
    "pintpot_latent": "pintpot.cache.conversions.latent",
    "pintpot_memory": "pintpot.cache.conversions.memory",
}
"""Architectures that transformers does not have, and the module that registers each when it is imported."""


def stored_only(quantization: Any) -> bool:
    """Whether a quantization configuration only says how tensors are stored without loss: once read, all is dense."""
    return isinstance(quantization, dict) and "storage" in quantization and quantization.get("technique") is None


@dataclass(frozen=True)
class ParameterShape:
    """One parameter of a model.

    Attributes:
        name: as in ``model.named_parameters()`` (a tied parameter appears once).
        shape: its sizes.
        dtype: as built.
        kind: ``"linear"``, ``"embedding"``, ``"norm"`` (every other parameter of one dimension) or ``"other"``.
        block: the name of the decoder (or encoder) block that it is in, or an empty string.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    block: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        """Bytes when stored densely."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class ModelShape:
    """A model architecture with its sizes and dtype.

    Attributes:
        config: the transformers configuration.
        dtype: the dtype in which weights are held.
        name: the folder or hub name it came from.
    """

    config: PretrainedConfig
    dtype: torch.dtype
    name: str = ""

    @classmethod
    def from_config(cls, config: PretrainedConfig, dtype: torch.dtype | None = None, name: str = "") -> ModelShape:
        """The shape of a configuration; ``dtype`` defaults to the configuration's own, else float32."""
        own = getattr(config, "dtype", None)
        return cls(config, dtype or (own if isinstance(own, torch.dtype) else torch.float32), name)

    @classmethod
    def from_folder(cls, folder: str | Path, dtype: torch.dtype | None = None) -> ModelShape:
        """The shape of a model folder (only ``config.json`` is read).

        Raises:
            ModelFolderError: when there is no readable configuration.
            UnsupportedModel: when the architecture is unknown to transformers, or a value makes no sense.
        """
        path = Path(folder)
        if not path.exists():
            raise ModelFolderError(f"{path} does not exist", hint="give the path of a model folder")
        file = path if path.is_file() else path / "config.json"
        if not file.is_file():
            raise ModelFolderError(
                f"{path} is not a model folder: it has no config.json",
                hint="give a folder in Hugging Face format (config.json, *.safetensors, tokenizer.json)",
            )
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ModelFolderError(
                f"{file} is not valid JSON: {error}", hint="download or write the configuration again"
            ) from error
        if isinstance(data, dict) and stored_only(data.get("quantization_config")):
            del data["quantization_config"]
        own = OWN_ARCHITECTURES.get(str(data.get("model_type"))) if isinstance(data, dict) else None
        if own is not None:
            importlib.import_module(own)
        try:
            config = AutoConfig.for_model(**data) if "model_type" in data else None
        except (ArithmeticError, AttributeError, StrictDataclassError) as error:
            raise UnsupportedModel(
                f"{file} does not make sense: {' '.join(str(error).split())}",
                hint="compare it with the configuration of a model of its kind",
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            config = None
            cause = f": {error}".splitlines()[0]
        else:
            cause = ": config.json names no model_type"
        if config is None:
            raise UnsupportedModel(
                f"{path}: transformers does not know this architecture{cause}",
                hint="update transformers, or check model_type in config.json",
            )
        return cls.from_config(config, dtype, str(folder))

    def build(self, device: str = "meta") -> PreTrainedModel:
        """An untrained model of this shape on a device (``meta`` holds no bytes), in evaluation mode.

        Raises:
            UnsupportedModel: when transformers has no class for it.
        """
        kind: Any = model_class(self.config)
        make = getattr(kind, "from_config", None) or kind._from_config
        try:
            with torch.device(device):
                # A copy, because transformers writes the dtype into the configuration that it is given.
                model: PreTrainedModel = make(copy.deepcopy(self.config), dtype=self.dtype)
        except ValueError as error:
            raise UnsupportedModel(
                f"{type(self.config).__name__} is not a model that Pintpot can run",
                hint="causal and encoder-decoder language models of transformers are supported, and any model whose "
                "configuration names its class in `architectures`",
            ) from error
        model.eval()
        return model

    @cached_property
    def parameters(self) -> tuple[ParameterShape, ...]:
        """All parameters, tied ones once."""
        model = self.build()
        blocks = tuple(name + "." for name in block_names(model))
        kinds = {id(p): _kind(m, p) for m in model.modules() for p in m.parameters(recurse=False)}
        return tuple(
            ParameterShape(
                name,
                tuple(p.shape),
                p.dtype,
                kinds[id(p)],
                next((b[:-1] for b in blocks if name.startswith(b)), ""),
            )
            for name, p in model.named_parameters()
        )

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the architecture, the same for every dtype and folder."""
        data = {k: v for k, v in self.config.to_diff_dict().items() if k not in _NOT_ARCHITECTURE}
        return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def packed_as(self) -> str:
        """How the weights of its models are packed from the start; shapes that differ in it build different models."""
        return repr(getattr(self.config, "quantization_config", None))

    @property
    def identity(self) -> tuple[str, torch.dtype, str]:
        """What tells it from other shapes: its architecture, its dtype, and how its weights are packed, if they are."""
        return self.fingerprint, self.dtype, self.packed_as

    @property
    def numel(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(p.numel for p in self.parameters)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the dense weights."""
        return sum(p.nbytes for p in self.parameters)

    def with_parameters(self, parameters: Iterable[ParameterShape]) -> ModelShape:
        """The same model with these parameters in place of its own."""
        made = replace(self)
        made.__dict__["parameters"] = tuple(parameters)
        return made

    def linears(self) -> Iterator[ParameterShape]:
        """The weight matrices of the linear layers inside the blocks: what most techniques act on."""
        return (p for p in self.parameters if p.kind == "linear" and p.block and len(p.shape) == 2)


def _kind(module: nn.Module, parameter: nn.Parameter) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if parameter.dim() == 1:
        return "norm"
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return "linear"
    return "other"


def model_class(config: PretrainedConfig) -> Any:
    """What builds and loads a model: the class that the configuration names, or that of its language models.

    Encoders (for embeddings, images) are only known by name. Language models are taken from transformers' own tables,
    which also hold the architectures that we register.
    """
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    encodes = type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "is_decoder", None) is False
    named = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    return named if encodes and named is not None else AutoModelForCausalLM


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the blocks of a model (``model.layers.0`` ...), encoder's before decoder's.

    They are the members of each ``nn.ModuleList`` that is not inside another one and whose members are all of one
    class. Where no list is so, as in hybrids of convolutions and transformers, they are the members of the lists that
    there are: unlike stages.
    """
    alike: list[str] = []
    unlike: list[str] = []
    outer: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(o + ".") for o in outer) or not isinstance(module, nn.ModuleList):
            continue
        outer.append(name)
        chosen = alike if len({type(m) for m in module}) == 1 else unlike
        chosen += [f"{name}.{i}" for i in range(len(module))]
    return tuple(alike or unlike)
