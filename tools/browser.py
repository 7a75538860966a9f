"""A walk through the built site in a headless browser: `python -m tools.browser build/site`.

Every page is opened in a frame of a desktop's and of a phone's width, in the light and in the dark colours.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (1280, 390)
# What `prefers-color-scheme` says, and Chromium's flags for it.
SCHEMES = {"dark": ["--force-dark-mode"], "light": []}
_HARNESS_PAGE = "/walk-through-the-site.html"
# In virtual milliseconds, which pass as fast as the browser can work.
_BUDGET = 120_000
_HARNESS = """<!doctype html><pre id="seen"></pre><script>
const pages = PAGES, widths = WIDTHS, seen = [];
const open = (page, width) => new Promise(resolve => {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900; frame.src = page;
  frame.onload = async () => {
    const inside = frame.contentDocument, body = inside.body, view = frame.contentWindow;
    for (const image of inside.images) image.loading = "eager";
    await Promise.all([...inside.images].map(x => x.complete || new Promise(done => x.onload = x.onerror = done)));
    await new Promise(done => setTimeout(done, 100));
    seen.push({
      page, width, title: inside.title, text: body.innerText.length, overflow: inside.documentElement.scrollWidth,
      dark: view.matchMedia("(prefers-color-scheme: dark)").matches, scheme: body.dataset.mdColorScheme,
      colour: view.getComputedStyle(body).backgroundColor,
      images: [...inside.images].filter(x => !x.naturalWidth).map(x => new URL(x.src).pathname),
      links: [...inside.links].map(x => x.href),
      ids: [...inside.querySelectorAll("[id]")].map(x => x.id),
    });
    frame.remove(); resolve();
  };
  document.body.append(frame);
});
(async () => {
  for (const page of pages) for (const width of widths) await open(page, width);
  document.getElementById("seen").textContent = JSON.stringify(seen);
})();
</script>"""


def find_browser() -> str | None:
    """The path of a Chromium, if there is one."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def walk(site: Path, browser: str) -> list[str]:
    """What is wrong with the pages of a built site, a line each.

    A fault is one that each of three walks sees: under load a browser now and then tells a page other colours.
    """
    faults = _walk(site, browser)
    for _ in range(2):
        if faults:
            again = _walk(site, browser)
            faults = [fault for fault in faults if fault in again]
    return faults


def _walk(site: Path, browser: str) -> list[str]:
    pages = sorted(path.name for path in site.glob("*.html"))
    with _served(site, pages) as address:
        seen = {scheme: _visit(browser, address, scheme) for scheme in SCHEMES}
    faults = [fault for scheme, entries in seen.items() for entry in entries for fault in _faults(entry, scheme)]
    faults += [
        f"{scheme}: {len(entries)} of {len(pages) * len(WIDTHS)} visits"
        for scheme, entries in seen.items()
        if len(entries) != len(pages) * len(WIDTHS)
    ]
    light, dark = ({entry["page"]: entry["colour"] for entry in seen[scheme]} for scheme in ("light", "dark"))
    faults += [f"{page}: as bright in the dark" for page in light if light[page] == dark.get(page)]
    return faults + _broken_links(seen["light"])


@contextmanager
def _served(site: Path, pages: list[str]) -> Iterator[str]:
    harness = _HARNESS.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS))

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != _HARNESS_PAGE:
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(harness.encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def _visit(browser: str, address: str, scheme: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom"]
        command += ["--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        command += [*SCHEMES[scheme], f"--virtual-time-budget={_BUDGET}"]
        done = subprocess.run([*command, address + _HARNESS_PAGE], capture_output=True, text=True, timeout=300)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    if found is None or not found[1]:
        raise RuntimeError(f"{browser} did not end its walk: exit code {done.returncode}, {done.stderr[-500:]}")
    entries: list[dict[str, Any]] = json.loads(unescape(found[1]))
    return entries


def _faults(entry: dict[str, Any], scheme: str) -> Iterator[str]:
    where = f"{entry['page']}, {entry['width']} wide, {scheme}"
    if not entry["title"] or entry["text"] < 100:
        yield f"{where}: is empty"
    if entry["overflow"] > entry["width"]:
        yield f"{where}: is {entry['overflow']} wide"
    if entry["dark"] != (scheme == "dark") or entry["scheme"] != {"dark": "slate", "light": "default"}[scheme]:
        yield f"{where}: has the colours of {entry['scheme']}"
    for image in entry["images"]:
        yield f"{where}: does not show {image}"


def _broken_links(entries: list[dict[str, Any]]) -> list[str]:
    ids = {f"/{entry['page']}": set(entry["ids"]) for entry in entries}
    faults = set()
    for entry in entries:
        for link in entry["links"]:
            url = urlsplit(link)
            page = "/index.html" if url.path == "/" else url.path
            if url.hostname != "127.0.0.1" or not page.endswith(".html"):
                continue
            if page not in ids:
                faults.add(f"{entry['page']}: links to {page}, which is not there")
            elif url.fragment and url.fragment not in ids[page]:
                faults.add(f"{entry['page']}: links to {page}#{url.fragment}, which has no such place")
    return sorted(faults)


def main() -> int:
    """Walk through the site of the command line; no browser is no fault, but said."""
    parser = argparse.ArgumentParser(prog="python -m tools.browser", description="Walk through a site that is built.")
    parser.add_argument("site", type=Path, help="its folder, as make site writes it to build/site")
    site = parser.parse_args().site
    browser = find_browser()
    if browser is None:
        print(f"not walked: none of {', '.join(BROWSERS)} is installed")
        return 0
    faults = walk(site, browser)
    print(*faults, sep="\n")
    print(f"{len(list(site.glob('*.html')))} pages, {len(WIDTHS)} widths, {len(SCHEMES)} schemes: {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
