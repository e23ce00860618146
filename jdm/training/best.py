"""Best: the step of a run with the best value of one metric, and the evaluations since then.

It is saved with every checkpoint, so that a run that is resumed goes on as if it had not stopped.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jdm.errors import InvalidValue
from jdm.names import metric_of


@dataclasses.dataclass(frozen=True)
class Best:
    """metric: its name. split: that it is measured on. step, value: of the best evaluation; None
    before there is one. since: the number of evaluations after it, none of them better."""

    metric: str
    split: str
    step: int | None = None
    value: float | None = None
    since: int = 0

    @classmethod
    def of(cls, metric: str, split: str, saved: Mapping[str, Any]) -> "Best":
        """The record that was saved, where it is of this metric and split; otherwise a new one.

        saved: what `dataclasses.asdict` of a Best returns; {} where there is none.
        """
        same = (saved.get("metric"), saved.get("split")) == (metric, split)
        return cls(**saved) if same else cls(metric, split)

    def updated(self, step: int, found: Mapping[str, float]) -> "Best":
        """The record after an evaluation. An equal value, and a NaN, is not better.

        found: {metric: value}. Raises InvalidValue where it has no value of this metric.
        """
        if self.metric not in found:
            allowed = f"is not what config.eval.metrics yield: {', '.join(found) or 'nothing'}"
            raise InvalidValue("config.checkpoint.best", self.metric, allowed)
        value, best, record = found[self.metric], self.value, metric_of(self.metric)
        sign = 1 if record and record.better == "higher" else -1
        if not math.isnan(value) and (best is None or sign * value > sign * best):
            return dataclasses.replace(self, step=step, value=float(value), since=0)
        return dataclasses.replace(self, since=self.since + 1)

    def ends(self, patience: int) -> bool:
        """Whether a run ends here. patience: evaluations without a better value; 0 is no limit."""
        return 0 < patience <= self.since

    @property
    def sentence(self) -> str:
        """Why a run ends."""
        before = "no value before" if self.step is None else f"{self.value:.4g} at step {self.step}"
        return f"{self.since} evaluations found no better {self.metric} than {before}"
