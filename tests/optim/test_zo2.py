"""ZO2: the weights are MeZO's, while no more than two blocks are in memory."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pintpot.core.errors import CompositionError, UnsupportedModel
from pintpot.core.ledger import Account, Tier
from pintpot.core.registry import techniques
from pintpot.core.shape import ModelShape
from pintpot.core.slots import check
from pintpot.core.workload import Finetune
from pintpot.jobs.batches import PackedText
from pintpot.jobs.simulate import simulate
from pintpot.jobs.training import TrainSettings, train
from pintpot.ledger.predict import baseline
from pintpot.ledger.tracker import Tracker
from pintpot.optim import Mezo, Zo2, Zo2Rule
from pintpot.optim._stream import BlockStore, DiskStore, away, block_layouts
from pintpot.optim._tensors import mix_seed
from tests.architectures import tiny_config, tiny_model

IDS = torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(0))
LAYERS = {
    "gpt2": {"n_layer": 4},
    "qwen2": {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4},
    "gemma2": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
}


def config_of(name: str):
    config = tiny_config(name)
    for key, value in LAYERS.get(name, {"num_hidden_layers": 4}).items():
        setattr(config, key, value)
    return config


def model_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ModelShape.from_config(config_of(name), dtype).build("cpu")


def closure_of(model: nn.Module, batches: int = 1):
    def closure() -> float:
        rows = IDS.split(len(IDS) // batches)
        return sum(float(model(input_ids=row, labels=row, use_cache=False).loss) for row in rows) / len(rows)

    return closure


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, batches: int = 1) -> list[float]:
    losses = []
    for step in range(count):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 / (1 + step)
        losses.append(float(optimizer.step(closure_of(model, batches))))
    return losses


def furthest(model: nn.Module, other: nn.Module) -> float:
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_weights_are_those_of_mezo_bit_for_bit(tmp_path, name, dtype):
    whole, streamed = model_of(name, dtype), model_of(name, dtype)
    ours = Zo2(streamed, seed=5, weight_decay=0.1, folder=tmp_path)
    assert steps(streamed, ours, 10) == steps(whole, Mezo(whole, seed=5, weight_decay=0.1), 10)
    ours.bring_back()
    assert furthest(whole, streamed) == 0


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen2"])
def test_tied_embeddings_follow_to_rounding(tmp_path, name):
    whole, streamed = model_of(name), model_of(name)
    ours = Zo2(streamed, seed=5, weight_decay=0.1, folder=tmp_path)
    expected = steps(whole, Mezo(whole, seed=5, weight_decay=0.1), 10)
    assert steps(streamed, ours, 10) == pytest.approx(expected, rel=1e-6)
    ours.bring_back()
    # A rounding error of 1e-7 in a loss is 5e-5 in a slope, and 5e-8 in a step at this learning rate.
    assert furthest(whole, streamed) < 5e-6


@pytest.mark.parametrize("folder", [True, False])
def test_several_batches_make_one_step(tmp_path, folder):
    whole, streamed = model_of("llama"), model_of("llama")
    ours = Zo2(streamed, folder=tmp_path if folder else None)
    assert steps(streamed, ours, 3, batches=2) == steps(whole, Mezo(whole), 3, batches=2)
    ours.bring_back()
    assert furthest(whole, streamed) == 0


class Toy(nn.Module):
    """An embedding, blocks and a head, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Linear(3, 6, dtype=torch.float64)
        self.blocks = nn.ModuleList(nn.Linear(6, 6, dtype=torch.float64) for _ in range(4))
        self.head = nn.Linear(6, 1, bias=False, dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        hidden = self.front(x).tanh()
        for block in self.blocks:
            hidden = block(hidden)
        return SimpleNamespace(loss=(self.head(hidden.tanh()) - 1).square().mean())


def test_twenty_steps_are_those_of_the_papers_schedule(tmp_path):
    """Module by module: the last step's update, +eps, first side, -2 eps, second side, +eps."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, twin, lr, eps = Toy(), Toy(), 0.02, 1e-3
    optimizer = Zo2(ours, lr=lr, epsilon=eps, seed=3, folder=tmp_path)
    matrices = [p for p in ours.parameters() if p.dim() > 1]
    vectors = [p for p in ours.parameters() if p.dim() < 2]
    number = {id(p): i for i, p in enumerate([*matrices, *vectors])}
    numbers = [number[id(p)] for p in ours.parameters()]
    places = {name: i for i, (name, _) in enumerate(twin.named_parameters())}

    def move(prefix: str, step: int, amount: float) -> None:
        for name, p in twin.named_parameters():
            if name.startswith(prefix):
                seed = mix_seed(mix_seed(3, step, 0), numbers[places[name]], 0)
                z = torch.randn(p.numel(), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                p.data += amount * z.reshape(p.shape)

    slope = 0.0
    with torch.no_grad():
        for step in range(20):
            sides = [x, x]
            for name in ("front", *(f"blocks.{i}" for i in range(4)), "head"):
                module = twin.get_submodule(name)
                if step:
                    move(name, step - 1, -lr * slope)
                for side, amount in enumerate((eps, -2 * eps)):
                    move(name, step, amount)
                    inputs = sides[side].tanh() if name == "head" else sides[side]
                    sides[side] = module(inputs).tanh() if name == "front" else module(inputs)
                move(name, step, eps)
            above, below = ((side - 1).square().mean() for side in sides)
            reported = optimizer.step(lambda: ours(x).loss)
            assert reported == pytest.approx(float((above + below) / 2), rel=1e-9)
            slope = float((above - below) / (2 * eps))
        move("", 19, -lr * slope)
    optimizer.bring_back()
    assert furthest(ours, twin) < 1e-9


def emptied(model: nn.Module, store: BlockStore) -> BlockStore:
    """The store with the blocks of a model, which keeps none of them."""
    for name, p in model.named_parameters():
        if name in store.places:
            store.put(name, p.detach())
            p.data = away(p)
    return store


class Counted(DiskStore):
    """Notes the order in which blocks come and go."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.traffic = []

    def read(self, layout, buffer):
        self.traffic.append(("read", layout.block[-1]))
        return super().read(layout, buffer)

    def write(self, layout, buffer):
        self.traffic.append(("write", layout.block[-1]))
        return super().write(layout, buffer)


def test_each_block_comes_and_goes_once_a_step_ahead_of_its_turn(tmp_path):
    model = model_of("llama")
    store = emptied(model, Counted(tmp_path, block_layouts(model)))
    optimizer = Zo2(model, lr=1e-3, store=store)
    steps(model, optimizer, 1)
    store.traffic.clear()
    steps(model, optimizer, 1)
    order = ["read 0", "read 1", "write 0", "read 2", "write 1", "read 3", "write 2", "write 3"]
    assert [" ".join(entry) for entry in store.traffic] == order


class Ram(BlockStore):
    """Blocks in other tensors, one a parameter."""

    def __init__(self, layouts) -> None:
        super().__init__(layouts)
        self.held = {}

    def read(self, layout, buffer):
        for name in layout.entries:
            layout.view(name, buffer).copy_(self.held[name])
        return lambda: None

    def write(self, layout, buffer):
        for name in layout.entries:
            self.put(name, layout.view(name, buffer))
        return lambda: None

    def get(self, name):
        return self.held[name]

    def put(self, name, value):
        self.held[name] = value.clone()


def test_any_store_does_and_is_saved(tmp_path):
    whole, streamed = model_of("llama"), model_of("llama")
    store = emptied(streamed, Ram(block_layouts(streamed)))
    ours = Zo2(streamed, store=store)
    assert steps(streamed, ours, 3) == steps(whole, Mezo(whole), 3)
    ours.settle()
    store.save(tmp_path / "kept")
    kept = dict(store.held)
    steps(streamed, ours, 1)
    ours.settle()
    assert not torch.equal(store.get("model.layers.1.mlp.up_proj.weight"), kept["model.layers.1.mlp.up_proj.weight"])
    store.load(tmp_path / "kept")
    assert all(torch.equal(store.get(name), value) for name, value in kept.items())


def test_memory_holds_two_blocks_as_predicted(tmp_path):
    config = config_of("llama")
    config.num_hidden_layers = 5
    shape, workload, rule = ModelShape.from_config(config, torch.float32), Finetune(batch=2, tokens=32), Zo2Rule()
    model = shape.build("cpu")
    optimizer = rule.optimizer(model, lr=1e-3, folder=tmp_path)
    ids = torch.randint(3, 256, (2, 32))
    with Tracker(samples=None) as tracker:
        tracker.register(model, optimizer)
        tracker.note()
        for _ in range(2):
            optimizer.step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
        measured = tracker.ledger()
    simulated = simulate(shape, workload, (rule,))
    plain = baseline(shape, workload)
    predicted = rule.predict(plain, shape, workload)
    blocks = [p.nbytes for p in shape.parameters if p.block]
    held = shape.weight_bytes - sum(blocks) + 2 * sum(blocks) // 5
    assert held <= measured.peak_of(Account.WEIGHTS) <= held + 2048
    assert measured.peak_bytes() < 0.8 * shape.weight_bytes
    assert 0.98 <= simulated.peak_bytes() / measured.peak_bytes() <= 1.02
    assert simulated.peak_bytes() <= predicted.peak_bytes()
    assert simulated.peak_bytes(Tier.DISK) == predicted.peak_bytes(Tier.DISK) == sum(blocks)
    for name in {p.block for p in shape.parameters if p.block}:
        assert set(load_file(tmp_path / f"{name}.safetensors")) == {p.name for p in shape.parameters if p.block == name}


def test_between_steps_the_model_runs_with_the_weights_of_the_step(tmp_path):
    whole, streamed = model_of("llama"), model_of("llama")
    ours, plain = Zo2(streamed, folder=tmp_path), Mezo(whole)
    for _ in range(3):
        steps(whole, plain, 1)
        steps(streamed, ours, 1)
        with torch.no_grad():
            assert torch.equal(streamed(input_ids=IDS).logits, whole(input_ids=IDS).logits)
    # Two of the four blocks, of nine parameters each, are away.
    assert sum(bool(p.isnan().all()) for p in streamed.parameters()) == 2 * 9
    with pytest.raises(CompositionError, match="no gradients"):
        streamed(input_ids=IDS, labels=IDS)


@pytest.mark.parametrize("calls", [1, 2, 3, 4])
def test_weights_return_when_a_closure_raises(tmp_path, calls):
    model, before = model_of("llama"), model_of("llama")
    optimizer = Zo2(model.train(), lr=1e-3, folder=tmp_path)
    left = [calls]

    def closure() -> float:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return closure_of(model)()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert optimizer.steps == 0
    assert model.training
    optimizer.bring_back()
    assert furthest(model, before) < 1e-6


def test_the_training_loop_resumes_it_bit_for_bit(tmp_path: Path):
    data = PackedText(np.random.default_rng(0).integers(3, 256, 500), sequence_tokens=16, sequences=2, steps=5, seed=1)

    def run(name: str, **settings: object) -> nn.Module:
        model = model_of("llama")
        optimizer = Zo2(model, lr=1e-3, folder=tmp_path / name)
        checkpoints = TrainSettings(progress=False, checkpoints=tmp_path / "run", checkpoint_every=2)
        train(model, data, optimizer, lambda step: 1 / (1 + step), checkpoints, **settings)
        optimizer.bring_back()
        return model

    def stop(done: int, row: dict[str, float]) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("first", on_step=stop)
    assert len(list((tmp_path / "run" / "step-00000002" / "streamed").iterdir())) == 4
    parted = run("second")
    whole = model_of("llama")
    train(whole, data, Mezo(whole, lr=1e-3), lambda step: 1 / (1 + step), TrainSettings(progress=False))
    assert furthest(whole, parted) == 0


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path):
    model, before = model_of("llama"), model_of("llama")
    optimizer = Zo2(model, lr=1e-3, folder=tmp_path, nonfinite="skip")
    optimizer.step(lambda: closure_of(model)() * float("nan"))
    optimizer.bring_back()
    assert furthest(model, before) < 1e-6


