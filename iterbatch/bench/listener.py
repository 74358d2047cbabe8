"""Who is notified of how a run goes."""

from pathlib import Path

from iterbatch.bench.prepare import Plan
from iterbatch.records.record import BatchRecord, EvalRecord
from iterbatch.records.result import ArmResult


class Listener:
    """A silent one; the command line shows progress."""

    estimates: bool = False  # whether a plan is to say how long training will take

    def note(self, message: str) -> None:
        """Something the user should know."""

    def planned(self, plan: Plan, run_dir: Path) -> None:
        """The run is about to start."""

    def arm_started(self, strategy: str, seed: int) -> None:
        """An arm is about to start."""

    def batch_done(self, record: BatchRecord, fraction: float) -> None:
        """A batch has been trained; ``fraction`` of the arm's budget is spent."""

    def doing(self, what: str) -> None:
        """The arm is not training for a while: what it does instead."""

    def evaluated(self, record: EvalRecord) -> None:
        """An evaluation has been made."""

    def arm_done(self, result: ArmResult) -> None:
        """An arm is finished."""
