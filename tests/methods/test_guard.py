"""The guard in one place: nearest is stored unless the method is at least as good after rounding."""

import pytest
import torch

from fewbits.kernels.grids import TiledGrid
from fewbits.kernels.levels import INT8
from fewbits.kernels.scales import Geometry
from fewbits.quant_ops.errors import RecipeError
from fewbits.quant_ops.methods import METHODS, Layer, choose, get_method, layer_generator
from fewbits.quant_ops.methods.base import Method
from support.layers import heavy_weight
from support.method_cases import FORMATS, run

GRID = TiledGrid(INT8, Geometry(1, None))
NAN = float("nan")


class Claims(Method):
    """Codes of twice nearest's scale, and an objective that says what the test wants."""

    def __init__(self, own: float, nearest: float, proxy: bool = False):
        self.name, self.own, self.nearest, self.proxy = "claims", own, nearest, proxy

    def quantize(self, layer):
        coarse = layer.grid.scale(layer.weight) * 2
        codes = layer.grid.encode(layer.weight, coarse)
        return (
            codes,
            coarse,
            lambda codes, scale: self.own if torch.equal(scale, coarse) else self.nearest,
        )


@pytest.mark.parametrize(
    ("own", "nearest", "taken"),
    [
        (1.0, 2.0, True),
        (2.0, 2.0, True),
        (2.1, 2.0, False),
        (NAN, 2.0, False),
        (1.0, NAN, False),
        (0.0, 0.0, True),
    ],
    ids=["better", "equal", "worse", "nan", "nan of nearest", "both zero"],
)
def test_a_method_is_taken_only_if_it_is_at_least_as_good(own, nearest, taken):
    weight = heavy_weight(8, 64)
    choice = choose(
        Claims(own, nearest), Layer(weight, GRID, None, layer_generator(0, "layer", weight.device))
    )
    codes, scale = GRID.nearest(weight)
    assert torch.equal(choice.codes, codes) is not taken
    assert torch.equal(choice.scale, scale) is not taken
    assert bool(choice.verdict) is not taken
    assert choice.deviation == GRID.deviation(weight, choice.codes, choice.scale)


def test_a_proxy_objective_may_not_cost_more_than_two_percent_of_weight_error():
    weight = heavy_weight(8, 64)  # twice the scale doubles the error
    generator = layer_generator(0, "layer", weight.device)
    kept = choose(Claims(1.0, 2.0, proxy=True), Layer(weight, GRID, None, generator))
    assert torch.equal(kept.codes, GRID.nearest(weight)[0])
    assert "weight error" in kept.verdict and "1.02" in kept.verdict


ADVERSARIAL = {
    "zero": torch.zeros(64, 128),
    "constant": torch.full((64, 128), 0.013),
    "one outlier": torch.randn(64, 128, generator=torch.Generator().manual_seed(1)).index_put(
        (torch.tensor([5]), torch.tensor([7])), torch.tensor(1e4)
    ),
    "huge": heavy_weight(64, 128) * 2.0**100,
    "tiny": heavy_weight(64, 128) * 2.0**-60,
    "zero rows": heavy_weight(64, 128) * (torch.arange(64) % 3 == 0)[:, None],
    "on the grid": torch.randint(
        -127, 128, (64, 128), generator=torch.Generator().manual_seed(2)
    ).float(),
    "rank one": torch.outer(torch.linspace(-1, 1, 64), torch.linspace(0, 1, 128)),
}


def marked(name):
    """Two thirds of the time go to those that are shown activations."""
    marks = pytest.mark.slow if get_method(name).needs_inputs else ()
    return pytest.param(name, marks=marks)


# Steps that show what the guard does; learning well is in the methods' own tests.
FEW_STEPS = {"svd": {"num_iter": 8}, "adaround": {"num_iter": 20, "passes": 1}}


@pytest.mark.slow
@pytest.mark.parametrize("name", map(marked, sorted(METHODS)))
@pytest.mark.parametrize("weight", ADVERSARIAL.values(), ids=ADVERSARIAL.keys())
@pytest.mark.parametrize("text", FORMATS)
def test_no_method_is_worse_than_nearest_and_zeros_stay_zero(text, weight, name):
    found = run(weight, text, name, **FEW_STEPS.get(name, {}))
    choice = found.choice
    if name != "nearest":
        assert choice.objective <= choice.objective_nearest or choice.objective != choice.objective
        if not get_method(name).needs_inputs:  # those trade weight error for output error
            assert choice.deviation.error <= 1.02**2 * choice.error_nearest
    decoded = found.grid.decode(choice.codes, choice.scale)
    assert decoded.isfinite().all()
    assert not decoded[(found.weight == 0).all(1)].any()
    if not weight.any():
        plain = run(weight, text, "nearest")
        assert all(torch.equal(a, b) for a, b in zip(found.tensors(), plain.tensors(), strict=True))


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (17, 129), (3, 0), (0, 8)], ids=str)
def test_odd_and_empty_shapes_work(shape, name):
    weight = heavy_weight(20, 130)[: shape[0], : shape[1]].contiguous()
    found = run(weight, "int8_tensorwise:scaling=tensor", name)
    assert found.choice.codes.shape == shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mse_clip", "svd"])
def test_codes_are_those_of_the_weight_widened_to_float32(name, dtype):
    weight = heavy_weight(48, 64).to(dtype)
    found, wide = run(weight, "bnb_nf4", name), run(weight.float(), "bnb_nf4", name)
    assert all(torch.equal(a, b) for a, b in zip(found.tensors(), wide.tensors(), strict=True))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("svd", {"num_iters": 3}, "method svd has no option 'num_iters', did you mean 'num_iter'?"),
        ("nearest", {"top_p": 0.1}, "method nearest has no option 'top_p'; it allows: none"),
        (
            "svd",
            {"optimizer": "adam"},
            "method svd: optimizer must be one of original, adamw, radam; got 'adam', did you mean 'radam'?",
        ),
        ("svd", {"lr_schedule": "cosine"}, "one of adaptive, exponential, plateau"),
        ("svd", {"num_iter": 1.5}, "num_iter must be int, got 1.5"),
        ("svd", {"full_matrix": 1}, "full_matrix must be bool, got 1"),
        ("svd", {"top_p": 1.5}, "top_p must be from 0 to 1, got 1.5"),
        ("svd", {"lr": float("nan")}, "lr must be from"),
        ("mse_clip", {"steps_per_octave": 0}, "steps_per_octave must be from 1 to 64, got 0"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_wrong_options_are_refused_with_what_is_allowed(name, options, message):
    with pytest.raises(RecipeError) as error:
        get_method(name).configure(options)
    assert message in str(error.value)


def test_an_integer_is_a_fine_float_and_options_have_defaults():
    method = get_method("svd")
    assert method.configure({"lr": 1}).lr == 1.0
    assert method.configure({}) == method.Options(**method.options)


def test_a_layers_generator_depends_on_seed_and_name_alone():
    cpu = torch.device("cpu")
    draws = [
        torch.rand(4, generator=layer_generator(*key, cpu))
        for key in ((0, "a"), (0, "a"), (0, "b"), (1, "a"))
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])
