"""Recognise model families from key names, and load the preset of each; all knowledge is in
recipes/*.toml.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, product
from pathlib import Path

from ..errors import RecipeError, closest
from ..spec import TensorSpec

if sys.version_info >= (3, 11):
    import tomllib
else:  # the standard library has it from 3.11 on
    import tomli as tomllib

RECIPES = Path(__file__).parent.parent / "recipes"
WIDTHS, WHY = "widths", "why"  # tables of families.toml that are no families
# Where checkpoints keep their diffusion model; ComfyUI takes a prefix with more than 5 names.
DIFFUSION_PREFIXES, FEW = ("model.diffusion_model.", "net."), 5
# What ComfyUI takes away before it recognises a model (`unet_prefix_from_state_dict`).
READ_PREFIXES = (*DIFFUSION_PREFIXES, "model.model.", "model.")
# Stands before the names of text encoders inside checkpoints, and inside a CLIP.
INSIDE = ".transformer."
# What other tools put before the names; anything else may be a part of the model (PiD has core).
OTHER_TOOLS = (["transformer"], ["diffusion_model"], ["unet"])


@dataclass(frozen=True)
class Group:
    """Layers that a preset keeps or leaves out, and why."""

    match: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Family:
    """One entry of families.toml.

    `keys` must all exist under one common prefix and none of `without`, and tensors of `size` must
    have that many rows; `also` lists other such keys, each of which makes a Family of its own;
    `kind` is "diffusion", "text" or "refuse". `stock` is False where stock ComfyUI would read
    quantized layers of this family as plain numbers. `widths` names the entry of the widths table,
    the family's own name unless stated. `preset` names a file of recipes/, `keep` holds what the
    family keeps besides. `tables` are lookup tables that are never quantized, `plain` are layers
    that ComfyUI builds of torch's own modules, which take no codes. `root` begins the names of
    such models in files, below the prefix that ComfyUI takes away.
    `quantized_since` is the first ComfyUI that reads quantized layers of a family of kind "refuse":
    such layers are copied, and nothing here makes them; `since` is the first that knows the model,
    "" for one before 0.18.2. `sizes` are the encoders of this family
    that ComfyUI builds, by the rows of the tensor `width`. `pattern` is found in most names of a
    file that no keys explain.
    """

    name: str
    title: str
    kind: str
    keys: tuple[str, ...]
    without: tuple[str, ...] = ()
    preset: str = ""
    stock: bool = True
    why: str = ""
    widths: str = ""
    size: tuple[tuple[str, int], ...] = ()
    keep: tuple[Group, ...] = ()
    tables: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    root: str = ""
    quantized_since: str = ""
    since: str = ""
    width: str = ""
    sizes: tuple[tuple[int, str], ...] = ()
    pattern: str = ""

    @property
    def patterns(self) -> tuple[str, ...]:
        """Everything that is known about its layers' names."""
        kept = chain.from_iterable(group.match for group in self.own_preset.exclude)
        return (*self.keys, *width_layers(self.name), *kept)

    @property
    def named(self) -> str:
        """The title with its article."""
        return f"{'an' if self.title[0] in 'AEIOUaeiou' else 'a'} {self.title}"

    @property
    def own_preset(self) -> Preset:
        """What `auto` keeps and leaves out."""
        stated = load_preset(self.preset) if self.preset else Preset(self.name)
        return Preset(stated.name, (*stated.exclude, *self.keep), stated.drop)


@dataclass(frozen=True)
class Part:
    """A recognised model inside a file: everything under `prefix`."""

    family: Family
    prefix: str


@dataclass(frozen=True)
class Preset:
    """`exclude` is kept (or becomes the fallback format), `drop` is left out of the file."""

    name: str
    exclude: tuple[Group, ...] = ()
    drop: tuple[Group, ...] = ()

    @classmethod
    def joined(cls, name: str, parts: Iterable[Preset]) -> Preset:
        """Keeps and leaves out what any of the parts does, in their order."""
        exclude, drop = zip(*((part.exclude, part.drop) for part in parts), strict=True)
        return cls(name, tuple(chain(*exclude)), tuple(chain(*drop)))


def _load(path: Path) -> dict:
    return tomllib.loads(path.read_text(encoding="utf-8"))


@cache
def families() -> tuple[Family, ...]:
    """All families, in the order in which they are tried."""
    table = _load(RECIPES / "families.toml")
    reasons = table[WHY]
    found = []
    for name, entry in table.items():
        if name not in (WIDTHS, WHY):
            family, others = _family(name, dict(entry), reasons), entry.get("also", ())
            found += [family, *(replace(family, keys=tuple(keys)) for keys in others)]
    return tuple(found)


