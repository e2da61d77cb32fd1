"""Every diffusion model class of ComfyUI, small, with random weights: quantized, opened, run, quantized in a graph, saved.

`tests/planning/test_every_class.py` has the same classes with the widths of real files, as headers. Here each runs in
one format, and a few in all; `--matrix` runs each in all.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewbits.quant_ops.doors import quantize_file
from fewbits.quant_ops.formats import FORMATS
from fewbits.quant_ops.planning.recipe import Recipe, parse_wish
from fewbits.quant_ops.reference import decode_file
from fewbits.quant_ops.report.report import Report
from fewbits.quant_ops.spec import ModelPlan
from support.model_classes import FILE_PREFIX
from support.tiny_models import SMALL, STATED, Tiny, build, forward, recognised_as_small

pytestmark = pytest.mark.slow  # a hundred classes, each converted, opened and run

WISHES = [*FORMATS, "int8_tensorwise:convrot=auto"]
IN_TURN = [*FORMATS, "int8_tensorwise"]
# In every format without --matrix too: the three that take least time.
REPRESENTATIVE = ("AuraFlow", "CosmosT2V", "Flux2")
# Half a minute each on an idle machine, so only with --matrix; with real widths they are in tests/planning.
LARGE = ("RT_DETR_v4", "DepthAnything3", "SAM3", "SAM31")
# All its widths are numbers in ComfyUI's code, 2.2 billion parameters; with them it is in tests/planning.
NOT_SMALL = ("MiniMaxMusic3",)
# Classes that ComfyUI's own nodes cannot save, quantized or not.
UNSAVED = ("RT_DETR_v4",)
# Prefixes of whole files that ComfyUI's loader takes off.
STRIPPED = {"PiD": "net."}
# Formats whose activations ComfyUI rounds too -> how far the output may be from that of the decoded weights. Measured:
# 0.015 and 0.22 (SD15), at most 0.046 and 0.55 (Krea2). asym_w4a8_int8: 1.5e-6, and 0.0033 (Flux2) where ComfyUI from
# 0.31 on multiplies. All others are equal, but where a layer that does not divide becomes int8 (HunyuanDiT's fc2).
ROUNDED = {"convrot_w4a4": 0.6, "int8": 0.06, "asym_w4a8": 0.02}
EXACT = 1e-5
BESIDE = (".comfy_quant", ".bias")  # of which ComfyUI writes fewer keys, or casts them
# How far it may be from the original's. Measured: 0.15 (float8_e5m2), 0.35 (bnb_fp4, SV3D), 0.77 (convrot_w4a4, Krea2).
FOUR_BIT = ("bnb", "nvfp4", "convrot_w4a4", "asym_w4a8_int8")


def cases(matrix: bool) -> list[tuple[str, str]]:
    """(class, wish): all wishes of all; without `matrix`, a format each in turn, and all formats of a few."""
    made = []
    for number, name in enumerate(name for name in STATED if name in SMALL):
        if matrix:
            wishes = WISHES
        elif name in LARGE:
            wishes = []
        else:
            wishes = FORMATS if name in REPRESENTATIVE else [IN_TURN[number % len(IN_TURN)]]
        made += [(name, wish) for wish in wishes]
    return made


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        chosen = cases(metafunc.config.option.matrix)
        ids = [f"{name}-{wish}" for name, wish in chosen]
        metafunc.parametrize("case", chosen, ids=ids, indirect=True, scope="module")


@pytest.fixture(scope="session")
def classes(comfy):
    import comfy.supported_models

    return {cls.__name__: cls for cls in comfy.supported_models.models}


@dataclass
class Original:
    """A tiny class as a file, and what ComfyUI makes of it."""

    tiny: Tiny
    path: Path

    @cached_property
    def loaded(self) -> tuple[object, list]:
        return load(self.tiny.name, self.path)

    @cached_property
    def output(self) -> torch.Tensor:
        return forward(self.loaded[0], self.tiny.name)


@dataclass
class Case:
    """A tiny class quantized by the file door."""

    original: Original
    wish: str
    path: Path
    report: Report
    made: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.original.tiny.name

    @cached_property
    def loaded(self) -> tuple[object, list]:
        return load(self.name, self.path)


def load(name: str, path: Path) -> tuple[object, list]:
    """The MODEL of ComfyUI's own loader, and what detection said of the file."""
    import comfy.sd

    with recognised_as_small(name) as seen:
        return comfy.sd.load_diffusion_model(str(path)), seen


_last: dict[str, Original] = {}


@pytest.fixture(scope="module")
def case(request, classes, tmp_path_factory):
    name, wish = request.param
    if name not in classes:
        pytest.skip(f"this ComfyUI does not have {name}")
    folder = tmp_path_factory.mktemp("case")
    if name not in _last:
        for old in _last.values():
            old.path.unlink()
        _last.clear()
        gc.collect()  # MODELs are cycles
        tiny = build(name)
        path = tmp_path_factory.mktemp("class") / f"{name}.safetensors"
        save_file(tiny.tensors, path, metadata=tiny.metadata)
        _last[name] = Original(tiny, path)
    original, path = _last[name], folder / "file.safetensors"
    report = quantize_file(original.path, path, Recipe(parse_wish(wish)))
    yield Case(original, wish, path, report)
    path.unlink()


def class_of(model: object) -> str:
    return type(model.model.model_config).__name__


