"""A Chinese page."""

from __future__ import annotations

import re

import pytest

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
        " return words.translated(text); })",
        text,
    )
    words = re.findall(r"[A-Za-z_][\w-]*", shown)
    assert [word for word in words if not re.fullmatch(KEPT, word.lower())] == []
