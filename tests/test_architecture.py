"""Who may import whom (docs/architecture.md): every import is resolved to a room and held against two tables."""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "kernels": {"kernels"},
    "quant_ops": {"kernels", "quant_ops"},
    "nodes": {"quant_ops", "nodes"},
}
INSIDE = {  # rooms of quant_ops, lowest first; a room may import those in lines above and its own
    "ground": {"errors", "options", "files", "part", "reference", "spec", "sources", "strict_json",
               "version", "workers"},
    "parts": {"formats", "methods", "calibration", "checkpoint", "report"},
    "planning": {"planning"},
    "engines": {"pipeline", "layouts", "bench", "doors"},
    "doors": {"cli", "compat"},
}  # fmt: skip
ONLY_IN = {
    "comfy": "nodes/bridge/", "folder_paths": "nodes/bridge/", "server": "nodes/bridge/", "comfy_api": "nodes/",
    "triton": "kernels/triton/", "comfyui_version": "nodes/bridge/",
}  # fmt: skip
OUR_ROOMS = {"kernels", "quant_ops", "nodes", "fewbits"}


@cache
def nodes_of(text: str) -> list[ast.AST]:
    """Every node of a file's syntax tree; most tests here ask for those of all files."""
    return list(ast.walk(ast.parse(text)))


