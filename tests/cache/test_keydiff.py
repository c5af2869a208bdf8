"""KeyDiff keeps the keys that point away from the mean direction."""

import torch

from pintpot.cache.keydiff import KeyDiff
from tests.cache.layers import normal
from tests.cache.seeing import B, D, K, filled, seen_by, tensors

torch.set_num_threads(1)


def test_scores_are_cosines_with_the_mean_direction(monkeypatch):
    monkeypatch.setattr("pintpot.cache.keydiff.SCORE_TOKENS", 50)
    method = KeyDiff(sink_tokens=4)
    query, keys, values = tensors(200)
    pending = keys[:, :, 4:].double()
    directions = pending / pending.norm(dim=-1, keepdim=True)
    anchor = directions.mean(dim=2, keepdim=True)
    expected = -(directions * anchor).sum(dim=-1) / anchor.norm(dim=-1)
    got = method.score(seen_by(method, query, keys, values, sinks=4))
    torch.testing.assert_close(got, expected[..., : got.shape[-1]].float(), rtol=1e-5, atol=1e-6)


def test_a_distinct_key_stays_and_lengths_do_not_matter():
    query, keys, values = tensors(104)
    common = normal(D, seed=4)
    keys = common + 0.3 * keys
    keys[:, :, 30] = -common
    keys[:, :, 40] *= 100
    layer = filled(KeyDiff(kept_fraction=0.1), query, keys, values, [104])
    kept, _ = layer.stored.whole()
    assert kept.shape == (B, K, 4 + 6, D)
    assert (kept == keys[:, :, 30:31]).all(dim=-1).any(dim=-1).all()
    assert not (kept == keys[:, :, 40:41]).all(dim=-1).any(dim=-1).all()
