"""EpiCache: tokens judged by a prompt that is not kept, layers by how they mind, conversations by topic."""

import pytest
import torch
from transformers import DynamicCache

from pintpot.cache import KIVI, EpisodicCaches, build_cache, cache_bytes, use_cache_attention
from pintpot.cache.epicache import EpiCache, layer_similarities, shares
from pintpot.cache.episodes import clusters
from pintpot.cache.snapkv import SnapKV
from pintpot.core.errors import CompositionError, ShapeError
from pintpot.core.expression import parse
from tests.architectures import tiny_config, tiny_model
from tests.cache.layers import attention, cascaded, normal, read, sizes_of

torch.set_num_threads(1)
B, K, R, D = 1, 2, 2, 8
KEEP = EpiCache(kept_fraction=0.25, recent_tokens=16, block_tokens=96, episodes=2, segment_utterances=2)


def ids(count, seed=0, low=3, high=256):
    return torch.randint(low, high, (1, count), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def test_a_prompt_judges_and_is_not_kept():
    keys, values, query = normal(B, K, 150, D), normal(B, K, 150, D, seed=1), normal(B, K * R, 150, D, seed=2)
    (layer,) = cascaded(KEEP, 1, sizes_of(keys, query))
    layer.aside = 30
    out = read(layer, keys, values, query)
    expected = (attention(keys, query, 150) @ values.double()[:, :, None]).flatten(1, 2).transpose(1, 2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    # 120 tokens are kept for judgement: 4 sinks, 64 judged, the others wait.
    assert (layer.seen, layer.stored.tokens, layer.pending.tokens) == (120, 4 + 16, 52)
    assert torch.equal(layer.pending.view(68).keys, keys[:, :, 68:120])
    weights = attention(keys, query, 30)[..., 4:68]
    chosen = weights.amax(dim=(2, 3)).topk(16).indices.sort().values
    assert torch.equal(
        layer.stored.whole()[0][:, :, 4:], keys[:, :, 4:].gather(2, chosen[..., None].expand(-1, -1, -1, D))
    )
    layer.aside = 0
    new = [normal(B, K, 1, D, seed=5), normal(B, K, 1, D, seed=6), normal(B, K * R, 1, D, seed=7)]
    read(layer, *new)
    assert layer.pending.tokens == 53


@pytest.mark.parametrize("keep", [None, KEEP, SnapKV(window_tokens=16)])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_what_is_asked_aside_leaves_no_trace_but_its_judgement(name, keep):
    model, text = tiny_model(name), ids(100)
    plain, asked = (build_cache(model.config, keep=keep) for _ in range(2))
    with torch.no_grad(), use_cache_attention(model):
        expected = model(text, past_key_values=plain).logits
        with asked.aside(20):
            together = model(torch.cat([text, ids(20, seed=1)], dim=1), past_key_values=asked).logits[:, :100]
        torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
        assert asked.get_seq_length() == plain.get_seq_length() == 100
        assert asked.nbytes() == plain.nbytes()
        if keep is None:
            again = [model(ids(5, seed=2), past_key_values=cache).logits for cache in (plain, asked)]
            torch.testing.assert_close(again[1], again[0], rtol=1e-4, atol=1e-5)


def test_a_padded_batch_is_not_asked_aside(model):
    cache = build_cache(model.config, keep=KEEP)
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[1, :10] = 0
    with torch.no_grad(), use_cache_attention(model), cache.aside(5), pytest.raises(CompositionError, match="padded"):
        model(ids(60).repeat(2, 1), attention_mask=mask, past_key_values=cache)


def test_layers_that_mind_more_keep_more():
    assert shares((0.9, 0.9), 1.1) == [0.5, 0.5]
    found = shares((0.5, 0.75, 1.0), 1.0)
    assert found == pytest.approx([x / (2 / 3 + 1 / 3 + 1 / 12) for x in (2 / 3, 1 / 3, 1 / 12)])
    keep = EpiCache(kept_fraction=0.25, recent_tokens=16, similarities=(0.2, 0.9, 0.5))
    given = [(normal(B, K, 280, D, seed=i), normal(B, K, 280, D, seed=9), normal(B, K * R, 280, D)) for i in range(3)]
    layers = cascaded(keep, 3, sizes_of(given[0][0], given[0][2]))
    for layer, tokens in zip(layers, given, strict=True):
        read(layer, *tokens)
    stored = [layer.stored.tokens - 4 for layer in layers]
    assert sum(stored) == 3 * 64
    assert stored[0] > stored[2] > stored[1] >= 64 * 0.2
    assert parse(str(keep)) == (keep,)


def test_similarities_are_those_of_keys_read_with_a_mask():
    model, text = tiny_model("llama"), ids(150)
    found = layer_similarities(model, text, block_tokens=40, sink_tokens=8, overlap=0.5)
    rows, columns = torch.arange(150)[:, None], torch.arange(150)
    start = rows // 40 * 40
    seen = (columns <= rows) & ((columns >= (start - 20).clamp(min=0)) | (columns < 8))
    caches = DynamicCache(), DynamicCache()
    with torch.no_grad():
        model(text, past_key_values=caches[0])
        model(text, past_key_values=caches[1], attention_mask=seen[None, None])
    for layer, similarity in enumerate(found):
        whole, blocks = (cache.layers[layer].keys.double() for cache in caches)
        likeness = [
            torch.cosine_similarity(a.flatten(2), b.flatten(2), dim=-1).mean()
            for a, b in zip(whole.split(100, dim=2), blocks.split(100, dim=2), strict=True)
        ]
        assert similarity == pytest.approx(float(sum(likeness) / 2), abs=1e-5)
    assert found[0] == pytest.approx(1.0)
    assert found[1] < 1.0


def test_clusters_find_groups_and_are_the_same_twice():
    points = torch.cat([normal(5, 4) * 0.1 + 3, normal(4, 4, seed=1) * 0.1 - 3, normal(3, 4, seed=2) * 0.1]).numpy()
    labels = clusters(points, 3, seed=0)
    assert labels == clusters(points, 3, seed=0)
    assert [len(set(labels[part])) for part in (slice(0, 5), slice(5, 9), slice(9, 12))] == [1, 1, 1]
    assert len(set(labels)) == 3
    assert len(set(clusters(points[:1].repeat(4, axis=0), 3, seed=0))) == 1


def topics(text):
    """A sentence encoder of sorts: one topic talks in low tokens, the other in high ones."""
    return torch.stack([(text < 128).float().mean(), (text >= 128).float().mean(), torch.tensor(0.1)])


def conversation():
    """Utterances on two topics, in turns of two."""
    bounds = [(3, 128), (3, 128), (128, 256), (128, 256)] * 3
    return [ids(30 + i, i, *bound) for i, bound in enumerate(bounds)]


def test_each_episode_has_a_cache_and_questions_find_theirs(model):
    session = EpisodicCaches(model, KEEP, store=KIVI(bits=4), embed=topics)
    utterances = conversation()
    session.read(utterances)
    assert sorted(episode.segments for episode in session.episodes) == [(0, 2, 4), (1, 3, 5)]
    low = session.nearest(ids(10, 50, 3, 128))
    assert session.episodes[low].segments == (0, 2, 4)
    assert session.nearest(ids(10, 51, 128, 256)) != low
    assert torch.equal(session.episodes[low].prompt[0, :61], torch.cat(utterances[:2], dim=1)[0])
    total = sum(part.shape[1] for part in utterances)
    for episode in session.episodes:
        assert episode.cache.get_seq_length() == total
        assert episode.cache.nbytes() == cache_bytes(model.config, total, keep=KEEP, store=KIVI(bits=4))
    dense = cache_bytes(model.config, total)
    assert session.nbytes() < len(session.episodes) * dense / 2
    question, settings = ids(8, 60, 3, 128), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    first = session.answer(question, **settings)
    session.answer(ids(8, 61, 3, 128), **settings)
    assert first.shape == (1, 6)
    assert torch.equal(session.answer(question, **settings), first)
    assert session.episodes[low].cache.get_seq_length() == total


def test_caches_of_two_episodes_hold_different_tokens(model):
    session = EpisodicCaches(model, KEEP, embed=topics)
    session.read(conversation())
    one, other = (episode.cache.layers[-1].stored.whole()[0] for episode in session.episodes)
    assert one.shape[2] != other.shape[2] or not torch.equal(one, other)


def test_nothing_evicted_answers_as_the_whole_conversation(model):
    session = EpisodicCaches(model, EpiCache(kept_fraction=1.0, block_tokens=100, episodes=2))
    utterances = conversation()[:4]
    session.read(utterances)
    question, settings = ids(8, 60), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    text = torch.cat([*utterances, question], dim=1)
    expected = model.generate(text, **settings)[:, text.shape[1] :]
    assert torch.equal(session.answer(question, **settings), expected)


def test_refusals(model):
    session = EpisodicCaches(model, KEEP)
    with pytest.raises(ShapeError, match="no conversation"):
        session.answer(ids(5))
    with pytest.raises(ShapeError, match="utterances"):
        session.read([])
    with pytest.raises(ShapeError, match="more than a block"):
        layer_similarities(model, ids(20), block_tokens=40)
    with pytest.raises(CompositionError):
        EpiCache(episodes=0)
    cache = build_cache(tiny_config("llama"), keep=EpiCache(similarities=(0.5,), recent_tokens=16))
    with use_cache_attention(model), torch.no_grad(), pytest.raises(CompositionError, match="similarities of 1 layers"):
        model(ids(100), past_key_values=cache)
