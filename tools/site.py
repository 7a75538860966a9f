"""What mkdocs calls while it builds the site: the repository's own pages, and links that lead out of docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Pages that stand beside docs/, by their name in the site.
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages beside docs/."""
    for name, source in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links between pages as those of the site; of a file that is no page its name remains."""
    folder = ROOT if page.file.src_uri in PAGES else ROOT / "docs"
    by_source = {(ROOT / source).resolve(): name for name, source in PAGES.items()}

    def link(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        if "://" in target:
            return match.group()
        path = (folder / target).resolve()
        if path.is_relative_to(ROOT / "docs"):
            name = path.relative_to(ROOT / "docs").as_posix()
        elif path in by_source:
            name = by_source[path]
        else:
            return text
        return f"{image}[{text}]({name}{anchor or ''})"

    return _LINK.sub(link, markdown)
