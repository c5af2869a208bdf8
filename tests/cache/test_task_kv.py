"""Task-KV and lanes: heads of one layer that keep different numbers of tokens."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from pintpot.cache import KIVI, build_cache, cache_bytes, use_cache_attention
from pintpot.cache._base import LayerSizes, Place
from pintpot.cache.dense import Dense
from pintpot.cache.lanes import LaneState
from pintpot.cache.layer import CacheLayer
from pintpot.cache.rotatekv import RotateKV
from pintpot.cache.task_kv import TaskKV
from pintpot.core.errors import CompositionError
from tests.architectures import tiny_config, tiny_model
from tests.cache.layers import attention, normal, read, sizes_of

torch.set_num_threads(1)
B, K, R, D, T = 2, 6, 2, 8, 200
SMALL = {"recent_tokens": 40, "window_tokens": 16, "sink_tokens": 4}


def place(index=0, layers=1, heads=K):
    return Place(LayerSizes(heads, D, D, heads * R), index, layers, consecutive=False)


@pytest.fixture
def given():
    """Keys, values and queries; the values of some heads have a meaning of their own in each sequence."""
    values = 0.3 * normal(B, K, T, D, seed=1) + torch.ones(D)
    values[0, 1], values[0, 4] = values[0, 1] - 4.0, values[0, 4] + 3.0
    values[1, 5], values[1, 2] = values[1, 5] + 4.0, values[1, 2] - 3.0
    return normal(B, K, T, D), values, normal(B, K * R, T, D, seed=2)


def filled(keep, given, pieces=(T,), store=None, **more):
    keys, values, query = given
    layer = CacheLayer(store or Dense(), keep, place().but(sizes=sizes_of(keys, query)))
    position = 0
    for count in pieces:
        new = slice(position, position + count)
        out = read(layer, keys[:, :, new], values[:, :, new], query[:, :, new], **more)
        position += count
    return layer, out


def test_far_heads_keep_everything_and_the_others_middle_activations(given):
    keep = TaskKV(heterogeneous_fraction=0.5, least_heads=3, **SMALL)
    layer, _ = filled(keep, given)
    keys, _, query = given
    state = layer.state
    assert isinstance(state, LaneState)
    decided, survivors = keep.decided(T - 4)
    assert [s.tokens for s in state.states] == [decided, survivors]
    assert survivors == decided // 4
    far = [set(row.tolist()) for row in state.heads[:, :3]]
    assert {1, 4} < far[0]
    assert {5, 2} < far[1]
    votes = attention(keys, query, 16)[..., 4 : 4 + decided].sum(dim=3).mean(dim=2)
    chosen = functional.avg_pool1d(votes, 7, stride=1, padding=3).topk(survivors).indices.sort().values
    held = state.states[1].whole()[0]
    for b in range(B):
        for number, head in enumerate(state.heads[b, 3:].tolist()):
            assert torch.equal(held[b, number], keys[b, head, 4:][chosen[b, head]])
    assert torch.equal(state.shared.whole()[0], keys[:, :, :4])


def test_distances_are_those_of_semantic_vectors_from_their_centre(given):
    keys, values, query = given
    seen = {}

    class Noted(TaskKV):
        def assign(self, given):
            seen["distances"] = self.distances(given)
            return super().assign(given)

    keep = Noted(semantic_tokens=20, heterogeneous_fraction=0.5, least_heads=3, **SMALL)
    filled(keep, given)
    mean = attention(keys, query, 16)[..., 4:].mean(dim=3)
    weights, best = mean.topk(20)
    vectors = torch.empty(B, K, R, D, dtype=torch.float64)
    for b in range(B):
        for k in range(K):
            for r in range(R):
                vectors[b, k, r] = weights[b, k, r] @ values[b, k, 4:][best[b, k, r]].double()
    expected = (vectors - vectors.mean(dim=(1, 2), keepdim=True)).norm(dim=-1).amax(dim=2)
    torch.testing.assert_close(seen["distances"].double(), expected, rtol=1e-4, atol=1e-5)


def test_the_head_nearest_to_the_centre_is_kept_whole_too(given):
    found = []

    class Noted(TaskKV):
        def assign(self, given):
            found.append(self.distances(given))
            return super().assign(given)

    layer, _ = filled(Noted(heterogeneous_fraction=0.5, least_heads=3, **SMALL), given)
    nearest = found[0].argmin(dim=1)
    assert (layer.state.heads[:, :3] == nearest[:, None]).any(dim=1).all()


def test_heterogeneous_heads_grow_fewer_towards_the_top():
    keep = TaskKV(heterogeneous_fraction=0.25, least_heads=4)
    assert [keep.heterogeneous(place(i, 5, 32)) for i in range(5)] == [8, 7, 6, 5, 4]
    assert keep.heterogeneous(place(heads=2)) == 1
    assert keep.lanes(place(heads=1)) == ()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("pieces", [(T,), (90, 1, 70, 39), (3, 60, 137)])
def test_attention_sees_just_what_each_head_holds(given, softcap, pieces):
    layer, _ = filled(TaskKV(**SMALL), given, pieces, softcap=softcap)
    new = [normal(B, K, 1, D, seed=7), normal(B, K, 1, D, seed=8), normal(B, K * R, 1, D, seed=9)]
    state, pending = layer.state, layer.pending.view(0)
    out = read(layer, *new, softcap=softcap)
    for b in range(B):
        for lane, held in enumerate(state.states):
            heads = state.heads[b].split([x.heads for x in state.lanes])[lane].tolist()
            for number, head in enumerate(heads):
                own = [state.shared.whole()[i][b, head] for i in (0, 1)]
                own = [torch.cat([own[i], held.whole()[i][b, number]]).double() for i in (0, 1)]
                rest = [pending.keys[b, head], pending.values[b, head]]
                k, v = (torch.cat([own[i], rest[i].double(), new[i][b, head].double()]) for i in (0, 1))
                for r in range(R):
                    scores = k @ new[2][b, head * R + r, 0].double()
                    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                    expected = scores.softmax(dim=0) @ v
                    torch.testing.assert_close(out[b, 0, head * R + r].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("store", [None, KIVI(bits=4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_end_to_end_with_bytes(store, dtype):
    model, keep = tiny_model("gpt2", dtype=dtype), TaskKV(recent_tokens=64)
    ids = torch.randint(3, 256, (2, 250), generator=torch.Generator().manual_seed(0))
    cache = build_cache(model.config, keep=keep, store=store)
    sizes = []
    with use_cache_attention(model), torch.no_grad():
        for piece in ids.split([10, 60, 100, 80], dim=1):
            model(piece, past_key_values=cache)
            sizes.append((cache.get_seq_length(), cache.nbytes()))
        out = model.generate(ids, past_key_values=build_cache(model.config, keep=keep, store=store), max_new_tokens=70)
    assert out.shape[1] > 250
    for tokens, measured in sizes:
        assert measured == cache_bytes(model.config, tokens, keep=keep, store=store, batch=2, dtype=dtype)


def test_sequences_may_be_repeated_and_put_in_another_order(given):
    layer, _ = filled(TaskKV(**SMALL), given)
    before = layer.state.heads.clone()
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([2, 1]))
    assert torch.equal(layer.state.heads, before[[1, 0]])
    assert layer.state.states[0].whole()[0].shape[0] == 2


def test_shapes_alone_are_enough():
    config, keep = tiny_config("llama"), TaskKV(recent_tokens=64)
    with FakeTensorMode():
        model, cache = tiny_model("llama"), build_cache(config, keep=keep)
        with use_cache_attention(model), torch.no_grad():
            model(torch.zeros(2, 222, dtype=torch.int64), past_key_values=cache)
            model(torch.zeros(2, 1, dtype=torch.int64), past_key_values=cache)
        assert cache.nbytes() == cache_bytes(config, 223, keep=keep, batch=2)


def test_stores_of_all_heads_together_are_refused():
    with pytest.raises(CompositionError, match="even_heads"):
        build_cache(tiny_config("llama"), keep=TaskKV(), store=RotateKV())
    with pytest.raises(CompositionError):
        TaskKV(heterogeneous_fraction=1.5)
