"""Selective copying: data tokens lie anywhere among blanks; after a marker they are written again.

The model must write them in order, reading only the marker, again and again. Gu & Dao 2023
(arXiv:2312.00752), section 4.1.1, as in Feng et al. 2024 (arXiv:2410.01201).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from data_prep.synthetic import SyntheticSettings

HIDDEN = True  # answers are read as the marker


def surround(settings: SyntheticSettings) -> int:
    """Different tokens around the data: the blank."""
    return 1


def fault(settings: SyntheticSettings) -> str | None:
    return None


def places(
    settings: SyntheticSettings, count: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Where the data tokens of every sequence lie, [count, tokens]."""
    shuffled = generator.random((count, settings.length - settings.tokens - 1))
    return np.sort(shuffled.argpartition(settings.tokens, axis=1)[:, : settings.tokens], axis=1)
