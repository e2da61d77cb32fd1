"""Every format on every ComfyUI that the tests know: with the pack, and for native formats also without it."""

import os
from pathlib import Path

import pytest

from support import results
from support.harness import EMOJI_NODES, PACK, PROMPTS, ComfyServer, emoji_models
from support.harness.quality import compare, sample
from support.wishes import WISHES

OLDER = dict(
    line.split("=", 1) for line in os.environ.get("FEWBITS_OLDER_COMFYUI", "").splitlines()
)
PINNED = "0.30.0"
PROMPT = PROMPTS[0]
STEPS = 4  # of sampling: enough to tell a file that is read rightly from one that is not
STOCK, PACKED, NEITHER = "stock", "FewBits", "-"
# Cosine of the latents between versions. Measured 0.9999998 or more; quantizing activations by mistake gives what
# OTHER_PRODUCT has.
SAME = 0.9999
# Where the pinned ComfyUI runs the file itself: it rounds activations too, older ones and we do not.
# Measured 0.99891, 0.99892, 0.99974 and, with activations of 4 bits, 0.866.
OTHER_PRODUCT = {
    "int8_tensorwise": 0.998,
    "int8_tensorwise, one scale": 0.998,
    "int8_tensorwise, ConvRot": 0.9995,
    "convrot_w4a4": 0.84,
}
READ = 0.8  # below this a version does not read a file, whatever it draws


def opened(draw, pinned):
    """Label -> sample of the files that are read as the pinned version reads them; `draw(label)` raises RuntimeError for others."""
    found = {}
    for label in WISHES:
        try:
            sample = draw(label)
        except RuntimeError:
            continue
        if likeness(sample, pinned[label]) >= READ:
            found[label] = sample
    return found


def likeness(sample, reference):
    return compare({PROMPT: sample}, {PROMPT: reference}).latent_cosine


@pytest.fixture(scope="session")
def draw_by(written):
    """`draw_by(server)` -> what `opened` takes."""

    def by(server):
        def draw(label):
            server.add_model("diffusion_models", written(label))
            return sample(server, written(label).name, [PROMPT], STEPS)[PROMPT]

        return draw

    return by


@pytest.fixture(scope="module")
def pinned(server, drawn):
    """Every file's sample with the pack on the ComfyUI that all other tests run, and what it wrote to its log meanwhile.

    That those samples are the original's is held in test_stock_loaders.py.
    """
    before = len(server.log)
    found = {label: drawn(label, PROMPT, STEPS) for label in WISHES}
    return found, server.log_problems(since=before)


def both_ways(tree, folder, version, look):
    """`look` at a server with the pack, what that wrote to its log, and `look` at one without the pack."""
    shared = {"models": emoji_models(), "tree": tree, "forked": True}
    with ComfyServer(folder / "pack", custom_nodes=[PACK, EMOJI_NODES], **shared) as server:
        assert server.stats["system"]["comfyui_version"] == version
        with_pack, problems = look(server), server.log_problems()
    with ComfyServer(folder / "stock", custom_nodes=[EMOJI_NODES], **shared) as server:
        return with_pack, problems, look(server)


def hold(version, with_pack, problems, without, pinned):
    """What was found on a version is what is stored, without a complaint, and our own code gives the pinned one's numbers."""
    assert not problems
    assert set(without) <= set(with_pack)
    found = dict.fromkeys(WISHES, NEITHER)
    found |= dict.fromkeys(with_pack, PACKED) | dict.fromkeys(without, STOCK)
    for label in (label for label, cell in found.items() if cell == PACKED):
        assert likeness(with_pack[label], pinned[label]) >= OTHER_PRODUCT.get(label, SAME), label
    assert results.stored("versions", version, found) == found


def test_what_opens_in_the_pinned_version(server, stock, draw_by, pinned):
    assert server.stats["system"]["comfyui_version"] == PINNED
    with_pack, problems = pinned
    hold(PINNED, with_pack, problems, opened(draw_by(stock), with_pack), with_pack)


@pytest.mark.parametrize("version", OLDER)
def test_what_opens_in_an_older_version(draw_by, pinned, tmp_path, version):
    samples, _ = pinned

    def look(server):
        return opened(draw_by(server), samples)

    hold(version, *both_ways(Path(OLDER[version]), tmp_path, version, look), samples)
