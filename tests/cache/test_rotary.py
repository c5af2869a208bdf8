"""Rotary positions are taken off as the model puts them on."""

import pytest
import torch
from transformers import LlamaConfig

from pintpot.cache.calibration import sample_layer
from pintpot.cache.rotary import rotary_of
from pintpot.core.errors import UnsupportedModel
from tests.architectures import SIZES, tiny_config, tiny_model

torch.set_num_threads(1)
KEY_NORMS = {"qwen3": "k_norm"}


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi", "gemma2", "gemma3", "mixtral"])
def test_unrotated_keys_are_the_projections(name):
    model = tiny_model(name)
    ids = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    sample = sample_layer(model, ids, 0)
    module = sample.module
    with torch.no_grad():
        keys = module.k_proj(sample.inputs).unflatten(-1, (-1, sample.keys.shape[-1])).transpose(1, 2)
        for norm in ("k_norm", "k_layernorm"):
            keys = getattr(module, norm)(keys) if getattr(module, norm, None) is not None else keys
    torch.testing.assert_close(sample.unrotated_keys(), keys, rtol=1e-4, atol=1e-5)
    again = sample.place.rotary.rotate(sample.unrotated_keys(), sample.positions)
    torch.testing.assert_close(again, sample.keys, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_models_without_have_none(name):
    assert rotary_of(tiny_config(name), "full_attention") is None
    sample = sample_layer(tiny_model(name), torch.arange(3, 23)[None], 1)
    assert torch.equal(sample.unrotated_keys(), sample.keys)


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_scaled_frequencies(scaling):
    config = LlamaConfig(**SIZES, rope_parameters={"rope_theta": 10000.0, **scaling})
    model = type(tiny_model("llama"))(config).eval()
    ids = torch.randint(3, 256, (1, 30), generator=torch.Generator().manual_seed(0))
    sample = sample_layer(model, ids, 1)
    keys = sample.module.k_proj(sample.inputs).unflatten(-1, (-1, 16)).transpose(1, 2)
    torch.testing.assert_close(sample.unrotated_keys(), keys, rtol=1e-4, atol=1e-5)


def test_frequencies_that_change_are_refused():
    config = LlamaConfig(**SIZES, rope_parameters={"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(UnsupportedModel, match="dynamic") as caught:
        rotary_of(config, "full_attention")
    assert caught.value.hint
