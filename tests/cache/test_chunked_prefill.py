"""Chunked prefill as a technique: the same text, a lower peak, foreseen."""

import pytest

from pintpot import reference
from pintpot.cache import ChunkedPrefill
from pintpot.core.errors import CompositionError
from pintpot.core.expression import parse
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Generate
from pintpot.jobs.choose import Wish
from pintpot.jobs.generate import GenerateSettings, generate
from pintpot.jobs.simulate import simulate
from pintpot.ledger.predict import baseline

PIECES = "chunked-prefill(piece_tokens=64)"
PROMPT = list(range(3, 503))


def test_the_text_is_the_same_and_the_peak_is_lower_and_foreseen():
    settings = GenerateSettings(new_tokens=6, stop_at_end=False)
    plain, pieces = (
        generate(reference.path(), [PROMPT], settings=settings, wish=Wish(techniques=t), measure=True)
        for t in ("none", PIECES)
    )
    assert pieces.completions == plain.completions
    peaks = [run.measured.phase("prefill").of(Account.WORKSPACE) for run in (plain, pieces)]
    assert peaks[1] < peaks[0] / 3
    assert pieces.measured.phase("prefill").total() == pieces.plan.predicted.phase("prefill").total()


@pytest.mark.parametrize("cache", ["", "*kivi4", "*snapkv(kept_fraction=0.25)", "*cake"])
def test_the_closed_form_is_not_below_the_rehearsal(cache):
    shape = ModelShape.from_folder(reference.path())
    workload = Generate(prompt_tokens=900, new_tokens=8)
    techniques = parse(PIECES + cache)
    exact = simulate(shape, workload, techniques).phase("prefill").total()
    for order in (techniques, techniques[::-1]):
        ledger = baseline(shape, workload)
        for technique in order:
            ledger = technique.predict(ledger, shape, workload)
        closed = ledger.phase("prefill").total()
        assert 0.97 * exact <= closed < baseline(shape, workload).phase("prefill").total()


def test_a_prompt_that_is_no_longer_than_a_piece_is_left_alone():
    shape = ModelShape.from_folder(reference.path())
    workload = Generate(prompt_tokens=64, new_tokens=8)
    plain = baseline(shape, workload)
    assert ChunkedPrefill(piece_tokens=64).predict(plain, shape, workload) == plain
    assert list(ChunkedPrefill.options(shape, workload)) == []
    with pytest.raises(CompositionError):
        ChunkedPrefill(piece_tokens=0)
