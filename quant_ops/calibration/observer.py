"""Watch a model run: the inputs of its linear layers go into a calibration, and nothing changes."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch

from .calibration import Calibration
from .statistics import InputStatistics

ROW_BYTES = 2  # bfloat16
HALVES = 2
# Rows kept of one call, of the thousands that an image has: neighbours say the same thing.
ROWS_A_CALL = 16
SMALLEST_SIDE = 16  # smaller layers are never quantized


class Observer:
    """Fills a calibration while the model runs inside `watching`.

    Layers that are given the very same tensor share one `InputStatistics`. Runs, not calls, decide
    the half that rows go to, so that the two halves know different prompts; the first run, which
    may stay the only one, is dealt out call by call.

    Args:
        memory: bytes that statistics may take, whatever the model.
        seed: of the choice of rows.
    """

    def __init__(self, memory: int, seed: int = 0):
        self.memory, self.seed = memory, seed
        self.calibration = Calibration()
        self.run = -1
        self._calls = 0
        self._seen: dict[int, tuple[weakref.ref, int, int]] = {}
        self._generators: dict[torch.device, torch.Generator] = {}

    def start_run(self) -> None:
        """A new sampling run begins."""
        self.run += 1

    @contextlib.contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """One call of the model; every hook is gone afterwards, however it ends."""
        layers = dict(_candidates(model))
        capacity = self._capacity(layers)
        half = (self._calls if self.run <= 0 else self.run) % HALVES
        self._calls += 1
        self._seen.clear()
        handles = [
            layer.register_forward_pre_hook(self._hook(name, layer, capacity, half))
            for name, layer in layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def _capacity(self, layers: dict[str, torch.nn.Linear]) -> int:
        """Rows that each half of each input may keep."""
        columns = sum(layer.in_features for layer in layers.values())
        return max(self.memory // (HALVES * ROW_BYTES * max(columns, 1)), ROWS_A_CALL)

    def _hook(self, name: str, layer: torch.nn.Linear, capacity: int, half: int):
        shape = (layer.out_features, layer.in_features)

        def hook(_: torch.nn.Module, arguments: tuple) -> None:
            if arguments and isinstance(arguments[0], torch.Tensor):
                self._see(name, shape, arguments[0], capacity, half)

        return hook

    def _see(
        self, name: str, shape: tuple[int, int], x: torch.Tensor, capacity: int, half: int
    ) -> None:
        if x.shape[-1] != shape[1] or not x.is_floating_point():
            return
        known = self._seen.get(id(x))
        shared = known is not None and known[0]() is x and known[1] == x._version
        mine = self.calibration.layers.get(name)
        if mine is None:
            number = known[2] if shared else self._new(shape[1], capacity)
            mine = self.calibration.layers[name] = (number, *shape)
        self._seen[id(x)] = (weakref.ref(x), x._version, mine[0])
        if shared and known[2] == mine[0]:
            return  # the layer before it counted these rows
        generator = self._generator(x.device)
        self.calibration.inputs[mine[0]].add(x, half, ROWS_A_CALL, generator)

    def _new(self, size: int, capacity: int) -> int:
        self.calibration.inputs.append(InputStatistics(size, capacity))
        return len(self.calibration.inputs) - 1

    def _generator(self, device: torch.device) -> torch.Generator:
        """Its own: the model's random numbers stay as they would be."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def finish(self) -> Calibration:
        """What was collected so far, on the CPU; collecting may go on."""
        for statistics in self.calibration.inputs:
            statistics.map_tensors(lambda tensor: tensor.cpu())
        return self.calibration


def _candidates(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Linear layers that could be quantized."""
    for name, module in model.named_modules():
        linear = isinstance(module, torch.nn.Linear)
        if linear and min(module.in_features, module.out_features) >= SMALLEST_SIDE:
            yield name, module
