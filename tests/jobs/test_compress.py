"""The compress job as a user runs it: to a size, on texts of one's own, and by training."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pintpot import reference
from pintpot.core.errors import BudgetError, CompositionError, DataError
from pintpot.core.model_folder import open_model
from pintpot.jobs.calibration_texts import CalibrationSettings, calibration_texts
from pintpot.jobs.compress import compress, sized_layout, smallest_risk
from pintpot.weights.allocation import Choice, allocate
from pintpot.weights.formats import Dense, Grid
from pintpot.weights.gptq import GPTQ
from pintpot.weights.rtn import RTN
from tests.architectures import tiny_model

FEW = CalibrationSettings(samples=8, tokens=64)


def stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("technique", ["rtn", "gptq"])
def test_comes_within_a_hundredth_under_a_size(technique, tmp_path: Path):
    limit = 1_500_000
    done = compress(reference.path(), tmp_path / "out", techniques=technique, size=limit, calibration=FEW)
    assert 0.99 * limit < done.output_bytes <= limit
    assert stored_bytes(tmp_path / "out") < limit + 64_000
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    formats = {module.formats for module in model.modules() if hasattr(module, "formats")}
    assert len(formats) > 1
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("import os\n", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()


def test_allocation_is_the_best_there_is():
    """Against every combination of three parameters with three choices."""
    sizes, errors = (10, 20, 40), ((9.0, 5.0, 1.0), (3.0, 1.0, 0.5), (20.0, 2.0, 1.9))
    formats = (Grid(bits=2), Grid(bits=4), Grid(bits=8))
    choices = {
        str(row): [Choice((f,), size, error) for f, size, error in zip(formats, sizes, of, strict=True)]
        for row, of in enumerate(errors)
    }
    for budget in (30, 50, 70, 85, 120):
        found = allocate(choices, budget)
        picked = [next(c for c in choices[name] if c.formats == found[name]) for name in choices]
        every = [
            sum(c.error for c in combination)
            for combination in ((a, b, c) for a in choices["0"] for b in choices["1"] for c in choices["2"])
            if sum(c.nbytes for c in combination) <= budget
        ]
        assert sum(c.nbytes for c in picked) <= budget
        assert sum(c.error for c in picked) == pytest.approx(min(every), abs=0.02)


def test_what_the_budget_holds_dense_stays_dense():
    dense, small = Choice((), 100, 0.0), Choice((Dense(),), 50, 1.0)
    assert allocate({"a": [dense, small], "b": [dense, small]}, 150) in ({"a": (Dense(),)}, {"b": (Dense(),)})


def test_a_size_that_nothing_reaches_says_what_can_be_reached(tmp_path: Path):
    with pytest.raises(BudgetError, match="need at least") as error:
        compress(reference.path(), tmp_path / "out", techniques="rtn", size="100KiB")
    assert "larger size" in str(error.value.hint)
    assert not list(tmp_path.iterdir())


def test_without_a_technique_the_one_with_the_least_risk_is_taken():
    shape = open_model(reference.path(), match=False).shape()
    large, small = smallest_risk(shape, 3_000_000), smallest_risk(shape, 1_100_000)
    assert large.bits_a_weight(shape) > small.bits_a_weight(shape)
    with pytest.raises(BudgetError, match="no method makes"):
        smallest_risk(shape, 1000)


def test_methods_that_allocate_by_themselves_take_no_size():
    class Own(RTN):
        examines = True

    with pytest.raises(CompositionError, match="decides by itself"):
        sized_layout(reference.path(), Own(), 1_000_000)


def test_texts_are_those_of_the_seed_and_of_the_model(tmp_path: Path):
    folder = reference.path()
    one, again, other = (calibration_texts(folder, GPTQ(), FEW, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])
    assert sum(len(batch) for batch in one) == 8
    assert one[0].shape[1] == 64
    assert calibration_texts(folder, RTN()) == []
    own = tmp_path / "own.txt"
    own.write_text("a line of text that is not Python\n" * 400)
    words = calibration_texts(folder, GPTQ(), CalibrationSettings(data=own, samples=2, tokens=32))
    assert "not Python" in AutoTokenizer.from_pretrained(folder).decode(words[0][0])
    with pytest.raises(DataError):
        calibration_texts(folder, GPTQ(), CalibrationSettings(data=tmp_path / "nothing.txt"))


def test_a_folder_without_a_tokenizer_is_told(tmp_path: Path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(CompositionError, match="no tokenizer"):
        compress(tmp_path / "dense", tmp_path / "out", techniques="gptq")


def test_the_record_can_be_read_by_a_script(tmp_path: Path):
    done = compress(reference.path(), tmp_path / "out", techniques="gptq(bits=4, group_size=64)", calibration=FEW)
    record = json.loads(json.dumps(done.to_dict()))
    assert record["output_bytes"] < record["source_bytes"]
    assert record["technique"] == "gptq(group_size=64)"
