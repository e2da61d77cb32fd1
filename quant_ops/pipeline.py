"""source -> plan -> sink, the only loop over layers; reading, computing and writing overlap."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from .calibration import Calibration
from .checkpoint.metadata import parse_marker
from .checkpoint.reader import stored_text
from .checkpoint.scales import scale_problem
from .errors import CheckpointError, RecipeError, SourceError
from .formats import get_format
from .formats.base import marker_bytes
from .methods import Choice, Inputs, Layer, choose, get_method, layer_generator
from .planning.calibrated import calibrated, input_scale, with_input_scales
from .planning.planner import make_plan, stored_markers_needed
from .planning.recipe import Recipe
from .report.layer import LayerResult, OutputError, output_error, retention, saturated
from .report.report import Report
from .sources import DTYPE_NAMES, TORCH_DTYPES, TensorSink, TensorSource
from .spec import ITEM_SIZES, LayerInput, LayerPlan, ModelPlan, TensorSpec
from .workers import workers

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
COPY = Recipe(primary=None)  # decides about no layer: codes and weights are carried over
UNPATCHED = "\0"  # in a layer's tensors: its weight before a LoRA; no name in a file
HUGE = 2.0**120  # |w| above this counts as Inf
REASONS = 3  # why nothing is quantized, or layers moved: so many are named
# Layers being written or waiting for it. Those of a GPU wait in its memory, and keep the disk busy
# while a large one is read.
MAY_WAIT = {False: 1, True: 4}

# (done bytes, total bytes, layer name): called from the caller's thread before each layer and
# between its steps, so that cancelling waits for a part of a layer only; may raise to cancel.
ProgressFn = Callable[[int, int, str], None]
PlanFn = Callable[[ModelPlan], None]
Tensors = dict[str, torch.Tensor]


def ignore_progress(done: int, total: int, layer: str) -> None:
    """The progress callback that does nothing."""


def plan_source(source: TensorSource, recipe: Recipe, clashes: set[str] | None = None) -> ModelPlan:
    """`make_plan` with the markers that only tensors hold; reads a few bytes per quantized layer,
    no weights.
    """
    markers = {}
    try:
        for name in stored_markers_needed(source.header):
            base = name.removesuffix(".comfy_quant")
            markers[base] = parse_marker(base, stored_text(source, name))
        return make_plan(source.header, recipe, markers, clashes)
    except (CheckpointError, SourceError) as error:
        raise error.at(source.name) from None


def plan_run(
    source: TensorSource,
    recipe: Recipe,
    *,
    calibration: Calibration | None = None,
    input_scales: bool = False,
) -> ModelPlan:
    """The plan that `quantize` carries out, with what it refuses before it reads a weight.

    Raises:
        RecipeError: see `quantize`.
    """
    plan = calibrated(plan_source(source, recipe), calibration, source.name)
    if input_scales:
        plan = with_input_scales(plan, calibration, source.name)
    refuse_plain_copy(source.name, plan)
    return plan


@dataclass(frozen=True)
class Conditions:
    """What codes depend on beside the plan and the weights: where they are computed, the seed, and
    what methods that need inputs work from.
    """

    device: torch.device = CPU
    seed: int = 0
    calibration: Calibration | None = None


def quantize(
    source: TensorSource,
    sink: TensorSink,
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    calibration: Calibration | None = None,
    input_scales: bool = False,
    on_plan: PlanFn | None = None,
    on_progress: ProgressFn = ignore_progress,
) -> Report:
    """Carry every tensor over as the recipe's plan says: quantized, re-labelled, kept or left out.
    The sink is complete when this returns and untouched when it raises.

    Args:
        device: where codes are computed; equal sources and recipes give equal bytes on equal
            devices.
        calibration: what methods that need one work from.
        input_scales: store the scale of each layer's inputs, where the format takes one.
        on_plan: receives the plan before any weight is read.
        on_progress: called before each layer and between its steps; whatever it raises cancels the
            run.

    Raises:
        RecipeError: not one layer would be stored quantized; the commonest reasons are named.
        QuantError: see `plan_source`; and CheckpointError for NaN or Inf in a weight, by tensor
            name and count.
    """
    plan = plan_run(source, recipe, calibration=calibration, input_scales=input_scales)
    if on_plan:
        on_plan(plan)
    conditions = Conditions(torch.device(device), recipe.seed, calibration)
    return _carry_out(plan, source, sink, conditions, on_progress=on_progress)


def rewrite(
    source: TensorSource,
    sink: TensorSink,
    *,
    on_plan: PlanFn | None = None,
    on_progress: ProgressFn = ignore_progress,
) -> Report:
    """`quantize` without a recipe: codes and weights are carried over, labels written anew."""
    plan = plan_source(source, COPY)
    if on_plan:
        on_plan(plan)
    return _carry_out(plan, source, sink, Conditions(), on_progress=on_progress)


def _carry_out(
    plan: ModelPlan,
    source: TensorSource,
    sink: TensorSink,
    conditions: Conditions,
    *,
    on_progress: ProgressFn,
) -> Report:
    started = time.perf_counter()
    results = []
    done, total = 0, plan.bytes_before
    on_cpu = conditions.device.type == "cpu"
    with (
        ThreadPoolExecutor(1, "fewbits-read") as reads,
        ThreadPoolExecutor(1, "fewbits-write") as writes,
        workers(on_cpu and all(map(_in_passes, plan.layers))) as compute,
    ):
        running: deque[tuple[LayerPlan, object]] = deque()
        writing: deque[Future] = deque()

        def step_of(layer: LayerPlan) -> Callable[[], None]:
            return functools.partial(on_progress, done, total, layer.name)

        def finish() -> None:
            """Take the oldest layer and hand it on, once few enough wait to be written."""
            nonlocal done
            layer, handle = running.popleft()
            outputs, result = compute.result(handle, step_of(layer))
            if result:
                results.append(result)
            from_gpu = conditions.device.type == "cuda" and layer.action == "quantize"
            while len(writing) >= MAY_WAIT[from_gpu]:
                writing.popleft().result()
            writing.append(writes.submit(_write, sink, outputs))
            done += layer.bytes_before

        try:
            sink.open(plan, source.files)
            for layer, tensors in _read_ahead(source, plan.layers, reads):
                task = functools.partial(_convert, source.name, layer, tensors, conditions)
                running.append((layer, compute.submit(task, step_of(layer))))
                del tensors, task
                if len(running) == compute.at_once:
                    finish()
            while running:
                finish()
            while writing:
                writing.popleft().result()
            on_progress(total, total, "")
            sink.commit({result.name: result.norm for result in results})
        except BaseException:  # also ComfyUI's interrupt and Ctrl-C: clean up, then let it through
            writes.shutdown(wait=True, cancel_futures=True)
            sink.abort()
            raise
    seconds = time.perf_counter() - started
    plan = _with_moved(plan, results, conditions.device)
    return Report(plan, tuple(results), seconds, str(conditions.device))


def _with_moved(plan: ModelPlan, results: Iterable[LayerResult], device: torch.device) -> ModelPlan:
    """The plan, saying which layers were computed elsewhere than asked."""
    names = [result.name for result in results if result.moved_to_cpu]
    if not names:
        return plan
    listed = names[:REASONS]
    if len(names) > REASONS:
        listed.append("...")
    warning = (
        f"{len(names)} layers did not fit into the memory of {device} and were computed on the "
        f"CPU: {', '.join(listed)}"
    )
    return replace(plan, warnings=(*plan.warnings, warning))


def refuse_plain_copy(name: str, plan: ModelPlan) -> None:
    """Refuse a plan that quantizes nothing: a copy that calls itself a result.

    Raises:
        RecipeError: the commonest reasons, and how many layers each kept.
    """
    if any(layer.format for layer in plan.layers):
        return
    kept = Counter(layer.reason for layer in plan.layers if layer.is_layer)
    if not kept:
        kept = Counter(layer.reason for layer in plan.layers)
    reasons = "; ".join(f"{count} x {why}" for why, count in kept.most_common(REASONS))
    raise RecipeError(
        f"{name}: nothing would be quantized, so nothing is written ({reasons or 'it is empty'}); "
        "choose another file, format or preset"
    )


def _in_passes(layer: LayerPlan) -> bool:
    return layer.action != "quantize" or get_method(layer.method).in_passes


def _read_ahead(
    source: TensorSource, layers: tuple[LayerPlan, ...], reads: ThreadPoolExecutor
) -> Iterator[tuple[LayerPlan, Tensors]]:
    """Layers with their tensors; exactly one layer is read ahead, so that memory stays at a few
    layers.
    """
    wanted = [layer for layer in layers if layer.outputs]

    def fetch(layer: LayerPlan) -> Tensors:
        tensors = {spec.name: source.read(spec.name) for spec in layer.inputs}
        weight = f"{layer.name}.weight"
        if layer.action == "quantize" and weight in source.header.patched:
            tensors[UNPATCHED] = source.unpatched(weight)
        return tensors

    pending = [reads.submit(fetch, layer) for layer in wanted[:1]]
    for index, layer in enumerate(wanted, 1):
        tensors = pending.pop().result()
        pending += [reads.submit(fetch, after) for after in wanted[index : index + 1]]
        yield layer, tensors
        del tensors


def _write(sink: TensorSink, outputs: Tensors) -> None:
    for name, tensor in outputs.items():
        sink.write(name, tensor)


def _convert(
    file: str,
    layer: LayerPlan,
    tensors: Tensors,
    conditions: Conditions,
    step: Callable[[], None],
) -> tuple[Tensors, LayerResult | None]:
    """One layer -> (stored tensors by full name, measured result). Takes the weight out of
    `tensors`.
    """
    if layer.action == "keep":
        return {
            spec.name: tensors[spec.name].to(TORCH_DTYPES[spec.dtype]) for spec in layer.outputs
        }, None
    marker = torch.frombuffer(bytearray(marker_bytes(layer.marker)), dtype=torch.uint8)
    if layer.action == "recode":
        outputs, result = _recoded(file, layer, tensors), None
    else:
        outputs, result = _quantized(file, layer, tensors, conditions, step=step)
    return {**outputs, f"{layer.name}.comfy_quant": marker}, result


def _recoded(file: str, layer: LayerPlan, tensors: Tensors) -> Tensors:
    """The same codes and scales under the names of the plan."""
    wanted = [spec for spec in layer.outputs if spec.name in tensors]
    copied = {spec.name: _same_bytes(tensors[spec.name], spec) for spec in wanted}
    own = {name[len(layer.name) + 1 :]: tensor for name, tensor in copied.items()}
    if problem := scale_problem(own):
        raise CheckpointError(
            f"{file}: layer '{layer.name}': {problem}; the file is damaged: get a good copy"
        )
    return copied


def _quantized(
    file: str,
    layer: LayerPlan,
    tensors: Tensors,
    conditions: Conditions,
    *,
    step: Callable[[], None],
) -> tuple[Tensors, LayerResult]:
    """`_encoded` where the conditions say, or on the CPU if there is too little memory for it."""
    key, base = f"{layer.name}.weight", tensors.get(UNPATCHED)
    if conditions.device.type != "cpu":
        try:
            weight = tensors[key].detach().to(conditions.device)
            return _encoded(file, layer, weight, conditions, step=step, base=base)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
        # not before here: the error holds the tensors that were in the way
        torch.cuda.empty_cache()
        logger.warning("layer %s is computed on the CPU: %s", layer.name, reason)
    # no other reference: a rotated weight replaces the source in memory
    weight = tensors.pop(key).detach()
    there = replace(conditions, device=CPU)
    outputs, result = _encoded(file, layer, weight, there, step=step, base=base)
    return outputs, replace(result, moved_to_cpu=conditions.device.type != "cpu")


def _encoded(
    file: str,
    layer: LayerPlan,
    weight: torch.Tensor,
    conditions: Conditions,
    *,
    step: Callable[[], None],
    base: torch.Tensor | None = None,
) -> tuple[Tensors, LayerResult]:
    """Codes and scales of a weight that lies on the device of the conditions.

    Args:
        base: the weight before a LoRA was baked in; what is left of that is then measured.
    """
    device, key = conditions.device, f"{layer.name}.weight"
    shape = tuple(weight.shape)
    format = get_format(layer.format)
    grid = format.grid(LayerInput(shape, DTYPE_NAMES[weight.dtype]), layer.options)
    method = get_method(layer.method)
    given_weight = weight
    weight = format.prepare(weight, layer.options)
    # What is measured in the pass that rounds it shows there whether it is finite.
    shown = weight is given_weight and method.in_passes and device.type == "cpu"
    if not shown:
        _refuse_non_finite(file, key, given_weight)
    del given_weight
    step()
    options = method.configure(dict(layer.method_options))
    generator = layer_generator(conditions.seed, layer.name, device)
    inputs = _inputs(layer, conditions.calibration, device)
    given = Layer(
        weight,
        grid,
        options,
        generator,
        step=step,
        inputs=inputs if method.needs_inputs else None,
    )
    choice = choose(method, given)
    if shown and not math.isfinite(choice.deviation.signal):
        _refuse_non_finite(file, key, weight)
    step()
    output = _output_error(given, choice, inputs)
    left = None
    if base is not None and base.shape == shape:
        before = format.prepare(base.detach().to(device), layer.options)
        left = retention(before, weight, grid.decode(choice.codes, choice.scale))
    packed = format.pack(choice.codes, choice.scale, layer.options)
    outputs = {f"{layer.name}.{suffix}": tensor for suffix, tensor in packed.items()}
    of_inputs = input_scale(layer, conditions.calibration)
    if of_inputs is not None:
        outputs[f"{layer.name}.input_scale"] = torch.tensor(of_inputs, dtype=torch.float32)
    if device.type == "cuda":
        # another thread copies the outputs, on a stream of its own
        torch.cuda.current_stream(device).synchronize()
    return outputs, LayerResult(
        name=layer.name,
        format=layer.format,
        method=layer.method,
        deviation=choice.deviation,
        elements=choice.codes.numel(),
        saturated=saturated(choice.codes, grid.ends),
        squared_error_nearest=choice.error_nearest,
        objective=choice.objective,
        objective_nearest=choice.objective_nearest,
        verdict=choice.verdict,
        output=output,
        retention=left,
    )


def measured(
    file: str, layer: LayerPlan, weight: torch.Tensor, conditions: Conditions
) -> LayerResult:
    """What `quantize` would measure of a planned layer; nothing is stored.

    Args:
        weight: (N, K), or some of its rows in blocks that the format's steps divide.
    """
    tensors = {f"{layer.name}.weight": weight}
    return _quantized(file, layer, tensors, conditions, step=lambda: None)[1]


def _inputs(
    layer: LayerPlan, calibration: Calibration | None, device: torch.device
) -> Inputs | None:
    """What the calibration knows of the layer's inputs, in the basis of the weight that gets
    codes.
    """
    rows, columns = layer.inputs[0].shape  # of the layer, of which some rows may be looked at
    if calibration is None or calibration.missing(layer.name, (rows, columns)):
        return None
    format = get_format(layer.format)
    known = calibration.inputs_of(layer.name, (rows, columns), device)
    return known.map(lambda rows: format.prepare(rows, layer.options))


def _output_error(given: Layer, choice: Choice, inputs: Inputs | None) -> OutputError | None:
    if inputs is None:
        return None
    decoded = given.grid.decode(choice.codes, choice.scale)
    seen = given.inputs is not None and not choice.verdict
    return output_error(given.weight, decoded, inputs, seen=seen)


def _same_bytes(tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """The tensor under the dtype it is planned with: block scales stored as E8M0 or U8 change name,
    not bytes.
    """
    renamed = tensor.itemsize == ITEM_SIZES[spec.dtype] == 1
    if renamed:
        return tensor.contiguous().view(TORCH_DTYPES[spec.dtype])
    return tensor


def _refuse_non_finite(file: str, key: str, weight: torch.Tensor) -> None:
    if weight.numel() == 0:
        return
    low, high = torch.aminmax(weight)
    if bool(torch.maximum(high, -low) <= HUGE):  # False for NaN too
        return
    nan = int(weight.isnan().sum())
    huge = int((weight.abs() > HUGE).sum())
    raise CheckpointError(
        f"{file}: tensor '{key}' has {nan} NaN and {huge} infinite values of {weight.numel()}; "
        "nothing was written; the model is damaged: get a good copy, or keep this layer with a rule"
    )
