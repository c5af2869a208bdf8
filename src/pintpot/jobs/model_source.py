"""From what a user calls a model (a folder, or a hub name) to a folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from pintpot.core.errors import ModelFolderError

WEIGHTS = "*.safetensors"
SAFE_FILES = (WEIGHTS, "*.json", "*.jinja", "*.model", "*.txt", "README.md")
"""What is downloaded: weights without code, configuration, tokenizer. Never pickled weights."""

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def model_folder(name: str | Path, *, weights: bool = True) -> Path:
    """The folder of a model, downloaded when it is a hub name and no such path exists.

    Args:
        name: the path or hub name.
        weights: whether to download the weights too.

    Raises:
        ModelFolderError: when it is neither, or cannot be downloaded.
    """
    path = Path(name)
    if path.exists():
        return path
    if not _HUB_NAME.match(str(name)):
        raise ModelFolderError(
            f"{name} does not exist", hint="give the path of a model folder, or a hub name such as Qwen/Qwen3-0.6B"
        )
    return _download(str(name), [pattern for pattern in SAFE_FILES if weights or pattern != WEIGHTS])


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except OSError as error:
        answered = isinstance(error, HfHubHTTPError)
        reason = "the hub does not have it, or wants a login" if answered else "the hub cannot be reached"
        raise ModelFolderError(
            f"there is no folder {name}, and downloading it failed: {reason}",
            hint="check the name; without a network, give the path of a model folder",
        ) from error
