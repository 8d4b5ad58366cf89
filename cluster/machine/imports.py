"""Importing large libraries in a process of a role, without what no role needs."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


@contextmanager
def quick_imports(*, scipy: bool = True) -> Iterator[None]:
    """Imports within take about a quarter less time; for processes that Accord starts itself.

    The garbage collector rests while a few hundred thousand objects of modules come to life, and
    never looks at them again.

    ``transformers`` is imported first, with scipy out of its sight: it would load that for losses
    of object detection, which takes 0.6 s. With ``scipy=False`` it stays so for all that is
    imported within: vLLM would load it for sounds. Afterwards it can be imported as usual.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    quiet_torchao()
    try:
        with _without_scipy():
            import transformers.modeling_utils  # noqa: F401
        with nullcontext() if scipy else _without_scipy():
            yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def _without_scipy() -> AbstractContextManager[None]:
    """Unless transformers has found it already, which asks once."""
    return nullcontext() if _asked("scipy") else hidden("scipy")


def _asked(library: str) -> bool:
    """Whether transformers was told that the library is there."""
    found = sys.modules.get("transformers.utils.import_utils")
    return found is not None and bool(getattr(found, f"is_{library}_available")())


def quiet_torchao() -> None:
    """``transformers`` imports it, and it warns of kernels that were made for other machines."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def hidden(module: str) -> Iterator[None]:
    """As if a library were not installed, unless it has been imported already: for what others
    import if they find it, and use for what no role does."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
