"""python -m launch doctor CONFIG [key=value ...]"""

import argparse

from launch.doctor import Finding, clear, examine, try_run
from launch.ray_job import load_for_here
from launch.stop import StopWatch

HELP = "examine the cluster, its storage and its network, and take a run's first steps"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override any key; `keys` lists all"
    )


def run(args: argparse.Namespace) -> int:
    config = load_for_here(args.config, args.overrides)
    found: list[Finding] = []

    def show(finding: Finding) -> None:
        found.append(finding)
        print(f"{finding.level:<8} {finding.subject}: {finding.said}", flush=True)

    try:
        for finding in examine(config):
            show(finding)
        if not any(finding.level == "fault" for finding in found):
            for finding in try_run(config, StopWatch("stopping after the next step")):
                show(finding)
    finally:
        if any(finding.subject == "run.dir" for finding in found):
            clear(config)
    if faults := [finding.subject for finding in found if finding.level == "fault"]:
        print(f"not fit for this run: {', '.join(dict.fromkeys(faults))}")
        return 1
    print("fit for this run")
    return 0
