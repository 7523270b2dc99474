"""python -m launch report RUN_DIR"""

import argparse
from pathlib import Path

from trainer.run_folder import RunFolder

HELP = "write the page of a run again: report.md, loss.png, samples.txt"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN_DIR")


def run(args: argparse.Namespace) -> int:
    from launch.report import write_report  # imports torch and matplotlib

    print(write_report(RunFolder(args.run)))
    return 0
