"""A process that is to end without the destructors of its libraries."""

from __future__ import annotations

import subprocess
import sys

import pytest

# What a library's destructor is to the C library: a function registered for the end.
DESTRUCTOR = "import ctypes; ctypes.CDLL(None).on_exit(ctypes.CDLL(None).abort, None); "
WITHOUT = "from cluster.machine.program_end import end_without_destructors as end; end(); "
OTHERS = "import atexit; atexit.register(print, 'python has ended'); "


@pytest.mark.skipif(sys.platform != "linux", reason="on_exit is a function of glibc")
@pytest.mark.parametrize("code", [0, 3])
def test_the_exit_code_and_the_output_are_kept(code: int) -> None:
    program = f"{DESTRUCTOR}{WITHOUT}{OTHERS}import sys; print('done'); sys.exit({code})"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (code, "done\npython has ended\n"), ended.stderr
