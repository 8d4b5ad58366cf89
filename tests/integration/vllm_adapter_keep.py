"""As vllm_adapter_checks.py, with ``kv_on_swap = "keep"`` and another model."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import vllm_adapter_checks

if __name__ == "__main__":
    vllm_adapter_checks.main("keep", "llama-untied")
