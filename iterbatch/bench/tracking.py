"""Experiment trackers: one run for each arm and seed, grouped under the name of the run it is of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iterbatch.plain_yaml import dump_yaml
from iterbatch.records.layout import TRACKING

PROJECT = "iterbatch"  # where a tracker has projects above groups
GIGA = 1e9


class Tracking:
    """The trackers of one arm and seed, through Accelerate's classes.

    Everything is logged by batches made; W&B is told that FLOPs are the x-axis, the others get evaluations
    by GFLOPs, too.

    Args:
        names: As Accelerate knows them.
        run_dir: Of the run; its name is the group's.
        label: Of the arm and seed.
        settings: Of the arm.
    """

    def __init__(self, names: Sequence[str], run_dir: Path, label: str, settings: Mapping[str, Any]) -> None:
        self._trackers = [_open(name, run_dir, label) for name in names]
        plain = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in settings.items()
        }
        for tracker in self._trackers:
            if hasattr(tracker, "start"):  # versions before it begin when they are made
                tracker.start()
            if tracker.name == "tensorboard":  # whose own way makes a run of its own of them
                tracker.writer.add_text("settings", f"```\n{dump_yaml(plain)}```")
            else:
                tracker.store_init_configuration(plain)
            if tracker.name == "wandb":
                tracker.run.define_metric("*", step_metric="flops")

    def batch(self, values: Mapping[str, float], batches: int) -> None:
        """What happened to a batch."""
        for tracker in self._trackers:
            tracker.log(dict(values), step=batches)

    def evaluation(self, values: Mapping[str, float], batches: int) -> None:
        """What a split scored; ``flops`` among it."""
        for tracker in self._trackers:
            tracker.log(dict(values), step=batches)
            if tracker.name != "wandb":  # whose steps only rise
                by_flops = {f"by_gflops/{name}": value for name, value in values.items() if name != "flops"}
                tracker.log(by_flops, step=round(values["flops"] / GIGA))

    def close(self) -> None:
        """End them."""
        for tracker in self._trackers:
            tracker.finish()


def _open(name: str, run_dir: Path, label: str) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind: Any = LOGGER_TYPE_TO_CLASS[name]
    folder = run_dir / TRACKING
    folder.mkdir(parents=True, exist_ok=True)
    if name == "tensorboard":
        return kind(label, str(folder))
    if name == "wandb":
        known = hashlib.sha256(f"{run_dir.resolve()}/{label}".encode()).hexdigest()[:16]
        own = {"name": label, "group": run_dir.name, "dir": str(folder), "id": known, "resume": "allow"}
        return kind(PROJECT, reinit="finish_previous", **own)
    if name == "mlflow":
        return kind(run_dir.name, run_name=label, run_id=_mlflow_run(run_dir.name, label))
    if name == "trackio":
        return kind(run_dir.name, name=label, resume="allow")
    if kind.requires_logging_directory:
        return kind(f"{run_dir.name}/{label}", str(folder))
    return kind(f"{run_dir.name}/{label}")


def _mlflow_run(experiment: str, label: str) -> str | None:
    """The run that an arm had before it was stopped."""
    import mlflow

    if mlflow.get_experiment_by_name(experiment) is None:
        return None
    found: Any = mlflow.search_runs(
        experiment_names=[experiment],
        filter_string=f"tags.mlflow.runName = '{label}'",
        output_format="list",
    )
    return found[0].info.run_id if found else None
