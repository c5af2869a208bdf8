"""Small model folders with tokenizers, and small data files, made on the spot."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pintpot.core.shape import ModelShape
from pintpot.ledger import machine as machines
from tests.architectures import tiny_config

END = "<|end|>"
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
VOCABULARY = 257


def byte_tokenizer(*, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token for each byte, and one that ends a text."""
    vocabulary = {END: 0, **{c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    wrapped.chat_template = chat_template
    return wrapped


def write_model(
    folder: Path,
    name: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    shard_size: str = "1GB",
    **changes: object,
) -> Path:
    """A model folder of a tiny architecture with random weights."""
    config = tiny_config(name)
    config.vocab_size = VOCABULARY
    for key, value in {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **changes}.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ModelShape.from_config(config, dtype).build("cpu")
    model.save_pretrained(folder, max_shard_size=shard_size)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_weights(first: Path, second: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write_lines(file: Path, entries: list[object]) -> Path:
    """A JSON Lines file."""
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return file


def texts(count: int, tokens: int = 60) -> list[dict[str, str]]:
    """Lines of training data with something to learn in them."""
    return [{"text": ("abcdefghij" * tokens)[i % 10 : i % 10 + tokens]} for i in range(count)]


def keep_machine(cache_folder: Path) -> None:
    """Put made-up rates of this machine where they are kept, so that nothing is measured; see ``PINTPOT_CACHE``."""
    rates = {"float32": {"1": 5e9, "4096": 5e10}, "bfloat16": {"1": 5e9, "4096": 2e10}}
    record = machines.Machine(
        host="test",
        kind="cpu",
        device="made up",
        threads=1,
        memory_bytes=1 << 34,
        disk_free_bytes=1 << 36,
        read_bytes_per_second=1e10,
        single_read_bytes_per_second=5e9,
        fresh_bytes_per_second=1e9,
        matmul_flops=rates,
        matmul_bytes_per_second=rates,
        matmul_dot_seconds={"float32": {"1": 1e-9}},
        small_op_seconds=1e-5,
        disk_read_bytes_per_second=1e9,
        disk_write_bytes_per_second=1e9,
        versions=machines.versions(),
    )
    (cache_folder / f"machine-{machines._key()}.json").write_text(json.dumps(asdict(record)))
