"""python -m launch train CONFIG [key=value ...]"""

import argparse
import sys

from launch.gang import LaunchError
from launch.progress import Progress
from launch.ray_job import load_for_here, run_job
from launch.stop import PREEMPTED, StopWatch
from trainer.run_folder import RunFolder

HELP = "train a configuration on Ray; the same command again resumes"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override any key; `keys` lists all"
    )


def run(args: argparse.Namespace) -> int:
    config = load_for_here(args.config, args.overrides)

    should_stop = StopWatch("stopping after the next step and a checkpoint", config.run.max_seconds)
    print(f"starting {config.launch.workers} workers", flush=True)
    with Progress() as progress:
        try:
            finished = run_job(config, progress.show, should_stop)
        except LaunchError as error:
            if not should_stop.preempted:
                raise
            print(f"error: {error}", file=sys.stderr)
            return PREEMPTED
    folder = RunFolder(config.run.dir)
    if not finished:
        print(f"stopped in good order; the same command goes on from {folder.checkpoints}")
        return PREEMPTED if should_stop.preempted else 0
    if not folder.metrics.exists():
        print(f"{folder.path} is on storage that this machine does not see: no report was written")
        return 0
    _report(folder)
    return 0


def _report(folder: RunFolder) -> None:
    """Of a run that has trained to its end, whatever becomes of the report."""
    try:
        from launch.report import write_report  # imports torch and matplotlib

        print("\n" + write_report(folder))
    except Exception as error:
        print(
            f"warning: the run is finished, its report could not be written "
            f"({type(error).__name__}: {error}): try `python -m launch report {folder.path}`",
            file=sys.stderr,
        )
