"""Files of the command, opened by ComfyUI's own UNETLoader, sampled, and held against the original's pictures."""

import pytest

from support import results
from support.harness import PROMPTS, emoji_workflow
from support.harness.emoji import CHECKED
from support.harness.quality import compare
from support.harness.readme import WRITE
from support.wishes import WISHES, least_ssim

# What other processors may change; two runs on one machine agree to the last digit.
TOLERANCE = {"ssim": 0.01, "psnr": 1.0, "latent_cosine": 0.005}


@pytest.fixture
def quality(drawn, original):
    """`quality(label, prompts)`: what a file's pictures are against the original's, rounded."""

    def measure(label, prompts):
        wanted = {prompt: original(prompt) for prompt in prompts}
        found = compare({prompt: drawn(label, prompt) for prompt in prompts}, wanted)
        return {
            "ssim": round(found.ssim, 3),
            "psnr": round(found.psnr, 1),
            "latent_cosine": round(found.latent_cosine, 4),
        }

    return measure


@pytest.mark.parametrize("label", WISHES)
def test_the_stock_loader_opens_the_file_and_the_picture_is_as_good_as_stated(
    quality, written, label
):
    """One of the eight prompts whose means the table states; all of them when it is measured anew."""
    megabytes, checked = round(written(label).stat().st_size / 1e6, 2), quality(label, CHECKED)
    measured = quality(label, PROMPTS) if WRITE else {}
    found = {"megabytes": megabytes, **measured, "checked": checked}
    stated = results.stored("formats", label, found)
    assert stated["ssim"] >= least_ssim(label)
    assert stated["megabytes"] == megabytes
    for key, tolerance in TOLERANCE.items():
        assert checked[key] == pytest.approx(stated["checked"][key], rel=0, abs=tolerance), key


def test_a_pack_format_without_the_pack_fails_by_name(stock, written):
    path = written("int8_blockwise")
    stock.add_model("diffusion_models", path)
    run = stock.run(emoji_workflow(path.name, PROMPTS[0]))
    assert run.status == "error" and "int8_blockwise" in run.error["exception_message"]


def test_the_server_starts_without_a_word_about_the_pack(server):
    """Other tests of this server provoke node errors, so only what a start could write is looked for."""
    assert server.stats["devices"][0]["type"] == "cpu"
    assert "IMPORT FAILED" not in server.log and "FewBits: " not in server.log
