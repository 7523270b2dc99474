"""A marked value among random tokens; at the end a marker asks for it.

The distance from value to answer is one of `distances`, in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_prep.synthetic.kinds import Recall, Rows

if TYPE_CHECKING:
    from data_prep.synthetic import SyntheticSettings


class Needle(Recall):
    hidden = False
    asks_by_distance = True

    def surround(self, settings: SyntheticSettings) -> int:
        return settings.alphabet  # as many as the value's own

    def fault(self, settings: SyntheticSettings) -> str | None:
        if fault := super().fault(settings):
            return fault
        least, most = settings.tokens + 1, settings.length - settings.tokens - 1
        wrong = [d for d in settings.distances if not least <= d <= most]
        if not wrong and settings.distances:
            return None
        return (
            f"--distances {','.join(map(str, wrong)) or 'is empty'}: a needle of "
            f"{settings.tokens} tokens in {settings.length} can be {least} to {most} away"
        )

    def places(
        self, settings: SyntheticSettings, count: int, generator: np.random.Generator
    ) -> Rows:
        """A marker goes before the value."""
        distance = np.resize(settings.distances, count)[:, None]
        return settings.length - settings.tokens - distance + np.arange(settings.tokens)
