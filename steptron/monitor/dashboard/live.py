"""The live page of a run: a small web server on this machine's loopback, and a page that asks it for news.

    GET /  /page.css  /page.js          the page
    GET /data/index                     names of the documents with a tag each (documents.Dashboard), and an ETag of
    them all
    GET /data/NAME                      a document

The server only reads, answers nothing else, and binds to 127.0.0.1. The Host header is checked, so that a name of
another site that points here (DNS rebinding) is refused. Nothing in a run can make the page load or run anything
(Content-Security-Policy). To open the page from another machine, forward the port: `ssh -L 8891:127.0.0.1:8891 HOST`.
"""

import gzip
import hashlib
import json
import logging
import threading
import time
import urllib.parse
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from steptron.errors import SteptronError
from steptron.monitor.dashboard import report
from steptron.monitor.dashboard.documents import Dashboard, dump

PORT = 8891
"""The default port of the page."""
REFRESH_EVERY_S = 1.0
"""The least number of seconds between two reads of the run folder, however many pages are open."""
BUDGET_S = 0.8
"""The seconds that one refresh may spend on reading older steps of the plane."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

log = logging.getLogger(__name__)


def serve(run_dir: Path, port: int = PORT) -> int:
    """Serve the page of a run until Ctrl-C; port 0 means any free one. Returns the exit code.

    Raises:
        SteptronError: `run_dir` is not a run folder, or the port is in use.
    """
    with LiveServer(run_dir, port) as server:
        print(f"{server.url}  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


class LiveServer(ThreadingHTTPServer):
    """The web server of one run. It binds its port when it is created, so that `url` is known before it answers."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, run_dir: Path, port: int = PORT):
        self.run = Dashboard(run_dir)
        self._lock = threading.Lock()
        self._looked = float("-inf")
        self.pages = {
            "/": ("text/html", report.page_served().encode()),
            "/page.css": ("text/css", report.style().encode()),
            "/page.js": ("text/javascript", report.script().encode()),
        }
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SteptronError(
                f"port {port} of 127.0.0.1 cannot be used: {reason}; give another one, or 0 for any that is free"
            ) from error

    @property
    def port(self) -> int:
        """Return the port that it listens on."""
        return self.server_address[1]

    @property
    def url(self) -> str:
        """Return the URL of the page."""
        return f"http://127.0.0.1:{self.port}/"

    def index(self) -> str:
        """Return names and tags of the documents, after reading what is new."""
        with self._lock:
            if time.monotonic() - self._looked >= REFRESH_EVERY_S or self.run.reading:
                self.run.refresh(BUDGET_S)
                self._looked = time.monotonic()
            return dump({"documents": self.run.tags(), "reading": self.run.reading})

    def document(self, name: str) -> str:
        """Return a document as of the last refresh. Raises `KeyError` if no document has that name."""
        with self._lock:
            return self.run.document(name)


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: LiveServer
    server_version = "steptron"
    sys_version = ""
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        """Answer with the page, a document, or an error of one line."""
        if not self._trusted():
            return self._fail(HTTPStatus.FORBIDDEN, "this server answers to 127.0.0.1 and localhost only")
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if path in self.server.pages:
            kind, body = self.server.pages[path]
            return self._send(kind, body)
        try:
            if path == "/data/index":
                return self._send("application/json", self.server.index().encode())
            if path.startswith("/data/"):
                return self._send("application/json", self.server.document(path.removeprefix("/data/")).encode())
        except KeyError:
            pass
        except Exception as error:  # a run folder can be in any state; the next refresh may find a better one
            log.warning("%s cannot be shown: %s: %s", path, type(error).__name__, error)
            return self._fail(HTTPStatus.INTERNAL_SERVER_ERROR, "the run cannot be read just now")
        return self._fail(HTTPStatus.NOT_FOUND, "there is no such page")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Do nothing: a page makes a request every two seconds."""

    def _trusted(self) -> bool:
        """Return whether the Host header names this machine, which it does not if another site's name points here."""
        host = urllib.parse.urlsplit(f"//{self.headers.get('Host', '')}").hostname
        return host in ("127.0.0.1", "localhost", "::1")

    def _send(self, kind: str, body: bytes, status: HTTPStatus = HTTPStatus.OK) -> None:
        tag = f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
        if status == HTTPStatus.OK and self.headers.get("If-None-Match") == tag:
            status, body = HTTPStatus.NOT_MODIFIED, b""
        packed = len(body) > 1000 and "gzip" in self.headers.get("Accept-Encoding", "")
        if packed:
            body = gzip.compress(body, compresslevel=1)
        self.send_response(status)
        headers = {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
            "ETag": tag,
        }
        for name, value in (headers | ({"Content-Encoding": "gzip"} if packed else {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _fail(self, status: HTTPStatus, text: str) -> None:
        self._send("application/json", json.dumps({"error": text}).encode(), status)
