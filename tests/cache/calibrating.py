"""Techniques fitted to tiny models on random tokens, once a test session each."""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from pintpot.cache.calibration import Calibrated, calibrate

TOKENS = 96
_FOLDER = tempfile.TemporaryDirectory(prefix="pintpot-calibrations-")
_FILES = {}


def texts(count=2):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 256, (1, TOKENS), generator=generator) for _ in range(count)]


def calibrated(technique, model):
    """The technique with a calibration for the model where it needs one; as it is where it does not."""
    if not isinstance(technique, Calibrated) or not technique.needs_calibration(model.config):
        return technique
    return fitted(technique, model)


def fitted(technique, model, given=None):
    """The technique with a calibration for the model, on random tokens or on the texts that are given."""
    key = (str(technique), type(model).__name__, repr(model.config))
    if key not in _FILES:
        path = Path(_FOLDER.name) / f"{len(_FILES)}.safetensors"
        calibrate(model, technique, given or texts()).write(path)
        _FILES[key] = str(path)
    return replace(technique, calibration=_FILES[key])
