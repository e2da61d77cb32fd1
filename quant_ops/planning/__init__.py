"""From a wish and a header to a plan: recipe, rules, presets, planner."""
