"""The merge job and its command, and generating for a task of what they wrote."""

import json

import pytest
import torch
from typer.testing import CliRunner

import pintpot
from pintpot.cli.app import app
from pintpot.core.errors import CompositionError, UnsupportedModel
from pintpot.core.ledger import Account
from pintpot.jobs.choose import Wish
from pintpot.jobs.generate import generate
from pintpot.jobs.generator import GenerateSettings
from pintpot.jobs.merge import merge
from pintpot.weights import load_compressed, route_, tasks_of
from pintpot.weights.merging import Tuned
from tests.folders import byte_tokenizer, same_weights, weights, write_model
from tests.tuned import TEXTS, write_tuned

runner = CliRunner()
PLAIN = Wish(techniques="none")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return write_tuned(tmp_path_factory.mktemp("tuned"), steps=12, hidden_size=256, intermediate_size=512)


@pytest.fixture(scope="module")
def merged(tuned, tmp_path_factory):
    return merge(tuned["base"], {task: tuned[task] for task in TEXTS}, tmp_path_factory.mktemp("merged") / "out")


def run(*arguments: object):
    return runner.invoke(app, [str(a) for a in arguments])


def test_says_what_it_did(merged):
    assert pintpot.merge is merge
    record = merged.to_dict()
    assert record["tasks"] == list(TEXTS)
    assert record["technique"] == "1bit-merging"
    assert record["output_bytes"] < 0.4 * record["source_bytes"]
    own = record["output_bytes"] - record["shared_bytes"]
    assert record["shared_bytes"] == record["source_bytes"] // 4
    assert 0.08 < own / record["shared_bytes"] < 3 / 32
    assert json.dumps(record)


def test_merging_takes_the_memory_of_a_few_parameters(tuned, tmp_path):
    with pintpot.measure() as run:
        merge(tuned["base"], {task: tuned[task] for task in TEXTS}, tmp_path / "out")
    largest = max(tensor.nbytes for tensor in weights(tuned["base"]).values())
    # One of each model, and while its vectors are made the shared numbers twice, a difference, and codes.
    assert run.ledger.peak_bytes() < (1 + len(TEXTS) + 5) * largest


@pytest.mark.parametrize("task", [None, "words"])
def test_memory_of_generating_is_predicted_for_a_task_and_without_one(merged, task):
    settings = GenerateSettings(new_tokens=4, stop_at_end=False, task=task)
    done = generate(merged.folder, TEXTS["words"], settings=settings, wish=PLAIN, measure=True)
    predicted, measured = done.plan.predicted, done.measured
    assert predicted.peak_of(Account.WEIGHTS) == measured.peak_of(Account.WEIGHTS)
    assert predicted.peak_bytes() == pytest.approx(measured.peak_bytes(), rel=0.03)


def test_what_is_generated_is_that_tasks(merged, tuned):
    texts = {}
    for task in ("letters", "words"):
        settings = GenerateSettings(new_tokens=8, stop_at_end=False, task=task)
        done = generate(merged.folder, TEXTS["words"], settings=settings, wish=PLAIN)
        texts[task] = done.completions[0].tokens
    model = load_compressed(merged.folder)
    ids = torch.tensor([byte_tokenizer()(TEXTS["words"])["input_ids"]])
    for task in texts:
        route_(model, task)
        with torch.no_grad():
            new = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert tuple(new[0, ids.shape[1] :].tolist()) == texts[task]
    assert len(set(texts.values())) > 1


def test_command_line(tuned, merged, tmp_path):
    out = tmp_path / "out"
    models = (f"first={tuned['letters']}", tuned["numbers"], f"third={tuned['words']}")
    places = ("--modules", "mlp", "--modules", "first=attention")
    done = run("merge", tuned["base"], *models, out, *places, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tasks"] == ["first", "numbers", "third"]
    assert set(tasks_of(load_compressed(out))) == {"first", "numbers", "third"}
    same = [Tuned("first", tuned["letters"], "attention")]
    same += [Tuned(name, tuned[task], "mlp") for name, task in (("numbers", "numbers"), ("third", "words"))]
    merge(tuned["base"], same, tmp_path / "same")
    assert same_weights(out, tmp_path / "same")

    shown = run("generate", out, "-p", "abc", "-n", 2, "-q", "--techniques", "none", "--task", "third")
    assert shown.exit_code == 0, shown.output
    assert run("check", out).exit_code == 0
    made = run("merge", tuned["base"], tuned["words"], tmp_path / "table", "-q")
    assert "words" in made.stdout
    assert made.exit_code == 0


def test_refusals_come_before_anything_is_written(tuned, merged, tmp_path):
    other = write_model(tmp_path / "gpt2", "gpt2")
    words = tuned["words"]
    cases = [
        (("merge", tuned["base"], words, other, tmp_path / "out"), "model_type is 'gpt2', not 'llama'"),
        (("merge", tuned["base"], words, words, tmp_path / "out"), "two tasks have one name"),
        (("merge", tuned["base"], words, tmp_path / "out", "--modules", "sums=mlp"), "no task called sums"),
        (("merge", tuned["base"], words, tmp_path / "out", "--modules", "heads"), "not in 'heads'"),
        (("merge", tuned["base"], words, merged.folder), "already exists"),
        (("generate", merged.folder, "-p", "a", "--task", "sums"), "no task called sums"),
        (("generate", words, "-p", "a", "--task", "sums"), "no tasks to choose from"),
        (("compress", words, tmp_path / "out", "--techniques", "1bit-merging"), "does not serve compress"),
    ]
    for arguments, says in cases:
        done = run(*arguments)
        assert done.exit_code == 2
        assert says in " ".join(done.stderr.split())
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
    with pytest.raises(CompositionError, match="does not serve merge"):
        merge(tuned["base"], {"a": words}, tmp_path / "out", technique="rtn4")


def test_another_vocabulary_is_refused_and_a_token_is_named(tuned, tmp_path):
    changed = write_model(tmp_path / "changed", hidden_size=256, intermediate_size=512)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(changed)
    with pytest.raises(UnsupportedModel, match="'<new>' is 257, not None"):
        merge(tuned["base"], {"changed": changed}, tmp_path / "out")
    without = write_model(tmp_path / "without", hidden_size=256, intermediate_size=512, tokenizer=False)
    assert merge(tuned["base"], {"without": without}, tmp_path / "out").tasks == ("without",)
