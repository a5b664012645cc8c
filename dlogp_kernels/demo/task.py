"""The task of the demo pair: a chain of operations modulo ten, solved step by step in words.

A prompt names its operations by letters and a response works through them:

    <bos> 4 a - 3 b * 9 c + 6 <sep>
    so a 4 - 3 = 1 next b 1 * 9 = 9 now c 9 + 6 = 5 # 5 <eos>

A step opens with a filler drawn from four, all of them harmless, or is a *jump* over two operations
at once (`jump a b = 9`), which saves tokens and often goes wrong. Reinforcement learning has to tell
these two kinds of fork apart. Every operation is a bijection of the digits, so an error propagates to
the answer unless a later error happens to undo it.
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal

MODULUS = 10
OPERANDS: Mapping[str, Sequence[int]] = {"+": range(1, 10), "-": range(1, 10), "*": (3, 7, 9)}
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
LETTERS = "abcdef"
NUM_OPERATIONS = len(LETTERS)
FILLERS = ("so", "then", "now", "next")

#: Special words as `word_tokenizer` has them.
BOS, EOS, SEPARATOR = "<bos>", "<eos>", "<sep>"
JUMP, EQUALS, ANSWER = "jump", "=", "#"

# Without the four special words, which the tokenizer puts first.
WORDS = (*map(str, range(MODULUS)), *OPERANDS, EQUALS, ANSWER, JUMP, *FILLERS, *LETTERS)

WORDS_PER_STEP = 7
MAX_RESPONSE_WORDS = WORDS_PER_STEP * NUM_OPERATIONS + 3

Split = Literal["supervised", "reinforcement", "held_out"]


@dataclass(frozen=True)
class Operation:
    """`state symbol operand`, modulo ten."""

    symbol: str
    operand: int

    def __call__(self, state: int) -> int:
        return _OPERATORS[self.symbol](state, self.operand) % MODULUS


@dataclass(frozen=True)
class Problem:
    """A first digit and the operations to apply to it in turn."""

    start: int
    operations: tuple[Operation, ...]

    @property
    def lettered_operations(self) -> list[tuple[str, Operation]]:
        """The operations with their names, of which there are six."""
        return list(zip(LETTERS[: len(self.operations)], self.operations, strict=True))

    @property
    def answer(self) -> int:
        """The digit that is left after all operations."""
        return reduce(lambda state, operation: operation(state), self.operations, self.start)

    @property
    def prompt(self) -> str:
        """The problem in words, as the models read it."""
        words = [BOS, str(self.start)]
        for letter, operation in self.lettered_operations:
            words += [letter, operation.symbol, str(operation.operand)]
        return " ".join([*words, SEPARATOR])


def parse_prompt(prompt: str) -> Problem:
    """The problem whose `prompt` this is."""
    match = re.fullmatch(rf"{BOS} (\d)((?: [{LETTERS}] [-+*] \d)*) {SEPARATOR}", prompt)
    if match:
        operations = re.findall(r"([-+*]) (\d)", match[2])
        problem = Problem(int(match[1]), tuple(Operation(symbol, int(operand)) for symbol, operand in operations))
        if problem.prompt == prompt:
            return problem
    raise ValueError(f"not a prompt of this task: {prompt!r}")


def generate_problems(count: int, seed: int, split: Split = "held_out") -> list[Problem]:
    """`count` random problems; those of one split are drawn independently of every other split's.

    There are 21⁶ · 10 problems: of 4 000 held-out ones, 0.2 are expected among 40 000 supervised ones.
    """
    rng = random.Random(f"problems {split} {seed}")
    return [_random_problem(rng) for _ in range(count)]


def _random_problem(rng: random.Random) -> Problem:
    symbols = rng.choices(tuple(OPERANDS), k=NUM_OPERATIONS)
    operations = tuple(Operation(symbol, rng.choice(OPERANDS[symbol])) for symbol in symbols)
    return Problem(rng.randrange(MODULUS), operations)


def is_correct(problem: Problem, response: str) -> bool:
    """Whether a response ends with the right answer and the end-of-sequence word; its steps do not count."""
    return response.split()[-3:] == [ANSWER, str(problem.answer), EOS]


@dataclass(frozen=True)
class Demonstrator:
    """Writes responses as a fallible person would; the supervised model learns from them.

    Args:
        jump_probability: of a jump, at every step that has at least two operations left.
        jump_accuracy: probability that a jump lands right; otherwise on any of the nine other digits.
        slip_probability: per operation, that a normal step is off by one.
    """

    jump_probability: float = 0.25
    jump_accuracy: float = 0.6
    slip_probability: Mapping[str, float] = field(default_factory=lambda: {"+": 0.02, "-": 0.03, "*": 0.05})

    def respond(self, problem: Problem, rng: random.Random) -> str:
        """A response to `problem`, at most `MAX_RESPONSE_WORDS` long."""
        operations = problem.lettered_operations
        state = problem.start
        words: list[str] = []
        while operations:
            if len(operations) >= 2 and rng.random() < self.jump_probability:
                (letter, first), (next_letter, second), *operations = operations
                state = self._land(second(first(state)), rng)
                words += [JUMP, letter, next_letter, EQUALS, str(state)]
            else:
                (letter, operation), *operations = operations
                result = self._compute(operation, state, rng)
                words += [rng.choice(FILLERS), letter, str(state), operation.symbol, str(operation.operand)]
                words += [EQUALS, str(result)]
                state = result
        return " ".join([*words, ANSWER, str(state), EOS])

    def _land(self, target: int, rng: random.Random) -> int:
        if rng.random() < self.jump_accuracy:
            return target
        return (target + rng.randrange(1, MODULUS)) % MODULUS

    def _compute(self, operation: Operation, state: int, rng: random.Random) -> int:
        result = operation(state)
        if rng.random() < self.slip_probability[operation.symbol]:
            result += rng.choice((-1, 1))
        return result % MODULUS
