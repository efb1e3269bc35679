"""The live page of a run: a small web server on this machine's loopback, and the page that asks it what is new.

    GET /  /page.css  /page.js          the page
    GET /data/index                     names of the documents with a tag each (dashboard.Dashboard), and an ETag of the whole
    GET /data/NAME                      a document

It only reads, answers nothing else, and binds to 127.0.0.1. A name that points here from another site (DNS rebinding)
is refused by the Host header; nothing in a run can make the page load or run anything (Content-Security-Policy). To
look from elsewhere, forward the port: `ssh -L 8891:127.0.0.1:8891 HOST`.
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
"""The least number of seconds between two looks at the run folder, however many pages are open."""
BUDGET_S = 0.8
"""The seconds that one look may spend on reading older steps of the plane."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

log = logging.getLogger(__name__)


def serve(run_dir: Path, port: int = PORT) -> int:
    """Show a run until Ctrl-C; port 0 takes a free one. Returns the exit code.

    Raises:
        SteptronError: `run_dir` is no run folder, or the port is taken.
    """
    with LiveServer(run_dir, port) as server:
        print(f"{server.url}  (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


class LiveServer(ThreadingHTTPServer):
    """Serves one run; bound when it is made, so that its `url` is known before it answers."""

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
        """Return names and tags of the documents, after a look at the run folder."""
        with self._lock:
            if time.monotonic() - self._looked >= REFRESH_EVERY_S or self.run.reading:
                self.run.refresh(BUDGET_S)
                self._looked = time.monotonic()
            return dump({"documents": self.run.tags(), "reading": self.run.reading})

    def document(self, name: str) -> str:
        """A document as it stands. Raises `KeyError` where there is none of that name."""
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
        except Exception as error:  # a run folder can be in any state; the next look may find a better one
            log.warning("%s cannot be shown: %s: %s", path, type(error).__name__, error)
            return self._fail(HTTPStatus.INTERNAL_SERVER_ERROR, "the run cannot be read just now")
        return self._fail(HTTPStatus.NOT_FOUND, "there is no such page")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged: a page makes one every two seconds."""

    def _trusted(self) -> bool:
        """Return whether the request names this machine. A page from elsewhere whose name points here does not."""
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
