"""Learning-rate schedules: pure functions of the number of steps taken."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepDecay:
    r"""Multiply the learning rate by a factor every so many steps.

    $\eta_t = \eta_0 \gamma^{\lfloor t / n \rfloor}$, t counted over all rounds from 0.
    Nothing is remembered: a resumed run goes on as if it had not stopped.

    Attributes:
        factor: $\gamma$, in (0, 1].
        every_steps: n >= 1.

    Source:
        Liu et al., MS-Net, IEEE TMI 39(9), 2020: 0.95 every 500 steps.

    Example:
        >>> decay = StepDecay(factor=0.5, every_steps=10)
        >>> [decay.scale(step) for step in (0, 9, 10, 25)]
        [1.0, 1.0, 0.5, 0.25]
    """

    factor: float
    every_steps: int

    def scale(self, step: int) -> float:
        """Give the factor of the initial learning rate at a step."""
        return float(self.factor ** (step // self.every_steps))
