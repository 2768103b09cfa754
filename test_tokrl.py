"""Tests of tokrl.py and toy_tasks.py, and the paper's statements as an executable audit.

    python -m pytest                    everything, about a minute and a half on two cores
    python -m pytest -m "not slow"      without those that train or start the program, about 15 seconds
    python test_tokrl.py                the audit's table: what each place of the paper says, and what is measured

Each audit_* function returns (place, statement, measured, verdict); the test beside it asserts the verdict, "fails"
included: a verdict is computed from what is measured, never written down beforehand.
"""

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tokrl
from tokrl import (LOSSES, TRANSFORMS, Config, Policy, cancellation_residual, completion_mask, effective_weights,
                   evaluate, group_advantages, named_generator, policy_loss, sample_groups, token_logprobs,
                   transform_weights)
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
    assert len(prompts) == len(set(prompts)) <= 150 and len(solutions) <= 400
    assert len({len(p) for p in prompts}) == 1
    assert task.max_completion > max(map(len, solutions)) + 1 and 0 <= task.fork < task.max_completion
    for prompt in prompts:
        right = task.solutions(prompt)
        assert len(set(right)) == len(right) >= 1
        assert decode(encode(prompt)) == prompt
        for solution in right:
            assert task.reward(prompt, solution) == 1.0
            for wrong in (solution + "_", solution + "0", solution[:-1], " " + solution, "_" + solution, solution + "."):
                assert task.reward(prompt, wrong) == 0.0
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
    rng, prompt = random.Random(0), task.prompts()[5]
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
    policy, prompts = Policy(named_generator(1, "test")), torch.randint(2, 12, (40, 3), generator=named_generator(0, "p"))
    tokens, old, mask = sample_groups(policy, prompts, 5, fork, 8, named_generator(0, "sampling"))
    assert tokens.shape == old.shape == mask.shape == (40, 5, 8) and mask.dtype == torch.bool
    shared = (tokens == tokens[:, :1]).all(dim=1)  # (B,T)
    assert shared[:, :fork].all()
    alive = mask[:, :, fork].all(dim=1)  # groups that did not end within the opening
    assert not shared[alive, fork].any(), "five draws out of 14 tokens agree in every group"
    scored = token_logprobs(policy, prompts, tokens)
    assert ((scored - old) * mask).abs().max() < 1e-5
    assert (old[~mask] == 0).all() and (tokens[~mask] == PAD).all() and not (tokens[mask] == PAD).all()
    for row, kept in zip(tokens.flatten(0, 1).tolist(), mask.flatten(0, 1).tolist()):  # the mask ends with the first EOS
        n = row.index(EOS) + 1 if EOS in row else 8
        assert kept == [True] * n + [False] * (8 - n)


def test_samples_follow_the_enumerated_distribution():
    """One prompt, two tokens, 14² outcomes: a chi-square over them, with and without a fork, for the last of a group."""
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
    "cispo": [[[1.2 * 4 / 8, 0.5 * 4 / 8, 0], [1.2 * 4 / 8, 1.1 * 4 / 8, 0.5 * 4 / 8]],
              [[0.7 * 4 / 8, 0, 0], [0, 1.2 * 4 / 8, 0.9 * 4 / 8]]],
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
    assert torch.allclose(weights("dr_grpo", clip_eps=(0.2, 0.6)),
                          tensor([[[1.5, 0.5, 0], [1.5, 1.1, 0]], [[0, 0, 0], [0, 1.3, 0.9]]]) / 3)
    assert torch.allclose(weights("dr_grpo", clip_eps=(0.6, 0.2)),
                          tensor([[[0, 0.5, 0], [1.5, 1.1, 0.5]], [[0.7, 0, 0], [0, 0, 0.9]]]) / 3)
    assert torch.allclose(weights("grpo_sym", clip_eps=(0.2, 0.6)),
                          tensor([[[1.5, 0, 0], [1.5, 1.1, 0]], [[0, 0, 0], [0, 1.3, 0.9]]]) / 3)
    assert torch.allclose(weights("cispo", clip_eps=(0.2, 4.0)), RATIO * MASK / 2)
    # gspo: 0.938 is inside 1 ± 0.07, 1.082 is inside 1 ± 0.1; 0.7 never is
    s = tensor([[[math.sqrt(0.75) / 2] * 3, [0.825 ** (1 / 3) / 3] * 3], [[0.0] * 3, [math.sqrt(1.17) / 2] * 3]]) * MASK
    assert torch.allclose(weights("gspo", clip_eps=0.1), s)
    for loss in LOSSES:
        unclipped = weights(loss, clip_eps=math.inf)
        assert (unclipped[MASK == 1] > 0).all()
        scale = 3 / 5 if loss in ("reinforce", "dr_grpo", "grpo_sym", "seq") else 1.0
        assert torch.allclose(weights(loss, clip_eps=math.inf, max_length=5), unclipped * scale)
    zeros = effective_weights("gspo", OLD, OLD, ADVANTAGES, MASK * 0)
    assert (zeros == 0).all(), "nobody is scored"