def _family(name: str, entry: dict, reasons: dict[str, str]) -> Family:
    for field in ("keys", "without", "tables", "plain"):
        entry[field] = tuple(entry.get(field, ()))
    entry.pop("also", None)
    sizes = entry.get("sizes", {}).items()
    entry["sizes"] = tuple((int(rows), size) for rows, size in sizes)
    entry["size"] = tuple(entry.get("size", {}).items())
    kept = entry.pop("keep", {}).items()
    groups = tuple(Group(tuple(patterns), reasons[reason]) for reason, patterns in kept)
    return Family(name, **entry, keep=groups)


@cache
def width_layers(family: str | None) -> tuple[str, ...]:
    """Patterns of the layers whose width ComfyUI reads to recognise a family; of all families for
    None.
    """
    table = _load(RECIPES / "families.toml")[WIDTHS]
    if family is not None:
        entry = next((known.widths for known in families() if known.name == family), "")
        return tuple(table.get(entry or family, ()))
    return tuple(dict.fromkeys(chain(*table.values())))


@cache
def preset_names() -> tuple[str, ...]:
    return tuple(sorted({*_preset_files(), *_family_presets()}))


@cache
def _preset_files() -> frozenset[str]:
    return frozenset(path.stem for path in RECIPES.glob("*.toml")) - {"families", "diffusers"}


def _family_presets() -> dict[str, Family]:
    return {family.name: family for family in families() if family.keep and not family.preset}


@cache
def load_preset(name: str) -> Preset:
    """A preset by name, or several joined by `+`; `none` is the empty one.

    Raises:
        RecipeError: no such preset; the message suggests the closest and lists those that exist.
    """
    if "+" in name:
        return Preset.joined(name, map(load_preset, name.split("+")))
    if name == "none":
        return Preset("none")
    if name not in preset_names():
        guess = closest(name, preset_names())
        hint = f", did you mean {guess!r}?" if guess else ";"
        raise RecipeError(
            f"unknown preset {name!r}{hint} known: auto, none, {', '.join(preset_names())}"
        )
    if name not in _preset_files():
        return _family_presets()[name].own_preset
    table = _load(RECIPES / f"{name}.toml")
    own = Preset(name, _groups(table.get("exclude", ())), _groups(table.get("drop", ())))
    return Preset.joined(name, [*map(load_preset, table.get("include", ())), own])


def _groups(entries: Iterable[dict]) -> tuple[Group, ...]:
    return tuple(Group(tuple(entry["match"]), entry["why"]) for entry in entries)


def find_parts(tensors: Iterable[str] | Mapping[str, TensorSpec]) -> tuple[Part, ...]:
    """Every recognised model part of a file, longest prefix first.

    A family matches under a prefix when all its keys exist there; the prefix is read off the first
    key, so nested checkpoints and bare files need no list of known prefixes. The first family that
    fits claims a prefix. Without shapes, a family's `size` is taken as given. Inside a model that
    is recognised nothing is a file of another kind, and no encoder where it has keys of its own.
    """
    specs = tensors if isinstance(tensors, Mapping) else dict.fromkeys(tensors)
    endings: dict[str, list[str]] = {}
    for key in specs:
        for ending in {_ending(key), key.rpartition(".")[2]}:
            endings.setdefault(ending, []).append(key)
    claimed: dict[str, Family] = {}
    for family in families():
        first = family.keys[0]
        for key in endings.get(_ending(first), ()):
            if f".{key}".endswith(f".{first}"):
                prefix = key[: -len(first)]
                if prefix not in claimed and _fits(family, prefix, specs):
                    claimed[prefix] = family
    if not claimed:
        claimed.update(("", family) for family in families() if _named_so(family, specs))
    models = [prefix for prefix, family in claimed.items() if family.kind != "refuse"]
    parts = [
        Part(family, prefix)
        for prefix, family in claimed.items()
        if family.kind != "refuse" or not any(map(prefix.startswith, models))
    ]
    held = [part for whole, part in product(parts, repeat=2) if _holds(whole, part)]
    parts = [part for part in parts if part not in held]
    return tuple(sorted(parts, key=lambda part: (-len(part.prefix), part.family.name)))


def described(part: Part, specs: Mapping[str, TensorSpec]) -> str:
    """The family's title, with the width of a text encoder and the models it fits."""
    family = part.family
    spec = specs.get(part.prefix + family.width)
    if not family.sizes or spec is None or not spec.shape:
        return family.title
    rows = spec.shape[0]
    size = dict(family.sizes).get(rows)
    if size is None:
        known = ", ".join(str(width) for width, _ in family.sizes)
        return f"{family.title} (width {rows}; ComfyUI builds {known})"
    return f"{family.title} (width {rows}, {size})"


