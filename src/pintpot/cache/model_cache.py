"""A cache for a model in one call: ``model.generate(..., past_key_values=pintpot.cache(model, "lagkv*kivi2"))``."""

from __future__ import annotations

from transformers import PreTrainedModel

from pintpot.cache.attention import install_attention
from pintpot.cache.build import PintpotCache, build_cache
from pintpot.core.errors import CompositionError
from pintpot.core.expression import parse
from pintpot.core.slots import check
from pintpot.core.units import parse_bytes

PARTS = ("keep", "store", "layers", "residue")
"""Parts of the cache's slot that a cache is built from."""


def model_cache(
    model: PreTrainedModel,
    techniques: str = "",
    *,
    budget: str | int | None = None,
    tokens: int | None = None,
    batch: int = 1,
) -> PintpotCache:
    """An empty cache for one generation, ready to be given to ``generate`` as ``past_key_values``.

    The model reads Pintpot's caches from now on (other caches too, as before); nothing else about it changes.

    Args:
        model: a causal language model.
        techniques: an expression such as ``"lagkv*kivi2"``; empty for a cache that keeps everything as it is.
        budget: the most that it may ever hold, in bytes or as ``"64MiB"``. What is kept is then as much as fits.
        tokens: the most tokens that will come, prompt and new ones together; with a budget, the model's longest
            context where not given.
        batch: sequences at once (times beams), for the budget.

    Raises:
        BudgetError: when the budget is too small, with the least that would do.
        CompositionError: for techniques that are unknown, cannot stand together, or are not a cache's.
        UnsupportedModel: for models that such caches are not for.
    """
    chosen = parse(techniques) if techniques.strip() else ()
    check(chosen, "generate")
    parts = {technique.facts.part: technique for technique in chosen}
    strangers = [t.name for t in chosen if t.facts.slot != "cache" or t.facts.part not in PARTS]
    if strangers:
        raise CompositionError(
            f"{', '.join(strangers)} is no part of a cache", hint="give what is kept and how it is stored: lagkv*kivi4"
        )
    install_attention(model)
    return build_cache(
        model.config,
        **parts,  # type: ignore[arg-type]  # each part has its own type
        budget_bytes=None if budget is None else parse_bytes(budget),
        batch=batch,
        tokens=tokens,
        dtype=model.dtype,
    )
