"""SnapKV keeps what a window of recent queries attends to, and its neighbours."""

import torch

from pintpot.cache.snapkv import SnapKV
from tests.cache.seeing import B, K, all_weights, seen_by, tensors

torch.set_num_threads(1)


def test_scores_are_the_windows_votes_averaged_over_neighbours():
    keep = SnapKV(window_tokens=16, kernel_size=5)
    query, keys, values = tensors(16 + 64 + 7)
    found = keep.score(seen_by(keep, query, keys, values))
    votes = all_weights(query, keys)[:, :, :, -16:].sum(dim=3).mean(dim=2)[..., :64]
    padded = torch.nn.functional.pad(votes, (2, 2))
    expected = torch.stack([padded[..., i : i + 5].sum(dim=-1) / 5 for i in range(64)], dim=-1)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)


def test_what_the_window_looks_at_stays_with_its_neighbours_and_what_others_looked_at_goes():
    keep = SnapKV(window_tokens=16, kernel_size=3, kept_fraction=3 / 64)
    query, keys, values = tensors(16 + 64)
    wanted, unwanted = 20, 50
    keys[:, :, wanted], keys[:, :, unwanted] = 0.0, 0.0
    keys[:, :, wanted, 0], keys[:, :, unwanted, 1] = 30.0, 30.0
    query[:, :, -16:, 0], query[:, :, -16:, 1] = 3.0, -3.0
    query[:, :, :-16, 1] = 3.0
    chosen = keep.choose(keep.score(seen_by(keep, query, keys, values)))
    assert torch.equal(chosen, torch.tensor([wanted - 1, wanted, wanted + 1]).expand(B, K, 3))
