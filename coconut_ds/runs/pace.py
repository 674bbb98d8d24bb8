"""How fast a run goes, and how long it will take: from the steps and evaluations of this process."""

from __future__ import annotations

_WEIGHT_OF_THE_LATEST = 0.1


class Pace:
    """Expects `steps` more optimizer steps and `evaluations`, each as long as lately; times in seconds."""

    def __init__(self, steps: int, evaluations: int):
        self._steps, self._evaluations = steps, evaluations
        self._step_s = self._evaluation_s = 0.0
        self.examples_per_s = 0.0
        """Moving average over the latest steps."""

    def stepped(self, n_examples: int, seconds: float) -> None:
        is_first = self._step_s == 0
        self._steps -= 1
        self._step_s = seconds if is_first else _moved(self._step_s, seconds)
        speed = n_examples / seconds
        self.examples_per_s = speed if is_first else _moved(self.examples_per_s, speed)

    def evaluated(self, seconds: float) -> None:
        self._evaluations -= 1
        self._evaluation_s = seconds

    def seconds_for(self, steps: int) -> float:
        return steps * self._step_s

    def seconds_left(self) -> float:
        """Of the whole run."""
        return self.seconds_for(self._steps) + self._evaluations * self._evaluation_s


def _moved(average: float, value: float) -> float:
    return average + _WEIGHT_OF_THE_LATEST * (value - average)
