"""Majority: the symbol that comes most often, of `alphabet`; of several the first.

Of the tasks of Beck et al. 2024 (arXiv:2405.04517), figure 4, which Feng et al. 2024 take over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_prep.synthetic.kinds import AtTheEnd, Rows

if TYPE_CHECKING:
    from data_prep.synthetic import SyntheticSettings


class Majority(AtTheEnd):
    def symbols(self, settings: SyntheticSettings) -> int:
        return settings.alphabet

    def answers(self, settings: SyntheticSettings) -> int:
        return settings.alphabet

    def solve(self, settings: SyntheticSettings, drawn: Rows) -> Rows:
        counts = [(drawn == symbol).sum(axis=1) for symbol in range(settings.alphabet)]
        return np.stack(counts, axis=1).argmax(axis=1)[:, None]
