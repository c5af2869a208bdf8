"""eDKM against the layer that it saves memory of, and a model trained and packed with it."""

import copy
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from pintpot.core.errors import CompositionError, UnsupportedModel
from pintpot.weights.edkm import EDKM, ClusteredWeight
from pintpot.weights.trained import TrainedLinear
from tests.architectures import tiny_model


def stand_in(rows: int, columns: int, method: EDKM) -> ClusteredWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / 8
    return method.stand_in("w", weight, method.terms("w", rows, columns, torch.float32))


def plain(weight: torch.Tensor, centroids: torch.Tensor, method: EDKM) -> torch.Tensor:
    """DKM with the whole attention map of every iteration."""
    values = weight.reshape(-1)
    gap = centroids.sort().values.diff().median()
    temperature = method.temperature * gap**2

    def attention(centroids: torch.Tensor) -> torch.Tensor:
        return (-((values[:, None] - centroids) ** 2) / temperature).softmax(1)

    for _ in range(method.iterations):
        share = attention(centroids)
        before, centroids = centroids, (share * values[:, None]).sum(0) / share.sum(0)
        if ((centroids - before).abs() <= method.tolerance * gap).all():
            break
    return (attention(centroids) @ centroids).view(weight.shape)


@pytest.mark.parametrize("bits", [1, 3])
def test_gives_the_numbers_and_gradients_of_the_layer_with_all_maps(bits):
    method = EDKM(bits=bits)
    one = stand_in(24, 40, method)
    exact = one.dense.detach().bfloat16().double().requires_grad_()
    expected = plain(exact, one.centroids.double(), method)
    found = one.weight()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    back = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    found.backward(back)
    expected.backward(back.double())
    torch.testing.assert_close(one.dense.grad.double(), exact.grad, rtol=1e-3, atol=1e-4)


def kept_bytes(call, parameters) -> int:
    """Bytes that a call keeps for its backward pass beside the parameters."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def see(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(see, lambda tensor: tensor):
        call()
    return sum(kept.values())


def test_keeps_a_hundredth_of_what_the_layer_with_all_maps_keeps():
    method = EDKM(bits=3, tolerance=0.0)
    one = stand_in(256, 256, method)
    lean = kept_bytes(one.weight, [one.dense])
    full = kept_bytes(lambda: plain(one.dense, one.centroids, method), [one.dense])
    assert full > 256 * 256 * 8 * 4 * method.iterations
    assert lean * 130 < full


def test_evaluation_is_what_will_be_packed():
    method = EDKM(bits=2)
    one = stand_in(24, 40, method).eval()
    (layout,) = method.terms("w", 24, 40, torch.float32)
    (stored,) = one.terms((layout,))
    assert torch.equal(one.weight(), layout.decode(stored, 40, torch.float32))
    assert len(one.weight().unique()) == 4


def test_training_pulls_weights_to_their_centroids_and_is_packed(tmp_path: Path):
    model = tiny_model("llama")
    skeleton = copy.deepcopy(model).to("meta")
    method = EDKM(bits=2)
    layout = method.prepare_(model)
    ids = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(0))

    def packed_loss() -> float:
        with torch.no_grad():
            return float(model.eval()(input_ids=ids, labels=ids).loss)

    before = packed_loss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(8):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert isinstance(model.model.layers[0].mlp.up_proj, TrainedLinear)
    after = packed_loss()
    assert after < before
    method.finish_(model.eval(), layout, skeleton)
    assert abs(packed_loss() - after) < 1e-4
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_weights_that_are_all_the_same_do_no_harm():
    method = EDKM(bits=2)
    for value in (0.0, 0.3):
        one = method.stand_in("w", torch.full((4, 8), value), method.terms("w", 4, 8, torch.float32))
        one.weight().sum().backward()
        torch.testing.assert_close(one.eval().weight(), torch.full((4, 8), value), rtol=0.01, atol=1e-6)
        assert torch.isfinite(one.dense.grad).all()


def test_refuses_what_it_cannot_do():
    with pytest.raises(CompositionError, match="1 to 8 bits"):
        EDKM(bits=9)
    with pytest.raises(UnsupportedModel, match="experts"):
        EDKM().prepare_(tiny_model("mixtral"))
