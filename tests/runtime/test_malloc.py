"""Whether a process keeps freed memory, measured by its resident memory."""

import subprocess
import sys

import pytest

_PROGRAM = """
import sys
import torch
from pathlib import Path
from frostline.runtime.malloc import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

kept = sys.argv[1] == "keep" and keep_freed_memory()
before = resident()
tensor = torch.ones(100 * 2**20 // 4)
del tensor
print(kept, (resident() - before) > 90 * 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("how", "said"), [("keep", "True True"), ("leave", "False False")])
def test_freed_memory_stays_where_asked(how: str, said: str) -> None:
    run = subprocess.run([sys.executable, "-c", _PROGRAM, how], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == said
