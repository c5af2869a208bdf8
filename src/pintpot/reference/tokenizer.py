"""The byte-level BPE tokenizer of the reference model.

Every byte has a token of its own, so any text survives encode and decode unchanged. The two markers of the
recall and copy tasks are shown to the trainer often enough that each is one token.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
"""The only special token: between documents, before the first token of a prompt, and at the end."""

_WORDS = r" ?_?\p{L}+"
_NUMBERS = r" ?\p{N}{1,3}"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+"
_LINE_ENDS = r"[^\S\r\n]*[\r\n]+"
_INDENTATION = r"[^\S\r\n]+(?=\s?\S)|\s+"
_PIECES = "|".join((_LINE_ENDS, _WORDS, _NUMBERS, _PUNCTUATION, _INDENTATION))


def train_tokenizer(texts: Iterable[str], *, vocabulary_tokens: int = 2048) -> Tokenizer:
    """Train the byte-level BPE tokenizer; the same texts in the same order give the same tokenizer.

    Args:
        texts: documents, in a fixed order.
        vocabulary_tokens: size of the vocabulary, the 256 bytes and the special token included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_tokens,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def as_transformers(tokenizer: Tokenizer, *, context_tokens: int | None) -> PreTrainedTokenizerFast:
    """Wrap the tokenizer so that `save_pretrained` writes what `AutoTokenizer` reads.

    Args:
        tokenizer: what `train_tokenizer` gave.
        context_tokens: the longest text of the model; None when there is no longest.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context_tokens,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    """The raw tokenizer of a model folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
