"""Tests of tokrl.py and toy_tasks.py, and the paper's statements as an executable audit.

    python -m pytest                    everything, three to four minutes on two cores
    python -m pytest -m "not slow"      without those that train or start the program, about 25 seconds
    python test_tokrl.py                the audit's table: what each place of the paper says, and what is measured

Each audit_* function returns (place, statement, measured, verdict); the test beside it asserts the verdict, "fails"
included: a verdict is computed from what is measured, never written down beforehand.
"""

import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from dataclasses import replace
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
    cancellation_residual,
    effective_weights,
    evaluate,
    group_advantages,
    named_generator,
    policy_loss,
    sample_groups,
    token_logprobs,
    transform_weights,
)
from toy_tasks import EOS, LARGER_FIRST, PAD, TASKS, VOCAB, decode, encode

HERE = Path(__file__).resolve().parent
COMMUTE = TASKS["commute"]
torch.set_num_threads(1)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def random_policy(seed: int = 0) -> Policy:
    """A policy in float64 that has learnt nothing."""
    return Policy(named_generator(seed, "test")).double()


# ---- Tasks, by enumeration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_task_is_what_it_says(task):
    prompts = task.prompts()
    solutions = [s for p in prompts for s in task.solutions(p)]
    counts = {"commute": (72, 144, 2, 8), "split": (10, 276, 2, 7), "chain": (84, 168, 2, 7), "add": (100, 100, 1, 4)}
    found = (len(set(prompts)), len(solutions), task.fork, task.max_completion)
    assert found == counts.get(task.name, found)  # a task that a reader adds has no entry
    assert len(prompts) == len(set(prompts)) <= 150 and len(solutions) <= 400
    assert len({len(p) for p in prompts}) == 1
    assert task.max_completion > max(map(len, solutions)) + 1 and 0 <= task.fork < task.max_completion
    for prompt in prompts:
        right = task.solutions(prompt)
        assert len(set(right)) == len(right) >= 1
        assert decode(encode(prompt)) == prompt
        for solution in right:
            assert task.reward(prompt, solution) == 1.0
            for wrong in (
                solution + "_",
                solution + "0",
                solution[:-1],
                " " + solution,
                "_" + solution,
                solution + ".",
            ):
                assert task.reward(prompt, wrong) == float(wrong in right)
            for i, c in itertools.product(range(len(solution)), VOCAB):
                changed = solution[:i] + c + solution[i + 1 :]
                assert task.reward(prompt, changed) == float(changed in right)


