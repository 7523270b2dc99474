"""A marked value among random tokens; at the end a marker asks for it.

The distance from value to answer is one of `distances`, in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from data_prep.synthetic import SyntheticSettings

HIDDEN = False


def surround(settings: SyntheticSettings) -> int:
    """Different tokens around the value: as many as its own."""
    return settings.alphabet


def fault(settings: SyntheticSettings) -> str | None:
    least, most = settings.tokens + 1, settings.length - settings.tokens - 1
    wrong = [d for d in settings.distances if not least <= d <= most]
    if not wrong and settings.distances:
        return None
    return (
        f"--distances {','.join(map(str, wrong)) or 'is empty'}: a needle of "
        f"{settings.tokens} tokens in {settings.length} can be {least} to {most} away"
    )


def places(
    settings: SyntheticSettings, count: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Where the value of every sequence lies, [count, tokens]; a marker goes before it."""
    distance = np.resize(settings.distances, count)[:, None]
    return settings.length - settings.tokens - distance + np.arange(settings.tokens)
