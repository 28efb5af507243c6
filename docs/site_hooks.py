"""Define hooks of mkdocs that add files outside `docs/` to the site if pages link to them.

Links are relative to the page (`../ARCHITECTURE.md`, `../benchmarks/results/step.json`), so that they also work in the
repository. `ARCHITECTURE.md` becomes a page; other files are copied unchanged.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("ARCHITECTURE.md",)
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the files outside `docs/` that pages link to."""
    outside = {*PAGES, *(path for page in files.documentation_pages() for path in _outside(page))}
    for path in sorted(outside):
        files.append(File.generated(config, path, content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Rewrite links between pages in `docs/` and files outside it to locations in the site."""
    folder = posixpath.dirname(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        target = _in_site(page.file.src_uri, match["path"])
        return match[0] if target is None else posixpath.relpath(target, folder or ".") + (match["anchor"] or "")

    return _LINK.sub(rewritten, markdown)


def _outside(page: File) -> list[str]:
    targets = (_in_site(page.src_uri, match["path"]) for match in _LINK.finditer(page.content_string))
    return [target for target in targets if target is not None and (ROOT / target).is_file()]


def _in_site(page: str, link: str) -> str | None:
    """Return the location of a linked file in the site; None if the link needs no rewriting."""
    source = page if page in PAGES else f"docs/{page}"
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if page in PAGES:
        return target.removeprefix("docs/") if target.startswith("docs/") else None
    return None if target.startswith(("docs/", "..")) else target
