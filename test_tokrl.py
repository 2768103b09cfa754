"""Tests of tokrl.py and toy_tasks.py, in the order of their chapters.

    python -m pytest test_tokrl.py                  everything: about a minute
    python -m pytest test_tokrl.py -m "not slow"    without what starts the program or trains
    python -m pytest test_tokrl.py -k cor32         what the paper says: eq2, eq17, eq18, section4,
                                                    prop31, cor32, cor33; or: task, weights, update

Most are worked by hand, with the arithmetic above the assert. Where that cannot be, something
independent judges: enumeration, or the same thing written out.
"""

import itertools
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tokrl
from tokrl import Config, Policy, effective_weights, net_push, policy_loss, transform_weights
from toy_tasks import EOS, PAD, TASKS, VOCAB, Task, decode, encode

HERE = Path(tokrl.__file__).resolve().parent
INF = math.inf
NAN = math.nan
generator = tokrl.named_generator
torch.set_num_threads(1)


def tensor(values):
    """In float64, where numbers made by hand are exact to 1e-12."""
    return torch.tensor(values, dtype=torch.float64)


def assert_close(got, want, atol=1e-12):
    """Equal shapes, and equal numbers to `atol`."""
    __tracebackhide__ = True
    says = f"\nwant {want.tolist()}\ngot  {getattr(got, 'tolist', lambda: got)()}"
    assert isinstance(got, torch.Tensor) and got.shape == want.shape, says
    assert torch.allclose(got.double(), want.double(), rtol=0, atol=atol), says


def parameters(policy):
    return torch.nn.utils.parameters_to_vector(policy.parameters()).detach()


def random_policy(seed: int = 0) -> Policy:
    """A policy in float64 that has learnt nothing."""
    return Policy(generator(seed, "test")).double()


# ---- 1. Tasks, by enumeration
def total(text: str) -> int:
    return sum(int(digit) for digit in text.split("+"))


PAIRS = [f"{a}+{b}" for a in "123456789" for b in "123456789"]
SUMS = PAIRS + [f"{pair}+{c}" for pair in PAIRS for c in "123456789"]
PROMPTS = {"commute": 9 * 8, "split": 10, "chain": 84, "add": 10 * 10, "habit": 9 * 8}


def right_by_arithmetic(name: str, prompt: str) -> list:
    """All right completions, looked for among all sums."""
    question = prompt.removesuffix("=")
    if name == "add":
        return [f"{total(question):02d}"]
    if name == "split":
        return [s for s in SUMS if total(s) == int(question)]
    if name == "chain":  # one of the outer digits stays as it is
        pairs = [s for s in PAIRS if total(s) == total(question)]
        return [f"{s}={total(s)}" for s in pairs if s[0] == question[0] or s[-1] == question[-1]]
    return [f"{s}={total(s)}" for s in PAIRS if sorted(s) == sorted("+" + question)]


@pytest.mark.parametrize("name", PROMPTS)
def test_task_rewards_what_is_right_by_arithmetic(name):
    task = TASKS[name]
    assert len(task.prompts()) == PROMPTS[name]
    for prompt in task.prompts():
        right = right_by_arithmetic(name, prompt)
        assert sorted(task.solutions(prompt)) == sorted(right)
        assert max(len(s) for s in right) + 1 < task.max_completion
        for s in right:
            for other in [s, s + "_", s + "0", s[:-1], s[:-1] + "0", "_" + s]:
                assert task.reward(prompt, other) == float(other in right)


def test_task_text_is_encoded_by_character_and_decoded_to_the_first_eos():
    assert encode("7+5=12") == [VOCAB.index(character) for character in "7+5=12"]
    assert decode([2, PAD, 3, EOS, 4]) == "0_1"


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_task_demonstrations_are_half_wrong_and_even_but_for_a_favourite(task):
    prompt = task.prompts()[len(task.prompts()) // 2]
    right = task.solutions(prompt)
    rng = random.Random(0)
    texts = [task.demonstration(prompt, rng) for _ in range(4000)]
    counts = [texts.count(s) for s in right]
    assert abs(sum(counts) - 2000) < 160  # 5 standard deviations
    shares = [1 / len(right)] * len(right)
    if task.name == "habit":
        shares = [0.9, 0.1]
        assert right == ["6+5=11", "5+6=11"], "the larger digit first"
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - 2000 * share) < 5 * math.sqrt(2000 * share)


# ---- 2. The policy, read one row at a time
def every_logprob(policy, prompts, tokens):
    """Log-probabilities of every token at each place of the completions: (B,G,T,V)."""
    B, G, _ = tokens.shape
    rows = torch.cat([prompts[:, None].expand(B, G, -1), tokens], -1).flatten(0, 1)
    every = torch.cat([policy(row[None]) for row in rows])
    return every[:, prompts.shape[1] - 1 : -1].unflatten(0, (B, G))


def logprobs_along(policy, prompt, text):
    """At each token of the text and its EOS: log π of all tokens (T,V), and of this one (T)."""
    ids = encode(prompt) + encode(text) + [EOS]
    rows = policy(torch.tensor([ids[:-1]]))[0, len(prompt) - 1 :]
    return rows, rows[range(len(rows)), ids[len(prompt) :]]


