"""The files beside the weights of a model folder: tokenizer, generation settings, model card."""

from __future__ import annotations

import shutil
from pathlib import Path

from pintpot.core.files import write_atomic
from pintpot.core.model_folder import CHECKSUMS, INDEX

COPIED = (".json", ".jinja", ".model", ".txt", ".md")
"""Endings of the files that are copied."""

CARD = "README.md"

_LOADING = """To load:

```python
import pintpot.weights  # registers the format with transformers
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("this folder")
```
"""


def companions(source: Path) -> list[Path]:
    """The files of a folder that are copied with it; not those that say what is in its weights."""
    own = {"config.json", INDEX, CHECKSUMS}
    return [f for f in sorted(source.iterdir()) if f.is_file() and f.suffix in COPIED and f.name not in own]


def companion_bytes(source: Path) -> int:
    """Their bytes, with room for the configuration."""
    return sum(file.stat().st_size for file in companions(source)) + (1 << 20)


def copy_companions(source: Path, out: Path, title: str, made: str) -> None:
    """Copy them, and write a model card that says at its end how the folder was made and is loaded.

    Args:
        source: the folder that they are in.
        out: a folder that exists.
        title: of the section that the card gets.
        made: its first sentence.
    """
    for file in companions(source):
        if file.name != CARD:
            shutil.copyfile(file, out / file.name)
    card = source / CARD
    text = card.read_text(encoding="utf-8", errors="replace").rstrip() + "\n\n" if card.is_file() else ""
    write_atomic(out / CARD, f"{text}# {title}\n\n{made} {_LOADING}")
