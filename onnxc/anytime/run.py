"""The search: ask the strategy, make and measure what it asks for, keep the best one on disk.

The original is the first best one, so that there is always a file that keeps the bound. A plan that
would not be done in the time that is left is not begun. With workers, the plans that the strategy
may ask for next are looked at ahead: it is run on with each outcome assumed.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from calib.cluster import Crew
from calib.remote import check_files
from onnxc import recipe as recipes
from onnxc.anytime import strategy
from onnxc.anytime.journal import Found, Journal
from onnxc.anytime.moves import JOINT, Ladder, Plan, name_of
from onnxc.anytime.strategy import Rule
from onnxc.anytime.tallies import Estimate
from onnxc.anytime.workshop import NOTHING, Candidate, Workshop
from onnxc.bench import Ratio, speedup
from onnxc.graph import Model, load
from onnxc.pairs import Subject
from onnxc.paths import check_unchanged
from onnxc.request import Job
from onnxc.search import TIE, times
from onnxc.storage.packing import store

if TYPE_CHECKING:
    from distributed import Client

REPEATS = 30  # rounds of timing
ROOM = 1.2  # times what a plan took so far, which the time that is left must hold
MISSED = Estimate(math.inf, math.inf, math.inf, 0)


@dataclass
class Run:
    """One search. limit: seconds, those before an interruption included.

    ahead: candidates that workers made before they were asked for. refused: what was answered for
    plans for which there was no time.
    """

    job: Job
    workshop: Workshop
    ladders: Sequence[Ladder]
    journal: Journal
    limit: float
    client: Client | None = None
    ahead: dict[str, list[Candidate]] = field(default_factory=dict, repr=False)
    refused: dict[str, Found] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        shop = self.workshop
        self.start = time.perf_counter() - self.journal.elapsed
        self.whole = 1.0 if self.is_timed else shop.original_amount()
        self.original = Found("original", "", replace(NOTHING, samples=len(shop.chooses)), 1.0)
        self.rule = Rule(shop.bound, TIE if self.is_timed else 0.0)
        self.best = self.original
        for found in self.journal.all():
            self._know(found)

    @property
    def is_timed(self) -> bool:
        return self.workshop.objective == "latency"

    @property
    def is_complete(self) -> bool:
        """Whether nothing was left out for want of time."""
        return not self.refused

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def search(self) -> Found:
        """Go on until nothing gets better, or the time is over. The best one is on disk."""
        if not self.journal.found:
            self.keep(load(self.job.path), "nothing was written")
        asked = strategy.search(self.ladders, self.rule, self.original)
        reply: Found | None = None
        while True:
            try:
                plan = next(asked) if reply is None else asked.send(reply)
            except StopIteration:
                return self.best
            if self._is_known(plan) or self._is_affordable(plan):
                reply = self._found(plan)
            else:  # others may be quicker
                reply = Found(name_of(plan), "", MISSED, math.inf, failure="there was no time")
                self.refused[reply.plan] = reply

    def _is_known(self, plan: Plan) -> bool:
        return not plan or name_of(plan) in self.journal.found

    def _is_affordable(self, plan: Plan) -> bool:
        """Whether a plan will be done in time, as plans that end with the same task were."""
        task = plan[-1].task.name
        alike = [x.seconds for x in self.journal.all() if _last_task(x.plan) == task]
        needed = ROOM * max(alike, default=0.0)
        return not self.journal.found or self.elapsed + needed <= self.limit

    def _found(self, plan: Plan) -> Found:
        """The best candidate of a plan, looked up or made now."""
        if not plan:
            return self.original
        name = name_of(plan)
        if name not in self.journal.found:
            self._look(plan)
        some = self.journal.found[name]
        return self.rule.best(some) or some[0]

    def _look(self, plan: Plan) -> None:
        """Make and measure the candidates of a plan; the file is written before it is noted."""
        begun, name = time.perf_counter(), name_of(plan)
        self.job.say(f"{self._standing()}; trying {name}")
        made = self._made(plan)
        found = self._measured(made)
        seconds = time.perf_counter() - begun
        found = [replace(x, seconds=seconds, elapsed=self.elapsed) for x in found]
        for one, candidate in zip(found, made, strict=True):
            if self._know(one):
                self.keep(opened(candidate.model))
        self.journal.add(found)

    def keep(self, model: Model, left: str = "the output is what was found before") -> None:
        """Write the best model. Raises ModelError where what it was made of has changed."""
        check_unchanged(self.job.files, left)
        store(model, self.job.output)

    def _standing(self) -> str:
        count = len(self.journal.found)
        cost = f"best {self.best.cost:.2f} of the {self.workshop.objective}, drop "
        drop = f"{self.best.estimate.drop:.2f}"
        return f"{count} plans in {self.elapsed:.0f} of {self.limit:.0f} s, {cost}{drop}"

    def _know(self, found: Found) -> bool:
        """Take note of a candidate; whether it is the best one now."""
        passes = recipes.loads(found.recipe).passes if found.recipe else ()
        starts = list(accumulate(found.stages))
        names = found.plan.split(JOINT)
        for count, stop in enumerate(starts[:-1], 1):
            self.workshop.stages.setdefault(JOINT.join(names[:count]), passes[:stop])
        is_better = self.rule.is_better(found, self.best)
        if is_better:
            self.best, self.workshop.best = found, passes
        return is_better

    def _made(self, plan: Plan) -> list[Candidate]:
        name = name_of(plan)
        if self.client is None or not isinstance(self.workshop.original, bytes):
            return self.workshop.candidates(plan)
        if name not in self.ahead:
            crew = Crew(self.client)
            wanted = [p for p in self._next(crew.count) if name_of(p) not in self.ahead]
            made = crew.each(candidates_of, self.workshop, wanted)
            self.ahead |= {name_of(p): some for p, some in zip(wanted, made, strict=True)}
        return self.ahead.pop(name)

    def _next(self, count: int) -> list[Plan]:
        """Plans that the strategy may ask for next, the most certain first."""
        wanted: dict[str, Plan] = {}
        branches: deque[dict[str, Found]] = deque([self.refused])
        while branches and len(wanted) < count:
            guesses = branches.popleft()
            plan = self._asked(guesses)
            if plan is None:
                continue
            wanted[name_of(plan)] = plan
            for estimate in (NOTHING, MISSED):
                guess = Found(name_of(plan), "", estimate, self.best.cost / 2)
                branches.append({**guesses, guess.plan: guess})
        return list(wanted.values())

    def _asked(self, guesses: Mapping[str, Found]) -> Plan | None:
        """The first plan that is neither known nor guessed."""
        asked = strategy.search(self.ladders, self.rule, self.original)
        with suppress(StopIteration):
            plan = next(asked)
            while self._is_known(plan) or name_of(plan) in guesses:
                plan = asked.send(guesses.get(name_of(plan)) or self._found(plan))
            return plan
        return None

    def _measured(self, made: Sequence[Candidate]) -> list[Found]:
        """Candidates with their costs; latency is taken here, of all in turn."""
        ratios: dict[int, Ratio] = {}
        good = {str(i): x.model for i, x in enumerate(made) if not x.failure}
        if self.is_timed and good:
            shop = self.workshop
            taken = times(shop.original, good, shop.chooses, shop.piece.runtime, REPEATS)
            ratios = {int(i): speedup(*pair) for i, pair in taken.items()}
        found = []
        for number, x in enumerate(made):
            ratio = ratios.get(number)
            cost = x.amount / self.whole if not self.is_timed else math.inf
            cost = cost if ratio is None else 1 / ratio.median
            told = (x.bytes, ratio, x.recipe, x.stages, x.failure)
            found.append(Found(x.plan, x.way, x.estimate, cost, *told))
        return found


def candidates_of(workshop: Workshop, plan: Plan) -> list[Candidate]:
    """A task of a worker."""
    check_files(workshop.chooses)
    return workshop.candidates(plan)


def opened(subject: Subject) -> Model:
    """A candidate, to be written."""
    return subject if isinstance(subject, Model) else load(subject)


def _last_task(plan: str) -> str:
    return plan.split(JOINT)[-1].split()[0]
