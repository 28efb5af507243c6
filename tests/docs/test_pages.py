"""Pages: the configuration reference is current, links are valid, and README is short."""

import io
import re
import sys
import tokenize
from pathlib import Path

import pytest
from document_commands import ROOT
from markdown.extensions.toc import slugify

sys.path.insert(0, str(ROOT / "docs"))

from make_reference import PAGE, reference

from frostline.config import dotted_names
from frostline.train.data.needs import SampleNeeds
from frostline.train.settings import RunSettings

PAGES = sorted(
    [*(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")), *(ROOT / "docs").rglob("*.md")]
)
_CODE = re.compile(r"^(```+).*?^\1$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_FENCE = re.compile(r"^(```+).*?^\1$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_OTHER_SITES = ("http://", "https://", "mailto:")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as mkdocs creates them."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))
    plain = (re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading) for heading in headings)
    return {slugify(heading, "-") for heading in plain}


def broken_links(page: Path) -> list[str]:
    """Return the relative links of a page for which there is no file or no heading."""
    wrong = []
    for match in _LINK.finditer(_CODE.sub("code", page.read_text(encoding="utf-8"))):
        path, _, anchor = match["target"].partition("#")
        if path.startswith(_OTHER_SITES):
            continue
        target = (page.parent / path).resolve() if path else page
        has_headings = target.suffix == ".md" and target.is_file()
        found = target.exists() and target.is_relative_to(ROOT)
        if not found or (anchor and has_headings and anchor not in anchors(target)):
            wrong.append(match["target"])
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = ROOT / "docs" / "quickstart.md"
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text())
    assert len(broken_links(copy)) == len(_LINK.findall(_CODE.sub("code", page.read_text())))
    assert "install" in anchors(page)


def test_the_configuration_reference_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python docs/make_reference.py --write"


def test_the_configuration_reference_has_every_setting() -> None:
    # The part before all sections comes first.
    parts = re.split(r"^### `(.*)`$", reference(), flags=re.MULTILINE)
    sections = {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}
    names = [name.rpartition(".")[::2] for name in dotted_names(RunSettings) if not name.startswith("rewards.")]
    assert len(names) > 70
    assert [f"{section}.{name}" for section, name in names if f"| `{name}` |" not in sections[section]] == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if not re.search(rf"^ *- .*: {re.escape(page)}$", navigation, re.M)] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_hardware_table_of_readme_is_that_of_the_memory_plan() -> None:
    """The page with the tables is compared with the memory plan in tests/test_benchmarks.py."""
    page = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    planned = page.partition("\n### Wan2.2-I2V-A14B\n")[2].partition("\n### ")[0]
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Hardware\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if re.match(r"\| \d+ GB ", line)]
    assert [row.split("|")[1].strip() for row in rows] == ["24 GB", "48 GB", "80 GB"]
    assert [row for row in rows if row not in planned.splitlines()] == [], "copy the rows from docs/hardware.md"
    step = re.search(r"A step of (\S+), LoRA of rank (\d+)\.", planned)
    assert step is not None
    assert f"a step of {step[1]} with a LoRA of rank {step[2]}" in section


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = page.partition("\n## An engine is refused\n")[2].partition("\n## ")[0]
    messages = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    quoted = [words.strip("… ") for message in messages for words in re.findall("`(.*?)`", message)]
    code = "".join(module.read_text(encoding="utf-8") for module in (ROOT / "frostline").rglob("*.py"))
    assert len(quoted) > 10
    assert [words for words in quoted if words not in code] == []


@pytest.mark.parametrize(
    "needs",
    [
        SampleNeeds(first_frame="the model Wan2.2-I2V-A14B"),
        SampleNeeds(first_frame="", compared=("the reward face_identity",)),
        SampleNeeds(first_frame="", of_clips=("the reward motion",)),
    ],
)
def test_messages_about_missing_videos_are_those_of_the_code(needs: SampleNeeds) -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert f"is empty, but {needs.refuses_without_video(has_reference=False)}\n" in page


# Phrases of a private style, each with what to write instead.
PHRASES = {
    r"told by": "inferred from",
    r"recalled": "read from the cache",
    r"one a sample": "one for each sample",
    r"so many": "N",
    r"what becomes of": "the result of",
    r"\bbut for\b": "except",
    r"\bthe most that\b": "the maximum, the peak",
    r"\bmeans nothing to\b": "is not supported by",
    r"in turns\b": "alternately, take turns",
    r"lies in": "is in",
    r"hangs on": "depends on",
    r"beside\b": "next to",
    r"\bknows\b": "contains, supports",
    r"\bas .{1,40} has it\b": "like",
    r"\bwhich .{1,30} does not\.": "but",
    r"once a sample": "once for each sample",
    r"\banew\b": "again",
    r"\b[Ww]hoever\b": "the caller, the user",
    r"\bholds no\b": "contains no",
    r"(?<![Tt]here )\bis no (?!longer|such)\w+": "is not a",
    r"\bstands twice\b": "duplicate",
    r"\basked for\b": "requested",
    r"\bgoes by\b": "depends on, is named",
    r"\bheld against\b": "compared with",
    r"\bof its own\b": "its own",
    r"\bby itself\b": "separately, without",
    r"\bwithout a word\b": "silently",
    r"\bby official name\b": "by name in Wan's format",
    r"\blies (below|beside|outside|behind)\b": "is",
    r"\b(one|once) a (row|line|step|frame|process|device|layer|reward|stage|cell)\b": "per",
    r"\bcompares? nothing\b": "is not comparable",
    r"\bgiven back\b": "freed, returned",
    r"\bconvolves?\b": "uses the Conv3d of",
    r"\btak(e|es|en|ing) every \w+ for\b": "treat as",
    r"\bdrops? out\b": "is skipped",
    r"\bgo(es)? on (from|with|until|to)\b": "continues",
    r"\bfrostline's own\b": "only in frostline, the default",
    r"\bcounts as one unit\b": "standard deviation used to normalise",
    r"\b(equal|same) to the bit\b": "bit for bit the same",
    r"\bsays how\b": "describes, gives the number of",
    r"\bfor free\b": "without computing it, without cost",
    r"\bstand-ins?\b": "mocks",
}


PLAIN_PAGES = [*(ROOT / name for name in ("CHANGELOG.md", "benchmarks/NOTES.md", "engines/README.md")), *PAGES]


@pytest.mark.parametrize("page", PLAIN_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_plain(page: Path) -> None:
    prose = _CODE.sub("code", page.read_text(encoding="utf-8"))
    found = {phrase: plain for phrase, plain in PHRASES.items() if re.search(phrase, prose)}
    assert found == {}, "write instead"


# Packages and modules whose docstrings, comments and messages are checked, too.
PLAIN_ROOMS = (
    *("cli", "cluster", "demo", "export", "models", "report", "rewards", "runtime", "score", "stages", "terminal"),
    "video",
    *("train/data", "train/judging", "train/loop", "train/memory", "train/precompute", "train/report", "train/step"),
)
_ROOMS = [path for room in PLAIN_ROOMS for path in sorted((ROOT / "frostline" / room).rglob("*.py"))]
_TOP = [path for folder in ("", "train") for path in sorted((ROOT / "frostline" / folder).glob("*.py"))]
PLAIN_MODULES = [*_TOP, *_ROOMS]


def prose_of(module: Path) -> str:
    """Return the comments, docstrings and messages of a module; code in backticks is left out."""
    source = module.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts = [token.string for token in tokens if token.type in (tokenize.COMMENT, tokenize.STRING)]
    prose = re.sub(r"\{[^{}]*\}", "X", re.sub(r"\s+", " ", "\n".join(text for text in texts if " " in text)))
    return _CODE.sub("code", prose)


@pytest.mark.parametrize("module", PLAIN_MODULES, ids=lambda module: str(module.relative_to(ROOT)))
def test_docstrings_comments_and_messages_are_plain(module: Path) -> None:
    found = {match[0]: plain for phrase, plain in PHRASES.items() if (match := re.search(phrase, prose_of(module)))}
    assert found == {}, "write instead"
