"""Learning rate schedules of svd: the rate of the next step, from whether the last one improved the
objective.
"""

from __future__ import annotations

from typing import Protocol

SCHEDULES = ("adaptive", "exponential", "plateau")
GROWTH = 1.25  # adaptive: after an improvement, up to the initial rate
IMPATIENCE = 8  # adaptive: steps without improvement after which each one lowers the rate once more


class ScheduleOptions(Protocol):
    lr: float
    lr_schedule: str
    lr_gamma: float
    lr_patience: int
    lr_factor: float
    lr_min: float
    lr_cooldown: int
    lr_adaptive_mode: str


class LearningRate:
    """The rate of the next step; `update` is called once per step.

    * exponential: x lr_gamma each step.
    * plateau: x lr_factor after more than `lr_patience` steps in a row without improvement, then
    `lr_cooldown` steps
      of rest.
    * adaptive: x 1.25 after an improvement, up to `lr`; x lr_factor after a step without one, and
    once more for every
      eight of those since the last improvement ("simple-reset") or since the start ("no-reset").
    """

    def __init__(self, options: ScheduleOptions):
        self.options = options
        self.value = options.lr
        self.stalled = 0  # steps without improvement
        self.resting = 0

    def update(self, improved: bool) -> float:
        value = getattr(self, f"_{self.options.lr_schedule}")(improved)
        self.value = max(value, min(self.options.lr_min, self.options.lr))
        return self.value

    def _exponential(self, improved: bool) -> float:
        return self.value * self.options.lr_gamma

    def _plateau(self, improved: bool) -> float:
        self.stalled = 0 if improved else self.stalled + 1
        if self.resting:
            self.resting, self.stalled = self.resting - 1, 0
        if self.stalled <= self.options.lr_patience:
            return self.value
        self.stalled, self.resting = 0, self.options.lr_cooldown
        return self.value * self.options.lr_factor

    def _adaptive(self, improved: bool) -> float:
        if improved:
            if self.options.lr_adaptive_mode == "simple-reset":
                self.stalled = 0
            return min(self.value * GROWTH, self.options.lr)
        self.stalled += 1
        return self.value * self.options.lr_factor ** (1 + self.stalled // IMPATIENCE)
