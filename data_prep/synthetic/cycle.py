"""Cycle navigation: steps right, left or none on a circle of five: where does it end?

A regular language of Deletang et al. 2022 (arXiv:2207.02098), table A.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_prep.synthetic.kinds import AtTheEnd, Rows

if TYPE_CHECKING:
    from data_prep.synthetic import SyntheticSettings

CIRCLE = 5
MOVES = np.array([0, 1, -1])


class Cycle(AtTheEnd):
    def symbols(self, settings: SyntheticSettings) -> int:
        return len(MOVES)

    def answers(self, settings: SyntheticSettings) -> int:
        return CIRCLE

    def solve(self, settings: SyntheticSettings, drawn: Rows) -> Rows:
        return MOVES[drawn].sum(axis=1, keepdims=True) % CIRCLE
