"""Compile recipe, layer-config and presets into one ordered list of rules; the first match decides
(ARCHITECTURE 4).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..spec import LayerInput, RuleUse
from .heuristics import gains_nothing
from .layer_config import DEFAULT
from .match import SEARCH, looks_like_regex, matches
from .model_family import Group, Part, Preset
from .recipe import Recipe, Wish

EVERYTHING = "*"


@dataclass(frozen=True)
class CompiledRule:
    """pattern -> action. Where it came from survives only as text: `label` names it, `why` explains
    it.

    `within` are the prefixes of the model parts whose layers it may decide (None: all layers; a
    prefix of None: layers of no part). `below` says whether the pattern speaks of names below that
    prefix, of full names, or of either.
    """

    label: str
    pattern: str
    wish: Wish | None
    why: str
    action: str = ""
    within: tuple[str | None, ...] | None = None
    below: str = "full"  # "full" | "below" | "either"
    judged_by: Wish | None = None  # only layers that gain nothing when they become this
    origin: str = ""  # "layer-config" | "rule" where a user wrote the pattern; "preset"

    @property
    def users(self) -> bool:
        """Written by the user: reported when it matches nothing."""
        return self.origin in ("layer-config", "rule", "default")

    def names(self, base: str, owner: str | None) -> bool:
        """Whether the pattern matches this layer of this part."""
        if self.within is not None and owner not in self.within:
            return False
        if self.below != "below" and matches(self.pattern, base):
            return True
        return (
            self.below != "full" and owner is not None and matches(self.pattern, base[len(owner) :])
        )

    def reason(self, layer: LayerInput) -> str | None:
        """Why it speaks about a layer of this shape; None when its heuristics find the layer worth
        quantizing.
        """
        if self.judged_by is None:
            return self.why
        found = gains_nothing(layer, self.judged_by)
        return found and f"{self.why}: {found}"


class RuleList:
    """The ordered rules of one plan, and what each of them matched and decided."""

    def __init__(self, rules: Iterable[CompiledRule]):
        self.rules = tuple(rules)
        self.matched, self.won, self.candidates = ([0] * len(self.rules) for _ in range(3))
        self.overruled = 0  # preset exclusions that a layer-config default decided otherwise

    def drops(self, base: str, owner: str | None) -> CompiledRule | None:
        """The rule that leaves a tensor out, if any."""
        for index, rule in enumerate(self.rules):
            if rule.action == "drop" and rule.names(base, owner):
                self.matched[index] += 1
                self.won[index] += 1
                return rule
        return None

    def pass_by(self, base: str, owner: str | None) -> None:
        """Count a layer that no rule can decide, because it is no candidate."""
        for index, rule in enumerate(self.rules):
            self.matched[index] += rule.users and rule.names(base, owner)

    def first(self, base: str, owner: str | None, layer: LayerInput) -> tuple[CompiledRule, str]:
        """The rule that decides about a candidate, and why it does."""
        hits = []
        for index, rule in enumerate(self.rules):
            if rule.action == "drop" or not rule.names(base, owner):
                continue
            reason = rule.reason(layer)
            if reason is not None:
                self.matched[index] += 1
                self.candidates[index] += 1
                hits.append((index, rule, reason))
        index, rule, reason = hits[0]
        self.won[index] += 1
        self.overruled += rule.origin == "default" and any(
            hit.origin == "preset" for _, hit, _ in hits
        )
        return rule, reason

    def uses(self) -> tuple[RuleUse, ...]:
        counts = zip(self.rules, self.matched, self.won)
        return tuple(
            RuleUse(rule.label, rule.pattern, rule.action, matched, won)
            for rule, matched, won in counts
        )

    def unmatched(self) -> tuple[str, ...]:
        """Patterns of the user that matched nothing, as they were written."""
        return tuple(rule.pattern for rule, matched in self._users() if not matched)

    def warnings(self) -> list[str]:
        """What the user's own patterns did not do."""
        lines = []
        for rule, matched in self._users():
            index = self.rules.index(rule)
            if not matched:
                hint = rule.origin == "layer-config" and looks_like_regex(rule.pattern)
                lines.append(
                    f"{rule.label} matched nothing"
                    + ("; for regular expressions add --fullmatch" if hint else "")
                )
            elif not self.candidates[index]:
                lines.append(f"{rule.label} matches only tensors that cannot be quantized")
            elif not self.won[index] and rule.origin != "default":
                lines.append(f"{rule.label} never decides: rules before it match the same layers")
        if self.overruled:
            lines.append(
                f"{self.overruled} layers that the preset would keep are quantized because of the "
                f"layer-config's {DEFAULT}; list them in _exclusions to keep them"
            )
        return lines

    def _users(self) -> Iterable[tuple[CompiledRule, int]]:
        """The user's rules, heuristics apart (those may well find every layer worth quantizing)."""
        return (
            (rule, n)
            for rule, n in zip(self.rules, self.matched)
            if rule.users and rule.judged_by is None
        )


