"""Pages in a real browser: Debian's Chromium, driven by Playwright. Where one of them is missing the tests skip.

    def test_something(open_page):
        page = open_page("index.html")

The site is opened as files; a test that is to run over http as well says so:

    @pytest.mark.parametrize("root", ["http", "file"], indirect=True)

When a test is over, a console error, a failed request, or a request that left the site fails it.
"""

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MILLISECONDS = 10_000  # for one action


# Not for the session: Playwright keeps an event loop running, which tests of notebooks cannot have beside their own.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra `test`")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder and prints nothing. Connections are kept, which makes pages load in half the time."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="session")
def served(site: Path) -> Iterator[str]:
    """The address of the site on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(site)))
    server.handle_error = lambda *args: None  # type: ignore[method-assign]  # a page was left while it loaded
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def root(request: pytest.FixtureRequest, browser: Any) -> str:
    """Where the site begins: in the file system, or over http. It is built only where there is a browser."""
    over_http = getattr(request, "param", "file") == "http"
    return request.getfixturevalue("served") if over_http else request.getfixturevalue("site").as_uri()


class Opener:
    """Opens pages of the site, and collects what goes wrong on them."""

    def __init__(self, browser: Any, root: str) -> None:
        self.browser, self.root = browser, root
        self.problems: list[str] = []
        self.contexts: list[Any] = []
        self.cut_off: set[str] = set()
        self.came: set[str] = set()

    def __call__(self, path: str, **options: Any) -> Any:
        """The page, opened. Options are those of Playwright's `new_context`, such as viewport."""
        self.contexts.append(self.browser.new_context(**{"reduced_motion": "reduce", **options}))
        page = self.contexts[-1].new_page()
        page.set_default_timeout(MILLISECONDS)
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("request", self._asked)
        page.on("requestfailed", self._failed)
        page.on("requestfinished", lambda request: self.came.add(request.url))
        page.on("response", self._got)
        page.goto(f"{self.root}/{path}")
        return page

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"console: {message.text}")

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((f"{self.root}/", "data:", "blob:")):
            self.problems.append(f"left the site: {request.url}")

    def _failed(self, request: Any) -> None:
        if "ERR_ABORTED" in request.failure:  # the page was left; on some page it comes through
            self.cut_off.add(request.url)
        else:
            self.problems.append(f"failed: {request.url}")

    def _got(self, response: Any) -> None:
        if response.status >= 400:
            self.problems.append(f"{response.status}: {response.url}")


@pytest.fixture
def open_page(browser: Any, root: str) -> Iterator[Opener]:
    """Open a page of the site."""
    opener = Opener(browser, root)
    yield opener
    for context in opener.contexts:
        context.close()
    assert opener.problems == []
    assert opener.cut_off <= opener.came
