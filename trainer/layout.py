"""Which tokens of a sequence a rank holds: the only owner of that question. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """A sequence cut into segments, one after another, and each segment into a shard a rank.

    Segments are equally long, and so are shards: T = seq_len / (segments * sp_size) tokens.
    """

    seq_len: int
    sp_size: int = 1
    sp_rank: int = 0
    segments: int = 1

    @property
    def segment_tokens(self) -> int:
        """Of all shards of a segment."""
        return self.seq_len // self.segments

    @property
    def shard_tokens(self) -> int:
        """T, the tokens of this rank's shard of a segment."""
        return self.segment_tokens // self.sp_size

    def held(self, segment: int = 0) -> range:
        """This rank's tokens of a segment, counted from the first of the sequence."""
        first = segment * self.segment_tokens + self.sp_rank * self.shard_tokens
        return range(first, first + self.shard_tokens)
