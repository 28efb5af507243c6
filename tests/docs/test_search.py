"""The documentation builds without a warning, and its search finds the answers to beginners' questions first."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from document_commands import ROOT
from lunr import lunr
from lunr.index import Index

# Beginners' questions, and the section of docs/questions.md that answers each.
QUESTIONS = {
    "how much memory for A14B on 24 GB": "how-much-memory-does-a14b-need-on-a-24-gb-card",
    "how many clips": "how-many-clips-do-i-need",
    "which fps": "which-fps-should-my-clips-have",
    "what does a score of .5 mean": "what-does-a-score-of-05-mean",
    "what if no face is found": "what-happens-if-no-face-is-found",
    "how to use the LoRA in ComfyUI": "how-do-i-use-the-lora-in-comfyui",
    "how to add PickScore": "how-do-i-add-pickscore",
    "how to run on two nodes": "how-do-i-run-on-two-nodes",
    "is TensorRT tested": "is-tensorrt-tested",
    "how do I know it is not reward hacking": "how-do-i-know-it-is-not-reward-hacking",
}

# Keywords, and the section that must be found first.
TOPICS = {
    "quickstart": "quickstart/",
    "out of memory": "troubleshooting/#out-of-memory",
    "NaN": "troubleshooting/#the-loss-is-nan",
    "engine refused": "troubleshooting/#an-engine-is-refused",
    "slow": "troubleshooting/#it-is-slow",
    "choose baseline and scale": "rewards/#how-to-choose-baseline-scale-weight-and-kl_weight",
    "judges": "judges/",
    "use an engine in another program": "engines/#use-an-engine-in-another-program",
    "resume": "training/#stopping-and-resuming",
    "report": "report/",
    "quantization": "quantization/",
    "FSDP": "distributed/#fsdp2",
    "SLURM": "distributed/#slurm",
    "add a backend": "extending/#add-a-backend",
    "add a stage": "extending/#add-a-stage",
    "add a reward": "extending/#add-a-reward",
    "model family": "extending/#add-a-model-family",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the documentation; return its folder."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def sections(site: Path) -> dict[str, dict[str, Any]]:
    """Return the sections of the site's search index by location, with tags removed from their text."""
    documents = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    return {
        document["location"]: {
            "location": document["location"],
            "title": document["title"],
            "text": re.sub("<[^>]+>", " ", document["text"]),
            "boost": document.get("boost", 1),
        }
        for document in documents
    }


@pytest.fixture(scope="module")
def index(sections: dict[str, dict[str, Any]]) -> Index:
    """Return an index like that of the site's search: lunr, where a title counts a thousand times as much as text."""
    fields = [{"field_name": "title", "boost": 1000}, {"field_name": "text", "boost": 1}]
    documents = [(section, {"boost": section["boost"]}) for section in sections.values()]
    return lunr(ref="location", fields=fields, documents=documents)


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_answer_is_found_first(question: str, sections: dict[str, dict[str, Any]], index: Index) -> None:
    expected = f"questions/#{QUESTIONS[question]}"
    assert len(sections[expected]["text"].split()) >= 40
    assert index.search(question)[0]["ref"] == expected


@pytest.mark.skipif(shutil.which("node") is None, reason="the theme's search is a script for browsers: needs node")
def test_the_search_of_the_theme_finds_the_answers_first(site: Path) -> None:
    (worker,) = (site / "assets" / "javascripts" / "workers").glob("search.*.min.js")
    expected = {question: f"questions/#{anchor}" for question, anchor in QUESTIONS.items()} | TOPICS
    command = ["node", str(Path(__file__).with_name("theme_search.js")), str(site), str(worker), *expected]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)
    assert dict(zip(expected, found, strict=True)) == expected


def test_links_out_of_the_docs_folder_are_part_of_the_site(site: Path) -> None:
    assert (site / "ARCHITECTURE" / "index.html").is_file()
    assert (site / "benchmarks" / "results" / "window.json").is_file()
    assert 'href="../benchmarks/results/window.json"' in (site / "steps" / "index.html").read_text()


def test_the_api_page_has_docstrings(site: Path) -> None:
    page = (site / "api" / "index.html").read_text()
    for name in ("TrainingModule.from_pretrained", "Runtime.replan", "Reward.score", "run_score", "FrostlineError"):
        assert name.rpartition(".")[2] in page
    assert page.count("doc-heading") > 30
    assert "Raises: " not in page  # it is a section, not text
