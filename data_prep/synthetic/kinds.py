"""Kinds of tasks: values to be recalled, and problems with an answer at the end or at every step.

A task is a file: a class with what is its own, and a line of `TASKS`. Tokens are words first, then
answers, which nothing else is written with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from data_prep.synthetic import SyntheticSettings

Rows = NDArray[np.int64]  # [count, length]
MOST_TOKENS = 256  # a token is a byte


class Task:
    """What is asked of a model."""

    hidden = True  # a model reads the last word, which asks, in place of every answer
    asks_by_distance = False  # whether `distances` mean something

    def words(self, settings: SyntheticSettings) -> int:
        """How many different tokens are no answers."""
        raise NotImplementedError

    def answers(self, settings: SyntheticSettings) -> int:
        """How many different answers there are."""
        raise NotImplementedError

    def scored(self, settings: SyntheticSettings) -> int:
        """Answers in a sequence."""
        return 1

    def fault(self, settings: SyntheticSettings) -> str | None:
        """Why it cannot be made so."""
        return None

    def sequences(
        self, settings: SyntheticSettings, count: int, generator: np.random.Generator
    ) -> Rows:
        """Tokens [count, length]."""
        raise NotImplementedError


class Recall(Task):
    """Values among surroundings; a marker at the end asks for them."""

    def surround(self, settings: SyntheticSettings) -> int:
        """How many different tokens surround the data."""
        raise NotImplementedError

    def places(
        self, settings: SyntheticSettings, count: int, generator: np.random.Generator
    ) -> Rows:
        """Where the data of `count` sequences lie, [count, tokens]."""
        raise NotImplementedError

    def words(self, settings: SyntheticSettings) -> int:
        """Surroundings, data, a marker before data among their like, and one that asks."""
        return self.surround(settings) + settings.alphabet + 2

    def answers(self, settings: SyntheticSettings) -> int:
        return settings.alphabet

    def scored(self, settings: SyntheticSettings) -> int:
        return settings.tokens

    def fault(self, settings: SyntheticSettings) -> str | None:
        if settings.length >= (least := 2 * settings.tokens + 2):
            return None
        return (
            f"--length {settings.length} has no room for {settings.tokens} tokens and their "
            f"answer: use at least {least}"
        )

    def sequences(
        self, settings: SyntheticSettings, count: int, generator: np.random.Generator
    ) -> Rows:
        length, tokens, surround = settings.length, settings.tokens, self.surround(settings)
        values = generator.integers(0, settings.alphabet, (count, tokens))
        rows = generator.integers(0, surround, (count, length))
        every, ask = np.arange(count)[:, None], self.words(settings) - 1
        where = self.places(settings, count, generator)
        if not self.hidden:
            rows[every, where[:, :1] - 1] = ask - 1
        rows[every, where] = surround + values
        rows[:, length - tokens - 1] = ask
        rows[:, length - tokens :] = ask + 1 + values
        return rows


class Problem(Task):
    """Something to be worked out of symbols that are drawn evenly."""

    def symbols(self, settings: SyntheticSettings) -> int:
        """How many different ones there are."""
        return 2

    def words(self, settings: SyntheticSettings) -> int:
        """The blank, the symbols, and the marker that asks."""
        return self.symbols(settings) + 2

    def answers(self, settings: SyntheticSettings) -> int:
        return 2

    def solve(self, settings: SyntheticSettings, drawn: Rows) -> Rows:
        """Of symbols [count, n], from 0 on: the answer [count, 1], or of every prefix."""
        raise NotImplementedError


class AtTheEnd(Problem):
    """Blanks, a problem of one of `distances` symbols, in turn, the marker, its answer."""

    asks_by_distance = True

    def fault(self, settings: SyntheticSettings) -> str | None:
        wrong = [d for d in settings.distances if not 1 <= d <= settings.length - 2]
        if not wrong and settings.distances:
            return None
        return (
            f"--distances {','.join(map(str, wrong)) or 'is empty'}: a problem in a sequence of "
            f"{settings.length} tokens can be 1 to {settings.length - 2} long"
        )

    def write(self, drawn: Rows, generator: np.random.Generator) -> Rows:
        """How symbols are written down, as many of them."""
        return drawn + 1

    def sequences(
        self, settings: SyntheticSettings, count: int, generator: np.random.Generator
    ) -> Rows:
        rows = np.zeros((count, settings.length), np.int64)
        lengths = np.resize(settings.distances, count)
        for length in sorted(set(settings.distances)):
            (these,) = np.nonzero(lengths == length)
            drawn = generator.integers(0, self.symbols(settings), (len(these), length))
            rows[these, -length - 2 : -2] = self.write(drawn, generator)
            rows[these, -1:] = self.words(settings) + self.solve(settings, drawn)
        rows[:, -2] = self.words(settings) - 1
        return rows


class AtEveryStep(Problem):
    """A symbol, the answer so far, a symbol, the answer so far, ..."""

    def scored(self, settings: SyntheticSettings) -> int:
        return settings.length // 2

    def sequences(
        self, settings: SyntheticSettings, count: int, generator: np.random.Generator
    ) -> Rows:
        steps = settings.length // 2
        drawn = generator.integers(0, self.symbols(settings), (count, steps))
        rows = np.zeros((count, settings.length), np.int64)
        rows[:, 0 : 2 * steps : 2] = drawn + 1
        rows[:, 1 : 2 * steps : 2] = self.words(settings) + self.solve(settings, drawn)
        return rows
