"""The page's files read as text: fresh after an update, silent, and safe with text from model files.

ComfyUI sends `Cache-Control: no-store` for .js and .css but nothing for .mjs, so a browser may keep helpers of an older
FewBits for days and pair them with a new `fewbits.js`. Every import of a helper therefore carries a stamp of all
helpers' contents. After editing one, write the new stamp with

    python3 tests/web/test_web_files.py
"""

import hashlib
import re
from pathlib import Path

WEB = Path(__file__).resolve().parents[2] / "web"
SCRIPTS = sorted(path for path in WEB.iterdir() if path.suffix in {".js", ".mjs"})
HELPERS = [path for path in SCRIPTS if path.suffix == ".mjs"]
IMPORT = re.compile(r'(from "\./(\w+\.mjs))(?:\?v=(\w*))?(?=")')


def stamp() -> str:
    """Eight hex digits over all helpers, without the stamps they carry themselves."""
    digest = hashlib.sha256()
    for path in HELPERS:
        digest.update(
            path.name.encode()
            + b"\0"
            + IMPORT.sub(r"\1", path.read_text(encoding="utf-8")).encode()
            + b"\0"
        )
    return digest.hexdigest()[:8]


def write_stamps() -> None:
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        path.write_text(IMPORT.sub(rf"\1?v={stamp()}", text), encoding="utf-8", newline="\n")


def imports(path: Path) -> list[tuple[str, str]]:
    """(helper, stamp) of every import of a helper."""
    return [(match[2], match[3]) for match in IMPORT.finditer(path.read_text(encoding="utf-8"))]


def test_every_import_of_a_helper_carries_the_current_stamp():
    wrong = [
        f"{path.name}: {name}?v={seen}"
        for path in SCRIPTS
        for name, seen in imports(path)
        if seen != stamp()
    ]
    assert not wrong, (
        f"helpers changed: run `python3 tests/web/test_web_files.py` ({', '.join(wrong)})"
    )


def test_every_helper_is_imported_and_every_import_exists():
    wanted = {name for path in SCRIPTS for name, _ in imports(path)}
    assert wanted == {path.name for path in HELPERS}


def test_only_the_entry_script_is_a_js_file():
    # ComfyUI's page runs every .js below web/ as an extension of its own
    assert [path.name for path in WEB.rglob("*.js")] == ["fewbits.js"]


def test_scripts_are_silent_and_never_build_markup_from_text():
    banned = re.compile(
        r"console\.|alert\(|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
    )
    found = [
        f"{path.name}: {hit}"
        for path in SCRIPTS
        for hit in banned.findall(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_scripts_import_nothing_but_helpers_and_the_two_stable_host_modules():
    foreign = set()
    for path in SCRIPTS:
        sources = re.findall(r'(?:from|import\()\s*"([^"]+)"', path.read_text(encoding="utf-8"))
        foreign |= {source for source in sources if not source.startswith("./")}
    assert foreign == {"../../scripts/app.js", "../../scripts/api.js"}


def test_every_text_of_the_page_is_there_in_chinese():
    table = (WEB / "zh.mjs").read_text(encoding="utf-8")
    texts = table.split("export const MESSAGES")[0]
    known = set(re.findall(r'^  (?:"(.*)"|(\w+)): "', texts, re.M))
    known = {quoted or bare for quoted, bare in known}
    used = set()
    for path in SCRIPTS:
        source = path.read_text(encoding="utf-8")
        used |= set(re.findall(r'\b(?:say\(|idle: |work: )"((?:[^"\\]|\\.)*)"', source))
    assert used - known == set()
    assert len(used) > 40


def test_every_class_of_the_style_sheet_is_used():
    classes = set(
        re.findall(r"\.(fewbits-[\w-]+)", (WEB / "fewbits.css").read_text(encoding="utf-8"))
    )
    scripts = "".join(path.read_text(encoding="utf-8") for path in SCRIPTS)
    assert {name for name in classes if name not in scripts} == set()


if __name__ == "__main__":
    write_stamps()
    print(stamp())
