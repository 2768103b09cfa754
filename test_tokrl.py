"""Tests of tokrl.py and toy_tasks.py, in the order of their chapters.

    python -m pytest test_tokrl.py -m "not slow"    without the tests that train in earnest
    python -m pytest test_tokrl.py -k cor32         a statement of the paper: eq2, eq17, eq18,
                                                    section4, prop31, cor32, cor33
    python -m pytest test_tokrl.py -k ex14          exercise 14, on your mine.py; -k _ex: all

Most are worked by hand: the arithmetic is above the check or in its message. The others compare
with an enumeration, or with the same thing written out.
"""

import doctest
import math
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import tokrl
import toy_tasks
from tokrl import Config, Policy, effective_weights, net_push, policy_loss, transform_weights
from toy_tasks import EOS, PAD, TASKS, VOCAB, Task, decode, encode

HERE = Path(tokrl.__file__).resolve().parent
INF = math.inf
NAN = math.nan
generator = tokrl.named_generator
os.environ.pop("MPLBACKEND", None)  # that of a notebook that calls pytest
torch.set_num_threads(1)


# ---- Exercises: you write these functions into mine.py, beside this file. gspo, prefix, own, and
# future are losses, (log_r, A, mask, L) -> w; min_replace, orth, shrink, and zero are transforms,
# (w, A, mask) -> w. The others have the arguments of tokrl's functions.
EXERCISES = {
    9: "group_advantages",
    10: "gspo",
    11: "prefix",
    12: "min_replace",
    13: "orth",
    14: "shared_tokens",
    15: "share_reward",
    16: "sample_groups",
    17: "evaluate",
    18: "own",
    19: "future",
    20: "shrink",
    21: "zero",
}


@pytest.fixture(autouse=True)
def mine(request, monkeypatch):
    """In a test named _exN, your function of exercise N, which also replaces tokrl's; else None."""
    __tracebackhide__ = True
    found = re.search(r"_ex(\d+)", request.node.name)
    if not found:
        return None
    name = EXERCISES[int(found[1])]
    if not (HERE / "mine.py").exists():
        return pytest.skip(f"needs {name} in mine.py") if int(found[1]) > 17 else None  # tokrl's
    import mine as written

    function = getattr(written, name, None)
    if function in (None, getattr(tokrl, name, None)):  # "from tokrl import *" brings tokrl's own
        pytest.skip(f"mine.py has no {name}")

    def checked(*inputs, **options):
        __tracebackhide__ = True
        result = function(*inputs, **options)
        if not isinstance(result, (torch.Tensor, dict)):
            pytest.fail(f"{name} of mine.py returned {result!r}")
        return result

    monkeypatch.setattr(tokrl, name, checked, raising=False)
    monkeypatch.setattr(tokrl, "__tracebackhide__", True, raising=False)  # it holds the answers
    return checked


def plain(name):
    """gspo_ex10 -> gspo, min_eq17_ex12 -> min."""
    return re.sub("_e[xq].*", "", name)


# ---- Tools
def tensor(values):
    """In float64, where numbers made by hand are exact to 1e-12."""
    return torch.tensor(values, dtype=torch.float64)


def side_by_side(**columns):
    """Tensors to 6 digits, a row of each on a line."""
    printed = []
    for name, x in columns.items():
        rows = x.detach().double().reshape(-1, x.shape[-1] if x.dim() else 1).tolist()
        width = max(len(f"{number:.6g}") for row in rows for number in row)
        cells = [name]
        for row in rows:
            cells.append(" ".join(f"{number:{width}.6g}" for number in row))
        wide = max(map(len, cells))
        printed.append([cell.ljust(wide) for cell in cells])
    return "\n".join("  |  ".join(line).rstrip() for line in zip(*printed, strict=True))


def check(got, want, says="", atol=1e-12, **inputs):
    """Equal shapes and types, and equal numbers to `atol`."""
    __tracebackhide__ = True
    if not torch.is_tensor(got):
        pytest.fail(f"want a tensor, got {got!r}. {says}")
    wants = f"{tuple(want.shape)} of {want.dtype}"
    gives = f"{tuple(got.shape)} of {got.dtype}"
    if wants != gives:
        pytest.fail(f"want {wants}, got {gives}. {says}")
    apart = (got.detach().double() - want.double()).abs()
    if not ((apart <= atol) | (got.isnan() & want.isnan())).all():
        shown = side_by_side(**inputs, want=want, got=got) if want.numel() < 100 else ""
        pytest.fail(f"largest difference {apart.max():.6g}. {says}\n{shown}")


def parameters(policy):
    return torch.nn.utils.parameters_to_vector(policy.parameters()).detach()


def random_policy(seed: int = 0) -> Policy:
    """A policy in float64 that has learned nothing."""
    return Policy(generator(seed, "test")).double()


def read(policy, prompt, text):
    """log π of each token of a text and its EOS, read alone: (T)."""
    ids = [*encode(text), EOS]
    row = torch.tensor([encode(prompt) + ids[:-1]])
    return policy(row)[0, range(len(prompt) - 1, row.shape[1]), ids]