def owner_of(name: str, parts: Iterable[Part]) -> Part | None:
    """The part that a tensor or a layer belongs to; `parts` as `find_parts` gives them."""
    return next((part for part in parts if name.startswith(part.prefix)), None)


def is_whole(part: Part, names: Iterable[str]) -> bool:
    """Whether ComfyUI would look at this part at all: it takes no prefix with so few names."""
    return sum(name.startswith(part.prefix) for name in names) > FEW


def why_misplaced(names: Collection[str], parts: Iterable[Part]) -> str | None:
    """Why ComfyUI would not find the diffusion model of a file, or not all of it; None where it
    does. ComfyUI takes away one known prefix, and looks at what stood behind it only. From the file
    of a text encoder it takes none away.
    """
    parts = list(parts)
    diffusion = [part for part in parts if part.family.kind == "diffusion"]
    if not diffusion:
        return _why_no_encoder(parts)
    read = ("", *READ_PREFIXES)
    found = [part for part in diffusion if part.prefix.removesuffix(part.family.root) in read]
    named = [part for part in diffusion if part.prefix.split(".")[-2:-1] in OTHER_TOOLS]
    wrapped = named or (diffusion if _hold_all(diffusion, names) else [])
    if not found and wrapped:
        part = wrapped[0]
        return (
            f"the names of the {part.family.title} model begin with '{part.prefix}', which ComfyUI "
            f"does not take away (it takes {', '.join(READ_PREFIXES)})"
        )
    for part in found:
        stray = _stray(part, names)
        if stray is not None:
            return (
                f"the {part.family.title} model lies under two prefixes: '{part.prefix}', and that "
                f"of '{stray}'; ComfyUI reads one of them"
            )
    return None


def _why_no_encoder(parts: Iterable[Part]) -> str | None:
    """Why ComfyUI would not find a text encoder that is a file of its own."""
    text = [part for part in parts if part.family.kind == "text"]
    if not text or any(part.prefix == part.family.root for part in text):
        return None
    if any(INSIDE in f".{part.prefix}" for part in text):
        return None
    part = text[0]
    begin = f"begin with '{part.prefix}'" if part.prefix else "have no prefix"
    return (
        f"the names of the {part.family.title} {begin}, where ComfyUI finds it "
        f"{f'behind {part.family.root!r}' if part.family.root else 'without a prefix'} only"
    )


def _hold_all(parts: list[Part], names: Collection[str]) -> bool:
    """Whether a file has next to nothing beside these parts: then their prefixes are no names of a
    model's own parts.
    """
    prefixes = tuple(part.prefix for part in parts)
    return sum(not name.startswith(prefixes) for name in names) <= FEW


def _stray(part: Part, names: Collection[str]) -> str | None:
    """A tensor of a diffusion model that is not where the rest of it is."""
    home = part.prefix
    outside = [name for name in names if not (home and name.startswith(home))]
    others = tuple(prefix for prefix in DIFFUSION_PREFIXES if not home.startswith(prefix))
    moved = next((name for name in outside if name.startswith(others)), None)
    if moved is not None or not home:
        return moved
    inside = {_child(name, home) for name in names if name.startswith(home)}
    inside |= {_child(pattern, "") for pattern in part.family.patterns}
    return next((name for name in outside if _child(name, "") in inside), None)


def _holds(whole: Part, part: Part) -> bool:
    """Whether what looks like a text encoder is the language model inside another model: it stands
    where that has keys of its own. What is inside a file of another kind is never one by itself.
    """
    inside = part.prefix != whole.prefix and part.prefix.startswith(whole.prefix)
    if inside and whole.family.kind == part.family.kind == "refuse":
        return True
    if whole.family.kind == "text" or part.family.kind != "text":
        return False
    own = {_child(key, "") for key in whole.family.keys}
    return inside and _child(part.prefix, whole.prefix) in own


def _child(name: str, prefix: str) -> str:
    """The first part of a name below a prefix."""
    return name[len(prefix) :].partition(".")[0]


def _fits(family: Family, prefix: str, specs: Mapping[str, TensorSpec | None]) -> bool:
    if not all(prefix + key in specs for key in family.keys):
        return False
    if any(prefix + key in specs for key in family.without):
        return False
    sized = ((specs.get(prefix + key), rows) for key, rows in family.size)
    return all(spec is None or spec.shape[:1] == (rows,) for spec, rows in sized)


def _named_so(family: Family, names: Collection[str]) -> bool:
    """Whether most names of a file are of this family's kind."""
    if not family.pattern:
        return False
    kind = re.compile(family.pattern)
    return 2 * sum(kind.search(name) is not None for name in names) > len(names)


def _ending(key: str) -> str:
    """The last two parts of a name, by which families find theirs among thousands."""
    return ".".join(key.split(".")[-2:])
