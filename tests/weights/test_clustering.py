"""K-means: the nearest entry, in whichever way it is found."""

import pytest
import torch

from pintpot.weights.clustering import nearest


@pytest.mark.parametrize("count", [1, 3, 12, 64, 96, 256])
def test_the_nearest_is_the_first_of_the_least_distances(count):
    generator = torch.Generator().manual_seed(count)
    # Small integers, so that distances are exact and many are equal.
    vectors = torch.randint(-3, 4, (5000, 2), generator=generator).float()
    entries = torch.randint(-3, 4, (count, 2), generator=generator).float()
    plain = (vectors[:, None] - entries).square().sum(-1)
    first = (plain == plain.amin(1, keepdim=True)).int().argmax(1)
    assert torch.equal(nearest(vectors, entries), first)
