"""Word problems of grade-school kind, answers that a fallible demonstrator writes to them, and how answers are graded.

    Nina has 9 shells. Nina finds 5 more. Nina gives 3 to Omar. Nina buys 2 bags of 3. How many shells …

    Nina has 9 shells. Next, Nina finds 5: 9 + 5 = 14. So Nina has 16. #### 16

A step works out one event, after an opener drawn from four, all of them harmless; or it is a *jump*, which begins with
"So", gives the result of two events at once, and is mostly wrong. As in the tiny pair's task, reinforcement learning
has to tell these two kinds of fork apart.
"""

import random
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

NAMES = ("Nina", "Omar", "Lucy", "Tom", "Maria", "Ben", "Sara", "Paul")
THINGS = ("shells", "apples", "coins", "books", "cards", "stones", "eggs", "balls")
OPENERS = ("Then ", "Next, ", "After that, ", "")
JUMP = "So"
NUM_EVENTS = 3
SYSTEM = "Solve the problem step by step."
MAX_RESPONSE_TOKENS = 96
#: As `dlogp` takes it.
GRADER = f"{__name__}:grade"

Split = Literal["train", "held_out"]


class Event(NamedTuple):
    """What happens, as the problem and a step tell it; the sum that a step writes down, and what it comes to."""

    told: str
    retold: str
    sign: int
    amount: int

    def __call__(self, count: int) -> int:
        return count + self.sign * self.amount


class Problem(NamedTuple):
    """Somebody has things, and three events change how many."""

    name: str
    thing: str
    start: int
    events: tuple[Event, ...]

    @property
    def answer(self) -> int:
        return self.start + sum(event.sign * event.amount for event in self.events)

    @property
    def text(self) -> str:
        told = " ".join(f"{self.name} {event.told}." for event in self.events)
        return f"{self.name} has {self.start} {self.thing}. {told} How many {self.thing} does {self.name} have now?"

    @property
    def messages(self) -> list[dict[str, str]]:
        """What a chat model is asked."""
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.text}]

    @property
    def split(self) -> Split:
        """By its numbers, so that none of one split is in the other, whatever the names."""
        return "held_out" if (self.start + sum(event.amount for event in self.events)) % 4 == 0 else "train"


def generate_problems(count: int, seed: int, split: Split = "held_out") -> list[Problem]:
    """`count` different random problems of one split."""
    rng = random.Random(f"word problems {split} {seed}")
    found: dict[Problem, None] = {}
    while len(found) < count:
        problem = _random_problem(rng)
        if problem.split == split:
            found[problem] = None
    return list(found)


def _random_problem(rng: random.Random) -> Problem:
    name, friend = rng.sample(NAMES, 2)
    start = count = rng.randint(4, 12)
    events: list[Event] = []
    for _ in range(NUM_EVENTS):
        event = _random_event(rng, friend, count)
        while event in events:
            event = _random_event(rng, friend, count)
        events.append(event)
        count = event(count)
    return Problem(name, rng.choice(THINGS), start, tuple(events))


def _random_event(rng: random.Random, friend: str, count: int) -> Event:
    """One that leaves at least one thing."""
    number, bags, each = rng.randint(2, 5), rng.randint(2, 3), rng.randint(2, 3)
    kinds = [
        Event(f"finds {number} more", f"finds {number}", 1, number),
        Event(f"gets {number} from {friend}", f"gets {number}", 1, number),
        Event(f"buys {bags} bags of {each}", f"buys {bags} * {each} = {bags * each}", 1, bags * each),
    ]
    if number < count:
        kinds += [
            Event(f"gives {number} to {friend}", f"gives {number}", -1, number),
            Event(f"loses {number}", f"loses {number}", -1, number),
            Event(f"sells {number}", f"sells {number}", -1, number),
        ]
    return rng.choice(kinds)


class Demonstrator(NamedTuple):
    """Writes responses as a fallible person would; the base model learns from them.

    Args:
        jump_probability: of a jump, at every step that has at least two events left.
        jump_accuracy: probability that a jump lands right; otherwise it is off by up to 4.
        slip_probability: per step, that its result is off by one.
    """

    jump_probability: float = 0.4
    jump_accuracy: float = 0.15
    slip_probability: float = 0.03

    def respond(self, problem: Problem, rng: random.Random) -> str:
        """A response to `problem`."""
        return " ".join(self._sentences(problem, rng))

    def _sentences(self, problem: Problem, rng: random.Random) -> Iterator[str]:
        name, count, events = problem.name, problem.start, problem.events
        yield f"{name} has {count} {problem.thing}."
        while events:
            if len(events) >= 2 and rng.random() < self.jump_probability:
                count = events[1](events[0](count))
                if rng.random() >= self.jump_accuracy:
                    count = _off_by(rng, count, 4)
                yield f"{JUMP} {name} has {count}."
                events = events[2:]
                continue
            event, *rest = events
            result = event(count)
            if rng.random() < self.slip_probability:
                result = _off_by(rng, result, 1)
            sign = "+" if event.sign > 0 else "-"
            yield f"{rng.choice(OPENERS)}{name} {event.retold}: {count} {sign} {event.amount} = {result}."
            count, events = result, tuple(rest)
        yield f"#### {count}"


def _off_by(rng: random.Random, count: int, most: int) -> int:
    return rng.choice([other for other in range(max(0, count - most), max(0, count + most) + 1) if other != count])


def grade(response: str, problem: Mapping[str, Any]) -> bool:
    """Whether the last number in the response is the problem's answer: the raw model ends in forms of its own."""
    numbers = re.findall(r"-?\d+", response)
    return bool(numbers) and int(numbers[-1]) == problem["answer"]
