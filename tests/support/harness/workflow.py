"""A workflow as the page saves it -> the prompt that the page sends."""

from __future__ import annotations

import json

from .emoji import PACK

TEMPLATES = PACK / "example_workflows"
MUTED = 2  # the mode of a node that the page leaves out

WIDGETS = {
    "COMBO",
    "STRING",
    "INT",
    "FLOAT",
    "BOOLEAN",
}  # types that the page gives a widget; the others are sockets


def graph_of(template: str) -> dict:
    """A template of the pack, by its name."""
    return json.loads((TEMPLATES / f"{template}.json").read_text(encoding="utf-8"))


def prompt_of(server: object, graph: dict) -> dict:
    """Links by slot, widget values in the order of the inputs; a socket that is not connected is left out."""
    origins = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    prompt = {}
    for item in graph["nodes"]:
        if item["type"] == "MarkdownNote" or item.get("mode") == MUTED:
            continue
        info = server.object_info(item["type"])["input"]
        values = iter(item["widgets_values"])
        inputs = {slot["name"]: origins[slot["link"]] for slot in item["inputs"]}
        declared = {**info.get("required", {}), **info.get("optional", {})}
        for name, (kind, *options) in declared.items():
            socket = bool(options) and options[0].get("forceInput", False)
            widget = not socket and (isinstance(kind, list) or kind in WIDGETS)
            if name not in inputs and widget:
                inputs[name] = next(values)
                if name == "seed":
                    next(values)  # "control after generate" belongs to the page alone
        assert not list(values), item["type"]
        prompt[str(item["id"])] = {"class_type": item["type"], "inputs": inputs}
    return prompt
