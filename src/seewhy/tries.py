"""Pieces of work whose workers may die -> how many workers each has cost: an actor of Ray's, without torch, so that it is small."""

from __future__ import annotations


class Tries:
    """Counts how often a piece was begun by workers that then began no other."""

    def __init__(self) -> None:
        self.begun: dict[int, int] = {}

    def begin(self, number: int, survived: int | None) -> int:
        """How many workers a piece has cost. survived: what the worker that now begins it has done before, if anything."""
        if survived is not None:
            self.begun.pop(survived, None)
        cost = self.begun.get(number, 0)
        self.begun[number] = cost + 1
        return cost
