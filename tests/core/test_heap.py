"""Memory that was freed leaves the process."""

import platform
import subprocess
import sys

import pytest

CODE = """
import sys
import torch
from pintpot.core.heap import give_back, return_freed_memory
def resident():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
returns = len(sys.argv) > 1
assert not returns or return_freed_memory()
sizes = [5 << 20, 9 << 20, 15 << 20]
for _ in range(3):
    torch.ones(64 << 20, dtype=torch.uint8)
before = resident()
held = []
for turn in range(48):
    passing = [torch.ones(size + 8192 * turn, dtype=torch.uint8) for size in sizes for _ in range(3)]
    if turn % 6 == 0:
        held.append(passing.pop(turn % 9))
    passing.clear()
    give_back()
print(resident() - before, sum(t.nbytes for t in held))
"""


def grown(*arguments: str) -> tuple[int, int]:
    """By how much a process has grown, and what it holds."""
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=True)
    resident, live = map(int, done.stdout.split())
    return resident, live


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of the GNU C library")
def test_a_process_holds_little_more_than_its_tensors():
    resident, live = grown("return")
    assert resident < live + (68 << 20)
    assert grown()[0] > resident + (16 << 20)