def test_solutions_are_right_by_arithmetic():
    """Another reading of each task, by splitting strings and adding numbers."""
    total = lambda text: sum(map(int, text.split("+")))
    for prompt in COMMUTE.prompts():
        for s in COMMUTE.solutions(prompt):
            left, right = s.split("=")
            assert sorted(left.split("+")) == sorted(prompt[:2]) and total(left) == int(right)
    everything = {"+".join(digits) for n in (2, 3) for digits in itertools.product("123456789", repeat=n)}
    for prompt in TASKS["split"].prompts():
        assert set(TASKS["split"].solutions(prompt)) == {s for s in everything if total(s) == int(prompt[:-1])}
    for prompt in TASKS["chain"].prompts():
        a, b, c = map(int, prompt[:-1].split("+"))
        assert TASKS["chain"].solutions(prompt) == [f"{a + b}+{c}={a + b + c}", f"{a}+{b + c}={a + b + c}"]
    for prompt in TASKS["add"].prompts():
        assert [int(s) for s in TASKS["add"].solutions(prompt)] == [total(prompt[:-1])]
    for prompt in LARGER_FIRST.prompts():
        (only,) = LARGER_FIRST.solutions(prompt)
        assert only in COMMUTE.solutions(prompt) and int(only[0]) > int(only[2])


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_demonstrations_are_half_wrong_and_spread_evenly(task):
    rng, prompt = random.Random(0), task.prompts()[len(task.prompts()) // 2]
    demonstrations = Counter(task.demonstration(prompt, rng) for _ in range(4000))
    right = [demonstrations[s] for s in task.solutions(prompt)]
    assert abs(sum(right) / 4000 - 0.5) < 0.04  # 5 standard deviations
    mean = sum(right) / len(right)
    assert all(abs(count - mean) < 5 * math.sqrt(mean) for count in right)
    assert all(len(d) <= task.max_completion - 1 for d in demonstrations)


def test_encode_decode_and_reward_on_any_text():
    assert encode("7+5=12") == [VOCAB.index(c) for c in "7+5=12"]
    assert decode([2, PAD, 3, EOS, 4]) == "0_1" and decode([2, 3]) == "01" and decode(torch.tensor([EOS])) == ""
    with pytest.raises(ValueError, match="'x'"):
        encode("7x")
    with pytest.raises(ValueError, match="99="):
        COMMUTE.solutions("99=")
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(chr(rng.randrange(1, 0x3000)) for _ in range(rng.randrange(12)))
        assert COMMUTE.reward(text, text) == 0.0 == COMMUTE.reward("75=", text)


# ---- Policy and sampler ---------------------------------------------------------------------------------------------


def test_policy_is_causal_and_scores_the_right_place():
    policy = random_policy()
    tokens = torch.randint(len(VOCAB), (3, 9), generator=named_generator(0, "tokens"))
    logits = policy(tokens)
    for t in range(9):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % len(VOCAB)
        moved = (policy(changed) - logits).abs().amax(-1) > 1e-12
        assert not moved[:, :t].any() and moved[:, t:].all()
    # token_logprobs, written out with a loop: log π(a_t | prompt, a_<t)
    prompts, completions = tokens[:, :3], tokens[:, None, 3:]
    got = token_logprobs(policy, prompts, completions)
    for row, t in itertools.product(range(3), range(6)):
        distribution = policy(tokens[row : row + 1, : 3 + t])[0, -1].softmax(-1)
        assert got[row, 0, t].item() == pytest.approx(distribution[tokens[row, 3 + t]].log().item(), abs=1e-12)


@pytest.mark.parametrize("fork", [0, 1, 3, 7])
def test_sampler_shares_the_fork_and_scores_like_a_rescoring(fork):
    policy, prompts = (
        Policy(named_generator(1, "test")),
        torch.randint(2, 12, (40, 3), generator=named_generator(0, "p")),
    )
    tokens, old, mask = sample_groups(policy, prompts, 5, fork, 8, named_generator(0, "sampling"))
    assert tokens.shape == old.shape == mask.shape == (40, 5, 8) and mask.dtype == torch.bool
    shared = (tokens == tokens[:, :1]).all(dim=1)  # (B,T)
    assert shared[:, :fork].all()
    alive = mask[:, :, fork].all(dim=1)  # groups that did not end within the opening
    assert not shared[alive, fork].any(), "five draws out of 14 tokens agree in every group"
    scored = token_logprobs(policy, prompts, tokens)
    assert ((scored - old) * mask).abs().max() < 1e-5
    assert (old[~mask] == 0).all() and (tokens[~mask] == PAD).all() and not (tokens[mask] == PAD).all()
    for row, kept in zip(
        tokens.flatten(0, 1).tolist(), mask.flatten(0, 1).tolist()
    ):  # the mask ends with the first EOS
        n = row.index(EOS) + 1 if EOS in row else 8
        assert kept == [True] * n + [False] * (8 - n)


def test_a_group_of_one_is_a_plain_sample():
    prompt = torch.tensor([encode("75=")])
    tokens, old, mask = sample_groups(random_policy(), prompt, 1, 0, 8, named_generator(0, "sampling"))
    assert tokens.shape == (1, 1, 8) and old.dtype == torch.float64


def test_samples_follow_the_enumerated_distribution():
    """One prompt, two tokens, 14² outcomes: a chi-square over them, with and without a fork, for a group's last."""
    policy = Policy(named_generator(2, "test"))
    prompt = torch.tensor([encode("75=")])
    pairs = torch.cartesian_prod(torch.arange(14), torch.arange(14))[None]  # (1,196,2)
    p = token_logprobs(policy, prompt, pairs).sum(-1).exp()[0]
    p[pairs[0, :, 0] == EOS] = 0.0  # one outcome: ended at once
    expected = torch.cat([p, (1 - p.sum())[None]]).detach().numpy() * 20_000
    for fork in (0, 1):
        tokens, *_ = sample_groups(policy, prompt.expand(20_000, 3), 2, fork, 2, named_generator(fork, "sampling"))
        last = tokens[:, -1]
        index = torch.where(last[:, 0] == EOS, 196, last[:, 0] * 14 + last[:, 1])
        counts = torch.bincount(index, minlength=197).numpy()
        big = expected > 5
        chi2 = ((counts[big] - expected[big]) ** 2 / expected[big]).sum()
        assert chi2 < big.sum() + 5 * math.sqrt(2 * big.sum())


# ---- Advantages, weights, transforms, loss: by hand -----------------------------------------------------------------


def test_group_advantages_by_hand():
    # rewards 1 0 0 1: mean 1/2, std with G−1: sqrt(4 · 1/4 / 3) = 0.577350; ±0.5 / 0.577450 = ±0.865876
    rewards = tensor([[1, 0, 0, 1], [1, 1, 1, 1], [0.3, 0.3, 0.3, 0.3], [1, 0, 0, 0]])
    got = group_advantages(rewards)
    assert torch.allclose(got[0], tensor([1, -1, -1, 1]) * 0.5 / (math.sqrt(1 / 3) + 1e-4), atol=1e-12)
    assert (got[1:3] == 0).all(), "a group of equal rewards: exactly 0, not rounding dust"
    # rewards 1 0 0 0: mean 1/4, std 0.5; (0.75, −0.25, −0.25, −0.25) / 0.5001. A global mean or std would give others
    assert torch.allclose(got[3], tensor([0.75, -0.25, -0.25, -0.25]) / 0.5001, atol=1e-12)
    assert torch.equal(group_advantages(rewards, normalize=False)[3], tensor([0.75, -0.25, -0.25, -0.25]))
    assert (group_advantages(torch.full((1, 7), 0.1, dtype=torch.float32), normalize=False) == 0).all()
    assert group_advantages(rewards).sum(1).abs().max() < 1e-12


# Two groups of two trajectories, lengths 2 3 | 1 3, one of them with a hole; ratios below, inside and above 1 ± 0.2.
MASK = torch.tensor([[[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [0, 1, 1]]])
RATIO = tensor([[[1.5, 0.5, 9.0], [1.5, 1.1, 0.5]], [[0.7, 9.0, 9.0], [9.0, 1.3, 0.9]]])
ADVANTAGES = tensor([[1.0, -1.0], [-2.0, 2.0]])
OLD = tensor([[[-1.0, -2.0, -3.0], [-0.5, -0.1, -4.0]], [[-1.5, -0.3, -0.2], [-0.7, -2.5, -0.9]]])
# n = 2 3 | 1 2, L = 3, BG = 4, M = 8. keep: Â > 0 drops ratios above 1.2, Â < 0 drops ratios below 0.8
BY_HAND = {
    "reinforce": [[[1 / 3, 1 / 3, 0], [1 / 3, 1 / 3, 1 / 3]], [[1 / 3, 0, 0], [0, 1 / 3, 1 / 3]]],
    "grpo": [[[0, 0.5 / 2, 0], [1.5 / 3, 1.1 / 3, 0]], [[0, 0, 0], [0, 0, 0.9 / 2]]],
    "dr_grpo": [[[0, 0.5 / 3, 0], [1.5 / 3, 1.1 / 3, 0]], [[0, 0, 0], [0, 0, 0.9 / 3]]],
    "dapo": [[[0, 0.5 * 4 / 8, 0], [1.5 * 4 / 8, 1.1 * 4 / 8, 0]], [[0, 0, 0], [0, 0, 0.9 * 4 / 8]]],
    "grpo_sym": [[[0, 0, 0], [0, 1.1 / 3, 0]], [[0, 0, 0], [0, 0, 0.9 / 3]]],
    "cispo": [
        [[1.2 * 4 / 8, 0.5 * 4 / 8, 0], [1.2 * 4 / 8, 1.1 * 4 / 8, 0.5 * 4 / 8]],
        [[0.7 * 4 / 8, 0, 0], [0, 1.2 * 4 / 8, 0.9 * 4 / 8]],
    ],
    # s = sqrt(1.5 · 0.5) = 0.866 kept (Â > 0); cbrt(1.5 · 1.1 · 0.5) = 0.938 dropped at 1 − 0.04 (Â < 0);
    # 0.7 dropped (Â < 0); sqrt(1.3 · 0.9) = 1.082 dropped at 1 + 0.04 (Â > 0)
    "gspo": [[[math.sqrt(0.75) / 2, math.sqrt(0.75) / 2, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]],
    "seq": [[[0.75 / 3, 0.75 / 3, 0], [0.825 / 3] * 3], [[0.7 / 3, 0, 0], [0, 1.17 / 3, 1.17 / 3]]],
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.double()], ids=["int", "bool", "float"])
def test_weights_by_hand(loss, mask):
    got = effective_weights(loss, OLD + RATIO.log(), OLD, ADVANTAGES, mask)
    assert torch.allclose(got, tensor(BY_HAND[loss]), atol=1e-12)
    assert (got[MASK == 0] == 0).all()


def test_weights_with_other_clips_and_lengths():
    weights = lambda loss, **kw: effective_weights(loss, OLD + RATIO.log(), OLD, ADVANTAGES, MASK, **kw)
    # an asymmetric clip (0.2, 0.6): 1.5 and 1.3 are now kept with Â > 0; 0.5 and 0.7 with Â < 0 still are not
    assert torch.allclose(
        weights("dr_grpo", clip_eps=(0.2, 0.6)),
        tensor([[[1.5, 0.5, 0], [1.5, 1.1, 0]], [[0, 0, 0], [0, 1.3, 0.9]]]) / 3,
    )
    assert torch.allclose(
        weights("dr_grpo", clip_eps=(0.6, 0.2)),
        tensor([[[0, 0.5, 0], [1.5, 1.1, 0.5]], [[0.7, 0, 0], [0, 0, 0.9]]]) / 3,
    )
    assert torch.allclose(
        weights("grpo_sym", clip_eps=(0.2, 0.6)), tensor([[[1.5, 0, 0], [1.5, 1.1, 0]], [[0, 0, 0], [0, 1.3, 0.9]]]) / 3
    )
    assert torch.allclose(weights("cispo", clip_eps=(0.2, 4.0)), RATIO * MASK / 2)
    # gspo: 0.938 is inside 1 ± 0.07, 1.082 is inside 1 ± 0.1; 0.7 never is
    s = tensor([[[math.sqrt(0.75) / 2] * 3, [0.825 ** (1 / 3) / 3] * 3], [[0.0] * 3, [math.sqrt(1.17) / 2] * 3]]) * MASK
    assert torch.allclose(weights("gspo", clip_eps=0.1), s)
    for loss in LOSSES:
        unclipped = weights(loss, clip_eps=math.inf)
        assert (unclipped[MASK == 1] > 0).all()
        scale = 3 / 5 if loss in ("reinforce", "dr_grpo", "grpo_sym", "seq") else 1.0
        assert torch.allclose(weights(loss, clip_eps=math.inf, max_length=5), unclipped * scale)
    for loss in LOSSES:
        assert (effective_weights(loss, OLD, OLD, ADVANTAGES, MASK * 0) == 0).all(), "nobody is scored"
    # B = 1, G = 2, one scored token: BG / M = 2, for dapo and cispo alike
    one = torch.tensor([[[1, 0, 0], [0, 0, 0]]])
    for loss in ("dapo", "cispo"):
        w = effective_weights(loss, OLD[:1], OLD[:1], ADVANTAGES[:1], one)
        assert torch.equal(w, tensor([[[2, 0, 0], [0, 0, 0]]]))


def test_the_clip_asks_for_the_sign_of_the_advantage_only():
    # Â = ½, −½, 0 at ratios 0.5 and 1.5: dropped are (½, 1.5) and (−½, 0.5); with Â = 0 nothing is
    ratio = tensor([[[0.5, 1.5]] * 3])
    w = effective_weights(
        "dr_grpo", ratio.log(), ratio * 0, tensor([[0.5, -0.5, 0.0]]), torch.ones(1, 3, 2), max_length=1
    )
    assert torch.allclose(w, tensor([[[0.5, 0.0], [0.0, 1.5], [0.5, 1.5]]]))


@pytest.mark.parametrize("loss", LOSSES)
def test_clip_boundaries_are_kept(loss):
    """A ratio of exactly 1 ± ε is not past the clip. The ε are powers of two so that 1 ± ε is exact."""
    for ratio, advantage in ((1.25, 1.0), (0.75, -1.0)):
        logprobs = tensor([[[math.log(ratio)], [0.0]]])
        weights = effective_weights(
            loss, logprobs, logprobs * 0, tensor([[advantage, -advantage]]), torch.ones(1, 2, 1), clip_eps=0.25 + 1e-15
        )
        assert weights[0, 0, 0] > 0.7


def test_transforms_by_hand():
    w = tensor([[[1.0, 4.0, 5.0, 6.0], [2.0, 3.0, 7.0, 8.0], [6.0, 2.0, 9.0, 9.0]]])
    mask = torch.tensor([[[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]]])  # all, two, one, nobody alive
    A = tensor([[1.0, 1.0, -2.0]])
    assert torch.equal(transform_weights(w, A, mask, "off"), w * mask)
    # Eq. 17: min over the alive: min(1, 2, 6) = 1; min(4, 2) = 2; the lone survivor keeps 7; nobody: 0
    assert torch.equal(transform_weights(w, A, mask, "min"), tensor([[[1.0, 2, 0, 0], [1, 0, 7, 0], [1, 2, 0, 0]]]))
    zero = tensor([[[0.0], [2.0], [3.0]]])  # a clipped trajectory is alive: it counts, and silences its group
    assert torch.equal(transform_weights(zero, A, torch.ones(1, 3, 1), "min"), zero * 0)
    # Eq. 18, first place: Âᵀw = 1 + 2 − 12 = −9, ‖Â‖² = 6, w + 1.5 Â = (2.5, 3.5, 3)
    # second, over trajectories 1 and 3: Âᵀw = 4 − 4 = 0, unchanged; third: 7 − 7 = 0
    orth = transform_weights(w, A, mask, "orth")
    assert torch.allclose(orth, tensor([[[2.5, 4, 0, 0], [3.5, 0, 0, 0], [3, 2, 0, 0]]]), atol=1e-12)
    # second place with other advantages: Âᵀw = 8 − 2 = 6, ‖Â‖² = 5, w − 1.2 Â = (4 − 2.4, 2 + 1.2)
    again = transform_weights(w, tensor([[2.0, -1.0, -1.0]]), mask, "orth")
    assert torch.allclose(again[0, :, 1], tensor([1.6, 0.0, 3.2]), atol=1e-12)
    # equal rewards: ‖Â‖ = 0, orth returns w, never NaN
    assert torch.equal(transform_weights(w, A * 0, mask, "orth"), w * mask)
    # ‖Â‖ = 0 over the alive only
    assert torch.equal(transform_weights(w, tensor([[0.0, 1.0, 0.0]]), mask, "orth")[0, :, 1], tensor([4.0, 0, 2]))
    # groups do not see each other
    two = torch.cat([w, w + 1]), torch.cat([A, -A]), torch.cat([mask, mask])
    for kind in TRANSFORMS:
        assert torch.equal(transform_weights(*two, kind)[:1], transform_weights(w, A, mask, kind))


def random_case(loss_seed: int, b=3, g=5, t=6, spread=0.3):
    """Random ragged masks with a hole, ratios e^±spread, advantages of random rewards; float64."""
    generator = torch.Generator().manual_seed(loss_seed)
    old = -3 * torch.rand(b, g, t, dtype=torch.float64, generator=generator)
    logprobs = old + spread * torch.randn(b, g, t, dtype=torch.float64, generator=generator)
    rewards = torch.tensor([[1.0, 0, 1, 0, 0]] * b, dtype=torch.float64)[:, :g]
    mask = torch.arange(t) < torch.randint(2, t + 1, (b, g, 1), generator=generator)
    mask[0, 0, 1] = False
    return logprobs, old, group_advantages(rewards), mask


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradient_is_advantage_times_weight(loss, transform):
    """The one form: d loss / d logprob = −Â w̃ / BG, where w̃ carries no gradient of its own."""
    logprobs, old, A, mask = random_case(0)
    logprobs.requires_grad_()
    policy_loss(logprobs, old, A, mask, loss, transform).backward()
    w = transform_weights(effective_weights(loss, logprobs, old, A, mask), A, mask, transform)
    assert not w.requires_grad
    assert torch.allclose(logprobs.grad, -A[..., None] * w.detach() / 15, atol=1e-15)
    assert logprobs.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_advantages_may_carry_a_graph_and_it_stays_out_of_the_weights(loss):
    logprobs, old, A, mask = random_case(1)
    assert not effective_weights(loss, logprobs, old, A.requires_grad_(), mask).requires_grad


def test_policy_loss_value_by_hand():
    # one group, reinforce, L = 2: −(1/2) [1 · ½ · (−1) + 1 · ½ · (−3) + (−1) · ½ · (−2)] = −½ (−½ − 1.5 + 1) = 0.5
    logprobs = tensor([[[-1.0, -3.0], [-2.0, -math.inf]]])
    loss = policy_loss(logprobs, logprobs, tensor([[1.0, -1.0]]), torch.tensor([[[1, 1], [1, 0]]]), "reinforce")
    assert loss.item() == pytest.approx(0.5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_padding_changes_nothing_and_eos_does(loss, transform):
    logprobs, old, A, mask = random_case(2)
    value = lambda *x: policy_loss(*x, loss, transform, max_length=6).item()
    pad = lambda x, fill: torch.cat([x, torch.full((3, 5, 4), fill, dtype=x.dtype)], dim=-1)
    assert value(pad(logprobs, -7.0), pad(old, -1.0), A, pad(mask, False)) == pytest.approx(
        value(logprobs, old, A, mask), abs=1e-14
    )
    last = (mask.cumsum(-1) == mask.sum(-1, keepdim=True)) & mask  # the place of EOS
    assert value(logprobs, old, A, mask & ~last) != pytest.approx(value(logprobs, old, A, mask), abs=1e-6)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_splitting_a_batch_into_groups_changes_nothing_but_for_the_token_mean(loss, transform):
    case = random_case(3)
    whole = policy_loss(*case, loss, transform).item()
    parts = [policy_loss(*(x[i : i + 1] for x in case), loss, transform).item() for i in range(3)]
    if loss in ("dapo", "cispo"):  # these divide by the token count of the batch
        assert abs(whole - sum(parts) / 3) > 1e-4
    else:
        assert whole == pytest.approx(sum(parts) / 3, abs=1e-14)


def test_cancellation_residual_by_hand():
    # |1 · 2 + (−1) · 5| / 2 = 1.5, |1 · 3 − 3| / 2 = 0
    assert torch.equal(
        cancellation_residual(tensor([[[2.0, 3.0], [5.0, 3.0]]]), tensor([[1.0, -1.0]])), tensor([[1.5, 0.0]])
    )
    # relative: 3 / 7 and 0 / 6, mean 3/14; a place where nothing pushes counts as 0
    assert tokrl.relative_residual(tensor([[[2.0, 3.0], [5.0, 3.0]]]), tensor([[1.0, -1.0]])) == pytest.approx(3 / 14)
    assert tokrl.relative_residual(tensor([[[0.0], [0.0]]]), tensor([[1.0, -1.0]])) == 0.0


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_stay_finite(loss, transform, dtype):
    """Ratios of e^±50, a group of equal rewards, an all-zero mask row, −inf and NaN off the mask."""
    log_ratio = tensor([[[50.0, 50, 50], [-50, -50, 0], [50, -50, 1]], [[0, 0, 0], [1, 2, 3], [50, 50, 50]]]).to(dtype)
    mask = torch.tensor([[[1, 1, 1], [1, 1, 0], [0, 0, 0]], [[1, 0, 1], [1, 1, 1], [0, 0, 0]]])
    logprobs, old = log_ratio - 60, torch.full_like(log_ratio, -60.0)
    logprobs[mask == 0], old[mask == 0] = -math.inf, math.nan
    logprobs.requires_grad_()
    A = torch.stack([group_advantages(tensor([[1.0, 0, 0]]))[0], tensor([0.0, 0, 0])]).to(dtype)
    value = policy_loss(logprobs, old, A, mask, loss, transform)
    value.backward()
    assert math.isfinite(value.item()) and torch.isfinite(logprobs.grad).all()
    assert (logprobs.grad[mask == 0] == 0).all() and (logprobs.grad[1] == 0).all()


def test_a_clipped_weight_is_0_even_where_the_ratio_overflows():
    """e^200 is inf in float32; a clip that bites makes it 0, not inf · 0."""
    logprobs = torch.tensor([[[200.0], [0.0]]])
    for loss in ("grpo", "dr_grpo", "dapo", "grpo_sym", "cispo", "gspo"):
        w = effective_weights(loss, logprobs, logprobs * 0, torch.tensor([[1.0, -1.0]]), torch.ones(1, 2, 1))
        assert w[0, 0, 0] == (1.2 if loss == "cispo" else 0.0)


def test_an_empty_trajectory_adds_nothing_and_still_counts():
    logprobs, old, A, mask = random_case(4)
    mask[1, 2] = False
    for loss in ("reinforce", "grpo", "gspo", "seq"):
        logprobs.grad = None
        policy_loss(logprobs.requires_grad_(), old, A, mask, loss).backward()
        assert (logprobs.grad[1, 2] == 0).all()
        w = effective_weights(loss, logprobs, old, A, mask)
        assert torch.allclose(logprobs.grad, -A[..., None] * w / 15)


# ---- Expected gradients by enumeration: 3 tokens, 2 steps, every group of G -----------------------------------------


def enumerated_bias(loss: str, transform: str, off_policy: bool, G: int = 2) -> float:
    """‖E[gradient] − (G−1)/G ∇E[R]‖ / ‖(G−1)/G ∇E[R]‖, the expectation by summing over all 9^G groups."""
    generator = torch.Generator().manual_seed(5)
    root, second = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((3,), (3, 3)))
    behind = [
        x - 0.3 * torch.randn(x.shape, dtype=torch.float64, generator=generator) * off_policy for x in (root, second)
    ]
    root.requires_grad_(), second.requires_grad_()
    reward = tensor([1.0, 0, 0, 1, 0.5, 0, 0, 0, 1])  # of the sequences 00 01 02 10 ... 22

    def sequence_logprobs(root, second):  # (9, 2)
        return torch.stack([root.log_softmax(0).repeat_interleave(3), second.log_softmax(1).flatten()], dim=-1)

    new, old = sequence_logprobs(root, second), sequence_logprobs(*behind).detach()
    total = 0.0
    for group in itertools.product(range(9), repeat=G):
        group = list(group)
        probability = old[group].sum().exp()
        advantages = group_advantages(reward[group][None], normalize=False)
        total = total - probability * policy_loss(
            new[group][None],
            old[group][None],
            advantages,
            torch.ones(1, G, 2),
            loss,
            transform,
            clip_eps=math.inf,
            max_length=1,
        )
    got = torch.cat([x.flatten() for x in torch.autograd.grad(total, (root, second), retain_graph=True)])
    want = torch.autograd.grad((new.sum(-1).exp() * reward).sum() * (G - 1) / G, (root, second))
    want = torch.cat([x.flatten() for x in want])
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("loss, off_policy", [("reinforce", False), ("dr_grpo", False), ("seq", False), ("seq", True)])
@pytest.mark.parametrize("G", [2, 3])
def test_expected_gradient_is_unbiased(loss, off_policy, G):
    assert enumerated_bias(loss, "off", off_policy, G) < 1e-12


@pytest.mark.parametrize(
    "loss, transform, low, high",
    [
        ("seq", "min", 0.05, 0.30),
        ("seq", "orth", 0.05, 0.30),
        ("dr_grpo", "off", 0.01, 0.30),
        ("reinforce", "off", 0.01, 0.30),
    ],
)
def test_expected_gradient_is_biased_off_policy(loss, transform, low, high):
    assert low < enumerated_bias(loss, transform, off_policy=True) < high


# ---- Exact measures, against sums written out -----------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_measures_by_brute_force(task):
    policy, start = random_policy(3), random_policy(4)

    def logp(policy, prompt, text):  # one sequence at a time, no padding
        ids = encode(prompt) + encode(text) + [EOS]
        logits = policy(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        return sum(logits[t - 1, ids[t]].item() for t in range(len(prompt), len(ids)))

    accuracy, entropy, drift = [], [], []
    for prompt in task.prompts():
        now, then = ([logp(x, prompt, y) for y in task.solutions(prompt)] for x in (policy, start))
        p = np.exp(now)
        accuracy.append(p.sum())
        if len(p) > 1:
            q = p / p.sum()
            entropy.append(-(q * np.log(q)).sum() / math.log(len(q)))
            moved = [a - b for a, b in zip(now, then)]
            drift.append(np.mean([abs(a - b) for a, b in itertools.combinations(moved, 2)]))
    got = evaluate(policy, task, start)
    assert got["accuracy"] == pytest.approx(np.mean(accuracy), rel=1e-9)
    if entropy:
        assert got["solution_entropy"] == pytest.approx(np.mean(entropy), rel=1e-9)
        assert got["solution_drift"] == pytest.approx(np.mean(drift), rel=1e-9)
        assert (
            evaluate(policy, task)["solution_drift"] is None and evaluate(policy, task, policy)["solution_drift"] == 0.0
        )
    else:
        assert got["solution_entropy"] is None and got["solution_drift"] is None


def test_a_prompt_with_one_solution_has_no_entropy_and_does_not_count():
    mixed = replace(COMMUTE, table={"75=": COMMUTE.table["75="], "41=": COMMUTE.table["41="][:1]})
    both = replace(COMMUTE, table={"75=": COMMUTE.table["75="]})
    policy, start = random_policy(3), random_policy(4)
    got, want = evaluate(policy, mixed, start), evaluate(policy, both, start)
    assert got["solution_entropy"] == pytest.approx(want["solution_entropy"])
    assert got["solution_drift"] == pytest.approx(want["solution_drift"])
    assert got["accuracy"] != pytest.approx(want["accuracy"])


@pytest.mark.parametrize(
    "name, fork", [("commute", 2), ("commute", 0), ("split", 2), ("split", 6), ("add", 1), ("chain", 3)]
)
def test_learning_tax_by_brute_force(name, fork):
    task, after, before = TASKS[name], random_policy(3), random_policy(4)

    def kl(prompt, opening, t):
        rows = torch.tensor([encode(prompt) + opening[:t]])
        p, q = (x(rows)[0, -1].log_softmax(-1) for x in (after, before))
        return (p.exp() * (p - q)).sum().item()

    want = np.mean(
        [
            np.mean(
                [
                    sum(kl(p, ids, t) for t in range(min(max(fork, 1), len(ids))))
                    for ids in (encode(y) + [EOS] for y in task.solutions(p))
                ]
            )
            for p in task.prompts()
        ]
    )
    new, old = (tokrl.opening_logprobs(x, task, fork) for x in (after, before))
    share = tokrl.opening_table(task, fork)[2]
    assert tokrl.learning_tax(new, old, share) == pytest.approx(want, rel=1e-6) and want > 0
    assert tokrl.learning_tax(old, old, share) == 0.0


# ---- Training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_combination_takes_steps_without_a_warning(task):
    policy, generator = Policy(named_generator(0, "test")), named_generator(0, "sampling")
    reference, optimizer = Policy(named_generator(0, "test")), tokrl.adamw(policy, 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loss, transform, fork in itertools.product(LOSSES, TRANSFORMS, (0, task.fork)):
            config = Config(task.name, loss, transform, fork=fork, group_size=4, prompts=3, inner_steps=2)
            rollout = tokrl.collect(policy, task, config, generator)
            rewards = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
            seen = tokrl.update(policy, reference, optimizer, config, *rollout[:4], rewards)
            assert all(map(math.isfinite, seen.values())) and ("residual" in seen) == (fork > 0)
            if fork and transform != "off":
                assert seen["residual"] < 1e-6


def test_update_refuses_a_rollout_of_another_policy():
    policy = Policy(named_generator(0, "test"))
    config = Config(group_size=2, prompts=2)
    rollout = tokrl.collect(Policy(named_generator(1, "test")), COMMUTE, config, named_generator(0, "sampling"))
    with pytest.raises(FloatingPointError, match="inner step 1: a log-ratio is"):
        tokrl.update(policy, policy, tokrl.adamw(policy, 1e-3), config, *rollout)


@pytest.mark.slow
def test_a_short_run_learns_and_repeats_to_the_bit():
    rows = []
    config = Config(transform="min", steps=40, lr=3e-4)
    run = tokrl.train(config, 100, rows.append)
    assert 0.15 < rows[0]["accuracy"] < 0.5 and rows[0]["solution_entropy"] > 0.9 and rows[0]["solution_drift"] == 0
    assert rows[-1]["accuracy"] > rows[0]["accuracy"] + 0.2 and rows[-1]["step"] == 40
    steps = []
    tokrl.warm_start.cache_clear()
    evaluate_more = lambda row: steps.append(evaluate(Policy(named_generator(0, "test")), COMMUTE))  # moves nothing
    again = tokrl.train(config, 100, evaluate_more)
    assert len(steps) == 41 and {k: v for k, v in again.items() if k != "timing"} == {
        k: v for k, v in run.items() if k != "timing"
    }
    last = [r["accuracy"] for r in rows if r["step"] > 30]
    assert run["final"]["accuracy"] == pytest.approx(sum(last) / len(last), rel=1e-5) and len(last) == 10
    assert run["curves"]["learning_tax"] == sorted(run["curves"]["learning_tax"]) and run["curves"]["reward"][0] is None
    adapted = tokrl.train(replace(config, steps=2, adapt=2), 100)
    assert adapted["curves"]["step"] == [0, 1, 2, 3, 4]
    assert adapted["curves"]["solution_entropy"][3] is None and adapted["curves"]["residual"][3] is None


def test_divergence_names_step_and_quantity(monkeypatch):
    monkeypatch.setattr(tokrl, "WARM_STEPS", 1)
    tokrl.warm_start.cache_clear()
    with pytest.raises(FloatingPointError, match=r"rollout \d+, .*(loss|KL|gradient norm|log-ratio|learning tax)"):
        tokrl.train(Config(lr=1e30, steps=5), 100)
    tokrl.warm_start.cache_clear()


# ---- The audit: what each place of the paper says, and what is measured ---------------------------------------------

SHARED = 2  # the audited group shares "7+"


def shared_group(lengths: list[int], noise: float, shared_ratio: float = 1.0, seed: int = 0):
    """A group on the real transformer in float64: G completions of "75=" that share their first two tokens.

    Returns logits (G,T,V) with gradient kept, log-probabilities (1,G,T), old ones, advantages (1,G), mask. `noise` is
    the size of the log-ratios of the unshared tokens; the shared ones have one ratio for the whole group.
    """
    generator, G, T = torch.Generator().manual_seed(seed), len(lengths), max(lengths)
    tokens = torch.randint(2, 12, (1, G, T), generator=generator)
    tokens[:, :, :SHARED] = torch.tensor(encode("7+"))
    prompt = torch.tensor([encode("75=")])
    rows = torch.cat([prompt.expand(G, -1), tokens[0, :, :-1]], dim=-1)
    logits = random_policy(seed)(rows)[:, prompt.shape[1] - 1 :]
    logits.retain_grad()
    logprobs = logits.log_softmax(-1).gather(-1, tokens[0, ..., None]).squeeze(-1)[None]
    log_ratio = noise * torch.randn(1, G, T, dtype=torch.float64, generator=generator)
    log_ratio[..., :SHARED] = math.log(shared_ratio)
    mask = torch.arange(T) < torch.tensor(lengths)[None, :, None]
    advantages = group_advantages(tensor([[1.0, 0, 0, 1, 0]])[:, :G])
    return logits, logprobs, logprobs.detach() - log_ratio, advantages, mask


def shared_push(loss: str, transform: str, *situation) -> float:
    """|Σ_i gradient at the shared logits| / Σ_i |gradient|, as autograd leaves it: 0 cancels, 1 does not at all."""
    logits, *rest = shared_group(*situation)
    policy_loss(*rest, loss, transform, clip_eps=0.2).backward()
    pushes = logits.grad[:, :SHARED]  # (G, 2, V): one row of logits per trajectory, the same numbers in each
    w = transform_weights(effective_weights(loss, *rest, clip_eps=0.2), rest[2], rest[3], transform)
    by_weights = -(rest[2][..., None] * w).mean(dim=1)[0, :SHARED, None] * score(logits)
    assert torch.allclose(pushes.sum(0), by_weights, atol=1e-14), "autograd and the weights disagree"
    total = pushes.norm(dim=-1).sum().item()
    return pushes.sum(0).norm().item() / total if total else 0.0  # a fully clipped group pushes nothing


def score(logits):
    """∇_logits log π(shared token): one-hot − p, at the shared places, (2, V)."""
    return torch.nn.functional.one_hot(torch.tensor(encode("7+")), len(VOCAB)) - logits[0, :SHARED].detach().softmax(-1)


SITUATIONS = {  # lengths, noise of the log-ratios, ratio of the shared tokens
    "on-policy": ([5, 5, 5, 5, 5], 0.0, 1.0),
    "unequal lengths": ([3, 5, 4, 6, 5], 0.0, 1.0),
    "off-policy": ([5, 5, 5, 5, 5], 0.05, 1.05),
    "a clip bites": ([5, 5, 5, 5, 5], 0.0, 1.8),
}


def audit_eq2(loss: str):
    """Eq. 2 at a token that the whole group shares, for one loss."""
    pushes = {name: shared_push(loss, "off", *situation) for name, situation in SITUATIONS.items()}
    broken = [name for name, push in pushes.items() if push > 1e-3]
    assert all(push > 1e-3 or push < 1e-12 for push in pushes.values())
    needs = {"unequal lengths": "lengths are equal", "off-policy": "ratios are equal", "a clip bites": "no clip bites"}
    verdict = "holds only if " + " and ".join(needs[name] for name in broken) if broken else "holds"
    return "Eq. 2", f"{loss}: a shared token's pushes cancel", measured(pushes), verdict


def measured(numbers: dict) -> str:
    return ", ".join(
        f"{name} {value:.1e}" if 0 < abs(value) < 1e-3 else f"{name} {value:.3g}" for name, value in numbers.items()
    )


@pytest.mark.parametrize(
    "loss, verdict",
    [
        ("reinforce", "holds"),
        ("cispo", "holds"),
        ("grpo_sym", "holds"),
        ("grpo", "holds only if lengths are equal and no clip bites"),
        ("dr_grpo", "holds only if no clip bites"),
        ("dapo", "holds only if no clip bites"),
        ("gspo", "holds only if lengths are equal and ratios are equal and no clip bites"),
        ("seq", "holds only if ratios are equal"),
    ],
)
def test_eq2(loss, verdict):
    assert audit_eq2(loss)[3] == verdict


def test_own_losses_satisfy_eq2():
    """What a reader adds to LOSSES (an exercise asks for a clipped loss that satisfies Eq. 2)."""
    published = {"reinforce", "grpo", "dr_grpo", "dapo", "grpo_sym", "cispo", "gspo", "seq"}
    assert published <= set(LOSSES)
    log_r = tensor([0.02, 3.0, 4.0]).log1p().view(3, 1, 1).expand(3, 2, 1)  # ratios 1.02, 4 and 5
    for loss in set(LOSSES) - published:
        assert audit_eq2(loss)[3] == "holds", loss
        w = effective_weights(loss, log_r, log_r * 0, tensor([[1.0, -1.0]] * 3), torch.ones(3, 2, 1))
        assert torch.equal(w[1], w[2]), f"{loss}: past the clip a larger ratio must not count for more"
        unmoved = effective_weights(loss, log_r * 0, log_r * 0, tensor([[1.0, -1.0]] * 3), torch.ones(3, 2, 1))
        assert not torch.equal(w[0], unmoved[0]), f"{loss}: within the clip the ratio must count"


@pytest.mark.parametrize("transform", ["min", "orth"])
@pytest.mark.parametrize("loss", LOSSES)
def test_eq2_holds_under_the_transforms(loss, transform):
    for name, situation in SITUATIONS.items():
        logits, *rest = shared_group(*situation)
        w = transform_weights(effective_weights(loss, *rest), rest[2], rest[3], transform)
        assert cancellation_residual(w, rest[2])[:, :SHARED].max() < 1e-12, name
        policy_loss(*rest, loss, transform).backward()
        assert logits.grad[:, :SHARED].sum(0).abs().max() < 1e-12, name


def audit_section4_factorised():
    """Section 4, two trajectories, Â = ∓A, token-factorised weights."""
    A, rho = 0.7, 1.3
    logprobs = tensor([[[math.log(rho), 0.4], [math.log(rho), -0.6]]])
    w = effective_weights(
        "dr_grpo", logprobs, logprobs * 0, tensor([[-A, A]]), torch.ones(1, 2, 2), math.inf, max_length=1
    )
    residual = cancellation_residual(w, tensor([[-A, A]]))[0, 0].item()
    return (
        "§4",
        "token-factorised: (ρ/2)(Â₁ + Â₂) = 0",
        f"residual {residual:.1e}",
        "holds" if residual < 1e-15 else "fails",
    )


def audit_section4_coupled():
    """Section 4, the same with sequence-coupled weights: A ρ |u₂ − u₁| / 2."""
    worst, generator = 0.0, torch.Generator().manual_seed(0)
    for A, rho, *u in (torch.rand(100, 4, dtype=torch.float64, generator=generator) + 0.5).tolist():
        logprobs = tensor([[[math.log(rho), math.log(u[0])], [math.log(rho), math.log(u[1])]]])
        advantages = tensor([[-A, A]])
        w = effective_weights("seq", logprobs, logprobs * 0, advantages, torch.ones(1, 2, 2), max_length=1)
        worst = max(worst, abs(cancellation_residual(w, advantages)[0, 0].item() - A * rho * abs(u[1] - u[0]) / 2))
    return (
        "§4",
        "sequence-coupled: A ρ |u₂ − u₁| / 2",
        f"worst of 100 errors {worst:.1e}",
        "holds" if worst < 1e-14 else "fails",
    )


def audit_section4_clip():
    """Section 4: a clip that looks at the sign of Â breaks the cancellation, a symmetric one repairs it."""
    pushes = {loss: shared_push(loss, "off", *SITUATIONS["a clip bites"]) for loss in ("dr_grpo", "grpo_sym")}
    holds = pushes["dr_grpo"] > 0.1 and pushes["grpo_sym"] < 1e-12
    return "§4", "an asymmetric clip breaks it, GRPO-fix repairs it", measured(pushes), "holds" if holds else "fails"


def test_section4():
    assert [audit()[3] for audit in (audit_section4_factorised, audit_section4_coupled, audit_section4_clip)] == [
        "holds"
    ] * 3


def flat_gradient(output, policy):
    """d output / d parameters as one vector."""
    gradients = torch.autograd.grad(output, list(policy.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.flatten()
            for p, g in zip(policy.parameters(), gradients)
        ]
    )


def quadratic_form(policy, history, g) -> float:
    """gᵀFg at one place: the variance under π of the logits' change J g, J by one backward pass per logit."""
    logits = policy(history)[0, -1]
    change, p = torch.stack([flat_gradient(z, policy) @ g for z in logits]), logits.detach().softmax(-1)
    return ((p * change**2).sum() - (p * change).sum() ** 2).item()


def group_gradient(transform: str, own_term_only: bool):
    """(policy, history h*, ascent direction g) for a group under seq, off-policy, at its first shared token."""
    policy, history = random_policy(0), torch.tensor([encode("75=")])
    _, _, old, advantages, mask = shared_group(*SITUATIONS["off-policy"])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 12, (1, 5, 5), generator=generator)
    tokens[:, :, :SHARED] = torch.tensor(encode("7+"))
    logprobs = token_logprobs(policy, history, tokens)
    if own_term_only:  # Eq. 2's term: what the first shared token itself pushes
        w = transform_weights(effective_weights("seq", logprobs, old, advantages, mask), advantages, mask, transform)
        return policy, history, flat_gradient((advantages * w[..., 0] * logprobs[..., 0]).mean(), policy)
    return policy, history, -flat_gradient(policy_loss(logprobs, old, advantages, mask, "seq", transform), policy)


def audit_prop31():
    """Prop. 3.1: the KL after one step against ½ η² gᵀFg, on the transformer, in parameter space."""
    policy, history, g = group_gradient("off", own_term_only=True)
    gFg, before = quadratic_form(policy, history, g), policy(history)[0, -1].log_softmax(-1).detach()
    start, points = torch.nn.utils.parameters_to_vector(policy.parameters()).detach(), []
    for eta in (
        2 * torch.logspace(-9.9, -5.1, 9, dtype=torch.float64) / gFg
    ).sqrt():  # so that KL lies in 1e-10 .. 1e-5
        torch.nn.utils.vector_to_parameters(start + eta * g, policy.parameters())
        after = policy(history)[0, -1].log_softmax(-1).detach()
        d = before - after
        kl = (after.exp() * (torch.expm1(d) - d)).sum().item()  # Σ p⁺ (e^d − 1 − d): no cancellation of digits
        if 1e-10 < kl < 1e-5:
            points.append((math.log(eta), math.log(kl), kl / (0.5 * eta.item() ** 2 * gFg)))
    slope = np.polyfit([p[0] for p in points], [p[1] for p in points], 1)[0]
    worst = max(abs(ratio - 1) for *_, ratio in points)
    holds = len(points) >= 5 and abs(slope - 2) < 0.01 and worst < 0.01
    return (
        "Prop. 3.1",
        "KL after a step = ½ η² gᵀFg",
        f"slope {slope:.4f}, worst ratio error {worst:.1e} at {len(points)} η",
        "holds" if holds else "fails",
    )


def audit_prop31_other_tokens():
    """The objection to Prop. 3.1: shared parameters carry other tokens' gradients to h*, with a residual of 0."""
    forms = {kind: quadratic_form(*group_gradient(kind, own_term_only=False)) for kind in ("off", "min")}
    own = quadratic_form(*group_gradient("min", own_term_only=True))
    holds = forms["min"] < 1e-3 * forms["off"]
    return (
        "Prop. 3.1",
        "where the residual is 0, π(·|h*) does not move",
        f"gᵀFg at h*: own term {own:.1e}, whole step {forms['min']:.3g} under min, {forms['off']:.3g} under off",
        "holds" if holds else "fails",
    )


def test_prop31():
    assert audit_prop31()[3] == "holds"
    assert audit_prop31_other_tokens()[3] == "fails"
    assert quadratic_form(*group_gradient("min", own_term_only=True)) < 1e-20


def log_odds_change(p: list[float], kappa: tuple[float, float], eta: float = 1e-6) -> float:
    """Change of log p_a/p_b per η when outputs a and b of a softmax are pushed with weights κ: ½ Σ κ_i (e_i − p)."""
    p = tensor(p)
    z, e = p.log(), torch.eye(3, dtype=torch.float64)
    z = z + eta * 0.5 * (kappa[0] * (e[0] - p) + kappa[1] * (e[1] - p))
    return ((z[0] - z[1] - (p[0] / p[1]).log()) / eta).item()


def audit_cor32_even():
    """Cor. 3.2 where both solutions are equally likely: Δ log-odds = η c (κ_a − κ_b), here with c = ½."""
    changes = {k: log_odds_change([0.45, 0.45, 0.1], k) for k in ((1.0, 1.0), (1.2, 1.0), (1.0, 2.0))}
    worst = max(abs(change - 0.5 * (a - b)) for (a, b), change in changes.items())
    return (
        "Cor. 3.2",
        "Δ log-odds = η c (κ_a − κ_b)",
        f"p = (.45, .45, .1), c = ½: worst error {worst:.1e}",
        "holds" if worst < 1e-6 else "fails",
    )


def audit_cor32_collapse():
    """Cor. 3.2: κ_a > κ_b for ever, where outputs are pushed as often as they are sampled, and where equally often."""
    entropy, e = {}, torch.eye(3, dtype=torch.float64)
    for name in ("pushed when sampled", "pushed equally often"):
        z = tensor([0.0, 0.0, -1.0])
        for _ in range(3000):
            p = z.softmax(0)
            often = p[:2] if name == "pushed when sampled" else tensor([0.5, 0.5])
            z = z + often[0] * 1.1 * (e[0] - p) + often[1] * (e[1] - p)
        q = z[:2].log_softmax(0)
        entropy[name] = -(q.exp() * q).sum().item() / math.log(2)
    collapsed = [name for name, h in entropy.items() if h < 0.05]
    return (
        "Cor. 3.2",
        "κ_a > κ_b for ever: entropy goes to 0",
        "entropy after 3,000 steps: " + measured(entropy),
        "holds" if len(collapsed) == 2 else f"holds only if {collapsed[0]}" if collapsed else "fails",
    )


def audit_cor32_lead():
    """Cor. 3.2 says that equal κ are enough for no drift; here each output is pushed as often as it is sampled."""
    entropy, e = {}, torch.eye(3, dtype=torch.float64)
    for start in ((0.45, 0.45, 0.1), (0.6, 0.3, 0.1)):
        z = tensor(start).log()
        for _ in range(3000):
            p = z.softmax(0)
            z = z + p[0] * (e[0] - p) + p[1] * (e[1] - p)
        q = z[:2].log_softmax(0)
        entropy[f"p = {start}"] = -(q.exp() * q).sum().item() / math.log(2)
    even, lead = entropy.values()
    return (
        "Cor. 3.2",
        "equal κ for ever: entropy stays",
        "entropy after 3,000 steps: " + measured(entropy),
        "fails" if even < 0.999 else "holds" if lead > 0.9 else "holds only if both are equally likely",
    )


def audit_cor32_counterexample():
    """Cor. 3.2 where they are not: equal weights, p = (.6, .3, .1), and yet the odds move by −0.3 η."""
    change = log_odds_change([0.6, 0.3, 0.1], (1.0, 1.0))
    return (
        "Cor. 3.2",
        "equal κ: no drift",
        f"p = (.6, .3, .1): {change:.6f} η",
        "holds" if abs(change) < 1e-6 else "holds only if c(x) is one number for both",
    )


def test_cor32():
    assert audit_cor32_even()[3] == "holds"
    assert audit_cor32_collapse()[3] == "holds only if pushed when sampled"
    assert audit_cor32_lead()[3] == "holds only if both are equally likely"
    assert audit_cor32_counterexample()[3] == "holds only if c(x) is one number for both"
    assert log_odds_change([0.6, 0.3, 0.1], (1.0, 1.0)) == pytest.approx(-0.3, abs=1e-6)


def audit_cor33_random():
    """Cor. 3.3: random unclipped sequence-coupled weights do not cancel."""
    generator, n = torch.Generator().manual_seed(0), 100_000
    log_ratio = 0.1 * torch.randn(n, 4, 3, dtype=torch.float64, generator=generator)
    rewards = torch.rand(n, 4, dtype=torch.float64, generator=generator)
    A = group_advantages(rewards, normalize=False)
    w = effective_weights("seq", log_ratio, log_ratio * 0, A, torch.ones(n, 4, 3), max_length=1)
    residual = cancellation_residual(w, A)[:, 0]
    count = int((residual < 1e-9).sum())
    return (
        "Cor. 3.3",
        "seq off-policy: cancellation has measure zero",
        f"{count} of 100,000 draws under 1e-9, smallest {residual.min():.1e}",
        "holds" if count == 0 else "fails",
    )


def audit_cor33_necessary():
    """Equal weights suffice for cancellation; they are not necessary."""
    u, A = tensor([[[1.0], [3.0], [2.0]]]), tensor([[1.0, 1.0, -2.0]])
    residual = cancellation_residual(u, A).item()
    return (
        "Cor. 3.3",
        "only equal weights cancel",
        f"Â = (1, 1, −2), u = (1, 3, 2): residual {residual:.0e}",
        ("fails" if residual == 0 else "holds"),
    )


def audit_cor33_positive_probability():
    """Cases of positive probability that cancel: the first inner step, a fully clipped group, identical completions."""
    A, ones = tensor([[1.0, -1.0]]), torch.ones(1, 2, 2)
    old = tensor([[[-1.0, -2.0], [-1.0, -0.5]]])
    shift = tensor([[[0.0, 1.0], [0.0, -1.0]]])
    same = tensor([[[0.3, 0.4], [0.3, 0.4]]])
    cases = {
        "first inner step": effective_weights("seq", old, old, A, ones),
        "identical completions": effective_weights("seq", same, same * 0, A, ones),
        "fully clipped group": effective_weights("gspo", old + shift, old, A, ones),
    }
    residuals = {name: cancellation_residual(w, A)[0, 0].item() for name, w in cases.items()}
    return (
        "Cor. 3.3",
        "so in training non-cancellation is the norm",
        measured(residuals),
        "holds only if ratios are continuous" if max(residuals.values()) < 1e-15 else "holds",
    )


def test_cor33():
    audits = (audit_cor33_random, audit_cor33_necessary, audit_cor33_positive_probability)
    assert [audit()[3] for audit in audits] == ["holds", "fails", "holds only if ratios are continuous"]


PLACES = {"min": "Eq. 17", "orth": "Eq. 18"}


def audit_transform_cancels(kind: str):
    """Exact cancellation for every loss, off-policy, with ragged masks, where at least two trajectories are alive."""
    worst = 0.0
    for seed, loss in itertools.product(range(20), LOSSES):
        logprobs, old, A, mask = random_case(seed)
        w = transform_weights(effective_weights(loss, logprobs, old, A, mask), A, mask, kind)
        worst = max(worst, cancellation_residual(w, A)[mask.all(dim=1)].max().item())
    return (
        PLACES[kind],
        f"{kind}: shared tokens cancel under every loss",
        f"worst residual {worst:.1e}",
        ("holds" if worst < 1e-12 else "fails"),
    )


def audit_transform_stop_gradient(kind: str):
    """Let the gradient flow through the weights, and the shared token is pushed again."""
    logits, logprobs, old, A, mask = shared_group(*SITUATIONS["off-policy"])
    pushes = {}
    for name in ("stopped", "flowing"):
        logits.grad = None
        w = ((logprobs - old) * mask).sum(-1, keepdim=True).exp().expand_as(logprobs) * mask  # seq, with gradient
        w = transform_weights(w if name == "flowing" else w.detach(), A, mask, kind)
        (-(A[..., None] * w * logprobs).mean()).backward(retain_graph=True)
        pushes[name] = (logits.grad[:, :SHARED].sum(0).norm() / logits.grad[:, :SHARED].norm(dim=-1).sum()).item()
    holds = pushes["stopped"] < 1e-12 and pushes["flowing"] > 1e-3
    return PLACES[kind], f"{kind}: the stop-gradient is needed", measured(pushes), "holds" if holds else "fails"


def audit_transform_on_policy(kind: str):
    """On-policy with equal lengths all weights are equal, and the transform changes nothing."""
    _, logprobs, old, A, mask = shared_group(*SITUATIONS["on-policy"])
    worst = 0.0
    for loss in LOSSES:
        w = effective_weights(loss, logprobs, old, A, mask)
        worst = max(worst, (transform_weights(w, A, mask, kind) - w).abs().max().item())
    return (
        PLACES[kind],
        f"{kind}: no change on-policy at equal lengths",
        f"largest change {worst:.1e}",
        ("holds" if worst < 1e-12 else "fails"),
    )


def audit_transform_bias(kind: str):
    """The price: seq without a clip is the unbiased off-policy weight; the transform moves its expected gradient."""
    biases = {name: enumerated_bias("seq", name, off_policy=True) for name in ("off", kind)}
    return (
        PLACES[kind],
        f"{kind}: the expected gradient keeps its direction and size",
        "relative bias " + measured(biases),
        ("holds" if biases[kind] < 1e-9 else "fails"),
    )


@pytest.mark.parametrize("kind", ["min", "orth"])
def test_eq17_and_eq18(kind):
    audits = (audit_transform_cancels, audit_transform_stop_gradient, audit_transform_on_policy, audit_transform_bias)
    assert [audit(kind)[3] for audit in audits] == ["holds", "holds", "holds", "fails"]


def recorded() -> dict:
    return json.loads((HERE / "figures" / "failure-modes.json").read_text())["arms"]


def prediction_difference(name: str) -> tuple[float, float, float]:
    """off − on from the recorded runs, paired by seed, with its 95% interval."""
    arms = recorded()

    def value(arm, row):
        accuracy, i = arm["curves"]["accuracy"][row], tokrl.reached(arm, row)
        return {
            "rollouts to accuracy 0.9": arm["curves"]["step"][-1 if i is None else i],  # never: all of them
            "jitter (mean |second difference| of accuracy)": np.abs(np.diff(accuracy, 2)).mean(),
            "final accuracy": arm["final"]["accuracy"][row],
        }[name]

    off, on = ([value(arms[label], row) for row in range(len(arms[label]["seeds"]))] for label in ("off", "on"))
    return tokrl.bootstrap(off, on)


def audit_prediction(name: str):
    """One of the paper's three predictions, off against on, from the recorded runs."""
    difference, low, high = prediction_difference(name)
    if name == "final accuracy":  # the one where more is better
        better, worse = high < 0, low > 0
    else:
        better, worse = low > 0, high < 0
    verdict = "holds" if better else "fails" if worse else "fails (no difference seen)"
    return "predictions", f"{name}: better under min", f"off − on {difference:+.3g} [{low:+.3g}, {high:+.3g}]", verdict


PREDICTIONS = {  # the toy refutes the paper's three predictions; one of them with the opposite sign
    "rollouts to accuracy 0.9": "fails",
    "jitter (mean |second difference| of accuracy)": "fails (no difference seen)",
    "final accuracy": "fails (no difference seen)",
}


def test_predictions():
    assert {name: audit_prediction(name)[3] for name in PREDICTIONS} == PREDICTIONS


AUDIT = (
    [(audit_eq2, loss) for loss in LOSSES]
    + [
        (audit_section4_factorised,),
        (audit_section4_coupled,),
        (audit_section4_clip,),
        (audit_prop31,),
        (audit_prop31_other_tokens,),
        (audit_cor32_even,),
        (audit_cor32_collapse,),
        (audit_cor32_lead,),
        (audit_cor32_counterexample,),
        (audit_cor33_random,),
        (audit_cor33_necessary,),
        (audit_cor33_positive_probability,),
    ]
    + [
        (audit, kind)
        for kind in ("min", "orth")
        for audit in (
            audit_transform_cancels,
            audit_transform_stop_gradient,
            audit_transform_on_policy,
            audit_transform_bias,
        )
    ]
    + [(audit_prediction, name) for name in PREDICTIONS]
)


# ---- The command line -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, says",
    [
        ("--lr 0", "lr must be positive"),
        ("--lr -1", "lr must be positive"),
        ("--lr inf", "lr must be"),
        ("--lr nan", "lr must be"),
        ("--lr fast", "--lr"),
        ("--kl -0.1", "kl must be"),
        ("--kl inf", "kl must be"),
        ("--kl nan", "kl must be"),
        ("--clip-eps 0", "clip-eps must be"),
        ("--clip-eps -1", "clip-eps must be"),
        ("--clip-eps nan", "clip-eps must be"),
        ("--loss reinforce --clip-eps 0.2", "clip-eps does not apply to reinforce"),
        ("--loss seq --clip-eps inf", "clip-eps does not apply to seq"),
        ("--loss ppo", "gspo"),
        ("--task multiply", "commute"),
        ("--transform max", "orth"),
        ("--fork -1", "fork must be"),
        ("--fork 8", "fork must be below 8"),
        ("--task add --fork 4", "fork must be below 4"),
        ("--fork 1.5", "--fork"),
        ("--group-size 1", "group-size must be"),
        ("--prompts 0", "prompts must be"),
        ("--inner-steps 0", "inner-steps must be"),
        ("--steps 0", "steps must be"),
        ("--steps 1e3", "--steps"),
        ("--seeds 3-1", "0 <= A <= B"),
        ("--seeds -1", "--seeds"),
        ("--seeds a", "got 'a'"),
        ("--seeds 0-", "got '0-'"),
        ("--seeds 0-999999999999", "a thousand at most"),
        ("--experiment ablation", "frontier"),
        ("--experiment control --loss gspo", "leave it out"),
        ("--experiment control --transform on", "leave it out"),
        ("--experiment control --fork 2", "sets --fork itself"),
        ("--experiment frontier --lr 1e-3", "sets --lr itself"),
        ("--experiment group-size --prompts 4", "sets --prompts itself"),
        ("--experiment adapt --task split", "sets --task itself"),
        ("--experiment losses --clip-eps 0.3", "sets --clip-eps itself"),
        ("--experiment mechanism --transform on", "leave out --transform"),
        ("--experiment mechanism --seeds 0-7", "give --seeds a single number"),
        ("--experiment mechanism --fork 0", "--fork of at least 1"),
        ("--plot --steps 3", "leave out --steps"),
        ("--plot", "no results in runs for --plot;"),
        ("--plot --out nowhere", "no results in nowhere"),
        ("--step 3", "--step"),
        ("commute", "commute"),
        ("--out", "--out"),
        ("--out file", "file"),
        ("--out file/deep", "file"),
    ],
)
def test_a_wrong_command_line_gets_one_line_and_status_2(line, says, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    assert tokrl.main(line.split()) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("tokrl.py: ") and err.count("\n") == 1 and says in err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


X, A1 = torch.zeros(1, 2, 3), torch.zeros(1, 2)
TOKENS = torch.zeros(1, 2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: effective_weights("ppo", X, X, A1, X), "ppo"),
        (lambda: policy_loss(X, X, A1, X, "GSPO"), "GSPO"),
        (lambda: effective_weights("gspo", X[0], X, A1, X), "logprobs"),
        (lambda: effective_weights("gspo", X, X[..., :1], A1, X), "old_logprobs"),
        (lambda: effective_weights("gspo", X, X, A1[:, :1], X), "advantages"),
        (lambda: effective_weights("gspo", X, X, A1[0], X), "advantages"),
        (lambda: effective_weights("gspo", X, X, A1, X[0]), "mask"),
        (lambda: effective_weights("gspo", X, X, A1, X + 2), "0 and 1"),
        (lambda: effective_weights("gspo", X.long(), X, A1, X), "logprobs"),
        (lambda: effective_weights("gspo", X, X, A1, X, clip_eps=0), "clip_eps"),
        (lambda: effective_weights("gspo", X, X, A1, X, clip_eps=(0.1, -1)), "clip_eps"),
        (lambda: effective_weights("gspo", X, X, A1, X, clip_eps=(0.1, 0.2, 0.3)), "clip_eps"),
        (lambda: effective_weights("gspo", X, X, A1, X, clip_eps="0.2"), "clip_eps"),
        (lambda: effective_weights("seq", X, X, A1, X, max_length=0), "max_length"),
        (lambda: effective_weights("seq", X, X, A1, X, max_length="3"), "max_length"),
        (lambda: transform_weights(X, A1, X, "on"), "on"),
        (lambda: transform_weights(X, A1, X[:, :1], "min"), "advantages"),
        (lambda: transform_weights(X[..., :2], A1, X, "min"), "weights"),
        (lambda: policy_loss(X, X, A1, X, "gspo", "max"), "max"),
        (lambda: group_advantages(A1[0]), "rewards"),
        (lambda: group_advantages(A1[:, :1]), "rewards"),
        (lambda: group_advantages(A1.long()), "rewards"),
        (lambda: cancellation_residual(X, A1[:, :1]), "weights"),
        (lambda: cancellation_residual(X[0], A1), "weights"),
        (lambda: token_logprobs(Policy(), TOKENS[0], TOKENS[0]), "prompts"),
        (lambda: token_logprobs(Policy(), TOKENS[0], TOKENS), "prompts"),
        (lambda: Policy()(TOKENS), "tokens"),
        (lambda: Policy()(TOKENS[0].float()), "tokens"),
        (lambda: Policy()(TOKENS[0].repeat(1, 9)), "context"),
        (lambda: sample_groups(Policy(), TOKENS[0], 2, 3, 3, None), "fork"),
        (lambda: sample_groups(Policy(), TOKENS[0], 0, 0, 3, None), "group_size"),
        (lambda: sample_groups(Policy(), TOKENS, 2, 0, 3, None), "prompts"),
        (lambda: Config(loss="ppo"), "loss"),
        (lambda: Config(transform="on"), "transform"),
        (lambda: Config(task="x"), "task"),
        (lambda: Config(group_size=2.0), "group-size"),
        (lambda: Config(adapt=-1), "adapt"),
    ],
)
def test_a_wrong_library_call_raises_value_error_naming_it(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def start(*arguments, **options):
    """Start the program as a user would, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(HERE / "tokrl.py"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def outcome(process):
    out, err = process.communicate()
    return process.returncode, out, err


def results(folder: Path, name: str = "failure-modes") -> dict:
    """EXPERIMENT.json but for what may differ: the command and the timing."""
    result = json.loads(
        (folder / f"{name}.json").read_text(), parse_constant=lambda word: pytest.fail(f"JSON holds {word}")
    )
    return {k: v for k, v in result.items() if k not in ("timing", "command")}


@pytest.fixture(scope="module")
def both_arms(tmp_path_factory):
    """`--transform on`, then `--transform off` in one folder: their outcomes."""
    folder = tmp_path_factory.mktemp("runs")
    short = ("--steps", 3, "--prompts", 2, "--out", folder)
    return folder, short, outcome(start("--transform", "on", *short)), outcome(start("--transform", "off", *short))


@pytest.mark.slow
def test_each_arm_is_drawn_beside_the_other_if_that_exists(both_arms):
    folder, _, first, second = both_arms
    for (status, out, err), arms in ((first, ["on"]), (second, ["off", "on"])):
        assert status == 0 and "Traceback" not in err
        lines = out.splitlines()
        assert [line.split()[1] for line in lines if line.startswith("| o")] == arms
        assert sum("=" in line and line.startswith("    ") for line in lines) == 4  # two prompts, two solutions each
        assert out.count("Three samples") == len(arms) and "tokens per second" in out
        assert lines[-1] == f"Figure: {folder / 'failure-modes.png'}"
        assert re.search(
            r"(on|off), seed 0: rollout 3/3, accuracy 0\.\d\d, solution entropy \d\.\d\d, residual \d", err
        )
    result = json.loads((folder / "failure-modes.json").read_text())
    assert result.keys() == {"experiment", "command", "versions", "config", "arms", "timing"}
    assert list(result["arms"]) == ["off", "on"] and "--transform off" in result["command"]
    for label, arm in result["arms"].items():
        assert (arm["loss"], arm["transform"], arm["fork"], arm["seeds"]) == ("gspo", tokrl.ARMS[label], 2, [0])
        assert arm["final"].keys() == set(tokrl.MEASURES) and arm["curves"].keys() == {"step", *tokrl.MEASURES}
        assert arm["curves"]["step"] == [0, 1, 2, 3] and all(len(arm["curves"][m][0]) == 4 for m in tokrl.MEASURES)
    assert result["arms"]["on"]["final"]["residual"][0] < 1e-6
    assert (folder / "failure-modes.png").read_bytes()[:4] == b"\x89PNG"
    assert {p.name for p in folder.iterdir()} == {".cache", "failure-modes.json", "failure-modes.png"}


@pytest.mark.slow
def test_what_is_finished_is_not_trained_again_unless_fresh_or_damaged(both_arms, capsys):
    folder, short, *_ = both_arms
    before, line = results(folder), [str(x) for x in short]
    assert tokrl.main(line) == 0
    captured = capsys.readouterr()
    assert "0 of 2 runs to train" in captured.err and "rollout" not in captured.err.split("\n", 1)[1]
    assert results(folder) == before
    picture = (folder / "failure-modes.png").read_bytes()
    (folder / "failure-modes.png").unlink()
    assert tokrl.main(["--plot", "--out", str(folder)]) == 0
    assert (folder / "failure-modes.png").read_bytes() == picture and tokrl.table(before) in capsys.readouterr().out
    kept = sorted((folder / ".cache").iterdir())
    kept[0].write_text(kept[0].read_text()[:100])  # truncated: named, and trained again to the same bits
    assert tokrl.main(line) == 0
    captured = capsys.readouterr()
    assert f"{kept[0]} is not a finished run" in captured.err and "1 of 2 runs to train" in captured.err
    assert results(folder) == before


def test_a_kept_run_belongs_to_its_configuration_seed_and_code(tmp_path, monkeypatch):
    path = lambda *a: tokrl.kept_path(tmp_path, *a)
    paths = {path(Config(), 0), path(Config(), 1), path(Config(lr=2e-4), 0), path(Config(transform="min"), 0)}
    assert len(paths) == 4 and path(Config(fork=2, clip_eps=0.04), 0) == path(Config(), 0)
    for name in ("tokrl.py", "toy_tasks.py"):  # an edit of either file is never answered with an old curve
        shutil.copy(HERE / "tokrl.py", tmp_path), shutil.copy(HERE / "toy_tasks.py", tmp_path)
        with open(tmp_path / name, "a") as file:
            file.write("# an edit\n")
        monkeypatch.setattr(tokrl, "__file__", str(tmp_path / "tokrl.py"))
        assert path(Config(), 0) not in paths
    monkeypatch.undo()
    assert path(Config(), 0) in paths


@pytest.mark.slow
def test_killed_and_given_again_ends_with_the_same_bits(both_arms, tmp_path):
    folder, short, *_ = both_arms
    line = [*short[:-1], tmp_path]
    process = start(*line)
    while process.poll() is None and not list(tmp_path.glob(".cache/[!.]*.json")):  # until one of the two runs is kept
        time.sleep(0.01)
    process.kill()  # its workers end with it
    process.communicate()
    status, _, err = outcome(start(*line))
    assert status == 0 and results(tmp_path) == results(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ps --ppid and /proc")
def test_ctrl_c_a_dead_worker_and_a_dead_parent(tmp_path):
    def workers(process):
        command = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process.pid)]
        children = subprocess.run(command, capture_output=True, text=True).stdout
        return [int(line.split()[0]) for line in children.splitlines() if "spawn_main" in line]

    def gone(pids):
        for _ in range(100):
            if not any(
                Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text()
                for pid in pids
            ):
                return True
            time.sleep(0.05)
        return False

    def started(*line):
        process = start(*line, "--out", tmp_path)
        while len(workers(process)) < min(2, tokrl.CORES):
            assert process.poll() is None, "the program ended before its workers were seen"
            time.sleep(0.05)
        return process, workers(process)

    process, pids = started()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group, workers still importing included
    status, out, err = outcome(process)
    assert status == 130 and "continues with what is missing" in err and "Traceback" not in err and gone(pids)
    process, pids = started("--steps", 20)
    os.kill(pids[0], signal.SIGKILL)
    status, out, err = outcome(process)
    (died,) = re.findall(r"tokrl.py: (on|off), seed 0 died: the same command continues", err)
    assert status == 1 and "Traceback" not in err and gone(pids)
    if tokrl.CORES > 1:  # the other arm finishes; a lone worker takes everything with it
        assert list(results(tmp_path)["arms"]) == [{"on": "off", "off": "on"}[died]]
    process, pids = started()
    process.kill()
    process.communicate()
    assert gone(pids)


@pytest.mark.slow
def test_a_diverging_run_is_named_and_the_others_finish(tmp_path):
    status, out, err = outcome(start("--lr", 1e30, "--steps", 3, "--prompts", 2, "--out", tmp_path))
    assert status == 1 and "Traceback" not in err
    assert re.search(r"tokrl.py: off, seed 0 diverged: rollout \d+, ", err) and re.search(
        r"on, seed 0 diverged: rollout", err
    )
    tiny, saved = Config(steps=1, prompts=1), []
    units = [("wild", replace(tiny, lr=1e30, steps=3), 0), ("tame", tiny, 0)]
    (message,) = tokrl.train_all(units, lambda label, seed, run: saved.append((label, seed, run["curves"]["step"])))
    assert message.startswith("wild, seed 0 diverged: rollout") and saved == [("tame", 0, [0, 1])]


@pytest.mark.slow
def test_a_killed_worker_is_replaced_while_runs_wait(monkeypatch):
    earlier = set(multiprocessing.active_children())  # of other tests

    def kill_one():
        while not (children := set(multiprocessing.active_children()) - earlier):
            time.sleep(0.01)
        children.pop().kill()

    monkeypatch.setattr(tokrl, "CORES", 1)  # so that nobody else could do the rest
    threading.Thread(target=kill_one).start()
    saved, tiny = [], Config(steps=1, prompts=1)
    failed = tokrl.train_all([(label, tiny, 0) for label in "abc"], lambda label, *_: saved.append(label))
    assert failed == ["a, seed 0 died: the same command continues with what is missing"] and saved == ["b", "c"]


@pytest.mark.slow
def test_an_arm_that_another_command_finishes_meanwhile_is_drawn_too(tmp_path, monkeypatch):
    arms = {word: Config(steps=1, prompts=1, transform=tokrl.ARMS[word]) for word in ("off", "on")}
    (tmp_path / ".cache").mkdir()

    def train_all(units, save):
        (only,) = units
        save("on", 0, tokrl.train(only[1], 0))
        tokrl.write_json(tokrl.kept_path(tmp_path, arms["off"], 0), tokrl.train(arms["off"], 0))
        return []

    monkeypatch.setattr(tokrl, "train_all", train_all)
    result, *_ = tokrl.run_experiment("failure-modes", Config(), arms, ["on"], [0], tmp_path, False)
    assert list(result["arms"]) == ["off", "on"]


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(tmp_path):
    shutil.copy(HERE / "figures" / "control.json", tmp_path)
    process = start("--plot", "--out", tmp_path)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"experiment": "control", "arms": {}}', '{"experiment": "control", "arms": {"off": 3}}'],
)
def test_plot_names_a_damaged_result_and_draws_the_others(content, tmp_path, capsys):
    shutil.copy(HERE / "figures" / "failure-modes.json", tmp_path)
    (tmp_path / "control.json").write_text(content)
    assert tokrl.main(["--plot", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "control.json is not a whole result" in err and "--experiment control" in err
    assert (tmp_path / "failure-modes.png").exists() and not (tmp_path / "control.png").exists()


def test_plot_names_a_result_whose_arms_or_curves_are_not_those_of_the_program(tmp_path, capsys):
    read = lambda name: json.loads((HERE / "figures" / f"{name}.json").read_text())
    renamed, cut = read("control"), read("failure-modes")
    renamed["arms"]["of"] = renamed["arms"].pop("off")
    cut["arms"]["on"]["curves"]["accuracy"][0].pop()
    (tmp_path / "frontier.json").write_text(json.dumps(read("losses")))
    (tmp_path / "control.json").write_text(json.dumps(renamed))
    (tmp_path / "failure-modes.json").write_text(json.dumps(cut))
    assert tokrl.main(["--plot", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 3 == err.count("is not a whole result") and "it holds losses" in err
    assert not list(tmp_path.glob("*.png"))


EMPTY_RUN = json.dumps(dict.fromkeys(("curves", "final", "examples", "samples", "timing"), {}))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"curves": 1}', "null", EMPTY_RUN])
def test_a_kept_run_that_is_something_else_is_named_and_ignored(content, tmp_path, capsys):
    (tmp_path / "run.json").write_text(content)
    assert tokrl.kept_run(tmp_path / "run.json") is None and tokrl.kept_run(tmp_path / "none.json") is None
    assert capsys.readouterr().err == f"{tmp_path / 'run.json'} is not a finished run: it is ignored\n"


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    tokrl.write_json(tmp_path / "a.json", {"old": 1})

    def half(path):
        path.write_text("{")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        tokrl.write_whole(tmp_path / "a.json", half)
    with pytest.raises(ValueError):
        tokrl.write_json(tmp_path / "a.json", {"new": math.nan})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1} and len(list(tmp_path.iterdir())) == 1


def test_experiments_are_the_settings_they_say():
    base = Config(steps=40)
    arms = {name: tokrl.experiment_arms(name, base) for name in tokrl.EXPERIMENTS}
    assert list(arms["failure-modes"]) == list(arms["control"]) == ["off", "on", "orth"]
    assert {a.fork for a in arms["control"].values()} == {0}
    assert arms["frontier"]["orth lr=0.0001"] == replace(base, transform="orth")
    assert len(arms["losses"]) == 18 and arms["losses"]["on seq"].clip_eps is None
    assert arms["losses"]["off gspo unclipped"].clip_eps == math.inf and arms["losses"]["off dapo"].clip_eps == 0.2
    assert {a.group_size * a.prompts for a in arms["group-size"].values()} == {64}
    assert [(a.kl, a.adapt, a.transform) for a in arms["adapt"].values()] == [
        (0.0, 20, "off"),
        (0.0, 20, "min"),
        (0.02, 20, "off"),
        (0.02, 20, "min"),
    ]


def test_the_options_say_which_arms_are_trained():
    wanted = lambda **given: tokrl.arms_from(given)[3]
    assert wanted() == wanted(transform="both") == ["off", "on"]
    assert wanted(transform="min") == wanted(transform="on") == ["on"] and wanted(transform="orth") == ["orth"]
    assert wanted(experiment="failure-modes") == ["off", "on", "orth"]
    assert wanted(experiment="failure-modes", transform="both") == ["off", "on"]
    assert len(wanted(experiment="losses")) == 18


def test_bootstrap_and_table_by_hand():
    assert tokrl.bootstrap([3, 3, 3], [1, 1, 1]) == (2.0, 2.0, 2.0)
    assert tokrl.bootstrap([3, 5], [1, 1], np.divide)[0] == 4.0
    value, low, high = tokrl.bootstrap(list(range(100)), [0] * 100)  # mean 49.5 ± 1.96 · 28.9 / 10
    assert value == 49.5 and abs(low - 43.8) < 0.5 and abs(high - 55.2) < 0.5
    # paired: one huge seed in both arms does not widen the difference
    assert tokrl.bootstrap([1, 2, 1000], [0, 1, 999]) == (1.0, 1.0, 1.0)
    assert tokrl.compare([0.5, 0.5], [0.9, 0.9], "solution entropy", True) == "5.00 [5.00, 5.00]"
    assert tokrl.compare([None, 2.0], [1.0, 1.0], "solution drift (nats)", False) == "+1.00 [+1.00, +1.00]"
    assert tokrl.compare([None], [1.0], "residual", False) == "" == tokrl.compare([1.0], [1.0], "accuracy", True)


# ---- The README tells the truth -------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")
FIGURES = {name: json.loads((HERE / "figures" / f"{name}.json").read_text()) for name in tokrl.EXPERIMENTS}
TRL_RESULTS = json.loads((HERE / "figures" / "trl.json").read_text())


@pytest.mark.parametrize("name", FIGURES)
def test_readme_shows_each_experiment_as_recorded(name, tmp_path):
    result = FIGURES[name]
    shutil.copy(HERE / "figures" / f"{name}.json", tmp_path)
    assert tokrl.main(["--plot", "--experiment", name, "--out", str(tmp_path)]) == 0
    assert tokrl.table(result) in README, "a table of the README is not that of its JSON"
    assert f"`{result['command']}`" in README and f"(figures/{name}.png)" in README
    assert result["command"] == f"python tokrl.py --experiment {name} --seeds 0-7 --out figures"
    assert all(arm["seeds"] == list(range(8)) for arm in result["arms"].values())
    base = Config()
    assert {k: v for k, v in result["config"].items()} == {k: getattr(base, k) for k in result["config"]}
    assert list(result["arms"]) == list(tokrl.experiment_arms(name, base))


def test_figures_holds_every_experiment_and_nothing_else():
    names = {p.name for p in (HERE / "figures").iterdir()} - {".cache"}
    drawn = (*tokrl.EXPERIMENTS, tokrl.MECHANISM)
    assert names == {f"{name}.{kind}" for name in drawn for kind in ("json", "png")} | {"trl.json"}


def test_the_mechanism_is_drawn_from_numbers_that_hang_together():
    result = json.loads((HERE / "figures" / "mechanism.json").read_text())
    assert f"`{result['command']}`" in README and "(figures/mechanism.png)" in README and tokrl.table(result) in README
    A, weights = tensor([result["advantages"]]), {k: tensor([w])[..., None] for k, w in result["weights"].items()}
    texts, prompt = result["completions"], result["prompt"]
    rewards = tensor([[COMMUTE.reward(prompt, text) for text in texts]])
    assert rewards.tolist() == [result["rewards"]]
    assert len({text[: COMMUTE.fork] for text in texts}) == 1 and len(texts) == 8
    assert torch.allclose(group_advantages(rewards), A, atol=1e-6)
    for word in ("on", "orth"):
        w = transform_weights(weights["off"], A, torch.ones(1, 8, 1), tokrl.ARMS[word])
        assert torch.allclose(w, weights[word], atol=1e-7)
        assert cancellation_residual(w, A).item() < 1e-7
    lengths = tensor([[len(text) + 1 for text in texts]])  # with EOS
    s = (weights["off"][..., 0] * lengths)[weights["off"][..., 0] > 0]
    assert ((s > 0.9) & (s < 1.1)).all() and (weights["off"] == 0).any()  # a ratio near 1, over n; some are clipped
    assert cancellation_residual(weights["off"], A).item() > 0.05


@pytest.mark.slow
def test_the_mechanism_is_recorded_as_its_command_computes_it(tmp_path, capsys):
    recorded = json.loads((HERE / "figures" / "mechanism.json").read_text())
    computed = tokrl.mechanism(Config(), 0)
    assert (
        computed["completions"] == recorded["completions"] and computed["weights"].keys() == recorded["weights"].keys()
    )
    for word, w in computed["weights"].items():
        assert w == pytest.approx(recorded["weights"][word], abs=1e-3)  # another machine may round otherwise
    assert tokrl.main(["--experiment", "mechanism", "--lr", "1e3", "--out", str(tmp_path)]) == 1
    assert "diverged: inner step" in capsys.readouterr().err
    assert tokrl.main(["--experiment", "mechanism", "--lr", "1e30", "--inner-steps", "1", "--out", str(tmp_path)]) == 1
    assert "diverged: after the update" in capsys.readouterr().err
    assert not (tmp_path / "mechanism.json").exists()


def test_the_recorded_runs_show_what_is_claimed():
    arms = FIGURES["failure-modes"]["arms"]
    final = lambda label, measure: arms[label]["final"][measure]
    for measure, least in (("solution_drift", 3), ("learning_tax", 1.5)):
        ratio, low, _ = tokrl.bootstrap(final("off", measure), final("on", measure), np.divide)
        assert ratio > least and low > {"solution_drift": 2, "learning_tax": 1.2}[measure]
    lost = [1 - np.mean(final(label, "solution_entropy")) for label in ("off", "on")]
    assert lost[0] / lost[1] > 4
    assert abs(np.mean(final("off", "accuracy")) - np.mean(final("on", "accuracy"))) < 0.03
    assert max(final("on", "residual") + final("orth", "residual")) < 1e-6 < min(final("off", "residual"))


# The numbers of "What the toy shows, and what it does not", each beside the words that stand there
PROSE = " ".join(README[README.index("## What the toy shows") : README.index("## The paper's statements")].split())
FINAL = {name: {label: arm["final"] for label, arm in FIGURES[name]["arms"].items()} for name in FIGURES}


def said(text, *values):
    """The README says `text`, and its numbers are `values`, rounded."""
    assert re.search(rf"(?<![\d.]){re.escape(text)}", PROSE), text
    for number, value in zip(re.findall(r"[−-]?\d+(?:\.\d+)?", text), values, strict=True):
        decimals = len(number.partition(".")[2])
        assert abs(float(number.replace("−", "-")) - value) <= 0.501 * 10**-decimals, (text, value)


def test_readme_prose_on_failure_modes():
    arms = FINAL["failure-modes"]

    def ratio(measure, on="on"):
        off, on = arms["off"][measure], arms[on][measure]
        if measure == "solution_entropy":
            off, on = [1 - h for h in off], [1 - h for h in on]
        return tokrl.bootstrap(off, on, np.divide)

    said("6.1 times", ratio("solution_drift")[0])
    said("5.4 to 7.0", *ratio("solution_drift")[1:])
    said("8.6 times", ratio("solution_entropy")[0])
    said("6.9 to 11.1", *ratio("solution_entropy")[1:])
    said("2.2 times", ratio("learning_tax")[0])
    said("1.8 to 2.7", *ratio("learning_tax")[1:])
    said("1.00, 0.83 to 1.23", *ratio("learning_tax", "orth"))
    said("0.01 (−0.00 to 0.02)", *tokrl.bootstrap(arms["off"]["accuracy"], arms["on"]["accuracy"]))
    difference, low, high = prediction_difference("rollouts to accuracy 0.9")
    said("22 rollouts (16 to 29", -difference, -high, -low)
    said("by 18%", 100 * enumerated_bias("seq", "min", True))
    said("`orth` by 8%", 100 * enumerated_bias("seq", "orth", True))


def test_readme_prose_in_words():
    """Numbers that the README spells out: eightfold, four of the five, a third, twice, half."""
    text = " ".join(README.split())
    final = lambda name, label, measure: np.array(FINAL[name][label][measure])
    drift = final("failure-modes", "off", "solution_drift").mean()
    assert f"their odds change about eightfold ({drift:.1f} nats of log-odds)" in text and 7.5 < math.exp(drift) < 9
    group = json.loads((HERE / "figures" / "mechanism.json").read_text())
    wrong = [w for w, reward in zip(group["weights"]["off"], group["rewards"]) if not reward]
    assert "four of the five wrong trajectories are clipped (weight 0)" in text and (len(wrong), wrong.count(0)) == (
        5,
        4,
    )
    push = np.dot(group["advantages"], group["weights"]["off"]) / 8
    assert f"what is left of the three right ones: {push:+.3f}" in text
    assert "`on` has a third and a sixth of the drift" in text
    for rate, share in (("6e-05", 1 / 3), ("0.0001", 1 / 6)):
        off, on = (final("frontier", f"{word} lr={rate}", "solution_drift").mean() for word in ("off", "on"))
        assert abs(on / off - share) < 0.02
    off, orth = (final("frontier", f"{word} lr=0.0003", "learning_tax").mean() for word in ("off", "orth"))
    assert "at 3e-4 it is twice that of `off`" in text and 1.8 < orth / off < 2.2
    off, orth = (final("failure-modes", word, "learning_tax") for word in ("off", "orth"))
    assert "one seed pays half as much again, five pay less" in text
    assert (orth / off > 1.4).sum() == 1 and (orth < off).sum() == 5
    own, rest, without = map(float, re.findall(r"[\d.]+(?:e-\d+)?", audit_prop31_other_tokens()[2])[:3])
    assert "about half of the squared movement" in text and own < 1e-20 and 0.45 < rest / without < 0.6


def test_readme_prose_on_adapt_and_group_size():
    back = tokrl.columns_of(FIGURES["adapt"])["rollouts to accuracy 0.9"]
    said(
        "88 rollouts against 41 (difference 46, 29 to 64)",
        np.mean(back["off kl=0"]),
        np.mean(back["on kl=0"]),
        *tokrl.bootstrap(back["off kl=0"], back["on kl=0"]),
    )
    said(
        "61 against 31 (30, 6 to 62)",
        np.mean(back["off kl=0.02"]),
        np.mean(back["on kl=0.02"]),
        *tokrl.bootstrap(back["off kl=0.02"], back["on kl=0.02"]),
    )
    said("medians are 35 and 30", np.median(back["off kl=0.02"]), np.median(back["on kl=0.02"]))
    assert all(a > b for a, b in zip(back["off kl=0"], back["on kl=0"]))  # "every `off` seed needs longer"
    size = FINAL["group-size"]
    drift = [
        np.subtract(*(np.mean(size[f"{word} G={g}"]["solution_drift"]) for word in ("off", "on")))
        for g in (2, 4, 8, 16)
    ]
    said("0.60, 1.19, 1.78 and 2.48", *drift)
    said("0.03 lower (0.01 to 0.04)", *tokrl.bootstrap(size["off G=16"]["accuracy"], size["on G=16"]["accuracy"]))


def test_readme_prose_on_control_and_frontier():
    entropy = {label: np.mean(arm["solution_entropy"]) for label, arm in FINAL["control"].items()}
    said("0.38 against 0.56", entropy["orth"], entropy["off"])
    said("0.73 against 0.56", entropy["on"], entropy["off"])
    slow, usual = (np.mean(FINAL["frontier"][f"off lr={lr}"]["accuracy"]) for lr in ("3e-05", "0.0001"))
    said("0.91, not 0.95", slow, usual)
    at_09 = tokrl.columns_of(FIGURES["frontier"])["drift at accuracy 0.9"]["off lr=3e-05"]
    said("0.54", np.mean([drift for drift in at_09 if drift is not None]))
    tax = {label: np.mean(arm["learning_tax"]) for label, arm in FINAL["frontier"].items()}
    ratios = [tax[f"off lr={lr}"] / tax[f"on lr={lr}"] for lr in ("3e-05", "6e-05", "0.0003")]
    said("1.1 to 1.8 times", min(ratios), max(ratios))
    score = {word: np.mean(FINAL["frontier"][f"{word} lr=0.0003"]["accuracy"]) for word in ("off", "orth")}
    said("0.12 lower", score["off"] - score["orth"])


def test_readme_prose_on_losses_and_time():
    drift = lambda label: np.array(FINAL["losses"][label]["solution_drift"])
    said("0.75 nats, not 2.14", drift("off gspo unclipped").mean(), drift("off gspo").mean())
    said("−0.02, −0.10 to 0.06", *tokrl.bootstrap(drift("off gspo unclipped"), drift("on gspo unclipped")))
    said("1.03 against 0.64", drift("off seq").mean(), drift("on seq").mean())
    gap = {loss: abs((drift(f"off {loss}") - drift(f"on {loss}")).mean()) for loss in LOSSES}
    said("0.02 in drift", max(gap[loss] for loss in ("reinforce", "dr_grpo", "dapo", "grpo_sym", "cispo")))
    said("by 0.09", gap["grpo"])
    seconds = FIGURES["failure-modes"]["timing"]["off"]
    phases = [seconds[phase] for phase in ("update", "warm start", "sampling", "exact measures")]
    for text, share in zip(("72% is the update", "12% the warm start", "9% sampling", "7% the exact measures"), phases):
        assert text in " ".join(README.split()) and abs(float(text.split("%")[0]) - 100 * share / sum(phases)) < 0.51


def trl_column(arm, measure):
    """One value per seed, of the runs that the README's trl_toy.py has written."""
    assert [row["seed"] for row in TRL_RESULTS if row["arm"] == arm] == list(range(8))
    return [row[measure] for row in TRL_RESULTS if row["arm"] == arm]


def test_readme_trl_results():
    measures = ("accuracy", "solution_entropy", "solution_drift")
    for arm in ("stock", "off", "min", "orth"):
        columns = [trl_column(arm, measure) for measure in measures]
        cells = [f"{np.mean(column):.2f} ± {np.std(column, ddof=1):.2f}" for column in columns]
        assert f"| `{arm}` | {' | '.join(cells)} |" in README, (arm, cells)
    for arm in ("min", "orth"):
        pairs = [tokrl.bootstrap(trl_column("off", measure), trl_column(arm, measure)) for measure in measures]
        cells = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*pair) for pair in pairs]
        assert f"| `off` − `{arm}` | {' | '.join(cells)} |" in README, (arm, cells)
    seconds = {arm: np.array(trl_column(arm, "seconds")) for arm in ("stock", "off", "min", "orth")}
    ratios = [np.median(seconds[arm] / seconds["stock"]) for arm in ("off", "min", "orth")]
    cost = "`off` took {:.2f}, `min` {:.2f} and `orth` {:.2f} times as long as `stock`".format(*ratios)
    assert cost in " ".join(README.split())
    apart = [abs(a - b) for m in measures for a, b in zip(trl_column("stock", m), trl_column("off", m))]
    assert max(apart) < 1e-5


