"""Ops and their backends: the eager body is the specification, a backend runs where its `why_not`
finds no reason.

The one place that knows availability. `list_backends()` says in words what would run and why
something would not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

REMEMBERED = 4096  # decisions of an op; then it forgets them all: a model has a few dozen shapes

WhyNot = Callable[..., str | None]

_OPS: dict[str, Op] = {}
_FORCED: list[str] = []


@dataclass
class Op:
    """One operation: `eager` defines the result, backends give the same result faster.

    Backends are tried in the order of registration; the first without a reason against these inputs
    runs, and is remembered. So a `why_not` may look at shape, dtype and device of tensors and at
    all other inputs, at nothing else: a body copes with every stride and address.
    """

    name: str
    eager: Callable
    backends: dict[str, tuple[Callable, WhyNot]] = field(default_factory=dict)
    # what `why_not` looks at -> decision
    chosen: dict[tuple, tuple[str, Callable]] = field(default_factory=dict)

    def backend(self, name: str, why_not: WhyNot) -> Callable[[Callable], Callable]:
        """Register a body; `why_not(*inputs)` is None when it can run, else the reason in words."""

        def register(body: Callable) -> Callable:
            self.backends[name] = (body, why_not)
            self.chosen.clear()
            return body

        return register

    def choose(self, *args: object) -> tuple[str, Callable]:
        """(backend name, body) for these inputs.

        Raises:
            RuntimeError: `use_backend` forces one that cannot run here; the message is its reason.
        """
        if _FORCED:
            return self._first(args, _FORCED[-1])
        key = tuple(
            [(a.shape, a.dtype, a.device) if isinstance(a, torch.Tensor) else a for a in args]
        )
        found = self.chosen.get(key)
        if found is None:
            if len(self.chosen) >= REMEMBERED:
                self.chosen.clear()
            found = self.chosen[key] = self._first(args)
        return found

    def _first(self, args: tuple, forced: str | None = None) -> tuple[str, Callable]:
        for name, (body, why_not) in self.backends.items():
            if forced and name != forced:
                continue
            reason = why_not(*args)
            if reason is None:
                return name, body
            if forced:
                raise RuntimeError(f"{self.name}: backend {name} cannot run: {reason}")
        return "eager", self.eager

    def __call__(self, *args: object) -> object:
        return self.choose(*args)[1](*args)

    def reasons(self, *args: object) -> dict[str, str | None]:
        """backend -> why it would not run for these inputs, None where it would."""
        return {name: why_not(*args) for name, (_, why_not) in self.backends.items()}


def op(eager: Callable) -> Op:
    """Make an op of its eager body."""
    made = Op(eager.__name__, eager)
    made.__doc__ = eager.__doc__
    _OPS[made.name] = made
    return made


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend (or `eager`) for every op called inside."""
    _FORCED.append(name)
    try:
        yield
    finally:
        _FORCED.pop()


def list_backends() -> dict[str, list[str]]:
    """op -> its backends in the order tried, eager last."""
    return {name: [*op.backends, "eager"] for name, op in _OPS.items()}
