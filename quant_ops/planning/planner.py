"""Header + recipe -> ModelPlan: format, method, reason and exact bytes for every layer, before any
weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain

from ..checkpoint.host_layers import HostLayer, host_layer, is_bank
from ..checkpoint.importers.source import split_name
from ..checkpoint.labels import EMBEDDING
from ..checkpoint.metadata import header_markers, output_metadata
from ..errors import CheckpointError, RecipeError, SourceError
from ..formats import FORMATS, Format, FormatOptions, get_format
from ..formats.base import marker_bytes
from ..spec import (
    FLOAT_DTYPES,
    Header,
    LayerInput,
    LayerPlan,
    ModelPlan,
    TensorSpec,
    version_key,
)
from ..version import VERSION
from .match import matches_any
from .model_family import (
    DIFFUSION_PREFIXES,
    FEW,
    Family,
    Part,
    find_parts,
    is_whole,
    load_preset,
    owner_of,
    why_misplaced,
    width_layers,
)
from .recipe import Recipe, recipe_to_toml
from .rules import CompiledRule, Decision, RuleList, Tally, compile_rules
from .wish import Wish

SMALLEST_SIDE = 16  # smaller layers gain nothing, and some kernels refuse them
READS_WIDTH = "ComfyUI reads its width to recognise the model"
TABLE = "lookup table, which ComfyUI reads only as it is"
OUTSIDE = "stands beside the models that ComfyUI reads quantized in a checkpoint"
# Where checkpoints keep text encoders: `text_encoder_key_prefix` of comfy/supported_models.py.
ENCODERS = ("text_encoders.", "text_encoder.", "cond_stage_model.", "conditioner.embedders.")
PLAIN = "stands beside the diffusion model, where ComfyUI reads no codes"
MAYBE_TABLE = "could be a lookup table"
# Names of lookup tables in published models, and how tall one is: the widest layer that multiplies
# without a bias is 9 times as high as wide (Flux.2), the lowest vocabulary 18 times (Qwen 7B).
TABLE_NAMES = (
    "part:*embed*",
    "part:*embd*",
    "part:*emb",
    "part:*embs",
    "part:*_token",
    "part:*_tokens",
)
TABLE_NAMES += ("part:*table*", "part:*codebook*", "part:wte", "part:wpe", "part:shared")
TABLE_RATIO, TABLE_ROWS = 16, 1000
LISTED = 5  # layers named in one warning
UNKNOWN = Family("unknown", "diffusion model of unknown family", "diffusion", (), preset="generic")


def make_plan(
    header: Header,
    recipe: Recipe,
    markers: dict[str, dict] | None = None,
    clashes: set[str] | None = None,
) -> ModelPlan:
    """Decide everything about a model from its header.

    Args:
        markers: base name -> `comfy_quant` object of layers that are quantized already; the
            header's own entries are used when it has any (ComfyUI does the same).
        clashes: takes the names of layers that are quantized otherwise than the recipe asks, which
            are refused without it.

    Raises:
        RecipeError: unknown preset, or a source that must not be quantized (VAE, ControlNet,
            diffusers names), or layers that are quantized already and would have to be quantized
            again.
        CheckpointError: an already quantized layer whose tensors do not fit its marker.
    """
    parts = find_parts(header.tensors)
    refused = [part for part in parts if part.family.kind == "refuse"]
    known = [part for part in parts if part.family.kind != "refuse"]
    known += _unknown_parts(header.tensors, parts)
    if refused and not known and recipe.primary:
        family = refused[0].family
        raise SourceError(f"this is {family.named} file: {family.why}")
    misplaced = why_misplaced(header.tensors, known)
    if misplaced and recipe.primary:
        raise SourceError(f"{misplaced}; give all of them a prefix that it reads, or none")
    stored = header_markers(header.metadata) or markers or {}
    return _Planner(header, recipe, stored, known, refused=refused, clashes=clashes).plan()


def stored_markers_needed(header: Header) -> list[str]:
    """Names of the `comfy_quant` tensors that must be read because the header metadata does not
    list the layers.
    """
    if header_markers(header.metadata):
        return []
    return [name for name in header.tensors if name.removesuffix(".comfy_quant") not in ("", name)]


class _Planner:
    """State of one `make_plan` call."""

    def __init__(
        self,
        header: Header,
        recipe: Recipe,
        markers: dict[str, dict],
        parts: list[Part],
        refused: list[Part],
        clashes: set[str] | None,
    ):
        self.header, self.recipe, self.markers = header, recipe, markers
        self.refused, self.clashes = refused, clashes
        self.all_parts = sorted((*parts, *refused), key=lambda part: -len(part.prefix))
        self.warnings: list[str] = list(header.warnings)
        self.maybe_tables: list[str] = []
        self.parts, self.main = parts, _main_parts(parts)
        self.checkpoint = any(part.prefix.startswith(DIFFUSION_PREFIXES) for part in self.main)
        main = [(part.prefix, self._preset(part)) for part in self.main]
        main = main or [("", self._preset(None))]
        others = [part for part in parts if part not in self.main]
        names = header.weights()
        self.rules = RuleList(compile_rules(recipe, main, others, names, known=bool(parts)))
        if recipe.layer_config:
            self.warnings += recipe.layer_config.warnings

    def _preset(self, part: Part | None):
        if self.recipe.preset != "auto":
            return load_preset(self.recipe.preset)
        if part is None or part.family is UNKNOWN:
            if self.recipe.primary:
                self.warnings.append(
                    "model family not recognised: the generic rule keeps embeddings, norms, "
                    "modulation, first and last projections; name a preset or keep layers with a "
                    "rule if that is not enough"
                )
            return load_preset("generic")
        return part.family.own_preset

    def plan(self) -> ModelPlan:
        planned = [self._layer(base, specs) for base, specs in self._units()]
        layers = tuple(layer for layer, _ in planned)
        tally = Tally(self.rules, (decision for _, decision in planned if decision))
        quantized = [layer for layer in layers if layer.format]
        since = chain(*map(self._since, quantized))
        min_comfyui = max(since, key=version_key, default="")
        unstocked = sorted(
            {
                part.family.title
                for part in self.parts
                if not part.family.stock and self._has(part, quantized)
            }
        )
        if unstocked:
            self.warnings.append(
                f"{', '.join(unstocked)}: stock ComfyUI reads it quantized only with FewBits "
                "installed"
            )
        requires_pack = bool(unstocked) or any(_needs_pack(layer) for layer in quantized)
        self.warnings += tally.warnings()
        if self.maybe_tables:
            self.warnings.append(
                f"kept, as they could be lookup tables: {_listed(self.maybe_tables)}; a rule that "
                "names a layer quantizes it"
            )
        return ModelPlan(
            layers=layers,
            metadata=self._metadata(layers, min_comfyui, requires_pack),
            family=", ".join(dict.fromkeys(part.family.name for part in self.main)) or "unknown",
            recognised=self._recognised(),
            min_comfyui=min_comfyui,
            requires_pack=requires_pack,
            unmatched=tally.unmatched(),
            warnings=tuple(self.warnings),
            rules=tally.uses(),
            recipe=recipe_to_toml(self.recipe) if self.recipe.primary else "",
            family_title=", ".join(dict.fromkeys(part.family.title for part in self.main)),
        )

    def _recognised(self) -> bool:
        """Whether what the file is about is known, and where ComfyUI finds it."""
        names = self.header.tensors
        known = [part for part in self.main if part.family is not UNKNOWN]
        if not known:
            return bool(self.refused)
        return any(is_whole(part, names) for part in known) and not why_misplaced(names, known)

    def _has(self, part: Part, layers: Iterable[LayerPlan]) -> bool:
        return any(
            layer.name.startswith(part.prefix) and self._owner(layer.name) is part
            for layer in layers
        )

    def _since(self, layer: LayerPlan) -> Iterable[str]:
        """The first ComfyUI that reads a quantized layer's format, and its part."""
        yield _min_comfyui(layer)
        owner = self._owner(layer.name)
        if owner and owner.family.since:
            yield owner.family.since
        for part in self.refused:
            if part.family.quantized_since and layer.name.startswith(part.prefix):
                yield part.family.quantized_since

    def _owner(self, base: str) -> Part | None:
        return owner_of(base, self.parts)

    def _metadata(
        self, layers: tuple[LayerPlan, ...], min_comfyui: str, requires_pack: bool
    ) -> dict[str, str]:
        source = self.header.metadata
        made_here = any(layer.action == "quantize" for layer in layers)
        # A plain copy of a FewBits file keeps saying what made its codes.
        said = {"fewbits.version": VERSION, "fewbits.recipe": self.recipe.to_text()}
        if not made_here:
            said |= {key: source[key] for key in said if key in source}
        return output_metadata(
            source,
            {layer.name: layer.marker for layer in layers if layer.marker is not None},
            version=said["fewbits.version"],
            recipe=said["fewbits.recipe"],
            min_comfyui=min_comfyui,
            requires_pack=requires_pack,
        )

    def _units(self) -> Iterable[tuple[str, list[TensorSpec]]]:
        """Tensors grouped into layers, in source order: a quantized layer owns its side tensors,
        all else is single.
        """
        grouped: dict[str, list[TensorSpec]] = {}
        for name, spec in self.header.tensors.items():
            base, _, suffix = name.rpartition(".")
            quantized = base in self.markers or base in self.header.left
            if (quantized and suffix != "bias") or suffix == "weight":
                grouped.setdefault(base, []).append(spec)
            else:
                grouped[name] = [spec]
        missing = next(
            (base for base in self.markers if f"{base}.weight" not in self.header.tensors), None
        )
        if missing is not None:
            raise CheckpointError(
                f"layer '{missing}' is marked as quantized but has no weight; try `fewbits repair`"
            )
        return grouped.items()

    def _layer(self, base: str, specs: list[TensorSpec]) -> tuple[LayerPlan, Decision | None]:
        """What becomes of one layer, and what the rules said; None for what no rule speaks of."""
        scope = self._scope(base)
        dropped = self.rules.drop(base, scope)
        if dropped:
            rule = dropped.rule
            plan = LayerPlan(base, "drop", rule.why, tuple(specs), outputs=(), rule=rule.label)
            return plan, dropped
        if base in self.header.left:
            return self._leave(base, specs), self.rules.notice(base, scope)
        if base in self.markers:
            return self._recode(base, specs)
        (spec,) = specs
        obstacle = not_a_candidate(spec) or self._fixed(base)
        if obstacle:
            noticed = None
            if spec.name.endswith(".weight"):
                noticed = self.rules.notice(base, scope)
            return _keep(base, spec, obstacle), noticed
        layer = LayerInput(
            (spec.shape[0], spec.shape[1]), spec.dtype, f"{base}.bias" in self.header.tensors
        )
        decision = self.rules.decide(base, scope, layer)
        rule = decision.rule
        if rule.wish is None:
            plan = _keep(base, spec, decision.reason)
        elif self._maybe_table(base, layer) and not rule.users:
            self.maybe_tables.append(base)
            plan = _keep(
                base, spec, f"{decision.reason}; {MAYBE_TABLE}", requested=rule.wish.format
            )
        else:
            plan = self._quantize(base, spec, layer, rule, reason=decision.reason)
        return replace(plan, rule=rule.label), decision

    def _fixed(self, base: str) -> str | None:
        """Why a layer can never be quantized although its shape allows it."""
        whole = owner_of(base, self.all_parts)
        if whole and whole.family.kind == "refuse":
            return f"{whole.family.title}: {whole.family.why}"
        owner = self._owner(base)
        if owner:
            below = base[len(owner.prefix) :]
            if matches_any(owner.family.tables, below):
                return TABLE
            if matches_any(owner.family.plain, below):
                return PLAIN
        elif self.checkpoint and not base.startswith(ENCODERS):
            return OUTSIDE
        return self.header.fixed.get(base)

    def _maybe_table(self, base: str, layer: LayerInput) -> bool:
        """Whether a matrix of an unknown model could be looked up instead of multiplied."""
        if layer.bias or not self._unknown(base) or EMBEDDING.fullmatch(base):
            return False
        rows, width = layer.shape
        tall = rows >= TABLE_ROWS and rows >= TABLE_RATIO * width
        return tall or matches_any(TABLE_NAMES, base)

    def _unknown(self, base: str) -> bool:
        owner = self._owner(base)
        if owner:
            return owner.family is UNKNOWN
        return not self.parts

    def _scope(self, base: str) -> str | None:
        """The prefix of the part a layer belongs to; all layers of an unrecognised model are one
        part.
        """
        owner = self._owner(base)
        if owner:
            return owner.prefix
        if self.parts:
            return None
        return ""

    def _quantize(
        self, base: str, spec: TensorSpec, layer: LayerInput, rule: CompiledRule, reason: str
    ) -> LayerPlan:
        requested = rule.wish.format
        wish, obstacles = _fitting(base, layer, rule.wish)
        steps = [reason, *obstacles]
        if wish is None:
            return _keep(base, spec, "; ".join(steps), requested=requested)
        name, options = wish.format, wish.options
        format = get_format(name)
        steps += format.notes(layer, options)
        if EMBEDDING.fullmatch(base) and format.embedding_min_comfyui is None:
            return _keep(base, spec, "embedding table", requested=requested)
        packed = format.tensor_specs(layer, options)["weight"][1] != layer.shape
        if packed and self._width_is_read(base):
            if format.native or not rule.users:
                if rule.users:
                    self.warnings.append(f"layer '{base}' does not become {name}: {READS_WIDTH}")
                return self._unpacked(
                    base, spec, layer, rule, reason="; ".join([*steps, READS_WIDTH])
                )
            self.warnings.append(
                f"layer '{base}' becomes {name}, but {READS_WIDTH}; keep it with a rule"
            )
        return LayerPlan(
            name=base,
            action="quantize",
            reason="; ".join(steps),
            inputs=(spec,),
            outputs=format.output_specs(base, layer, options),
            format=name,
            options=options,
            method=wish.method,
            method_options=wish.method_options,
            marker=format.marker(layer, options),
            requested=requested,
        )

    def _width_is_read(self, base: str) -> bool:
        owner = self._owner(base)
        if owner is not None and owner.family is not UNKNOWN:
            return matches_any(width_layers(owner.family.name), base[len(owner.prefix) :])
        if not self._unknown(base):
            return False
        read = width_layers(None)
        return matches_any(read, base) or matches_any(map("*.{}".format, read), base)

    def _unpacked(
        self, base: str, spec: TensorSpec, layer: LayerInput, rule: CompiledRule, reason: str
    ) -> LayerPlan:
        """The recipe's fallback for a layer that may not be packed, else keep."""
        if self.recipe.fallback is None or self.recipe.fallback is rule.wish:
            return _keep(base, spec, reason, requested=rule.wish.format)
        return self._quantize(
            base, spec, layer, replace(rule, wish=self.recipe.fallback), reason=reason
        )

    def _recode(self, base: str, specs: list[TensorSpec]) -> tuple[LayerPlan, Decision]:
        """A layer that is quantized already: same codes, metadata made complete."""
        marker = self.markers[base]
        by_suffix = {spec.name[len(base) + 1 :]: spec for spec in specs}
        host = host_layer(marker, by_suffix)
        if host is not None or is_bank(marker):
            plan = self._copy_host(base, by_suffix, host)
            return plan, self.rules.notice(base, self._scope(base))
        try:
            format = get_format(marker.get("format", ""))
            options = format.options_from(marker, by_suffix)
        except (RecipeError, CheckpointError) as error:
            raise CheckpointError(f"layer '{base}': {error}; try `fewbits repair`") from None
        layer = format.stored_layer(marker, by_suffix)
        decision = self.rules.decide(base, self._scope(base), layer)
        wish = decision.rule.wish
        asked = [] if wish is None else [wish, _fitting(base, layer, wish)[0]]
        found = any(each and _asks_for(each, format, options) for each in asked)
        if asked and not found and self.clashes is not None:
            self.clashes.add(base)
        elif asked and not found:
            raise SourceError(
                f"layer '{base}' is quantized already ({format.name}) and {wish.format} was asked "
                "for: rounding twice loses quality; start from the original model, or keep the "
                "layer with a rule"
            )
        extra = tuple(
            spec
            for suffix, spec in by_suffix.items()
            if suffix in ("input_scale", "pre_quant_scale") or split_name(spec.name)[1] is None
        )
        plan = LayerPlan(
            name=base,
            action="recode",
            reason=f"quantized already ({format.name}): codes copied",
            inputs=tuple(specs),
            outputs=(*format.output_specs(base, layer, options), *extra),
            format=format.name,
            options=options,
            marker=format.marker(layer, options),
        )
        return plan, decision

    def _copy_host(
        self, base: str, by_suffix: dict[str, TensorSpec], host: HostLayer | None
    ) -> LayerPlan:
        """A layer that ComfyUI quantizes by itself: every tensor as it is. None is made here."""
        marker = self.markers[base]
        if host is None:
            raise CheckpointError(
                f"layer '{base}' is a bank of experts in {marker.get('format')!r}, which ComfyUI "
                "does not read; start from the original model"
            )
        copied = (spec for suffix, spec in by_suffix.items() if suffix != "comfy_quant")
        return LayerPlan(
            name=base,
            action="recode",
            reason=f"{host.what}, quantized already ({marker['format']}): copied",
            inputs=tuple(by_suffix.values()),
            outputs=(
                *copied,
                TensorSpec(f"{base}.comfy_quant", "U8", (len(marker_bytes(marker)),)),
            ),
            format=marker["format"],
            marker=marker,
        )

    def _leave(self, base: str, specs: list[TensorSpec]) -> LayerPlan:
        """A layer that nobody could mend: every tensor and its JSON as they are."""
        return LayerPlan(
            base,
            "keep",
            "damaged: left as it is",
            tuple(specs),
            outputs=tuple(specs),
            marker=self.markers.get(base),
        )


