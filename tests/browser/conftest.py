"""A headless Chrome or Chromium that is installed already, driven by Playwright; nothing is downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

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

    def make(width: int = 1280, height: int = 900, scale: int = 1) -> object:
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
def web() -> Path:
    return Path(__file__).resolve().parents[2] / "web"
