"""Which plan to look at next: a function of what was found so far, and of nothing else.

    1  on the first ladder, which mostly gains most, the harshest move that keeps the bound
    2  one move of each other ladder alone: what it gains for what it costs orders them
    3  on each of these, the harshest move that keeps the bound, those chosen before staying
    4  exchange: a step further on one ladder for steps back on others, and a step back where that
       costs nothing, until nothing gets better

It is a generator: it asks for a plan and is sent the best candidate of it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from onnxc.anytime.journal import Found
from onnxc.anytime.moves import Ladder, Move, Plan, Slot, ordered

Search = Generator[Plan, Found, None]
Swap = Generator[Plan, Found, bool]
Steps = dict[Slot, tuple[Ladder, int]]

LEAST_DROP = 0.02  # points: below, nothing tells drops apart
CLOSER = 0.9  # of a drop: what is worth a step back at equal cost


@dataclass(frozen=True)
class Rule:
    """bound: points of the drop. tie: share of the cost within which the drop decides."""

    bound: float
    tie: float

    def is_better(self, one: Found, other: Found) -> bool:
        """Whether one is to be preferred; the other one keeps the bound, or is the original."""
        if not one.meets(self.bound):
            return False
        if one.cost < other.cost * (1 - self.tie):
            return True
        is_tied = one.cost <= other.cost * (1 + self.tie)
        return is_tied and one.cost < 1 and one.estimate.drop < CLOSER * other.estimate.drop

    def best(self, some: Iterable[Found]) -> Found | None:
        """Of candidates, the one to be preferred; of those that miss the bound, the closest."""
        tried = [one for one in some if not one.failure]
        chosen: Found | None = None
        for one in (one for one in tried if one.meets(self.bound)):
            chosen = one if chosen is None or self.is_better(one, chosen) else chosen
        return chosen or min(tried, key=lambda one: one.estimate.high, default=None)


@dataclass
class Descent:
    """The state of a search: the moves chosen so far, and the candidate that they make."""

    rule: Rule
    best: Found
    chosen: dict[Slot, tuple[Ladder, int]] = field(default_factory=dict)

    def plan(self, ladder: Ladder, index: int) -> Plan:
        """The moves chosen, with one of a ladder in its slot; an index below 0 is none."""
        moves = {slot: own.moves[i] for slot, (own, i) in self.chosen.items()}
        moves.pop(ladder.slot, None)
        if index >= 0:
            moves[ladder.slot] = ladder.moves[index]
        return ordered(moves)

    def settle(self, ladder: Ladder, index: int, found: Found) -> bool:
        """Take a move where it is better."""
        if not self.rule.is_better(found, self.best):
            return False
        self.best, self.chosen[ladder.slot] = found, (ladder, index)
        return True

    def harshest(self, ladder: Ladder) -> Search:
        """Bisection for the last move that keeps the bound; the best of those seen is taken."""
        low, high, index = -1, len(ladder.moves), ladder.first
        while low < index < high:
            found = yield self.plan(ladder, index)
            if found.meets(self.rule.bound):
                low = index
                self.settle(ladder, index, found)
            else:
                high = index
            index = (low + high) // 2

    def exchanged(self, ladders: Sequence[Ladder]) -> Search:
        """Steps back that cost nothing and steps further for steps back, until none is better."""
        is_new = True
        while is_new:
            is_new = False
            for swap in self._swaps(ladders):
                is_new = yield from swap
                if is_new:
                    break

    def _swaps(self, ladders: Sequence[Ladder]) -> Iterator[Swap]:
        """A step back on each; steps further on each for steps back on another, or on all."""
        for slot, (own, index) in self.chosen.items():
            if index > 0:
                yield self._relaxed({slot: (own, index - 1)})
        for ladder in ladders:
            own, index = self.chosen.get(ladder.slot, (ladder, -1))
            if own is not ladder or index + 1 == len(ladder.moves):
                continue
            others = [slot for slot in self.chosen if slot != ladder.slot]
            alone: list[list[Slot]] = [[slot] for slot in others] or [[]]
            for slots in [*alone, others] if len(others) > 1 else alone:
                yield self._along_the_bound(ladder, index, slots)

    def _relaxed(self, steps: Steps) -> Swap:
        """One step back."""
        is_better, _ = yield from self._taken(steps)
        return is_better

    def _along_the_bound(self, ladder: Ladder, index: int, slots: Sequence[Slot]) -> Swap:
        """Further on one ladder while the bound is kept, and else further back on others."""
        room = max((self.chosen[slot][1] + 1 for slot in slots), default=0)
        further, back = _counts(len(ladder.moves) - index - 1), [0, *_counts(room)]
        f = b = 0
        while f < len(further) and b < len(back):
            steps: Steps = {ladder.slot: (ladder, index + further[f])}
            for slot in slots:
                own, i = self.chosen[slot]
                steps[slot] = own, i - back[b]
            is_better, keeps = yield from self._taken(steps)
            if is_better:
                return True
            f, b = (f + 1, b) if keeps else (f, b + 1)
        return False

    def _taken(self, steps: Steps) -> Generator[Plan, Found, tuple[bool, bool]]:
        """Take other steps in some slots if they are better: if so, and if they keep the bound."""
        near = {slot: at for slot, at in {**self.chosen, **steps}.items() if at[1] >= 0}
        found = yield ordered({slot: own.moves[i] for slot, (own, i) in near.items()})
        is_better = self.rule.is_better(found, self.best)
        if is_better:
            self.best, self.chosen = found, near
        return is_better, found.meets(self.rule.bound)


def _counts(most: int) -> list[int]:
    """1, 2, 4 … and the most itself."""
    return [*(1 << k for k in range(most.bit_length()) if 1 << k < most), most] if most else []


def search(ladders: Sequence[Ladder], rule: Rule, original: Found) -> Search:
    """Ask for one plan after the other. original: what is the best at first."""
    state, first = Descent(rule, original), ladders[0]
    yield from state.harshest(first)
    worth: list[tuple[float, int]] = []
    for number, ladder in enumerate(ladders[1:]):
        found = yield (ladder.moves[ladder.first],)
        gain = -1.0 if found.failure else 1 - found.cost
        worth.append((-gain / max(found.estimate.drop, LEAST_DROP), number))
    order = [ladders[1 + number] for value, number in sorted(worth) if value < 0]
    for ladder in order:
        yield from state.harshest(ladder)
    yield from state.exchanged((first, *order))


def moves_of(ladders: Sequence[Ladder]) -> dict[str, Move]:
    """All moves, by name."""
    return {move.name: move for ladder in ladders for move in ladder.moves}