def test_refusals(tmp_path):
    model = model_of("llama")
    with pytest.raises(CompositionError, match="needs the model"):
        Zo2(model.parameters())
    with pytest.raises(UnsupportedModel, match="one row"):
        Zo2(tiny_model("t5"), folder=tmp_path)
    shared = Toy()
    shared.blocks[1].weight = shared.blocks[0].weight
    with pytest.raises(UnsupportedModel, match="of their own"):
        Zo2(shared, folder=tmp_path)
    optimizer = Zo2(model, folder=tmp_path)
    with pytest.raises(CompositionError, match="a part"):
        optimizer.step(lambda: model.model(input_ids=IDS).last_hidden_state.sum())
    with pytest.raises(CompositionError, match="elsewhere"):
        Zo2(model)
    optimizer.bring_back()
    assert steps(model, Zo2(model), 1)


@pytest.mark.parametrize("other", ["lora", "rtn", "adamw-8bit", "gradient-release", "sublinear-checkpointing"])
def test_what_changes_weights_or_gradients_is_refused_beside_it(other):
    with pytest.raises(CompositionError, match="zo2"):
        check((Zo2Rule(), techniques()[other]()), "finetune")


class Leaky(nn.Module):
    """A block that hands on two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x @ self.weight, x


def test_blocks_that_hand_on_more_than_hidden_states_are_refused():
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Leaky() for _ in range(3))

        def forward(self, x: torch.Tensor) -> SimpleNamespace:
            for block in self.blocks:
                x, more = block(x)
                x = x + more
            return SimpleNamespace(loss=x.square().mean())

    chain = Chain()
    with pytest.raises(UnsupportedModel, match="more than hidden states"):
        Zo2(chain).step(lambda: chain(torch.ones(2, 3, dtype=torch.float64)).loss)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_beside_a_gpu_the_blocks_are_in_host_memory():
    whole, streamed = model_of("llama").to("cuda"), model_of("llama")
    ids = IDS.to("cuda")
    ours, plain = Zo2(streamed, lr=1e-3, device="cuda"), Mezo(whole, lr=1e-3)
    for _ in range(5):
        losses = [
            float(optimizer.step(lambda m=model: m(input_ids=ids, labels=ids, use_cache=False).loss))
            for model, optimizer in ((whole, plain), (streamed, ours))
        ]
        assert losses[0] == losses[1]
    ours.bring_back()
    assert furthest(whole, streamed) == 0
