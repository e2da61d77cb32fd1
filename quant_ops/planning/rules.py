"""Compile a recipe and the presets into one ordered list of rules; the first match decides (ARCHITECTURE 4)."""

from __future__ import annotations

from dataclasses import dataclass

from .match import matches
from .model_family import Part, Preset
from .recipe import Recipe, Wish


@dataclass(frozen=True)
class CompiledRule:
    """pattern -> action. `origin` survives only as text in the reason."""

    pattern: str
    action: str  # "quantize" | "keep" | "drop"
    wish: Wish | None
    origin: str
    prefix: str = ""  # the part's prefix: preset patterns speak of names below it
    users: bool = False  # written by the user: reported when it matches nothing

    def hits(self, base: str) -> bool:
        if not base.startswith(self.prefix):
            return False
        return matches(self.pattern, base[len(self.prefix) :]) or (self.users and matches(self.pattern, base))


def compile_rules(recipe: Recipe, part: Part | None, preset: Preset) -> tuple[CompiledRule, ...]:
    """Rules for the layers of one model part, in order: preset drop, the user's rules, exclusions, primary."""
    prefix = part.prefix if part else ""
    return (
        *(CompiledRule(pattern, "drop", None, f"preset {preset.name} drops it", prefix) for pattern in preset.drop),
        *user_rules(recipe, prefix),
        *(
            CompiledRule(pattern, *_excluded(recipe), f"preset {preset.name}: {exclusion.why}", prefix)
            for exclusion in preset.exclude
            for pattern in exclusion.match
        ),
        CompiledRule("*", "quantize" if recipe.primary else "keep", recipe.primary, "primary"),
    )


def user_rules(recipe: Recipe, prefix: str) -> tuple[CompiledRule, ...]:
    """The custom tier; patterns may name a layer with or without the part's prefix."""
    return tuple(
        CompiledRule(
            rule.match, "quantize" if rule.wish else "keep", rule.wish, f"rule '{rule.match}'", prefix, users=True
        )
        for rule in recipe.rules
    )


def _excluded(recipe: Recipe) -> tuple[str, Wish | None]:
    return ("quantize", recipe.fallback) if recipe.fallback else ("keep", None)
