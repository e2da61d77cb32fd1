"""docs/comfyui.md: the seams are what their docstrings say."""

import ast
import re

from support.harness import readme
from support.harness.emoji import ROOT

SEAMS = ROOT / "nodes" / "bridge" / "seams"
NO_SEAM = ("__init__.py", "wrap.py")
PARTS = ("Wraps", "Why", "Since", "Without it")


def section(path) -> str:
    """A seam's docstring as a section: heading, what it does, then one line each of PARTS."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    title, _, rest = text.partition("\n\n")
    does = re.fullmatch(rf"Seam `{path.stem}`: (.*)", " ".join(title.split()))[1]
    found = re.findall(r"^([A-Z][\w ]*): (.*?)(?=^[A-Z]|\Z)", rest, re.M | re.S)
    assert tuple(name for name, _ in found) == PARTS, path.name
    lines = [f"- **{name}**: {' '.join(said.split())}" for name, said in found]
    return f"### {path.stem}\n\n{does[0].upper()}{does[1:]}\n\n" + "\n".join(lines) + "\n"


def test_the_page_says_of_every_seam_what_its_file_says():
    files = [path for path in sorted(SEAMS.glob("*.py")) if path.name not in NO_SEAM]
    text = "\n".join(section(path) for path in files)
    if readme.WRITE:
        readme.write_block("seams", text)
    assert readme.block("seams") == text
