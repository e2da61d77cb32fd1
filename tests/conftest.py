"""Makes subprocesses find `fewbits` as this process does, and offers the ComfyUI tree that dev.py prepared."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
_paths = [str(HERE / "import_shim"), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(os.pathsep.join(_paths).split(os.pathsep)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """GPU tests are left out where there is no CUDA device."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The ComfyUI folder to test against."""
    tree = os.environ.get("FEWBITS_COMFYUI")
    if not tree:
        pytest.fail(
            "no ComfyUI to test against: run `python3 dev.py test`, or set FEWBITS_COMFYUI to a ComfyUI folder"
        )
    return Path(tree)
