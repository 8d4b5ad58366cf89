"""Objects of a Python session as bytes that another process can load."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from cluster.contracts.errors import UserError


def pickled(value: Any, what: str) -> bytes:
    """``value`` with its code: what is defined in the session or in a module of the user's own goes
    by value, so that a notebook's cell or an edited file arrives as it is now.

    Raises UserError naming ``what`` when something it holds cannot be sent.
    """
    from ray import cloudpickle

    home = _own_module(value)
    if home is not None:
        cloudpickle.register_pickle_by_value(home)
    try:
        data: bytes = cloudpickle.dumps(value)
    except Exception as error:  # pickling runs the methods of any object it meets
        raise UserError(
            f"cannot be sent to another process: {type(error).__name__}: {error}",
            where=what,
            fix="let it open files, locks, connections and models inside the function, or give "
            '"file.py:function"',
        ) from error
    finally:
        if home is not None:
            cloudpickle.unregister_pickle_by_value(home)
    return data


def _own_module(value: Any) -> ModuleType | None:
    """The module of the user's that defines ``value`` (None for __main__ and installed ones)."""
    name = getattr(value, "__module__", None)  # of an object: its class's
    module = sys.modules.get(name) if isinstance(name, str) and name != "__main__" else None
    file = getattr(module, "__file__", None)
    if module is None or file is None:
        return None
    installed = {Path(sysconfig.get_path(key)) for key in ("stdlib", "purelib", "platlib")}
    return None if installed & set(Path(file).parents) else module