# ---- 1. Tasks
BY_HAND = {  # a prompt and its right completions; how many prompts and completions there are
    "commute": ("75=", ["7+5=12", "5+7=12"], 9 * 8, 2 * 9 * 8),
    "split": ("04=", ["1+3", "2+2", "3+1", "1+1+2", "1+2+1", "2+1+1"], 10, 276),
    "chain": ("3+4+2=", ["7+2=9", "3+6=9"], 84, 2 * 84),
    "add": ("7+5=", ["12"], 10 * 10, 10 * 10),
    "habit": ("57=", ["7+5=12", "5+7=12"], 9 * 8, 2 * 9 * 8),  # the larger digit first
    "late": ("75", ["=7+5=12", "=5+7=12"], 9 * 8, 2 * 9 * 8),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_task_by_hand(name):
    task = TASKS[name]
    prompt, right, prompts, solutions = BY_HAND[name]
    assert task.solutions(prompt) == right
    for s in right:
        for other in [s, s + "_", s + "0", s[:-1], s[:-1] + "0", "_" + s]:
            assert task.reward(prompt, other) == float(other in right)
    every = [(p, s) for p in task.prompts() for s in task.solutions(p)]
    assert (len(task.prompts()), len(set(every))) == (prompts, solutions)
    for p, s in every:
        left, right = (s if "=" in s else p + s).strip("=").split("=")  # 7+5=12, 04=1+3
        assert sum(map(int, left.split("+"))) == sum(map(int, right.split("+")))
        assert len(s) + 1 < task.max_completion


def test_task_docstring_is_true():
    assert doctest.testmod(toy_tasks) == (0, 2), "failed, tried"


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_task_demonstrations_are_half_wrong_and_even_but_for_a_favourite(task):
    prompt = task.prompts()[-1]
    right = task.solutions(prompt)
    rng = random.Random(0)
    texts = [task.demonstration(prompt, rng) for _ in range(4000)]
    shares = [0.9, 0.1] if task.name == "habit" else [1 / len(right)] * len(right)
    for s, share in zip(right, shares, strict=True):  # to 5 standard deviations
        assert abs(texts.count(s) - 2000 * share) < 5 * math.sqrt(2000 * share)


# ---- 3. Sampling
def test_completion_mask_by_hand():
    # a PAD before the first EOS is scored, a second EOS is not; without EOS all is scored
    tokens = torch.tensor([[[PAD, 3, EOS, 5, EOS], [EOS, 2, 2, 2, 2], [3, PAD, 3, 3, PAD]]])
    want = torch.tensor([[[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]]).bool()
    check(tokrl.completion_mask(tokens), want, tokens=tokens)


@pytest.mark.parametrize("fork", [0, 1, 3, 7])
def test_sample_groups_share_a_fork_and_branch_after_it_ex16(fork):
    prompts = torch.randint(len(VOCAB), (40, 3), generator=generator(0, "tokens"))
    policy = Policy(generator(1, "test"))
    tokens = tokrl.sample_groups(policy, prompts, 5, fork, 8, generator(0, "sampling"))
    assert tuple(tokens.shape) == (40, 5, 8), "(B,G,T)"
    mask = tokrl.completion_mask(tokens)
    agree = (tokens == tokens[:, :1]).all(dim=1)  # (B,T)
    in_fork = agree[:, :fork].all().item()
    assert in_fork, "the fork is sampled once for a group"
    alive = mask[:, :, fork].all(dim=1)  # groups that have not ended within the fork
    after_it = agree[alive, fork].double().mean().item()
    assert after_it < 0.5, "after the fork each completion goes on by itself"
    after_eos = set(tokens[~mask].tolist())
    assert after_eos == {PAD}, "nothing but PAD after EOS"
    again = tokrl.sample_groups(policy, prompts, 5, fork, 8, generator(0, "sampling"))
    assert again.tolist() == tokens.tolist(), "the generator decides, and nothing else"


@pytest.mark.parametrize("fork", [0, 1])
def test_sample_groups_follow_the_enumerated_distribution_ex16(fork):
    policy = Policy(generator(2, "test"))
    prompt = torch.tensor([encode("7.=")])  # an EOS in the prompt ends nothing
    pairs = torch.cartesian_prod(torch.arange(14), torch.arange(14))[None]  # 14² outcomes
    p = tokrl.token_logprobs(policy, prompt, pairs).sum(-1).exp()[0].detach()
    p[pairs[0, :, 0] == EOS] = 0.0  # one outcome more: ended at once
    expected = torch.cat([p, (1 - p.sum())[None]]) * 20_000

    sizes = (2, fork, 2, generator(0, "sampling"))
    first, second = tokrl.sample_groups(policy, prompt.expand(20_000, 3), *sizes)[:, -1].T
    counts = torch.where(first == EOS, 196, first * 14 + second).bincount(minlength=197)
    big = expected > 5
    chi2 = ((counts - expected)[big] ** 2 / expected[big]).sum().item()
    n = int(big.sum())
    assert chi2 < n + 5 * math.sqrt(2 * n), "χ² of n outcomes: mean n, deviation sqrt(2 n)"


# ---- 4. Advantages, by hand
def test_group_advantages_by_hand_ex9():
    # 1 0 0 1: mean 1/2, std with G − 1: sqrt(4 · 1/4 / 3) = sqrt(1/3)
    # 1 0 0 0: mean 1/4, std sqrt((9/16 + 3 · 1/16) / 3) = 1/2
    # 1 1 1 1: nothing to tell apart
    rewards = tensor([[1, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]])
    differences = tensor([[0.5, -0.5, -0.5, 0.5], [0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0]])
    std = tensor([[math.sqrt(1 / 3)], [0.5], [0]])
    check(tokrl.group_advantages(rewards), differences / (std + 1e-4), rewards=rewards)
    check(tokrl.group_advantages(rewards, False), differences, "normalize=False")


def test_group_advantages_of_equal_rewards_are_0_and_no_dust_ex9():
    rewards = torch.full((1, 7), 0.1)
    assert rewards.mean() != rewards[0, 0], "in float32 this mean is rounded"
    check(tokrl.group_advantages(rewards), torch.zeros(1, 7), "A mean may be rounded.", atol=0)
    check(tokrl.group_advantages(rewards, False), torch.zeros(1, 7), "normalize=False", atol=0)


def test_group_advantages_of_bfloat16_are_computed_in_float32_ex9():
    # 1 1 1 1 + 1/128: the mean, 1 + 1/512, lies between two numbers of bfloat16
    rewards = torch.tensor([[1, 1, 1, 1 + 1 / 128]]).bfloat16()
    want = torch.tensor([[-1 / 512, -1 / 512, -1 / 512, 3 / 512]])
    check(tokrl.group_advantages(rewards, normalize=False), want, "normalize=False", atol=0)


def test_share_reward_by_hand_ex15():
    # Group 1: of 5, 6, 5, 5 three are copies, and 6 / 3 = 2. Group 2 has each completion once, and
    # does not see the first.
    tokens = torch.tensor([[[5, 1], [6, 1], [5, 1], [5, 1]], [[5, 1], [6, 1], [5, 2], [7, 1]]])
    rewards = tensor([[6, 6, 6, 6], [1, 0, 1, 1]])
    want = tensor([[2, 6, 2, 2], [1, 0, 1, 1]])
    check(tokrl.share_reward(tokens, rewards), want, rewards=rewards, tokens=tokens.flatten(1))


# ---- 5. Effective weights, by hand, and Eq. 2: which losses cancel at a shared token
# Two groups of two, lengths n = 2 3 | 1 2 (one with a hole); L = 3, B G / M = 4 / 8.
# The first group shares its first token.
MASK = torch.tensor([[[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [0, 1, 1]]]).bool()
RATIO = tensor([[[2.0, 0.5, 9.0], [2.0, 2.0, 0.5]], [[0.9, 9.0, 9.0], [9.0, 1.3, 0.9]]])
OLD = tensor([[[-1.0, -2.0, -3.0], [-0.5, -0.1, -4.0]], [[-1.5, -0.3, -0.2], [-0.7, -2.5, -0.9]]])
ADVANTAGES = tensor([[0.5, -0.5], [-2.0, 2.0]])
N = tensor([[[2], [3]], [[1], [2]]])
CLIPPED = tensor([[[0, 0.5, 0], [2, 2, 0]], [[0.9, 0, 0], [0, 0, 0.9]]])
BOTH_WAYS = tensor([[[0, 0, 0], [0, 0, 0]], [[0.9, 0, 0], [0, 0, 0.9]]])
CAPPED = tensor([[[1.2, 0.5, 0], [1.2, 1.2, 0.5]], [[0.9, 0, 0], [0, 1.2, 0.9]]])
MEANS = tensor([[[1, 1, 0], [2 ** (1 / 3)] * 3], [[0, 0, 0], [0, 0, 0]]])
PRODUCTS = tensor([[[1, 1, 0], [2, 2, 2]], [[0.9, 0, 0], [0, 1.17, 1.17]]])
SO_FAR = tensor([[[2, 1, 0], [2, 4, 2]], [[0.9, 0, 0], [0, 1.3, 1.17]]])
FROM_HERE = tensor([[[1, 0.5, 0], [2, 1, 0.5]], [[0.9, 0, 0], [0, 1.17, 0.9]]])
CLIP = "r above 1.2 is dropped where Â > 0, below 0.8 where Â < 0"
MEAN = """s = sqrt(2 · ½) = 1 and cbrt(2 · 2 · ½) = 1.26 (Â < 0) are kept; dropped are
0.9 (below 1 − 0.04, Â < 0) and sqrt(1.3 · 0.9) = 1.08 (above 1 + 0.04, Â > 0); over n"""
WEIGHTS = {  # weights; w_1 − w_2 at the shared token, with the clip, without; how one gets there
    "reinforce": (MASK / tensor(3.0), 0, 0, "1 / L: 1/3 − 1/3"),
    "grpo": (CLIPPED / N, -2 / 3, 1 / 3, f"{CLIP}, r / n: 0 − 2/3; without a clip 2/2 − 2/3"),
    "dr_grpo": (CLIPPED / 3, -2 / 3, 0, f"{CLIP}, r / L: 0 − 2/3; without a clip 2/3 − 2/3"),
    "dapo": (CLIPPED / 2, -1, 0, f"{CLIP}, r B G / M: 0 − 2/2; without a clip 2/2 − 2/2"),
    "grpo_sym": (BOTH_WAYS / 3, 0, 0, "r above 1.2 or below 0.8 is dropped, r / L: 0 − 0"),
    "cispo": (CAPPED / 2, 0, 0, "min(r, 1.2) B G / M: 0.6 − 0.6; without a cap 2/2 − 2/2"),
    "gspo_ex10": (MEANS / N, *[1 / 2 - 2 ** (1 / 3) / 3] * 2, f"{MEAN}: 1/2 − 1.26/3"),
    "seq": (PRODUCTS / 3, -1 / 3, -1 / 3, "2 · ½ | 2 · 2 · ½ | 0.9 | 1.3 · 0.9, over L: 1/3 − 2/3"),
    "prefix_ex11": (SO_FAR / 3, 0, 0, "2, 2 · ½ | 2, 2 · 2, 2 · 2 · ½ | ..., over L: 2/3 − 2/3"),
    "future_ex19": (FROM_HERE / 3, -1 / 3, -1 / 3, "2 · ½, ½ | 2 · 2 · ½, 2 · ½, ½ | ..., over L"),
}
INPUTS = {"ratio": RATIO, "mask": MASK, "A": ADVANTAGES[..., None]}
UP_DOWN = tensor([[1.0, -1.0]])
A3 = tensor([[1.0, 1.0, -2.0]])


def weigh(loss, **options):
    return effective_weights(loss, OLD + RATIO.log(), OLD, ADVANTAGES, MASK, **options)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_by_hand(name, mine):
    loss = mine or plain(name)
    want, _, _, says = WEIGHTS[name]
    check(weigh(loss), want, f"L = 3; w: {says}", **INPUTS)
    # L = 1 in place of 3, where the loss has such a constant
    scale = 1 if plain(name) in ("grpo", "dapo", "cispo", "gspo") else 3
    check(weigh(loss, max_length=1), want * scale, f"L = 1; w: {says}", **INPUTS)


@pytest.mark.parametrize("name", WEIGHTS)
def test_eq2_by_hand(name, mine):
    _, clipped, unclipped, says = WEIGHTS[name]
    for clip_eps, want in [(None, clipped), (INF, unclipped)]:
        first, second = weigh(mine or plain(name), clip_eps=clip_eps)[0, :, 0]
        check(first - second, tensor(want), f"{says}\nΣ Â w is half of {first:.6g} − {second:.6g}")


def test_clip_with_two_bounds_by_hand():
    # (0.2, 0.6): 1.3 with Â > 0 is now kept; 2 with Â > 0 and 0.5 with Â < 0 are not
    want = tensor([[[0, 0.5, 0], [2, 2, 0]], [[0.9, 0, 0], [0, 1.3, 0.9]]]) / 3
    check(weigh("dr_grpo", clip_eps=(0.2, 0.6)), want, **INPUTS)


def test_clip_of_gspo_acts_on_bfloat16():
    # 94 tokens of log-ratio 0 and six of −1/64: s = exp(−6 / 64 / 100) = 0.99906 < 1 − 3e-4
    old = torch.full((1, 2, 100), -2.0, dtype=torch.bfloat16)
    new = old.clone()
    new[0, 1, :6] = -2.015625
    w = effective_weights("gspo", new, old, UP_DOWN, torch.ones(1, 2, 100).bool(), (3e-4, 4e-4))
    check(w[..., 0], torch.tensor([[0.01, 0.0]]), atol=1e-8)


def test_loss_and_transform_may_be_functions():
    A = ADVANTAGES[..., None]
    w = weigh(lambda log_r, A, mask, L: mask + log_r * A[..., None] / L, max_length=5)
    check(w, (1 + RATIO.log() * A / 5) * MASK, **INPUTS)
    w = transform_weights(RATIO, ADVANTAGES, MASK, lambda w, A, mask: mask + w * A[..., None])
    check(w, (1 + RATIO * A) * MASK, **INPUTS)
    assert Config(loss=abs, transform=abs).loss is abs
    assert Config(loss="dapo", clip_eps=(0.2, 0.28)).clip_eps == (0.2, 0.28)


def test_own_loss_cancels_and_clips_ex18(mine):
    # Three completions, of 2, 3 and 3 tokens, share two; then come ratios of 1000 and of 1/1000.
    log_r = tensor([[[1.1, 1.3, 1.0], [1.1, 1.3, 1000.0], [1.1, 1.3, 0.001]]]).log()
    mask = torch.tensor([[[1, 1, 0], [1, 1, 1], [1, 1, 1]]]).bool()
    w = effective_weights(mine, log_r, log_r * 0, A3, mask).double()
    says = side_by_side(A=A3[..., None], ratio=log_r.exp(), mask=mask, w=w)
    check(net_push(w, A3)[0, :2], tensor([0, 0]), f"net push at the shared tokens\n{says}")
    check(w[0, 1:, 2], tensor([0, 0]), f"weight at the ratios 1000 and 1/1000\n{says}")
    for ratio in (1000.0, 0.001):  # a clip at a shared token must clip it for all, whatever their Â
        moved = log_r.clone()
        moved[..., 0] = math.log(ratio)
        w = effective_weights(mine, moved, moved * 0, A3, mask).double()
        check(net_push(w, A3)[0, :2], tensor([0, 0]), f"net push at a shared ratio of {ratio}")
    least = effective_weights(mine, log_r, log_r, A3, mask)[mask].min().item()
    assert least > 0, "at the first inner step every token is trained"


# ---- 6. Transforms, by hand: Eq. 17 (min) and Eq. 18 (orth)
# a place where all three are alive, one with two, one with one, one with nobody
W = tensor([[1.0, 0.0, 5.0, 6.0], [2.0, 3.0, 7.0, 8.0], [6.0, 2.0, 9.0, 9.0]])
ALIVE = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]]).bool()
MIN = "min(1, 2, 6), min(0, 2), 7, of all who are alive"
ORTH = """Âᵀw = 1 + 2 − 12 = −9, ‖Â‖² = 6: (1, 2, 6) + 1.5 Â; of trajectories 1 and 3:
Âᵀw = 0 − 4, ‖Â‖² = 5: (0, 2) + 0.8 Â; of trajectory 2: 7 − 7"""
NO_A = "Âᵀw = 2, ‖Â‖² = 1; of trajectories 1 and 3: ‖Â‖ = 0, so w itself; 7 − 7"
SHRINK = "w min w / mean w: (1, 2, 6) · 1/3, (0, 2) · 0/1, 7 · 7/7"
TRANSFORMED = {  # advantages, the weights after it, how one gets there
    "min_eq17_ex12": ([0, 1, -1], [[1, 0, 0, 0], [1, 0, 7, 0], [1, 0, 0, 0]], MIN),
    "orth_eq18_ex13": ([1, 1, -2], [[2.5, 0.8, 0, 0], [3.5, 0, 0, 0], [3, 0.4, 0, 0]], ORTH),
    "orth_eq18_no_a_ex13": ([0, 1, 0], [[1, 0, 0, 0], [0, 0, 0, 0], [6, 2, 0, 0]], NO_A),
    "shrink_ex20": ([1, 1, -2], [[1 / 3, 0, 0, 0], [2 / 3, 0, 7, 0], [2, 0, 0, 0]], SHRINK),
    "zero_ex21": ([1, 1, -2], [[0, 0, 0, 0]] * 3, "no weight at all"),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transform_by_hand(name, mine):
    # of this group, and of a second one with twice these weights
    A, want, says = TRANSFORMED[name]
    w = torch.stack([W, W * 2])
    mask = torch.stack([ALIVE, ALIVE])
    got = transform_weights(w, tensor([A, A]), mask, mine or plain(name))
    want = torch.stack([tensor(want), tensor(want) * 2])
    check(got, want, says, A=tensor(A + A)[:, None], alive=mask, w=w)


def test_shrink_gives_0_where_a_clip_has_left_no_weight_ex20(mine):
    w = torch.zeros(1, 3, 2).double()
    got = transform_weights(w, A3, torch.ones(1, 3, 2).bool(), mine)
    check(got, w, "0 · min / mean is 0 / 0")


SHARED = {  # the completions of a group; where all agree up to and including that token
    "a fork of two": (["7+5=", "7+5.", "7+93"], [1, 1, 0, 0]),
    "a third token by chance": (["7+5=", "7+5.", "7+53"], [1, 1, 1, 0]),
    "agrees again after it has branched": (["17+5", "27+5", "17+5"], [0, 0, 0, 0]),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_tokens_by_hand_ex14(name):
    texts, want = SHARED[name]
    group = torch.tensor([encode(text) for text in texts])
    got = tokrl.shared_tokens(torch.stack([group, group * 0]))  # another group, all the same
    check(got, torch.tensor([want, [1] * 4]).bool(), f"{texts}, and a group of three times ____")


# ---- 7. The loss
def test_policy_loss_and_net_push_by_hand():
    # −½ [1 · ½ · (−1) + 1 · ½ · (−3) + (−1) · ¼ · (−2)] = −½ (−½ − 1.5 + ½) = 0.75
    logprobs = tensor([[[-1.0, -3.0], [-2.0, -7.0]]]).requires_grad_()
    w = tensor([[[0.5, 0.5], [0.25, 0.0]]]).requires_grad_()
    A = tensor([[1.0, -1.0]]).requires_grad_()  # as from a reward model that is being trained
    loss = policy_loss(logprobs, w, A)
    loss.backward()
    check(loss, tensor(0.75))
    check(logprobs.grad, tensor([[[-0.25, -0.25], [0.125, 0.0]]]), "gradient: −Â w / BG", w=w)
    assert (w.grad, A.grad) == (None, None), "through the log-probabilities alone"
    # |1 · ½ − 1 · ¼| / 2, |1 · ½ − 0| / 2
    check(net_push(w, A), tensor([[0.125, 0.25]]), w=w)


@pytest.mark.parametrize("loss", tokrl.LOSSES)
def test_weights_have_no_gradient(loss):
    logprobs = (OLD + RATIO.log()).requires_grad_()
    assert not effective_weights(loss, logprobs, logprobs, ADVANTAGES, MASK).requires_grad


@pytest.mark.parametrize("name", ["off", "min_ex12", "orth_ex13"])
def test_no_advantage_adds_0_even_at_an_infinite_ratio(name, mine):
    # inf · 0 is nan; what the others add, −(±1) · 2 / 3, stays as it is
    logprobs = torch.zeros(1, 3, 1).double().requires_grad_()
    A = tensor([[0.0, 1.0, -1.0]])
    w = tensor([[[INF], [2.0], [2.0]]])
    w = transform_weights(w, A, w > 0, mine or plain(name))
    policy_loss(logprobs, w, A).backward()
    check(logprobs.grad, tensor([[[0.0], [-2 / 3], [2 / 3]]]), f"gradient, of w = {w.tolist()}")
    check(net_push(w, A), tensor([[0]]))


def test_min_orth_and_no_weights_where_all_agree_give_the_parameters_one_gradient():
    # A shared token is one log-probability of the network: where its pushes cancel nothing is left
    # of them, whatever each of them was.
    policy = random_policy(1)
    texts = tokrl.completion_tokens(["7+1", "7+22", "7+3"], 5)[None]
    inputs = (tokrl.prompt_tokens(["75="]), texts)
    mask = tokrl.completion_mask(texts)
    logprobs = tokrl.token_logprobs(policy, *inputs)
    old = tokrl.token_logprobs(random_policy(2), *inputs)
    off = effective_weights("seq", logprobs, old, A3, mask)
    gradients = {}
    for kind in ("off", "min", "orth", "none"):
        w = off * 0 if kind == "none" else transform_weights(off, A3, mask, kind)
        w[..., 2:] = off[..., 2:]  # all agree on "7+"
        policy.zero_grad()
        policy_loss(logprobs, w, A3).backward(retain_graph=True)
        gradients[kind] = torch.cat([p.grad.flatten() for p in policy.parameters()])
    left_over = (gradients["off"] - gradients["none"]).abs().max().item()
    assert left_over > 1e-3, "seq does not cancel"
    check(gradients["min"], gradients["none"], "min")
    check(gradients["orth"], gradients["none"], "orth")


def test_section4_two_trajectories():
    # Â = −A and A, A = 3; a shared token of ratio ρ = 2; the other tokens' ratios multiply to
    # u_1 = ½ and u_2 = 4. The gradient at the shared log-probability x, of −loss:
    #   factorized  ½ (−A ρ + A ρ) = 0
    #   seq         ½ (−A ρ u_1 + A ρ u_2) = A ρ (u_2 − u_1) / 2 = 3 · 2 · 3.5 / 2 = 10.5
    A = tensor([[-3.0, 3.0]])
    mask = torch.ones(1, 2, 2).bool()
    for loss, clip_eps, want in [("dr_grpo", INF, 0.0), ("prefix", None, 0.0), ("seq", None, 10.5)]:
        x = tensor(2.0).log().requires_grad_()
        logprobs = torch.stack([x.expand(2), tensor([0.5, 4.0]).log()], -1)[None]  # (1,2,2)
        w = effective_weights(loss, logprobs, logprobs * 0, A, mask, clip_eps, max_length=1)
        policy_loss(logprobs, w, A).backward()
        check(-x.grad, tensor(want), loss)


def one_step(tokens, weights, advantages, eta):
    """log p before and after a step on the logits of p = (.6, .3, .1); one-token completions."""
    logits = tensor([0.6, 0.3, 0.1]).log().requires_grad_()
    before = logits.log_softmax(-1)
    logprobs = before[tokens][None, :, None]  # (1,G,1)
    policy_loss(logprobs, tensor(weights)[None, :, None], tensor([advantages])).backward()
    after = (logits - eta * logits.grad).log_softmax(-1)
    return before.detach(), after.detach()


def test_prop31_what_does_not_cancel_moves_the_policy():
    # Two trajectories share output a, with Â = −1 and 1 and weights 1 and 3: (−1 + 3) / 2 = 1 is
    # left, so g = e_a − p = (.4, −.3, −.1).
    # gᵀFg = Σ p g² − (Σ p g)² = .6 · .16 + .3 · .09 + .1 · .01 − (.24 − .09 − .01)²
    #      = .124 − .0196 = .1044, so KL = ½ η² · .1044
    eta = 1e-4
    before, after = one_step([0, 0], [1.0, 3.0], [-1.0, 1.0], eta)
    kl = (after.exp() * (after - before)).sum()
    check(kl / (0.5 * eta**2), tensor(0.1044), "KL / (½ η²)", atol=1e-4)
    # with equal weights nothing is left, and nothing moves
    before, after = one_step([0, 0], [2.0, 2.0], [-1.0, 1.0], eta)
    check(after, before)


def test_cor32_equal_weights_move_the_log_odds_all_the_same():
    # Outputs a and b, both with weight ½ and Â = 2, a mean over 2: the logits move by
    # η ½ [(e_a − p) + (e_b − p)], the log-odds of a and b by
    # η ½ [(1 − 1.2) − (1 − .6)] = −0.3 η: not 0, although the weights are equal
    for eta in (0.01, 1.0):
        before, after = one_step([0, 1], [0.5, 0.5], [2.0, 2.0], eta)
        moved = (after - before)[0] - (after - before)[1]
        check(moved, tensor(-0.3 * eta))


COR33 = {  # loss, ratios of two tokens of three trajectories, |Σ Â w| / 3 with Â = (1, 1, −2)
    "does not cancel": ("seq", [[1, 2], [1, 3], [1, 4]], 1, "|2 + 3 − 2 · 4| / 3"),
    "first inner step": ("seq", [[1, 1], [1, 1], [1, 1]], 0, "1 + 1 − 2"),
    "unequal weights by accident": ("seq", [[1, 1], [1, 3], [1, 2]], 0, "1 + 3 − 2 · 2"),
    "a fully clipped group": ("gspo", [[1, 4], [4, 1], [1, 0.25]], 0, "s = 2, 2, ½; all clipped"),
}


@pytest.mark.parametrize("name", COR33)
def test_cor33_sequence_weights_do_not_cancel_but_for_special_cases(name):
    loss, ratios, want, says = COR33[name]
    log_r = tensor([ratios]).log()
    w = effective_weights(loss, log_r, log_r * 0, A3, log_r < INF, max_length=1)
    check(net_push(w, A3), tensor([[want, want]]), says)


def test_a_mask_of_floats_is_refused():
    x = torch.zeros(1, 2, 3)
    with pytest.raises(AssertionError):
        effective_weights("seq", x, x, x[..., 0], x)


# ---- 9. Collect and update
def test_collect_draws_samples_and_rewards_as_configured(monkeypatch):
    monkeypatch.setattr(Task, "reward", lambda self, prompt, text: int(prompt[0]) + 10 * len(text))
    config = Config(task="chain", fork=3, group_size=5, prompts=200)
    inputs = (Policy(generator(0, "test")), TASKS["chain"], config, generator(0, "sampling"))
    prompts, tokens, rewards = tokrl.collect(*inputs)
    assert tokens.shape == (200, 5, 7)
    agree = (tokens == tokens[:, :1]).all(1).float().mean(0)  # (T)
    assert agree[2] == 1 and agree[3] < 0.7
    texts = [decode(row) for row in prompts]
    assert 65 < len(set(texts)) < 84  # 84 (1 − e^(−200/84)) = 76
    for text, rows, got in zip(texts, tokens, rewards, strict=True):
        assert got.tolist() == [int(text[0]) + 10 * len(decode(row)) for row in rows]
    assert tokrl.collect(*inputs)[0].tolist() != prompts.tolist(), "others, the next time"


# Copies, unequal lengths, a sampled PAD; nobody reaches the eighth place. The first group shares
# four tokens, the second one.
FIRST = ["7+5=1", "7+5=1", "7+5=_2", "7+5=", "7+5=9", "7+5=1"]
SECOND = ["3", "3+1=", "3", "3", "31==4", "3+4="]
PROMPT_TOKENS = tokrl.prompt_tokens(["75=", "31="])
TOKENS = tokrl.completion_tokens(FIRST + SECOND, 8).unflatten(0, (2, 6))
REWARDS = tensor([[1, 1, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0]])
ROLLOUT = (PROMPT_TOKENS, TOKENS, REWARDS)


def update_by_hand(policy, reference, config):
    """tokrl.update of parts that are checked above, with all eight places."""
    adam = torch.optim.AdamW(policy.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=0)
    mask = tokrl.completion_mask(TOKENS)
    credited = {"keep": REWARDS, "share": tokrl.share_reward(TOKENS, REWARDS)}[config.duplicates]
    A = tokrl.group_advantages(credited)
    shared = tokrl.shared_tokens(TOKENS)[:, None]
    acts = {"all": shared | True, "shared": shared, "rest": ~shared}[config.at]
    anchor = tokrl.completion_logprobs(reference, PROMPT_TOKENS, TOKENS).detach()
    old = tokrl.token_logprobs(policy, PROMPT_TOKENS, TOKENS).detach()
    total_push = 0.0
    for _ in range(config.inner_steps):
        every = tokrl.completion_logprobs(policy, PROMPT_TOKENS, TOKENS)
        log_p = tokrl.pick(every, TOKENS)
        w = effective_weights(config.loss, log_p, old, A, mask, config.clip_eps)
        w = torch.where(acts, transform_weights(w, A, mask, config.transform), w)
        terms = (every.exp() * (every - anchor)).sum(-1)
        kl = sum(terms[b, i][mask[b, i]].mean() / 12 for b in range(2) for i in range(6))
        adam.zero_grad()
        (policy_loss(log_p, w, A) + config.kl * kl).backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        assert norm > config.max_grad_norm, "the limit on the norm bites"
        adam.step()
        total_push += net_push(w, A)[:, : config.fork].mean()
    return total_push


UPDATES = {
    "seq min at shared": Config(transform="min", at="shared"),
    "seq orth at rest": Config(transform="orth", at="rest"),
    "prefix, all forked": Config(task="late", loss="prefix", fork=8),
    "cispo share, fork 0": Config(loss="cispo", duplicates="share", fork=0),
    "gspo min, wide clip": Config(loss="gspo", transform="min", clip_eps=0.3, kl=0.7),
}


@pytest.mark.parametrize("name", UPDATES)
def test_update_is_the_same_thing_written_out(name):
    config = replace(UPDATES[name], inner_steps=4, lr=3e-3, max_grad_norm=0.01)
    policy = random_policy(1)
    by_hand = random_policy(1)
    reference = random_policy(2)
    want = update_by_hand(by_hand, reference, config)
    push = tokrl.update(policy, reference, tokrl.adamw(policy, config.lr), config, *ROLLOUT)
    check(tensor(push), want, "net push", atol=1e-6)
    check(parameters(policy), parameters(by_hand), "parameters", atol=1e-7)


def test_update_stops_before_the_optimizer_where_the_gradient_is_not_finite():
    policy = random_policy(1)
    policy.head.weight.register_hook(lambda gradient: gradient * INF)
    with pytest.raises(FloatingPointError, match="gradient norm (inf|nan) at inner step 1$"):
        tokrl.update(policy, random_policy(2), tokrl.adamw(policy, 1e-3), Config(), *ROLLOUT)
    check(parameters(policy), parameters(random_policy(1)))


# ---- 10. Measures, against sums written out
def some_of_commute(solutions: dict) -> Task:
    """The task with these prompts only, and so many of their solutions."""
    table = {prompt: TASKS["commute"].table[prompt][:n] for prompt, n in solutions.items()}
    return replace(TASKS["commute"], name="some of commute", table=table)


MIXED = some_of_commute({"75=": 2, "41=": 1})


@pytest.mark.parametrize("task", [*TASKS.values(), MIXED], ids=lambda task: task.name)
def test_evaluate_by_brute_force_ex17(task):
    policy = random_policy(3)
    start = random_policy(4)
    rows = []
    for prompt in task.prompts():
        right = task.solutions(prompt)
        now = torch.stack([read(policy, prompt, y).sum() for y in right])
        moved = now - torch.stack([read(start, prompt, y).sum() for y in right])
        accuracy = now.exp().sum()
        q = now.exp() / accuracy
        entropy = -(q * q.log()).sum() / math.log(len(right))  # 0 / 0 where there is one alone,
        drift = torch.combinations(moved).diff().abs().mean()  # and a mean of no pairs: nan
        rows.append(torch.stack([accuracy, entropy, drift]))
    wants = torch.stack(rows).detach().nanmean(0)
    got = tokrl.evaluate(policy, task, start)
    for name, want in zip(["accuracy", "solution_entropy", "solution_drift"], wants, strict=True):
        check(tensor(float(got[name])), want, f"{name} of task {task.name}", atol=1e-7 * want)


def test_answers_show_three_prompts_from_start_to_now(monkeypatch):
    task = replace(TASKS["commute"], table={prompt: ("w", "x", "y", "z") for prompt in "abcdefg"})
    start = tensor([[0.1, 0.1, 0.1, 0.1]])
    now = tensor([[0.1, 0.2, 0.05, 0.4]])
    monkeypatch.setattr(tokrl, "solution_logprobs", lambda p, _: p.log().expand(7, 4))
    line = "  z  10% →  40%   x  10% →  20%   w  10% →  10%   wrong  60% →  25%"
    assert tokrl.answers(now, start, task).split("\n") == [prompt + line for prompt in "adg"]


# ---- 11. Train
TINY = Config(prompts=2, group_size=3, inner_steps=2, steps=1, lr=1e-3)


@pytest.fixture
def quick(monkeypatch):
    """Runs start untrained, know three prompts, and any completion with a 1 in it is right."""
    task = some_of_commute({"75=": 2, "41=": 2, "96=": 2})
    start = Policy(generator(0, "start")).requires_grad_(False)
    monkeypatch.setitem(TASKS, "commute", task)
    monkeypatch.setattr(tokrl, "warm_start", lambda task, seed: start)
    monkeypatch.setattr(Task, "reward", lambda self, prompt, text: float("1" in text))
    return task, start


@pytest.mark.parametrize("steps", [3, 81])
@pytest.mark.parametrize("fork", [0, 1])
def test_train_adds_up_net_push_and_averages_the_last_quarter(fork, steps, quick, monkeypatch):
    # each rollout leaves a net push of ½ (undefined where nothing is forked)
    monkeypatch.setattr(tokrl, "update", lambda *_: 0.5)
    monkeypatch.setattr(tokrl, "evaluate", lambda *_: {"accuracy": 1 / 3})
    run = tokrl.train(replace(TINY, fork=fork, steps=steps), 0)
    at = [0, 1, 2, 3] if steps == 3 else [*range(0, 81, 2), 81]
    mean = 3 if steps == 3 else (62 + 64 + 66 + 68 + 70 + 72 + 74 + 76 + 78 + 80 + 81) / 11
    push = 0.5 if fork else NAN
    assert run["curves"]["step"] == at
    assert run["curves"]["accuracy"] == [0.333333] * len(at), "6 digits are kept"
    check(tensor(run["curves"]["net_push"]), tensor([push * step for step in at]))
    final = [run["final"][name] for name in ("step", "net_push")]
    check(tensor(final), tensor([mean, push * mean]))


def test_train_twice_gives_the_same_bits_and_leaves_the_start_alone(quick):
    task, start = quick
    first = tokrl.train(TINY, 3)
    second = tokrl.train(TINY, 3)
    policy = first["policy"]
    check(parameters(second["policy"]), parameters(policy), atol=0)
    check(parameters(start), parameters(Policy(generator(0, "start"))), atol=0)
    assert first == second | {"policy": policy}
    assert first["curves"]["solution_drift"][0] == 0 < first["curves"]["solution_drift"][-1]
    assert first["answers"] == tokrl.answers(policy, start, task)
    assert (first["config"], first["seed"]) == (asdict(TINY), 3)


def test_train_stops_where_the_last_inner_step_has_broken_the_policy(quick):
    # of 81 rollouts every second is evaluated: that the first has failed must be seen before
    with pytest.raises(FloatingPointError, match="not finite after rollout 1$"):
        tokrl.train(replace(TINY, inner_steps=1, lr=INF, steps=81), 0)


GOLDEN = {  # the means of net push, drift, entropy and accuracy; accuracy and entropy of the start
    "off": [2.32437, 2.19203, 0.543977, 0.451588, 0.257292, 0.972559],
    "min": [0.0, 0.808869, 0.837251, 0.423585, 0.257292, 0.972559],
}


@pytest.mark.slow
@pytest.mark.parametrize("transform", GOLDEN)
def test_train_ends_where_it_ended_when_recorded(transform):
    # a start that differed by rounding ended within 1e-4 of these: 5e-3 leaves ample room
    run = tokrl.train(Config(steps=20, transform=transform), 100)
    got = [run["final"][name] for name in tokrl.MEASURES]
    got += [run["curves"][name][0] for name in ("accuracy", "solution_entropy")]
    check(tensor(got), tensor(GOLDEN[transform]), atol=5e-3)
    assert not tokrl.warm_start(TASKS["commute"], 100).head.weight.requires_grad, "frozen"


# ---- 12. A finished run is its file
def test_run_path_depends_on_configuration_seed_code_and_torch(tmp_path, monkeypatch):
    off = Config()
    on = Config(transform="min")
    configs = [off, on, replace(off, kl=0.1), replace(on, at="rest")]
    paths = {tokrl.run_path(tmp_path, config, seed) for config in configs for seed in (0, 1)}
    assert tokrl.run_path(tmp_path, Config(fork=2, at="rest"), 0) in paths, "2, and off: no other"
    for module, name in [(tokrl, "CODE"), (torch, "__version__")]:
        monkeypatch.setattr(module, name, "another")
        paths.add(tokrl.run_path(tmp_path, off, 0))
    assert len(paths) == 4 * 2 + 2


def test_save_run_writes_plain_json_without_the_policy(tmp_path):
    run = {"config": {"kl": INF}, "net_push": [NAN, 0.5], "policy": Policy()}
    tokrl.save_run(tmp_path / "a.json", run)
    want = '{"config": {"kl": "inf"}, "net_push": [null, 0.5]}\n'
    assert (tmp_path / "a.json").read_text() == want


# ---- 13. The program
def test_figure_is_named_for_the_options_that_differ_from_the_defaults():
    assert tokrl.options_of(asdict(Config(transform="min", at="shared"))) == ""
    assert tokrl.options_of(asdict(Config(task="add"))) == "--task add"
    other = asdict(Config(fork=0, max_grad_norm=0.5))
    assert tokrl.options_of(other) == "--fork 0 --max-grad-norm 0.5"


def test_program_names_the_packages_of_requirements_txt():
    packages = (HERE / "requirements.txt").read_text().split()
    line = "\n# dependencies = [" + ", ".join(f'"{package}"' for package in packages) + "]\n"
    assert line in (HERE / "tokrl.py").read_text(encoding="utf-8")


def test_program_refuses_wrong_options(capsys):
    lines = ["--loss ppo", "--group-size 1", "--seeds 3-1", "--seeds 3-", "--lr nan"]
    for line in [*lines, "--fork 8", "--clip-eps 0.1"]:
        with pytest.raises(SystemExit, match="2"):
            tokrl.main(line.split())
        assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_program_trains_min_where_on_is_asked_for(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(tokrl, "train_missing", lambda arms, seeds, out: asked.update(arms))
    tokrl.main(["--transform", "on", "--at", "shared", "--out", str(tmp_path)])
    assert asked == {"on at shared": Config(transform="min", at="shared")}


def test_program_goes_on_after_a_run_that_diverges(quick, monkeypatch, tmp_path, capsys):
    on = replace(TINY, lr=1e30)
    arms = {"off": TINY, "on": on, "orth": replace(TINY, kl=0.1)}
    monkeypatch.setattr(tokrl, "arms_of", lambda *_, **__: arms)
    fine = tokrl.run_path(tmp_path, on, 0)
    tokrl.save_run(fine, tokrl.train(TINY, 0))  # of "on", only seed 1 diverges
    assert tokrl.main(["--seeds", "0-1", "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "\noff, seed 0:\n75=  " in out and "\noff  " in out and "\north  " in out
    assert "on, seed 1: loss " in err and err.endswith("Not finished: on\n")
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == 2 * 2 + 1 + 1 and files[-1] == "failure-modes.png"


@pytest.mark.slow
def test_program_killed_and_started_again_trains_what_is_missing_to_the_same_bytes(tmp_path):
    # where no "→" can be printed, and the backend of the notebook that calls us is not installed
    settings = {"PYTHONIOENCODING": "ascii", "MPLBACKEND": "a notebook's"}
    options = {"cwd": HERE, "env": os.environ | settings, "stdout": subprocess.PIPE}
    line = ["--steps=40", "--prompts=2", "--out"]
    command = [sys.executable, "tokrl.py", *line, tmp_path / "killed"]
    with subprocess.Popen(command, **options) as process:
        while process.poll() is None and not list(tmp_path.glob("killed/*.json")):
            time.sleep(0.01)
        process.kill()
    assert len(list(tmp_path.glob("killed/*.json"))) == 1

    again = subprocess.run(command, check=True, **options)
    assert b"1 runs to train, 1 kept" in again.stdout and b"off, seed 0:" in again.stdout
    assert tokrl.main([*line, str(tmp_path / "whole")]) == 0
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("whole/*")}
    assert len(whole) == 2 + 1  # and the figure
    assert {path.name: path.read_bytes() for path in tmp_path.glob("killed/*")} == whole
