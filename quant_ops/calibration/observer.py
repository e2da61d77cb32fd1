"""Watch a model run: the inputs of its linear layers go into a calibration, and nothing changes."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from .calibration import Calibration
from .effects import Again, Effects
from .statistics import InputStatistics, settle

ROW_BYTES = 2  # bfloat16
HALVES = 2
# Rows kept of one call, of the thousands that an image has: neighbours say the same thing.
ROWS_A_CALL = 16
SMALLEST_SIDE = 16  # smaller layers are never quantized


PROBED = 64  # values of an input that tell whether it was changed
# Of the inputs every so many-th is looked at in an evaluation, and each in the first one of a run.
# A CPU computes so long that nothing is gained by less than all; for a GPU each look is a few
# launches, and where Python sets the pace their time is added. A prime: what alternates from one
# evaluation to the next reaches each input alike.
SPREAD = {"cpu": 1}
SPREAD_ON_GPU = 13
# Bytes of rows on a GPU that wait for one common copy.
WAITING_BYTES = 1 << 26


@dataclass(frozen=True)
class _Seen:
    """A tensor that a layer was given in this call, the number of its statistics, some values; no
    values where nothing was learned from it.
    """

    tensor: weakref.ref
    number: int
    probe: torch.Tensor | None


def _probe(x: torch.Tensor) -> torch.Tensor:
    """A few values; tensors made in inference mode have no version to ask for."""
    flat = x.detach().reshape(-1)
    return flat[:: max(len(flat) // PROBED, 1)].clone()


class Observer:
    """Fills a calibration while the model runs inside `watching`.

    Layers that are given the very same tensor share one `InputStatistics`; should the tensor have
    been changed in place between them, which a few of its values show, the later layer is left out.
    Runs, not calls, decide the half that rows go to, so that the two halves know different prompts;
    the first run, which may stay the only one, is dealt out call by call. A later run goes to the
    half that fewer runs filled, of equal ones to the parity of the bits of its number: what comes
    at every other run, such as the negative prompt, fills both.

    From the second evaluation of a run on, only one input in `SPREAD` is looked at in each.
    Nothing waits for a GPU but one copy for `WAITING_BYTES` of rows.

    Args:
        memory: bytes that statistics may take, whatever the model.
        seed: of the choice of rows, and of disturbances.
        effects: how often the effects of all layers are measured.
    """

    def __init__(self, memory: int, seed: int = 0, effects: int = 0):
        self.memory, self.seed = memory, seed
        self.effects = Effects(effects)
        self.calibration = Calibration()
        self.run = -1
        self._calls = 0
        self._runs: tuple[set[int], set[int]] = (set(), set())  # which ones filled each half
        self._seen: dict[int, _Seen] = {}
        self._changed: dict[str, torch.Tensor] = {}
        # of the model that this run watches, which may go while the calibration stays
        self._layers: Mapping[str, torch.nn.Module] = {}
        self._model: weakref.ref | None = None
        self._capacity_now = 0
        self._spread = 1
        self._waiting = 0  # bytes

    def start_run(self, steps: int = 0) -> None:
        """A new sampling run begins, with so many calls whose effects can be measured."""
        self.run += 1
        self._model = None
        self.effects.start_run(steps)

    @contextlib.contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """One call of the model; every hook is gone afterwards, however it ends."""
        first = self._model is None or self._model() is not model
        if first:
            self._begin(model)
        half = self._half()
        self._calls += 1
        self._runs[half].add(self.run)
        self._seen.clear()
        handles = [
            layer.register_forward_pre_hook(self._hook(name, layer, self._capacity_now, half))
            for name, layer in self._looked_at(first).items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()
            if self._waiting >= WAITING_BYTES:
                self._settle()

    def _begin(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self._layers = weakref.WeakValueDictionary(_candidates(model))
        self._capacity_now = self._capacity(self._layers)
        for statistics in self.calibration.inputs:
            statistics.allow(self._capacity_now)

    def _looked_at(self, first: bool) -> Mapping[str, torch.nn.Module]:
        """Layers that get a hook: all in the first evaluation of a run, which also tells who shares
        an input; then those of some inputs, one after the other.
        """
        if first or self._spread == 1:
            return self._layers
        turn = self._calls % self._spread
        known = self.calibration.layers
        return {
            name: layer
            for name, layer in self._layers.items()
            if name not in known or known[name][0] % self._spread == turn
        }

    def _settle(self) -> None:
        settle(self.calibration.inputs)
        self._waiting = 0

    def measure(
        self, model: torch.nn.Module, again: Again, result: torch.Tensor, size: float
    ) -> None:
        """How far errors of each layer reach `result`, by an evaluation `again` for each; see
        `Effects`.
        """
        self.effects.measure(model, self.calibration.layers, again, result, size)

    def _half(self) -> int:
        if self.run <= 0:
            return self._calls % HALVES
        first, second = (len(runs - {self.run}) for runs in self._runs)
        if first == second:
            return self.run.bit_count() % HALVES
        return int(second < first)

    def _capacity(self, layers: Mapping[str, torch.nn.Module]) -> int:
        """Rows that each half of each input may keep. Layers that no call has reached yet count as
        if they shared no input.
        """
        columns = sum(statistics.size for statistics in self.calibration.inputs)
        columns += sum(
            layer.in_features
            for name, layer in layers.items()
            if name not in self.calibration.layers
        )
        return max(self.memory // (HALVES * ROW_BYTES * max(columns, 1)), ROWS_A_CALL)

    def _hook(self, name: str, layer: torch.nn.Linear, capacity: int, half: int):
        shape = (layer.out_features, layer.in_features)

        def hook(_: torch.nn.Module, arguments: tuple) -> None:
            if arguments and isinstance(arguments[0], torch.Tensor):
                self._see(name, shape, arguments[0], capacity, half=half)

        return hook

    def _see(
        self, name: str, shape: tuple[int, int], x: torch.Tensor, capacity: int, half: int
    ) -> None:
        if x.shape[-1] != shape[1] or not x.is_floating_point():
            return
        known = self._seen.get(id(x))
        shared = known is not None and known.tensor() is x
        number = known.number if shared else None
        mine = self.calibration.layers.get(name)
        if mine is None:
            mine = (self._new(shape[1], capacity) if number is None else number, *shape)
            self.calibration.layers[name] = mine
        if number == mine[0]:  # the layer before it counted these rows
            if known.probe is not None:
                self._note_change(name, known.probe, x)
            return
        self._spread = SPREAD.get(x.device.type, SPREAD_ON_GPU)
        statistics = self.calibration.inputs[mine[0]]
        looked = statistics.add(x, half, ROWS_A_CALL, self.seed)
        if looked and not statistics.exact:
            self._waiting += ROWS_A_CALL * statistics.size * x.element_size()
        self._seen[id(x)] = _Seen(weakref.ref(x), mine[0], _probe(x) if looked else None)

    def _note_change(self, name: str, before: torch.Tensor, x: torch.Tensor) -> None:
        changed = (before != _probe(x)).any()
        self._changed[name] = self._changed.get(name, changed) | changed

    def _new(self, size: int, capacity: int) -> int:
        self.calibration.inputs.append(InputStatistics(size, capacity))
        return len(self.calibration.inputs) - 1

    def finish(self) -> Calibration:
        """What was collected so far, on the CPU; collecting may go on."""
        self._settle()
        for statistics in self.calibration.inputs:
            statistics.finish()
        for name, changed in self._changed.items():
            if bool(changed):
                self.calibration.layers.pop(name, None)
        self.calibration.effects = self.effects.settled()
        return self.calibration


def _candidates(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Linear layers that could be quantized; ComfyUI's own, quantized or not, are no subclass of
    torch's.
    """
    for name, module in model.named_modules():
        sides = getattr(module, "in_features", 0), getattr(module, "out_features", 0)
        if min(sides) >= SMALLEST_SIDE:
            yield name, module
