"""Six synthetic arithmetic tasks, small enough to enumerate every prompt and right completion.

Because nothing is hidden, tokrl.py can compute accuracy, entropy and drift exactly.

    task     prompt    right completions      what it is for
    commute  75=       7+5=12  5+7=12         add the digits 7 and 5: two right solutions (default)
    split    12=       3+9  9+3  1+2+9 ...    a sum that gives 12: many right solutions, two lengths
    chain    3+4+2=    7+2=9  3+6=9           a scratchpad: some tokens matter more than others
    add      7+5=      12                     one right answer, so nothing can drift
    habit    75=       7+5=12  5+7=12         as commute, but the start has a favorite: the larger
                                              digit comes first nine times in ten
    late     75        =7+5=12  =5+7=12       as commute, but all completions begin with "=", so a
                                              fork of one token does not choose between them

A character is a token. A completion is right if it is one of the prompt's solutions *and* ended
with EOS. Text that never ends has `max_completion` characters, more than any solution, so comparing
strings is enough. The reward is 0 or 1 and comes once, at the end.

    >>> TASKS["commute"].solutions("75=")
    ['7+5=12', '5+7=12']
    >>> decode(encode("7+5=12") + [EOS, PAD])
    '7+5=12'
"""

import random
from dataclasses import dataclass

VOCAB = "_.0123456789+="  # index = token id
PAD = 0  # "_" fills up rows; it never marks the end, and may be sampled like any wrong character
EOS = 1  # "."


def encode(text: str) -> list[int]:
    """One token id per character. Raises ValueError for a character outside VOCAB."""
    for character in text:
        if character not in VOCAB:
            raise ValueError(f"character {character!r} is not in the vocabulary {VOCAB!r}")
    return [VOCAB.index(character) for character in text]


def decode(ids) -> str:
    """The text before the first EOS, or all of it where there is none; a PAD shows as '_'."""
    text = "".join(VOCAB[int(i)] for i in ids)
    return text.partition(VOCAB[EOS])[0]


@dataclass(frozen=True, eq=False)  # hashed by identity, so that tables can be cached per task
class Task:
    """A task is its table: each prompt with all of its right completions."""

    name: str
    fork: int  # how many opening tokens a group shares by default
    # Tokens sampled per completion: more than the longest solution plus EOS, and with the prompt at
    # most 17, which is what the policy of tokrl.py can read.
    max_completion: int
    table: dict[str, tuple[str, ...]]
    favourite: float | None = None  # how often the first solution is shown; None: evenly

    def prompts(self) -> list[str]:
        """Every prompt; all have one length."""
        return list(self.table)

    def solutions(self, prompt: str) -> list[str]:
        """Every right completion, without EOS. ValueError: not a prompt of this task."""
        if prompt not in self.table:
            example = self.prompts()[0]
            raise ValueError(f"{prompt!r} is not a prompt of {self.name!r}; one is {example!r}")
        return list(self.table[prompt])

    def reward(self, prompt: str, completion: str) -> float:
        """1.0 where the decoded completion is exactly one of the prompt's solutions, else 0.0."""
        return float(completion in self.table.get(prompt, ()))

    def demonstration(self, prompt: str, rng: random.Random) -> str:
        """A solution, drawn evenly or as `favourite` says; half of the time with a wrong answer.

        This stands in for the data of a base model that has seen the form of the task but has not
        mastered it. The answer is what follows the last '='. A wrong answer is that of another
        prompt. ValueError: there is none.
        """
        solutions = self.solutions(prompt)
        if self.favourite is None:
            solution = rng.choice(solutions)
        elif rng.random() < self.favourite:
            solution = solutions[0]
        else:
            solution = rng.choice(solutions[1:])
        if rng.random() < 0.5:
            return solution
        opening, equals, _ = solution.rpartition("=")
        for _ in range(1000):
            another = rng.choice(self.table[rng.choice(self.prompts())])
            wrong = opening + equals + another.rpartition("=")[2]
            if not self.reward(prompt, wrong):
                return wrong
        raise ValueError(f"task {self.name!r} has no wrong answer for {prompt!r}")


def commute() -> Task:
    """Operands 1-9, different: 72 prompts, two solutions each (the two orders of the sum)."""
    table = {}
    for a in range(1, 10):
        for b in range(1, 10):
            if a != b:
                table[f"{a}{b}="] = (f"{a}+{b}={a + b}", f"{b}+{a}={a + b}")
    return Task("commute", fork=2, max_completion=8, table=table)


def split() -> Task:
    """Totals 3-12: 10 prompts, each with every sum of two or three digits 1-9, 276 in all."""
    digits = range(1, 10)
    pairs = [(a, b) for a in digits for b in digits]
    table = {}
    for total in range(3, 13):
        twos = [f"{a}+{b}" for a, b in pairs if a + b == total]
        threes = [f"{a}+{b}+{total - a - b}" for a, b in pairs if total - a - b in digits]
        table[f"{total:02d}="] = tuple(twos + threes)
    return Task("split", fork=2, max_completion=7, table=table)


def chain() -> Task:
    """a+b+c of at most 9, each at least 1: 84 prompts, two solutions each (which sum is first)."""
    table = {}
    for a in range(1, 8):
        for b in range(1, 9 - a):
            for c in range(1, 10 - a - b):
                total = a + b + c
                left_first = f"{a + b}+{c}={total}"
                right_first = f"{a}+{b + c}={total}"
                table[f"{a}+{b}+{c}="] = (left_first, right_first)
    return Task("chain", fork=2, max_completion=7, table=table)


def add() -> Task:
    """Digits 0-9: 100 prompts, one two-digit answer each."""
    table = {}
    for a in range(10):
        for b in range(10):
            table[f"{a}+{b}="] = (f"{a + b:02d}",)
    return Task("add", fork=1, max_completion=4, table=table)


def habit() -> Task:
    """Prompts and solutions of commute, with a favorite; a group shares tokens only by chance.

    It stands for a language model, which prefers one right answer from the start. Its samples are
    independent: a group shares an opening because all of its members chose it.
    """
    table = {}
    for prompt, solutions in commute().table.items():
        table[prompt] = tuple(sorted(solutions, reverse=True))  # 7+5=12 before 5+7=12
    return Task("habit", fork=0, max_completion=8, table=table, favourite=0.9)


def late() -> Task:
    """Commute with the "=" of its prompts moved into the completions, which then begin alike.

    The default fork of one token shares this "=", which decides nothing. A fork of three tokens
    holds the choice between the two solutions, as the fork of commute does.
    """
    table = {}
    for prompt, solutions in commute().table.items():
        table[prompt.removesuffix("=")] = tuple("=" + solution for solution in solutions)
    return Task("late", fork=1, max_completion=9, table=table)


EVERY = (commute(), split(), chain(), add(), habit(), late())
TASKS: dict[str, Task] = {task.name: task for task in EVERY}
