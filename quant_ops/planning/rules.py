"""Compile recipe, layer-config and presets into one ordered list of rules; the first match
decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain

from ..spec import LayerInput, RuleUse
from .heuristics import gains_nothing
from .layer_config import DEFAULT
from .match import SEARCH, is_plain, looks_like_regex, matches
from .model_family import Group, Part, Preset
from .recipe import Recipe, Wish

EVERYTHING = "*"


@dataclass(frozen=True)
class CompiledRule:
    """pattern -> action. Where it came from survives only as text: `label` names it, `why` explains
    it where the name does not.

    `within` are the prefixes of the model parts whose layers it may decide (None: all layers; a
    prefix of None: layers of no part). `below` says whether the pattern speaks of names below that
    prefix, of full names, or of either.
    """

    label: str
    pattern: str
    wish: Wish | None
    why: str = ""
    drops: bool = False
    within: tuple[str | None, ...] | None = None
    below: str = "full"  # "full" | "below" | "either"
    judged_by: Wish | None = None  # only layers that gain nothing when they become this
    origin: str = ""  # "layer-config" | "rule" where a user wrote the pattern; "preset"

    @property
    def action(self) -> str:
        if self.drops:
            return "drop"
        if self.wish:
            return "quantize"
        return "keep"

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
        why = self.why or self.label
        if self.judged_by is None:
            return why
        found = gains_nothing(layer, self.judged_by)
        return found and f"{why}: {found}"


@dataclass(frozen=True)
class Decision:
    """What the list says about one tensor.

    `matched` are the positions of all rules that speak about it, in order. `rule` decided; it is
    None for a tensor that no rule may decide about. `candidate` is whether the tensor could become
    quantized.
    """

    matched: tuple[int, ...]
    rule: CompiledRule | None = None
    reason: str = ""
    candidate: bool = False


class RuleList:
    """The ordered rules of one plan. It only answers; what was answered is counted by `Tally`."""

    def __init__(self, rules: Iterable[CompiledRule]):
        self.rules = tuple(rules)
        # A layer-config may list every layer by name; those are looked up instead of tried.
        self._patterns = [at for at, rule in enumerate(self.rules) if not is_plain(rule.pattern)]
        self._names: dict[str, list[int]] = {}
        for at, rule in enumerate(self.rules):
            if is_plain(rule.pattern):
                self._names.setdefault(rule.pattern, []).append(at)

    def _naming(self, base: str, owner: str | None) -> Iterable[tuple[int, CompiledRule]]:
        """(position, rule) of every rule whose pattern matches, in order."""
        full, below = self._names.get(base, ()), self._names.get(base[len(owner or "") :], ())
        for at in sorted({*self._patterns, *full, *below}):
            if self.rules[at].names(base, owner):
                yield at, self.rules[at]

    def drop(self, base: str, owner: str | None) -> Decision | None:
        """The rule that leaves a tensor out, if any."""
        for at, rule in self._naming(base, owner):
            if rule.drops:
                return Decision((at,), rule, rule.why)
        return None

    def notice(self, base: str, owner: str | None) -> Decision:
        """The user's rules that name a layer which no rule can decide, because it is no
        candidate.
        """
        named = self._naming(base, owner)
        return Decision(tuple(at for at, rule in named if rule.users))

    def decide(self, base: str, owner: str | None, layer: LayerInput) -> Decision:
        """The first rule that speaks about a candidate, and why it does."""
        reasons: dict[int, str] = {}
        for at, rule in self._naming(base, owner):
            if not rule.drops and (reason := rule.reason(layer)) is not None:
                reasons[at] = reason
        first = next(iter(reasons))
        return Decision(tuple(reasons), self.rules[first], reason=reasons[first], candidate=True)


def _counted(decisions: Iterable[Decision]) -> Counter[int]:
    """How many of the decisions each rule matched."""
    return Counter(chain.from_iterable(decision.matched for decision in decisions))


class Tally:
    """How often each rule matched and decided, counted once from all decisions of a plan."""

    def __init__(self, rules: RuleList, decisions: Iterable[Decision]):
        decisions = tuple(decisions)
        self.rules = rules.rules
        self._matched = _counted(decisions)
        self._won = Counter(decision.matched[0] for decision in decisions if decision.rule)
        judged = [decision for decision in decisions if decision.candidate]
        self._candidates = _counted(judged)
        self._overruled = sum(self._overrules_preset(decision) for decision in judged)

    def uses(self) -> tuple[RuleUse, ...]:
        return tuple(
            RuleUse(rule.label, rule.pattern, rule.action, self._matched[at], won=self._won[at])
            for at, rule in enumerate(self.rules)
        )

    def unmatched(self) -> tuple[str, ...]:
        """Patterns of the user that matched nothing, as they were written."""
        return tuple(rule.pattern for at, rule in self._users() if not self._matched[at])

    def warnings(self) -> list[str]:
        """What the user's own patterns did not do."""
        complaints = (self._complaint(at, rule) for at, rule in self._users())
        lines = [f"{rule.label} {text}" for rule, text in complaints if text]
        if self._overruled:
            lines.append(
                f"{self._overruled} layers that the preset would keep are quantized because of the "
                f"layer-config's {DEFAULT}; list them in _exclusions to keep them"
            )
        return lines

    def _complaint(self, at: int, rule: CompiledRule) -> tuple[CompiledRule, str]:
        if not self._matched[at]:
            hint = rule.origin == "layer-config" and looks_like_regex(rule.pattern)
            if hint:
                return rule, "matched nothing; for regular expressions ask for fullmatch"
            return rule, "matched nothing"
        if not self._candidates[at]:
            return rule, "matches only tensors that cannot be quantized"
        if not self._won[at] and rule.origin != "default":
            return rule, "never decides: rules before it match the same layers"
        return rule, ""

    def _overrules_preset(self, decision: Decision) -> bool:
        """Whether a layer-config's default quantized what the preset would have kept."""
        return decision.rule.origin == "default" and any(
            self.rules[at].origin == "preset" for at in decision.matched
        )

    def _users(self) -> Iterable[tuple[int, CompiledRule]]:
        """The user's rules, heuristics apart (those may well find every layer worth quantizing)."""
        for at, rule in enumerate(self.rules):
            if rule.users and rule.judged_by is None:
                yield at, rule


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
    return (
        *_drops(main),
        *_layer_config_rules(recipe, names, prefixes),
        *_custom_rules(recipe),
        *(_keep_part((part.prefix,), _inside(part)) for part in others),
        *([_keep_part((None,), "outside the recognised model")] if known else ()),
        *_exclusions(main, recipe.fallback),
        *_heuristics(recipe, prefixes),
        CompiledRule("primary", EVERYTHING, recipe.primary),
    )


