"""ComfyUI's own model classes, for key names and shapes that are not copied from anywhere."""

import pytest

from support import comfy_models


@pytest.fixture(scope="session")
def comfy(comfyui):
    """ComfyUI's package `comfy`, importable in this process; nothing of it runs."""
    comfy_models.import_comfy(comfyui)
