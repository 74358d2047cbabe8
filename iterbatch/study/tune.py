"""The learning rate of every arm: as many trials for each, at the same values, on a seed that the study does not use.

What lives here: which trials are made and what is chosen. What does not: training them, which is a comparison like any other
(:mod:`iterbatch.study.compare`).

A trial is scored by its final loss on validation. Arms that are made from another arm's passes come after it, and are made from its best trial.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from iterbatch.report import stats
from iterbatch.study.compare import compare, pairs_of
from iterbatch.config import RunConfig
from iterbatch.errors import ConfigError
from iterbatch.records.record import write_json, write_text
from iterbatch.report.summary import markdown, read_result
from iterbatch.study.study_file import Arm, Cell, Study, load_study, make_arm

Tell = Callable[[str], None]


def values(low: float, high: float, trials: int, seed: int) -> list[float]:
    """Learning rates to try: one drawn in each of ``trials`` equal parts of the log-uniform range, in random order."""
    random = np.random.default_rng(seed)
    places = (np.arange(trials) + random.uniform(size=trials)) / trials
    return [float(f"{value:.3g}") for value in random.permutation(low * (high / low) ** places)]


def tune(path: Path, save_dir: Path, workers: int, tell: Tell = lambda _: None) -> dict[str, dict[str, float]]:
    """Make the trials that are missing, choose, and write the choices into the study file.

    Args:
        path: The study file.
        save_dir: Folder of runs; trials go to ``<study>-tune`` in it.
        workers: Processes at a time.
        tell: Told how it goes.

    Returns:
        The learning rate of every arm, by cell.

    Raises:
        ConfigError: where the study file is wrong, or the packages are missing.
        RunError: where every trial of an arm failed.
    """
    with _optional_packages():
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = load_study(path)
    run_dir = save_dir / f"{study.name}-tune"
    run_dir.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{(run_dir / 'tune.db').resolve()}"
    chosen: dict[str, dict[str, float]] = {cell.name: {} for cell in study.cells}
    ledger = _Ledger(study, storage, run_dir)
    for stage in _stages(study):
        ledger.ask(stage, chosen)
        run = dataclasses.replace(RunConfig(), save_dir=save_dir)
        compare(Study(f"{study.name}-tune", ledger.cells()), run_dir / "trials", workers, run, tell, keep_arms=True)
        ledger.take_results()
        for cell in study.cells:
            chosen[cell.name] |= ledger.best(cell, stage)
    _write_choices(path, chosen)
    write_text(run_dir / "tuning.md", ledger.page(chosen))
    write_json(run_dir / "tuning.json", ledger.scores)
    tell(f"Learning rates written to {path}; the trials are in {run_dir / 'tuning.md'}")
    if at_edge := [f"{cell}/{arm}".lstrip("/") for cell, rates in chosen.items() for arm, rate in rates.items() if ledger.at_edge(rate)]:
        tell(f"At the edge of the range tried, so there may be better ones beyond it: {', '.join(at_edge)}. Widen tune: low, high in another study")
    return chosen


@contextlib.contextmanager
def _optional_packages() -> Iterator[None]:
    try:
        yield
    except ImportError as problem:
        raise ConfigError(f'iterbatch tune needs the package {problem.name}: pip install "iterbatch[tune]"') from problem


def _stages(study: Study) -> list[list[str]]:
    """Names of the arms to tune, in groups: what an arm is made from is in an earlier group.

    Raises:
        ConfigError: where it is not among those to tune.
    """
    wanted = study.tune["arms"] or [arm.name for arm in study.cells[0].arms]
    arms, placed = {arm.name: arm for arm in study.cells[0].arms if arm.name in wanted}, set[str]()
    for arm in arms.values():
        if arm.source is not None and arm.source not in arms:
            raise ConfigError(f"arm '{arm.name}' is made from '{arm.source}', which is not among the arms to tune; add it to tune: arms")
    stages = []
    while len(placed) < len(arms):
        ready = [name for name, arm in arms.items() if name not in placed and (arm.source is None or arm.source in placed)]
        placed.update(ready)
        stages.append(ready)
    return stages


class _Ledger:
    """The trials, in an Optuna study for each cell and arm."""

    def __init__(self, study: Study, storage: str, run_dir: Path) -> None:
        self.study, self.storage, self.run_dir = study, storage, run_dir
        self.rates = values(study.tune["low"], study.tune["high"], study.tune["trials"], study.tune["seed"])
        self.arms: dict[str, dict[str, Arm]] = {cell.name: {} for cell in study.cells}  # trials by cell and their own names
        self.scores: dict[str, dict[str, list[tuple[float, float | None]]]] = {cell.name: {} for cell in study.cells}  # (rate, loss)

    def _open(self, cell: Cell, arm: str) -> Any:
        import optuna

        name = f"{cell.name}/{arm}"
        return optuna.create_study(storage=self.storage, study_name=name, direction="minimize", load_if_exists=True)

    def _distribution(self) -> Any:
        import optuna

        return {"lr": optuna.distributions.FloatDistribution(self.study.tune["low"] / 2, self.study.tune["high"] * 2, log=True)}

    def ask(self, names: list[str], chosen: dict[str, dict[str, float]]) -> None:
        """Take up the trials of some arms."""
        for cell in self.study.cells:
            config = _trial_config(cell, self.study.tune["seed"])
            for arm in cell.arms:
                if arm.name not in names:
                    continue
                for number, rate in enumerate(self.rates):
                    own = {**arm.own, "strategy": arm.strategy, "lr": rate}
                    if arm.source is not None:
                        own["source"] = _name(arm.source, self.rates.index(chosen[cell.name][arm.source]))
                    self.arms[cell.name][_name(arm.name, number)] = make_arm(_name(arm.name, number), own, config)

    def cells(self) -> tuple[Cell, ...]:
        """All trials so far, as a comparison."""
        return tuple(Cell(cell.name, _trial_config(cell, self.study.tune["seed"]), tuple(self.arms[cell.name].values())) for cell in self.study.cells)

    def take_results(self) -> None:
        """Enter what the trials' folders say into Optuna's storage, and read it back from there."""
        import optuna

        trials = Study("", self.cells())
        for pair in pairs_of(trials, self.run_dir / "trials"):
            arm, number = pair.arm.name.rsplit(".", 1)
            cell = next(each for each in self.study.cells if each.name == pair.cell.name)
            kept, loss = self._open(cell, arm), _loss(pair.folder)
            known = [trial.value for trial in kept.trials if trial.user_attrs.get("number") == int(number)]
            if not pair.ended or loss in known:  # a trial that failed and was tried again is entered again
                continue
            state = optuna.trial.TrialState.COMPLETE if loss is not None else optuna.trial.TrialState.FAIL
            rate = {"lr": self.rates[int(number)]}
            trial = optuna.trial.create_trial(
                state=state, params=rate, distributions=self._distribution(), value=loss, user_attrs={"number": int(number)}
            )
            kept.add_trial(trial)
        for cell in self.study.cells:
            for arm in dict.fromkeys(name.rsplit(".", 1)[0] for name in self.arms[cell.name]):
                latest = {trial.user_attrs["number"]: (trial.params["lr"], trial.value) for trial in self._open(cell, arm).trials}
                self.scores[cell.name][arm] = [latest[number] for number in sorted(latest)]

    def best(self, cell: Cell, names: list[str]) -> dict[str, float]:
        """The rate with the lowest loss of each arm."""
        found = {}
        for arm in names:
            good = [(loss, rate) for rate, loss in self.scores[cell.name][arm] if loss is not None]
            if not good:
                raise ConfigError(f"every trial of arm '{arm}'{f' in cell {cell.name}' if cell.name else ''} failed; lower tune: high")
            found[arm] = min(good)[1]
        return found

    def at_edge(self, rate: float) -> bool:
        """Whether a rate is the lowest or the highest that was tried."""
        return rate in (min(self.rates), max(self.rates))

    def page(self, chosen: dict[str, dict[str, float]]) -> str:
        """All trials, what was chosen, and the expected best of n."""
        tune = self.study.tune
        lines = [f"# Learning rates of {markdown(self.study.name)}", ""]
        lines += [
            f"{tune['trials']} trials for each arm, at the same values from {tune['low']:g} to {tune['high']:g}, seed {tune['seed']}, scored by the "
            "final loss on validation, nats a token. Best of n: what the best of n of these trials, drawn at random, is expected to reach.",
            "",
        ]
        for cell in self.study.cells:
            lines += [f"## {markdown(cell.name)}", ""] if cell.name else []
            order = sorted(self.rates)
            counts = range(1, len(order) + 1)
            lines += [f"| arm | chosen | {' | '.join(f'{rate:g}' for rate in order)} | {' | '.join(f'best of {n}' for n in counts)} |"]
            lines += ["|" + " --- |" * (2 + 2 * len(order))]
            for arm, trials in self.scores[cell.name].items():
                losses = dict(trials)
                cells = ["failed" if losses.get(rate) is None else f"{losses[rate]:.4f}" for rate in order]
                expected = stats.expected_best([math.inf if loss is None else loss for _, loss in trials])
                rate = chosen[cell.name][arm]
                edge = " (edge)" if self.at_edge(rate) else ""
                lines.append(f"| {markdown(arm)} | {rate:g}{edge} | {' | '.join(cells)} | {' | '.join(f'{value:.4f}' for value in expected)} |")
            lines.append("")
        return "\n".join(lines)


def _name(arm: str, number: int) -> str:
    return f"{arm}.{number}"


def _trial_config(cell: Cell, seed: int) -> Any:
    training = dataclasses.replace(cell.config.training, seeds=(seed,), evals=1, prompts=1)
    return dataclasses.replace(cell.config, training=training)


def _loss(arm: Path) -> float | None:
    """Final loss on validation, nats a token; None where the trial failed."""
    if not (arm / "result.json").exists():
        return None
    result = read_result(arm)
    return math.log(result["val_ppl"]) if result["val_ppl"] is not None and not result.get("stopped") else None


def _write_choices(path: Path, chosen: dict[str, dict[str, float]]) -> None:
    """Set every arm's learning rate in the study file, which keeps its comments and order."""
    import io

    with _optional_packages():
        from ruamel.yaml import YAML

    editor = YAML(typ="rt")  # plain values only, as a safe loader's, with the comments between them
    editor.width = 1000
    content = editor.load(path.read_text(encoding="utf-8-sig"))
    for cell, rates in chosen.items():
        place = content
        if cell:
            place = content["cells"]
            if place[cell] is None:
                place[cell] = {}
            place = place[cell]
        arms = place.setdefault("arms", {})
        for arm, rate in rates.items():
            if arms.get(arm) is None:
                arms[arm] = {}
            arms[arm]["lr"] = rate
    buffer = io.StringIO()
    editor.dump(content, buffer)
    write_text(path, buffer.getvalue())
