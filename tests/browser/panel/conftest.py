"""An empty page of the stub host, and a node's panel in it."""

from __future__ import annotations

import mimetypes
import re

import pytest

from support.harness.panel import HOST, ORIGIN, STUBS, load


@pytest.fixture
def page(new_page, web):
    """An empty page of the stub host; every request is answered from `web/` or the stubs, none leaves the machine."""
    page = new_page()

    def answer(route):
        path = re.sub(r"^https?://[^/]+|\?.*$", "", route.request.url)
        if path == "/":
            route.fulfill(body="<!doctype html><body></body>", content_type="text/html")
        elif path in STUBS:
            route.fulfill(body=STUBS[path], content_type="text/javascript")
        else:
            file = web / path.removeprefix("/extensions/ComfyUI-FewBits/")
            kind = (
                "text/javascript" if file.suffix == ".mjs" else mimetypes.guess_type(file.name)[0]
            )
            route.fulfill(path=file, content_type=kind)

    page.route("**/*", answer)
    page.goto(ORIGIN)
    page.evaluate(HOST)
    yield page
    assert page.messages == []


@pytest.fixture
def panel(page):
    """The panel of node 12, with the entry script running."""
    load(page)
    page.evaluate("addNode(12)")
    page.wait_for_function(
        "getComputedStyle(document.querySelector('.fewbits-panel')).position === 'relative'"
    )
    return page.locator(".fewbits-panel")
