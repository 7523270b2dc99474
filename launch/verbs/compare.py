"""python -m launch compare CONFIG [key=value ...]"""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.compare.file import load_comparison
from launch.ray_job import make_absolute, paths_of, place_faults
from launch.side_by_side import SideBySide
from launch.stop import PREEMPTED, StopWatch
from trainer.config import Config
from trainer.events import Evaluated, Event, Warned
from trainer.settings import ConfigError

HELP = "measure and train several mixers side by side; run again, it goes on"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file with a section `compare`, see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override any key; `keys` lists all"
    )


def run(args: argparse.Namespace) -> int:
    comparison = load_comparison(args.config, args.overrides)
    paths = {("compare.dir", comparison.settings.dir)}
    for runs in comparison.tasks.values():
        paths |= {place for each in runs.values() for place in paths_of(each.first)}
    faults = place_faults(sorted(paths), comparison.config.launch)
    if comparison.settings.at_once > 1 and comparison.config.launch.gpus_per_worker:
        faults += _sharing_faults(comparison.settings.at_once)
    if faults:
        raise ConfigError(args.config, faults)
    from launch.compare.page import write_comparison  # import torch and matplotlib
    from launch.compare.run import run_comparison

    told = "stopping after this cell, or the next step and a checkpoint"
    should_stop = StopWatch(told, comparison.config.run.max_seconds)
    with SideBySide(comparison.settings.at_once) as trainings:

        def train(config: Config) -> bool:
            make_absolute(config)
            return trainings.run(config, _telling(config), should_stop)

        results = run_comparison(comparison, _show, train, should_stop)
    if results is None:
        print(f"stopped in good order; the same command goes on in {comparison.settings.dir}")
        return PREEMPTED if should_stop.preempted else 0
    print("\n" + write_comparison(Path(comparison.settings.dir), results))
    return 0


def _show(text: str) -> None:
    """A line, whole: several trainings tell theirs."""
    print(f"{text}\n", end="", flush=True)


def _sharing_faults(at_once: int) -> Iterator[str]:
    """Where trainings side by side, each with a Ray of its own, would take the same GPUs."""
    if not os.environ.get("RAY_ADDRESS"):
        yield (
            f"compare.at_once: {at_once} trainings without a common Ray would share GPUs: start "
            f"one by `ray start --head` and set RAY_ADDRESS, or leave it 1"
        )


def _telling(config: Config) -> Callable[[Event], None]:
    """A training's evaluations and warnings, by the name of its folder."""
    name = Path(config.run.dir).name

    def on_event(event: Event) -> None:
        match event:
            case Evaluated(step):
                _show(f"  {name}, step {step}: {event}")
            case Warned(message):
                _show(f"  {name}, warning: {message}")

    return on_event
