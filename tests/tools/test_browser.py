"""The walk through the site sees what it is to see, in pages that have one fault each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.browser import BROWSERS, find_browser, walk

BROWSER = find_browser()
PAGE = """<!doctype html><title>A page</title><style>
@media (prefers-color-scheme: dark) {{ body {{ background: black }} }}
</style><body><script>
document.body.dataset.mdColorScheme = matchMedia("(prefers-color-scheme: dark)").matches ? "slate" : "default";
</script><h1 id="here">A heading</h1><p>{text}</p>{more}</body>"""
TEXT = "Words that a reader has come for. " * 5


@pytest.mark.skipif(BROWSER is None, reason=f"needs one of {', '.join(BROWSERS)}")
def test_faults_are_seen(tmp_path: Path) -> None:
    def page(name: str, more: str = "", text: str = TEXT) -> None:
        (tmp_path / f"{name}.html").write_text(PAGE.format(text=text, more=more))

    page("index", '<a href="wide.html#here">wide</a><a href="https://example.org/none.html">elsewhere</a>')
    page("empty", text="")
    page("wide", '<div style="width: 600px">as wide as that</div>')
    page("pictures", '<img src="none.png">')
    page("links", '<a href="none.html">a</a><a href="index.html#nowhere">b</a>')
    page("bright", "<style>body { background: white !important }</style>")
    page("stubborn", '<script>document.body.dataset.mdColorScheme = "default"</script>')
    assert BROWSER is not None
    seen = walk(tmp_path, BROWSER)
    pages = [line.split(".html", 1)[0] for line in seen]
    assert pages.count("empty") == 4 and pages.count("wide") == 2 and pages.count("pictures") == 4
    assert pages.count("links") == 2 and pages.count("bright") == 1 and pages.count("stubborn") == 2
    assert "index" not in pages and len(seen) == 15
    for line in (
        "wide.html, 390 wide, light: is 6",
        "links to /none.html, which is not there",
        "as bright in the dark",
    ):
        assert any(line in fault for fault in seen), line
