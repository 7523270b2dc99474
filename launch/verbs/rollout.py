"""python -m launch rollout RUN_DIR"""

import argparse
from pathlib import Path

from trainer.config import load_dumped
from trainer.run_folder import RunFolder

HELP = "let a decision model act in the environment of its data"


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR")
    add("--episodes", type=int, help="the run's evaluate.rollouts, or 10")
    add(
        "--return",
        dest="asked",
        type=float,
        help="to ask for; evaluate.rollout_return",
    )
    add("--frames", type=int, help="of the past, seen at a time; evaluate.rollout_frames, or all")
    add("--seed", type=int, help="of the first episode, others count on; that of its evaluation")


def run(args: argparse.Namespace) -> int:
    for name in ("episodes", "frames"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value} is not positive")
    if args.seed is not None and args.seed < 0:
        raise ValueError(f"--seed {args.seed} is negative")
    config = load_dumped(RunFolder(args.run).config)
    settings = config.evaluate
    episodes = args.episodes or settings.rollouts or 10
    seed = config.first_rollout if args.seed is None else args.seed
    asked = settings.rollout_return if args.asked is None else args.asked
    try:
        import torch

        from trainer.rollout import roll_out
    except ImportError as error:
        raise ValueError(f"{error}: pip install 'longhaul[rl]'") from None

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frames = args.frames or settings.rollout_frames
    played = roll_out(args.run, episodes, device, seed, asked, frames)
    for earned, length in zip(played.returns, played.lengths, strict=True):
        print(f"{length:>5} frames  return {earned:,.1f}")
    print(
        f"{played.environment}: a normalised score of {played.score:.1f} over {episodes} "
        f"episodes, asked for {played.asked:,.0f}"
    )
    return 0
