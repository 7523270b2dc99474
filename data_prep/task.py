"""What makes a dataset a task: which of its tokens count."""

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
