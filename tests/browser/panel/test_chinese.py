"""A Chinese page."""

from __future__ import annotations

import ast
import re

import pytest

from support.harness.emoji import ROOT
from support.harness.panel import PACK, REPORT, SAVED, finish, line, load, send

pytestmark = pytest.mark.browser


def test_a_chinese_page_has_a_chinese_panel(page):
    page.evaluate("host.app.extensionManager = { setting: { get: () => 'zh' } }")
    load(page)
    page.evaluate("addNode(12)")
    panel = page.locator(".fewbits-panel")
    assert line(panel) == "运行工作流即可看到计划"
    finish(page, {**REPORT, **SAVED})
    shown = panel.inner_text()
    for text in (
        "完成，用时 12 s（cpu）",
        "原版 ComfyUI 0.27.0 或更新可打开",
        "没有匹配任何层",
        "复制路径",
    ):
        assert text in shown
    send(
        page,
        "execution_error",
        {
            "node_id": "12",
            "exception_message": "x exists already in the output folder; choose another filename or turn overwrite on",
        },
    )
    assert "已存在于输出文件夹" in panel.inner_text()


def test_empty_fields_speak_chinese_on_a_chinese_page(page):
    page.evaluate("host.app.extensionManager = { setting: { get: () => 'zh' } }")
    load(page)
    page.evaluate(
        """() => {
          const element = document.createElement("textarea");
          element.placeholder = "layers, one pattern a line";
          addNode(12, host.app.rootGraph, "FewBitsLayerRules", [{ name: "pattern", value: "", element }]);
        }"""
    )
    placeholder = "host.app.rootGraph.getNodeById(12).widgets[0].element.placeholder"
    assert page.evaluate(placeholder) == "层，每行一个模式"


PYTHON = (
    "rule 'img_mlp' matched nothing",
    "rule 'a.*' matches only tensors that cannot be quantized",
    "rule 'a.*' never decides: rules before it match the same layers",
    "model family not recognised: the generic rule keeps embeddings, norms, modulation, first and last projections; "
    "name a preset or keep layers with a rule if that is not enough",
    "layer 'x' becomes nvfp4, but ComfyUI reads its width to recognise the model; keep it with a rule",
    "layer 'x' does not become nvfp4: ComfyUI reads its width to recognise the model",
    "kept, as they could be lookup tables: 'a', 'b'; a rule that names a layer quantizes it",
    "12 layers were quantized already and are rounded a second time: they keep the error",
    "not 2-D (4-D)",
    "smaller than 32x32 (8x64)",
    "padded 17x129 -> 32x256; runs dequantized in ComfyUI",
    "fits: 7.40 MB of 19.20 GB for weights; native: multiplied by INT8 units, by comfy-kitchen; "
    "pictures that are hard to tell from the original's side by side",
    "format auto chooses scaling too: leave it alone, or name a format",
    "a.safetensors exists already in the output folder; choose another filename or turn overwrite on",
    "diffusion_models/a: no such file in ComfyUI's model folders; choose one from the list",
)  # fmt: skip
KEPT = r"comfyui|fewbits|comfy-kitchen|safetensors|diffusion_models|nvfp4|int8|scaling|auto|mb|gb|img_mlp|x\d*|a|b"


@pytest.mark.parametrize("text", PYTHON)
def test_what_python_says_is_chinese_on_a_chinese_page(page, text):
    shown = page.evaluate(
        f"(text) => import('{PACK}/words.mjs').then((words) => {{ words.useLanguage(() => 'zh');"
        " return words.translatedError(text); })",
        text,
    )
    words = re.findall(r"[A-Za-z_][\w-]*", shown)
    assert [word for word in words if not re.fullmatch(KEPT, word.lower())] == []


ROOMS = ("quant_ops", "nodes")
ELSEWHERE = ("cli", "compat", "bench.py")  # doors without a page
ERRORS = {"QuantError", "RecipeError", "CheckpointError"}
NAMES = (  # of tensors, keys, formats, packages and values, as they stand in files
    r"\w*_\w*|\w*\d\w*|[A-Z]+s?|[a-z]*[A-Z]\w*|weights?|absmax|shape|qweight|scale|scales|convrot|bitsandbytes|"
    r"quanto|nunchaku|safetensors|fullmatch|pattern|match|preset|auto|none|keep|true|row|rotated|gguf|pip|install|cpu|"
    r"index|json|layer|config|torch|compile|llama|cpp|primary|rule|option|value|double|blocks|format|fewbits|repair|"
    r"models?|my|google|bench|prints|checkpoint|rel|of"
)


def written() -> list[str]:
    """Every error that Python raises with a text of its own, 7 in place of what it fills in."""
    found = []
    for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        if path.relative_to(ROOT).parts[1] in ELSEWHERE:
            continue
        raised = filter(is_refusal, ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        found += [words_of(node.exc.args[0]) for node in raised]
    return [text for text in found if " " in text]


def is_refusal(node: ast.AST) -> bool:
    made = isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args
    return bool(made) and getattr(node.exc.func, "id", "") in ERRORS


def words_of(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(map(words_of, node.values))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "7"


def test_what_python_refuses_is_chinese_on_a_chinese_page(page):
    """Nineteen of twenty: an error that is new may wait for its translation."""
    texts = written()
    shown = page.evaluate(
        f"(texts) => import('{PACK}/words.mjs').then((words) => {{ words.useLanguage(() => 'zh');"
        " return texts.map(words.translatedError); })",
        texts,
    )
    english = [
        text
        for text in shown
        if [word for word in re.findall(r"[A-Za-z]\w*", text) if not re.fullmatch(NAMES, word)]
    ]
    assert len(texts) > 150
    assert len(english) <= len(texts) // 20, "\n".join(english)
