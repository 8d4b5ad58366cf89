"""Intel's AMX registers, which Linux gives only to a process that has asked for them."""

from __future__ import annotations

import torch


def ask_for_amx() -> None:
    """Ask for them, for all threads of this process; where they are refused, vLLM is told that this
    processor has none.

    vLLM's attention in bfloat16 uses AMX without asking. It relies on a library of matrix products
    that asks when it is first used; a small model never uses that library, and the process would
    end with an illegal instruction.
    """
    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        torch.cpu._is_amx_tile_supported = _not_supported


def _not_supported() -> bool:
    return False
