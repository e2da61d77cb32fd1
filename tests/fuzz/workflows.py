"""Workflows that no page makes: the pack's nodes with hostile values in some of their inputs."""

from __future__ import annotations

import random

from support.harness.emoji import emoji_workflow

FILE = "diffusion_models/hostile_tiny.safetensors"  # what most file inputs name, so that a run is short
SLOW = ("svd",)  # choices that take a minute for the emoji model
FEW = 2  # inputs of a node that are hostile at once, at most
# Nodes that sample a few hundred times; what they check of their inputs the others check too.
LEFT_OUT = ("FewBitsCompareModels",)

TEXTS = (
    "",
    " ",
    "../../../../etc/passwd",
    "/etc/passwd",
    "..\\..\\windows\\system.ini",
    "C:\\windows\\system.ini",
    "con",
    ".",
    "..",
    "a/../../b",
    "a" * 300,
    "é" * 200,
    "a/" * 200 + "b",
    "line\nbreak\r\n",
    "\x1b[31mred\x1b[0m",
    "nul\x00byte",
    "\ud800",
    "\u202egpj.exe",
    "%2e%2e%2fescaped",
    "~/.ssh/id_rsa",
    "file:///etc/passwd",
    "re:([\\w.]+)+!",
    "re:a{4294967295}",
    "re:(?<=a)b",
    "[" * 10_000,
    "*" * 1_000,
    "{" * 2_000,
    "[primary]\nformat = 5",
    "[primary]\nformat = " + "9" * 5_000,
    "a" + ".a" * 20_000 + " = 1",
    '[[rule]]\npattern = "re:(a+)+$"\nformat = "bf16"',
    "[" * 3_000 + "]" * 3_000,
    "0",
    "-1",
    "1e999 GB",
    "nan",
    "99999999999999999999 GB",
    "50 %",
    "-5 %",
    "x" * 1_000_000,
)
NUMBERS = (
    0,
    1,
    -1,
    2**31,
    2**53,
    -(2**63),
    2**64 - 1,
    10**30,
    1e308,
    1e-308,
    float("nan"),
    float("inf"),
)
ODD = (None, True, [], {}, [[]], ["1", 99], ["nobody", 0], {"a": {"b": []}}, 3.5)


def sources() -> dict:
    """Nodes that every hostile one can be connected to, by the type of their output."""
    emoji = emoji_workflow()
    return {
        "MODEL": (emoji["1"], 0),
        "FEWBITS_RECIPE": ({"class_type": "FewBitsLayerRules", "inputs": {"text": ""}}, 0),
        "LATENT": ({"class_type": "EmptyLatentImage",
                    "inputs": {"width": 16, "height": 16, "batch_size": 1}}, 0),
    }  # fmt: skip


def workflow(dice: random.Random, schemas: dict) -> dict:
    """One of the nodes, as an output or with its report saved, and what it needs."""
    name = dice.choice([name for name in schemas if name not in LEFT_OUT])
    schema = schemas[name]
    prompt: dict = {}
    inputs = _sound(prompt, schema, dice)
    for hostile in dice.sample(list(inputs), min(len(inputs), dice.randint(1, FEW))):
        inputs[hostile] = _hostile(inputs[hostile], dice)
    prompt["node"] = {"class_type": name, "inputs": inputs}
    if not schema["output_node"]:
        for number, kind in enumerate(schema["output"]):
            shown = {"class_type": "PreviewAny", "inputs": {"source": ["node", number]}}
            prompt[f"show_{number}_{kind}"] = shown
    return prompt


def _sound(prompt: dict, schema: dict, dice: random.Random) -> dict:
    """A value for every input, of the kind that the page sends; what they are linked to goes into `prompt`."""
    known = sources()
    inputs = {}
    required = schema["input"].get("required", {})
    for name, (kind, *rest) in {**required, **schema["input"].get("optional", {})}.items():
        about = rest[0] if rest else {}
        if kind in known:
            source, slot = known[kind]
            prompt[kind] = source
            inputs[name] = [kind, slot]
        elif isinstance(kind, list) or kind == "COMBO":
            choices = kind if isinstance(kind, list) else about.get("options", [])
            tiny = [choice for choice in choices if "hostile_tiny" in str(choice)]
            quick = [choice for choice in choices if choice not in SLOW]
            inputs[name] = dice.choice(tiny or quick or [""])
        elif kind in ("STRING", "INT", "FLOAT", "BOOLEAN"):
            inputs[name] = about.get("default", "")
        elif name in required:
            inputs[name] = ["nobody", 0]
    return inputs


def _hostile(value: object, dice: random.Random) -> object:
    if isinstance(value, str) and dice.random() < 0.8:
        text = dice.choice(TEXTS)
        return text if dice.random() < 0.7 else f"{value}{text}"
    return dice.choice((*NUMBERS, *ODD, *TEXTS))