@pytest.mark.parametrize("loss", LOSSES)
def test_clip_boundaries_are_kept(loss):
    """A ratio of exactly 1 ± ε is not past the clip. The ε are powers of two so that 1 ± ε is exact."""
    for ratio, advantage in ((1.25, 1.0), (0.75, -1.0)):
        logprobs = tensor([[[math.log(ratio)], [0.0]]])
        weights = effective_weights(loss, logprobs, logprobs * 0, tensor([[advantage, -advantage]]), torch.ones(1, 2, 1),
                                    clip_eps=0.25 + 1e-15)
        assert weights[0, 0, 0] > 0.7


def test_transforms_by_hand():
    w = tensor([[[1.0, 4.0, 5.0, 6.0], [2.0, 3.0, 7.0, 8.0], [6.0, 2.0, 9.0, 9.0]]])
    mask = torch.tensor([[[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]]])  # all, two, one, nobody alive
    A = tensor([[1.0, 1.0, -2.0]])
    assert torch.equal(transform_weights(w, A, mask, "off"), w * mask)
    # Eq. 17: min over the alive: min(1, 2, 6) = 1; min(4, 2) = 2; the lone survivor keeps 7; nobody: 0
    assert torch.equal(transform_weights(w, A, mask, "min"), tensor([[[1.0, 2, 0, 0], [1, 0, 7, 0], [1, 2, 0, 0]]]))
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
    assert value(pad(logprobs, -7.0), pad(old, -1.0), A, pad(mask, False)) == pytest.approx(value(logprobs, old, A, mask), abs=1e-14)
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
    assert torch.equal(cancellation_residual(tensor([[[2.0, 3.0], [5.0, 3.0]]]), tensor([[1.0, -1.0]])), tensor([[1.5, 0.0]]))
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
    behind = [x - 0.3 * torch.randn(x.shape, dtype=torch.float64, generator=generator) * off_policy for x in (root, second)]
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
        total = total - probability * policy_loss(new[group][None], old[group][None], advantages, torch.ones(1, G, 2), loss,
                                                  transform, clip_eps=math.inf, max_length=1)
    got = torch.cat([x.flatten() for x in torch.autograd.grad(total, (root, second), retain_graph=True)])
    want = torch.autograd.grad((new.sum(-1).exp() * reward).sum() * (G - 1) / G, (root, second))
    want = torch.cat([x.flatten() for x in want])
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("loss, off_policy", [("reinforce", False), ("dr_grpo", False), ("seq", False), ("seq", True)])
@pytest.mark.parametrize("G", [2, 3])
def test_expected_gradient_is_unbiased(loss, off_policy, G):
    assert enumerated_bias(loss, "off", off_policy, G) < 1e-12


@pytest.mark.parametrize("loss, transform, low, high", [
    ("seq", "min", 0.05, 0.30), ("seq", "orth", 0.05, 0.30), ("dr_grpo", "off", 0.01, 0.30), ("reinforce", "off", 0.01, 0.30)])
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
        assert evaluate(policy, task)["solution_drift"] is None and evaluate(policy, task, policy)["solution_drift"] == 0.0
    else:
        assert got["solution_entropy"] is None and got["solution_drift"] is None


@pytest.mark.parametrize("name, fork", [("commute", 2), ("commute", 0), ("split", 2), ("split", 6), ("add", 1), ("chain", 3)])
def test_learning_tax_by_brute_force(name, fork):
    task, after, before = TASKS[name], random_policy(3), random_policy(4)

    def kl(prompt, opening, t):
        rows = torch.tensor([encode(prompt) + opening[:t]])
        p, q = (x(rows)[0, -1].log_softmax(-1) for x in (after, before))
        return (p.exp() * (p - q)).sum().item()

    want = np.mean([np.mean([sum(kl(p, ids, t) for t in range(min(max(fork, 1), len(ids))))
                             for ids in (encode(y) + [EOS] for y in task.solutions(p))]) for p in task.prompts()])
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
            seen = tokrl.update(policy, reference, optimizer, config,
                                rollout._replace(rewards=torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]])))
            assert all(map(math.isfinite, seen.values())) and ("residual" in seen) == (fork > 0)
            if fork and transform != "off":
                assert seen["residual"] < 1e-6


def test_update_refuses_a_rollout_of_another_policy():
    policy = Policy(named_generator(0, "test"))
    config = Config(group_size=2, prompts=2)
    rollout = tokrl.collect(Policy(named_generator(1, "test")), COMMUTE, config, named_generator(0, "sampling"))
    with pytest.raises(FloatingPointError, match="inner step 1: a log-ratio is"):
        tokrl.update(policy, policy, tokrl.adamw(policy, 1e-3), config, rollout)


@pytest.mark.slow
def test_a_short_run_learns_and_repeats_to_the_bit():
    rows = []
    config = Config(transform="min", steps=40, lr=3e-4)
    run = tokrl.train(config, 100, rows.append)
    assert 0.25 < rows[0]["accuracy"] < 0.5 and rows[0]["solution_entropy"] > 0.9 and rows[0]["solution_drift"] == 0
    assert rows[-1]["accuracy"] > rows[0]["accuracy"] + 0.3 and rows[-1]["step"] == 40
    steps = []
    tokrl.warm_start.cache_clear()
    evaluate_more = lambda row: steps.append(evaluate(Policy(named_generator(0, "test")), COMMUTE))  # moves nothing
    again = tokrl.train(config, 100, evaluate_more)
    assert len(steps) == 41 and {k: v for k, v in again.items() if k != "timing"} == {k: v for k, v in run.items() if k != "timing"}
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
