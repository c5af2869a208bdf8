"""What holds for every registered activation technique, on every architecture."""

import pytest
import torch

from pintpot.core.errors import UnsupportedModel
from pintpot.core.registry import techniques
from pintpot.core.workload import Finetune
from tests.architectures import TINY, tiny_model

NAMES = tuple(techniques("activations"))
IDS = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(0))
WORK = Finetune(batch=2, tokens=24)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gradients(model) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(11)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("name", NAMES)
def test_the_gradients_are_those_of_the_plain_step_and_the_model_is_restored(name, architecture):
    model = tiny_model(architecture).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    plain = gradients(model)
    method = techniques("activations")[name]()
    try:
        with method.scope(model, WORK):
            first = gradients(model)
            second = gradients(model)
        refusal = ""
    except UnsupportedModel as error:
        # What a method cannot act on it refuses by name, and nothing has changed.
        refusal = error.message
        first = second = gradients(model)
    assert not refusal or type(model).__name__ in refusal
    tolerance = {"rtol": 0, "atol": 0} if method.exact else {"rtol": 1e-4, "atol": 1e-6}
    for a, b, c in zip(plain, first, second, strict=True):
        torch.testing.assert_close(b, a, **tolerance)
        assert torch.equal(b, c)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert model.training


@pytest.mark.parametrize("name", NAMES)
def test_the_scope_leaves_evaluation_mode_alone(name):
    model = tiny_model("gpt2")
    with techniques("activations")[name]().scope(model, WORK):
        assert not any(module.training for module in model.modules())
