"""A headless Chrome or Chromium that is installed already, driven by Playwright; nothing is downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.harness import EMOJI_NODES, PACK, ComfyServer, emoji_models
from support.harness.page import COLLECT, RENDERERS, SLOW, ready, write_slow_model

CHROMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "msedge",
)
ELSEWHERE = (  # installations that are not on PATH
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def chrome() -> Iterator[object]:
    """A Playwright browser with a fresh profile; without a browser the tests fail in one line."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("browser tests need the Python package playwright", pytrace=False)
    found = [*map(shutil.which, CHROMES), *filter(os.path.exists, ELSEWHERE)]
    path = next(filter(None, found), None)
    if path is None:
        pytest.fail("browser tests need Chrome or Chromium on PATH", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def new_page(chrome) -> Iterator[Callable[..., object]]:
    """`new_page(width, height, scale)` -> a page in a context of its own; `page.messages` collects its complaints."""
    contexts = []

    def make(width: int = 1280, height: int = 900, scale: float = 1) -> object:
        context = chrome.new_context(
            viewport={"width": width, "height": height}, device_scale_factor=scale
        )
        contexts.append(context)
        page = context.new_page()
        page.messages = []
        page.on(
            "console",
            lambda note: page.messages.append(
                f"{note.type}: {note.text} {note.location.get('url', '')}"
            ),
        )
        page.on(
            "pageerror",
            lambda error: page.messages.append(f"pageerror: {error} {error.stack or ''}"),
        )
        return page

    yield make
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[ComfyServer]:
    """A ComfyUI with the emoji model and one that takes long; it serves the page of `--frontend`."""
    base = tmp_path_factory.mktemp("page")
    slow = base / SLOW
    write_slow_model(slow)
    folder = os.environ.get("FEWBITS_FRONTEND")
    page = ["--front-end-root", folder] if folder else []
    nodes, models = [PACK, EMOJI_NODES], emoji_models(slow)
    with ComfyServer(base, custom_nodes=nodes, models=models, arguments=page) as server:
        yield server


@pytest.fixture
def open_page(server, new_page) -> Iterator[Callable[..., object]]:
    """`open_page(renderer, theme)` -> ComfyUI's page, ready; the test then fails on any complaint that concerns us."""
    pages = []

    def open_page(
        renderer: str, theme: str = "dark", language: str = "en", **size: float
    ) -> object:
        settings = {
            "Comfy.TutorialCompleted": True,
            "Comfy.ColorPalette": theme,
            "Comfy.Locale": language,
            "Comfy.VueNodes.Enabled": RENDERERS[renderer],
            "Comfy.Minimap.Visible": False,
        }
        server.post("/settings", settings)
        page = new_page(**({"width": 1400, "height": 900} | size))
        pages.append(page)
        page.goto(f"http://127.0.0.1:{server.port}")
        ready(page)
        page.evaluate(COLLECT)
        return page

    yield open_page
    for page in pages:
        assert [message for message in page.messages if "fewbits" in message.lower()] == []


@pytest.fixture(scope="session")
def web() -> Path:
    return Path(__file__).resolve().parents[2] / "web"
