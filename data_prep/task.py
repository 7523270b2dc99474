"""What makes a dataset another than text: which tokens count, or what a frame's numbers are."""

from dataclasses import dataclass, field


@dataclass
class SyntheticInfo:
    """Of a dataset of `data_prep.synthetic`."""

    task: str
    sequence_tokens: int  # every document has this length, and train.seq_len must be it
    scored_from: int  # tokens from here on are answers; no other token counts in a loss
    scored_tokens: int  # in each sequence
    distances: list[int] = field(default_factory=list)  # of sequence i: distances[i % len]
    hidden_as: int | None = None  # the token that a model reads in place of every answer


@dataclass
class TrajectoryInfo:
    """Of a dataset of `data_prep.trajectories`: each token is a frame, `width` float32 numbers.

    The action before (zeros at first), the return to go over `return_scale`, the observation
    less its mean over its deviation, and last the action that was taken, which a model is to
    answer. A document is an episode.
    """

    environment: str  # gymnasium's name of it
    observation_width: int
    action_width: int
    quality: str  # of what acted: medium, or medium-replay
    policy: str  # what acted, and how it was made
    policy_return: float  # what it earned, on average, in the last episodes of its training
    returns: list[float]  # the lowest, mean and highest of an episode to train on
    return_scale: float
    observation_mean: list[float]
    observation_deviation: list[float]
    score_returns: list[float]  # the returns of the normalised scores 0 and 100
    # what it earns when it acts without the noise it learns by: what squared errors learn of it
    without_noise: float | None = None

    @property
    def width(self) -> int:
        """Numbers of a frame."""
        return 2 * self.action_width + 1 + self.observation_width

    def score(self, episode_return: float) -> float:
        """The normalised score of a return (Fu et al. 2020, arXiv:2004.07219)."""
        least, most = self.score_returns
        return 100 * (episode_return - least) / (most - least)