def _drops(main: list[tuple[str, Preset]]) -> Iterable[CompiledRule]:
    for prefix, preset in main:
        for rule in _preset_rules(preset.name, preset.drop, prefix):
            yield replace(rule, drops=True)


def _exclusions(main: list[tuple[str, Preset]], fallback: Wish | None) -> Iterable[CompiledRule]:
    for prefix, preset in main:
        for rule in _preset_rules(preset.name, preset.exclude, prefix):
            yield replace(rule, wish=fallback)


def _preset_rules(preset: str, groups: Iterable[Group], prefix: str) -> Iterable[CompiledRule]:
    for group in groups:
        for pattern in group.match:
            yield CompiledRule(
                label=f"preset {preset} '{pattern}'",
                pattern=pattern,
                wish=None,
                why=f"preset {preset}: {group.why}",
                within=(prefix,),
                below="below",
                origin="preset",
            )


def _heuristics(recipe: Recipe, prefixes: tuple[str, ...]) -> Iterable[CompiledRule]:
    if recipe.heuristics and recipe.primary:
        rule = CompiledRule("heuristics", EVERYTHING, recipe.fallback, within=prefixes)
        yield replace(rule, judged_by=recipe.primary)


def _layer_config_rules(
    recipe: Recipe, names: Iterable[str], prefixes: tuple[str, ...]
) -> Iterable[CompiledRule]:
    config = recipe.layer_config
    if config is None:
        return
    for ranked in config.ranked(names):
        entry = ranked.entry
        label = f"layer-config '{entry.pattern}'"
        if entry.exclusion:
            label = f"layer-config _exclusions '{entry.pattern}'"
        yield CompiledRule(label, ranked.match, entry.wish, origin="layer-config")
    if config.default:
        rule = CompiledRule(f"layer-config {DEFAULT}", EVERYTHING, config.default.wish)
        yield replace(rule, within=prefixes, origin="default")


def _custom_rules(recipe: Recipe) -> Iterable[CompiledRule]:
    """The custom tier; patterns may name a layer with or without the part's prefix."""
    for stated in recipe.rules:
        rule = CompiledRule(
            label=f"rule '{stated.match}'",
            pattern=stated.match,
            wish=stated.wish,
            below="full" if stated.match.startswith(SEARCH) else "either",
            origin="rule",
        )
        if stated.heuristics and stated.wish:
            judged = f"{rule.label} heuristics"
            yield replace(rule, label=judged, wish=None, judged_by=stated.wish)
        yield rule


def _keep_part(within: tuple[str | None, ...], why: str) -> CompiledRule:
    return CompiledRule(why, EVERYTHING, None, within=within)


def _inside(part: Part) -> str:
    return f"{part.family.title} inside a checkpoint; quantize it with a rule of its own"
