"""Ops and their backends: the eager body is the specification, a backend runs where its `why_not`
finds no reason.

The one place that knows availability. `Op.decide` says in words what would run, why, and what
could not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from .device import assumed

REMEMBERED = 4096  # decisions of an op; then it forgets them all: a model has a few dozen shapes

WhyNot = Callable[..., str | None]
# inputs -> (backend, why it comes here) in the order to ask them; `eager` may be one of them
Order = Callable[..., Iterable[tuple[str, str]]]

_OPS: dict[str, Op] = {}
_FORCED: list[str] = []


@dataclass(frozen=True)
class Decision:
    """What runs an op. `why`: what speaks for it, empty where nothing was measured. `cannot`: the
    backends asked before it, and what each cannot do.
    """

    backend: str
    body: Callable
    why: str
    cannot: dict[str, str]


@dataclass
class Op:
    """One operation: `eager` defines the result, backends give the same result faster.

    Backends are asked in the order that `order` gives for the inputs; without one, in which there
    is one backend. The first without a reason against these inputs runs, and is remembered. So a
    `why_not` and an `order` may look at shape, dtype and device of tensors and at all other inputs,
    at nothing else: a body copes with every stride and address.
    """

    name: str
    eager: Callable
    order: Order | None = None
    backends: dict[str, tuple[Callable, WhyNot]] = field(default_factory=dict)
    # backend -> what makes it ready for more calls with equal shapes and all inputs but the first
    # and the last: `prepare(*inputs)` is a function of those two, or None
    prepared: dict[str, Callable] = field(default_factory=dict)
    # what `why_not` looks at -> decision
    chosen: dict[tuple, tuple[str, Callable]] = field(default_factory=dict)

    def backend(self, name: str, why_not: WhyNot) -> Callable[[Callable], Callable]:
        """Register a body; `why_not(*inputs)` is None when it can run, else the reason in words."""

        def register(body: Callable) -> Callable:
            self.backends[name] = (body, why_not)
            self.chosen.clear()
            return body

        return register

    def ready(self, *args: object) -> Callable | None:
        """What runs for these inputs, made ready as a function of the first and the last; None
        where nothing can be made ready.
        """
        prepare = self.prepared.get(self.choose(*args)[0])
        if prepare:
            return prepare(*args)
        return None

    def choose(self, *args: object) -> tuple[str, Callable]:
        """(backend name, body) for these inputs.

        Raises:
            RuntimeError: `use_backend` forces one that cannot run here; the message is its reason.
        """
        if _FORCED:
            return self._forced(_FORCED[-1], args)
        key = tuple(
            [(a.shape, a.dtype, a.device) if isinstance(a, torch.Tensor) else a for a in args]
        )
        found = self.chosen.get(key)
        if found is None:
            decision = self.decide(*args)
            found = decision.backend, decision.body
            if assumed() is None:
                self._remember(key, found)
        return found

    def _remember(self, key: tuple, found: tuple[str, Callable]) -> None:
        if len(self.chosen) >= REMEMBERED:
            self.chosen.clear()
        self.chosen[key] = found

    def _forced(self, name: str, args: tuple) -> tuple[str, Callable]:
        if name not in self.backends:
            return "eager", self.eager
        body, why_not = self.backends[name]
        reason = why_not(*args)
        if reason:
            raise RuntimeError(f"{self.name}: backend {name} cannot run: {reason}")
        return name, body

    def decide(self, *args: object) -> Decision:
        """Which backend runs for these inputs, and why; `use_backend` changes nothing here."""
        order = self.order(*args) if self.order else ((name, "") for name in self.backends)
        cannot: dict[str, str] = {}
        for name, why in order:
            if name == "eager":
                return Decision(name, self.eager, why, cannot)
            body, why_not = self.backends[name]
            reason = cannot.get(name) or why_not(*args)
            if reason is None:
                return Decision(name, body, why, cannot)
            cannot[name] = reason
        return Decision("eager", self.eager, "", cannot)

    def __call__(self, *args: object) -> object:
        return self.choose(*args)[1](*args)

    def reasons(self, *args: object) -> dict[str, str | None]:
        """backend -> what it cannot do with these inputs, None where it can run."""
        return {name: why_not(*args) for name, (_, why_not) in self.backends.items()}


def op(eager: Callable, order: Order | None = None) -> Op:
    """Make an op of its eager body; one with several backends needs an order."""
    made = Op(eager.__name__, eager, order)
    made.__doc__ = eager.__doc__
    _OPS[made.name] = made
    return made


def ordered(by: Order) -> Callable[[Callable], Op]:
    """`op` whose backends are asked in the order that `by` gives for the inputs."""
    return lambda eager: op(eager, by)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend (or `eager`) for every op called inside."""
    _FORCED.append(name)
    try:
        yield
    finally:
        _FORCED.pop()


def is_forced() -> bool:
    """Whether `use_backend` forces one."""
    return bool(_FORCED)


def list_backends() -> dict[str, list[str]]:
    """op -> its backends, eager last."""
    return {name: [*op.backends, "eager"] for name, op in _OPS.items()}
