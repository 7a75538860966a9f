"""The documents link to what is there, the site shows all of them, and its reference has every public name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import srpo_kernels as sk
from srpo_kernels.integrations import transformers as models

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def anchors(path: Path) -> set[str]:
    """Of its headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    for target, anchor in LINK.findall(text):
        if "://" in target:
            continue
        path = (document.parent / target).resolve() if target else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_every_document_has_a_place() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert f": {path.name}\n" in navigation, path.name


def test_every_public_name_has_an_entry() -> None:
    entries = set(re.findall(r"^::: srpo_kernels\.(\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    # A mapping: docs/losses.md is its page.
    assert {name for name in entries if "." not in name} == set(sk.__all__) - {"POLICY_LOSSES"}
    prefix = "integrations.transformers."
    assert {name.removeprefix(prefix) for name in entries if name.startswith(prefix)} <= set(models.__all__)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="`make site` installs it")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "srpo_loss" in (tmp_path / "api.html").read_text()
    for page in tmp_path.glob("*.html"):
        # Nothing that a reader's browser would fetch from elsewhere.
        assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', page.read_text()), page.name