def imports() -> Iterator[tuple]:
    """(file, room path imported relative to the root, or None; absolute top-level name, or None)"""
    for room in MAY_IMPORT:
        for path in (ROOT / room).rglob("*.py"):
            package = path.relative_to(ROOT).parent.parts
            for node in nodes_of(path.read_text(encoding="utf-8")):
                if isinstance(node, ast.Import):
                    yield from ((path, None, alias.name.split(".")[0]) for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    yield path, None, node.module.split(".")[0]
                elif isinstance(node, ast.ImportFrom):
                    base = (
                        *package[: len(package) - node.level + 1],
                        *filter(None, (node.module or "").split(".")),
                    )
                    for alias in node.names:
                        yield path, base if len(base) > 1 else (*base, alias.name), None


def imported_names():
    return {name for _, _, name in imports() if name}


def relative(path):
    return path.relative_to(ROOT).as_posix()


def test_rooms_import_only_the_rooms_below_them():
    wrong = [
        f"{relative(p)}: {'.'.join(t)}"
        for p, t, _ in imports()
        if t and t[0] not in MAY_IMPORT[p.relative_to(ROOT).parts[0]]
    ]
    assert not wrong


def test_inside_quant_ops_the_order_holds():
    level = {name: i for i, names in enumerate(INSIDE.values()) for name in names}
    wrong = []
    for path, target, _ in imports():
        parts = path.relative_to(ROOT).with_suffix("").parts
        if (
            not target
            or parts[0] != "quant_ops"
            or target[0] != "quant_ops"
            or parts[1] == "__init__"
        ):
            continue
        here, there = level[parts[1]], level.get(target[1], 99)
        siblings = {parts[1], target[1]} == {"formats", "methods"}
        if there > here or siblings:
            wrong.append(f"{relative(path)}: {'.'.join(target)}")
    assert not wrong


def test_the_tables_name_rooms_that_exist():
    named = [
        *MAY_IMPORT,
        *ONLY_IN.values(),
        *(f"quant_ops/{room}" for room in set().union(*INSIDE.values())),
    ]
    assert [
        room for room in named if not ((ROOT / room).exists() or (ROOT / f"{room}.py").exists())
    ] == []


def test_an_extra_for_plots_exists_only_if_something_plots():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert ("plots" in extras["optional-dependencies"]) == ("matplotlib" in imported_names())


# What ComfyUI alone brings, and with the extras what is named otherwise when imported.
COMFYUIS = {*ONLY_IN, "aiohttp"}
IMPORTED_AS = {"google-re2": "re2", "comfy-kitchen": "comfy_kitchen"}
BROUGHT = {"PIL"}  # by both extras that draw


def test_what_is_imported_is_required():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    stated = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    for wanted in extras["optional-dependencies"].values():
        stated += wanted
    names = [re.match(r"[\w-]+", line)[0] for line in stated]
    required = {IMPORTED_AS.get(name, name) for name in names} | BROUGHT
    foreign = imported_names() - set(sys.stdlib_module_names) - OUR_ROOMS - COMFYUIS
    assert foreign - required == set()


def test_foreign_modules_stay_in_their_room():
    wrong = [
        f"{relative(p)}: {name}"
        for p, _, name in imports()
        if name in ONLY_IN and not relative(p).startswith(ONLY_IN[name])
    ]
    assert not wrong


def test_our_own_rooms_are_never_imported_absolutely():
    """Inside ComfyUI, `nodes` and `quant_ops` are ComfyUI's. What exists only when installed has to use the name."""
    found = [f"{relative(p)}: {name}" for p, _, name in imports() if name in OUR_ROOMS]
    assert [line for line in found if "/installed/" not in line] == []


# Where format names stand: their own room, the classic tool's table, what the Quantize nodes offer, and the second
# decoder, which shares nothing with the formats.
NAMED_IN = (
    "quant_ops/formats/",
    "quant_ops/cli/arguments.py",  # help without torch; a test compares
    "quant_ops/compat/flags.py",
    "quant_ops/reference.py",
    "nodes/quantize_",
)


def format_names() -> set[str]:
    """Names that files and users write, those that are only read included."""
    from fewbits.quant_ops.formats import FORMATS

    return {name for format in FORMATS.values() for name in (format.name, *format.read_as)}


def pieces(names: set[str]) -> set[str]:
    """`bnb_`, `_blockwise`: what code would look for in a name to learn what the format is."""
    cuts = [(name, i) for name in names for i, char in enumerate(name) if char == "_"]
    return {name[: i + 1] for name, i in cuts} | {name[i:] for name, i in cuts}


def texts(path: Path) -> Iterator[ast.Constant]:
    """String constants of a file, docstrings excepted."""
    nodes = nodes_of(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = (node.body for node in nodes if isinstance(node, documented) and node.body)
    docstrings = {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}
    for node in nodes:
        text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if text and id(node) not in docstrings:
            yield node


def test_format_names_stand_in_their_room_only():
    names = format_names()
    named = re.compile(rf"(?<!\w)({'|'.join(sorted(names, key=len, reverse=True))})(?!\w)")
    found = [
        f"{relative(path)}:{text.lineno}: {text.value!r}"
        for room in MAY_IMPORT
        for path in (ROOT / room).rglob("*.py")
        if not relative(path).startswith(NAMED_IN)
        for text in texts(path)
        if named.search(text.value) or text.value in pieces(names)
    ]
    assert not found


# ---- air ----

COLUMNS = 100
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def shipped() -> list[Path]:
    rooms = [path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py")]
    return [*sorted(rooms), ROOT / "__init__.py", ROOT / "dev.py"]


def nested(text: str, kinds: type | tuple[type, ...]) -> list[int]:
    """The lines where an expression of these kinds stands inside another one."""
    outer = [node for node in nodes_of(text) if isinstance(node, kinds)]
    inner = [node for found in outer for node in ast.walk(found) if node is not found]
    return sorted({node.lineno for node in inner if isinstance(node, kinds)})


def in_all_files(lines_of: Callable[[str], list[int]]) -> list[str]:
    found = []
    for path in shipped():
        lines = lines_of(path.read_text(encoding="utf-8"))
        found += [f"{relative(path)}:{line}" for line in lines]
    return found


def test_no_line_is_longer_than_a_hundred_columns():
    def long(text: str) -> list[int]:
        return [i for i, line in enumerate(text.splitlines(), 1) if len(line) > COLUMNS]

    assert in_all_files(long) == []


def test_a_choice_does_not_stand_inside_a_choice():
    assert in_all_files(lambda text: nested(text, ast.IfExp)) == []


def test_a_comprehension_does_not_stand_inside_a_comprehension():
    assert in_all_files(lambda text: nested(text, COMPREHENSIONS)) == []


def per_thousand(kinds: type | tuple[type, ...]) -> float:
    """How many expressions of these kinds stand in 1000 shipped lines."""
    texts = [path.read_text(encoding="utf-8") for path in shipped()]
    lines = sum(len(text.splitlines()) for text in texts)
    found = [node for node in chain(*map(nodes_of, texts)) if isinstance(node, kinds)]
    return 1000 * len(found) / lines


def two_loops(text: str) -> list[int]:
    nodes = nodes_of(text)
    return [
        node.lineno
        for node in nodes
        if isinstance(node, COMPREHENSIONS) and len(node.generators) > 1
    ]


def test_choices_are_few():
    """Calm projects have 3 to 10 conditional expressions in 1000 lines."""
    assert per_thousand(ast.IfExp) <= 10


def test_comprehensions_are_few():
    """13.4 build a list, a set or a dictionary; the others are mostly what any() or sum() takes."""
    assert per_thousand(COMPREHENSIONS[:3]) <= 13.4
    assert per_thousand(COMPREHENSIONS) <= 23.6


def test_a_comprehension_has_one_loop():
    assert in_all_files(two_loops) == []


def test_what_is_nested_is_found():
    text = "a = 1 if b else 2 if c else 3\nd = [x for y in z if any(w for w in y)]\n"
    assert nested(text, ast.IfExp) == [1]
    assert nested(text, COMPREHENSIONS) == [2]