def test_every_name_of_the_maps_exists():
    section = README[README.index("## The paper's statements") : README.index("## Evidence")]
    names = set(re.findall(r"`([\w./-]+)`", section)) - {"orth"} | set(re.findall(r"test_\w+", tokrl.__doc__))
    ours = README[: README.index("## On a real model")]  # past that come names of other libraries
    names |= set(re.findall(r"`(\w+_\w+)`", ours)) - {"dr_grpo", "grpo_sym"} | set(re.findall(r"`(audit_\w+)`", README))
    assert len(names) > 30
    for name in names:
        if name.endswith((".png", ".py")):
            assert (HERE / name).exists(), name
        else:
            assert hasattr(tokrl, name) or name in globals(), name
    for place in ("Eq. 2", "§4", "Prop. 3.1", "Cor. 3.2", "Cor. 3.3", "Eq. 17", "Eq. 18", "predictions"):
        assert f"\n| {place}" in section or f", {place}" in section, place


def readme_commands():
    """The options of every `python tokrl.py ...` in the README, as parsed."""
    lines = re.findall(r"`(python tokrl\.py[^`]*)`", README) + re.findall(
        r"^(python tokrl\.py.*?)(?:  +.*)?$", README, re.M
    )
    assert len(set(lines)) > 25
    return [
        vars(tokrl.parser().parse_args(line.split()[2:])) for line in sorted(set(lines) - {"python tokrl.py --help"})
    ]


