"""Random numbers that are a function of their place: Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405).

Nothing is kept from one number to the next, so that any part of them can be drawn anew, on any device, by any number of
threads. Numbers come in blocks of 64, as vectors of 16 want them: the four words of the counters ``16 b`` to
``16 b + 15`` are the block ``b``, all first words before all second ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
BLOCK = 64
"""Numbers that come together."""

_COUNTERS = BLOCK // 4
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """The four random words of each counter.

    Args:
        counter: four words of 32 bits, in int64, of any shape.
        key: two words.

    Returns:
        Four tensors of that shape, int64, 0 to 2 ** 32 - 1.
    """
    a, b, c, d = counter
    low, high = key
    for _ in range(ROUNDS):
        # The product of two words wraps around in 64 bits with a sign; its bits are those that are wanted.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, c = ((second >> 32) & _WORD) ^ b ^ low, ((first >> 32) & _WORD) ^ d ^ high
        b, d = second & _WORD, first & _WORD
        low, high = (low + _WEYL[0]) & _WORD, (high + _WEYL[1]) & _WORD
    return a, b, c, d


def random_words(count: int, seed: int, stream: int, device: torch.device | str = "cpu") -> Tensor:
    """The first random words of a stream.

    Args:
        count: how many.
        seed: of which 64 bits are taken.
        stream: likewise; the streams of a seed are independent of each other.
        device: of the result.

    Returns:
        int64 (count,), 0 to 2 ** 32 - 1.
    """
    blocks = -(-count // BLOCK)
    place = torch.arange(blocks * _COUNTERS, device=device)
    words = [torch.full_like(place, word) for word in halves(stream)]
    drawn = torch.stack(philox((place & _WORD, place >> 32, words[0], words[1]), halves(seed)))
    return drawn.view(4, blocks, _COUNTERS).transpose(0, 1).reshape(-1)[:count]


def halves(number: int) -> tuple[int, int]:
    """The lower and the upper 32 of the lowest 64 bits of a number."""
    return number & _WORD, (number >> 32) & _WORD
