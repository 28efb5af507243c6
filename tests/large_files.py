"""Files that need more memory than there is, and processes with little memory."""

import struct
import subprocess
import sys
from pathlib import Path


def huge_gif(path: Path, side: int = 11500, frames: int = 1) -> Path:
    """Write a few bytes that claim to be a picture of `side` times `side` pixels; return the path."""
    screen = b"GIF89a" + struct.pack("<HH", side, side) + b"\x80\0\0" + b"\xff\0\0\0\xff\0"
    dot = b"\x21\xf9\x04\0\0\0\0\0\x2c" + struct.pack("<HHHH", 0, 0, 1, 1) + b"\0\x02\x02\x44\x01\0"
    path.write_bytes(screen + dot * frames + b"\x3b")
    return path


def run_within(gigabytes: float, code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a process that is limited to this amount of memory."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({int(gigabytes * 2**30)},) * 2)\n"
    command = [sys.executable, "-c", limit + code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