def _fitting(base: str, layer: LayerInput, wish: Wish) -> tuple[Wish | None, list[str]]:
    """What a wish becomes for one layer, None where it is kept; and the obstacles on the way."""
    steps: list[str] = []
    looked_up = EMBEDDING.fullmatch(base) is not None
    options = get_format(wish.format).settled(layer, wish.options, looked_up=looked_up)
    wish = replace(wish, options=options)
    while (obstacle := get_format(wish.format).check(layer, wish.options)) is not None:
        fallback = get_format(wish.format).fallback(layer, wish.options)
        if fallback is None:
            return None, [*steps, obstacle]
        steps.append(obstacle if fallback[0] == wish.format else f"{obstacle} -> {fallback[0]}")
        wish = wish.become(*fallback)
    return wish, steps


def _asks_for(wish: Wish, format: Format, options: FormatOptions) -> bool:
    """Whether a layer that is stored in this format with these options is what the wish means."""
    return wish.format == format.name and format.same_codes(wish.options, options)


def _main_parts(parts: list[Part]) -> list[Part]:
    """What "quantize this file" means: the diffusion models of a checkpoint, or the text encoders
    if it has none.
    """
    diffusion = [part for part in parts if part.family.kind == "diffusion"]
    return diffusion or parts


def _unknown_parts(names: Iterable[str], parts: Iterable[Part]) -> list[Part]:
    """Diffusion models in a checkpoint that no family explains, so that nothing else is taken for
    what the file is about.
    """
    if any(part.family.kind == "diffusion" for part in parts):
        return []
    taken = [part.prefix for part in parts]
    found = []
    for prefix in DIFFUSION_PREFIXES:
        inside = [name for name in names if name.startswith(prefix)]
        if len(inside) > FEW and not any(other.startswith(prefix) for other in taken):
            found.append(Part(UNKNOWN, prefix))
    return found


