"""Four synthetic arithmetic tasks, small enough to enumerate: every prompt and right completion is known.

Because nothing is hidden, tokrl.py can compute accuracy, entropy and drift exactly instead of sampling them.

    task     prompt    right completions          what it is for
    commute  75=       7+5=12  5+7=12             two equally right solutions of equal length (default)
    split    12=       3+9  9+3  1+2+9 ...        many right solutions of two lengths
    chain    3+4+2=    7+2=9  3+6=9               a scratchpad: some tokens matter more than others
    add      7+5=      12                         one right answer, so nothing can drift: the control

A character is a token. A completion is right when it is one of the prompt's solutions *and* was ended by EOS:
text that never ends has `max_completion` characters, more than any solution, so comparing strings is enough.
The reward is 0 or 1 and comes once, at the end.

    >>> TASKS["commute"].solutions("75=")
    ['7+5=12', '5+7=12']
    >>> decode(encode("7+5=12") + [EOS, PAD])
    '7+5=12'
"""

import random
from dataclasses import dataclass, replace

VOCAB = "_.0123456789+="  # index = token id; "_" is PAD, "." is EOS
PAD, EOS = 0, 1  # PAD fills up rows; it never marks the end, and may be sampled like any wrong character


def encode(text: str) -> list[int]:
    """One token id per character. Raises ValueError for a character outside VOCAB."""
    for character in text:
        if character not in VOCAB:
            raise ValueError(f"character {character!r} is not in the vocabulary {VOCAB!r}")
    return [VOCAB.index(character) for character in text]


def decode(ids) -> str:
    """The text before the first EOS, or all of it where there is none; a sampled PAD shows as '_'."""
    ids = [int(i) for i in ids]
    return "".join(VOCAB[i] for i in ids[: ids.index(EOS) if EOS in ids else len(ids)])


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, so tables can be cached per task
class Task:
    """A task is its table: each prompt with all of its right completions."""

    name: str
    fork: int  # how many opening tokens a group shares by default
    max_completion: int  # tokens sampled per completion; exceeds the longest solution plus EOS
    table: dict[str, tuple[str, ...]]

    def prompts(self) -> list[str]:
        """Every prompt; all have one length."""
        return list(self.table)

    def solutions(self, prompt: str) -> list[str]:
        """Every right completion, without EOS. Raises ValueError for a prompt that the task does not have."""
        if prompt not in self.table:
            raise ValueError(f"{prompt!r} is not a prompt of {self.name!r}; one is {self.prompts()[0]!r}")
        return list(self.table[prompt])

    def reward(self, prompt: str, completion: str) -> float:
        """1.0 where the decoded completion is exactly one of the prompt's solutions, else 0.0."""
        return float(completion in self.table.get(prompt, ()))

    def demonstration(self, prompt: str, rng: random.Random) -> str:
        """A solution drawn uniformly; half of the time with the answer (what follows '=') of another prompt.

        This stands in for the data of a base model that has seen the form of the task but not mastered it.
        Raises ValueError where no other prompt has another answer.
        """
        solution = rng.choice(self.solutions(prompt))
        if rng.random() < 0.5:
            return solution
        for _ in range(1000):
            opening, equals, _ = solution.rpartition("=")
            wrong_answer = rng.choice(self.table[rng.choice(self.prompts())]).rpartition("=")[2]
            if not self.reward(prompt, opening + equals + wrong_answer):
                return opening + equals + wrong_answer
        raise ValueError(f"task {self.name!r} has no wrong answer for {prompt!r}: all its answers are alike")


def commute() -> Task:
    """Operands 1-9, different: 72 prompts, two solutions each (the two orders of the sum)."""
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10) if a != b]
    return Task("commute", 2, 8, {f"{a}{b}=": (f"{a}+{b}={a + b}", f"{b}+{a}={a + b}") for a, b in pairs})


def split() -> Task:
    """Totals 3-12: 10 prompts, each with every sum of two or three digits 1-9 that gives it, 276 in all."""
    digits = range(1, 10)

    def sums(total: int) -> tuple[str, ...]:
        twos = [f"{a}+{total - a}" for a in digits if total - a in digits]
        threes = [f"{a}+{b}+{total - a - b}" for a in digits for b in digits if total - a - b in digits]
        return tuple(twos + threes)

    return Task("split", 2, 7, {f"{total:02d}=": sums(total) for total in range(3, 13)})


def chain() -> Task:
    """a+b+c of at most 9, each at least 1: 84 prompts, two solutions each (which sum is taken first)."""
    triples = [(a, b, c) for a in range(1, 8) for b in range(1, 9 - a) for c in range(1, 10 - a - b)]
    table = {f"{a}+{b}+{c}=": (f"{a + b}+{c}={a + b + c}", f"{a}+{b + c}={a + b + c}") for a, b, c in triples}
    return Task("chain", 2, 7, table)


def add() -> Task:
    """Digits 0-9: 100 prompts, one two-digit answer each."""
    return Task("add", 1, 4, {f"{a}+{b}=": (f"{a + b:02d}",) for a in range(10) for b in range(10)})


TASKS: dict[str, Task] = {task.name: task for task in (commute(), split(), chain(), add())}

# The same prompts under a stricter verifier, for `adapt`: only the larger operand first counts as right.
LARGER_FIRST = replace(
    TASKS["commute"],
    name="larger-first",
    table={p: tuple(s for s in right if s[0] > s[2]) for p, right in TASKS["commute"].table.items()},
)