def quantized_modules(model: object) -> list[torch.nn.Module]:
    parts = model.model.diffusion_model.modules()
    return [part for part in parts if getattr(part, "quant_format", None)]


def most_rounded(format: str) -> float:
    limits = [most for start, most in ROUNDED.items() if format.startswith(start)]
    return max(limits, default=EXACT)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_every_class_of_this_comfyui_runs_here(classes):
    missing = set(classes) - set(SMALL) - set(NOT_SMALL)
    assert not missing, f"add them to support/tiny_models.py: {missing}"


def test_comfyui_takes_it_for_itself_before_and_after(case):
    (model, before), (quantized, after) = case.original.loaded, case.loaded
    assert class_of(model) == class_of(quantized) == case.name
    assert before == after
    layers = [layer for layer in case.report.plan.layers if layer.format]
    assert layers, "nothing is quantized"
    assert len(quantized_modules(quantized)) == len(layers), "ComfyUI reads codes as numbers"


def test_its_output_is_that_of_the_decoded_weights(case):
    import comfy.sd

    name = case.name
    tensors = {key: tensor.float() for key, tensor in case.original.tiny.tensors.items()}
    decoded = decode_file(case.path)
    tensors |= {f"{base}.weight": torch.from_numpy(value) for base, value in decoded.items()}
    with recognised_as_small(name):
        plain = comfy.sd.load_diffusion_model_state_dict(
            tensors, metadata=case.original.tiny.metadata
        )
    model = case.loaded[0]
    layers = quantized_modules(model)
    kernels = [layer._full_precision_mm for layer in layers]
    for layer in layers:
        layer._full_precision_mm = True
    got = forward(model, name)
    for layer, before in zip(layers, kernels, strict=True):
        layer._full_precision_mm = before
    error = relative_error(got, forward(plain, name))
    print(f"MEASURED decoded {name} {case.wish} {error:.2e}")
    used = {layer.format for layer in case.report.plan.layers if layer.format}
    assert error < max(most_rounded(format) for format in used)


def test_its_output_stays_near_the_originals(case):
    error = relative_error(forward(case.loaded[0], case.name), case.original.output)
    print(f"MEASURED original {case.name} {case.wish} {error:.3f}")
    assert error < (0.85 if case.wish.startswith(FOUR_BIT) else 0.3)


def test_quantized_in_a_graph_it_is_the_same_file(case, quantize, save, tmp_path):
    with recognised_as_small(case.name):
        model = quantize(case.original.loaded[0], case.wish)[0]
    save(model, tmp_path / "graph.safetensors")
    assert_same_file(tmp_path / "graph.safetensors", case.path, case.name)


def test_saved_after_loading_it_is_the_same_file(case, save, tmp_path):
    save(case.loaded[0], tmp_path / "saved.safetensors")
    assert_same_file(tmp_path / "saved.safetensors", case.path, case.name)


def test_comfyuis_own_node_saves_the_same_codes(case, tmp_path):
    import comfy.sd

    if case.name in UNSAVED:
        pytest.skip("safetensors refuses it: two of its names are one tensor")
    path = tmp_path / "own.safetensors"
    comfy.sd.save_checkpoint(str(path), case.loaded[0])
    saved, written = load_file(path), load_file(case.path)
    outputs = (layer.outputs for layer in case.report.plan.layers if layer.format)
    for spec in chain(*outputs):
        ending = f".{spec.name.removeprefix(FILE_PREFIX.get(case.name, ''))}"
        own = min((name for name in saved if f".{name}".endswith(ending)), key=len)
        if not spec.name.endswith(BESIDE):  # a dtype may differ: U8 and F8_E8M0 are both used
            assert bits(saved[own])[1:] == bits(written[spec.name])[1:], spec.name


def assert_same_file(got: Path, wanted: Path, name: str) -> None:
    """Equal bytes; the same tensors without a prefix where ComfyUI strips one, as a MODEL's names have none."""
    if got.read_bytes() == wanted.read_bytes():
        return
    prefix = STRIPPED.get(name, "")
    one = load_file(got)
    other = {key.removeprefix(prefix): tensor for key, tensor in load_file(wanted).items()}
    assert sorted(one) == sorted(other)
    different = [key for key, tensor in one.items() if bits(tensor) != bits(other[key])]
    assert not different, "their bytes differ"
    assert prefix, "metadata or order differ"


def bits(tensor: torch.Tensor) -> tuple:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), flat.numpy().tobytes()


def opens_in_stock(plan: ModelPlan) -> bool:
    """What a plan claims for the ComfyUI that the tests pin."""
    from comfyui_version import __version__

    claimed, here = (version.split(".") for version in (plan.min_comfyui, __version__))
    return not plan.requires_pack and [*map(int, claimed)] <= [*map(int, here)]


def test_stock_comfyui_opens_it_exactly_where_the_plan_says_so(case, stock):
    answer = stock.ask("diffusion_model", path=str(case.path), name=case.name)
    if not opens_in_stock(case.report.plan):
        assert "error" in answer or answer["class"] is None, "the plan claims too little"
        return
    assert answer.get("class") == case.name, answer
    error = relative_error(answer["output"], forward(case.loaded[0], case.name))
    print(f"MEASURED stock {case.name} {case.wish} {error:.2e}")
    assert error < 1e-4
