"""svd: the stored codes' error in the leading singular directions falls, plain and output error hardly move."""

import pytest
import torch

from fewbits.quant_ops.methods.learning_rate import LearningRate
from fewbits.quant_ops.methods.svd import (
    WORST_CHANNEL,
    WORTH_A_SCALE,
    SvdOptions,
    leading_directions,
    worst_channel,
)
from fewbits.quant_ops.planning.wish import parse_wish
from support.layers import correlated_rows, emoji_activations, emoji_weights, heavy_weight
from support.method_cases import FORMATS, run, same

PROMISED = ("float8_e4m3fn", "int8_tensorwise", "bnb_nf4")
# Projected error x nearest on heavy_weight(), seed 0, CPU, torch 2.11; the bound leaves 0.1.
MEASURED = {
    "float8_e4m3fn": 0.34,
    "float8_e5m2": 0.34,
    "float8_e4m3fn_rowwise": 0.31,
    "float8_e4m3fn_blockwise": 0.31,
    "float8_e4m3fn_block3d": 0.32,
    "int8_tensorwise": 0.36,
    "int8_tensorwise:scaling=tensor": 0.30,
    "int8_tensorwise:convrot=true,convrot_groupsize=64": 0.30,
    "int8_blockwise:block_size=64": 0.29,
    "int8_lodewise:block_size=64": 0.33,
    "mxfp8": 0.32,
    "nvfp4": 0.39,
    "bnb_nf4": 0.41,
    "bnb_fp4": 0.46,
    "convrot_w4a4:convrot_groupsize=64": 0.37,
    "asym_w4a8_int8:convrot_groupsize=64": 0.40,
}


def exact_projection(weight: torch.Tensor, k: int, error: torch.Tensor) -> float:
    """||U^T E V|| by a full SVD in float64, apart from the method's own directions."""
    left, _, right = torch.linalg.svd(weight.double())
    return float((left[:, :k].T @ error.double() @ right[:k].T).norm())


@pytest.mark.parametrize("text", PROMISED)
@pytest.mark.parametrize("seed", range(3))
def test_the_promise_holds_on_heavy_tailed_layers(text, seed):
    """Objective <= 0.7 x nearest by an exact SVD of the weight; weight and held-out output error <= 1.02 x.

    Measured over the seeds, CPU, torch 2.11: objective, weight, output
    fp8 .32 - .34, 1.009 - 1.010, .980 - 1.010; int8 .32 - .37, 1.009 - 1.010, .975 - 1.001;
    nf4 .40 - .43, .934 - .940, .899 - .943.
    """
    weight = heavy_weight(seed=seed)
    found = run(weight, text, "svd")
    k = SvdOptions().rank(tuple(weight.shape))
    x = correlated_rows(weight.shape[1])
    projected = exact_projection(weight, k, found.error) / exact_projection(
        weight, k, found.error_nearest
    )
    output = float((x @ found.error.T).norm() / (x @ found.error_nearest.T).norm())
    assert not found.choice.verdict
    assert projected <= 0.7
    assert found.weight_ratio <= 1.02
    assert output <= 1.02


@pytest.mark.slow
@pytest.mark.parametrize("text", FORMATS)
def test_one_loop_serves_every_format(text):
    found = run(heavy_weight(), text, "svd")
    assert not found.choice.verdict
    assert found.objective_ratio <= MEASURED[text] + 0.1
    assert found.weight_ratio <= 1.02


@pytest.fixture(scope="module")
def activations():
    """Inputs of the emoji model's layers while it draws; nothing here is told of them."""
    return emoji_activations()


@pytest.mark.slow
@pytest.mark.parametrize("text", [*PROMISED, "int8_tensorwise:scaling=tensor"])
def test_the_promise_holds_on_every_kind_of_layer_of_a_trained_model(text, activations):
    """One block of each kind; of all 22 layers on a CPU (torch 2.11) tests/benchmarks/methods.py gave as the largest
    objective, weight and output error: fp8 .541, 1.0098, 1.017; int8 row .490, 1.0100, 1.011; nf4 .548, .9401, .971;
    int8 one scale .391, 1.0100, 1.013.
    """
    broken, layers = [], emoji_weights(parse_wish(text))
    first = {
        name: weight
        for name, weight in layers.items()
        if "blocks.0." in name and ".txt_" not in name  # img_ has the same kinds
    }
    for name, weight in first.items():
        found, x = run(weight, text, "svd", name=name), activations[name]
        output = float((x @ found.error.T).norm() / (x @ found.error_nearest.T).norm())
        if (
            found.choice.verdict
            or found.objective_ratio > 0.7
            or max(found.weight_ratio, output) > 1.02
        ):
            broken.append(
                (name, found.objective_ratio, found.weight_ratio, output, found.choice.verdict)
            )
    assert len(layers) == 22 and len(first) == 8 and not broken


