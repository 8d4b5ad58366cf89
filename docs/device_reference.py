"""Writes docs/devices.md from `cluster/contracts/devices.py`: `python docs/device_reference.py`.

The test in tests/unit/cluster/contracts/test_devices.py fails when the page is not what this makes.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster.contracts.devices import as_markdown

PAGE = Path(__file__).with_name("devices.md")
HEAD = """# What depends on the device

Accord runs on CPUs and on GPUs with the same code. This page lists every choice that depends on the
kind of device, the two choices side by side, and the reason. `docs/device_reference.py` makes the
page from `cluster/contracts/devices.py`, which is where the code takes the choices from.

**The CPU column is run on every change. The CUDA column ran once on one H100**, as far as
[On a GPU](results.md#on-a-gpu) says. The rest of it has been read, not run:
[what has been checked without a GPU](decisions/0005-what-was-checked-without-a-gpu.md).

"""


def page() -> str:
    return HEAD + as_markdown()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
