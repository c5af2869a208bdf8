"""The machine's rates: arithmetic between measured points, and the file that keeps them."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from pintpot.ledger import machine as subject
from pintpot.ledger import machine_rates
from pintpot.ledger.machine import Machine, from_dict, machine

RATES = {"1": 1e9, "8": 4e9, "64": 16e9, "512": 64e9}
MADE_UP = Machine(
    host="here",
    kind="cpu",
    device="made up",
    threads=1,
    memory_bytes=1 << 30,
    disk_free_bytes=1 << 30,
    read_bytes_per_second=1e10,
    single_read_bytes_per_second=1e10,
    fresh_bytes_per_second=2e9,
    matmul_flops={"float32": RATES, "bfloat16": {"1": 5e8}},
    matmul_bytes_per_second={"float32": {"1": 8e9, "8": 2e9}},
    matmul_dot_seconds={"float32": {"1": 1e-7, "8": 4e-7}},
    small_op_seconds=1e-5,
    disk_read_bytes_per_second=1e8,
    disk_write_bytes_per_second=5e7,
    versions={"torch": "0"},
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PINTPOT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Counted:
    """Measures nothing: gives the made-up machine, and counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Machine:
        self.calls += 1
        return MADE_UP


def test_rates_between_measured_rows():
    assert MADE_UP.product_flops("float32", 8) == pytest.approx(4e9)
    assert MADE_UP.product_flops("float32", 22) == pytest.approx(8e9, rel=0.05)
    assert MADE_UP.product_flops("float32", 100_000) == pytest.approx(64e9)
    assert MADE_UP.product_flops("bfloat16", 512) == pytest.approx(5e8)
    assert MADE_UP.product_flops("float64", 1) == pytest.approx(1e9)


def test_each_row_of_a_matrix_takes_its_time_where_rows_are_few():
    assert MADE_UP.dot_seconds("float32", 1) == pytest.approx(1e-7)
    assert MADE_UP.dot_seconds("bfloat16", 8) == pytest.approx(4e-7)
    assert MADE_UP.dot_seconds("float32", 9) == 0.0


def test_few_rows_stream_at_their_own_rate_and_many_at_the_memorys():
    assert MADE_UP.product_bytes_per_second("float32", 1) == pytest.approx(8e9)
    assert MADE_UP.product_bytes_per_second("float32", 8) == pytest.approx(2e9)
    assert MADE_UP.product_bytes_per_second("float32", 64) == 1e10


def test_measured_once_and_kept(cache):
    measure = Counted()
    assert machine(measure=measure) == MADE_UP
    assert machine(measure=measure) == MADE_UP
    assert measure.calls == 1
    assert [file.suffix for file in cache.iterdir()] == [".json"]


@pytest.mark.usefixtures("cache")
def test_refresh_measures_again():
    measure = Counted()
    machine(measure=measure)
    machine(refresh=True, measure=measure)
    assert measure.calls == 2


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", json.dumps({**asdict(MADE_UP), "read_bytes_per_second": -1}), b"\xff\xfe".decode("latin-1")],
)
def test_corrupt_file_is_measured_again(cache, content):
    measure = Counted()
    machine(measure=measure)
    (file,) = cache.iterdir()
    file.write_text(content, encoding="latin-1")
    assert machine(measure=measure) == MADE_UP
    assert measure.calls == 2
    assert from_dict(json.loads(file.read_text())) == MADE_UP


def test_each_number_of_threads_has_its_own_file(cache):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        machine(measure=Counted())
        torch.set_num_threads(2)
        machine(measure=Counted())
    finally:
        torch.set_num_threads(before)
    assert len(list(cache.iterdir())) == 2


def test_interrupted_measurement_leaves_no_file(cache):
    def stopped() -> Machine:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        machine(measure=stopped)
    assert list(cache.iterdir()) == []


def test_folder_that_cannot_be_made_falls_back_to_temporary_files(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("PINTPOT_CACHE", str(blocked / "below"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert subject.cache_folder().parent == tmp_path


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("PINTPOT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert subject.cache_folder() == tmp_path / "pintpot"


@pytest.mark.parametrize(
    "change", [{"kind": 3}, {"matmul_flops": {}}, {"threads": 1.5}, {"small_op_seconds": float("nan")}]
)
def test_records_with_wrong_values_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        from_dict(asdict(replace(MADE_UP, **change)))


def test_measuring_this_machine(cache, monkeypatch):
    monkeypatch.setattr(machine_rates, "_REPEAT_SECONDS", 0.01)
    monkeypatch.setattr(machine_rates, "DTYPES", machine_rates.DTYPES[:1])
    monkeypatch.setattr(machine_rates, "_LARGE_BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})
    monkeypatch.setattr(machine_rates, "_MEDIUM", {"cpu": 512, "cuda": 512})
    told = []
    record = machine_rates.measure_machine(lambda what, done: told.append(done))
    assert from_dict(json.loads(json.dumps(asdict(record)))) == record
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert record.product_flops("float32", 512) > 0
    assert 1e-7 < record.small_op_seconds < 1e-2
    assert list(cache.iterdir()) == []