def test_every_command_of_the_readme_is_understood():
    for given in readme_commands():
        if "plot" not in given:
            tokrl.arms_from(given)
    for option in re.findall(r"`(--[a-z-]+)", README):
        assert option in tokrl.parser().format_help(), option


@pytest.mark.slow
def test_every_training_command_of_the_readme_trains():
    """One rollout of each arm; the outputs that the README quotes are tables, which other tests compare."""
    quick = lambda config: replace(config, steps=1, prompts=1, adapt=min(config.adapt, 1))
    arms = {
        quick(arm) for given in readme_commands() if "plot" not in given for arm in tokrl.arms_from(given)[2].values()
    }
    assert len(arms) > 40
    for config in sorted(arms, key=lambda config: config.task):  # a warm start is kept for the task it was for
        run = tokrl.train(config, 100)
        assert len(run["curves"]["step"]) == 2 + config.adapt and run["final"]["accuracy"] > 0.1


def test_the_one_line_commands_of_the_readme_print_what_it_says():
    commands = re.findall(r'`python -c "([^"]+)"`', README)
    assert commands == ["print(.35**8 + .65**8)"] and f"18: {0.35**8 + 0.65**8:.3f}." in README


def test_defaults_are_the_same_in_help_readme_and_config():
    text, base = " ".join(tokrl.parser().format_help().split()), Config()
    for name in ("loss", "task", "group_size", "prompts", "inner_steps", "steps", "lr", "kl"):
        option = text[text.rindex(f"--{name.replace('_', '-')} ") :]
        assert f"(default {getattr(base, name)})" in option.split(" --")[0], name
    said = (
        f"loss `{base.loss}` with clip {base.clip_eps} on `{base.task}`, fork {base.fork}, {base.prompts} prompts with "
        f"{base.group_size} completions each, {base.inner_steps} inner steps, {base.steps} rollouts, learning rate "
        f"{base.lr}, KL {base.kl}, seed 0, into `runs`."
    )
    assert said in " ".join(README.split())
    assert "default 0.04 for gspo, else 0.2" in text and "commute: 2" in text


