"What every test shares: one thread a worker, no screen, no hub; one browser, one server."

import functools
import os
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # two workers of one thread are faster than two that fight over the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def root():
    "The checkout."
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def unavailable():
    "A function to say what is missing: locally a reason to skip; in CI a failure."
    return pytest.fail if os.environ.get("CI") else pytest.skip


@pytest.fixture(scope="session")
def browser(unavailable):
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        unavailable("Chromium is not installed: apt-get install --no-install-recommends chromium")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=flags)
        yield browser
        browser.close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def serve():
    "A function that serves a folder on this machine and returns its address."
    servers = []

    def start(folder):
        server = ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield functools.cache(start)
    for server in servers:
        server.shutdown()
        server.server_close()
