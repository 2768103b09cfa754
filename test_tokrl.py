"""Tests of tokrl.py and toy_tasks.py, in the order of their chapters.

    python -m pytest                    everything
    python -m pytest -m "not slow"      without what trains for more than a second
    python -m pytest -k orth            about one thing: orth, kl, credit, task, update ...

Most are worked by hand, with the arithmetic above the assert. Where that cannot be, something
independent judges: enumeration, or the same thing written out step by step.
"""

import ast
import contextlib
import copy
import functools
import itertools
import math
import random
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tokrl
from tokrl import (
    LOSSES,
    TRANSFORMS,
    Config,
    Policy,
    credit,
    effective_weights,
    group_advantages,
    named_generator,
    net_push,
    policy_loss,
    sample_groups,
    shared_tokens,
    transform_weights,
)
from toy_tasks import EOS, PAD, TASKS, VOCAB, Task, decode, encode

HERE = Path(__file__).resolve().parent
COMMUTE = TASKS["commute"]
INF = math.inf
NAN = math.nan
torch.set_num_threads(1)


def tensor(values):
    """In float64, where numbers made by hand are exact to 1e-12."""
    return torch.tensor(values, dtype=torch.float64)


def close(a, b, atol=1e-12):
    """Equal shapes, and equal numbers to `atol`."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=atol)


def same_parameters(a, b, atol=0.0):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(close(x, y, atol) for x, y in pairs)


def random_policy(seed: int = 0) -> Policy:
    """A policy in float64 that has learnt nothing."""
    return Policy(named_generator(seed, "test")).double()


def random_tokens(*shape):
    return torch.randint(len(VOCAB), shape, generator=named_generator(0, "tokens"))


def random_case(seed: int, b=3, g=5, t=6):
    """logprobs, old ones, advantages, ragged mask with a hole; ratios e^±0.3."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(b, g, t, dtype=torch.float64, generator=generator)
    logprobs = old + 0.3 * torch.randn(b, g, t, dtype=torch.float64, generator=generator)
    mask = torch.arange(t) < torch.randint(2, t + 1, (b, g, 1), generator=generator)
    mask[0, 0, 1] = False
    return logprobs, old, group_advantages(tensor([[1.0, 0, 1, 0, 0]] * b)), mask


def weigh(loss, kind, logprobs, old, A, mask, *clip):
    """Effective weights, transformed: the two steps that update takes."""
    w = effective_weights(loss, logprobs, old, A, mask, *clip)
    return transform_weights(w, A, mask, kind)


# ---- 1. Tasks, by enumeration
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_task_is_small_and_its_prompts_are_of_one_length(task):
    prompts = task.prompts()
    solutions = [s for prompt in prompts for s in task.solutions(prompt)]
    assert 1 < len(prompts) <= 150
    assert len(solutions) <= 400
    assert len({len(prompt) for prompt in prompts}) == 1
    assert task.max_completion > max(len(s) for s in solutions) + 1
    assert 0 <= task.fork < task.max_completion


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_task_rewards_its_solutions_and_nothing_next_to_them(task):
    for prompt in task.prompts():
        right = task.solutions(prompt)
        assert len(set(right)) == len(right) >= 1
        for s in right:
            others = [s, s + "_", s + "0", s[:-1], " " + s, "_" + s, s + "."]
            for i in range(len(s)):
                others += [s[:i] + character + s[i + 1 :] for character in VOCAB]
            for other in others:
                assert task.reward(prompt, other) == float(other in right)


def total(text: str) -> int:
    """'3+9' -> 12."""
    return sum(int(digit) for digit in text.split("+"))


PAIRS = [f"{a}+{b}" for a in "123456789" for b in "123456789"]
SUMS = PAIRS + [f"{pair}+{c}" for pair in PAIRS for c in "123456789"]


def right_by_arithmetic(name: str, prompt: str) -> set:
    """All right completions, looked for among all sums."""
    question = prompt.removesuffix("=")
    if name == "commute":
        return {f"{s}={total(s)}" for s in PAIRS if sorted(s) == sorted("+" + question)}
    if name == "split":
        return {s for s in SUMS if total(s) == int(question)}
    if name == "chain":  # one of the outer digits stays as it is
        pairs = [s for s in PAIRS if total(s) == total(question)]
        kept = [s for s in pairs if s[0] == question[0] or s[-1] == question[-1]]
        return {f"{s}={total(s)}" for s in kept}
    return {f"{total(question):02d}"}


PROMPTS = {"commute": 9 * 8, "split": 10, "chain": 84, "add": 10 * 10}


@pytest.mark.parametrize("name", PROMPTS)
def test_task_solutions_are_right_by_arithmetic(name):
    assert len(TASKS[name].prompts()) == PROMPTS[name]
    for prompt in TASKS[name].prompts():
        assert set(TASKS[name].solutions(prompt)) == right_by_arithmetic(name, prompt)


def test_task_text_is_encoded_by_character_and_decoded_to_the_first_eos():
    assert encode("7+5=12") == [VOCAB.index(character) for character in "7+5=12"]
    assert decode([2, PAD, 3, EOS, 4]) == "0_1"
    assert decode([2, 3]) == "01"
    assert decode([EOS]) == ""