def test_the_formulas_of_the_readme_are_well_formed():
    """In the notation that GitHub renders: $$ ... $$ on a line of its own, $` ... `$ in a text."""
    from matplotlib import mathtext

    formulas = re.findall(r"^\$\$ (.+) \$\$$", README, re.M) + re.findall(r"\$`(.+?)`\$", README)
    assert len(formulas) == 6 and README.count("$") == 2 * len(formulas) + 2 * 2  # two of them are $$
    parser = mathtext.MathTextParser("agg")
    for formula in formulas:
        parser.parse(f"${formula}$")


@pytest.mark.slow
def test_every_test_selection_of_the_readme_selects_something():
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q"], cwd=HERE, capture_output=True, text=True
    )
    names = [line.split("::")[1] for line in listed.stdout.splitlines() if "::" in line]
    selections = re.findall(r'pytest -k (?:"([^"]+)"|(\w+))', README)
    assert len(selections) > 15 and len(names) > 300
    for selection in (a or b for a, b in selections):
        test = re.sub(r"\b(?!and\b|or\b|not\b)(\w+)", r"('\1' in name)", selection)
        assert any(eval(test, {"name": name}) for name in names), selection


# ---- Questions people ask -------------------------------------------------------------------------------------------


def test_question_first_step():
    """At the first inner step the published losses of GRPO and GSPO are 0, DAPO's and Dr. GRPO's are not."""
    advantages = group_advantages(tensor([[1, 0, 0, 0]]))
    mask = torch.arange(7) < torch.tensor([3, 6, 6, 7]).view(1, 4, 1)
    old = -torch.rand(1, 4, 7, generator=named_generator(0, "question")).double()
    logprobs, n = old.clone().requires_grad_(), mask.sum(-1)
    r = (logprobs - old).exp() * advantages[..., None] * mask
    s = (((logprobs - old) * mask).sum(-1) / n).exp() * advantages
    published = {
        "grpo": -(r.sum(-1) / n).mean(),
        "gspo": -s.mean(),
        "dr_grpo": -(r.sum(-1) / 7).mean(),
        "dapo": -r.sum() / n.sum(),
    }
    for loss, value in published.items():
        (gradient,) = torch.autograd.grad(value, logprobs, retain_graph=True)
        (ours,) = torch.autograd.grad(policy_loss(logprobs, old, advantages, mask, loss), logprobs)
        assert torch.allclose(gradient, ours, atol=1e-15) and gradient.abs().max() > 0.01
        assert (abs(value.item()) < 1e-15) == (loss in ("grpo", "gspo")), loss


