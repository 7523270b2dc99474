"""python -m launch rollout RUN_DIR"""

import argparse
from pathlib import Path

HELP = "let a decision model act in the environment of its data"


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR")
    add("--episodes", type=int, default=10)
    add("--return", dest="asked", type=float, help="to ask for; the best in its training data")
    add("--frames", type=int, help="of the past that it sees at a time; all, by its carry")
    add("--seed", type=int, default=0, help="of the first episode; others count on from it")


def run(args: argparse.Namespace) -> int:
    if args.frames is not None and args.frames < 1:
        raise ValueError(f"--frames {args.frames} is not positive")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} is negative")
    try:
        from trainer.rollout import roll_out  # imports torch and gymnasium
    except ImportError as error:
        raise ValueError(f"{error}: pip install 'longhaul[rl]'") from None

    played = roll_out(args.run, args.episodes, args.seed, args.asked, args.frames)
    for earned, length in zip(played.returns, played.lengths, strict=True):
        print(f"{length:>5} frames  return {earned:,.1f}")
    print(
        f"{played.environment}: a normalised score of {played.score:.1f} over {args.episodes} "
        f"episodes, asked for {played.asked:,.0f}"
    )
    return 0
