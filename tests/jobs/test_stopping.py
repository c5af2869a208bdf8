"""Ctrl-C as a request that is not lost."""

import os
import signal

import pytest

from pintpot.core.errors import Interrupted
from pintpot.jobs.generator import Completion
from pintpot.jobs.prompt_files import PromptLine, complete_file
from pintpot.jobs.stopping import stop_requests


class Swallows:
    """Python ignores what is raised while an object is being deleted."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_swallowed_still_stops_the_job(tmp_path):
    lines = [PromptLine({"prompt": str(i)}, str(i)) for i in range(5)]
    asked = []

    def complete(prompts):
        asked.append(prompts)
        if len(asked) == 2:
            Swallows()
        return [Completion(tokens=(1,), text="x", prompt_tokens=1, ended=True) for _ in prompts]

    out = tmp_path / "out.jsonl"
    with pytest.raises(Interrupted, match="after 2 of 5"):
        complete_file(lines, out, complete)
    assert (tmp_path / "out.jsonl.partial").read_text().count("\n") == 2
    complete_file(lines, out, complete)
    assert out.read_text().count("\n") == 5


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT)
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt), stop_requests(at_once=True):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
