"""What the pages and the code point at exists: files, headings, and no page that only its makers have."""

import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXTS = (".py", ".md", ".toml", ".mjs", ".js", ".cu", ".json")


def tracked() -> list[Path]:
    """Files of the repository that hold text, also new ones that are not committed yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listed.splitlines() if name.endswith(TEXTS)]
    return [path for path in paths if path.is_file()]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@cache
def anchors(page: Path) -> set[str]:
    """All anchors of a page; a heading that comes again gets -1, -2."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    times: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        name = slug(heading)
        found.add(f"{name}-{times[name]}" if times[name] else name)
        times[name] += 1
    return found


def missing(page: Path, target: str) -> str | None:
    """What a reference to `path#anchor` beside `page` does not find."""
    path, _, anchor = target.partition("#")
    file = page.parent / unquote(path) if path else page
    if not file.exists():
        return f"{target}: no such file"
    if anchor and anchor not in anchors(file.resolve()):
        return f"{target}: no such heading"
    return None


# Numbers of sections, seams, mistakes and dialects on pages that only the makers of a file have.
MAKERS = r"(?:FORMATS|COMFYUI|ARCHITECTURE|CLI|PERFORMANCE|STYLE)(?:\.md)?\s+(?:section\s+)?\d"
NUMBERS = re.compile(rf"{MAKERS}|\b[Ss]eam \d|\b[Ss]ections? \d|\bM\d\d\b|\bhouse plan\b")


def test_nothing_points_at_a_numbered_section():
    wrong = []
    for path in tracked():
        if "assets" in path.parts or path == Path(__file__).resolve():
            continue
        for found in NUMBERS.finditer(path.read_text(encoding="utf-8")):
            wrong.append(f"{path.relative_to(ROOT)}: {found[0]!r}")
    assert wrong == []


PAGES = [path for path in tracked() if path.suffix == ".md" and "assets" not in path.parts]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_leads_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert [*filter(None, (missing(page, link) for link in local))] == []


def test_every_page_that_code_names_exists():
    wrong = []
    for path in tracked():
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"\bdocs/[\w-]+\.md(?:#[\w-]+)?", text):
            if found := missing(ROOT / "README.md", target):
                wrong.append(f"{path.relative_to(ROOT)}: {found}")
    assert wrong == []


ROOMS = "kernels|quant_ops|nodes|tests|docs|web|locales|example_workflows"


def placeholder(path: str) -> bool:
    """`quant_ops/recipes/<name>.toml` and the like."""
    return "<" in path or "*" in path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_path_that_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(rf"`((?:{ROOMS})/[^`\s]*)`", text)
    # what a run writes, and folders of the reader's own
    wrong = [path for path in named if not placeholder(path) and not (ROOT / path).exists()]
    assert wrong == []


def test_the_map_names_every_room():
    """Packages of kernels, quant_ops and nodes by their path, modules at their top by their name."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.split("## The map")[1].split("\n## ")[0]
    named = set(re.findall(r"`([^`]+)`", table))
    places = [path.parent for path in tracked() if path.name == "__init__.py"]
    rooms = {path.relative_to(ROOT).as_posix() for path in places}
    packages = {room for room in rooms if room.startswith(("kernels", "quant_ops", "nodes"))}
    hidden = {room for room in packages if "installed" in room}
    assert {room for room in packages - hidden if f"{room}/" not in named} == set()
    modules = [path for room in ("kernels", "quant_ops") for path in (ROOT / room).glob("*.py")]
    names = {path.relative_to(ROOT).as_posix() for path in modules if path.stem != "__init__"}
    assert {name for name in names if not {name, Path(name).name} & named} == set()
