"""Every format on every ComfyUI that the tests know: with the pack, and for native formats also without it."""

import os
from pathlib import Path

import pytest

from support.harness import EMOJI_NODES, PACK, PROMPTS, ComfyServer, emoji_models, readme
from support.harness.quality import compare, sample
from support.wishes import WISHES, least_ssim, write_emoji

OLDER = dict(
    line.split("=", 1) for line in os.environ.get("FEWBITS_OLDER_COMFYUI", "").splitlines()
)
PINNED = "0.30.0"
VERSIONS = [*OLDER, PINNED]
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


@pytest.fixture(scope="module")
def found():
    """version -> label -> cell of the table."""
    return {}


@pytest.fixture(scope="module")
def ours():
    """label -> samples on the first version where the pack opened the file."""
    return {}


def opened(server, files, originals):
    """Label -> samples of the files that give the original's picture here."""
    found = {}
    for label, path in files.items():
        try:
            samples = sample(server, path.name, PROMPTS[:1])
        except RuntimeError:
            continue
        if compare(samples, originals).ssim >= least_ssim(label) - MARGIN:
            found[label] = samples
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_what_opens_where(comfyui, files, originals, found, ours, tmp_path, version):
    tree = Path(OLDER.get(version, comfyui))
    models = emoji_models(*files.values())
    with ComfyServer(
        tmp_path / "pack", custom_nodes=[PACK, EMOJI_NODES], models=models, tree=tree
    ) as server:
        assert server.stats["system"]["comfyui_version"] == version
        with_pack = opened(server, files, originals)
        assert not server.log_problems()
    with ComfyServer(
        tmp_path / "stock", custom_nodes=[EMOJI_NODES], models=models, tree=tree
    ) as server:
        without = opened(server, files, originals)
    assert set(without) <= set(with_pack)
    found[version] = {
        label: STOCK if label in without else PACKED if label in with_pack else NEITHER
        for label in files
    }
    for label, samples in with_pack.items():
        if found[version][label] == PACKED:  # our own code on every version: the same numbers
            first = ours.setdefault(label, samples)
            assert compare(samples, first).latent_cosine >= SAME, label


def test_the_readme_says_what_was_found(found):
    if set(found) != set(VERSIONS) or not OLDER:
        pytest.fail(
            "needs the rows of the test above, on all versions: run the whole file with dev.py"
        )
    header = ["format", *(f"ComfyUI {version}" for version in VERSIONS)]
    names = {
        label: f"`{wish.split(':')[0]}`" + label.removeprefix(wish.split(":")[0])
        for label, wish in WISHES.items()
    }
    rows = [[names[label], *(found[version][label] for version in VERSIONS)] for label in WISHES]
    if readme.WRITE:
        readme.write("versions", header, rows)
    assert readme.table("versions") == [header, *rows]
