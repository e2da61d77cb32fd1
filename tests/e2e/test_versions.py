"""Every format on every ComfyUI that the tests know: with the pack, and for native formats also without it."""

import os
from pathlib import Path

import pytest

from support import results
from support.harness import EMOJI_NODES, PACK, PROMPTS, ComfyServer, emoji_models
from support.harness.quality import compare, sample
from support.wishes import WISHES, least_ssim

OLDER = dict(
    line.split("=", 1) for line in os.environ.get("FEWBITS_OLDER_COMFYUI", "").splitlines()
)
PINNED = "0.30.0"
PROMPT = PROMPTS[0]
STOCK, PACKED, NEITHER = "stock", "FewBits", "-"
# One prompt may fall below the mean of eight, by 0.04 at most where it was measured; a misread file falls below 0.2.
MARGIN = 0.1
# Cosine of the latents between versions. Measured 0.9999998 or more; quantizing activations by mistake gives 0.95 with
# bnb_nf4 and 0.9990 with int8_blockwise.
SAME = 0.9999
# Where the pinned ComfyUI runs the file itself: it rounds activations too, older ones and we do not.
# Measured 0.99954, 0.99956, 0.99988 and, with activations of 4 bits, 0.9566.
OTHER_PRODUCT = {
    "int8_tensorwise": 0.999,
    "int8_tensorwise, one scale": 0.999,
    "int8_tensorwise, ConvRot": 0.9995,
    "convrot_w4a4": 0.94,
}


def opened(draw, original):
    """Label -> sample of the files that give the original's picture; `draw(label)` raises RuntimeError for others."""
    found = {}
    for label in WISHES:
        try:
            sample = draw(label)
        except RuntimeError:
            continue
        if compare({PROMPT: sample}, {PROMPT: original}).ssim >= least_ssim(label) - MARGIN:
            found[label] = sample
    return found


@pytest.fixture(scope="session")
def draw_by(written):
    """`draw_by(server)` -> what `opened` takes."""

    def by(server):
        def draw(label):
            server.add_model("diffusion_models", written(label))
            return sample(server, written(label).name, [PROMPT])[PROMPT]

        return draw

    return by


@pytest.fixture(scope="module")
def pinned(server, drawn, original):
    """`opened` with the pack on the ComfyUI that all other tests run, and what it wrote to its log meanwhile."""
    before = len(server.log)
    found = opened(lambda label: drawn(label, PROMPT), original(PROMPT))
    return found, server.log_problems(since=before)


def both_ways(tree, folder, version, look):
    """`look` at a server with the pack, what that wrote to its log, and `look` at one without the pack."""
    models = emoji_models()
    with ComfyServer(
        folder / "pack", custom_nodes=[PACK, EMOJI_NODES], models=models, tree=tree
    ) as server:
        assert server.stats["system"]["comfyui_version"] == version
        with_pack, problems = look(server), server.log_problems()
    with ComfyServer(
        folder / "stock", custom_nodes=[EMOJI_NODES], models=models, tree=tree
    ) as server:
        return with_pack, problems, look(server)


def hold(version, with_pack, problems, without, pinned):
    """What was found on a version is what is stored, without a complaint, and our own code gives the pinned one's numbers."""
    assert not problems
    assert set(without) <= set(with_pack)
    found = dict.fromkeys(WISHES, NEITHER)
    found |= dict.fromkeys(with_pack, PACKED) | dict.fromkeys(without, STOCK)
    for label in (label for label, cell in found.items() if cell == PACKED):
        likeness = compare({PROMPT: with_pack[label]}, {PROMPT: pinned[label]}).latent_cosine
        assert likeness >= OTHER_PRODUCT.get(label, SAME), label
    assert results.stored("versions", version, found) == found


def test_what_opens_in_the_pinned_version(server, stock, draw_by, original, pinned):
    assert server.stats["system"]["comfyui_version"] == PINNED
    with_pack, problems = pinned
    hold(PINNED, with_pack, problems, opened(draw_by(stock), original(PROMPT)), with_pack)


@pytest.mark.parametrize("version", OLDER)
def test_what_opens_in_an_older_version(draw_by, original, pinned, tmp_path, version):
    def look(server):
        return opened(draw_by(server), original(PROMPT))

    hold(version, *both_ways(Path(OLDER[version]), tmp_path, version, look), pinned[0])
