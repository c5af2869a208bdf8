"""The whole optimizer benchmark: pretraining, its picture, fine-tuning, and a layer's update.

Run with ``python -m benchmarks.optim`` (or ``make bench-optim``); run again it goes on where it stopped. Each part has
a command of its own, with options.
"""

from __future__ import annotations

import subprocess
import sys

PARTS = ("optim_pretraining", "optim_picture", "optim_finetuning", "optim_layer")


def main() -> int:
    """Run the parts one after another, each in a process of its own; stop at the first that fails."""
    for part in PARTS:
        print(f"==> benchmarks.{part}", flush=True)
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{part}"], check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