def test_question_gspo_clip():
    """Independent changes of 100 tokens: log s spreads √100 = 10 times less than a token's log r."""
    log_r = 0.1 * torch.randn(64, 8, 100, generator=named_generator(0, "question"), dtype=torch.float64)
    arguments = log_r, torch.zeros_like(log_r), torch.ones(64, 8).double(), torch.ones_like(log_r), math.inf
    r, s = (n * effective_weights(loss, *arguments) for n, loss in ((100, "dr_grpo"), (100, "gspo")))
    assert 8 < r.log().std() / s.log()[..., 0].std() < 12
    assert (r > 1.2).any() and s.log().abs().max() < 0.05  # 0.2 clips tokens, and no completion


def test_question_std():
    """The push of a group, Σ|Â|: one right in eight against four right in eight."""
    rewards = tensor([[1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]])
    for normalize, by_hand in ((True, 4.95 / 7.48), (False, 1.75 / 4)):
        one, four = group_advantages(rewards, normalize).abs().sum(dim=1).tolist()
        assert one / four == pytest.approx(by_hand, abs=0.001)
    assert "0.66 times" in README and "0.44 times" in README


def test_question_k3():
    """Over a vocabulary of 7: E k3 = KL(π ‖ ref), and E ∇k3 = ∇KL(ref ‖ π), which is not ∇KL(π ‖ ref)."""
    generator = named_generator(0, "question")
    logits, reference = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    logp, logq = logits.log_softmax(0), reference.log_softmax(0)
    k3 = (logq - logp).exp() - 1 - (logq - logp)
    sampled = (logp.detach().exp() * k3).sum()  # expectation over samples of π, which carry no gradient
    forwards, backwards = (logp.exp() * (logp - logq)).sum(), (logq.exp() * (logq - logp)).sum()
    of_k3, of_kl, of_other = (
        torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (sampled, forwards, backwards)
    )
    assert torch.allclose(sampled, forwards) and (k3 >= 0).all()
    assert torch.allclose(of_k3, of_other) and not torch.allclose(of_k3, of_kl, atol=0.01)


