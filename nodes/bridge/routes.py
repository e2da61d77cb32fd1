"""What the page asks the pack for, beside ComfyUI's own routes.

| route | answers |
|---|---|
| `GET /fewbits/formats` | which inputs of a Quantize node each format has, and their values |
| `POST /fewbits/plan` | what a node of a graph would do, from headers; not while a prompt runs |
| `GET /fewbits/running` | node id -> plan of the run at work, for a page that was reloaded |

No route writes, and none takes a path: files are named as the loaders list them. A wish that cannot
be fulfilled, and a server at work, are answers too: a browser logs any other status as an error.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable

from ...quant_ops.errors import QuantError
from ...quant_ops.formats import FORMATS, Format
from . import host

# input of a node -> option of a format, and the input's words for the option's values
INPUTS = {
    "scaling": ("scaling", {}),
    "block_size": ("block_size", {}),
    "convrot": ("convrot", {True: "on", False: "off"}),
    "full_precision_matmul": ("full_precision_matrix_mult", {True: "true", False: "false"}),
}


def fitting_inputs() -> dict[str, dict[str, list[str]]]:
    """format -> input -> the values that it may be given, as text; inputs that do not fit are
    left out.
    """
    return {name: _inputs_of(format) for name, format in FORMATS.items()}


def _inputs_of(format: Format) -> dict[str, list[str]]:
    found = {}
    for name, (option, words) in INPUTS.items():
        if _is_chosen(format, option):
            values = format.Options.values(option)
            found[name] = [words.get(value, str(value)) for value in values]
    return found


def _is_chosen(format: Format, option: str) -> bool:
    """Whether a node lets a person choose: a scaling is one of a few formats."""
    known = option in format.Options.names()
    return known and (option != "scaling" or option in format.layout_options)


def add_routes(preview: Callable[[dict, str], dict]) -> None:
    """Give ComfyUI's server these routes; without one (ComfyUI as a library) nothing happens.

    Args:
        preview: graph, id of a node -> what it would do.
    """
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:
        return
    from aiohttp import web  # ComfyUI's own, there wherever its server is

    async def formats(request: web.Request) -> web.Response:
        return web.json_response(fitting_inputs())

    async def running(request: web.Request) -> web.Response:
        return web.json_response({str(node): plan for node, plan in host.PLANS.items()})

    async def plan(request: web.Request) -> web.Response:
        if server.prompt_queue.get_tasks_remaining():
            return web.json_response({"busy": True})
        try:
            asked = json.loads(await request.text())
            graph, node = asked["prompt"], str(asked["id"])
        except (ValueError, RecursionError, TypeError, KeyError):
            return web.json_response({"error": "write prompt and id as JSON"}, status=400)
        try:
            loop = asyncio.get_running_loop()
            return web.json_response(await loop.run_in_executor(None, preview, graph, node))
        except (QuantError, OSError, TypeError, ValueError) as error:
            return web.json_response({"error": str(error)})

    server.routes.post("/fewbits/plan")(plan)
    server.routes.get("/fewbits/formats")(formats)
    server.routes.get("/fewbits/running")(running)
