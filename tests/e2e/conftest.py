"""One ComfyUI with the pack and one without, each started once for all end-to-end tests."""

import functools

import pytest

from support.harness import EMOJI_NODES, PACK, ComfyServer, emoji_models
from support.harness.emoji import ORIGINAL
from support.harness.quality import sample
from support.wishes import write_emoji


@pytest.fixture(scope="session")
def server(comfyui, tmp_path_factory):
    """ComfyUI with FewBits, the emoji nodes and the emoji model."""
    base = tmp_path_factory.mktemp("with_pack")
    with ComfyServer(
        base,
        custom_nodes=[PACK, EMOJI_NODES],
        models=emoji_models(),
        tree=comfyui,
        forked=True,
    ) as running:
        yield running


@pytest.fixture(scope="session")
def stock(comfyui, tmp_path_factory):
    """ComfyUI without FewBits."""
    base = tmp_path_factory.mktemp("stock")
    with ComfyServer(
        base,
        custom_nodes=[EMOJI_NODES],
        models=emoji_models(),
        tree=comfyui,
        forked=True,
    ) as running:
        yield running


@pytest.fixture(scope="session")
def original(stock):
    """`original(prompt, steps)` -> the bf16 original's sample from a ComfyUI that has never seen FewBits; each is drawn once."""

    @functools.cache
    def draw(prompt, steps=16):
        return sample(stock, ORIGINAL, [prompt], steps)[prompt]

    return draw


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """`written(label)` -> the emoji model in one of WISHES; each is converted once."""
    folder = tmp_path_factory.mktemp("written")
    return functools.cache(lambda label: write_emoji(folder, label))


@pytest.fixture(scope="session")
def drawn(server, written):
    """`drawn(label, prompt, steps)` -> that file's sample through the stock loader, beside the pack; each is drawn once."""

    @functools.cache
    def draw(label, prompt, steps=16):
        path = written(label)
        server.add_model("diffusion_models", path)
        return sample(server, path.name, [prompt], steps)[prompt]

    return draw
