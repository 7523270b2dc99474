"""python -m data_prep.trajectories Hopper-v5 --out DIR"""

import argparse
import sys

from data_prep.files import folder_here
from data_prep.trajectories import TrajectorySettings, prepare_trajectories


def main(argv: list[str]) -> int:
    """0 when the folder is there, 1 with one message on stderr when it is not."""
    defaults = TrajectorySettings("")
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.trajectories",
        description="Train a policy to a medium score, and write what it does (DIR/medium) and "
        "what it did while it learned (DIR/medium-replay) as sequences of frames.",
    )
    add = parser.add_argument
    add("environment", metavar="ENVIRONMENT", help="of gymnasium's MuJoCo tasks, Hopper-v5")
    add("--out", required=True, metavar="DIR")
    add("--frames", type=int, default=defaults.frames, help="of DIR/medium, at least")
    add("--algorithm", default=defaults.algorithm, help="by which the policy learns: ppo or sac")
    add("--medium", type=float, default=defaults.medium, help="share of an expert's score")
    add("--most-frames", type=int, default=defaults.most_frames, help="to learn that in")
    add("--seed", type=int, default=defaults.seed)
    args = parser.parse_args(argv)
    try:
        out = folder_here(vars(args).pop("out"))
        written = prepare_trajectories(TrajectorySettings(**vars(args)), out)
    except ImportError as error:
        print(f"error: {error}: pip install 'longhaul[rl]'", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: run the same command again", file=sys.stderr)
        return 130
    about = None
    for quality, info in written.items():
        about = info.trajectories
        assert about is not None
        least, mean, most = about.returns
        print(
            f"{out}/{quality}: {info.splits['train'].tokens:,} frames of "
            f"{info.splits['train'].documents:,} episodes, returns {least:.0f} to {most:.0f}, mean "
            f"{mean:.0f}, a score of {about.score(mean):.1f}"
        )
    assert about is not None
    assert about.without_noise is not None
    earned = about.without_noise
    print(f"the policy without noise earns {earned:.0f}, a score of {about.score(earned):.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
