"""Parity: whether the ones so far are even or odd, asked at every step.

The simplest group there is: one bit of state that no step may lose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_prep.synthetic.kinds import AtEveryStep, Rows

if TYPE_CHECKING:
    from data_prep.synthetic import SyntheticSettings


class Parity(AtEveryStep):
    def solve(self, settings: SyntheticSettings, drawn: Rows) -> Rows:
        return drawn.cumsum(axis=1) % 2
