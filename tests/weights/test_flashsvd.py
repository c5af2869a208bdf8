"""FlashSVD: the same numbers as the factors give whole, in fewer bytes of activations."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pintpot.core.errors import ShapeError, UnsupportedModel
from pintpot.core.ledger import Account
from pintpot.ledger.tracker import Tracker
from pintpot.weights.flashsvd import FlashSVD, TiledFeedForward
from pintpot.weights.greenformers import Greenformers
from pintpot.weights.load import load_compressed
from pintpot.weights.streaming import compress_folder
from tests.architectures import tiny_model

IDS = torch.randint(3, 256, (2, 256), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi", "gemma2"])
def test_tiles_give_what_the_whole_gives(architecture):
    tiled, whole = tiny_model(architecture), tiny_model(architecture)
    FlashSVD(kept_fraction=0.5, tile_tokens=100).quantize_model_(tiled)
    Greenformers(kept_fraction=0.5).quantize_model_(whole)
    assert sum(isinstance(m, TiledFeedForward) for m in tiled.modules()) == tiled.config.num_hidden_layers
    assert tiled.state_dict().keys() == whole.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(tiled(IDS).logits, whole(IDS).logits, rtol=1e-4, atol=1e-5)


def test_activations_of_a_feed_forward_fall_to_a_tile():
    torch.manual_seed(0)
    tiled = tiny_model("llama")
    FlashSVD(tile_tokens=32).quantize_model_(tiled)
    feed_forward = tiled.model.layers[0].mlp
    hidden = torch.randn(4, 512, 64, generator=torch.Generator().manual_seed(0))

    def peak(run) -> int:
        with torch.no_grad(), Tracker(samples=None) as tracker:
            run(hidden)
        return max(sum(moment.of(a) for a in Account) for moment in tracker.ledger().moments)

    whole, tiles = peak(feed_forward.whole), peak(feed_forward)
    # Whole: gate, its activation, up and their product are 128 wide each, for 2048 tokens; in tiles the output remains.
    assert tiles < 2048 * 64 * 4 + 40 * 32 * 128 * 4
    assert tiles < 0.4 * whole


def test_a_saved_folder_is_tiled_again(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    compress_folder(tmp_path / "dense", tmp_path / "small", FlashSVD(tile_tokens=7))
    model = load_compressed(tmp_path / "small")
    assert model.model.layers[1].mlp.tile_tokens == 7
    assert model.model.layers[1].mlp.act_fn is not None


def test_gradients_pass_whole_and_tokens_fewer_than_a_tile_too():
    model = tiny_model("llama")
    FlashSVD(tile_tokens=4).quantize_model_(model)
    hidden = torch.randn(1, 9, 64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    model.model.layers[0].mlp(hidden).sum().backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert model.model.layers[0].mlp(hidden[:, :3]).shape == (1, 3, 64)


def test_adapters_and_copies_reach_the_tiles():
    model = tiny_model("llama")
    FlashSVD(tile_tokens=4).quantize_model_(model)
    twin = copy.deepcopy(model)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    with torch.no_grad():
        plain, adapted = twin(IDS).logits, tuned(IDS).logits
    assert not torch.equal(plain, adapted)
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)


def test_refusals():
    with pytest.raises(UnsupportedModel, match=r"layers\.0.*q_proj|layers\.0.*k_proj"):
        FlashSVD().quantize_model_(tiny_model("opt"))
    with pytest.raises(ShapeError, match="1 token or more"):
        FlashSVD(tile_tokens=0)
