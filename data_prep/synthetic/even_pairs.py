"""Even pairs: is the number of places where the symbol changes even?

Which is whether the first symbol is the last. A regular language of Deletang et al. 2022
(arXiv:2207.02098), table A.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_prep.synthetic.kinds import AtTheEnd, Rows

if TYPE_CHECKING:
    from data_prep.synthetic import SyntheticSettings


class EvenPairs(AtTheEnd):
    def solve(self, settings: SyntheticSettings, drawn: Rows) -> Rows:
        return (drawn[:, :1] != drawn[:, -1:]).astype(int)
