"""Train what the tasks of a comparison ask for, each run once; run again, it goes on."""

from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from launch.compare.file import Comparison
from launch.compare.results import LOST, Point, Rank, Runs, TrainingRecord, finite
from launch.compare.search import Search
from launch.gang import LaunchError
from trainer.checks import asks_questions
from trainer.config import Config
from trainer.provenance import UNKNOWN, commit
from trainer.run_folder import RunFolder, read_lines

Show = Callable[[str], None]
Train = Callable[[Config], bool]  # one training; whether it finished, and was not stopped


@dataclass
class Trained:
    """The finished trainings of all tasks; those that were lost, and why."""

    tasks: dict[str, Runs] = field(default_factory=dict)
    lost: dict[str, dict[str, str]] = field(default_factory=dict)
    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    in_equal_time: dict[str, dict[str, TrainingRecord]] = field(default_factory=dict)

    def commits(self) -> set[str]:
        """Of the code that trained."""
        runs = [run for task in self.tasks.values() for same in task.values() for run in same]
        runs += [run for task in self.in_equal_time.values() for run in task.values()]
        return {commit for run in runs for commit in run.commits}


class _Stopped(Exception):
    """The comparison was asked to stop."""


def train_all(
    comparison: Comparison, show: Show, train: Train, should_stop: Callable[[], bool]
) -> Trained | None:
    """Train what has no result yet; None when stopped."""
    trained, settings = Trained(), comparison.settings
    for task, trainings in comparison.tasks.items():
        attempt = _Attempt(task, comparison, show, train, should_stop)
        search = Search(trainings, attempt)
        try:
            search.run(settings.more_rates)
            equal = search.in_equal_time(_pace) if settings.equal_time else {}
        except _Stopped:
            return None
        trained.lost[task] = attempt.lost
        trained.tasks[task] = {
            label: curves
            for label, configs in search.ran.items()
            if (curves := [_curve(config) for config in configs if _finished(config)])
        }
        trained.rates[task] = {label: sorted(tried) for label, tried in search.ranks.items()}
        finished = {label: config for label, config in equal.items() if _finished(config)}
        trained.in_equal_time[task] = {label: _curve(config) for label, config in finished.items()}
    now, others = commit(), trained.commits() - {commit(), UNKNOWN}
    if now != UNKNOWN and others:
        show(
            f"trainings ran at commit {', '.join(sorted(others))}, and are kept: to have all of "
            f"this code, {now}, remove their folders in {settings.dir}"
        )
    return trained


@dataclass
class _Attempt:
    """Trains runs of one task that have no result yet, and ranks what each held out at its end."""

    task: str
    comparison: Comparison
    show: Show
    train: Train
    should_stop: Callable[[], bool]
    lost: dict[str, str] = field(default_factory=dict)  # training -> why

    def __call__(self, runs: list[tuple[str, Config]]) -> list[Rank]:
        pool, waits = ThreadPoolExecutor(self.comparison.settings.at_once), True
        try:
            begun = [pool.submit(self._run, label, config) for label, config in runs]
            wait(begun, return_when=FIRST_EXCEPTION)
            for failed in (each for each in begun if each.done() and each.exception()):
                failed.result()
            return [each.result() for each in begun]
        except KeyboardInterrupt:  # at once: whoever has the trainings ends them
            waits = False
            raise
        finally:
            pool.shutdown(waits, cancel_futures=True)

    def _run(self, label: str, config: Config) -> Rank:
        """One of them. Raises _Stopped."""
        if not _finished(config):
            if self.should_stop():
                raise _Stopped
            name = self._name(label, config)
            folder = Path(config.run.dir).name
            self.show(f"training {name} on {self.task}, in {folder}")
            try:
                if not self.train(config):
                    raise _Stopped
                if not _finished(config):
                    raise LaunchError(_unfinished(config))
            except LaunchError as error:  # marked in the report, and tried again next time
                if self.should_stop():
                    raise _Stopped from None
                self.lost[name] = str(error).strip().splitlines()[-1]
                self.show(f"  {folder} failed: {error}")
        return _curve(config).rank if _finished(config) else LOST

    def _name(self, label: str, config: Config) -> str:
        name = f"{label} at learning rate {config.optim.learning_rate:g}, seed {config.run.seed}"
        steps = config.train.steps
        whole = self.comparison.tasks[self.task][label].config.train.steps
        return name if steps == whole else f"{name}, {steps} of {whole} steps"  # in equal time


def _pace(config: Config) -> float:
    """Seconds of a run's median step."""
    return median(line["step_seconds"] for line in read_lines(RunFolder(config.run.dir).metrics))


def _finished(config: Config) -> bool:
    """Whether a run's folder has all that a comparison reads."""
    folder = RunFolder(config.run.dir)
    has_result = folder.read_result(config.train.steps) is not None
    return has_result and bool(read_lines(folder.metrics)) and bool(read_lines(folder.evaluations))


def _unfinished(config: Config) -> str:
    """Of a run that is at its end, and whose metrics are not in its folder."""
    run, remote = config.run.dir, config.checkpoint.remote
    kept = f" and {remote}" if remote else ""
    return (
        f"{run} has no metrics or evaluations of a run that is at its end, as after a machine was "
        f"lost: remove {run}{kept} to train it again"
    )


def _curve(config: Config) -> TrainingRecord:
    """A finished training: the loss over tokens, and over time at the pace of its median step.

    The pace, and not the sum, because trainings are hours apart on machines that others use too.
    """
    folder = RunFolder(config.run.dir)
    metrics, starts = read_lines(folder.metrics), read_lines(folder.starts)
    pace = _pace(config)
    final = folder.read_result(config.train.steps)
    assert final is not None

    def tokens(step: int) -> int:
        """Of the last line up to that step: one may have been lost with its machine."""
        known = [line["tokens"] for line in metrics if line["step"] <= step]
        return known[-1] if known else 0

    return TrainingRecord(
        learning_rate=config.optim.learning_rate,
        seed=config.run.seed,
        tokens=[line["tokens"] for line in metrics],
        seconds=[round(pace * line["step"], 3) for line in metrics],  # a curve, of thousands
        loss=[loss and float(f"{loss:.6g}") for loss in (line["loss"] for line in metrics)],
        held_out=[
            Point(
                tokens(line["step"]),
                round(pace * line["step"], 3),
                finite(line["loss"]),
                line.get("accuracy"),
            )
            for line in read_lines(folder.evaluations)
        ],
        final=final,
        asks=asks_questions([folder.path]),
        hardware=sorted({start["hardware"] for start in starts if "hardware" in start}),
        commits=sorted({start["commit"] for start in starts if "commit" in start}),
    )
