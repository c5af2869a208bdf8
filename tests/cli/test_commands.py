"""The commands on a tiny model: what they print, what they write, and stopping them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from pintpot.cli.app import app
from tests.folders import texts, write_lines, write_model

runner = CliRunner()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "llama")


def run(*arguments: object):
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result


def test_plan_then_generate_with_it(tmp_path, llama):
    plan = tmp_path / "plan.yaml"
    sizes = ("--prompt-tokens", 40, "--new-tokens", 4)
    made = run("plan", llama, *sizes, "--techniques", "rtn(bits=8, group_size=32)", "--cache", "kivi4", "-o", plan)
    assert "rtn" in made.stdout
    assert "pintpot generate" in made.stderr
    record = json.loads(run("generate", llama, "-p", "x" * 40, "-n", 4, "--plan", plan, "--json").stdout)
    assert record["techniques"] == ["rtn(bits=8, group_size=32)", "kivi(bits=4)"] or len(record["techniques"]) == 2
    assert len(record["completions"]) == 1
    assert record["ledger"]["peaks"]["predicted"]["device"]["total_bytes"] > 0


def test_text_goes_to_standard_output_and_remarks_do_not(llama):
    result = run("generate", llama, "-p", "abc", "-n", 3, "--techniques", "none")
    assert "tokens/s" in result.stderr
    assert "tokens/s" not in result.stdout
    assert run("generate", llama, "-p", "abc", "-n", 3, "--techniques", "none", "-q").stderr == ""


def test_the_seed_decides_sampled_text(llama):
    options = ("-n", 8, "--temperature", 2.0, "--techniques", "none", "-q")
    first, again, other = (run("generate", llama, "-p", "abc", *options, "--seed", s).stdout for s in (1, 1, 2))
    assert first == again != other


def test_ledger_draws_and_compares(tmp_path, llama):
    png, html = tmp_path / "a.png", tmp_path / "a.html"
    sizes = ("--job", "finetune", "--batch", 2, "--tokens", 16)
    result = run("ledger", llama, *sizes, "--techniques", "lora", "--png", png, "--html", html, "--json")
    peaks = json.loads(result.stdout)["peaks"]
    ratio = peaks["predicted"]["device"]["total_bytes"] / peaks["measured"]["device"]["total_bytes"]
    assert 0.97 < ratio < 1.05
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in html.read_text()


def test_compress_then_generate(tmp_path, llama):
    out = tmp_path / "small"
    record = json.loads(run("compress", llama, out, "--techniques", "rtn(bits=4, group_size=32)", "--json").stdout)
    assert record["output_bytes"] < record["source_bytes"]
    assert run("generate", out, "-p", "abc", "-n", 2, "-q", "--techniques", "none").stdout


def test_finetune_says_what_it_gave(tmp_path, llama):
    data = write_lines(tmp_path / "data.jsonl", texts(12))
    sizes = ("--tokens", 16, "--steps", 2, "--techniques", "lora")
    result = run("finetune", llama, "--data", data, "-o", tmp_path / "out", *sizes, "--json")
    figures = json.loads(result.stdout)["figures"]
    assert figures["steps"] == 2
    assert figures["held_out_loss_after"] > 0


def test_pretrain_makes_a_model_of_a_configuration_and_text(tmp_path, llama):
    data = write_lines(tmp_path / "data.jsonl", texts(12))
    options = ("--tokens", 16, "--steps", 2, "--techniques", "adamw-8bit")
    result = run("pretrain", llama / "config.json", data, tmp_path / "out", *options, "--json")
    figures = json.loads(result.stdout)["figures"]
    assert figures["steps"] == 2
    assert figures["techniques"] == "adamw-8bit"
    assert run("generate", tmp_path / "out", "-p", "abc", "-n", 2, "-q", "--techniques", "none").stdout


def test_pretrain_says_what_goes_with_a_configuration_and_what_with_a_recipe(tmp_path, llama):
    cases = [
        ((llama, tmp_path / "out"), "text to train"),
        ((tmp_path / "a.yaml", tmp_path / "out"), "cannot read the recipe"),
        ((tmp_path / "a.yaml", tmp_path / "out", "--batch", 2, "--lr", 0.1), "--batch, --learning-rate cannot"),
        ((tmp_path / "a.yaml", tmp_path / "data", tmp_path / "out"), "DATA cannot"),
    ]
    for arguments, says in cases:
        result = runner.invoke(app, ["pretrain", *map(str, arguments)])
        assert result.exit_code == 2
        assert says in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_sizes_of_another_job_are_refused(llama):
    result = runner.invoke(app, ["plan", str(llama), "--job", "generate", "--steps", "3"])
    assert result.exit_code == 2
    assert "generate has no size called steps" in result.stderr


def test_no_prompt_and_two_prompts_are_refused(tmp_path, llama):
    for options in ([], ["-p", "a", "--prompt-file", str(tmp_path / "x")], ["--prompts", str(tmp_path / "x")]):
        result = runner.invoke(app, ["generate", str(llama), *options])
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")


def test_control_c_keeps_what_is_done_and_says_how_to_go_on(tmp_path, llama):
    prompts = write_lines(tmp_path / "in.jsonl", [{"prompt": f"{i:03d}"} for i in range(400)])
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    options = ["-n", "8", "--techniques", "none", "-q"]
    command = [str(a) for a in ("generate", llama, "--prompts", prompts, "--out", out, *options)]
    with subprocess.Popen(
        [sys.executable, "-m", "pintpot.cli", *command], stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 200
        while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "run the same command again" in said
    assert "Traceback" not in said
    done = partial.read_text().count("\n")
    assert 0 < done < 400
    run(*command)
    assert [json.loads(line)["prompt"] for line in out.read_text().splitlines()] == [f"{i:03d}" for i in range(400)]