def _listed(names: list[str]) -> str:
    text = ", ".join(map("'{}'".format, names[:LISTED]))
    if len(names) > LISTED:
        text += f" and {len(names) - LISTED} more"
    return text


def _keep(base: str, spec: TensorSpec, reason: str, requested: str | None = None) -> LayerPlan:
    return LayerPlan(base, "keep", reason, (spec,), outputs=(spec,), requested=requested)


def not_a_candidate(spec: TensorSpec) -> str | None:
    """Why a tensor can never be quantized, in the words of
    docs/formats.md#which-layers-are-candidates; None when it can.
    """
    if not spec.name.endswith(".weight"):
        return "not a weight"
    if spec.dtype.startswith("F8_"):
        return f"already 8 bit ({spec.dtype} without a marker; requantize rounds it a second time)"
    if spec.dtype not in FLOAT_DTYPES:
        return f"not a floating-point tensor ({spec.dtype.lower()})"
    if len(spec.shape) != 2:
        return f"not 2-D ({len(spec.shape)}-D)"
    n, k = spec.shape
    if n < SMALLEST_SIDE or k < SMALLEST_SIDE:
        return f"smaller than {SMALLEST_SIDE}x{SMALLEST_SIDE} ({n}x{k})"
    return None


def _host(layer: LayerPlan) -> HostLayer | None:
    specs = {spec.name[len(layer.name) + 1 :]: spec for spec in layer.inputs}
    if layer.action == "recode":
        return host_layer(layer.marker, specs)
    return None


def _needs_pack(layer: LayerPlan) -> bool:
    return _host(layer) is None and not FORMATS[layer.format].native


def _min_comfyui(layer: LayerPlan) -> str:
    host = _host(layer)
    if host is not None:
        return host.min_comfyui
    format = get_format(layer.format)
    if EMBEDDING.fullmatch(layer.name) and format.embedding_min_comfyui:
        return format.embedding_min_comfyui
    return format.min_comfyui
