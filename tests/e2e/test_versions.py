"""Every format on every ComfyUI that the tests know: with the pack, and for native formats also without it."""

import os
from pathlib import Path

import pytest

from support import results
from support.harness import EMOJI_NODES, PACK, PROMPTS, ComfyServer, emoji_models
from support.harness.quality import compare, sample
from support.wishes import WISHES, least_ssim, write_emoji

OLDER = dict(
    line.split("=", 1) for line in os.environ.get("FEWBITS_OLDER_COMFYUI", "").splitlines()
)
PINNED = "0.30.0"
STOCK, PACKED, NEITHER = "stock", "FewBits", "-"
# One prompt may fall below the mean of eight, by 0.04 at most where it was measured; a misread file falls below 0.5.
MARGIN = 0.1
# Cosine of the latents between versions. Measured 0.9999998 or more; quantizing activations by mistake gives 0.95 with
# bnb_nf4 and 0.9990 with int8_blockwise.
SAME = 0.9999


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("versions")
    return {label: write_emoji(folder, label) for label in WISHES}


def opened(server, files, originals):
    """Label -> samples of the files that give the original's picture here."""
    found = {}
    for label, path in files.items():
        server.add_model("diffusion_models", path)
        try:
            samples = sample(server, path.name, PROMPTS[:1])
        except RuntimeError:
            continue
        if compare(samples, originals).ssim >= least_ssim(label) - MARGIN:
            found[label] = samples
    return found


@pytest.fixture(scope="module")
def pinned(server, files, originals):
    """`opened` with the pack on the ComfyUI that all other tests run, and what it wrote to its log meanwhile."""
    before = len(server.log)
    return opened(server, files, originals), server.log_problems(since=before)


def both_ways(tree, files, originals, folder, version):
    """`opened` with the pack, what that wrote to the log, and `opened` without the pack."""
    with ComfyServer(
        folder / "pack", custom_nodes=[PACK, EMOJI_NODES], models=emoji_models(), tree=tree
    ) as server:
        assert server.stats["system"]["comfyui_version"] == version
        with_pack, problems = opened(server, files, originals), server.log_problems()
    with ComfyServer(
        folder / "stock", custom_nodes=[EMOJI_NODES], models=emoji_models(), tree=tree
    ) as server:
        return with_pack, problems, opened(server, files, originals)


def hold(version, with_pack, problems, without, pinned):
    """What was found on a version is what is stored, without a complaint, and our own code gives the same numbers."""
    assert not problems
    assert set(without) <= set(with_pack)
    found = dict.fromkeys(WISHES, NEITHER)
    found |= dict.fromkeys(with_pack, PACKED) | dict.fromkeys(without, STOCK)
    for label in (label for label, cell in found.items() if cell == PACKED):
        assert compare(with_pack[label], pinned[label]).latent_cosine >= SAME, label
    assert results.stored("versions", version, found) == found


def test_what_opens_in_the_pinned_version(server, stock, files, originals, pinned):
    assert server.stats["system"]["comfyui_version"] == PINNED
    with_pack, problems = pinned
    hold(PINNED, with_pack, problems, opened(stock, files, originals), with_pack)


@pytest.mark.parametrize("version", OLDER)
def test_what_opens_in_an_older_version(files, originals, pinned, tmp_path, version):
    found = both_ways(Path(OLDER[version]), files, originals, tmp_path, version)
    hold(version, *found, pinned[0])
