"""What a cache of a given size was sized for."""

from __future__ import annotations

from dataclasses import dataclass

from pintpot.core.errors import BudgetError


@dataclass(frozen=True)
class Limit:
    """What a cache of a given size was sized for.

    Attributes:
        tokens: the most tokens it may see.
        batch: the most sequences.
        itemsize: bytes of a number.
        budget_bytes: the size it was given.
        piece_tokens: the most tokens that may be read at once, where more of them would wait densely.
    """

    tokens: int
    batch: int
    itemsize: int
    budget_bytes: int
    piece_tokens: int | None = None

    def check(self, tokens: int, batch: int, itemsize: int, piece: int = 1) -> None:
        """Refuse what would not fit.

        Raises:
            BudgetError: naming what is more than planned.
        """
        for name, got, most in (
            ("tokens", tokens, self.tokens),
            ("sequences", batch, self.batch),
            ("bytes a number", itemsize, self.itemsize),
        ):
            if got > most:
                raise BudgetError(
                    f"the cache of {self.budget_bytes} bytes was sized for {most} {name}, and {got} came",
                    hint="build it with the tokens, batch and dtype that it will meet",
                )
        if self.piece_tokens is not None and piece > self.piece_tokens:
            raise BudgetError(
                f"the cache of {self.budget_bytes} bytes takes at most {self.piece_tokens} tokens at once, "
                f"and {piece} came",
                hint=f"read the prompt in pieces: generate(..., prefill_chunk_size={self.piece_tokens}), or "
                "pintpot.cache.prefill_in_pieces",
            )
