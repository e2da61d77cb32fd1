"""The package version, in one place; pyproject.toml repeats it for the Comfy registry and a test
compares them.
"""

VERSION = "0.1.0"
