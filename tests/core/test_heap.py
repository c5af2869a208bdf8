"""Memory that was freed leaves the process."""

import platform
import subprocess
import sys

import pytest

CODE = """
import torch
from pintpot.core.heap import return_freed_memory
def resident():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
assert return_freed_memory()
sizes = [1 << 20, 3 << 20, 5 << 20]
for _ in range(3):
    torch.ones(8 << 20, dtype=torch.uint8)
before = resident()
held = []
for turn in range(120):
    passing = [torch.ones(size + 4096 * turn, dtype=torch.uint8) for size in sizes]
    if turn % 12 == 0:
        held.append(passing.pop(turn // 12 % 3))
print(resident() - before, sum(t.nbytes for t in held) + sum(t.nbytes for t in passing))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of the GNU C library")
def test_a_process_holds_little_more_than_its_tensors():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    grown, live = map(int, done.stdout.split())
    assert grown < live + (4 << 20)
