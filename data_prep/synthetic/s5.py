"""S5: the product so far of permutations of five things, asked at every step.

Of `alphabet` permutations, of which the first two, an exchange and a cycle, make all 120.

The state tracking that no diagonal or attending model of constant depth can do at any length
(Merrill et al. 2024, arXiv:2404.08819), and an RNN with a dense state can.
"""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np

from data_prep.synthetic.kinds import AtEveryStep, Rows

if TYPE_CHECKING:
    from data_prep.synthetic import SyntheticSettings

GENERATORS = [(1, 0, 2, 3, 4), (1, 2, 3, 4, 0)]
# [120, 5], the generators first
ELEMENTS = np.array(GENERATORS + [p for p in permutations(range(5)) if p not in GENERATORS])
IDENTITY = int((np.arange(5) == ELEMENTS).all(1).argmax())
_NUMBER = {tuple(element): number for number, element in enumerate(ELEMENTS.tolist())}
# PRODUCTS[a, b]: first a, then b
PRODUCTS = np.array([[_NUMBER[tuple(b[a].tolist())] for b in ELEMENTS] for a in ELEMENTS])


class S5(AtEveryStep):
    def symbols(self, settings: SyntheticSettings) -> int:
        return settings.alphabet

    def fault(self, settings: SyntheticSettings) -> str | None:
        if 2 <= settings.alphabet <= len(ELEMENTS):
            return None
        return f"--alphabet {settings.alphabet} of {len(ELEMENTS)} permutations: use 2 to 120"

    def answers(self, settings: SyntheticSettings) -> int:
        return len(ELEMENTS)

    def solve(self, settings: SyntheticSettings, drawn: Rows) -> Rows:
        states = np.empty_like(drawn)
        state = np.full(len(drawn), IDENTITY)
        for step in range(drawn.shape[1]):
            state = PRODUCTS[state, drawn[:, step]]
            states[:, step] = state
        return states
