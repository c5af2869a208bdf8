"""A tiny base model and models that were fine-tuned from it for a few steps each, as folders."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.folders import byte_tokenizer, write_model

TEXTS = {
    "letters": "abcdefghijklmnopqrstuvwxyz" * 4,
    "numbers": "0 1 1 2 3 5 8 13 21 34 55 89 144 " * 4,
    "words": "the cat sat on the mat and the dog sat on the log " * 3,
}
"""What each model was trained on."""


def tokens(task: str) -> torch.Tensor:
    """The text of a task, int64 (1, T)."""
    return torch.tensor([byte_tokenizer()(TEXTS[task])["input_ids"][:96]])


def write_tuned(
    folder: Path, name: str = "llama", *, steps: int = 25, whole: bool = False, **changes: object
) -> dict[str, Path]:
    """The base (under ``"base"``) and a model for each text, by name.

    What is trained is the matrices of the blocks, or the ``whole`` model.
    """
    base = write_model(folder / "base", name, **changes)
    found = {"base": base}
    for task in TEXTS:
        model = AutoModelForCausalLM.from_pretrained(base)
        trained = [p for n, p in model.named_parameters() if whole or "_proj" in n]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=tokens(task), labels=tokens(task)).loss.backward()
            optimizer.step()
        found[task] = folder / task
        model.save_pretrained(found[task])
        byte_tokenizer().save_pretrained(found[task])
    return found
