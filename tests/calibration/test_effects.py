"""What each layer's rounding does to the prediction, against models that are really rounded."""

import json
import struct

import pytest
import torch

from fewbits.quant_ops.calibration import Calibration, Observer, load_calibration, save_calibration
from fewbits.quant_ops.calibration.calibration import KEY
from fewbits.quant_ops.calibration.effects import Effects, energy
from fewbits.quant_ops.errors import CheckpointError
from fewbits.quant_ops.formats import get_format
from fewbits.quant_ops.spec import LayerInput


class Branches(torch.nn.Module):
    """y = last(strong(x) + weak * quiet(x)): the effect of each layer is the energy of its part."""

    def __init__(self, weak: float):
        super().__init__()
        torch.manual_seed(0)
        self.weak = weak
        self.strong, self.quiet, self.last = (torch.nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x):
        return self.last(self.strong(x) + self.weak * self.quiet(x))


@torch.no_grad()
def measured(model: torch.nn.Module, runs: int = 1) -> Calibration:
    observer = Observer(10**8, effects=runs)
    for run in range(runs):
        observer.start_run(steps=3)
        for step in range(3):
            x = torch.randn(512, 64, generator=torch.Generator().manual_seed(10 * run + step))
            with observer.watching(model):
                result = model(x)
            if observer.effects.is_due():
                observer.measure(model, lambda x=x: model(x), result, energy(result))
    return observer.finish()


def test_effects_are_those_of_the_rounded_layer():
    model = Branches(weak=0.3)
    found = measured(model).effects
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    for name in ("strong", "quiet", "last"):
        rounded = Branches(weak=0.3)
        layer = rounded.get_submodule(name)
        quantized = bnb_nf4(layer.weight.detach())
        layer.weight = torch.nn.Parameter(quantized)
        with torch.no_grad():
            truth, other = model(x), rounded(x)
        expected = float((other - truth).square().sum() / truth.square().sum())
        assert found[name] == (pytest.approx(expected, rel=1e-4), 1)


def bnb_nf4(weight: torch.Tensor) -> torch.Tensor:
    format = get_format("bnb_nf4")
    shape, options = LayerInput(tuple(weight.shape), "F32"), format.Options()
    stored = format.quantize(weight, format.grid(shape, options), options)
    return format.dequantize(stored, shape, options)


def test_a_layer_that_nothing_comes_out_of_has_none_nor_one_without_a_weight_at_hand():
    assert set(measured(Branches(weak=0.0)).effects) == {"strong", "last"}
    model = Branches(weak=0.1)
    model.strong.weight = torch.nn.Parameter(model.strong.weight.double())
    model.strong.forward = lambda x: x @ model.strong.weight.float().T
    assert set(measured(model).effects) == {"quiet", "last"}


def test_each_run_measures_once_at_another_step_until_there_are_enough():
    effects, due = Effects(wanted=3), []
    for run in range(5):
        effects.start_run(steps=8)
        for step in range(8):
            if effects.is_due():
                due.append((run, step))
                effects.measure(torch.nn.Module(), (), lambda: None, torch.zeros(1), size=1.0)
    assert due == [(0, 4), (1, 2), (2, 6)]


def test_the_model_is_left_as_it_was_and_so_are_random_numbers():
    model = Branches(weak=0.1)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    measured(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_a_file_holds_them_and_two_become_the_mean(tmp_path):
    path, seen = tmp_path / "seen.safetensors", measured(Branches(weak=0.1), runs=2)
    save_calibration(seen, path)
    loaded = load_calibration(path)
    assert loaded.effects == seen.effects and loaded.effect_of("last") == seen.effects["last"][0]
    assert loaded.effect_of("model.diffusion_model.last") == seen.effects["last"][0]
    assert loaded.effect_of("unknown") is None
    other = measured(Branches(weak=0.3), runs=1)
    loaded.merge(other)
    (mine, _), (theirs, _) = seen.effects["quiet"], other.effects["quiet"]
    assert loaded.effects["quiet"] == (pytest.approx((2 * mine + theirs) / 3), 3)


def rewritten(path, change):
    """The file with another table in its header."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    table = json.loads(header["__metadata__"][KEY])
    change(table)
    header["__metadata__"][KEY] = json.dumps(table)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def test_a_file_without_effects_is_read_and_a_damaged_one_refused(tmp_path):
    path = tmp_path / "seen.safetensors"
    save_calibration(measured(Branches(weak=0.1)), path)
    rewritten(path, lambda table: table.pop("effects"))
    assert load_calibration(path).effects == {}
    for wrong in ({"last": [-1.0, 1]}, {"last": [1.0, 0]}, {"last": 1.0}, ["last"]):
        rewritten(path, lambda table, wrong=wrong: table.update(effects=wrong))
        with pytest.raises(CheckpointError, match="damaged calibration"):
            load_calibration(path)