def compile_rules(
    recipe: Recipe,
    main: list[tuple[str, Preset]],
    others: list[Part],
    names: Iterable[str],
    known: bool,
) -> tuple[CompiledRule, ...]:
    """Every rule of one plan, in order.

    Args:
        main: (prefix, preset) of the parts that the primary wish is about.
        others: recognised parts that only the user's own rules quantize.
        names: base names of the model; layer-config keys that equal one of them come first.
        known: whether any part was recognised; then layers outside all parts are kept.
    """
    prefixes = tuple(prefix for prefix, _ in main)
    rest = tuple(_keep_part((part.prefix,), _inside(part)) for part in others)
    outside = (_keep_part((None,), "outside the recognised model"),) if known else ()
    return (
        *(
            rule
            for prefix, preset in main
            for rule in _preset_rules(preset.name, preset.drop, prefix, "drop", None)
        ),
        *_layer_config_rules(recipe, names, prefixes),
        *_custom_rules(recipe),
        *rest,
        *outside,
        *(
            rule
            for prefix, preset in main
            for rule in _preset_rules(
                preset.name, preset.exclude, prefix, _action(recipe.fallback), recipe.fallback
            )
        ),
        *_heuristics(recipe, prefixes),
        CompiledRule("primary", EVERYTHING, recipe.primary, "primary", _action(recipe.primary)),
    )


def _preset_rules(
    preset: str, groups: Iterable[Group], prefix: str, action: str, wish: Wish | None
) -> Iterable[CompiledRule]:
    for group in groups:
        why = f"preset {preset}: {group.why}"
        for pattern in group.match:
            label = f"preset {preset} '{pattern}'"
            yield CompiledRule(
                label, pattern, wish, why, action, (prefix,), "below", origin="preset"
            )


def _heuristics(recipe: Recipe, prefixes: tuple[str, ...]) -> Iterable[CompiledRule]:
    if recipe.heuristics and recipe.primary:
        wish, judged = recipe.fallback, recipe.primary
        yield CompiledRule(
            "heuristics", EVERYTHING, wish, "heuristics", _action(wish), prefixes, judged_by=judged
        )


def _layer_config_rules(
    recipe: Recipe, names: Iterable[str], prefixes: tuple[str, ...]
) -> Iterable[CompiledRule]:
    config = recipe.layer_config
    if config is None:
        return
    for ranked in config.ranked(names):
        entry = ranked.entry
        label = f"layer-config {'_exclusions ' if entry.exclusion else ''}'{entry.pattern}'"
        yield CompiledRule(
            label, ranked.match, entry.wish, label, _action(entry.wish), origin="layer-config"
        )
    if config.default:
        label, wish = f"layer-config {DEFAULT}", config.default.wish
        yield CompiledRule(
            label, EVERYTHING, wish, label, _action(wish), prefixes, origin="default"
        )


def _custom_rules(recipe: Recipe) -> Iterable[CompiledRule]:
    """The custom tier; patterns may name a layer with or without the part's prefix."""
    for rule in recipe.rules:
        label = f"rule '{rule.match}'"
        below = "full" if rule.match.startswith(SEARCH) else "either"
        if rule.heuristics and rule.wish:
            judged = f"{label} heuristics"
            yield CompiledRule(
                judged, rule.match, None, judged, "keep", None, below, rule.wish, "rule"
            )
        yield CompiledRule(
            label, rule.match, rule.wish, label, _action(rule.wish), None, below, origin="rule"
        )


def _keep_part(within: tuple[str | None, ...], why: str) -> CompiledRule:
    return CompiledRule(why, EVERYTHING, None, why, "keep", within)


def _inside(part: Part) -> str:
    return f"{part.family.title} inside a checkpoint; quantize it with a rule of its own"


def _action(wish: Wish | None) -> str:
    return "quantize" if wish else "keep"