def with_outliers():
    """(256, 320): one input whose weights are twelve times as large as the others."""
    weight = heavy_weight()
    weight[:, 17] *= 12
    return weight


@pytest.mark.parametrize(
    ("text", "weight", "searched"),
    [
        ("float8_e4m3fn", heavy_weight(), False),
        ("int8_tensorwise", heavy_weight(), False),
        ("bnb_nf4", heavy_weight(), True),
        ("float8_e4m3fn_rowwise", heavy_weight(), True),
        ("int8_tensorwise:scaling=tensor", with_outliers(), False),
    ],
    ids=["fp8", "int8 rows", "nf4", "fp8 rows", "int8 that would clip one input"],
)
def test_a_searched_scale_is_taken_only_where_it_gains_enough_and_no_channel_pays(
    text, weight, searched
):
    found, clipped, plain = (run(weight, text, method) for method in ("svd", "mse_clip", "nearest"))
    gain = (clipped.choice.deviation.error / plain.choice.deviation.error) ** 0.5
    channel = worst_channel(clipped.error, plain.error)
    assert (gain <= WORTH_A_SCALE and channel <= WORST_CHANNEL) == searched
    assert torch.equal(found.choice.scale, (clipped if searched else plain).choice.scale)


def test_outliers_are_not_clipped_where_their_inputs_may_be_strong():
    """Measured, CPU, torch 2.11: mse_clip has .84 x nearest's weight error and 3.9 x its output error; svd 1.010, 1.024."""
    weight, text = with_outliers(), "int8_tensorwise:scaling=tensor"
    x = torch.randn(512, 320, generator=torch.Generator().manual_seed(3))
    x[:, 17] *= 10
    clipped, found = (run(weight, text, method) for method in ("mse_clip", "svd"))
    outputs = [
        float((x @ r.error.T).norm() / (x @ r.error_nearest.T).norm()) for r in (clipped, found)
    ]
    assert clipped.weight_ratio < 1 and outputs[0] > 1.5
    assert (
        found.weight_ratio <= 1.02 and outputs[1] <= 1.05
    )  # one input carries a quarter of it: chance is larger


@pytest.mark.parametrize("schedule", ["adaptive", "exponential", "plateau"])
@pytest.mark.parametrize("optimizer", ["original", "adamw", "radam"])
def test_every_optimizer_with_every_schedule_learns(optimizer, schedule):
    """Measured, CPU, torch 2.11: objective .25 - .34, radam with exponential decay .55; weight 1.004 - 1.010."""
    found = run(
        heavy_weight(128, 192), "int8_tensorwise", "svd", optimizer=optimizer, lr_schedule=schedule
    )
    assert found.objective_ratio <= 0.7 and found.weight_ratio <= 1.02


def test_equal_seeds_give_equal_bytes_whatever_ran_before():
    weight = heavy_weight(128, 192)
    first = run(weight, "float8_e4m3fn", "svd")
    torch.rand(5)
    run(heavy_weight(96, 96), "bnb_nf4", "svd", name="another")
    assert same(first, run(weight, "float8_e4m3fn", "svd"))
    assert not same(first, run(weight, "float8_e4m3fn", "svd", seed=1))


def test_inference_mode_gives_the_same_bytes():
    weight = heavy_weight(128, 192)
    for optimizer in ("original", "adamw", "radam"):
        plain = run(weight, "int8_tensorwise", "svd", optimizer=optimizer)
        with torch.inference_mode():
            assert same(plain, run(weight, "int8_tensorwise", "svd", optimizer=optimizer))


def test_the_weight_is_left_as_it_was():
    weight = heavy_weight(64, 64)
    before = weight.clone()
    run(weight, "int8_tensorwise", "svd")
    assert torch.equal(weight, before)


