"""The vocabulary of a GGUF file, from the tokenizer of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPLITS = {"llama": "llama-bpe", "qwen2": "qwen2"}
"""How llama.cpp cuts texts before merging for the architectures that have one way; it knows them by name only."""


def add_vocabulary(gguf: Any, writer: Any, folder: Path, config: Any) -> list[str]:
    """Add the tokens and merges of a byte-level BPE tokenizer; another is left out.

    Args:
        gguf: the package.
        writer: its writer.
        folder: the model's.
        config: the model's.

    Returns:
        Notes on what is left out or may differ.
    """
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    model = data.get("model") or {}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", ())]
    if model.get("type") != "BPE" or model.get("byte_fallback") or not merges:
        writer.add_tokenizer_model("no_vocab")
        return ["the tokenizer is not a byte-level BPE with merges and is left out: give llama.cpp token ids"]
    special = {token["id"]: token["content"] for token in data.get("added_tokens", ())}
    tokens = {index: token for token, index in model["vocab"].items()} | special
    controls = {token["id"] for token in data.get("added_tokens", ()) if token.get("special")}
    kinds = gguf.TokenType
    listed = [tokens.get(index, f"[PAD{index}]") for index in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(SPLITS.get(config.model_type, "default"))
    writer.add_token_list(listed)
    writer.add_token_types([_kind(kinds, index, tokens, special, controls) for index in range(config.vocab_size)])
    writer.add_token_merges(merges)
    for add, index in (
        (writer.add_bos_token_id, config.bos_token_id),
        (writer.add_eos_token_id, config.eos_token_id),
        (writer.add_pad_token_id, config.pad_token_id),
    ):
        first = index[0] if isinstance(index, list) else index
        if first is not None:
            add(first)
    writer.add_add_bos_token(False)
    split = SPLITS.get(config.model_type, "default")
    return [f"llama.cpp cuts texts as {split!r}, which may give other tokens than the tokenizer; ids are the same"]


def _kind(kinds: Any, index: int, tokens: dict[int, str], special: dict[int, str], controls: set[int]) -> Any:
    if index not in tokens:
        return kinds.UNUSED
    if index in controls:
        return kinds.CONTROL
    return kinds.USER_DEFINED if index in special else kinds.NORMAL
