"""The emoji model in other writers' dialects, opened by ComfyUI's own UNETLoader over HTTP and sampled."""

import pytest
from safetensors.torch import load_file, save_file

from support import dialects
from support.harness import EMOJI, PROMPTS, emoji_workflow
from support.harness.emoji import CHECKED
from support.harness.metrics import ssim

# All layers at 4 bits, first and last projections too; INT8 rows as in the promise.
CASES = {
    "bitsandbytes": (dialects.bitsandbytes, 0.90),
    "bitsandbytes_nested": (dialects.nested, 0.90),
    "d19": (dialects.d19, 0.90),
    "int8_fast": (dialects.int8_fast, 0.985),
}


def every_matrix(make, path):
    out = {}
    for name, tensor in load_file(EMOJI / "emoji_flux.safetensors").items():
        matrix = name.endswith(".weight") and tensor.dim() == 2
        out.update(make(name.removesuffix(".weight"), tensor.float()) if matrix else {name: tensor})
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, path)
    return path


@pytest.mark.parametrize("case", CASES)
def test_the_stock_loader_opens_a_file_with_every_matrix_in_a_foreign_dialect(
    server, original, tmp_path, case
):
    make, least = CASES[case]
    path = every_matrix(make, tmp_path / f"emoji_{case}.safetensors")
    server.add_model("diffusion_models", path)
    values = []
    for prompt in CHECKED:
        run = server.run(emoji_workflow(path.name, prompt))
        assert run.status == "success", run.error
        values.append(ssim(run.images()[0], original(prompt).image))
    print(case, [round(value, 4) for value in values])
    assert sum(values) / len(values) >= least


def test_a_converted_file_gives_the_same_picture_as_the_foreign_one(server, tmp_path):
    from fewbits.quant_ops.doors import convert_file

    foreign = every_matrix(dialects.bitsandbytes, tmp_path / "emoji_theirs.safetensors")
    ours = tmp_path / "emoji_ours.safetensors"
    convert_file(foreign, ours)
    pictures = []
    for path in (foreign, ours):
        server.add_model("diffusion_models", path)
        pictures.append(server.run(emoji_workflow(path.name, PROMPTS[0], steps=4)).images()[0])
    assert pictures[0].tobytes() == pictures[1].tobytes()
