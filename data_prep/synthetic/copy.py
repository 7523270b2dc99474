"""Selective copying: data tokens lie anywhere among blanks; after a marker they are written again.

The model must write them in order, reading only the marker, again and again. Gu & Dao 2023
(arXiv:2312.00752), section 4.1.1, as in Feng et al. 2024 (arXiv:2410.01201).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_prep.synthetic.kinds import Recall, Rows

if TYPE_CHECKING:
    from data_prep.synthetic import SyntheticSettings


class Copy(Recall):
    def surround(self, settings: SyntheticSettings) -> int:
        return 1  # the blank

    def places(
        self, settings: SyntheticSettings, count: int, generator: np.random.Generator
    ) -> Rows:
        shuffled = generator.random((count, settings.length - settings.tokens - 1))
        return np.sort(shuffled.argpartition(settings.tokens, axis=1)[:, : settings.tokens], axis=1)
