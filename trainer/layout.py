"""Which tokens of a sequence a rank holds, and when: the only owner of that. Imports no torch."""

from dataclasses import dataclass

AUTO = "auto"  # a length of segments that is yet to be chosen (trainer/footprint.py)


@dataclass(frozen=True)
class Layout:
    """A sequence cut into segments, one after another, and each segment into a shard a rank.

    Segments have `segment_len` tokens (None: all), the last one what is left; shards of a segment
    are equally long.
    """

    seq_len: int
    sp_size: int = 1
    sp_rank: int = 0
    segment_len: int | None = None

    @property
    def segments(self) -> int:
        """How many there are."""
        return -(-self.seq_len // (self.segment_len or self.seq_len))

    @property
    def shard_tokens(self) -> int:
        """T, the tokens of this rank's shard of the first segment, which is a longest one."""
        return len(self.held())

    def segment(self, number: int) -> range:
        """The tokens of a segment, counted from the first of the sequence."""
        length = self.segment_len or self.seq_len
        return range(number * length, min(self.seq_len, (number + 1) * length))

    def held(self, number: int = 0) -> range:
        """This rank's tokens of a segment, counted from the first of the sequence."""
        segment = self.segment(number)
        shard = len(segment) // self.sp_size
        first = segment.start + self.sp_rank * shard
        return range(first, first + shard)


def even_segments(seq_len: int, most: int, sp_size: int) -> int | None:
    """`segment_len` of segments of at most so many tokens a rank, equally long but for the last."""
    segments = -(-seq_len // (most * sp_size))
    return None if segments == 1 else -(-seq_len // (segments * sp_size)) * sp_size


@dataclass(frozen=True)
class Plan:
    """In which order segments are run, and which of them twice.

    `keep` of the last are run once, their activations kept. With `truncate` all are, one after
    another, and no gradient passes from one to the one before: truncated back-propagation.
    """

    segments: int
    keep: int = 1
    truncate: bool = False

    @property
    def reads(self) -> list[int]:
        """The segments in the order in which they are read."""
        there = list(range(self.segments))
        return there if self.truncate else [*there, *reversed(there[: -self.keep])]

    def work(self, reads: int) -> int:
        """Of so many of them, in forwards: a backward is two, and comes last to those kept."""
        there = min(reads, self.segments)
        if self.truncate:
            return 3 * there
        turned = 2 * self.keep if reads >= self.segments else 0
        return there + turned + 3 * (reads - there)
