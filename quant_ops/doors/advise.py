"""advise: which formats suit a model, a GPU and a ComfyUI, the best first, and why; reads headers
only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...kernels.choice import beats_kitchen
from ..bench import NATIVE, WORDS, kernel_report
from ..checkpoint.importers.source import open_checkpoint
from ..errors import QuantError, RecipeError, visible
from ..options import as_json
from ..pipeline import plan_source
from ..planning.advice import Bench, Known, Speed, known_ways, oldest_comfyui
from ..planning.goal import FOR_THE_REST
from ..planning.gpus import Card
from ..planning.recipe import Draft, Wish
from ..report.report import megabytes
from ..sources import TensorSource
from ..spec import ModelPlan, version_key
from .fit import file_size

# How a layer is multiplied: its codes by units of the GPU, decoded first, or by plain PyTorch.
PRODUCTS = ("native", "emulated", "eager")
WORST = 2  # the quality that is visibly different
PICTURE = 4096  # rows of x that decide: a picture of 1024 x 1024


@dataclass(frozen=True)
class Product:
    """How codes are multiplied, one of PRODUCTS, and why. `rate` is that of the GPU's units, x 16
    bit, where they do it.
    """

    kind: str
    why: str
    rate: int = 1


@dataclass(frozen=True)
class Advised:
    """One way to quantize the model. `fits` is None where no memory is known to fit into."""

    known: Known
    plan: ModelPlan
    file_bytes: int
    fits: bool | None
    room: int | None
    opens: str | None  # "stock", "FewBits", or None: not in this ComfyUI
    product: Product
    speed: Speed

    @property
    def wish(self) -> Wish:
        return self.known.wish

    @property
    def reason(self) -> str:
        """Why it stands where it stands, in words."""
        parts = [self._room, f"{self.product.kind}: {self.product.why}", self.known.seen]
        if self.opens is None:
            parts.insert(0, f"does not open: it needs ComfyUI {self.plan.min_comfyui}")
        return "; ".join(filter(None, parts))

    @property
    def _room(self) -> str:
        if self.room is None:
            return ""
        sizes = f"{megabytes(self.plan.bytes_after)} of {megabytes(self.room)}"
        if self.fits:
            return f"fits: {sizes} for weights"
        return f"does not fit: {sizes} for weights, so ComfyUI moves a part at every step"

    def to_json(self) -> dict:
        return {
            "wish": self.wish.to_text(),
            "format": self.wish.format,
            "file_bytes": self.file_bytes,
            "weight_bytes": self.plan.bytes_after,
            "fits": self.fits,
            "opens": self.opens,
            "loads_in": self.plan.loads_in(),
            "product": self.product.kind,
            "why": self.product.why,
            "speed": self.speed.text,
            "speed_ratio": self.speed.ratio,
            "ssim": self.known.ssim,
            "seen": self.known.seen,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Considered:
    """A model's name; for every way to quantize it what is known, the plan, and bytes of its
    file.
    """

    model: str
    ways: tuple[tuple[Known, ModelPlan, int], ...]


@dataclass(frozen=True)
class Advice:
    """All ways for one model, the best first; `whole` says how the model as it is fares."""

    model: str
    family: str
    bytes_before: int
    card: Card | None
    comfyui: str | None
    ways: tuple[Advised, ...]

    @property
    def best(self) -> Advised:
        return self.ways[0]

    @property
    def whole(self) -> str:
        """How the model fares as it is."""
        size = megabytes(self.bytes_before)
        if self.card is None:
            return f"{size} as it is"
        room = room_of(self.card)
        if self.bytes_before > room:
            return f"{size} as it is, which is more than {megabytes(room)} for weights"
        return f"{size} as it is, which fits too: quantizing gains disk and speed only"

    def to_json(self) -> dict:
        card = self.card
        gpu = card and {"name": card.name, "sm": card.gpu.sm, "memory_bytes": card.memory}
        return {
            "model": self.model,
            "family": self.family,
            "bytes_before": self.bytes_before,
            "whole": self.whole,
            "gpu": gpu,
            "comfyui": self.comfyui,
            "best": self.best.wish.to_text(),
            "formats": as_json(self.ways),
        }

    def to_text(self) -> str:
        return "\n".join(map(visible, self._lines()))

    def _lines(self) -> Iterator[str]:
        yield f"{self.model}, {self.family}: {self.whole}"
        yield f"GPU: {self.card.label} ({self.card.gpu.sm})" if self.card else "GPU: none here"
        if self.comfyui:
            yield f"ComfyUI {self.comfyui}"
        yield ""
        yield (
            f"{'':>2} {'format':<30} {'file':>10} {'weights':>10} {'fits':<4} {'opens in':<16} "
            f"{'product':<9} {'SSIM':<5}  speed"
        )
        for place, way in enumerate(self.ways, 1):
            yield _row(place, way)
        yield ""
        yield f"take {self.best.wish.to_text()}: {self.best.reason}"


def _row(place: int, way: Advised) -> str:
    fits = {True: "yes", False: "no", None: "-"}[way.fits]
    where = "FewBits" if way.plan.requires_pack else f"ComfyUI {way.plan.min_comfyui}"
    if way.opens == "FewBits":
        where = "FewBits"
    if way.opens is None:
        where = "not in this one"
    return (
        f"{place:>2} {way.wish.to_text():<30} {megabytes(way.file_bytes):>10} "
        f"{megabytes(way.plan.bytes_after):>10} {fits:<4} {where:<16} {way.product.kind:<9} "
        f"{way.known.ssim:.3f}  {way.speed.text}"
    )


def advise_file(
    path: str | os.PathLike,
    card: Card | None,
    *,
    draft: Draft = Draft(),  # noqa: B008  (frozen)
    comfyui: str | None = None,
    bench: Bench | None = None,
) -> Advice:
    """`advise` for a file, an index or a folder of shards."""
    with open_checkpoint(path) as source:
        return advise(source, card, draft=draft, comfyui=comfyui, bench=bench)


def advise(
    source: TensorSource,
    card: Card | None,
    *,
    draft: Draft = Draft(),  # noqa: B008  (frozen)
    comfyui: str | None = None,
    bench: Bench | None = None,
) -> Advice:
    """Every way to quantize a model, in the order in which they suit a GPU and a ComfyUI.

    First what opens; of that, what does not look visibly different; what fits into the memory that
    is left for weights, then by what pictures look like; where a way does not fit, by its size.
    Among equals: the faster as measured, or else what is multiplied natively; then the closest to
    the original.

    Args:
        card: None where there is no GPU: nothing has to fit, and nothing is native.
        draft: the user's own rules and preset; they count for sizes.
        comfyui: its version, such as "0.30.0"; None for the newest.
        bench: speeds measured on that GPU, in place of those that are known.

    Raises:
        RecipeError: a version that is none.
        QuantError: nothing can be done with this model; see `plan_source`.
    """
    return ranked(planned_ways(source, draft), card, comfyui=comfyui, bench=bench)


def planned_ways(
    source: TensorSource,
    draft: Draft = Draft(),  # noqa: B008  (frozen)
) -> Considered:
    """The plan of every way to quantize a model, and the exact size of its file; the part of the
    advice that no GPU changes.

    Raises:
        QuantError: nothing can be done with this model; see `plan_source`.
    """
    found, refusals = [], []
    for known in known_ways():
        recipe = replace(draft, primary=known.wish).finish()
        try:
            plan = plan_source(source, recipe)
        except QuantError as error:
            refusals.append(error)
            continue
        if any(layer.format for layer in plan.layers):
            found.append((known, plan, file_size(plan)))
    if found:
        return Considered(source.name, tuple(found))
    if refusals:
        raise refusals[0]
    raise RecipeError(f"{source.name}: there is no layer to quantize")


def ranked(
    considered: Considered,
    card: Card | None,
    *,
    comfyui: str | None = None,
    bench: Bench | None = None,
) -> Advice:
    """The advice about planned ways, as `advise` gives it."""
    version = _version(comfyui)
    ways = []
    for known, plan, file_bytes in considered.ways:
        speed = bench.speed(known.wish) if bench else _known_speed(known, card)
        ways.append(_way(known, plan, card, version, speed=speed, file_bytes=file_bytes))
    first = ways[0].plan
    return Advice(
        model=considered.model,
        family=first.family_title or first.family,
        bytes_before=first.bytes_before,
        card=card,
        comfyui=comfyui,
        ways=tuple(sorted(ways, key=_place)),
    )


def room_of(card: Card) -> int:
    """Bytes of its memory for weights: the rest is left to activations and the system."""
    return int((1 - FOR_THE_REST) * card.memory)


def _version(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return (*version_key(text.strip().removeprefix("v")), 0, 0)[:3]
    except ValueError:
        raise RecipeError(f"ComfyUI's version is written as 0.30.0, got {text!r}") from None


def _known_speed(known: Known, card: Card | None) -> Speed:
    where = card.gpu.sm if card else "a CPU"
    return Speed(known.speeds.get(where), where)


def _way(
    known: Known,
    plan: ModelPlan,
    card: Card | None,
    version: tuple[int, ...] | None,
    speed: Speed,
    file_bytes: int,
) -> Advised:
    room = room_of(card) if card else None
    opens = _opens(plan, version)
    return Advised(
        known=known,
        plan=plan,
        file_bytes=file_bytes,
        fits=None if room is None else plan.bytes_after <= room,
        room=room,
        opens=opens,
        product=product_of(known, card, by_us=opens == "FewBits"),
        speed=speed,
    )


def _opens(plan: ModelPlan, version: tuple[int, ...] | None) -> str | None:
    """What opens the file there: ComfyUI alone, ComfyUI with FewBits, or nothing."""
    if version is None:
        if plan.requires_pack:
            return "FewBits"
        return "stock"
    if not plan.requires_pack and version >= version_key(plan.min_comfyui):
        return "stock"
    if version >= version_key(oldest_comfyui()):
        return "FewBits"
    return None


def product_of(known: Known, card: Card | None, *, by_us: bool) -> Product:
    """How the codes are multiplied on a card.

    Args:
        by_us: whether FewBits runs the format; else ComfyUI by comfy-kitchen does, unless a product
            of ours was measured to be faster there.
    """
    if card is None:
        return Product("eager", "no GPU: decoded, then multiplied by PyTorch")
    if by_us or (known.kernel and beats_kitchen(known.kernel, card.gpu)):
        return _ours(known, card)
    if card.gpu.amd:
        return Product("emulated", "AMD GPU, of which no units are known here")
    unit = known.unit
    if known.has_unit(card):
        why = f"multiplied by {unit.spoken} units, by comfy-kitchen"
        return Product("native", why, unit.rate)
    if unit is None:
        return Product("emulated", "nothing multiplies these codes: decoded to 16 bit first")
    since = known.since.replace(".", "")
    return Product(
        "emulated",
        f"{card.gpu.sm} has no {unit.spoken} product (from sm_{since} on): decoded to 16 bit first",
    )


def _ours(known: Known, card: Card) -> Product:
    """What FewBits' own table of kernels says for a whole picture."""
    (report,) = kernel_report([known.wish.format], card.gpu, rows=(PICTURE,))
    decision = report["rows"][PICTURE]
    words = WORDS[decision["backend"]]
    if decision["backend"] in NATIVE:
        return Product("native", f"{words}, by FewBits")
    reasons = [*decision["why_not"].values(), decision["why"]]
    why = f": {reasons[0]}" if reasons[0] else ""
    kind = "eager" if decision["backend"] == "eager" else "emulated"
    return Product(kind, f"{words}{why}")


def _place(way: Advised) -> tuple:
    """The smallest comes first; see `advise`."""
    known = way.known
    if known.quality == WORST:
        return way.opens is None, 1, -known.cosine
    if way.fits is False:
        size = round(way.plan.bytes_after / way.plan.bytes_before, 1)
        return way.opens is None, 0, 1, size, _pace(way), -known.cosine
    return way.opens is None, 0, 0, known.quality, _pace(way), -known.cosine


def _pace(way: Advised) -> int:
    """As measured, else by what multiplies it; units of four times the speed before all others."""
    if way.speed.pace is not None:
        return way.speed.pace
    return PRODUCTS.index(way.product.kind) - (way.product.rate > 2)


def chosen_wish(
    source: TensorSource, card: Card | None, draft: Draft, comfyui: str | None = None
) -> Wish:
    """What `auto` stands for as a format: the best of the advice.

    Raises:
        QuantError: see `advise`.
    """
    return advise(source, card, draft=draft, comfyui=comfyui).best.wish