# ---- The README's recipes for a real model: run where TRL is installed, skipped elsewhere ----------------------------


def readme_script(name):
    """The README's code block whose first line names the file."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    return next(block for block in blocks if block.startswith(f'"""{name}:'))


@pytest.fixture
def trl_toy(tmp_path, monkeypatch):
    """The module trl_toy, both scripts taken out of the README."""
    pytest.importorskip("trl")
    for name in ("trl_trainer.py", "trl_toy.py"):
        (tmp_path / name).write_text(readme_script(name), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("trl_trainer", "trl_toy"):
        sys.modules.pop(name, None)
    return importlib.import_module("trl_toy")


SIX_STEPS = dict(max_steps=6, logging_strategy="steps", logging_steps=1, learning_rate=1e-3, max_grad_norm=1e9)
IN_SLICES = dict(per_device_train_batch_size=16, gradient_accumulation_steps=4, steps_per_generation=4)


@pytest.mark.slow
@pytest.mark.parametrize("slices", [{}, IN_SLICES], ids=["whole", "accumulated"])
@pytest.mark.parametrize("loss", ["gspo", "grpo", "dr_grpo", "dapo"])
def test_trl_recipe_makes_the_update_of_trl_itself(trl_toy, loss, slices):
    """Six steps over two rollouts, weights in float64 (TRL scores in float32): gradient norms agree to six digits."""
    level = "sequence" if loss == "gspo" else "token"
    trls = dict(loss_type="grpo" if loss == "gspo" else loss, importance_sampling_level=level)
    logs = {}
    for arm in ("stock", "off"):
        clip = dict(epsilon=0.03, epsilon_high=0.05) if loss == "gspo" else dict(epsilon=0.2, epsilon_high=0.28)
        arguments = SIX_STEPS | slices | trls | clip
        trainer = trl_toy.toy_trainer(trl_toy.warm_model(100, steps=40).double(), arm, loss=loss, **arguments)
        trainer.train()
        logs[arm] = [log for log in trainer.state.log_history if "grad_norm" in log]
    norms = [[log["grad_norm"] for log in logs[arm]] for arm in logs]
    assert len(norms[0]) == 6 and norms[1] == pytest.approx(norms[0], rel=1e-6)
    assert sum(log["clip_ratio/region_mean"] > 0 for log in logs["stock"]) >= 3


@pytest.mark.slow
def test_trl_recipe_with_a_reference_is_trls_with_plain_k3(trl_toy, tmp_path):
    model, logs = trl_toy.warm_model(100, steps=40), {}
    model.save_pretrained(tmp_path / "reference")  # TRL loads the reference by the model's name
    beta = SIX_STEPS | dict(beta=1.0, epsilon=0.04)
    for arm in ("stock", "off"):
        same = type(model).from_pretrained(tmp_path / "reference", dtype=torch.float64)
        trainer = trl_toy.toy_trainer(same, arm, use_bias_correction_kl=False, **beta)
        trainer.train()
        logs[arm] = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    assert len(logs["off"]) == 6 and logs["off"] == pytest.approx(logs["stock"], rel=1e-6)
    with pytest.raises(ValueError, match="^use_bias_correction_kl must be False"):
        trl_toy.toy_trainer(same, "off", **beta)


@pytest.mark.slow
@pytest.mark.parametrize("slices", [{}, IN_SLICES], ids=["whole", "accumulated"])
def test_trl_recipe_cancels_at_the_first_token_of_each_group(trl_toy, slices):
    """All of a group score their first token; what the trainer's loss uses there satisfies Eq. 2."""
    residuals = {}
    for transform in TRANSFORMS:
        trainer = trl_toy.toy_trainer(trl_toy.warm_model(100, steps=40), transform, **SIX_STEPS | slices)
        trainer.train()
        rows = {
            k: torch.cat([one[k] for one in trainer._buffered_inputs]) for k in ("weights", "advantages", "group_ids")
        }
        order = rows["group_ids"].argsort(stable=True)
        w, A = (rows[k][order].unflatten(0, (-1, 8)) for k in ("weights", "advantages"))
        residuals[transform] = cancellation_residual(w, A)[:, 0].max().item()
    assert max(residuals["min"], residuals["orth"]) < 1e-6 < 1e-3 < residuals["off"], residuals


FIXED_COMPLETIONS = """
import os, random, sys
import torch
from toy_tasks import EOS, decode, encode
from trl_toy import TASK, TokenTransformTrainer, toy_trainer, warm_model

class Fixed(TokenTransformTrainer):
    def _generate_single_turn(self, prompt_ids, *_, **__):
        first = self.accelerator.process_index * len(prompt_ids)
        rngs = (random.Random(f"{self.state.global_step} {first + i}") for i in range(len(prompt_ids)))
        return [encode(TASK.demonstration(decode(p), rng)) + [EOS] for p, rng in zip(prompt_ids, rngs)], None

torch.set_num_threads(1)
slices, saved = int(sys.argv[1]), {}
rows = 40 // int(os.environ.get("WORLD_SIZE", 1)) // slices  # of 5 groups, one lies on both processes
for transform in ("min", "orth"):
    model = warm_model(100, steps=40)
    trainer = toy_trainer(model, transform, trainer=Fixed, per_device_train_batch_size=rows, epsilon=0.1, max_steps=6,
                          gradient_accumulation_steps=slices, steps_per_generation=slices, optim="sgd",
                          learning_rate=0.1, max_grad_norm=100.0, logging_strategy="steps", logging_steps=1)
    trainer.train()
    zero_weights = [log["zero_weights"] for log in trainer.state.log_history if "zero_weights" in log]
    saved[transform] = [p.detach() for p in model.parameters()], trainer.accelerator.num_processes, zero_weights
if trainer.accelerator.is_main_process:
    torch.save(saved, sys.argv[2])
trainer.accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.parametrize("slices", [1, 5])
def test_trl_recipe_on_two_processes_is_the_one_of_one(trl_toy, tmp_path, slices):
    """Six steps, the third of five groups split across the processes: parameters agree to 1e-6."""
    (tmp_path / "fixed.py").write_text(FIXED_COMPLETIONS, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for command, name in (([sys.executable], "one.pt"), (two, "two.pt")):
        command += ["fixed.py", str(slices), name]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
    one, two = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    start = list(trl_toy.warm_model(100, steps=40).parameters())
    for transform in ("min", "orth"):
        assert (one[transform][1], two[transform][1]) == (1, 2)
        moved = max((a - b).abs().max().item() for a, b in zip(one[transform][0], start))
        apart = max((a - b).abs().max().item() for a, b in zip(one[transform][0], two[transform][0]))
        assert moved > 0.01 and apart < 1e-6
        if slices == 1:  # what is logged is the mean of micro-batches, which are other ones on two processes
            assert two[transform][2] == pytest.approx(one[transform][2], abs=1e-6) and max(one[transform][2]) > 0
    assert any((a - b).abs().max() > 0.001 for a, b in zip(one["min"][0], one["orth"][0]))


@pytest.mark.slow
def test_trl_recipe_refuses_what_would_silently_do_nothing(trl_toy):
    model = trl_toy.warm_model(100, steps=1)
    for wrong in (
        {"num_iterations": 1},
        {"steps_per_generation": 2, "per_device_train_batch_size": 32},
        {"top_entropy_quantile": 0.5},
        {"off_policy_mask_threshold": 0.1},
        {"delta": 1.5},
        {"entropy_coef": 0.5},
        {"mask_truncated_completions": True},
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must "):
            trl_toy.toy_trainer(model, "min", **wrong)
    trainer = trl_toy.toy_trainer(model, "min", max_steps=1)
    scored = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: scored(inputs) | {"group_ids": torch.arange(64) // 7}
    with pytest.raises(ValueError, match="^10 of 10 groups do not have 8 rows$"):
        trainer.train()


@pytest.mark.slow
def test_trl_toy_trains_as_the_readme_says(trl_toy, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trl_toy.py", "min", "100", str(tmp_path / "trl.json")])
    runpy.run_path(str(tmp_path / "trl_toy.py"), run_name="__main__")
    (row,) = json.loads((tmp_path / "trl.json").read_text())
    assert (row["arm"], row["seed"]) == ("min", 100) and row["accuracy"] > 0.8


# ---- The README's recipe for verl, against verl's own code where it is installed -------------------------------------


@pytest.fixture
def verl_loss(tmp_path, monkeypatch):
    pytest.importorskip("verl")
    for name in ("verl_loss.py", "verl_trainer.py"):
        (tmp_path / name).write_text(readme_script(name), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("verl_loss", None)
    return importlib.import_module("verl_loss")


def verl_actor(loss_mode, mean="seq-mean-token-mean", low=0.2, high=0.2):
    """verl's own configuration of an actor, groups of 4; without its dual clip, which the published losses lack."""
    from verl.workers.config import FSDPActorConfig, FSDPEngineConfig, PolicyLossConfig

    return FSDPActorConfig(
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=4,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=1e9,
        loss_agg_mode=mean,
        fsdp_config=FSDPEngineConfig(),
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
    )


def verl_rows(seed, groups=4, T=7):
    """(N,T) old and new log-probabilities, verl's own advantages, masks with unequal lengths and holes; lengths."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    generator, N = named_generator(seed, "verl"), 4 * groups
    lengths = torch.randint(2, T + 1, (N,), generator=generator)
    mask = torch.arange(T) < lengths[:, None]
    mask[:, 1] &= torch.rand(N, generator=generator) < 0.8
    old = -3 * torch.rand(N, T, generator=generator, dtype=torch.float64)
    new = old + 0.3 * torch.randn(N, T, generator=generator, dtype=torch.float64)
    right = torch.rand(groups, 4, generator=generator).argsort(dim=1) < torch.randint(
        1, 4, (groups, 1), generator=generator
    )
    scores = torch.zeros(N, T, dtype=torch.float64)
    scores[:, 0] = right.flatten().double()
    advantages, _ = compute_grpo_outcome_advantage(scores, mask, np.arange(N) // 4)
    return old, new, advantages, mask, lengths


VERLS_OWN = [  # ours, verl's own, its mean, clip
    ("gspo", "gspo", "seq-mean-token-mean", 0.04, 0.04),
    ("grpo", "vanilla", "seq-mean-token-mean", 0.2, 0.2),
    ("dapo", "vanilla", "token-mean", 0.2, 0.28),
    ("cispo", "cispo", "token-mean", 1.0, 0.2),  # low = 1: verl's lower bound, which CISPO lacks, does not bind
]


def verl_gradient(config, old, new, advantages, mask):
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    new = new.clone().requires_grad_()
    config.global_batch_info.update(dp_size=2, batch_num_tokens=999, global_batch_size=48, loss_scale_factor=None)
    registered = get_policy_loss_fn(config.policy_loss.loss_mode)
    loss, metrics = registered(old, new, advantages, mask, config.loss_agg_mode, config)
    return torch.autograd.grad(loss, new)[0], metrics


@pytest.mark.slow
@pytest.mark.parametrize("loss, theirs, mean, low, high", VERLS_OWN)
def test_verl_recipe_is_verls_own_gradient(verl_loss, loss, theirs, mean, low, high):
    for seed in range(5):
        *rows, _ = verl_rows(seed)
        want, _ = verl_gradient(verl_actor(theirs, mean, low, high), *rows)
        got, metrics = verl_gradient(verl_actor(f"tokrl_{loss}_off", mean, low, high), *rows)
        assert torch.allclose(got, want, rtol=1e-12, atol=1e-15) and want.abs().max() > 1e-3
        assert loss == "cispo" or 0 < metrics["actor/zero_weights"] < 1  # the clip is active


@pytest.mark.slow
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("loss, mean", [("gspo", "seq-mean-token-mean"), ("dapo", "token-mean")])
def test_verl_recipe_in_the_workers_loss_and_in_micro_batches(verl_loss, loss, mean, transform):
    """verl's ppo_loss on its own micro-batches of two ranks, gradients added up: tokrl.policy_loss on the whole."""
    from verl.utils import tensordict_utils
    from verl.workers.engine.utils import prepare_micro_batches
    from verl.workers.utils.losses import ppo_loss

    old, new, advantages, mask, lengths = verl_rows(1)
    leaf, G, P = new.clone().requires_grad_(), 4, 3
    nest = lambda x: torch.nested.as_nested_tensor([row[:n] for row, n in zip(x, lengths)], layout=torch.jagged)
    ids = torch.arange(len(new))[:, None].expand(-1, 7)  # a row's number, in place of its tokens
    parts = {"response_mask": mask.long(), "loss_mask": mask.long(), "advantages": advantages, "old_log_probs": old}
    parts = {name: nest(x) for name, x in parts.items()} | {"responses": nest(ids)}
    whole = [torch.cat([ids[i, :1].expand(P), ids[i, :n]]) for i, n in enumerate(lengths)]
    parts["input_ids"] = torch.nested.as_nested_tensor(whole, layout=torch.jagged)
    parts["prompts"] = torch.nested.as_nested_tensor([row[:P] for row in whole], layout=torch.jagged)
    data = tensordict_utils.get_tensordict(parts, non_tensor_dict=dict(global_batch_size=len(new)))
    config = verl_actor(f"tokrl_{loss}_{transform}", mean, 0.1, 0.1)
    for rank in tensordict_utils.chunk_tensordict(data, 2):
        tensordict_utils.assign_non_tensor(
            rank, batch_num_tokens=int(mask.sum()), dp_size=2, use_dynamic_bsz=False, micro_batch_size_per_gpu=G
        )
        for micro in prepare_micro_batches(rank)[0]:
            rows = [int(row[0]) for row in micro["input_ids"].unbind()]
            scored = [torch.nn.functional.pad(leaf[i, : lengths[i]], (P - 1, 1)) for i in rows]  # j scores token j + 1
            scored = torch.nested.as_nested_tensor(scored, layout=torch.jagged)
            ppo_loss(config, {"log_probs": scored}, micro)[0].backward()
    again = new.clone().requires_grad_()
    grouped = [x.unflatten(0, (-1, G)) for x in (again, old, advantages.sum(1) / mask.sum(1), mask)]
    policy_loss(*grouped, loss, transform, 0.1).backward()
    assert torch.allclose(leaf.grad / 2, again.grad, rtol=1e-6, atol=1e-9) and again.grad.abs().max() > 1e-3


@pytest.mark.slow
def test_verl_recipe_refuses_broken_groups(verl_loss):
    *rows, _ = verl_rows(2)
    for change, says in (
        (lambda x: x[:14], "^14 rows are not a multiple of rollout.n = 4$"),
        (lambda x: x.roll(1, dims=0), "^the advantages of 4 consecutive rows do not sum to 0"),
    ):
        with pytest.raises(ValueError, match=says):
            verl_gradient(verl_actor("tokrl_gspo_min"), *map(change, rows))
    with pytest.raises(ValueError, match="needs actor.loss_agg_mode=seq-mean-token-mean; got token-mean"):
        verl_gradient(verl_actor("tokrl_gspo_min", "token-mean"), *rows)


def verl_config():
    """verl's configuration with the README's settings."""
    import verl.trainer.config
    from hydra import compose, initialize_config_dir

    block = README[README.index("algorithm.adv_estimator=grpo") :]
    settings = block[: block.index("```")].split()
    others = ["actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8"]
    with initialize_config_dir(os.path.dirname(verl.trainer.config.__file__), version_base=None):
        return compose("ppo_trainer", [*settings, *others, "trainer.n_gpus_per_node=4", "trainer.nnodes=1"])


@pytest.mark.slow
def test_verl_accepts_the_readmes_settings(verl_loss):
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    config = verl_config()
    validate_config(config, use_reference_policy=False, use_critic=False)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert (actor.rollout_n, actor.policy_loss.loss_mode) == (8, "tokrl_gspo_min")
    assert config.trainer.v1.trainer_mode == "whole_groups"


@pytest.mark.slow
def test_verl_trainer_runs_as_the_synchronous_one(verl_loss, monkeypatch):
    """By its own name verl would give it another replay buffer."""
    pytest.importorskip("transfer_queue")
    from verl.trainer.ppo.v1 import PPOTrainerSync, get_trainer_cls

    modes, config = [], verl_config()
    monkeypatch.setattr(PPOTrainerSync, "__init__", lambda self, c: modes.append(c.trainer.v1.trainer_mode))
    trainer = importlib.import_module("verl_trainer").WholeGroups
    assert get_trainer_cls(config.trainer.v1.trainer_mode) is trainer and trainer(config) and modes == ["sync"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_verl_trainer_keeps_groups_whole_where_verls_own_does_not(verl_loss, ranks):
    """Rows that finished in random order, as each trainer deals them out to the ranks: uids of each micro-batch."""
    pytest.importorskip("transfer_queue")
    from types import SimpleNamespace

    from transfer_queue import KVBatchMeta
    from verl.trainer.ppo.v1 import PPOTrainerSync

    order = torch.randperm(128, generator=named_generator(0, "verl")).tolist()
    for trainer, whole in ((importlib.import_module("verl_trainer").WholeGroups, True), (PPOTrainerSync, False)):
        self = trainer.__new__(trainer)
        self.config, self.use_critic, self.global_steps, self.tokenizer = (
            verl_config(),
            False,
            1,
            SimpleNamespace(eos_token_id=0),
        )
        self.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": list(range(ranks))})
        tags = [{"seq_len": 5 + (37 * i) % 400} for i in order]
        rows = KVBatchMeta(keys=[f"{i // 8:04x}_{i % 8}_0" for i in order], tags=tags, partition_id="train")
        shares = self._balance_batch(rows, metrics={}).chunk(ranks)
        groups = [
            {key.split("_")[0] for key in share.keys[i : i + 8]} for share in shares for i in range(0, 128 // ranks, 8)
        ]
        assert all(len(uids) == 1 for uids in groups) == whole


# ---- The exercises' checks notice what is missing and what is wrong --------------------------------------------------


def own_loss(w):
    """The edits by which a reader adds the loss "mine" whose weight is w."""
    names, line = 'LOSSES = ("reinforce", ', '        case "gspo":      w = '
    return (names, names + '"mine", '), (line, f'        case "mine":      {w}\n{line}')


def own_task(arguments):
    """The edit by which a reader adds the task "mine"."""
    return ("chain(), add())", f'chain(), add(), Task("mine", {arguments}))')


MIN = "weights.masked_fill(~alive, math.inf).amin(dim=1, keepdim=True).expand_as(weights)"
ORTH = "(A * w).sum(dim=1, keepdim=True) / norm2.masked_fill(norm2 == 0, 1.0) * A"
UNFINISHED = "raise NotImplementedError"
EXERCISES = {  # number: check, then what a reader may leave or write: a stub and two wrong solutions
    1: (
        "advantages_by_hand",
        ("advantages = rewards - rewards.mean(dim=1, keepdim=True)", UNFINISHED),
        ("rewards - rewards.mean(dim=1, keepdim=True)", "rewards - rewards.mean()"),  # the mean of all groups
        ("advantages.masked_fill(all_equal, 0.0)", "advantages"),  # rounding dust
    ),
    2: (
        "weights_by_hand and gspo",
        ("w = clipped((log_R / n).exp()) / n ", UNFINISHED),
        ("clipped((log_R / n).exp()) / n", "clipped((log_R / mask.shape[-1]).exp()) / n"),  # unscored tokens count
        ("clipped((log_R / n).exp()) / n", "clipped((log_R / n).exp())"),  # the mean over tokens is missing
    ),
    3: (
        "transforms_by_hand or eq17",
        (f"w = {MIN}", UNFINISHED),
        (MIN, MIN.replace("math.inf", "0.0")),  # the dead win
        (MIN, MIN.replace("~alive,", "~alive | (weights == 0),")),  # the clipped do not count
    ),
    4: (
        "transforms_by_hand or eq17",
        (f"w = w - {ORTH}", UNFINISHED),
        (".expand_as(weights).masked_fill(~alive, 0.0)\n        norm2", "\n        norm2"),  # the dead count
        (ORTH, ORTH.replace("norm2.masked_fill(norm2 == 0, 1.0)", "(norm2 + 1e-3)")),  # not orthogonal any more
    ),
    5: (
        "sampler or samples or group_of_one",
        ("cache: dict = {}", UNFINISHED),
        ("if t == fork:", "if t == fork + 1:"),  # one shared token too many
        ("multinomial(distribution.exp(), 1", "multinomial(distribution.div(2).exp(), 1"),  # a temperature of 2
    ),
    6: (
        "measures_by_brute_force",
        ("q = logp.log_softmax(1)", UNFINISHED),
        ("q = logp.log_softmax(1)", "q = logp"),  # not conditioned on being right
        ("(-(q.exp() * q).sum(1) / n.to(q).log()).mean()", "-(q.exp() * q).sum(1).mean()"),  # in nats
    ),
    7: (
        "own_losses or padding or gradient_is",
        own_loss(UNFINISHED),
        own_loss("w = clipped(r) / L"),  # a clip that looks at the sign
        own_loss("w = torch.ones_like(r) / L"),  # no ratio, so no clip
    ),
    8: (
        "task or demonstrations or brute_force",
        own_task("1, 4, {}"),
        own_task('1, 2, {f"{a}=": (f"{a}0",) for a in range(9)}'),  # no room for EOS
        own_task('1, 4, {f"{a}=": (f"{a}0",) for a in range(20)}'),  # prompts of two lengths
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", EXERCISES)
def test_an_exercises_check_fails_for_a_stub_and_for_wrong_solutions(number, tmp_path):
    """With the shipped bodies each check passes: it is a part of this suite."""
    selection, *attempts = EXERCISES[number]
    quoted = selection if selection.isidentifier() else f'"{selection}"'
    assert re.search(rf"^\| {number} \|.*`python -m pytest -k {quoted}`", README, re.M)
    file, running = HERE / ("toy_tasks.py" if number == 8 else "tokrl.py"), []
    for i, edits in enumerate(attempts):
        folder, edited = tmp_path / str(i), file.read_text(encoding="utf-8")
        folder.mkdir()
        for name in ("tokrl.py", "toy_tasks.py", "test_tokrl.py", "README.md", ".pytest.ini"):
            shutil.copy(HERE / name, folder)
        shutil.copytree(HERE / "figures", folder / "figures", ignore=shutil.ignore_patterns(".cache"))
        for there, written in edits if number == 7 else [edits]:
            assert edited.count(there) == 1, there
            edited = edited.replace(there, written)
        (folder / file.name).write_text(edited, encoding="utf-8")
        check = [sys.executable, "-m", "pytest", "-q", "-x", "-k", selection]
        running.append(subprocess.Popen(check, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for edits, process in zip(attempts, running):
        output = process.communicate()[0]
        assert process.returncode == 1 and "1 failed" in output, (edits, output[-2000:])


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for a console without ρ or −
    for audit, *arguments in AUDIT:
        place, statement, numbers, verdict = audit(*arguments)
        print(f"{place:<12} {statement}\n{'':12} {numbers}\n{'':12} -> {verdict}")
    print("\nρ: ratio of the shared token, u: product of the other ratios, η: step size, κ: weight of a solution,")
    print(
        "c(x): the share of the geometry, h*: the shared token's place, gᵀFg: squared size of a step (F: Fisher matrix)"
    )
