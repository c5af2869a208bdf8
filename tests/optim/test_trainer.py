"""The optimizers in transformers' Trainer, and on parameters that are sharded over processes."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from pintpot.optim import Apollo, GaLore, Lisa, projected_groups
from tests.architectures import tiny_model

ROWS = [{"input_ids": torch.arange(3, 19) + i % 2, "labels": torch.arange(3, 19) + i % 2} for i in range(16)]


def train(tmp_path, model, optimizer) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=8,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=ROWS, optimizer_cls_and_kwargs=optimizer)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("kind", [GaLore, Apollo])
def test_a_class_and_its_arguments(tmp_path, kind):
    model = tiny_model("llama")
    settings = {"params": projected_groups(model), "lr": 1e-2, "rank": 4, "update_gap": 3}
    losses = train(tmp_path, model, (kind, settings))
    assert losses[-1] < 0.7 * losses[0]


def test_a_selection_by_a_factory_that_is_given_the_model(tmp_path):
    class Factory:
        def __call__(self, model, **settings):
            return Lisa(model, **settings)

    model = tiny_model("llama")
    losses = train(tmp_path, model, (Factory, {"lr": 1e-2, "active_blocks": 1, "interval_steps": 3}))
    assert losses[-1] < 0.7 * losses[0]