def test_task_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="'x' is not in the vocabulary"):
        encode("7x")
    with pytest.raises(ValueError, match="'99=' is not a prompt"):
        COMMUTE.solutions("99=")


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_task_demonstrations_are_half_wrong_and_spread_evenly(task):
    rng = random.Random(0)
    prompt = task.prompts()[len(task.prompts()) // 2]
    counts = Counter(task.demonstration(prompt, rng) for _ in range(4000))
    right = [counts[s] for s in task.solutions(prompt)]
    mean = np.mean(right)
    assert abs(sum(right) - 2000) < 160  # 5 standard deviations
    assert all(abs(n - mean) < 5 * math.sqrt(mean) for n in right)


# ---- 2. The policy
def every_row(policy, tokens):
    """What Policy.forward computes, written out: (N,T) -> (N,T,V)."""
    x = policy.token(tokens) + policy.position.weight[: tokens.shape[1]]
    return policy.head(tokrl.norm(policy.blocks(x))).log_softmax(-1)


def every_logprob(policy, prompts, tokens):
    """Log-probabilities of every token at each place of the completions, copies too: (B,G,T,V)."""
    B, G, _ = tokens.shape
    rows = torch.cat([prompts[:, None].expand(B, G, -1), tokens], -1).flatten(0, 1)
    return every_row(policy, rows)[:, prompts.shape[1] - 1 : -1].unflatten(0, (B, G))


def test_policy_is_causal():
    policy = random_policy()
    tokens = random_tokens(3, 9)
    log_p = policy(tokens)
    assert close(log_p.exp().sum(-1), torch.ones(3, 9).double())
    for t in range(9):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % len(VOCAB)
        moved = (policy(changed) - log_p).abs().amax(-1) > 1e-12
        assert not moved[:, :t].any()
        assert moved[:, t:].all()


def test_policy_reads_copies_once_with_the_same_result():
    policy = random_policy()
    prompts = random_tokens(3, 4)
    tokens = random_tokens(3, 4, 5)
    tokens[:, 1] = tokens[:, 0]  # three copies
    tokens[1, 3, :4] = tokens[1, 0, :4]  # and one but for the last token, which is not read
    distinct, place = tokrl.distinct_rows(prompts, tokens)
    assert (len(distinct), place.shape) == (12 - 4, (3, 4))

    got = tokrl.completion_logprobs(policy, distinct, place, 5)
    assert close(got, every_logprob(policy, prompts, tokens))


# ---- 3. Sampling, and what a group shares
@pytest.mark.parametrize("fork", [0, 1, 3, 7])
def test_sampled_group_shares_its_fork_and_branches_after_it(fork):
    policy = Policy(named_generator(1, "test"))
    generator = named_generator(0, "sampling")
    tokens = sample_groups(policy, random_tokens(40, 3), 5, fork, 8, generator)
    assert tokens.shape == (40, 5, 8)
    agree = (tokens == tokens[:, :1]).all(dim=1)  # (B,T)
    mask = tokrl.completion_mask(tokens)
    alive = mask[:, :, fork].all(dim=1)  # groups that have not ended within the opening
    assert agree[:, :fork].all()
    assert alive.any()
    assert agree[alive, fork].float().mean() < 0.5, "after the fork each its own"
    assert len({tuple(row) for row in tokens[:, 0].tolist()}) > 20, "prompts do not share"
    assert (tokens[~mask] == PAD).all()
    assert (tokens[mask] == PAD).any(), "a sampled PAD is scored"


def test_sampling_mask_by_hand():
    # a PAD before the first EOS is scored, a second EOS is not; without EOS all is scored
    rows = torch.tensor([[PAD, 3, EOS, 5, EOS], [EOS, 2, 2, 2, 2], [3, PAD, 3, 3, PAD]])
    want = [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert tokrl.completion_mask(rows[None]).int().tolist() == [want]


@pytest.mark.parametrize("fork", [0, 1])
def test_samples_follow_the_enumerated_distribution(fork):
    policy = Policy(named_generator(2, "test"))
    prompt = torch.tensor([encode("7.=")])  # an EOS in the prompt ends nothing
    pairs = torch.cartesian_prod(torch.arange(14), torch.arange(14))[None]  # 14² outcomes
    p = tokrl.token_logprobs(policy, prompt, pairs).sum(-1).exp()[0]
    p[pairs[0, :, 0] == EOS] = 0.0  # one outcome more: ended at once
    expected = torch.cat([p, (1 - p.sum())[None]]).detach().numpy() * 20_000

    prompts = prompt.expand(20_000, 3)
    tokens = sample_groups(policy, prompts, 2, fork, 2, named_generator(fork, "sampling"))
    first = tokens[:, -1, 0]
    second = tokens[:, -1, 1]
    outcomes = torch.where(first == EOS, 196, first * 14 + second)
    counts = torch.bincount(outcomes, minlength=197).numpy()
    big = expected > 5
    chi2 = ((counts[big] - expected[big]) ** 2 / expected[big]).sum()
    assert chi2 < big.sum() + 5 * math.sqrt(2 * big.sum())


SHARED = {  # the completions of a group; at which tokens all agree up to and including that token
    "a fork of two": (["7+5=", "7+1.", "7+93"], [1, 1, 0, 0]),
    "a third token by chance": (["7+5=", "7+5.", "7+53"], [1, 1, 1, 0]),
    "nothing": (["12", "22", "12"], [0, 0]),
    "copies": (["7+5.", "7+5.", "7+5."], [1, 1, 1, 1]),
    "agrees again after it has branched": (["7+5=1", "7+2=1", "7+2=1"], [1, 1, 0, 0, 0]),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_tokens_by_hand(name):
    texts, want = SHARED[name]
    group = torch.tensor([encode(text) for text in texts])
    got = shared_tokens(torch.stack([group, group * 0]))  # another group changes nothing
    assert got.dtype == torch.bool
    assert got.int().tolist() == [want, [1] * len(want)]


# ---- 4. Advantages and duplicates, by hand
def test_group_advantages_by_hand():
    # 1 0 0 1: mean 1/2, std with G − 1: sqrt(4 · 1/4 / 3) = sqrt(1/3). 1 0 0 0: mean 1/4, std 1/2
    rewards = tensor([[1, 0, 0, 1], [1, 0, 0, 0]])
    got = group_advantages(rewards)
    assert close(got[0], tensor([1, -1, -1, 1]) * 0.5 / (math.sqrt(1 / 3) + 1e-4))
    assert close(got[1], tensor([0.75, -0.25, -0.25, -0.25]) / 0.5001)
    plain = group_advantages(rewards, normalize=False)
    assert torch.equal(plain[1], tensor([0.75, -0.25, -0.25, -0.25]))


@pytest.mark.parametrize("value, size", [(1.0, 4), (0.3, 4), (0.1, 7), (1.0, 1)])
def test_group_advantages_of_equal_rewards_are_exactly_0_not_dust(value, size):
    rewards = torch.full((1, size), value)
    assert (group_advantages(rewards) == 0).all()
    assert (group_advantages(rewards, normalize=False) == 0).all()
    counted = torch.arange(size + 1)[None] > 0
    assert (group_advantages(torch.full((1, size + 1), value), True, counted) == 0).all()


def test_group_advantages_of_those_counted_by_hand():
    # of 1 0 . 1 mean 2/3, std sqrt((1/9 + 4/9 + 1/9) / 2) = sqrt(1/3); of 1 . 0 . std sqrt(1/2)
    rewards = tensor([[1, 0, 5, 1], [1, 5, 0, 5], [5, 1, 0, 1], [1, 0, 1, 0], [1, 0, 0, 1]])
    rows = [[1, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
    got = group_advantages(rewards, counted=torch.tensor(rows).bool())
    assert close(got[0], tensor([1, -2, 0, 1]) / 3 / (math.sqrt(1 / 3) + 1e-4))
    assert close(got[1], tensor([1, 0, -1, 0]) / 2 / (math.sqrt(0.5) + 1e-4))
    assert (got[2:] == 0).all(), "equal among the counted, one alone, nobody: 0"


@pytest.mark.parametrize("excluded", [NAN, INF, -INF, 1e38])
def test_group_advantages_do_not_see_an_excluded_reward(excluded):
    # of 1 0 . 1 mean 2/3, std sqrt(1/3), as above
    rewards = tensor([[1, 0, excluded, 1]])
    counted = torch.tensor([[1, 1, 0, 1]])
    want = tensor([[1, -2, 0, 1]]) / 3
    assert close(group_advantages(rewards, False, counted), want)
    assert close(group_advantages(rewards, True, counted), want / (math.sqrt(1 / 3) + 1e-4))


LOW_PRECISION = {  # dtype, rewards, and their differences from the mean
    "squares overflow": (torch.float16, [0, 300, 0, 300], [-150, 150, -150, 150]),
    "sum overflows": (torch.float16, [10000, 10008] * 4, [-4, 4] * 4),
    "mean rounded": (torch.bfloat16, [1, 1, 1, 1 + 1 / 128], [-1 / 512] * 3 + [3 / 512]),
    "float32 overflows": (torch.float32, [0, 5e19, 1e20], [-5e19, 0, 5e19]),
}


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_group_advantages_are_computed_in_float32_at_least(name):
    dtype, rewards, differences = LOW_PRECISION[name]
    got = group_advantages(torch.tensor([rewards], dtype=dtype))
    # ±sqrt(3/4) = ±.866, ±sqrt(7/8) = ±.935, −.488 and 1.463 (the 1e-4 counts), ±1 and 0
    want = np.array(differences) / (np.std(differences, ddof=1) + 1e-4)
    assert got.dtype == torch.float32
    assert got[0].tolist() == pytest.approx(want, rel=1e-5)


CREDIT = {  # of a completion, its copy and two others, rewards 1 1 0 1
    # mean 3/4, std 1/2 = sqrt((3/16 + 9/16) / 3)
    "keep": tensor([0.25, 0.25, -0.75, 0.25]) / 0.5001,
    # 1 . 0 1: mean 2/3, std sqrt(1/3)
    "once": tensor([1, 0, -2, 1]) / 3 / (math.sqrt(1 / 3) + 1e-4),
    # 1/2 1/2 0 1: mean 1/2, std sqrt((1/4 + 1/4) / 3)
    "share": tensor([0, 0, -0.5, 0.5]) / (math.sqrt(1 / 6) + 1e-4),
}
COPY = [[5, 2, 1], [5, 2, 1], [6, 2, 1], [5, 3, 1]]


@pytest.mark.parametrize("kind", CREDIT)
def test_credit_by_hand(kind):
    # the second group has the same completions, each once: it does not see the first
    tokens = torch.tensor([COPY, [[7, 7, 1], *COPY[1:]]])
    rewards = tensor([[1, 1, 0, 1], [0, 0, 1, 0]])
    got, counted = credit(tokens, rewards, kind)
    assert close(got[0], CREDIT[kind])
    assert close(got[1:], group_advantages(rewards[1:]))
    assert counted.tolist() == [[True, kind != "once", True, True], [True] * 4]


@pytest.mark.parametrize("reward", [NAN, INF, -INF])
def test_credit_once_does_not_see_the_reward_of_a_later_copy(reward):
    got, _ = credit(torch.tensor([COPY]), tensor([[1, reward, 0, 1]]), "once")
    assert close(got[0], CREDIT["once"])


# ---- 5. Effective weights, by hand
# Two groups of two, lengths 2 3 | 1 3, one with a hole; ratios below, inside and above 1 ± 0.2
MASK = torch.tensor([[[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [0, 1, 1]]])
RATIO = tensor([[[1.5, 0.5, 9.0], [1.5, 1.1, 0.5]], [[0.7, 9.0, 9.0], [9.0, 1.3, 0.9]]])
ADVANTAGES = tensor([[1.0, -1.0], [-2.0, 2.0]])
OLD = tensor([[[-1.0, -2.0, -3.0], [-0.5, -0.1, -4.0]], [[-1.5, -0.3, -0.2], [-0.7, -2.5, -0.9]]])
N = tensor([[[2], [3]], [[1], [2]]])  # L = 3, BG / M = 4 / 8
# the clip drops ratios above 1.2 where Â > 0, below 0.8 where Â < 0
CLIPPED = tensor([[[0, 0.5, 0], [1.5, 1.1, 0]], [[0, 0, 0], [0, 0, 0.9]]])
# gspo: sqrt(1.5 · 0.5) = 0.866 kept (Â > 0); cbrt(1.5 · 1.1 · 0.5) = 0.938 dropped at 1 − 0.04
# (Â < 0); 0.7 dropped (Â < 0); sqrt(1.3 · 0.9) = 1.082 dropped at 1 + 0.04 (Â > 0)
# seq: 1.5 · 0.5 = 0.75, 1.5 · 1.1 · 0.5 = 0.825, 0.7, 1.3 · 0.9 = 1.17; prefix: the same, so far
BY_HAND = {
    "reinforce": MASK / tensor(3.0),
    "grpo": CLIPPED / N,
    "dr_grpo": CLIPPED / 3,
    "dapo": CLIPPED / 2,
    "grpo_sym": tensor([[[0, 0, 0], [0, 1.1, 0]], [[0, 0, 0], [0, 0, 0.9]]]) / 3,
    "cispo": tensor([[[1.2, 0.5, 0], [1.2, 1.1, 0.5]], [[0.7, 0, 0], [0, 1.2, 0.9]]]) / 2,
    "gspo": tensor([[[1, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]) * math.sqrt(0.75) / 2,
    "seq": tensor([[[0.75], [0.825]], [[0.7], [1.17]]]) * MASK / 3,
    "prefix": tensor([[[1.5, 0.75, 0], [1.5, 1.65, 0.825]], [[0.7, 0, 0], [0, 1.3, 1.17]]]) / 3,
}


def weights(loss, **options):
    return effective_weights(loss, OLD + RATIO.log(), OLD, ADVANTAGES, MASK, **options)


@pytest.mark.parametrize("off_mask", [0.0, NAN, -INF])
@pytest.mark.parametrize("loss", BY_HAND)
def test_weights_by_hand(loss, off_mask):
    new = (OLD + RATIO.log()).masked_fill(MASK == 0, off_mask)
    old = OLD.masked_fill(MASK == 0, off_mask)
    for mask in (MASK, MASK.bool(), MASK.double()):
        got = effective_weights(loss, new, old, ADVANTAGES, mask)
        assert close(got, BY_HAND[loss]), f"want {BY_HAND[loss].tolist()}"
        assert (got[MASK == 0] == 0).all()


def test_weights_of_prefix_by_hand_step_over_a_hole():
    # L = 3, ratios 1.5 . 0.5 and 2 0.25 3: 1.5, none, 1.5 · 0.5; 2, 2 · 0.25, 2 · 0.25 · 3
    log_r = tensor([[[1.5, 9.0, 0.5], [2.0, 0.25, 3.0]]]).log()
    mask = torch.tensor([[[1, 0, 1], [1, 1, 1]]])
    w = effective_weights("prefix", log_r, log_r * 0, tensor([[1.0, -1.0]]), mask)
    assert close(w, tensor([[[1.5, 0, 0.75], [2.0, 0.5, 1.5]]]) / 3)


@pytest.mark.parametrize("loss, cancels", [("prefix", True), ("seq", False)])
def test_weights_of_prefix_cancel_at_shared_tokens_and_those_of_seq_do_not(loss, cancels):
    logprobs, old, A, _ = random_case(0)
    for x in (logprobs, old):
        x[..., :2] = x[:, :1, :2]  # the first two tokens are shared: one number for the group
    push = net_push(effective_weights(loss, logprobs, old, A, torch.ones(3, 5, 6)), A)
    assert (push[:, :2] < 1e-12).all() == cancels
    assert (push[:, 2:] > 1e-3).all()


def test_weights_with_another_clip_by_hand():
    # (low, high) = (0.2, 0.6): 1.5 and 1.3 with Â > 0 are now kept; 0.5 and 0.7 with Â < 0 are not
    up = tensor([[[1.5, 0.5, 0], [1.5, 1.1, 0]], [[0, 0, 0], [0, 1.3, 0.9]]]) / 3
    assert close(weights("dr_grpo", clip_eps=(0.2, 0.6)), up)
    blind = tensor([[[1.5, 0, 0], [1.5, 1.1, 0]], [[0, 0, 0], [0, 1.3, 0.9]]]) / 3
    assert close(weights("grpo_sym", clip_eps=[0.2, 0.6]), blind)
    assert close(weights("cispo", clip_eps=(0.2, 7.9)), RATIO * MASK / 2)
    # gspo: 0.938 and 1.082 are inside 1 ± 0.1; 0.7 is not
    s = tensor([[[0.75 ** (1 / 2)], [0.825 ** (1 / 3)]], [[0.0], [1.17 ** (1 / 2)]]])
    assert close(weights("gspo", clip_eps=0.1), s / N * MASK)


@pytest.mark.parametrize("loss", BY_HAND)
def test_weights_without_a_clip_or_with_another_max_length(loss):
    # no weight is dropped; L = 1 in place of 3, where the loss has such a constant
    unclipped = weights(loss, clip_eps=INF)
    assert (unclipped[MASK == 1] > 0).all()
    scale = 3 if loss in ("reinforce", "dr_grpo", "grpo_sym", "seq", "prefix") else 1
    assert close(weights(loss, clip_eps=INF, max_length=1), unclipped * scale)


def test_weights_of_dapo_count_the_tokens_of_the_batch():
    one_token = torch.eye(12)[0].view(2, 2, 3)
    w = effective_weights("dapo", OLD, OLD, ADVANTAGES, one_token)
    assert w.sum() == 4, "BG / M = 4 / 1"


def test_clip_in_weights_asks_for_the_sign():
    # Â = ½, −½, 0 at ratios 0.5 and 1.5: dropped are (½, 1.5) and (−½, 0.5); with Â = 0 nothing is
    log_r = tensor([[[0.5, 1.5]] * 3]).log()
    A = tensor([[0.5, -0.5, 0.0]])
    w = effective_weights("dr_grpo", log_r, log_r * 0, A, torch.ones(1, 3, 2), max_length=1)
    assert close(w, tensor([[[0.5, 0.0], [0.0, 1.5], [0.5, 1.5]]]))


@pytest.mark.parametrize("ratio, sign", [(1.25, 1), (0.75, -1)])
@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "grpo_sym", "gspo"])
def test_clip_in_weights_keeps_its_boundaries(loss, ratio, sign):
    log_r = tensor([[[ratio], [1.0]]]).log()
    A = tensor([[sign, -sign]])
    for eps, kept in [(0.249, False), (0.25 + 1e-12, True)]:
        w = effective_weights(loss, log_r, log_r * 0, A, torch.ones(1, 2, 1), eps)
        assert (w[0, 0, 0] > 0) == kept


def test_clip_in_weights_of_gspo_acts_on_bfloat16():
    # 94 tokens of log-ratio 0 and six of −1/64: s = exp(−6 / 64 / 100) = 0.99906 < 1 − 3e-4
    old = torch.full((1, 2, 100), -2.0, dtype=torch.bfloat16)
    new = old.clone()
    new[0, 1, :6] = -2.015625
    A = torch.tensor([[1.0, -1.0]])
    w = effective_weights("gspo", new, old, A, torch.ones(1, 2, 100), (3e-4, 4e-4))
    assert (w[0, 1] == 0).all()
    assert close(w[0, 0], torch.full((100,), 0.01), 1e-8)


# ---- 6. Transforms, by hand
W = tensor([[[1.0, 4.0, 5.0, 6.0], [2.0, 3.0, 7.0, 8.0], [6.0, 2.0, 9.0, 9.0]]])
ALIVE = torch.tensor([[[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]]])  # all, two, one, nobody
A3 = tensor([[1.0, 1.0, -2.0]])
ALL = torch.ones(1, 3, 1)


def test_off_by_hand():
    assert torch.equal(transform_weights(W, A3, ALIVE, "off"), W * ALIVE)


def test_min_by_hand():
    # the least of the alive: min(1, 2, 6) = 1, min(4, 2) = 2, 7, nobody
    want = tensor([[[1.0, 2, 0, 0], [1, 0, 7, 0], [1, 2, 0, 0]]])
    assert torch.equal(transform_weights(W, A3, ALIVE, "min"), want)


def test_mean_by_hand():
    # of the alive: (1 + 2 + 6) / 3 = 3, (4 + 2) / 2 = 3, 7, nobody
    want = tensor([[[3.0, 3, 0, 0], [3, 0, 7, 0], [3, 3, 0, 0]]])
    assert close(transform_weights(W, A3, ALIVE, "mean"), want)


def test_shrink_by_hand():
    # min / mean is 1/3, 2/3 and 1: 1/3 of 1, 2, 6; 2/3 of 4, 2; 7
    want = tensor([[[1 / 3, 8 / 3, 0, 0], [2 / 3, 0, 7, 0], [2, 4 / 3, 0, 0]]])
    assert close(transform_weights(W, A3, ALIVE, "shrink"), want)


def test_orth_by_hand():
    # first place: Âᵀw = 1 + 2 − 12 = −9, ‖Â‖² = 6, w + 1.5 Â = (2.5, 3.5, 3)
    # second, over trajectories 1 and 3: Âᵀw = 4 − 4 = 0, unchanged; third: 7 − 7 = 0
    want = tensor([[[2.5, 4, 0, 0], [3.5, 0, 0, 0], [3, 2, 0, 0]]])
    assert close(transform_weights(W, A3, ALIVE, "orth"), want)
    # second place: Âᵀw = 8 − 2 = 6, ‖Â‖² = 5, w − 1.2 Â = (4 − 2.4, 2 + 1.2)
    w = transform_weights(W, tensor([[2.0, -1.0, -1.0]]), ALIVE, "orth")
    assert close(w[0, :, 1], tensor([1.6, 0.0, 3.2]))


def test_orth_without_advantages_returns_the_weights():
    # ‖Â‖ = 0, of all or of the alive only: w itself, never nan
    assert torch.equal(transform_weights(W, A3 * 0, ALIVE, "orth"), W * ALIVE)
    w = transform_weights(W, tensor([[0.0, 1.0, 0.0]]), ALIVE, "orth")
    assert w[0, :, 1].tolist() == [4, 0, 2]


@pytest.mark.parametrize("kind, want", [("min", 0.0), ("shrink", 0.0), ("mean", 2.0)])
def test_transforms_count_a_clipped_trajectory(kind, want):
    # weights 0, 1, 5: it is alive, so min and shrink silence its group, mean gives it weight again
    assert (transform_weights(tensor([[[0.0], [1.0], [5.0]]]), A3, ALL, kind) == want).all()


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transforms_see_neither_other_groups_nor_what_is_off_the_mask(kind):
    others = tensor([[[INF] * 4, [NAN] * 4, [1.0] * 4]])
    w = torch.cat([W, W * 0, others])
    mask = torch.cat([ALIVE, ALIVE, ALIVE * 0])
    got = transform_weights(w, torch.cat([A3, -A3, A3]), mask, kind)
    assert torch.equal(got[:1], transform_weights(W, A3, ALIVE, kind))
    assert (got[1:] == 0).all(), "all clipped, and off the mask"


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transforms_change_nothing_where_all_weights_are_equal(kind):
    assert close(transform_weights(ALL * 0.3, A3, ALL, kind).double(), tensor([[[0.3]] * 3]), 1e-7)


def test_min_reads_the_weight_of_a_trajectory_without_advantage():
    # Â = −1, 0, 1 at ratios 1.2, 0.5, 1.5: min is 0.5 for all three
    log_r = tensor([[[1.2], [0.5], [1.5]]]).log()
    w = weigh("seq", "min", log_r, log_r * 0, tensor([[-1.0, 0.0, 1.0]]), ALL)
    assert close(w, tensor([[[0.5]] * 3]))


def test_min_mean_and_orth_at_shared_tokens_give_the_parameters_one_gradient():
    # A shared token is one log-probability of the network: where its pushes cancel nothing is left
    # of them, whatever each of them was.
    policy = random_policy(1)
    sampler = random_policy(2)
    prompts = tokrl.prompt_tokens(["75=", "31="])
    tokens = sample_groups(sampler, prompts, 6, 2, 8, named_generator(0, "sampling"))
    mask = tokrl.completion_mask(tokens)
    A = group_advantages(tensor([[1, 0, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0]]))
    old = tokrl.token_logprobs(sampler, prompts, tokens).detach()
    of_logprobs = {}
    of_parameters = {}
    for kind in TRANSFORMS:
        logprobs = tokrl.token_logprobs(policy, prompts, tokens)
        logprobs.retain_grad()
        off = weigh("seq", "off", logprobs, old, A, mask)
        w = weigh("seq", kind, logprobs, old, A, mask)
        w = torch.where(shared_tokens(tokens)[:, None], w, off)
        policy.zero_grad()
        policy_loss(logprobs, w, A).backward()
        of_logprobs[kind] = logprobs.grad
        of_parameters[kind] = torch.cat([p.grad.flatten() for p in policy.parameters()])

    def apart(gradients, one, other):
        return ((gradients[one] - gradients[other]).norm() / gradients[other].norm()).item()

    for one, other in [("min", "mean"), ("min", "orth"), ("mean", "orth")]:
        assert apart(of_parameters, one, other) < 1e-12
        assert apart(of_logprobs, one, other) > 1e-4
    assert apart(of_parameters, "off", "min") > 1e-4
    assert apart(of_parameters, "shrink", "min") > 1e-4


# ---- 7. The loss
def test_policy_loss_by_hand():
    # −½ [1 · ½ · (−1) + 1 · ½ · (−3) + (−1) · ¼ · (−2)] = −½ (−½ − 1.5 + ½) = 0.75
    logprobs = tensor([[[-1.0, -3.0], [-2.0, -INF]]]).requires_grad_()  # −inf off the mask
    loss = policy_loss(logprobs, tensor([[[0.5, 0.5], [0.25, 0.0]]]), tensor([[1.0, -1.0]]))
    loss.backward()
    assert loss.item() == 0.75
    assert close(logprobs.grad, tensor([[[-0.25, -0.25], [0.125, 0.0]]]))


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_policy_loss_gradient_is_advantage_times_weight(loss, kind):
    logprobs, old, A, mask = random_case(0)
    mask[1, 2] = False  # an empty trajectory adds nothing, and counts in BG = 15
    w = weigh(loss, kind, logprobs.requires_grad_(), old, A, mask)
    assert not w.requires_grad
    ratio = (logprobs - logprobs.detach()).exp()  # 1, but with a graph that must stay out
    policy_loss(logprobs, w * ratio, A).backward()
    assert close(logprobs.grad, -A[..., None] * w / 15)


def test_net_push_by_hand():
    # |1 · 2 + (−1) · 5| / 2 = 1.5, |1 · 3 − 3| / 2 = 0
    w = tensor([[[2.0, 3.0], [5.0, 3.0]]])
    assert torch.equal(net_push(w, tensor([[1.0, -1.0]])), tensor([[1.5, 0.0]]))


def beside_no_signal(loss, kind, old_logprob):
    """Gradient and net push of two groups, the first with Â = 0 and this old log-probability."""
    logprobs = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[-0.3, -0.9], [-0.4, -0.2]]])
    old = torch.tensor([[[old_logprob, 0.0], [0.0, 0.0]], [[-0.4, -0.7], [-0.5, -0.3]]])
    A = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    w = weigh(loss, kind, logprobs.requires_grad_(), old, A, torch.ones(2, 2, 2))
    policy_loss(logprobs, w, A).backward()
    return logprobs.grad, net_push(w, A)


@pytest.mark.parametrize("old_logprob", [-90.0, -200.0, -INF, NAN])  # the ratio e^90 is inf
@pytest.mark.parametrize("loss", LOSSES)
def test_policy_loss_and_net_push_of_a_group_without_signal_are_exactly_0(loss, old_logprob):
    for kind in TRANSFORMS:
        gradient, push = beside_no_signal(loss, kind, old_logprob)
        healthy_gradient, healthy_push = beside_no_signal(loss, kind, 0.0)
        assert (gradient[0] == 0).all()
        assert (push[0] == 0).all()
        assert torch.equal(gradient[1], healthy_gradient[1])
        assert torch.equal(push[1], healthy_push[1])


def test_net_push_of_a_trajectory_without_advantage_or_weight_is_exactly_0():
    # |1 · 1| / 2, whatever the other's weight, or advantage
    assert net_push(tensor([[[1.0], [INF]]]), tensor([[1.0, 0.0]])).item() == 0.5
    assert net_push(tensor([[[1.0], [0.0]]]), tensor([[1.0, NAN]])).item() == 0.5


OVERFLOW = tensor([[[INF], [2.0], [2.0]]])


def test_policy_loss_and_net_push_refuse_a_ratio_that_has_overflowed():
    for w, A in [(OVERFLOW, A3), (OVERFLOW, -A3), (OVERFLOW * NAN, A3)]:
        with pytest.raises(ValueError, match="inf or nan: a ratio"):
            policy_loss(w * 0, w, A)
        with pytest.raises(ValueError, match="inf or nan: a ratio"):
            net_push(w, A)


def test_min_is_finite_beside_a_ratio_that_has_overflowed_the_others_spread_it():
    assert (transform_weights(OVERFLOW, A3, ALL, "min") == 2).all()
    for kind in ("mean", "shrink", "orth"):
        with pytest.raises(ValueError, match="inf or nan: a ratio"):
            net_push(transform_weights(OVERFLOW, A3, ALL, kind), A3)


X = torch.zeros(1, 2, 3)
A2 = torch.zeros(1, 2)
EMPTY = torch.zeros(0, 2, 3)
ADDED = torch.tensor([[[0.0, 0.0, -INF]] * 2])  # a mask that is added, not multiplied
sample = functools.partial(sample_groups, random_policy(), torch.zeros(1, 3).long(), 2)
WRONG_ARGUMENTS = [  # what the message says, function, arguments
    ("loss must be", effective_weights, ("ppo", X, X, A2, X)),
    ("B,G,T", effective_weights, ("seq", X, X, A2, X[0])),
    ("B,G,T", effective_weights, ("seq", X[0], X, A2, X)),
    ("B,G,T", effective_weights, ("seq", X, X[..., :1], A2, X)),
    ("B,G,T", effective_weights, ("seq", X[0], X[0], A2, X[0])),
    ("B,G,T", effective_weights, ("seq", EMPTY, EMPTY, A2[:0], EMPTY)),
    ("mask must be", effective_weights, ("seq", X, X, A2, ADDED)),
    ("clip_eps", effective_weights, ("gspo", X, X, A2, X, 0)),
    ("clip_eps", effective_weights, ("gspo", X, X, A2, X, (1, -1))),
    ("max_length", effective_weights, ("seq", X, X, A2, X, None, 0)),
    ("max_length", effective_weights, ("seq", X, X, A2, X, None, -3)),
    ("transform must be", transform_weights, (X, A2, X, "on")),
    ("B,G,T", transform_weights, (X[..., :2], A2, X, "min")),
    ("mask must be", transform_weights, (X, A2, ADDED, "off")),
    ("B,G,T", policy_loss, (X, X, A2[..., None])),
    ("B,G,T", policy_loss, (EMPTY, EMPTY, A2[:0])),
    ("B,G,T", net_push, (X, A2[..., None])),
    ("rewards", group_advantages, (A2[0],)),
    ("rewards", group_advantages, (A2[:0],)),
    ("rewards", group_advantages, (A2.long(),)),
    ("finite", group_advantages, (torch.tensor([[1.0, NAN]]),)),
    ("counted", group_advantages, (A2, True, A2[0])),
    ("mask must be", group_advantages, (A2, True, A2 - INF)),
    ("duplicates must be", credit, (X.long(), A2, "onse")),
    ("B,G,T", credit, (X[0].long(), A2, "once")),
    ("fork must be in 0..7; got 8", sample, (8, 8, None)),
    ("fork must be in 0..7; got -1", sample, (-1, 8, None)),
]


@pytest.mark.parametrize("says, function, arguments", WRONG_ARGUMENTS)
def test_wrong_arguments_raise_and_are_named(says, function, arguments):
    with pytest.raises(ValueError, match=says):
        function(*arguments)


def test_config_off_acts_nowhere_whatever_at_says():
    assert Config(transform="off", at="shared") == Config(transform="off")
    assert Config(transform="min", at="shared") != Config(transform="min")


def test_config_takes_inf_where_it_means_no_limit_and_no_clip():
    assert Config(max_grad_norm=INF).max_grad_norm == INF
    assert Config(loss="grpo", clip_eps=INF).clip_eps == INF


WRONG_FIELDS = {
    "loss": ["ppo"],
    "at": ["fork"],
    "lr": [0, INF, NAN],
    "kl": [-0.1, INF, NAN],
    "max_grad_norm": [0.0, NAN],
    "fork": [-1, 8],
    "group_size": [1],
    "steps": [0, 1.5, True],
    "clip_eps": [0.2],  # seq has no clip
}


@pytest.mark.parametrize("field", WRONG_FIELDS)
def test_config_refuses_and_names_the_field(field):
    for value in WRONG_FIELDS[field]:
        with pytest.raises(ValueError, match=field):
            Config(**{field: value})


# ---- 8. Warm start
def test_warm_start_step_by_step(monkeypatch):
    monkeypatch.setattr(tokrl, "Policy", lambda generator: Policy(generator).double())
    task = TASKS["chain"]
    got = tokrl.cached_warm_start.__wrapped__(task, 5, steps=2)  # without the cache
    policy = Policy(named_generator(5, "initialisation")).double()
    adam = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    rng = random.Random("5 demonstrations")
    for lr in (2e-3, 1e-3):
        prompts = [rng.choice(task.prompts()) for _ in range(64)]
        scored = []  # log-probabilities of the tokens of all demonstrations
        for prompt in prompts:
            ids = encode(prompt) + encode(task.demonstration(prompt, rng)) + [EOS]
            log_p = every_row(policy, torch.tensor([ids[:-1]]))[0]
            scored += [log_p[t - 1, ids[t]] for t in range(len(prompt), len(ids))]
        adam.param_groups[0]["lr"] = lr
        adam.zero_grad()
        (-torch.stack(scored).mean()).backward()
        adam.step()
    assert same_parameters(got, policy, 1e-7)


def test_warm_start_returns_its_own_copy_each_time(monkeypatch):
    short = functools.partial(tokrl.cached_warm_start, steps=2)
    monkeypatch.setattr(tokrl, "cached_warm_start", short)
    first = tokrl.warm_start(COMMUTE, 0)
    kept = copy.deepcopy(first)
    torch.nn.init.zeros_(first.head.weight)
    assert same_parameters(tokrl.warm_start(COMMUTE, 0), kept)


@pytest.mark.slow
def test_warm_start_is_right_about_a_third_of_the_time_and_evenly():
    policy = tokrl.warm_start(COMMUTE, 100)
    measures = tokrl.evaluate(policy, COMMUTE, policy)
    assert 0.2 < measures["accuracy"] < 0.45  # five seeds: 0.26 to 0.38
    assert measures["solution_entropy"] > 0.85


# ---- 9. Collect and update
def test_collect_draws_samples_and_rewards_as_configured():
    task = TASKS["chain"]
    policy = Policy(named_generator(0, "test"))
    config = Config(task="chain", fork=3, group_size=5, prompts=200)
    generator = named_generator(0, "sampling")
    prompts, tokens, rewards = tokrl.collect(policy, task, config, generator)
    assert (prompts.shape, tokens.shape, rewards.shape) == ((200, 6), (200, 5, 7), (200, 5))
    texts = [decode(row) for row in prompts]
    assert set(texts) <= set(task.prompts())
    assert 65 < len(set(texts)) < 84  # 84 (1 − e^(−200/84)) = 76
    assert shared_tokens(tokens)[:, :3].all()
    assert shared_tokens(tokens)[:, 3].float().mean() < 0.7
    another, _, _ = tokrl.collect(policy, task, config, generator)
    assert not torch.equal(another, prompts)

    # a task that accepts what was sampled third: the same draws, judged otherwise
    right = {prompt: ("",) for prompt in task.prompts()}
    for b in range(200):
        right[texts[b]] = (decode(tokens[b, 2]),)
    task = replace(task, table=right)
    _, again, rewards = tokrl.collect(policy, task, config, named_generator(0, "sampling"))
    assert torch.equal(again, tokens)
    for b, i in itertools.product(range(200), range(5)):
        assert rewards[b, i] == float(decode(tokens[b, i]) in right[texts[b]])
    assert 70 < rewards.sum() < 1000


def rollout(*groups):
    """Groups for "75=" and "31=" -> prompts, tokens, and rewards, some of each."""
    tokens = []
    for group in groups:
        tokens.append([encode(text.ljust(8, VOCAB[PAD])) for text in group])
    rewards = tensor([[1, 1, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0]])
    return tokrl.prompt_tokens(["75=", "31="]), torch.tensor(tokens), rewards


# Copies, unequal lengths, a sampled PAD, two without EOS. The fourth token is always "=" and never
# shared, as the groups have branched before.
LONG = rollout(
    ["7+5=12.", "7+5=12.", "7+1=5.", "7+5=12.", "7+_=12.", "7+5=12."],
    ["3+1=4.", "3+1=4.", "3+1=22.", "3+9=4.", "3+1=", "3+1=2222"],
)
# Nobody reaches the seventh place. The first group shares four tokens, the second one.
SHORT = rollout(
    ["7+5=1.", "7+5=1.", "7+5=2.", "7+5=.", "7+5=9.", "7+5=1."],
    ["3.", "3+1.", "3.", "3.", "31.", "3+4."],
)


def shared_by_hand(tokens):
    """At which tokens a group has a single opening, that token included: (B,1,T)."""
    B, _, T = tokens.shape
    shared = torch.zeros(B, 1, T, dtype=torch.bool)
    for b, t in itertools.product(range(B), range(T)):
        openings = {tuple(row[: t + 1]) for row in tokens[b].tolist()}
        shared[b, 0, t] = len(openings) == 1
    return shared


def update_by_hand(policy, reference, optimizer, config, prompts, tokens, rewards):
    """tokrl.update written out: trajectory by trajectory, on parts that are checked above.

    Returns what update returns, the norms of all gradients, and whether a clip has acted.
    """
    B, G, T = tokens.shape
    anchor = every_logprob(reference, prompts, tokens).detach()
    lengths = torch.full((B, G), T)
    for b, i in itertools.product(range(B), range(G)):
        if EOS in tokens[b, i].tolist():
            lengths[b, i] = tokens[b, i].tolist().index(EOS) + 1
    A, counted = credit(tokens, rewards, config.duplicates)
    mask = (torch.arange(T) < lengths[..., None]) & counted[..., None]
    shared = shared_by_hand(tokens)
    seen = []
    for inner in range(config.inner_steps):
        every = every_logprob(policy, prompts, tokens)  # (B,G,T,V)
        log_p = every.gather(-1, tokens[..., None])[..., 0]
        if inner == 0:
            old = log_p.detach()  # of the policy that sampled, at every inner step
        off = weigh(config.loss, "off", log_p, old, A, mask, config.clip_eps)
        w = weigh(config.loss, config.transform, log_p, old, A, mask, config.clip_eps)
        if config.at == "shared":
            w = torch.where(shared, w, off)
        elif config.at == "rest":
            w = torch.where(shared, off, w)
        loss = 0.0
        kl = 0.0
        for b, i in itertools.product(range(B), range(G)):
            n = lengths[b, i]
            loss = loss - (A[b, i] * w[b, i] * log_p[b, i])[:n].sum() / (B * G)
            terms = (every[b, i].exp() * (every[b, i] - anchor[b, i])).sum(-1)
            kl = kl + terms[:n].mean() / (B * G)  # over every completion, copies too
        optimizer.zero_grad()
        (loss + config.kl * kl).backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        push = (A[..., None] * w)[..., : config.fork].sum(1).abs() / G
        seen.append([push.mean(), kl.detach(), norm])
    push, kl, norm = np.array(seen).T
    result = {"net_push": push.sum(), "kl": kl.mean(), "grad_norm": norm.mean()}
    return result | {"reward": rewards.mean().item()}, norm, (off[mask] == 0).any()


GSPO = Config(loss="gspo", clip_eps=0.01)
UPDATES = {
    "seq min": Config(transform="min", max_grad_norm=0.5),
    "seq min at shared": Config(transform="min", at="shared", max_grad_norm=0.5),
    "seq orth at rest": Config(transform="orth", at="rest", max_grad_norm=0.5),
    "prefix": Config(loss="prefix", fork=7, max_grad_norm=0.5),
    "cispo mean": Config(loss="cispo", transform="mean", fork=0, max_grad_norm=0.3),
    "gspo once": replace(GSPO, duplicates="once", kl=0.7, max_grad_norm=0.6),
    "gspo min without kl": replace(GSPO, transform="min", kl=0.0, max_grad_norm=0.05),
    "grpo share": Config(loss="grpo", duplicates="share", kl=0.3, max_grad_norm=0.3),
}


@pytest.mark.parametrize("name", UPDATES)
def test_update_step_by_step(name):
    config = replace(UPDATES[name], inner_steps=4, lr=3e-3)
    mine = random_policy(1)
    its = random_policy(1)
    reference = random_policy(2)
    adam = torch.optim.AdamW(mine.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0)
    optimizer = tokrl.adamw(its, config.lr)
    for sampled in (LONG, SHORT):
        want, norms, clipped = update_by_hand(mine, reference, adam, config, *sampled)
        got = tokrl.update(its, reference, optimizer, config, *sampled)
        assert got == pytest.approx(want, rel=1e-6, abs=1e-12, nan_ok=True)
        assert (norms > config.max_grad_norm).any(), "the limit on the norm bites"
        assert clipped == (config.loss in ("gspo", "grpo"))
    assert same_parameters(its, mine, 1e-7)
    assert same_parameters(reference, random_policy(2))


UNENDED = rollout(["7+5=1222"] * 6, ["3+1=4444"] * 6)


def kl_between(policy, other) -> float:
    """KL(policy ‖ other), mean over the tokens of a group whose completions have no EOS."""
    prompts, tokens, _ = UNENDED
    log_p = every_logprob(policy, prompts, tokens)
    log_q = every_logprob(other, prompts, tokens)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def update_without_signal(policy, kl: float) -> dict:
    """An update with equal rewards, so that only the KL to random_policy(2) is left."""
    prompts, tokens, rewards = UNENDED
    optimizer = tokrl.adamw(policy, 1e-3)
    config = Config(kl=kl)
    return tokrl.update(policy, random_policy(2), optimizer, config, prompts, tokens, rewards * 0)


def test_kl_penalty_points_to_the_reference():
    policy = random_policy(1)
    before = kl_between(policy, random_policy(2))
    update_without_signal(policy, kl=1.0)
    assert kl_between(policy, random_policy(2)) < 0.9 * before


def test_kl_is_of_the_policy_to_the_reference_not_the_other_way_round():
    policy = random_policy(1)
    report = update_without_signal(policy, kl=0.0)
    assert report["kl"] == pytest.approx(kl_between(policy, random_policy(2)), rel=1e-9)
    assert report["kl"] != pytest.approx(kl_between(random_policy(2), policy), rel=1e-4)


def update_refused(policy, reference, says):
    """An update raises ValueError, and no parameter has moved."""
    before = copy.deepcopy(policy)
    with pytest.raises(ValueError, match=says):
        tokrl.update(policy, reference, tokrl.adamw(policy, 1e-3), Config(), *LONG)
    assert same_parameters(policy, before)


def test_update_stops_before_the_optimizer_where_the_loss_is_not_finite():
    reference = random_policy(2)
    torch.nn.init.constant_(reference.head.weight, NAN)
    update_refused(random_policy(1), reference, "loss nan")


def test_update_stops_before_the_optimizer_where_the_gradient_is_not_finite():
    policy = random_policy(1)
    policy.head.weight.register_hook(lambda gradient: gradient * INF)
    update_refused(policy, random_policy(2), r"loss -?\d.*, gradient norm (inf|nan)")


def test_update_stops_before_the_optimizer_where_a_ratio_overflows(monkeypatch):
    monkeypatch.setattr(tokrl, "effective_weights", lambda *_: torch.full((2, 6, 8), INF))
    update_refused(random_policy(1), random_policy(2), "a ratio")


# ---- 10. Exact measures, against sums written out
def with_prompts(task, solutions: dict) -> Task:
    """The task with these prompts only, and so many of their solutions."""
    table = {prompt: task.table[prompt][:n] for prompt, n in solutions.items()}
    return replace(task, name=f"some {task.name}", table=table)


MIXED = with_prompts(COMMUTE, {"75=": 2, "41=": 1})


def log_probability(policy, prompt, text):
    """log π(text and its EOS | prompt), token by token."""
    ids = encode(prompt) + encode(text) + [EOS]
    rows = every_row(policy, torch.tensor([ids[:-1]]))[0].tolist()
    return sum(rows[t - 1][ids[t]] for t in range(len(prompt), len(ids)))


@pytest.mark.parametrize("task", [*TASKS.values(), MIXED], ids=lambda task: task.name)
def test_measures_by_brute_force(task):
    policy = random_policy(3)
    start = random_policy(4)
    accuracy = []
    entropy = []
    drift = []
    for prompt in task.prompts():
        now = np.array([log_probability(policy, prompt, y) for y in task.solutions(prompt)])
        then = np.array([log_probability(start, prompt, y) for y in task.solutions(prompt)])
        accuracy.append(np.exp(now).sum())
        if len(now) > 1:
            q = np.exp(now) / np.exp(now).sum()
            entropy.append(-(q * np.log(q)).sum() / math.log(len(q)))
            pairs = itertools.combinations(now - then, 2)
            drift.append(np.mean([abs(a - b) for a, b in pairs]))
    want = {
        "accuracy": np.mean(accuracy),
        "solution_entropy": np.mean(entropy) if entropy else NAN,
        "solution_drift": np.mean(drift) if drift else NAN,
    }
    assert tokrl.evaluate(policy, task, start) == pytest.approx(want, rel=1e-7, nan_ok=True)


def test_measures_take_the_start_as_a_policy_or_as_its_solution_logprobs():
    policy = random_policy(3)
    start = random_policy(4)
    logprobs = tokrl.solution_logprobs(start, MIXED)
    assert tokrl.evaluate(policy, MIXED, logprobs) == tokrl.evaluate(policy, MIXED, start)
    assert tokrl.evaluate(policy, MIXED, policy)["solution_drift"] == 0.0


SOME_SPLIT = with_prompts(TASKS["split"], {"04=": 6, "06=": 15})
TAXED = [(MIXED, 2), (MIXED, 0), (SOME_SPLIT, 6), (TASKS["add"], 1)]


@pytest.mark.parametrize("task, fork", TAXED, ids=lambda x: getattr(x, "name", x))
def test_learning_tax_by_brute_force(task, fork):
    after = random_policy(3)
    before = random_policy(4)

    @functools.cache
    def kl(ids):
        p = every_row(after, torch.tensor([ids]))[0, -1]
        q = every_row(before, torch.tensor([ids]))[0, -1]
        return (p.exp() * (p - q)).sum().item()

    by_prompt = []
    for prompt in task.prompts():
        openings = []
        for solution in task.solutions(prompt):
            ids = encode(solution) + [EOS]
            length = min(max(fork, 1), len(ids))
            openings.append(sum(kl((*encode(prompt), *ids[:t])) for t in range(length)))
        by_prompt.append(np.mean(openings))
    then = tokrl.opening_logprobs(before, task, fork)
    now = tokrl.opening_logprobs(after, task, fork)
    assert tokrl.learning_tax(now, then, task) == pytest.approx(np.mean(by_prompt), rel=1e-9)


def test_samples_count_what_is_said_and_mark_what_is_wrong(monkeypatch):
    def said(policy, prompts, size, fork, length, generator):
        assert (size, fork, length) == (100, 0, 8)
        texts = ["5+7=12"] * 60 + ["0"] * 30 + ["3"] * 9 + ["1"]
        return tokrl.completion_tokens(texts, length).expand(3, -1, -1)

    monkeypatch.setattr(tokrl, "sample_groups", said)
    task = replace(COMMUTE, table={"75=": ("5+7=12",), "12=": ("3",), "34=": ("7",)})
    assert sorted(tokrl.samples(None, task, 0).split("\n")) == [
        "12=  60 x 5+7=12 (wrong),  30 x 0 (wrong),  9 x 3",
        "34=  60 x 5+7=12 (wrong),  30 x 0 (wrong),  9 x 3 (wrong)",
        "75=  60 x 5+7=12,  30 x 0 (wrong),  9 x 3 (wrong)",
    ]


# ---- 11. Train
def untrained(task, seed: int) -> Policy:
    return Policy(named_generator(seed, task.name))


@pytest.fixture
def no_warm_start(monkeypatch):
    """Runs start untrained, know three prompts, and any completion with a 1 in it is right."""
    few = with_prompts(COMMUTE, {"75=": 2, "41=": 2, "96=": 2})
    monkeypatch.setitem(TASKS, "commute", few)
    monkeypatch.setattr(tokrl, "warm_start", untrained)
    monkeypatch.setattr(Task, "reward", lambda self, prompt, text: float("1" in text))


TINY = Config(prompts=2, group_size=3, inner_steps=2, steps=1)


@pytest.mark.parametrize("fork, steps", [(0, 1), (1, 81)])
def test_train_step_by_step(fork, steps, no_warm_start):
    config = replace(TINY, fork=fork, steps=steps, lr=1e-3)
    result = tokrl.train(config, 7)

    task = TASKS["commute"]
    reference = untrained(task, 7)
    policy = untrained(task, 7)
    optimizer = tokrl.adamw(policy, 1e-3)
    generator = named_generator(7, "sampling")
    rows = []
    seen = []
    tax = 0.0
    push = 0.0
    for k in range(steps + 1):
        if k > 0:
            before = tokrl.opening_logprobs(policy, task, fork)
            sampled = tokrl.collect(policy, task, config, generator)
            seen.append(tokrl.update(policy, reference, optimizer, config, *sampled))
            after = tokrl.opening_logprobs(policy, task, fork)
            tax += tokrl.learning_tax(after, before, task)
            push += seen[-1]["net_push"]  # nan without a fork
        if k % max(1, steps // 40) == 0 or k == steps:  # every second of 81, and the last
            row = {"step": k, "learning_tax": tax, "net_push": push}
            for name in ("kl", "grad_norm", "reward"):
                row[name] = np.mean([x[name] for x in seen]) if seen else NAN
            rows.append(row | tokrl.evaluate(policy, task, reference))
            seen = []
    if fork == 0:
        rows[0]["net_push"] = NAN
    for name in rows[0]:
        want = [row[name] for row in rows]
        assert result["curves"][name] == pytest.approx(want, rel=1e-4, abs=1e-9, nan_ok=True)
        want = np.mean([row[name] for row in rows if row["step"] > 0.75 * steps])
        assert result["final"][name] == pytest.approx(want, rel=1e-4, abs=1e-9, nan_ok=True)
    assert (result["config"], result["seed"]) == (asdict(config), 7)
    assert result["samples"] == tokrl.samples(policy, task, 7)


def test_train_takes_the_integers_of_numpy_as_a_seed_and_no_fraction(no_warm_start):
    seed = tokrl.train(TINY, np.int64(5))["seed"]
    assert (seed, type(seed)) == (5, int)
    with pytest.raises(TypeError):
        tokrl.train(TINY, 5.5)


def test_train_without_streams_shows_no_bar(no_warm_start, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert tokrl.train(TINY, 5)["seed"] == 5


def test_train_stops_where_it_diverges_and_names_the_rollout(no_warm_start):
    with pytest.raises(ValueError, match="stopped at rollout 1: "):
        tokrl.train(replace(TINY, lr=1e9), 5)


ON_ONE_THREAD = {
    "train": lambda: tokrl.train(TINY, 5),
    "train that diverges": lambda: tokrl.train(replace(TINY, lr=1e9), 5),
    "warm_start": lambda: tokrl.cached_warm_start.__wrapped__(COMMUTE, 5, steps=1),
}


@pytest.mark.parametrize("name", ON_ONE_THREAD)
def test_one_thread_is_used_and_the_others_are_given_back(name, no_warm_start, monkeypatch):
    seen = []
    adamw = tokrl.adamw

    def spy(policy, lr):
        seen.append(torch.get_num_threads())
        return adamw(policy, lr)

    monkeypatch.setattr(tokrl, "adamw", spy)
    torch.set_num_threads(2)
    with contextlib.suppress(ValueError):
        ON_ONE_THREAD[name]()
    seen.append(torch.get_num_threads())
    torch.set_num_threads(1)
    assert seen == [1, 2]


# Recorded with layer norms without parameters and without the columns that nobody has reached: both
# change how sums are rounded, the norms also what is trained, and so these numbers have moved.
MEASURED = ["accuracy", "solution_entropy", "solution_drift", "learning_tax", "net_push"]
GOLDEN = {
    "off": [0.451588, 0.543977, 2.19203, 0.118262, 2.32437],
    "min": [0.423585, 0.837251, 0.808869, 0.0938773, 0.0],
}


@pytest.mark.slow
@pytest.mark.parametrize("transform", GOLDEN)
def test_train_ends_where_it_ended_when_recorded(transform):
    # a start that differed by rounding (1e-7) ended within 1e-4 of these: 1e-2 leaves ample room
    final = tokrl.train(Config(steps=20, transform=transform), 100)["final"]
    assert [final[m] for m in MEASURED] == pytest.approx(GOLDEN[transform], rel=1e-2, abs=1e-5)


# ---- 12. For the exercises: python test_tokrl.py blank NAME
def blank(name: str) -> str:
    """Replace the body of a function of tokrl.py, its docstring cut to the first line.

    Returns what to do next. ValueError: there is no such function, or tokrl.py is not as committed.
    """
    path = HERE / "tokrl.py"
    back = "`git checkout tokrl.py` brings the original back"
    differs = subprocess.run(
        ["git", "diff", "--quiet", "HEAD", "--", "tokrl.py"], check=False, cwd=HERE
    )
    if differs.returncode != 0:
        raise ValueError(f"tokrl.py is not as committed, or this is no git checkout: {back}")
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if name not in functions:
        raise ValueError(f"no function {name!r} in tokrl.py; there are {', '.join(functions)}")
    node = functions[name]
    summary = ast.get_docstring(node).splitlines()[0]
    lines = source.splitlines()
    lines[node.body[0].lineno - 1 : node.end_lineno] = [
        f'    """{summary}"""',
        "    raise NotImplementedError",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{name} is blank, line {node.lineno} of tokrl.py. Write it again; {back}."


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "blank":
        sys.exit("usage: python test_tokrl.py blank NAME")
    try:
        print(blank(sys.argv[2]))
    except ValueError as error:
        sys.exit(f"test_tokrl.py: {error}")
