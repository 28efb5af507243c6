"""A real browser, which renders pages for the tests."""

import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=3000"
)


def visible(html: str) -> str:
    """Return the visible text of a page, with one space between words."""
    body = re.sub(r"<(style|script)\b.*?</\1>", " ", html, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def render(page: Path, profile: Path, width: int = 1280) -> tuple[str, str]:
    """Return the page's DOM after its scripts ran, and what the browser wrote to standard error.

    Args:
        page: the HTML file.
        profile: the folder for the browser's own files; it is empty or does not exist.
        width: the width of the window in CSS pixels.
    """
    command = [str(CHROMIUM), *_FLAGS.split(), "--dump-dom", f"--window-size={width},900"]
    command += [f"--user-data-dir={profile}", page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return result.stdout, result.stderr


def printed(page: Path, profile: Path) -> bytes:
    """Return the page as a PDF."""
    pdf = page.with_suffix(".pdf")
    command = [str(CHROMIUM), *_FLAGS.split(), f"--print-to-pdf={pdf}", f"--user-data-dir={profile}", page.as_uri()]
    subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return pdf.read_bytes()
