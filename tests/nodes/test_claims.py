"""Of files of every kind: what is said to load in ComfyUI, stock or with FewBits, has the right weights there.

Of 1,139 files whose layer is known 142 are said to load in stock ComfyUI, 337 with FewBits; --matrix tries all.
"""

import inspect

import pytest
import torch
from safetensors.torch import save_file

from fewbits.quant_ops.doors import inspect_file
from fewbits.quant_ops.spec import version_key
from support import strange
from support.every_door import coarseness, distance

FILES = {name: file for name, file in strange.files().items() if file.meaning is not None}
SOME = 6


def pytest_generate_tests(metafunc):
    if "names" in metafunc.fixturenames:
        chosen = list(FILES)[:: 1 if metafunc.config.getoption("matrix") else SOME]
        groups = [chosen[start : start + 40] for start in range(0, len(chosen), 40)]
        metafunc.parametrize("names", groups, ids=[names[0] for names in groups])


def read_by_comfyui(comfy, tensors, metadata, shape, *, stock):
    """The weight that ComfyUI's layer multiplies by, without our seams or with them.

    Raises:
        Exception: whatever ComfyUI raises.
    """
    own = inspect.unwrap if stock else (lambda function: function)
    state, _ = own(comfy.utils.convert_old_quants)({**tensors}, "", metadata=metadata)
    n, k = shape
    layer = torch.nn.Linear(k, n, bias=False)
    if comfy.utils.detect_layer_quantization(state, ""):
        ops = own(comfy.ops.mixed_precision_ops)({"mixed_ops": True}, torch.float32)
        layer = ops.Linear(k, n, bias=False, device="cpu", dtype=torch.float32)
    inside = {name.removeprefix("a."): value for name, value in state.items() if name[:2] == "a."}
    layer.load_state_dict(inside, strict=False)
    weight = layer.weight.data
    return (weight.dequantize() if hasattr(weight, "_qdata") else weight).float()


CLAIMS = {"stock": "loads in stock", "pack": "needs FewBits"}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_file_that_is_said_to_load_is_right_there(comfy, claim, names, tmp_path):
    from comfyui_version import __version__

    wrong = {}
    for index, name in enumerate(names):
        file = FILES[name]
        path = tmp_path / f"{index}.safetensors"
        tensors = {key: tensor.contiguous().clone() for key, tensor in file.tensors.items()}
        save_file(tensors, path, file.metadata or None)
        says = inspect_file(path).loads_in
        since = says.partition(">= ")[2].split(",")[0]
        if not says.startswith(CLAIMS[claim]):
            continue
        if since and version_key(since) > version_key(__version__):
            continue
        shape, stock = tuple(file.meaning.shape), claim == "stock"
        try:
            got = read_by_comfyui(comfy, tensors, file.metadata, shape, stock=stock)
            error = distance(got, file.meaning)
        except Exception as refusal:  # ComfyUI refuses a file by many errors, some of torch's own
            error = f"{type(refusal).__name__}: {refusal}"[:200]
        if isinstance(error, str) or error > coarseness() + 0.02:
            wrong[name] = (says, error)
    assert not wrong