@pytest.mark.parametrize("at", [3, 60], ids=["in the scale search", "while learning"])
def test_a_step_may_cancel(at):
    class Cancelled(Exception):
        pass

    calls = []

    def step():
        calls.append(1)
        if len(calls) == at:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(heavy_weight(64, 96), "int8_tensorwise", "svd", step=step)
    assert len(calls) == at


OPTIONS = {
    "optimizer": "adamw",
    "num_iter": 3,
    "lr": 0.01,
    "lr_schedule": "plateau",
    "lr_factor": 0.5,
    "lr_adaptive_mode": "no-reset",
    "lr_threshold": 0.2,
    "early_stop_loss": 0.9,
    "early_stop_lr": 0.2,
    "early_stop_stall": 1,
    "top_p": 0.05,
    "min_k": 60,
    "max_k": 10,
    "full_matrix": True,
    "weight_error": 1.002,
}


@pytest.fixture(scope="module")
def default():
    return run(heavy_weight(128, 192), "int8_tensorwise", "svd")


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_changes_the_codes(default, name):
    assert not same(
        default, run(heavy_weight(128, 192), "int8_tensorwise", "svd", **{name: OPTIONS[name]})
    )


@pytest.mark.parametrize(
    ("schedule", "changed"),
    [
        ("exponential", {"lr_gamma": 0.5}),
        ("exponential", {"lr_gamma": 0.1, "lr_min": 0.2}),
        ("plateau", {"lr_patience": 0}),
        ("plateau", {"lr_patience": 0, "lr_cooldown": 5}),
    ],
    ids=["lr_gamma", "lr_min", "lr_patience", "lr_cooldown"],
)
def test_each_option_of_a_schedule_changes_its_rates(schedule, changed):
    stated = {"lr_schedule": schedule, "lr_factor": 0.9}
    weaker = {**stated, **dict(list(changed.items())[:-1])}
    steps = [True, False, False, False, True, False, False, False, False]

    def rates(**options):
        rate = LearningRate(SvdOptions(**options))
        return [rate.update(improved) for improved in steps]

    assert rates(**weaker) != rates(**stated, **changed)


def test_no_iterations_means_the_scale_search_alone():
    weight = heavy_weight(128, 192)
    assert same(run(weight, "bnb_nf4", "svd", num_iter=0), run(weight, "bnb_nf4", "mse_clip"))


def test_the_rank_follows_the_classic_formula():
    rank = lambda shape, **options: SvdOptions(**options).rank(shape)  # noqa: E731
    assert rank((3072, 12288)) == 614
    assert rank((256, 64)) == 16 and rank((8, 64)) == 8
    assert rank((20000, 20000)) == 1024
    assert rank((100, 100), top_p=0.37, min_k=1) == 37
    assert rank((100, 100), min_k=50, max_k=40) == 40


def test_the_randomized_directions_are_orthonormal_and_close_to_the_exact_ones():
    weight = heavy_weight(192, 320)
    k = 20
    generator = torch.Generator().manual_seed(0)
    found, exact = (
        leading_directions(weight, k, False, generator),
        leading_directions(weight, k, True, None),
    )
    for ours, theirs in ((found.left, exact.left), (found.right, exact.right)):
        assert torch.allclose(ours.T @ ours, torch.eye(k), atol=1e-4)
        assert (
            float((ours.T @ theirs).square().sum()) / k >= 0.98
        )  # the share of the exact subspace that is covered


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("text", FORMATS)
def test_it_works_on_a_gpu_and_repeats_there(text):
    weight = heavy_weight().cuda()
    found = run(weight, text, "svd")
    assert found.objective_ratio <= MEASURED[text] + 0.1 and found.weight_ratio <= 1.02
    assert same(found, run(weight, text, "svd"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("text", PROMISED)
def test_the_promise_holds_on_a_layer_of_a_large_model(text):
    """3072 x 3072; on a CPU this takes most of a minute, and tests/benchmarks/results/methods.csv has it."""
    weight, x = heavy_weight(3072, 3072).cuda(), correlated_rows(3072).cuda()
    found = run(weight, text, "svd")
    assert not found.choice.verdict and found.objective_ratio <= 0.7 and found.weight_ratio <= 1.02
    assert float((x @ found.error.T).norm() / (x @ found.error_nearest.T).norm()) <= 1.02
