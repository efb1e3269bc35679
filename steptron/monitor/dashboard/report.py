"""report.html: the report of a run in one file that needs only a browser, during the run and after its end.

    run folder ─► documents.Dashboard ─► documents ─┐
                  page/: page.html, page.css, *.js ─┴► RUN_DIR/report.html

The live page (`live.py`) is the same page; it fetches the documents that the report contains.
"""

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from steptron.atomic import atomic_write
from steptron.monitor.dashboard.documents import Dashboard

FILE_NAME = "report.html"
SCRIPTS = ("base", "axes", "head", "curves", "cells", "lines", "named", "tables", "main")
"""The page's scripts, in the order in which they build on each other."""

READ_S = 20.0
"""The approximate seconds that reading the plane may take. If the run is too long, an even sample is read."""
MAX_CELL_TEXT = 12_000_000
"""The largest number of characters of heat maps in the file. Beyond it less important statistics are left out."""


def write_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report.html, replacing an earlier one atomically.

    Returns:
        The page's path.

    Raises:
        SteptronError: `run_dir` is not a run folder.
    """
    run = Dashboard(Path(run_dir))
    run.refresh(READ_S)
    documents: dict[str, str] = {}
    room = MAX_CELL_TEXT
    for name in run.tags():
        text = run.document(name)
        if name.startswith("cells/"):
            room -= len(text)
        if not name.startswith("cells/") or room >= 0:
            documents[name] = text
    path = Path(run_dir) / FILE_NAME
    with atomic_write(path) as temporary:
        temporary.write_text(page_with(documents), encoding="utf-8")
    return path


def script(names: Sequence[str] = SCRIPTS) -> str:
    """Return the JavaScript of these scripts, of the run's page if none are named."""
    folder = files("steptron.monitor.dashboard") / "page"
    parts = [(folder / f"{name}.js").read_text(encoding="utf-8").removeprefix('"use strict";\n') for name in names]
    return '"use strict";\n' + "\n".join(parts)


def style() -> str:
    """Return the page's CSS."""
    return (files("steptron.monitor.dashboard") / "page" / "page.css").read_text(encoding="utf-8")


def page_with(documents: Mapping[str, str], scripts: Sequence[str] = SCRIPTS) -> str:
    """Return one file with everything in it. Its policy runs no script but its own, and loads nothing."""
    css, js = f"\n{style()}\n", f"\n{script(scripts)}\n"
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(css)}'; script-src '{_hash(js)}'"
    data = [
        f'<script type="application/json" data-name="{html.escape(name)}">{text}</script>'
        for name, text in documents.items()
    ]
    return _fill(
        head=f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{css}</style>',
        script=f"<script>{js}</script>",
        data="\n".join(data),
    )


def page_served() -> str:
    """Return the page that loads style, script and documents from its server."""
    return _fill(head='<link rel="stylesheet" href="/page.css">', script='<script src="/page.js"></script>', data="")


def _fill(*, head: str, script: str, data: str) -> str:
    page = (files("steptron.monitor.dashboard") / "page" / "page.html").read_text(encoding="utf-8")
    # Insert the data last, so that nothing in it is mistaken for a mark.
    for mark, text in (("<!--HEAD-->", head), ("<!--SCRIPT-->", script), ("<!--DATA-->", data)):
        page = page.replace(mark, text, 1)
    return page


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
