"""What a process reports about its own memory."""

from __future__ import annotations

import subprocess
import sys

from mergec.runtime.core.memory import peak_bytes

SIZE = 300 << 20


def test_a_peak_is_remembered_and_not_inherited() -> None:
    before = peak_bytes()
    held = bytearray(b"x") * (before + SIZE)
    assert peak_bytes() >= before + SIZE
    del held
    assert peak_bytes() >= before + SIZE
    code = "from mergec.runtime.core.memory import peak_bytes; print(peak_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(child.stdout) < SIZE
