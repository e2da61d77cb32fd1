"""What the page asks the pack for, beside ComfyUI's own routes.

| route | answers |
|---|---|
| `GET /fewbits/formats` | which inputs of a Quantize node each format has, and their values |
| `GET /fewbits/running` | node id -> plan of the run at work, for a page that was reloaded |

No route writes, and none takes a path.
"""

from __future__ import annotations

import sys

from ...quant_ops.formats import FORMATS, Format
from . import host

# input of a node -> option of a format
INPUTS = {
    "scaling": "scaling",
    "block_size": "block_size",
    "convrot": "convrot",
    "full_precision_matmul": "full_precision_matrix_mult",
}


def fitting_inputs() -> dict[str, dict[str, list[str]]]:
    """format -> input -> the values that it may be given, as text; inputs that do not fit are
    left out.
    """
    return {name: _inputs_of(format) for name, format in FORMATS.items()}


def _inputs_of(format: Format) -> dict[str, list[str]]:
    options = format.Options
    fitting = [(shown, option) for shown, option in INPUTS.items() if option in options.names()]
    return {shown: list(map(str, options.values(option))) for shown, option in fitting}


def add_routes() -> None:
    """Give ComfyUI's server these routes; without one (ComfyUI as a library) nothing happens."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:
        return
    from aiohttp import web  # ComfyUI's own, there wherever its server is

    async def formats(request: web.Request) -> web.Response:
        return web.json_response(fitting_inputs())

    async def running(request: web.Request) -> web.Response:
        return web.json_response({str(node): plan for node, plan in host.PLANS.items()})

    server.routes.get("/fewbits/formats")(formats)
    server.routes.get("/fewbits/running")(running)