# ---- 3. Sampling
def test_completion_mask_by_hand():
    # a PAD before the first EOS is scored, a second EOS is not; without EOS all is scored
    rows = torch.tensor([[PAD, 3, EOS, 5, EOS], [EOS, 2, 2, 2, 2], [3, PAD, 3, 3, PAD]])
    want = [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert tokrl.completion_mask(rows[None]).int().tolist() == [want]


def sampled(policy, prompts, *sizes):
    """What sample_groups returns."""
    tokens = tokrl.sample_groups(policy, prompts, *sizes, generator(0, "sampling"))
    want = (len(prompts), sizes[0], sizes[2])
    assert getattr(tokens, "shape", None) == want, f"want tokens of shape {want}, got {tokens}"
    return tokens


@pytest.mark.parametrize("fork", [0, 1, 3, 7])
def test_sample_groups_share_a_fork_and_branch_after_it(fork):
    prompts = torch.randint(len(VOCAB), (40, 3), generator=generator(0, "tokens"))
    tokens = sampled(Policy(generator(1, "test")), prompts, 5, fork, 8)
    agree = (tokens == tokens[:, :1]).all(dim=1)  # (B,T)
    assert agree[:, :fork].all(), "the fork is sampled once for a group"
    assert len({tuple(row) for row in tokens[:, 0].tolist()}) > 20, "prompts do not share"
    mask = tokrl.completion_mask(tokens)
    alive = mask[:, :, fork].all(dim=1)  # groups that have not ended within the opening
    assert agree[alive, fork].float().mean() < 0.5, "after the fork each its own"
    assert (tokens[~mask] == PAD).all(), "nothing but PAD after EOS"


@pytest.mark.parametrize("fork", [0, 1])
def test_sample_groups_follow_the_enumerated_distribution(fork):
    policy = Policy(generator(2, "test"))
    prompt = torch.tensor([encode("7.=")])  # an EOS in the prompt ends nothing
    pairs = torch.cartesian_prod(torch.arange(14), torch.arange(14))[None]  # 14² outcomes
    p = tokrl.token_logprobs(policy, prompt, pairs).sum(-1).exp()[0]
    p[pairs[0, :, 0] == EOS] = 0.0  # one outcome more: ended at once
    expected = torch.cat([p, (1 - p.sum())[None]]).detach() * 20_000

    first, second = sampled(policy, prompt.expand(20_000, 3), 2, fork, 2)[:, -1].T
    outcomes = torch.where(first == EOS, 196, first * 14 + second)
    counts = torch.bincount(outcomes, minlength=197)
    big = expected > 5
    chi2 = ((counts[big] - expected[big]) ** 2 / expected[big]).sum()
    assert chi2 < big.sum() + 5 * math.sqrt(2 * big.sum()), f"want {expected}, got {counts}"


# ---- 4. Advantages, by hand
def test_group_advantages_by_hand():
    # 1 0 0 1: mean 1/2, std with G − 1: sqrt(4 · 1/4 / 3) = sqrt(1/3). 1 0 0 0: mean 1/4, std 1/2
    # equal rewards: nothing to tell apart
    rewards = tensor([[1, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]])
    differences = tensor([[0.5, -0.5, -0.5, 0.5], [0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0]])
    std = tensor([[math.sqrt(1 / 3)], [0.5], [0]])
    assert_close(tokrl.group_advantages(rewards), differences / (std + 1e-4))
    assert_close(tokrl.group_advantages(rewards, normalize=False), differences)


def test_equal_rewards_give_exactly_0_not_dust():
    rewards = torch.full((1, 7), 0.1)
    assert rewards.mean() != rewards[0, 0], "in float32 this mean is rounded"
    assert (tokrl.group_advantages(rewards) == 0).all()


def test_bfloat16_rewards_are_computed_in_float32():
    # 1 1 1 1 + 1/128: the mean, 1 + 1/512, lies between two numbers of bfloat16
    rewards = torch.tensor([[1, 1, 1, 1 + 1 / 128]]).bfloat16()
    got = tokrl.group_advantages(rewards, normalize=False)
    assert got.dtype == torch.float32
    assert got.tolist() == [[-1 / 512, -1 / 512, -1 / 512, 3 / 512]]


# ---- 5. Effective weights, by hand
# Two groups of two, lengths 2 3 | 1 3, one with a hole; ratios below, inside and above 1 ± 0.2
MASK = torch.tensor([[[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [0, 1, 1]]]).bool()
RATIO = tensor([[[1.5, 0.5, 9.0], [1.5, 1.1, 0.5]], [[0.9, 9.0, 9.0], [9.0, 1.3, 0.9]]])
OLD = tensor([[[-1.0, -2.0, -3.0], [-0.5, -0.1, -4.0]], [[-1.5, -0.3, -0.2], [-0.7, -2.5, -0.9]]])
ADVANTAGES = tensor([[0.5, -0.5], [-2.0, 2.0]])
N = tensor([[[2], [3]], [[1], [2]]])  # L = 3, BG / M = 4 / 8
# the clip drops ratios above 1.2 where Â > 0, below 0.8 where Â < 0
CLIPPED = tensor([[[0, 0.5, 0], [1.5, 1.1, 0]], [[0.9, 0, 0], [0, 0, 0.9]]])
# gspo: sqrt(1.5 · 0.5) = 0.866 kept (Â > 0); cbrt(1.5 · 1.1 · 0.5) = 0.938 dropped at 1 − 0.04
# (Â < 0); 0.9 dropped (Â < 0); sqrt(1.3 · 0.9) = 1.082 dropped at 1 + 0.04 (Â > 0)
# seq: 1.5 · 0.5 = 0.75, 1.5 · 1.1 · 0.5 = 0.825, 0.9, 1.3 · 0.9 = 1.17; prefix: the same, so far
WEIGHTS = {
    "reinforce": MASK / tensor(3.0),
    "grpo": CLIPPED / N,
    "dr_grpo": CLIPPED / 3,
    "dapo": CLIPPED / 2,
    "grpo_sym": tensor([[[0, 0, 0], [0, 1.1, 0]], [[0.9, 0, 0], [0, 0, 0.9]]]) / 3,
    "cispo": tensor([[[1.2, 0.5, 0], [1.2, 1.1, 0.5]], [[0.9, 0, 0], [0, 1.2, 0.9]]]) / 2,
    "gspo": tensor([[[1, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]) * math.sqrt(0.75) / 2,
    "seq": tensor([[[0.75], [0.825]], [[0.9], [1.17]]]) * MASK / 3,
    "prefix": tensor([[[1.5, 0.75, 0], [1.5, 1.65, 0.825]], [[0.9, 0, 0], [0, 1.3, 1.17]]]) / 3,
}


UP_DOWN = tensor([[1.0, -1.0]])


def weigh(loss, **options):
    return effective_weights(loss, OLD + RATIO.log(), OLD, ADVANTAGES, MASK, **options)


@pytest.mark.parametrize("loss", WEIGHTS)
def test_weights_by_hand(loss):
    print("want", WEIGHTS[loss].tolist())  # pytest shows it if what follows fails
    assert_close(weigh(loss), WEIGHTS[loss])
    # L = 1 in place of 3, where the loss has such a constant
    scale = 3 if loss in ("reinforce", "dr_grpo", "grpo_sym", "seq", "prefix") else 1
    assert_close(weigh(loss, max_length=1), WEIGHTS[loss] * scale)


def test_clip_with_two_bounds_by_hand():
    # (0.2, 0.6): 1.5 and 1.3 with Â > 0 are now kept; 0.5 with Â < 0 is not
    want = tensor([[[1.5, 0.5, 0], [1.5, 1.1, 0]], [[0.9, 0, 0], [0, 1.3, 0.9]]]) / 3
    assert_close(weigh("dr_grpo", clip_eps=(0.2, 0.6)), want)


def test_clip_of_gspo_acts_on_bfloat16():
    # 94 tokens of log-ratio 0 and six of −1/64: s = exp(−6 / 64 / 100) = 0.99906 < 1 − 3e-4
    old = torch.full((1, 2, 100), -2.0, dtype=torch.bfloat16)
    new = old.clone()
    new[0, 1, :6] = -2.015625
    w = effective_weights("gspo", new, old, UP_DOWN, torch.ones(1, 2, 100).bool(), (3e-4, 4e-4))
    assert_close(w, tensor([[[0.01], [0.0]]]).expand(1, 2, 100), 1e-8)


# Eq. 2: which losses cancel at a token that the group shares
# Two completions, of 2 and of 3 tokens, share the first one, of ratio 2. Â = 1 and −1.
FORKED = tensor([[[2.0, 0.5, 1.0], [2.0, 2.0, 2.0]]]).log()
FORKED_MASK = torch.tensor([[[1, 1, 0], [1, 1, 1]]]).bool()
LEFT_OVER = {  # Σ_i Â_i w_i at the shared token, with the loss's clip, without. L = 3, BG/M = 2/5
    "reinforce": (0, 0),  # 1/3 − 1/3
    "grpo": (0 - 2 / 3, 2 / 2 - 2 / 3),  # clipped where Â > 0; without a clip 1/n remains
    "dr_grpo": (0 - 2 / 3, 0),  # clipped where Â > 0; without a clip 2/3 − 2/3
    "dapo": (0 - 4 / 5, 0),  # the same, · 2/5
    "grpo_sym": (0, 0),  # clipped for both
    "cispo": (0, 0),  # 1.2 for both
    "gspo": (1 / 2 - 2 / 3, 1 / 2 - 2 / 3),  # s = sqrt(2 · ½) = 1 and cbrt(2 · 2 · 2) = 2, over n
    "seq": (1 / 3 - 8 / 3, 1 / 3 - 8 / 3),  # 2 · ½ and 2 · 4: the ratios after the shared token
    "prefix": (0, 0),  # 2/3 − 2/3: of the first token alone
}


@pytest.mark.parametrize("loss", LEFT_OVER)
def test_eq2_by_hand(loss):
    for clip_eps, want in zip((None, INF), LEFT_OVER[loss], strict=True):
        w = effective_weights(loss, FORKED, FORKED * 0, UP_DOWN, FORKED_MASK, clip_eps)
        assert_close((UP_DOWN[0] * w[0, :, 0]).sum(), tensor(want))


@pytest.mark.parametrize("loss", tokrl.LOSSES)
def test_eq2_holds_where_all_agree_unless_the_loss_is_known_to_break_it(loss):
    # ratios e^±0.3 that clips notice, lengths 4 to 6, two shared tokens; every token else differs
    log_r = 0.3 * torch.randn(3, 5, 6, generator=generator(0, "ratios")).double()
    log_r[..., :2] = tensor([0.25, 0.1])
    mask = torch.arange(6) < tensor([4, 5, 6, 5, 4])[:, None].expand(3, 5, 1)
    A = tensor([[2, -1, 2, -1, -2]] * 3)
    push = net_push(effective_weights(loss, log_r, log_r * 0, A, mask), A)[:, :2]
    breaks = loss in ("grpo", "dr_grpo", "dapo", "gspo", "seq")
    assert (push < 1e-12).all() != breaks, f"net push {push.tolist()}"

    on_policy = effective_weights(loss, log_r, log_r, A, mask)
    assert (on_policy[mask] > 0).all(), "at the first inner step every token is trained"


# ---- 6. Transforms, by hand: Eq. 17 (min) and Eq. 18 (orth)
# a place where all three are alive, one with two, one with one, one with nobody
W = tensor([[[1.0, 4.0, 5.0, 6.0], [2.0, 3.0, 7.0, 8.0], [6.0, 2.0, 9.0, 9.0]]])
ALIVE = torch.tensor([[[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]]]).bool()
A3 = tensor([[1.0, 1.0, -2.0]])


def assert_transformed(kind, want):
    """Neither another group nor what is off the mask changes it; where all are 0 it stays 0."""
    w = torch.cat([W, W * 0, W])
    mask = torch.cat([ALIVE, ALIVE, ALIVE & False])
    got = transform_weights(w, torch.cat([A3, -A3, A3]), mask, kind)
    assert_close(got, torch.cat([want, W * 0, W * 0]))


def test_transform_min_by_hand_eq17():
    # the least of the alive: min(1, 2, 6) = 1, min(4, 2) = 2, 7, nobody
    assert_transformed("min", tensor([[[1, 2, 0, 0], [1, 0, 7, 0], [1, 2, 0, 0]]]))


def test_transform_min_reads_everyone_who_is_alive_eq17():
    # one without advantage has the least weight, 2; one whose weight a clip has made 0
    w = tensor([[[3.0, 3.0], [2.0, 5.0], [6.0, 0.0]]])
    got = transform_weights(w, tensor([[1.0, 0.0, -1.0]]), torch.ones(1, 3, 2).bool(), "min")
    assert_close(got, tensor([[[2, 0], [2, 0], [2, 0]]]))


def test_transform_orth_by_hand_eq18():
    # first place: Âᵀw = 1 + 2 − 12 = −9, ‖Â‖² = 6, w + 1.5 Â = (2.5, 3.5, 3)
    # second, over trajectories 1 and 3: Âᵀw = 4 − 4 = 0, unchanged; third: 7 − 7 = 0
    assert_transformed("orth", tensor([[[2.5, 4, 0, 0], [3.5, 0, 0, 0], [3, 2, 0, 0]]]))


def test_transform_orth_looks_at_the_alive_only_eq18():
    # second place: Âᵀw = 8 − 2 = 6, ‖Â‖² = 5, w − 1.2 Â = (4 − 2.4, 2 + 1.2)
    w = transform_weights(W, tensor([[2.0, -1.0, -1.0]]), ALIVE, "orth")
    assert_close(w[0, :, 1], tensor([1.6, 0.0, 3.2]))
    # ‖Â‖ = 0 over these two: w itself, never nan
    w = transform_weights(W, tensor([[0.0, 1.0, 0.0]]), ALIVE, "orth")
    assert_close(w[0, :, 1], tensor([4, 0, 2]))


SHARED = {  # the completions of a group; where all agree up to and including that token
    "a fork of two": (["7+5=", "7+1.", "7+93"], [1, 1, 0, 0]),
    "a third token by chance": (["7+5=", "7+5.", "7+53"], [1, 1, 1, 0]),
    "agrees again after it has branched": (["17+5", "27+5", "17+5"], [0, 0, 0, 0]),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_tokens_by_hand(name):
    texts, want = SHARED[name]
    group = torch.tensor([encode(text) for text in texts])
    got = tokrl.shared_tokens(torch.stack([group, group * 0]))  # another group, all the same
    assert_close(got, torch.tensor([want, [1] * 4]))
    assert got.dtype == torch.bool


# ---- 7. The loss
def test_policy_loss_and_net_push_by_hand():
    # −½ [1 · ½ · (−1) + 1 · ½ · (−3) + (−1) · ¼ · (−2)] = −½ (−½ − 1.5 + ½) = 0.75
    logprobs = tensor([[[-1.0, -3.0], [-2.0, -7.0]]]).requires_grad_()
    w = tensor([[[0.5, 0.5], [0.25, 0.0]]])
    loss = policy_loss(logprobs, w, UP_DOWN)
    loss.backward()
    assert loss.item() == 0.75
    assert_close(logprobs.grad, tensor([[[-0.25, -0.25], [0.125, 0.0]]]))
    # |1 · ½ − 1 · ¼| / 2, |1 · ½ − 0| / 2
    assert_close(net_push(w, UP_DOWN), tensor([[0.125, 0.25]]))


@pytest.mark.parametrize("loss", WEIGHTS)
def test_policy_loss_has_a_gradient_through_the_logprobs_alone(loss):
    logprobs = (OLD + RATIO.log()).requires_grad_()
    A = ADVANTAGES.clone().requires_grad_()  # as from a reward model that is being trained
    w = effective_weights(loss, logprobs, logprobs - RATIO.log(), A, MASK)
    assert not w.requires_grad
    ratio = (logprobs - logprobs.detach()).exp()  # 1, but with a graph that must stay out
    policy_loss(logprobs, w * ratio, A).backward()
    assert_close(logprobs.grad, -ADVANTAGES[..., None] * WEIGHTS[loss] / 4)
    assert A.grad is None


@pytest.mark.parametrize("kind", tokrl.TRANSFORMS)
def test_trajectory_without_advantage_adds_exactly_0_even_at_an_infinite_ratio(kind):
    # inf · 0 is nan; what the others add, −(±1) · 2 / 3, stays as it is
    logprobs = torch.zeros(1, 3, 1).double().requires_grad_()
    A = tensor([[0.0, 1.0, -1.0]])
    w = transform_weights(tensor([[[INF], [2.0], [2.0]]]), A, logprobs == 0, kind)
    policy_loss(logprobs, w, A).backward()
    assert_close(logprobs.grad, tensor([[[0.0], [-2 / 3], [2 / 3]]]))
    assert_close(net_push(w, A), tensor([[0]]))


def test_min_orth_and_no_weights_where_all_agree_give_the_parameters_one_gradient():
    # A shared token is one log-probability of the network: where its pushes cancel nothing is left
    # of them, whatever each of them was.
    policy = random_policy(1)
    prompts = tokrl.prompt_tokens(["75="])
    tokens = tokrl.completion_tokens(["7+5=12", "7+5=21", "7+9=12"], 7)[None]
    mask = tokrl.completion_mask(tokens)
    old = tokrl.token_logprobs(random_policy(2), prompts, tokens).detach()
    weights = {}
    gradients = {}
    for kind in (*tokrl.TRANSFORMS, "none"):
        logprobs = tokrl.token_logprobs(policy, prompts, tokens)
        w = effective_weights("seq", logprobs, old, A3, mask)
        changed = w * 0 if kind == "none" else transform_weights(w, A3, mask, kind)
        w[..., :2] = changed[..., :2]  # all agree on "7+"
        weights[kind] = w
        loss = policy_loss(logprobs, w, A3)
        parts = torch.autograd.grad(loss, list(policy.parameters()))
        gradients[kind] = torch.cat([part.flatten() for part in parts])
    assert (weights["min"] - weights["orth"]).abs().max() > 1e-3
    assert (gradients["min"] - gradients["off"]).abs().max() > 1e-3
    assert_close(gradients["min"], gradients["orth"])
    assert_close(gradients["min"], gradients["none"])


# What the paper derives, on numbers
def test_section4_two_trajectories():
    # Â = −A and A, A = 3; a shared token of ratio ρ = 2; the other tokens' ratios multiply to
    # u_1 = ½ and u_2 = 4. The gradient at the shared log-probability x, of −loss:
    #   factorised  ½ (−A ρ + A ρ) = 0
    #   seq         ½ (−A ρ u_1 + A ρ u_2) = A ρ (u_2 − u_1) / 2 = 3 · 2 · 3.5 / 2 = 10.5
    A = tensor([[-3.0, 3.0]])
    mask = torch.ones(1, 2, 2).bool()
    for loss, clip_eps, want in [("dr_grpo", INF, 0.0), ("prefix", None, 0.0), ("seq", None, 10.5)]:
        x = tensor(2.0).log().requires_grad_()
        logprobs = torch.stack([x.expand(2), tensor([0.5, 4.0]).log()], -1)[None]  # (1,2,2)
        w = effective_weights(loss, logprobs, logprobs * 0, A, mask, clip_eps, max_length=1)
        policy_loss(logprobs, w, A).backward()
        assert_close(-x.grad, tensor(want))


def one_step(tokens, weights, advantages, eta):
    """log p before and after a step on the logits of p = (.6, .3, .1), from one-token completions."""
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
    kl = (after.exp() * (after - before)).sum().item()
    assert kl == pytest.approx(0.5 * eta**2 * 0.1044, rel=1e-3)
    # with equal weights nothing is left, and nothing moves
    before, after = one_step([0, 0], [2.0, 2.0], [-1.0, 1.0], eta)
    assert_close(after, before)


def test_cor32_equal_weights_move_the_log_odds_all_the_same():
    # Outputs a and b, both with weight ½ and Â = 2, a mean over 2: the logits move by
    # η ½ [(e_a − p) + (e_b − p)], the log-odds of a and b by
    # η ½ [(1 − 1.2) − (1 − .6)] = −0.3 η: not 0, although the weights are equal
    for eta in (0.01, 1.0):
        before, after = one_step([0, 1], [0.5, 0.5], [2.0, 2.0], eta)
        moved = (after - before)[0] - (after - before)[1]
        assert_close(moved, tensor(-0.3 * eta))


COR33 = {  # loss, ratios of two tokens of three trajectories, |Σ Â w| / 3 with Â = (1, 1, −2)
    "does not cancel": ("seq", [[1, 2], [1, 3], [1, 4]], 1),  # 2 + 3 − 2 · 4 = −3
    "first inner step": ("seq", [[1, 1], [1, 1], [1, 1]], 0),
    "identical completions": ("seq", [[2, 3], [2, 3], [2, 3]], 0),  # 6 + 6 − 2 · 6
    "unequal weights by accident": ("seq", [[1, 1], [1, 3], [1, 2]], 0),  # 1 + 3 − 2 · 2
    # s = sqrt(r_1 r_2) = 2, 2 and ½, each outside 1 ± 0.04 on the side of its Â
    "a fully clipped group": ("gspo", [[1, 4], [4, 1], [1, 0.25]], 0),
}


@pytest.mark.parametrize("name", COR33)
def test_cor33_sequence_weights_do_not_cancel_but_for_exceptions(name):
    loss, ratios, want = COR33[name]
    log_r = tensor([ratios]).log()
    w = effective_weights(loss, log_r, log_r * 0, A3, log_r < INF, max_length=1)
    assert_close(net_push(w, A3), tensor([[want, want]]))


X = torch.zeros(1, 2, 3)
A2 = torch.zeros(1, 2)
REFUSED = {
    "unknown loss 'ppo'": lambda: effective_weights("ppo", X, X, A2, X == 0),
    "unknown transform 'on'": lambda: transform_weights(X, A2, X == 0, "on"),
    "lr must be at least 0": lambda: Config(lr=NAN),
    "a mask of floats": lambda: effective_weights("seq", X, X, A2, X),
    "a column of advantages": lambda: policy_loss(X, X, A2[..., None]),
}


@pytest.mark.parametrize("says", REFUSED)
def test_wrong_arguments_are_refused(says):
    with pytest.raises((ValueError, AssertionError)) as error:
        REFUSED[says]()
    assert error.type is AssertionError or says in str(error.value)


# ---- 8. Warm start
def test_warm_start_step_by_step(monkeypatch):
    monkeypatch.setattr(tokrl, "Policy", lambda generator: Policy(generator).double())
    task = TASKS["chain"]
    got = tokrl.warm_start(task, 5, steps=2)

    policy = Policy(generator(5, "initialisation")).double()
    adam = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    rng = random.Random("5 demonstrations")
    for lr in (2e-3, 1e-3):
        prompts = [rng.choice(task.prompts()) for _ in range(64)]
        scored = [logprobs_along(policy, p, task.demonstration(p, rng))[1] for p in prompts]
        adam.param_groups[0]["lr"] = lr
        adam.zero_grad()
        (-torch.cat(scored).mean()).backward()
        adam.step()
    assert_close(parameters(got), parameters(policy), 1e-7)
    another = tokrl.warm_start(task, 5, steps=2)
    assert another is not got and another.head.weight.requires_grad, "to be trained, not shared"


# ---- 9. Collect and update
def test_share_reward_by_hand():
    # Group 1: of 5, 6, 5, 5 three are copies, and 6 / 3 = 2. Group 2 has each completion once, and
    # does not see the first.
    tokens = torch.tensor([[[5, 1], [6, 1], [5, 1], [5, 1]], [[5, 1], [6, 1], [5, 2], [7, 1]]])
    got = tokrl.share_reward(tokens, tensor([[6, 6, 6, 0], [1, 0, 1, 1]]))
    assert_close(got, tensor([[2, 6, 2, 0], [1, 0, 1, 1]]))


def test_collect_draws_samples_and_rewards_as_configured(monkeypatch):
    monkeypatch.setattr(Task, "reward", lambda self, prompt, text: int(prompt[0]) + 10 * len(text))
    config = Config(task="chain", fork=3, group_size=5, prompts=200)
    inputs = (Policy(generator(0, "test")), TASKS["chain"], config, generator(0, "sampling"))
    prompts, tokens, rewards = tokrl.collect(*inputs)
    texts = [decode(row) for row in prompts]
    assert tokens.shape == (200, 5, 7)
    assert 65 < len(set(texts)) < 84  # 84 (1 − e^(−200/84)) = 76
    agree = (tokens == tokens[:, :1]).all(1)
    assert agree[:, :3].all() and agree[:, 3].float().mean() < 0.7
    for b in range(200):
        want = [int(texts[b][0]) + 10 * len(decode(row)) for row in tokens[b]]
        assert rewards[b].tolist() == want
    assert not torch.equal(tokrl.collect(*inputs)[0], prompts), "others, the next time"


# Copies, unequal lengths, a sampled PAD; nobody reaches the eighth place. The first group shares
# four tokens, the second one.
PROMPT_TOKENS = tokrl.prompt_tokens(["75=", "31="])
FIRST = ["7+5=1", "7+5=1", "7+5=_2", "7+5=", "7+5=9", "7+5=1"]
SECOND = ["3", "3+1=", "3", "3", "31==4", "3+4="]
TOKENS = tokrl.completion_tokens(FIRST + SECOND, 8).unflatten(0, (2, 6))
REWARDS = tensor([[1, 1, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0]])
ROLLOUT = (PROMPT_TOKENS, TOKENS, REWARDS)


def update_by_hand(policy, reference, optimizer, config):
    """tokrl.update on parts that are checked above, with all eight places and no row left out."""
    anchor = every_logprob(reference, PROMPT_TOKENS, TOKENS).detach()
    mask = tokrl.completion_mask(TOKENS)
    share = config.duplicates == "share"
    rewards = tokrl.share_reward(TOKENS, REWARDS) if share else REWARDS
    A = tokrl.group_advantages(rewards)
    acts = torch.ones(2, 1, 8).bool()
    if config.at != "all":
        acts = tokrl.shared_tokens(TOKENS)[:, None] == (config.at == "shared")
    total_push = 0.0
    for inner in range(config.inner_steps):
        every = every_logprob(policy, PROMPT_TOKENS, TOKENS)  # (2,6,8,V)
        log_p = every.gather(-1, TOKENS[..., None])[..., 0]
        if inner == 0:
            old = log_p.detach()  # of the policy that sampled, at every inner step
        off = effective_weights(config.loss, log_p, old, A, mask, config.clip_eps)
        w = torch.where(acts, transform_weights(off, A, mask, config.transform), off)
        terms = (every.exp() * (every - anchor)).sum(-1)
        kl = sum(terms[b, i][mask[b, i]].mean() / 12 for b in range(2) for i in range(6))
        optimizer.zero_grad()
        (policy_loss(log_p, w, A) + config.kl * kl).backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        assert norm > config.max_grad_norm, "the limit on the norm bites"
        optimizer.step()
        total_push += net_push(w, A)[:, : config.fork].mean().item()
    return total_push


UPDATES = {
    "seq min": Config(transform="min"),
    "seq min at shared": Config(transform="min", at="shared"),
    "seq orth at rest": Config(transform="orth", at="rest"),
    "prefix, fork 8 of 8": Config(loss="prefix", fork=7),
    "cispo, fork 0": Config(loss="cispo", fork=0),
    "gspo, wide clip, much kl": Config(loss="gspo", clip_eps=0.3, kl=0.7),
    "grpo share, no kl": Config(loss="grpo", duplicates="share", kl=0.0),
}


@pytest.mark.parametrize("name", UPDATES)
def test_update_step_by_step(name):
    config = replace(UPDATES[name], inner_steps=4, lr=3e-3, max_grad_norm=0.01)
    mine = random_policy(1)
    its = random_policy(1)
    reference = random_policy(2)
    adam = torch.optim.AdamW(mine.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0)
    want = update_by_hand(mine, reference, adam, config)
    got = tokrl.update(its, reference, tokrl.adamw(its, config.lr), config, *ROLLOUT)
    assert got == pytest.approx(want, rel=1e-6, abs=1e-12, nan_ok=True)
    assert_close(parameters(its), parameters(mine), 1e-7)


def test_update_stops_before_the_optimizer_where_the_gradient_is_not_finite():
    policy = random_policy(1)
    policy.head.weight.register_hook(lambda gradient: gradient * INF)
    with pytest.raises(FloatingPointError, match="gradient norm (inf|nan) at inner step 1$"):
        tokrl.update(policy, random_policy(2), tokrl.adamw(policy, 1e-3), Config(), *ROLLOUT)
    assert_close(parameters(policy), parameters(random_policy(1)))


# ---- 10. Exact measures, against sums written out
def with_prompts(name, solutions: dict) -> Task:
    """The task with these prompts only, and so many of their solutions."""
    table = {prompt: TASKS[name].table[prompt][:n] for prompt, n in solutions.items()}
    return replace(TASKS[name], name=f"some {name}", table=table)


MIXED = with_prompts("commute", {"75=": 2, "41=": 1})


@pytest.mark.parametrize("task", [*TASKS.values(), MIXED], ids=lambda task: task.name)
def test_evaluate_by_brute_force(task):
    policy = random_policy(3)
    start = random_policy(4)
    rows = []
    for prompt in task.prompts():
        right = task.solutions(prompt)
        now = np.array([logprobs_along(policy, prompt, y)[1].sum().item() for y in right])
        then = np.array([logprobs_along(start, prompt, y)[1].sum().item() for y in right])
        row = [np.exp(now).sum(), NAN, NAN]  # one solution has neither entropy nor drift
        if len(right) > 1:
            q = np.exp(now) / np.exp(now).sum()
            row[1] = -(q * np.log(q)).sum() / math.log(len(q))
            row[2] = np.mean([abs(a - b) for a, b in itertools.combinations(now - then, 2)])
        rows.append(row)
    means = tensor(rows).nanmean(0).tolist()
    want = dict(zip(["accuracy", "solution_entropy", "solution_drift"], means, strict=True))
    assert tokrl.evaluate(policy, task, start) == pytest.approx(want, rel=1e-7, nan_ok=True)


TAXED = [(MIXED, 2), (MIXED, 0), (with_prompts("split", {"06=": 15}), 6), (TASKS["add"], 1)]


@pytest.mark.parametrize("task, fork", TAXED, ids=lambda x: getattr(x, "name", x))
def test_learning_tax_by_brute_force(task, fork):
    after = random_policy(3)
    before = random_policy(4)
    by_prompt = []
    for prompt in task.prompts():
        openings = []
        for solution in task.solutions(prompt):
            p, _ = logprobs_along(after, prompt, solution)
            q, _ = logprobs_along(before, prompt, solution)
            kl = (p.exp() * (p - q)).sum(-1)  # the tokens of the solution, and its EOS
            openings.append(kl[: max(fork, 1)].sum().item())
        by_prompt.append(np.mean(openings))
    then = tokrl.opening_logprobs(before, task, fork)
    now = tokrl.opening_logprobs(after, task, fork)
    assert tokrl.learning_tax(now, then, task) == pytest.approx(np.mean(by_prompt), rel=1e-9)


@pytest.mark.parametrize("prompts, shown", [("a", "a"), ("ab", "ab"), ("abcdefg", "adg")])
def test_answers_show_three_prompts_from_start_to_now(prompts, shown, monkeypatch):
    task = replace(TASKS["commute"], table={prompt: ("w", "x", "y", "z") for prompt in prompts})
    start = tensor([[0.1, 0.1, 0.1, 0.1]])
    now = tensor([[0.1, 0.2, 0.05, 0.4]])
    monkeypatch.setattr(tokrl, "solution_logprobs", lambda p, _: p.log().expand(len(prompts), 4))
    line = "  z  10% →  40%   x  10% →  20%   w  10% →  10%   wrong  60% →  25%"
    assert tokrl.answers(now, start, task).split("\n") == [prompt + line for prompt in shown]


# ---- 11. Train
TINY = Config(prompts=2, group_size=3, inner_steps=2, steps=1, lr=1e-3)


def untrained(task, seed: int) -> Policy:
    return Policy(generator(seed, task.name))


@pytest.fixture
def quick(monkeypatch):
    """Runs start untrained, know three prompts, and any completion with a 1 in it is right."""
    task = with_prompts("commute", {"75=": 2, "41=": 2, "96=": 2})
    monkeypatch.setitem(TASKS, "commute", task)
    monkeypatch.setattr(tokrl, "warm_start", untrained)
    monkeypatch.setattr(Task, "reward", lambda self, prompt, text: float("1" in text))
    return task


@pytest.mark.parametrize("fork, steps", [(0, 3), (1, 81)])
def test_train_step_by_step(fork, steps, quick):
    config = replace(TINY, fork=fork, steps=steps)
    result = tokrl.train(config, 7)

    start = untrained(quick, 7)
    policy = untrained(quick, 7)
    optimizer = tokrl.adamw(policy, 1e-3)
    draws = generator(7, "sampling")
    rows = []
    tax = 0.0
    push = 0.0 if fork else NAN
    for k in range(steps + 1):
        if k > 0:
            before = tokrl.opening_logprobs(policy, quick, fork)
            rollout = tokrl.collect(policy, quick, config, draws)
            push += tokrl.update(policy, start, optimizer, config, *rollout)
            tax += tokrl.learning_tax(tokrl.opening_logprobs(policy, quick, fork), before, quick)
        if k % max(1, steps // 40) == 0 or k == steps:  # every second of 81, and the last
            row = {"step": k, "learning_tax": tax, "net_push": push}
            rows.append(row | tokrl.evaluate(policy, quick, start))
    for name in rows[0]:
        want = [row[name] for row in rows]
        assert result["curves"][name] == pytest.approx(want, rel=1e-4, abs=1e-9, nan_ok=True)
        want = np.mean([row[name] for row in rows if row["step"] > 0.75 * steps])
        assert result["final"][name] == pytest.approx(want, rel=1e-4, abs=1e-9, nan_ok=True)
    assert (result["config"], result["seed"]) == (asdict(config), 7)
    assert result["answers"] == tokrl.answers(policy, start, quick)


def test_train_stops_where_the_last_inner_step_has_broken_the_policy(quick):
    with pytest.raises(FloatingPointError, match="not finite after rollout 1$"):
        tokrl.train(replace(TINY, inner_steps=1, lr=INF), 0)


def test_train_twice_gives_the_same_bits(quick):
    assert tokrl.train(TINY, 3) == tokrl.train(TINY, 3)


GOLDEN = {
    "off": [2.32437, 0.118262, 2.19203, 0.543977, 0.451588],
    "min": [0.0, 0.0938773, 0.808869, 0.837251, 0.423585],
}


@pytest.mark.slow
@pytest.mark.parametrize("transform", GOLDEN)
def test_train_ends_where_it_ended_when_recorded(transform):
    # a start that differed by rounding (1e-7) ended within 1e-4 of these: 1e-2 leaves ample room
    final = tokrl.train(Config(steps=20, transform=transform), 100)["final"]
    got = [final[name] for name in tokrl.MEASURES]
    assert got == pytest.approx(GOLDEN[transform], rel=1e-2, abs=1e-5)


# ---- 12. A finished run is its file
def test_run_path_depends_on_configuration_seed_code_and_torch(tmp_path, monkeypatch):
    configs = [Config(), Config(kl=0.1), Config(max_grad_norm=INF), Config(duplicates="share")]
    configs += [Config(transform="min"), Config(transform="min", at="rest")]
    paths = {tokrl.run_path(tmp_path, config, seed) for config in configs for seed in (0, 1)}
    for module, name in [(tokrl, "CODE"), (torch, "__version__")]:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, "another")
            paths.add(tokrl.run_path(tmp_path, Config(), 0))
    assert len(paths) == 6 * 2 + 2
    assert tokrl.run_path(tmp_path, Config(fork=2, at="rest"), 0) in paths, "2, and off: no other"


RUN = {"config": {"max_grad_norm": INF}, "net_push": [NAN, 0.5]}


def test_save_run_writes_plain_json(tmp_path):
    tokrl.save_run(tmp_path / "a.json", RUN)
    want = '{"config": {"max_grad_norm": "inf"}, "net_push": [null, 0.5]}\n'
    assert (tmp_path / "a.json").read_text() == want


def test_save_run_on_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def write_half(self, text):
        self.write_bytes(text[:9].encode())
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="No space"):
        tokrl.save_run(tmp_path / "a.json", RUN)
    assert os.listdir(tmp_path) == []


# ---- 13. The program
def test_program_refuses_wrong_options(capsys):
    for line in ["--loss ppo", "--group-size 1", "--seeds 3-1", "--stepz 3"]:
        with pytest.raises(SystemExit, match="2"):
            tokrl.main(line.split())
        assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_program_names_the_packages_of_requirements_txt():
    packages = (HERE / "requirements.txt").read_text().split()
    line = "\n# dependencies = [" + ", ".join(f'"{package}"' for package in packages) + "]\n"
    assert line in (HERE / "tokrl.py").read_text(encoding="utf-8")


@pytest.fixture
def mine(tmp_path) -> Path:
    """A student's copy of the program, mine.py, with a short warm start."""
    text = (HERE / "tokrl.py").read_text(encoding="utf-8").replace("steps=300", "steps=3")
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    (tmp_path / "toy_tasks.py").write_bytes((HERE / "toy_tasks.py").read_bytes())
    return tmp_path / "mine.py"


def start(program: Path, line: str) -> subprocess.Popen:
    """One run at a time, on a console that knows no "→", with a notebook's backend."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii", "MPLBACKEND": "module://no"}
    options = {"cwd": program.parent, "env": os.environ | settings, "start_new_session": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, program, "--prompts", "2", *line.split()], **options)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kills a group of processes")
def test_program_killed_and_given_again_trains_what_is_missing_to_the_same_bytes(mine, tmp_path):
    line = "--steps 40 --seeds 0-1 --out "
    process = start(mine, line + "killed")
    while process.poll() is None and not list(tmp_path.glob("killed/*.json")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

    out, err = start(mine, line + "killed").communicate()
    assert out.startswith("3 runs to train, 1 kept from before\n"), err
    assert "\noff, seed 0:\n12=  " in out and "\non, seed 0:\n12=  " in out
    start(mine, line + "whole").communicate()
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("whole/*")}
    assert len(whole) == 4 + 1  # and the figure
    assert {path.name: path.read_bytes() for path in tmp_path.glob("killed/*")} == whole


@pytest.mark.slow
def test_program_names_a_run_that_diverges_and_finishes_the_others(monkeypatch, tmp_path, capfd):
    healthy = Config(steps=2, prompts=2)
    arms = {"off": healthy, "on": replace(healthy, lr=1e9), "orth": replace(healthy, kl=0.1)}
    monkeypatch.setattr(tokrl, "arms_of", lambda *_, **__: arms)
    assert tokrl.main(["--out", str(tmp_path)]) == 1
    out, err = capfd.readouterr()
    assert "\noff  " in out and "\north  " in out
    assert err.count("on, seed 0: loss ") == 1 and "Traceback" not in err
    assert err.endswith("Not finished: on. The same command retries.\n")


@pytest.mark.slow
def test_program_shows_a_student_s_own_error_and_trains_a_copy_with_the_copy(mine):
    text = mine.read_text(encoding="utf-8")
    mine.write_text(text.replace("advantages(credited)", "advantages(credted)"), encoding="utf-8")
    process = start(mine, "--steps 2")
    _, err = process.communicate()
    assert process.returncode == 1
    assert "NameError: name 'credted' is not defined" in err
    assert 'mine.py", line ' in err
