"""What a person types: python -m launch VERB ..., a verb a file in launch/verbs."""

import argparse
import sys
from importlib import import_module

from launch.gang import LaunchError
from launch.verbs import VERBS


def main(argv: list[str] | None = None) -> int:
    """Run one verb; 0 when it worked, 1 with one message on stderr when it did not."""
    program = "longhaul" if sys.argv[0].endswith("longhaul") else "python -m launch"
    parser = argparse.ArgumentParser(
        prog=program,
        description="Train, compare and read recurrent language models on very long sequences.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in VERBS:
        verb = import_module(f"launch.verbs.{name}")
        subparser = verbs.add_parser(name, help=verb.HELP)
        verb.arguments(subparser)
        subparser.set_defaults(run_verb=verb.run)
    args = parser.parse_args(argv)
    try:
        return args.run_verb(args)
    except KeyboardInterrupt:  # before a verb watches for it, or the second time
        print("stopped at once", file=sys.stderr)
        return 130
    except (ValueError, LaunchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
