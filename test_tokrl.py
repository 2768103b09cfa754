"""Tests of tokrl.py and toy_tasks.py, and the paper's statements as an executable audit.

    python -m pytest                    everything
    python -m pytest -m "not slow"      without what trains for long or starts the program, about 25 seconds
    python test_tokrl.py                the audit: what each place of the paper says, and what is measured

Each audit_* function returns (place, statement, measured, verdict): computed, never written down beforehand.
"""

import copy, functools, importlib, itertools, json, math, os, random, re, shlex, shutil, signal, subprocess
import collections, sys, time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tokrl
from tokrl import LOSSES, TRANSFORMS, Config, Policy, cancellation_residual, completion_mask, credit, evaluate
from tokrl import effective_weights, group_advantages, named_generator, policy_loss, prompt_tokens
from tokrl import sample_groups, token_logprobs, transform_weights
from toy_tasks import EOS, LARGER_FIRST, PAD, TASKS, VOCAB, decode, encode
HERE, COMMUTE = Path(__file__).resolve().parent, TASKS["commute"]
torch.set_num_threads(1)

def tensor(values):
    """In float64, where the hand-made numbers are exact to 1e-12."""
    return torch.tensor(values, dtype=torch.float64)
def close(a, b, atol=1e-12):
    """Equal shapes, and equal numbers to `atol`."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=atol)
def random_policy(seed: int = 0) -> Policy:
    """A policy in float64 that has learnt nothing."""
    return Policy(named_generator(seed, "test")).double()

# ---- 1. Tasks, by enumeration
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_task_is_what_it_says(task):
    known = {"commute": (72, 144), "split": (10, 276), "chain": (84, 168), "add": (100, 100)}
    prompts, solutions = task.prompts(), [s for p in task.prompts() for s in task.solutions(p)]
    assert (len({*prompts}), len(solutions)) == known.get(task.name, (len(prompts), len(solutions)))
    assert 1 < len(prompts) <= 150 and len(solutions) <= 400 and len({len(p) for p in prompts}) == 1
    assert task.max_completion > max(map(len, solutions)) + 1 and 0 <= task.fork < task.max_completion
    for prompt in prompts:
        right = task.solutions(prompt)
        assert len(set(right)) == len(right) >= 1 and decode(encode(prompt)) == prompt
        for s in right:
            others = [s, s + "_", s + "0", s[:-1], " " + s, "_" + s, s + "."]
            others += [s[:i] + c + s[i + 1 :] for i, c in itertools.product(range(len(s)), VOCAB)]
            assert all(task.reward(prompt, other) == float(other in right) for other in others)
def test_solutions_are_right_by_arithmetic():
    total = lambda text: sum(map(int, text.split("+")))
    for prompt in COMMUTE.prompts():
        for left, right in (s.split("=") for s in COMMUTE.solutions(prompt)):
            assert sorted(left.split("+")) == sorted(prompt[:2]) and total(left) == int(right)
        (only,) = LARGER_FIRST.solutions(prompt)
        assert only in COMMUTE.solutions(prompt) and int(only[0]) > int(only[2])
    sums = {"+".join(digits) for n in (2, 3) for digits in itertools.product("123456789", repeat=n)}
    for prompt in TASKS["split"].prompts():
        assert set(TASKS["split"].solutions(prompt)) == {s for s in sums if total(s) == int(prompt[:-1])}
    for prompt in TASKS["chain"].prompts():
        a, b, c = map(int, prompt[:-1].split("+"))
        assert TASKS["chain"].solutions(prompt) == [f"{a + b}+{c}={a + b + c}", f"{a}+{b + c}={a + b + c}"]
    for prompt in TASKS["add"].prompts():
        assert [int(s) for s in TASKS["add"].solutions(prompt)] == [total(prompt[:-1])]
    assert encode("7+5=12") == [VOCAB.index(c) for c in "7+5=12"]
    assert decode([2, PAD, 3, EOS, 4]) == "0_1" and decode([2, 3]) == "01" and decode([EOS]) == ""
    for call in (lambda: encode("7x"), lambda: COMMUTE.solutions("99=")):
        pytest.raises(ValueError, call)
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_demonstrations_are_half_wrong_and_spread_evenly(task):
    rng, prompt = random.Random(0), task.prompts()[len(task.prompts()) // 2]
    demonstrations = collections.Counter(task.demonstration(prompt, rng) for _ in range(4000))
    mean = np.mean(right := [demonstrations[s] for s in task.solutions(prompt)])
    assert abs(sum(right) - 2000) < 160 and all(abs(n - mean) < 5 * math.sqrt(mean) for n in right)  # 5 sd

# ---- 2. Policy and sampler
def every_row(policy, tokens):
    """Policy.forward without its shortcut: each row is computed, copies too."""
    x = policy.token(tokens) + policy.position.weight[: tokens.shape[1]]
    return policy.head(policy.norm(policy.blocks(x))).log_softmax(-1)
def test_policy_is_causal_and_scores_the_right_place():
    policy, tokens = random_policy(), torch.randint(14, (3, 9), generator=named_generator(0, "tokens"))
    assert close((log_p := policy(tokens)).exp().sum(-1), torch.ones(3, 9).double())
    for t in range(9):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % len(VOCAB)
        moved = (policy(changed) - log_p).abs().amax(-1) > 1e-12
        assert not moved[:, :t].any() and moved[:, t:].all()
    got = token_logprobs(policy, tokens[:, :3], tokens[:, None, 3:])  # against a loop
    for row, t in itertools.product(range(3), range(6)):
        want = every_row(policy, tokens[row : row + 1, : 3 + t])[0, -1, tokens[row, 3 + t]]
        assert got[row, 0, t].item() == pytest.approx(want.item(), abs=1e-12)
def test_distinct_rows_computed_once_give_the_same_values_and_gradients():
    policy, generator = random_policy(), named_generator(0, "tokens")
    rows = torch.randint(14, (5, 7), generator=generator)[[3, 1, 1, 4, 3, 3, 0, 2, 1]]
    weight = torch.randn(9, 7, 14, generator=generator).double()
    once, each = policy(rows), every_row(policy, rows)
    gradients = [torch.autograd.grad((x * weight).sum(), [*policy.parameters()]) for x in (once, each)]
    assert close(once, each) and all(close(a, b, 1e-10) and b.abs().sum() > 0 for a, b in zip(*gradients))
@pytest.mark.parametrize("fork", [0, 1, 3, 7])
def test_a_group_shares_its_fork_and_branches_after_it(fork):
    prompts = torch.randint(2, 12, (40, 3), generator=named_generator(0, "p"))
    policy, generator = Policy(named_generator(1, "test")), named_generator(0, "sampling")
    tokens = sample_groups(policy, prompts, 5, fork, 8, generator)
    assert tokens.shape == (40, 5, 8) and tokens.dtype == torch.int64
    mask, shared = completion_mask(tokens), (tokens == tokens[:, :1]).all(dim=1)  # shared: (B,T)
    alive = mask[:, :, fork].all(dim=1)  # groups that did not end within the opening
    assert shared[:, :fork].all() and alive.any() and shared[alive, fork].float().mean() < 0.5, "each its own"
    assert (tokens[~mask] == PAD).all() and (tokens[mask] == PAD).any(), "a sampled PAD is scored"
    assert len({tuple(row) for row in tokens[:, 0].tolist()}) > 20, "prompts do not share"
    # the mask: a PAD before the first EOS is scored, a second EOS is not; without EOS all is scored
    rows = torch.tensor([[PAD, 3, EOS, 5, EOS], [EOS, 2, 2, 2, 2], [3, PAD, 3, 3, PAD]])
    assert completion_mask(rows).int().tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert tokrl.completion_tokens(["7+5=12", "1"], 8).tolist() == [encode("7+5=12._"), encode("1.______")]
def test_samples_follow_the_enumerated_distribution():
    policy, prompt = Policy(named_generator(2, "test")), torch.tensor([encode("75=")])
    pairs = torch.cartesian_prod(torch.arange(14), torch.arange(14))[None]  # two tokens: 14² outcomes
    p = token_logprobs(policy, prompt, pairs).sum(-1).exp()[0]
    p[pairs[0, :, 0] == EOS] = 0.0  # one outcome: ended at once
    expected = torch.cat([p, (1 - p.sum())[None]]).detach().numpy() * 20_000
    for fork in (0, 1):
        generator = named_generator(fork, "sampling")
        first, second = sample_groups(policy, prompt.expand(20_000, 3), 2, fork, 2, generator)[:, -1].T
        counts = torch.bincount(torch.where(first == EOS, 196, first * 14 + second), minlength=197).numpy()
        big = expected > 5
        chi2 = ((counts[big] - expected[big]) ** 2 / expected[big]).sum()
        assert chi2 < big.sum() + 5 * math.sqrt(2 * big.sum())

# ---- 3. Advantages, duplicates, weights, transforms, loss: by hand
def test_group_advantages_by_hand():
    # 1 0 0 1: mean 1/2, std with G − 1: sqrt(4 · 1/4 / 3) = sqrt(1/3). 1 0 0 0: mean 1/4, std 1/2
    rewards = tensor([[1, 0, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1], [0.3, 0.3, 0.3, 0.3]])
    got, third = group_advantages(rewards), math.sqrt(1 / 3) + 1e-4
    assert close(got[0], tensor([1, -1, -1, 1]) * 0.5 / third), "std uses G − 1, and + 1e-4"
    assert close(got[1], tensor([0.75, -0.25, -0.25, -0.25]) / 0.5001), "the group's own"
    assert (got[2:] == 0).all(), "equal rewards: exactly 0, not dust"
    assert (group_advantages(torch.full((1, 7), 0.1), normalize=False) == 0).all(), "not dust"
    assert torch.equal(group_advantages(rewards, normalize=False)[1], tensor([0.75, -0.25, -0.25, -0.25]))
    # counted only: of 1 0 . 1 mean 2/3, std sqrt((1/9 + 4/9 + 1/9) / 2) = sqrt(1/3); of 1 . 0 . std sqrt(1/2)
    rewards = tensor([[1, 0, 5, 1], [1, 5, 0, 5], [5, 1, 0, 1], [1, 0, 1, 0], [1, 0, 0, 1]])
    counted = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    got = group_advantages(rewards, counted=counted)
    assert close(got[0], tensor([1, -2, 0, 1]) / 3 / third)
    assert close(got[1], tensor([1, 0, -1, 0]) / 2 / (math.sqrt(0.5) + 1e-4))
    assert (got[2:] == 0).all(), "equal among the counted, one alone, nobody: 0"
def test_credit_by_hand():
    # a completion, its copy, two others; rewards 1 1 0 1. keep: mean 3/4, std 1/2 = sqrt((3/16 + 9/16) / 3).
    # once: 1 . 0 1, as above. share: 1/2 1/2 0 1, mean 1/2, std sqrt((1/4 + 1/4) / 3)
    tokens, rewards = torch.tensor([[[5, 2, 1], [5, 2, 1], [6, 2, 1], [5, 3, 1]]]), tensor([[1, 1, 0, 1]])
    want = {"keep": tensor([[0.25, 0.25, -0.75, 0.25]]) / 0.5001,
            "once": tensor([[1, 0, -2, 1]]) / 3 / (math.sqrt(1 / 3) + 1e-4),
            "share": tensor([[0, 0, -0.5, 0.5]]) / (math.sqrt(1 / 6) + 1e-4)}
    for kind, advantages in want.items():
        got, counted = credit(tokens, rewards, kind)
        assert close(got, advantages) and counted.tolist() == [[True, kind != "once", True, True]], kind
        # all distinct: nothing changes; both groups have the same four, and must not see each other
        distinct, two = torch.tensor([[[2], [3], [4], [5]]] * 2), tensor([[1, 0, 0, 1], [0, 0, 1, 0]])
        got, counted = credit(distinct, two, kind)
        assert close(got, group_advantages(two)) and counted.all()
        got, counted = credit(torch.full((1, 4, 3), 7), tensor([[1, 1, 1, 1]]), kind)  # all copies of one
        assert (got == 0).all() and counted.tolist() == [[True] + [kind != "once"] * 3]
        for seed in range(5):
            tokens8 = torch.randint(2, 4, (3, 8, 2), generator=named_generator(seed, "tokens"))
            got, _ = credit(tokens8, (tokens8[..., 0] == tokens8[..., 1]).double(), kind)
            assert close(got.sum(1), tensor([0.0] * 3)) and got.abs().sum() > 1, "Σ Â = 0"
# Two groups of two, lengths 2 3 | 1 3, one with a hole; ratios below, inside and above 1 ± 0.2
MASK = torch.tensor([[[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [0, 1, 1]]])
RATIO = tensor([[[1.5, 0.5, 9.0], [1.5, 1.1, 0.5]], [[0.7, 9.0, 9.0], [9.0, 1.3, 0.9]]])
ADVANTAGES = tensor([[1.0, -1.0], [-2.0, 2.0]])
OLD = tensor([[[-1.0, -2.0, -3.0], [-0.5, -0.1, -4.0]], [[-1.5, -0.3, -0.2], [-0.7, -2.5, -0.9]]])
# n = 2 3 | 1 2, L = 3, BG / M = 4 / 8. The clip drops ratios above 1.2 where Â > 0, below 0.8 where Â < 0.
# gspo: s = sqrt(1.5 · 0.5) = 0.866 kept (Â > 0); cbrt(1.5 · 1.1 · 0.5) = 0.938 dropped at 1 − 0.04 (Â < 0);
# 0.7 dropped (Â < 0); sqrt(1.3 · 0.9) = 1.082 dropped at 1 + 0.04 (Â > 0)
N, CLIPPED = tensor([[[2], [3]], [[1], [2]]]), tensor([[[0, 0.5, 0], [1.5, 1.1, 0]], [[0] * 3, [0, 0, 0.9]]])
BY_HAND = {"reinforce": MASK / tensor(3.0), "grpo": CLIPPED / N, "dr_grpo": CLIPPED / 3, "dapo": CLIPPED / 2,
           "grpo_sym": tensor([[[0, 0, 0], [0, 1.1, 0]], [[0, 0, 0], [0, 0, 0.9]]]) / 3,
           "cispo": tensor([[[1.2, 0.5, 0], [1.2, 1.1, 0.5]], [[0.7, 0, 0], [0, 1.2, 0.9]]]) / 2,
           "gspo": tensor([[[1, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]]) * math.sqrt(0.75) / 2,
           "seq": tensor([[[0.75], [0.825]], [[0.7], [1.17]]]) * MASK / 3}
@pytest.mark.parametrize("loss", BY_HAND)
def test_weights_by_hand(loss):
    for mask, off in zip((MASK, MASK.bool(), MASK.double()), (0.0, math.nan, -math.inf)):  # off: off the mask
        new, old = ((x + RATIO.log() * i).masked_fill(MASK == 0, off) for i, x in ((1, OLD), (0, OLD)))
        got = effective_weights(loss, new, old, ADVANTAGES, mask)
        assert close(got, BY_HAND[loss]) and (got[MASK == 0] == 0).all(), f"want {BY_HAND[loss].tolist()}"
def test_weights_with_other_clips_and_lengths_by_hand():
    weights = lambda loss, **kw: effective_weights(loss, OLD + RATIO.log(), OLD, ADVANTAGES, MASK, **kw)
    # a pair (low, high) = (0.2, 0.6): 1.5 and 1.3 with Â > 0 are now kept; 0.5 and 0.7 with Â < 0 are not
    up = tensor([[[1.5, 0.5, 0], [1.5, 1.1, 0]], [[0, 0, 0], [0, 1.3, 0.9]]]) / 3
    blind = tensor([[[1.5, 0, 0], [1.5, 1.1, 0]], [[0, 0, 0], [0, 1.3, 0.9]]]) / 3
    assert close(weights("dr_grpo", clip_eps=(0.2, 0.6)), up)
    assert close(weights("grpo_sym", clip_eps=[0.2, 0.6]), blind)
    assert close(weights("cispo", clip_eps=(0.2, 7.9)), RATIO * MASK / 2)
    # gspo: 0.938 and 1.082 are inside 1 ± 0.1; 0.7 is not
    s = tensor([[[0.75 ** (1 / 2)], [0.825 ** (1 / 3)]], [[0.0], [1.17 ** (1 / 2)]]])
    assert close(weights("gspo", clip_eps=0.1), s / N * MASK)
    for loss in LOSSES:
        unclipped, longer = (weights(loss, clip_eps=math.inf, max_length=L) for L in (None, 5))
        scale = 3 / 5 if loss in ("reinforce", "dr_grpo", "grpo_sym", "seq") else 1.0  # L = 5 instead of 3
        assert (unclipped[MASK == 1] > 0).all() and (loss not in BY_HAND or close(longer, unclipped * scale))
        masks = torch.eye(12)[0].view(2, 2, 3), MASK * 0
        one, nobody = (effective_weights(loss, OLD, OLD, ADVANTAGES, mask) for mask in masks)
        assert (nobody == 0).all() and (loss != "dapo" or one.sum() == 4), "BG / M = 4 / 1"
def test_the_clip_in_weights_asks_for_the_sign_and_keeps_its_boundaries():
    # Â = ½, −½, 0 at ratios 0.5 and 1.5: dropped are (½, 1.5) and (−½, 0.5); with Â = 0 nothing is
    log_r, ones, A = tensor([[[0.5, 1.5]] * 3]).log(), torch.ones(1, 3, 2), tensor([[0.5, -0.5, 0.0]])
    w = effective_weights("dr_grpo", log_r, log_r * 0, A, ones, max_length=1)
    assert close(w, tensor([[[0.5, 0.0], [0.0, 1.5], [0.5, 1.5]]]))
    clipped = itertools.product(("grpo", "dr_grpo", "dapo", "grpo_sym", "gspo"), ((1.25, 1), (0.75, -1)))
    for loss, (ratio, a) in clipped:  # 1 ± ε itself is kept; e^800 is inf, and clipped it is 0, not inf · 0
        x, A = tensor([[[math.log(ratio)], [0.0]]]), tensor([[a, -a]])
        first = lambda x, eps: effective_weights(loss, x, x * 0, A, ones[:, :2, :1], eps)[0, 0, 0]
        assert first(x, 0.249) == 0 < first(x, 0.25 + 1e-12) and (a < 0 or first(x * 4000, 0.2) == 0), loss
W = tensor([[[1.0, 4.0, 5.0, 6.0], [2.0, 3.0, 7.0, 8.0], [6.0, 2.0, 9.0, 9.0]]])
ALIVE = torch.tensor([[[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]]])  # all, two, one, nobody
def test_transforms_by_hand():
    A, ones = tensor([[1.0, 1.0, -2.0]]), torch.ones(1, 3, 1)
    # over the alive: min 1, 2, 7, and 0 for nobody; mean 3, 3, 7; shrink: w times min / mean = 1/3, 2/3, 1
    # orth, first place: Âᵀw = 1 + 2 − 12 = −9, ‖Â‖² = 6, w + 1.5 Â = (2.5, 3.5, 3)
    # second, over trajectories 1 and 3: Âᵀw = 4 − 4 = 0, unchanged; third: 7 − 7 = 0
    want = {"off": W * ALIVE, "min": tensor([[[1.0, 2, 0, 0], [1, 0, 7, 0], [1, 2, 0, 0]]]),
            "mean": tensor([[[3.0, 3, 0, 0], [3, 0, 7, 0], [3, 3, 0, 0]]]),
            "shrink": tensor([[[1 / 3, 8 / 3, 0, 0], [2 / 3, 0, 7, 0], [2, 4 / 3, 0, 0]]]),
            "orth": tensor([[[2.5, 4, 0, 0], [3.5, 0, 0, 0], [3, 2, 0, 0]]])}
    for kind in TRANSFORMS:
        assert kind not in want or close(transform_weights(W, A, ALIVE, kind), want[kind]), (kind, want[kind])
        two = torch.cat([W, W + 1]), torch.cat([A, -A]), torch.cat([ALIVE, ALIVE])
        assert torch.equal(transform_weights(*two, kind)[:1], transform_weights(W, A, ALIVE, kind)), "apart"
        assert (transform_weights(W * 0, A, ALIVE, kind) == 0).all()  # all clipped; below, nan off the mask
        assert (transform_weights(tensor([[[math.inf], [math.nan], [1.0]]]), A, ones * 0, kind) == 0).all()
    orth = lambda *A: transform_weights(W, tensor([A]), ALIVE, "orth")
    # second place with other advantages: Âᵀw = 8 − 2 = 6, ‖Â‖² = 5, w − 1.2 Â = (4 − 2.4, 2 + 1.2)
    assert close(orth(2.0, -1.0, -1.0)[0, :, 1], tensor([1.6, 0.0, 3.2]))
    # ‖Â‖ = 0, of all or of the alive only: w itself, never nan
    assert torch.equal(orth(0.0, 0, 0), W * ALIVE) and orth(0.0, 1, 0)[0, :, 1].tolist() == [4, 0, 2]
    # a clipped trajectory is alive: min and shrink silence its group, mean gives it weight again
    for kind, w in {"min": 0.0, "shrink": 0.0, "mean": 2.0}.items():
        assert (transform_weights(tensor([[[0.0], [1.0], [5.0]]]), A, ones, kind) == w).all()
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
    return transform_weights(effective_weights(loss, logprobs, old, A, mask, *clip), A, mask, kind)
def test_transforms_are_two_by_two_equal_or_not_and_smaller_or_not():
    for seed, loss in itertools.product(range(5), ("seq", "gspo", "grpo")):
        mask, w = random_case(seed)[-1], {k: weigh(loss, k, *random_case(seed)) for k in TRANSFORMS}
        mean = {kind: v.sum(1, True) / mask.sum(1, True).clamp(min=1) for kind, v in w.items()}
        assert close(mean["mean"], mean["off"]) and close(mean["shrink"], mean["min"])
        assert (mean["min"] <= mean["off"] + 1e-12).all() and close(w["mean"], mean["mean"] * mask)
        assert close(w["shrink"] * mean["off"], w["off"] * mean["min"]), "as unequal as off"
def test_policy_loss_and_residual_by_hand():
    # −½ [1 · ½ · (−1) + 1 · ½ · (−3) + (−1) · ¼ · (−2)] = −½ (−½ − 1.5 + ½) = 0.75; −inf off the mask adds 0
    logprobs = tensor([[[-1.0, -3.0], [-2.0, -math.inf]]]).requires_grad_()
    loss = policy_loss(logprobs, tensor([[[0.5, 0.5], [0.25, 0.0]]]), tensor([[1.0, -1.0]]))
    loss.backward()
    assert loss.item() == 0.75 and close(logprobs.grad, tensor([[[-0.25, -0.25], [0.125, 0.0]]]))
    # residual: |1 · 2 + (−1) · 5| / 2 = 1.5, |1 · 3 − 3| / 2 = 0
    residual = cancellation_residual(tensor([[[2.0, 3.0], [5.0, 3.0]]]), tensor([[1.0, -1.0]]))
    assert torch.equal(residual, tensor([[1.5, 0.0]]))
@pytest.mark.parametrize("loss", LOSSES)
def test_policy_loss_gradient_is_advantage_times_weight(loss):
    for kind in TRANSFORMS:
        logprobs, old, A, mask = random_case(0)
        mask[1, 2] = False  # an empty trajectory adds nothing, and counts in BG = 15
        w = weigh(loss, kind, logprobs.requires_grad_(), old, A, mask)
        assert not w.requires_grad
        policy_loss(logprobs, w * (logprobs - logprobs.detach()).exp(), A).backward()  # this graph stays out
        assert close(logprobs.grad, -A[..., None] * w / 15) and (logprobs.grad != 0).any() == (w != 0).any()
X, A1 = torch.zeros(1, 2, 3), torch.zeros(1, 2)
@pytest.mark.parametrize("says, call", [
    ("ppo", lambda: effective_weights("ppo", X, X, A1, X)), ("on", lambda: transform_weights(X, A1, X, "on")),
    ("mask", lambda: effective_weights("seq", X, X, A1, X[0])), ("kl", lambda: Config(kl=math.nan)),
    ("B,G,T", lambda: effective_weights("seq", X[0], X, A1, X)), ("fork", lambda: Config(fork=8)),
    ("B,G,T", lambda: effective_weights("seq", X, X[..., :1], A1, X)), ("loss", lambda: Config(loss="ppo")),
    ("advantages", lambda: effective_weights("seq", X, X, A1[0], X)),
    ("clip_eps", lambda: effective_weights("gspo", X, X, A1, X, 0)), ("clip-eps", lambda: Config(clip_eps=1)),
    ("clip_eps", lambda: effective_weights("gspo", X, X, A1, X, (1, -1))), ("lr", lambda: Config(lr=0)),
    ("B,G,T", lambda: transform_weights(X[..., :2], A1, X, "min")), ("max", lambda: Config(transform="max")),
    ("rewards", lambda: group_advantages(A1[0])), ("rewards", lambda: group_advantages(A1.long()))])
def test_wrong_loss_weights_transform_or_advantages_call_raises_naming_it(says, call):
    with pytest.raises(ValueError, match=says):
        call()

# ---- 4. Expected gradients by enumeration: 3 tokens, 2 steps, every group of G
@functools.cache
def enumerated_bias(loss: str, transform: str, off_policy: bool, G: int = 2) -> float:
    """‖E[gradient] − (G−1)/G ∇E[R]‖ / ‖(G−1)/G ∇E[R]‖, the expectation by summing over all 9^G groups."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
    root, second = draw(3).requires_grad_(), draw(3, 3).requires_grad_()
    behind = [x - 0.3 * draw(*x.shape) * off_policy for x in (root, second)]
    reward = tensor([1.0, 0, 0, 1, 0.5, 0, 0, 0, 1])  # of the sequences 00 01 02 10 ... 22
    both = lambda a, b: torch.stack([a.log_softmax(0).repeat_interleave(3), b.log_softmax(1).flatten()], -1)
    new, old = both(root, second), both(*behind).detach()  # (9,2)
    groups = torch.tensor([*itertools.product(range(9), repeat=G)])  # (9^G, G)
    A, mask = group_advantages(reward[groups], normalize=False), torch.ones(len(groups), G, 2)
    w = weigh(loss, transform, new[groups], old[groups], A, mask, math.inf, 1)
    probability = old[groups].sum((1, 2)).exp()[:, None, None]  # of each group
    total = -policy_loss(new[groups], w * probability, A) * len(groups)
    true = (new.sum(-1).exp() * reward).sum() * (G - 1) / G
    got, want = (torch.cat([x.flatten() for x in torch.autograd.grad(y, (root, second), retain_graph=True)])
                 for y in (total, true))
    return ((got - want).norm() / want.norm()).item()
def test_expected_gradient_is_unbiased_on_policy_and_off_policy_only_under_seq():
    for G, loss, kind in itertools.product((2, 3), ("reinforce", "dr_grpo", "seq"), TRANSFORMS):
        assert enumerated_bias(loss, kind, False, G) < 1e-12 > enumerated_bias("seq", "off", True, G)
    for name in ("seq min", "seq orth", "seq mean", "seq shrink", "dr_grpo off", "reinforce off"):
        assert 0.05 < enumerated_bias(*name.split(), True) < 0.3, name

# ---- 5. Exact measures, against sums written out
MIXED = replace(COMMUTE, name="mixed", table={"75=": COMMUTE.table["75="], "41=": COMMUTE.table["41="][:1]})
@pytest.mark.parametrize("task", [COMMUTE, MIXED, TASKS["split"], TASKS["add"]], ids=lambda task: task.name)
def test_measures_by_brute_force(task):
    policy, start = random_policy(3), random_policy(4)
    def log_p(policy, prompt, text):
        ids = encode(prompt) + encode(text) + [EOS]
        rows = every_row(policy, torch.tensor([ids[:-1]]))[0].tolist()
        return sum(rows[t - 1][ids[t]] for t in range(len(prompt), len(ids)))
    accuracy, entropy, drift = [], [], []
    for prompt in task.prompts():
        now, then = ([log_p(x, prompt, y) for y in task.solutions(prompt)] for x in (policy, start))
        accuracy.append((p := np.exp(now)).sum())
        if len(p) > 1:
            q, moved = p / p.sum(), np.subtract(now, then)
            entropy.append(-(q * np.log(q)).sum() / math.log(len(q)))
            drift.append(np.mean([abs(a - b) for a, b in itertools.combinations(moved, 2)]))
    want = [np.mean(x) if x else math.nan for x in (accuracy, entropy, drift)]
    got = [evaluate(policy, task, start)[m] for m in ("accuracy", "solution_entropy", "solution_drift")]
    assert got == pytest.approx(want, rel=1e-7, nan_ok=True) and math.isnan(want[1]) == (task.name == "add")
    one, same = (evaluate(policy, task, x) for x in (policy, tokrl.solution_logprobs(policy, task)))
    assert task.name == "add" or one == same and same["solution_drift"] == 0.0
@pytest.mark.parametrize("name, fork", [("commute", 2), ("commute", 0), ("split", 6), ("add", 1)])
def test_learning_tax_by_brute_force(name, fork):
    task, after, before = TASKS[name], random_policy(3), random_policy(4)
    @functools.cache
    def kl(ids):
        p, q = (every_row(x, torch.tensor([ids]))[0, -1] for x in (after, before))
        return (p.exp() * (p - q)).sum().item()
    opening = lambda p, y: sum(kl((*encode(p), *y[:t])) for t in range(min(max(fork, 1), len(y))))
    mean = lambda p: np.mean([opening(p, encode(y) + [EOS]) for y in task.solutions(p)])
    want = np.mean([*map(mean, task.prompts())])
    then, now = (tokrl.opening_logprobs(policy, task, fork) for policy in (before, after))
    assert tokrl.learning_tax(now, then, task) == pytest.approx(want, rel=1e-9)
    assert tokrl.learning_tax(then, then, task) == 0.0 < want

# ---- 6. Update and train
def rollout():
    """Two groups, of "75=" and "31=": copies, unequal lengths, a sampled PAD, one without EOS."""
    groups = [["7+5=12.", "7+5=12.", "7+1=5.", "7+5=12.", "7+_=12.", "7+5=12."],
              ["3+1=4.", "3+1=4.", "3+1=22.", "3+9=4.", "3+1=", "3+1=2222"]]
    tokens = torch.tensor([[encode(text.ljust(8, VOCAB[PAD])) for text in group] for group in groups])
    return prompt_tokens(["75=", "31="]), tokens, tensor([[1, 1, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0]])
def update_by_hand(policy, reference, optimizer, config, prompts, tokens, rewards):
    """tokrl.update written out: trajectory by trajectory, on parts that chapter 3 has checked."""
    seen, old, (B, G, T) = [], None, tokens.shape
    rows = torch.cat([prompts[:, None].expand(B, G, -1), tokens], -1).flatten(0, 1)[:, :-1]
    score = lambda model: every_row(model, rows)[:, prompts.shape[1] - 1 :].unflatten(0, (B, G))  # (B,G,T,V)
    length = [[row.index(EOS) + 1 if EOS in row else T for row in group] for group in tokens.tolist()]
    A, counted = credit(tokens, rewards, config.duplicates)
    mask = (torch.arange(T) < torch.tensor(length)[..., None]) & counted[..., None]
    anchor = score(reference).detach()
    for _ in range(config.inner_steps):
        every, loss, kl = score(policy), 0.0, 0.0
        log_p = every.gather(-1, tokens[..., None])[..., 0]
        old = log_p.detach() if old is None else old  # of the policy that sampled, at every inner step
        w = weigh(config.loss, config.transform, log_p, old, A, mask, config.clip_eps)
        for b, i in itertools.product(range(B), range(G)):
            loss = loss - (A[b, i] * w[b, i] * log_p[b, i])[: length[b][i]].sum() / (B * G)
            p = every[b, i].exp()  # the KL counts every completion, copies too
            kl = kl + (p * (every[b, i] - anchor[b, i])).sum(-1)[: length[b][i]].mean() / (B * G)
        optimizer.zero_grad()
        (loss + config.kl * kl).backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        pushes = (A[..., None] * w)[..., : config.fork]
        net, size = pushes.sum(1).abs() / G, pushes.abs().sum(1) / G
        seen.append([net.mean(), torch.where(size > 0, net / size, 0.0).mean(), kl.detach(), norm])
    push, residual, kl, norm = np.array(seen).T
    return dict(net_push=push.sum(), residual=residual.mean(), kl=kl.mean(), grad_norm=norm.mean(),
                reward=rewards.mean().item()), norm, (w[mask] == 0).any()
UPDATES = {"seq min keep": dict(max_grad_norm=0.5), "cispo mean once": dict(fork=0, max_grad_norm=0.4),
           "gspo off once": dict(clip_eps=0.01, kl=0.7, max_grad_norm=0.6),
           "gspo min keep": dict(clip_eps=0.01, kl=0.0, max_grad_norm=0.05),
           "grpo shrink share": dict(kl=0.3, max_grad_norm=0.3)}
@pytest.mark.parametrize("name", UPDATES)
def test_update_step_by_step(name):
    loss, transform, duplicates = name.split()
    config = Config("commute", loss, transform, duplicates, inner_steps=4, lr=3e-3, **UPDATES[name])
    mine, its, reference = map(random_policy, (1, 1, 2))
    kept, optimizer = copy.deepcopy(reference.state_dict()), tokrl.adamw(its, config.lr)
    adam = torch.optim.AdamW(mine.parameters(), lr=config.lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    for _ in range(2):
        want, norms, clipped = update_by_hand(mine, reference, adam, config, *rollout())
        got = tokrl.update(its, reference, optimizer, config, *rollout())
        assert got == pytest.approx(want, rel=1e-6, abs=1e-12, nan_ok=True)
        assert (norms > config.max_grad_norm).any() and clipped == (loss in ("gspo", "grpo"))  # both bite
    assert all(close(x, y, 1e-7) for x, y in zip(its.parameters(), mine.parameters()))
    assert all(torch.equal(x, kept[key]) for key, x in reference.state_dict().items())
def test_collect_draws_prompts_and_samples_as_configured():
    task, policy = TASKS["chain"], Policy(named_generator(0, "test"))
    config = Config(task="chain", fork=3, group_size=5, prompts=200)
    draw = lambda task: tokrl.collect(policy, task, config, named_generator(0, "sampling"))
    prompts, tokens, rewards = draw(task)
    assert (prompts.shape, tokens.shape, rewards.shape) == ((200, 6), (200, 5, 7), (200, 5))
    texts, shared = [decode(row) for row in prompts], (tokens == tokens[:, :1]).all(dim=1).float().mean(0)
    assert {*texts} <= {*task.prompts()} and 65 < len({*texts}) < 84  # 84 (1 − e^(−200/84)) = 76
    assert (shared[:3] == 1).all() and shared[3] < 0.7
    # a task that accepts what was sampled third: the same draws, judged otherwise
    right = {p: (decode(tokens[texts.index(p), 2]),) if p in texts else ("",) for p in task.prompts()}
    _, again, rewards = draw(replace(task, table=right))
    want = [[float(decode(row) in right[text]) for row in rows] for text, rows in zip(texts, tokens)]
    assert torch.equal(again, tokens) and rewards.tolist() == want and 70 < rewards.sum() < 1000
    assert len({named_generator(*x).initial_seed() for x in ((0, "x"), (1, "x"), (0, "y"))}) == 3, "apart"
def record_train(monkeypatch, config):
    """train() on seed 5 with every part replaced: its result, what each part was given, and the start."""
    calls, start = {x: [] for x in ("collect", "update", "tax", "evaluate", "samples")}, random_policy(9)
    origin, now = start.token.weight[0, 0].item(), lambda: len(calls["update"])
    age = lambda policy: round(policy.token.weight[0, 0].item() - origin)  # how many updates it has seen
    def note(name, result, *call):
        calls[name].append(call)
        return result
    def update(policy, reference, optimizer, stage, *drawn):
        settings = [group[x] for group in optimizer.param_groups for x in ("lr", "weight_decay", "betas")]
        note("update", None, policy, reference, optimizer, stage, drawn, settings)
        policy.token.weight.data += 1.0
        return dict(net_push=0.5 + now(), residual=now() / 100, kl=now() / 10, grad_norm=2, reward=now() % 2)
    def collect(policy, task, stage, generator):
        state = generator.get_state(), torch.rand(3, generator=generator)
        return note("collect", [(x, now()) for x in "ptr"], policy, task, stage, generator, state[0])
    parts = dict(collect=collect, update=update, warm_start=lambda *x: {(COMMUTE, 5): start}[x],
                 opening_logprobs=lambda p, *x: (age(p), *x), solution_logprobs=lambda p, *x: (age(p), *x),
                 learning_tax=lambda new, old, task: note("tax", now() / 1000, new, old, task),
                 samples=lambda policy, *x: note("samples", "said", age(policy), *x),
                 evaluate=lambda p, *x: note("evaluate", dict(accuracy=now() / 100), now(), age(p), *x))
    for name, part in parts.items():
        monkeypatch.setattr(tokrl, name, part)
    return tokrl.train(config, 5), calls, start
@pytest.mark.parametrize("adapt", [False, True])
def test_train_keeps_its_books(adapt, monkeypatch):
    config = Config(loss="gspo", transform="shrink", clip_eps=0.1, duplicates="once", fork=1, steps=81,
                    lr=0.25, max_grad_norm=0.7, kl=0.3, group_size=3, adapt=adapt)
    result, calls, start = record_train(monkeypatch, config)
    total, later = 81 + 40 * adapt, replace(config, loss="grpo", transform="off", clip_eps=None, fork=0)
    stages = [(COMMUTE, config)] * 81 + [(LARGER_FIRST, later)] * (total - 81)
    (policy, reference, optimizer, *_), generator = calls["update"][0], calls["collect"][0][3]
    assert reference is start and {id(p) for p in policy.parameters()}.isdisjoint(map(id, start.parameters()))
    assert torch.equal(calls["collect"][0][4], named_generator(5, "sampling").get_state())
    parts = zip(stages, calls["collect"], calls["update"], calls["tax"], strict=True)
    for k, ((task, stage), drawn, taken, tax) in enumerate(parts):
        assert drawn[:4] == (policy, task, stage, generator)
        assert taken[:4] == (policy, reference, optimizer, stage)
        assert taken[4] == (("p", k), ("t", k), ("r", k)), "this rollout's own"
        assert taken[5] == [0.25, 0, (0.9, 0.99)], "no schedule, no decay"
        assert tax == ((k + 1, task, stage.fork), (k, task, stage.fork), task), "after, before"
    assert type(optimizer) is torch.optim.AdamW
    assert {*map(id, optimizer.param_groups[0]["params"])} == {*map(id, policy.parameters())}
    # 81 // 40 = 2: every second rollout, and the last of either stage; always against the start
    steps, curves = sorted({*range(0, total + 1, 2), 81, total}), result["curves"]
    assert curves["step"] == steps
    assert calls["evaluate"] == [(k, k, t := COMMUTE if k <= 81 else LARGER_FIRST, (0, t)) for k in steps]
    for i, k in enumerate(steps):
        since = np.arange(steps[i - 1] + 1 if i else 1, k + 1)  # means over the rollouts since the last one
        mean = since.mean() if i else math.nan
        want = dict(learning_tax=k * (k + 1) / 2000, net_push=(k + k * (k + 1)) / 2, accuracy=k / 100,
                    residual=mean / 100, kl=mean / 10, reward=(since % 2).mean() if i else mean)
        assert {name: curves[name][i] for name in want} == pytest.approx(want, rel=1e-5, nan_ok=True)
    last = [i for i, k in enumerate(steps) if k > 0.75 * total]
    for name, row in curves.items():
        assert result["final"][name] == pytest.approx(np.mean([row[i] for i in last]), rel=1e-5)
    assert calls["samples"] == [(total, stages[-1][0], 5)] and result["samples"] == "said"
def test_train_without_a_fork_or_when_it_diverges(monkeypatch):
    assert all(map(math.isnan, record_train(monkeypatch, Config(fork=0, steps=3))[0]["curves"]["net_push"]))
    monkeypatch.setattr(tokrl, "update", lambda *_: dict(grad_norm=math.nan, net_push=0.0))
    monkeypatch.setattr(tokrl.mp, "current_process", lambda: type("worker", (), {"_identity": (1,)}))
    said = tokrl.train_and_keep("off", Config(steps=3), 5, None)  # the other runs go on
    assert said == "off, seed 5: rollout 1: the gradient norm is not finite"
MEASURED = "accuracy solution_entropy solution_drift kl grad_norm reward learning_tax net_push".split()
GOLDEN = {"off": (0.431985, 0.659067, 1.68417, 0.160568, 0.849278, 0.540625, 0.190872, 2.05255),
          "min": (0.412053, 0.822902, 0.852737, 0.118747, 0.620974, 0.45625, 0.112072, 0.0)}
@pytest.mark.parametrize("transform", GOLDEN)
def test_train_ends_where_it_ended_when_recorded(transform):
    """A start that differed by rounding (1e-7) ended within 1e-4 of these: 1e-2 leaves ample room."""
    final = tokrl.train(Config(steps=20, transform=transform), 100)["final"]
    assert [final[m] for m in MEASURED] == pytest.approx(GOLDEN[transform], rel=1e-2, abs=1e-5)
ANOTHER = dict(task="chain", loss="gspo", transform="min", duplicates="once", fork=1, group_size=4, prompts=4,
               inner_steps=4, steps=200, lr=2e-4, max_grad_norm=0.5, kl=0.0, clip_eps=0.1, adapt=True)
def test_a_kept_run_belongs_to_its_configuration_seed_and_code(tmp_path, monkeypatch):
    path, base = lambda *a: tokrl.kept_path(tmp_path, *a), Config(loss="grpo")
    paths = {path(base, 0), path(base, 1)} | {path(replace(base, **{k: v}), 0) for k, v in ANOTHER.items()}
    assert len(paths) == 2 + len(fields(Config)) and {f.name for f in fields(Config)} == {*ANOTHER}
    assert path(Config(loss="grpo", fork=2), 0) == path(base, 0)
    assert (code := tokrl.CODE) == [(HERE / name).read_bytes() for name in ("tokrl.py", "toy_tasks.py")]
    for edited in ([code[0] + b"#", code[1]], [code[0], code[1] + b"#"]):
        monkeypatch.setattr(tokrl, "CODE", edited)
        assert path(base, 0) not in paths

# ---- 7. The audit: what each place of the paper says, and what is measured
SHARED, GROUP = 2, group_advantages(tensor([[1, 0, 0, 1, 0]]))  # the audited group shares "7+"
SITUATIONS = {"on-policy": ([5] * 5, 0.0), "unequal lengths": ([3, 5, 4, 6, 5], 0.0),
              "off-policy": ([5] * 5, 0.03, 1.02), "a clip bites": ([5] * 5, 0.0, 1.8)}
NEEDS = dict(zip(SITUATIONS, ("", "lengths are equal", "ratios are equal", "no clip bites")))
def shared_group(lengths, noise: float, shared_ratio: float = 1.0):
    """A policy, its log π of every token (G,T,V) of a group that shares "7+", what the weights take."""
    generator, G, T, policy = torch.Generator().manual_seed(0), len(lengths), max(lengths), random_policy(0)
    tokens = torch.randint(2, 12, (1, G, T), generator=generator)
    tokens[:, :, :SHARED] = torch.tensor(encode("7+"))
    every = tokrl.completion_logprobs(policy, torch.tensor([encode("75=")]), tokens)[0]
    every.retain_grad()
    logprobs = every.gather(-1, tokens[0, ..., None]).squeeze(-1)[None]
    log_ratio = noise * torch.randn(1, G, T, dtype=torch.float64, generator=generator)
    log_ratio[..., :SHARED] = math.log(shared_ratio)
    mask = torch.arange(T) < torch.tensor([lengths])[..., None]
    return policy, every, logprobs, logprobs.detach() - log_ratio, GROUP, mask
def shared_push(loss: str, transform: str, situation: str, flowing=False) -> float:
    """|Σ_i gradient at the shared tokens| / Σ_i |gradient|, by autograd: 0 cancels, 1 does not at all."""
    _, every, logprobs, old, A, mask = shared_group(*SITUATIONS[situation])
    w = weigh(loss, transform, logprobs, old, A, mask)
    if flowing:  # seq again, with the gradient through the weights that all transforms must stop
        w = transform_weights((logprobs - old).sum(-1, keepdim=True).exp().expand_as(w), A, mask, transform)
    (-(A[..., None] * w * logprobs).sum() if flowing else policy_loss(logprobs, w, A)).backward()
    pushes = every.grad[:, :SHARED]  # (G,2,V): one row per trajectory, of one and the same distribution
    total = pushes.norm(dim=-1).sum().item()
    return pushes.sum(0).norm().item() / total if total else 0.0  # a fully clipped group pushes nothing
def measured(numbers: dict) -> str:
    """Names and numbers, in a line."""
    return ", ".join(f"{k} {x:.1e}" if 0 < abs(x) < 1e-3 else f"{k} {x:.3g}" for k, x in numbers.items())
def verdict(holds, only_if: str = "") -> str:
    """"holds", "holds only if ..." or "fails"."""
    return ("holds only if " + only_if if only_if else "holds") if holds else "fails"
def audit_eq2(loss: str):
    """Eq. 2 at a token that the whole group shares, for one loss."""
    pushes = {name: shared_push(loss, "off", name) for name in SITUATIONS}
    only_if = " and ".join(text for name, text in NEEDS.items() if text and pushes[name] > 1e-12)
    return ("Eq. 2", f"{loss}: a shared token's pushes cancel", measured(pushes),
            verdict(pushes["on-policy"] < 1e-12, only_if))
EQ2 = {"seq": "ratios are equal", "dr_grpo": "no clip bites", "dapo": "no clip bites",  # all others: holds
       "grpo": "lengths are equal and no clip bites",
       "gspo": "lengths are equal and ratios are equal and no clip bites"}
@pytest.mark.parametrize("loss", LOSSES)
def test_eq2(loss):
    assert audit_eq2(loss)[3] == verdict(True, EQ2.get(loss, "")), "a loss of your own should always cancel"
def audit_section4(kind: str):
    """Section 4, two trajectories, Â = ∓A, a shared token of ratio ρ, u: product of the others' ratios."""
    errors, generator = [], torch.Generator().manual_seed(0)
    for A, rho, *u in (torch.rand(100, 4, dtype=torch.float64, generator=generator) + 0.5).tolist():
        x, advantages = tensor([[[rho, u[0]], [rho, u[1]]]]).log(), tensor([[-A, A]])
        loss, want = ("dr_grpo", 0.0) if kind == "factorised" else ("seq", A * rho * abs(u[1] - u[0]) / 2)
        w = effective_weights(loss, x, x * 0, advantages, torch.ones(1, 2, 2), math.inf, max_length=1)
        errors.append(abs(cancellation_residual(w, advantages)[0, 0].item() - want))
    says = dict(factorised="token-factorised: (ρ/2)(Â₁ + Â₂) = 0", coupled="coupled: A ρ |u₂ − u₁| / 2")
    return "§4", says[kind], f"worst of 100 errors {max(errors):.1e}", verdict(max(errors) < 1e-14)
def audit_section4_clip():
    """Section 4: a clip that looks at the sign of Â breaks the cancellation, a symmetric one repairs it."""
    pushes = {loss: shared_push(loss, "off", "a clip bites") for loss in ("dr_grpo", "grpo_sym")}
    return ("§4", "an asymmetric clip breaks it, GRPO-fix repairs it", measured(pushes),
            verdict(pushes["dr_grpo"] > 0.1 and pushes["grpo_sym"] < 1e-12))
def test_section4():
    audits = audit_section4("factorised"), audit_section4("coupled"), audit_section4_clip()
    assert [audit[3] for audit in audits] == ["holds"] * 3
def at_h(policy):
    """log π(·|h*): after the prompt, where the group's first shared token is chosen."""
    return policy(torch.tensor([encode("75=")]))[0, -1]
def group_gradient(transform: str, own_term_only: bool):
    """Policy, ascent direction g of a group under seq, off-policy, and gᵀFg at its first shared place h*."""
    policy, _, logprobs, old, A, mask = shared_group(*SITUATIONS["off-policy"])
    w = weigh("seq", transform, logprobs, old, A, mask)
    w = w * (torch.arange(5) == 0) if own_term_only else w  # Eq. 2's term: what the shared token itself does
    flat = lambda x: torch.cat([g.flatten() for g in torch.autograd.grad(
        x, [*policy.parameters()], retain_graph=True, materialize_grads=True)])
    g, log_p = -flat(policy_loss(logprobs, w, A)), at_h(policy)
    change, p = torch.stack([flat(z) @ g for z in log_p]), log_p.detach().exp()
    return policy, g, ((p * change**2).sum() - (p * change).sum() ** 2).item()  # its variance
def audit_prop31():
    """Prop. 3.1: the KL after one step against ½ η² gᵀFg, on the transformer, in parameter space."""
    policy, g, gFg = group_gradient("off", own_term_only=True)
    before, start = at_h(policy).detach(), torch.nn.utils.parameters_to_vector(policy.parameters()).detach()
    predicted, found = np.logspace(-9.9, -5.1, 9), []
    for eta in np.sqrt(2 * predicted / gFg):
        torch.nn.utils.vector_to_parameters(start + eta * g, policy.parameters())
        d = before - (after := at_h(policy).detach())
        found.append((after.exp() * (torch.expm1(d) - d)).sum().item())  # the KL, losing no digits
    slope, worst = np.polyfit(np.log(predicted) / 2, np.log(found), 1)[0], np.abs(found / predicted - 1).max()
    return ("Prop. 3.1", "KL after a step = ½ η² gᵀFg", f"slope {slope:.4f}, worst error {worst:.1e} at 9 η",
            verdict(abs(slope - 2) < 0.01 and worst < 0.01))
def audit_prop31_other_tokens():
    """Shared parameters carry the other tokens' gradients to h*, with a residual of 0."""
    cases = {"own term": ("min", True), "whole step, min": ("min", False), "off": ("off", False)}
    forms = {name: group_gradient(*case)[2] for name, case in cases.items()}
    return ("objection to Prop. 3.1", "where the residual is 0, π(·|h*) does not move at all",
            "gᵀFg at h*: " + measured(forms), verdict(forms["whole step, min"] < 1e-3 * forms["off"]))
def test_prop31():
    assert audit_prop31()[3] == "holds" and audit_prop31_other_tokens()[3] == "fails"
    assert group_gradient("min", True)[2] < 1e-20, "the own term does cancel"
def push_softmax(p, often, steps=1, eta=1.0):
    """Logits of three outputs, log p, pushed `steps` times towards output i by η often(p)_i (e_i − p)."""
    z, e = tensor(p).log(), torch.eye(3, dtype=torch.float64)
    for _ in range(steps):
        p = z.softmax(0)
        z = z + eta * sum(x * (e[i] - p) for i, x in enumerate(often(p)))
    return z
def log_odds_change(p, kappa) -> float:
    """Change of log p_a/p_b per η when outputs a and b are pushed with weights κ: ½ Σ κ_i (e_i − p)."""
    z = push_softmax(p, lambda _: [k / 2 for k in kappa], eta=1e-6)
    return ((z[0] - z[1]).item() - math.log(p[0] / p[1])) / 1e-6
def audit_cor32_even():
    """Cor. 3.2 where both solutions are equally likely: Δ log-odds = η c (κ_a − κ_b), here with c = ½."""
    change = lambda *kappa: log_odds_change([0.45, 0.45, 0.1], kappa)
    worst = max(abs(change(a, b) - (a - b) / 2) for a, b in ((1, 1), (1.2, 1), (1, 2)))
    return ("Cor. 3.2", "Δ log-odds = η c (κ_a − κ_b)", f"p = (.45, .45, .1), c = ½: worst error {worst:.1e}",
            verdict(worst < 1e-6))
def audit_cor32_collapse():
    """Cor. 3.2: κ_a > κ_b for ever, outputs being pushed as often as they are sampled, or equally often."""
    ways = {"pushed when sampled": lambda p: [1.1 * p[0], p[1]], "equally often": lambda p: [0.55, 0.5]}
    log_q = {name: push_softmax([0.42, 0.42, 0.16], x, 3000)[:2].log_softmax(0) for name, x in ways.items()}
    entropy = {name: -(q.exp() * q).sum().item() / math.log(2) for name, q in log_q.items()}
    collapsed = [name for name, h in entropy.items() if h < 0.05]
    return ("Cor. 3.2", "κ_a > κ_b for ever: entropy goes to 0", "entropy after 3,000: " + measured(entropy),
            verdict(collapsed, collapsed[0] if len(collapsed) == 1 else ""))
def audit_cor32_counterexample():
    """Where they are not equally likely: equal weights, p = (.6, .3, .1), and yet the odds move by −0.3 η."""
    change = log_odds_change([0.6, 0.3, 0.1], (1.0, 1.0))
    return ("objection to Cor. 3.2", "equal κ: no drift", f"p = (.6, .3, .1): {change:.6f} η",
            verdict(True, "" if abs(change) < 1e-6 else "c(x) is one number for both"))
def test_cor32():
    audits = audit_cor32_even, audit_cor32_collapse, audit_cor32_counterexample
    assert [x()[3][14:] for x in audits] == ["", "pushed when sampled", "c(x) is one number for both"]
def audit_cor33_random():
    """Cor. 3.3: random unclipped sequence-coupled weights do not cancel."""
    generator, n = torch.Generator().manual_seed(0), 100_000
    log_ratio = 0.1 * torch.randn(n, 4, 3, dtype=torch.float64, generator=generator)
    A = group_advantages(torch.rand(n, 4, dtype=torch.float64, generator=generator), normalize=False)
    w = effective_weights("seq", log_ratio, log_ratio * 0, A, torch.ones(n, 4, 3), max_length=1)
    smallest = cancellation_residual(w, A)[:, 0].min()
    return ("Cor. 3.3", "seq off-policy: cancellation has measure zero",
            f"smallest residual of 100,000 draws {smallest:.1e}", verdict(smallest > 1e-9))
def audit_cor33_necessary():
    """Equal weights suffice for cancellation; they are not necessary."""
    residual = cancellation_residual(tensor([[[1.0], [3.0], [2.0]]]), tensor([[1.0, 1.0, -2.0]])).item()
    return ("objection to Cor. 3.3", "only equal weights cancel",
            f"Â = (1, 1, −2), w = (1, 3, 2): residual {residual:.0e}", verdict(residual))
def audit_cor33_positive():
    """Cases of positive probability."""
    A, ones, old = tensor([[1.0, -1.0]]), torch.ones(1, 2, 2), tensor([[[-1.0, -2.0], [-1.0, -0.5]]])
    shift, same = tensor([[[0.0, 1.0], [0.0, -1.0]]]), tensor([[[0.3, 0.4], [0.3, 0.4]]])
    cases = {"first inner step": ("seq", old, old), "identical completions": ("seq", same, same * 0),
             "fully clipped group": ("gspo", old + shift, old)}
    weights = {name: effective_weights(*case, A, ones) for name, case in cases.items()}
    found = {name: cancellation_residual(w, A)[0, 0].item() for name, w in weights.items()}
    return ("Cor. 3.3", "so in training non-cancellation is the norm", measured(found),
            verdict(True, "ratios are continuous" if max(found.values()) < 1e-15 else ""))
def test_cor33():
    words = [audit()[3] for audit in (audit_cor33_random, audit_cor33_necessary, audit_cor33_positive)]
    assert words == ["holds", "fails", "holds only if ratios are continuous"]
PLACES = {"min": "Eq. 17", "orth": "Eq. 18", "mean": "control", "shrink": "control"}
def audit_transform_cancels(kind: str):
    """Every loss, in each situation by autograd, and off-policy with ragged masks where all are alive."""
    pushes = [shared_push(loss, kind, name) for loss in LOSSES for name in SITUATIONS]
    for seed, loss in itertools.product(range(20), LOSSES):
        *_, A, mask = case = random_case(seed)
        pushes.append(cancellation_residual(weigh(loss, kind, *case), A)[mask.all(dim=1)].max().item())
    return (PLACES[kind], f"{kind}: shared tokens cancel under every loss", f"worst push {max(pushes):.1e}",
            verdict(max(pushes) < 1e-12))
def audit_transform_stop_gradient(kind: str):
    """Let the gradient flow through the weights, and the shared token is pushed again."""
    pushes = {k: shared_push("seq", kind, "off-policy", k == "flowing") for k in ("stopped", "flowing")}
    return (PLACES[kind], f"{kind}: the stop-gradient is needed", measured(pushes),
            verdict(pushes["stopped"] < 1e-12 and pushes["flowing"] > 1e-3))
def audit_transform_bias(kind: str):
    """The price: seq is the unbiased off-policy weight, the transform is not; nor is plain dr_grpo."""
    bias = {name: enumerated_bias(*name.split(), True) for name in ("seq off", f"seq {kind}", "dr_grpo off")}
    return (f"objection to {PLACES[kind]}", f"{kind}: the expected gradient keeps its direction and size",
            "relative bias " + measured(bias), verdict(bias[f"seq {kind}"] < 1e-9))
def test_eq17_and_eq18():
    assert [audit_transform_cancels(kind)[3] for kind in PLACES] == ["holds", "holds", "holds", "fails"]
    for kind in ("min", "orth"):
        assert [audit(kind)[3] for audit in KINDS] == ["holds", "holds", "fails"]
    orth, plain, least = (enumerated_bias(*x.split(), True) for x in ("seq orth", "dr_grpo off", "seq min"))
    assert orth < plain < least, "plain dr_grpo is as biased as the transforms"
PREDICTED = {  # the paper's predictions for DFPO: name, value of one seed, the sign that is better
    "fewer rollouts to accuracy 0.9": (lambda arm, i: next((step for step, a in zip(
        arm["curves"]["step"], arm["curves"]["accuracy"][i]) if a >= 0.9), arm["curves"]["step"][-1]), -1),
    "smaller jitter": (lambda arm, i: np.abs(np.diff(arm["curves"]["accuracy"][i], 2)).mean(), -1),
    "higher final accuracy": (lambda arm, i: arm["final"]["accuracy"][i], 1)}
@functools.cache
def prediction_rows():
    """{(prediction, other arm): (DFPO − other, low, high, p, verdict)} from figures/losses.json, by seed."""
    arms, found = json.loads((HERE / "figures" / "losses.json").read_text())["arms"], {}
    for name, other in itertools.product(PREDICTED, ("off gspo", "off seq")):
        a, b = ([PREDICTED[name][0](arm, i) for i in range(8)] for arm in (arms["on seq"], arms[other]))
        found[name, other] = tokrl.t_interval(np.subtract(a, b))
    words = ["holds" if x[0] * PREDICTED[name][1] > 0 else "opposite" for (name, _), x in found.items()]
    survive = tokrl.holm([p for *_, p in found.values()])
    words = [word if s else "not established" for word, s in zip(words, survive)]
    return {key: (*x, word) for (key, x), word in zip(found.items(), words)}
def audit_prediction(name: str, other: str):
    """One of the paper's three predictions for DFPO (on seq), from the recorded runs."""
    mean, low, high, _, word = prediction_rows()[name, other]
    return "predictions", f"{name} than {other}", f"difference {mean:+.3g} [{low:+.3g}, {high:+.3g}]", word
NOTED = {("smaller jitter", "off gspo"): "opposite", ("smaller jitter", "off seq"): "holds"}
def test_predictions():
    rows, still = prediction_rows(), True
    for rank, (key, (_, low, high, p, word)) in enumerate(sorted(rows.items(), key=lambda row: row[1][3])):
        better, worse = (low > 0, high < 0)[:: PREDICTED[key[0]][1]]
        still = still and p <= 0.05 / (6 - rank)  # Holm, step by step
        assert word == ("not established" if not still else "holds" if better else "opposite")
        assert not still or better or worse
    assert len(rows) == 6 and all(row[4] == NOTED.get(key, "not established") for key, row in rows.items())
KINDS = audit_transform_cancels, audit_transform_stop_gradient, audit_transform_bias
ONCE = (audit_section4_clip, audit_prop31, audit_prop31_other_tokens, audit_cor32_even, audit_cor32_collapse,
        audit_cor32_counterexample, audit_cor33_random, audit_cor33_necessary, audit_cor33_positive)
AUDIT = [*((audit_eq2, loss) for loss in LOSSES), (audit_section4, "factorised"), (audit_section4, "coupled"),
         *zip(ONCE), *((audit, kind) for kind in ("min", "orth") for audit in KINDS),
         (audit_transform_cancels, "mean"), (audit_transform_cancels, "shrink"),
         *((audit_prediction, *key) for key in itertools.product(PREDICTED, ("off gspo", "off seq")))]

# ---- 8. The command line, kept runs, and what dies
BAD = """--lr 0: lr must be | --lr nan: lr must be | --lr fast: --lr | --kl -0.1: kl must be
--clip-eps 0 --loss grpo: clip-eps must | --clip-eps 0.2: seq has no clip | --fork -1: fork | --loss ppo: gspo
--transform max: orth | --duplicates twice: share | --task add --fork 4: fork 4 is too long for add
--fork 1.5: --fork | --group-size 1: group-size | --steps 0: steps must | --steps 1e3: --steps
--seeds 3-1: A <= B; got '3-1' | --seeds 0-: got '0-' | --seeds -1: seeds | --experiment speed: frontier
--experiment control --transform on: --transform | --experiment control --fork 2: sets --fork itself
--plot --steps 3: leave out the rest | --plot: no results in runs | --plot --out nowhere: results in nowhere
--stepz 3: unrecognized arguments: --stepz 3; --help lists every option | commute: arguments: commute
--out: --out | --out file: file | --task multiply: commute"""
@pytest.mark.parametrize("line, says", [x.strip().split(": ", 1) for x in BAD.replace("\n", "|").split("|")])
def test_a_wrong_command_line_gets_one_line_and_status_2(line, says, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokrl, "train_all", lambda units: pytest.fail("it trains"))
    Path("file").write_text("in the way")
    assert tokrl.main(line.split()) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("tokrl.py: ") and err.count("\n") == 1 and says in err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["file"]
@pytest.fixture
def instant(monkeypatch):
    """Training that takes no time: a run's measures are its seed + 1 and, under off, 1 more."""
    def train_all(units):
        for label, _, seed, path in units:
            numbers = {m: seed + 1.0 + label.startswith("off") for m in (*tokrl.MEASURES, "kl")}
            curves = {"step": [0]} | {m: [x] for m, x in numbers.items()}
            tokrl.write_json(path, {"curves": curves, "final": numbers, "samples": f"{label} {seed}"})
        return []
    monkeypatch.setattr(tokrl, "train_all", train_all)
def test_what_is_kept_what_is_damaged_and_what_is_replaced(instant, tmp_path, capsys):
    def says(line):
        assert tokrl.main([*line.split(), "--out", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        return results(tmp_path), *re.findall("modes: (.*)", out), out
    arms, counts, out = says("--seeds 0-2")
    assert counts == "6 runs to train, 0 kept from before" and "```\noff 0\n```" in out and "off - on" in out
    assert arms["off"]["final"]["kl"] == [2, 3, 4] and arms["on"]["curves"]["kl"] == [[1], [2], [3]]
    kept = sorted(tmp_path.glob(".cache/*"))  # one is cut short, one is something else, one is empty
    kept[0].write_text(kept[0].read_text()[:-9]), kept[1].write_text("[1]"), kept[2].write_bytes(b"")
    assert says("--seeds 0-2 --loss seq")[:2] == (arms, "3 runs to train, 3 kept from before")
    more, counts, _ = says("--seeds 0-2 --transform orth")  # stands beside them
    assert counts == "3 runs to train, 0 kept from before" and [*more] == ["off", "on", "orth"]
    was = "replaces the result of: python tokrl.py --seeds 0-2 --transform orth --out "
    assert says("")[2] == was + str(tmp_path)
    assert says("--loss gspo --clip-eps Infinity")[0]["off"]["config"]["clip_eps"] == "inf"
    shutil.rmtree(tmp_path / ".cache")
    arms, _, was, _ = says("--loss gspo --clip-eps inf --transform on")  # off is not kept any more
    assert was.startswith("replaces the result of: ") and [*arms] == ["on"]
    (tmp_path / "README.md").write_text("precious")
    assert tokrl.main(["--out", str(tmp_path)]) == 2 and "README.md is not tokrl's" in capsys.readouterr().err
@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"arms": {}}', '{"arms": {"off": 1}, "command": ""}'])
def test_a_file_that_is_no_result_gets_one_line(instant, text, tmp_path, capfd):
    (tmp_path / "failure-modes.json").write_text(text), (tmp_path / "losses.json").write_text(text)
    for options in ([], ["--plot"]):  # losses.json stays in the way
        assert tokrl.main([*options, "--out", str(tmp_path)]) == 2 and [*results(tmp_path)] == ["off", "on"]
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and "losses.json is no result of tokrl, delete it: " in err
def test_samples_counts_what_is_said_and_marks_what_is_wrong(monkeypatch):
    def said(policy, prompts, size, fork, length, generator):
        assert (size, fork, length) == (100, 0, 8)
        texts = [["5+7=12"] * 60 + ["0"] * 30 + [decode(p)[:2]] * 9 + ["1"] for p in prompts]
        return torch.stack([tokrl.completion_tokens(group, length) for group in texts])
    monkeypatch.setattr(tokrl, "sample_groups", said)
    lines = tokrl.samples(None, replace(COMMUTE, table={p: ("5+7=12",) for p in ("75=", "12=", "34=")}), 0)
    said = "{0}=  60 x 5+7=12,  30 x 0 (wrong),  9 x {0} (wrong)".format
    assert sorted(lines.split("\n")) == [said(12), said(34), said(75)]
def start(*arguments):
    """Start the program as a user would, in a process group of its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    return subprocess.Popen([sys.executable, str(HERE / "tokrl.py"), *map(str, arguments)], **pipes)
def results(folder: Path) -> dict:
    """The arms of OUT/failure-modes.json, where NaN and Infinity must not be."""
    return json.loads((folder / "failure-modes.json").read_text(), parse_constant=pytest.fail)["arms"]
SHORT = ("--steps", "3", "--prompts", "2", "--seeds", "0-1", "--max-grad-norm", "inf", "--out")
@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder in which a short default command has run, what it printed, its arms."""
    process = start(*SHORT, folder := tmp_path_factory.mktemp("runs"))
    out, err = process.communicate()
    assert process.returncode == 0 and "Traceback" not in err
    return folder, out, results(folder)
@pytest.mark.slow
def test_the_default_command_writes_json_figure_and_page(undisturbed):
    folder, out, arms = undisturbed
    assert [*arms] == ["off", "on"] and "failure-modes: 4 runs to train, 0 kept from before" in out
    for label, arm in arms.items():
        config = asdict(Config(steps=3, prompts=2, transform=tokrl.ARMS[label])) | {"max_grad_norm": "inf"}
        assert arm["config"] == config and arm["seeds"] == [0, 1] and arm["curves"]["step"] == [0, 1, 2, 3]
        assert {*tokrl.MEASURES} <= {*arm["final"]} and arm["curves"]["kl"][0][0] is None
    page = (folder / "README.md").read_bytes()
    assert tokrl.table(arms) in page.decode() and tokrl.table(arms) in out and "README.md" in out
    (folder / "README.md").unlink(), (folder / "failure-modes.png").unlink()
    assert tokrl.main(["--plot", "--out", str(folder)]) == 0 and (folder / "README.md").read_bytes() == page
@pytest.mark.slow
def test_mechanism_shows_one_group_of_a_first_rollout(tmp_path):
    assert tokrl.main(["--experiment", "mechanism", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "mechanism.json").read_text())
    A, (off, on) = tensor([result["advantages"]]), (result["weights"][word] for word in ("off", "on"))
    assert cancellation_residual(tensor([off])[..., None], A) > 1e-3 and on == [min(off)] * 8
@pytest.mark.slow
def test_killed_and_given_again_ends_with_the_same_bits(undisturbed, tmp_path):
    process = start(*SHORT, tmp_path)
    while process.poll() is None and not list(tmp_path.glob(".cache/*.json")):  # until one is kept
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".cache/*.json")}
    out, _ = (again := start(*SHORT, tmp_path)).communicate()
    assert again.returncode == 0 and results(tmp_path) == undisturbed[2] and kept
    assert f"{4 - len(kept)} runs to train, {len(kept)} kept from before" in out
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items()), "what is finished stays"
def workers(process) -> list[int]:
    """The program's workers, not multiprocessing's resource tracker."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
def gone(pids) -> bool:
    """Whether all of them end within ten seconds."""
    dead = lambda pid: not (x := Path(f"/proc/{pid}/status")).exists() or "zombie" in x.read_text()
    return any(all(map(dead, pids)) or time.sleep(0.05) for _ in range(200))
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes through /proc")
@pytest.mark.parametrize("who, status, says", [
    ("worker", 1, "tokrl.py: a worker process died; the same command continues with what is missing"),
    ("parent", -9, ""), ("ctrl-c", 130, "Stopped. The same command continues with what is missing.")])
def test_a_dead_worker_a_dead_parent_and_ctrl_c(who, status, says, tmp_path):
    process = start("--out", tmp_path)  # 400 rollouts: it will not have ended
    while not (pids := workers(process)):
        assert process.poll() is None, "it ended too early"
        time.sleep(0.05)
    time.sleep(1)
    {"worker": lambda: os.kill(pids[0], signal.SIGKILL), "parent": process.kill,
     "ctrl-c": lambda: os.killpg(process.pid, signal.SIGINT)}[who]()  # a terminal's goes to the whole group
    _, err = process.communicate()
    assert gone(pids) and process.returncode == status and says in err and "Traceback" not in err

# ---- 9. Intervals, the page of results, and the README
def test_t_interval_covers_what_it_says(monkeypatch):
    draws, rng = tokrl.t_draws(8)[:20_000], np.random.default_rng(1)  # fewer: 4,000 quantiles are asked for
    monkeypatch.setattr(tokrl, "t_draws", lambda n: draws)
    intervals = map(tokrl.t_interval, rng.normal(0.3, 1.0, (4000, 8)))
    assert 0.94 < np.mean([low < 0.3 < high for _, low, high, _ in intervals]) < 0.96
def test_t_interval_and_holm_by_hand():
    # t(0.975, 7) = 2.3646: 1 .. 8 have mean 4.5, std sqrt(6), half = 2.3646 sqrt(6 / 8) = 2.0478;
    # t = 4.5 / 0.8660 = 5.1962: p = 0.00126
    assert tokrl.t_interval(range(1, 9)) == pytest.approx((4.5, 2.4522, 6.5478, 0.00126), rel=5e-3, abs=1e-4)
    assert all(map(math.isnan, (*tokrl.t_interval([3.0])[1:], *tokrl.t_interval([math.nan] * 3)))), "none"
    # .01 .02 .03 against .05/3 .05/2 .05/1: all survive; .01 .03 .03: .03 > .025, and the rest falls with it
    for p, survive in (((0.02, 0.01, 0.03), [1, 1, 1]), ((0.03, 0.01, 0.03), [0, 1, 0]),
                       ((math.nan, 0.02, 0.04), [0, 1, 1])):  # nan: a family of two
        assert tokrl.holm(p).tolist() == survive
def test_table_has_geometric_ratios_paired_by_seed():
    # drifts 2 4 8 against 1 1 2: ratios 2 4 4, geometric mean 32^(1/3) = 3.17; differences 1 3 6, mean 3.33,
    # half 4.3027 · 2.517 / sqrt(3) = 6.25: not established, so no star
    arm = lambda drift: {"final": {m: [0.5, 0.5, 0.8] for m in tokrl.MEASURES} | {"solution_drift": drift}}
    *_, off, on, pair = tokrl.table({"off": arm([2, 4, 8]), "on": arm([1, 1, 2])}).splitlines()
    assert "4.67 ± 3.06" in off and "0.60 ± 0.17" in on and re.search(r"off - on .*\| 3\.17 \[.*\] \|$", pair)
    assert re.search(r"\| \+3\.33 \[-2\.9\d, \+9\.5\d\] +\|", pair)
FIGURES, README = HERE / "figures", (HERE / "README.md").read_text(encoding="utf-8")
FINDINGS = README.partition("\n## What it shows, and what it does not\n")[2].partition("\n## ")[0]
def test_the_page_of_results_is_what_the_recorded_json_gives(tmp_path, monkeypatch):
    import matplotlib.figure
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, path: Path(path).touch())
    for path in FIGURES.glob("*.json"):
        shutil.copy(path, tmp_path)
    tokrl.write_page(tmp_path)
    assert (FIGURES / "README.md").read_text() == (tmp_path / "README.md").read_text()
    names, drawn = ({x.name for x in folder.iterdir()} - {".cache"} for folder in (FIGURES, tmp_path))
    assert names == drawn, "each PNG has its JSON"
    for path in (path for path in FIGURES.glob("*.json") if path.stem in tokrl.EXPERIMENTS):
        result, arms = json.loads(path.read_text()), tokrl.experiment_arms(path.stem, {})
        assert path.stem in ("failure-modes", "mechanism") or [*arms] == [*result["arms"]]
        for label, arm in result.get("arms", {}).items():
            want = {k: "inf" if v == math.inf else v for k, v in asdict(arms[label]).items()}
            assert arm["config"] == want and arm["seeds"] == [*range(8)], f"{path.stem}: {label}"
def test_readme_numbers_stand_on_the_page_of_results():
    page, said = (FIGURES / "README.md").read_text(encoding="utf-8"), r"(?<![\d.:])\d+\.\d{2,}(?![\d.])"
    assert {*re.findall(said, FINDINGS)} and {*re.findall(said, FINDINGS)} <= {*re.findall(said, page)}
def test_readme_commands_parse_and_its_names_exist():
    for command in re.findall(r"python tokrl\.py(?! --help)([^\n`#]*)", README):
        given = tokrl.parse(shlex.split(command.partition("  ")[0].replace("NAME", "losses")))
        settings = {k: v for k, v in given.items() if k in ANOTHER and k != "transform"}
        tokrl.experiment_arms(given.get("experiment", "failure-modes"), settings)  # a bad one raises
    source = (HERE / "test_tokrl.py").read_text(encoding="utf-8").lower()
    for selection in re.findall(r"pytest[^\n`]* -k (\"[^\"]+\"|\w+)", README):
        for word in {*re.findall(r"\w+", selection.lower())} - {"or", "and", "not", "check"}:
            assert re.search(rf"def (test_)?\w*{word}|\"{word}\"", source), f"no test is selected by {word}"
# ---- 10. The README's recipe for TRL: run where TRL is installed, skipped elsewhere
TOY = '''"""A tiny Qwen2 of random weights on commute, trained by TRL ("stock") or by the README's trainer."""
import os, random, sys, tempfile, torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from toy_tasks import EOS, TASKS, VOCAB, decode, encode
from trl_trainer import TokenTransformTrainer
class Fixed(TokenTransformTrainer):  # completions that do not depend on the number of processes
    def _generate_single_turn(self, prompt_ids, *_, **__):
        first = self.accelerator.process_index * len(prompt_ids)
        rngs = [random.Random(f"{self.state.global_step} {first + i}") for i in range(len(prompt_ids))]
        texts = [TASKS["commute"].demonstration(decode(p), rng) for p, rng in zip(prompt_ids, rngs)]
        return [encode(text) + [EOS] for text in texts], None
def toy_trainer(arm, trainer=TokenTransformTrainer, loss="gspo", **arguments):
    letters = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(VOCAB)}, unk_token="_"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="_", eos_token=".", unk_token="_")
    torch.manual_seed(0), torch.set_num_threads(1)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(VOCAB), hidden_size=32, intermediate_size=64, num_hidden_layers=1, eos_token_id=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16, initializer_range=0.3,
        pad_token_id=0, bos_token_id=None)).double()
    config = dict(per_device_train_batch_size=64, num_generations=8, num_iterations=3, steps_per_generation=1,
                  max_completion_length=8, max_steps=6, learning_rate=1e-2, seed=0, max_grad_norm=1e9,
                  loss_type="grpo", use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1,
                  ddp_find_unused_parameters=False, report_to="none", save_strategy="no")
    config = GRPOConfig(output_dir=tempfile.mkdtemp(), **config | arguments)
    kind, options = (GRPOTrainer, {}) if arm == "stock" else (trainer, {"loss": loss, "transform": arm})
    reward = lambda prompts, completion_ids, **_: [float(sum(ids) % 3 == 0) for ids in completion_ids]
    data = Dataset.from_dict({"prompt": TASKS["commute"].prompts()})
    return kind(model, reward, config, processing_class=tokenizer, train_dataset=data, **options)
if __name__ == "__main__":  # python trl_toy.py OUT: five groups, of which one lies on both of two processes
    trainer = toy_trainer("min", Fixed, optim="sgd", learning_rate=0.1, epsilon=0.1,
                          per_device_train_batch_size=40 // int(os.environ.get("WORLD_SIZE", 1)))
    trainer.train()
    if trainer.accelerator.is_main_process:
        torch.save([p.detach() for p in trainer.model.parameters()], sys.argv[1])
    trainer.accelerator.wait_for_everyone()
    os._exit(0)  # gloo's threads now and then abort a plain exit, after all is saved
'''
@pytest.fixture
def trl_toy(tmp_path, monkeypatch):
    """The module above, with the trainer taken out of the README, in a folder of their own."""
    pytest.importorskip("trl")
    (trainer,) = re.findall(r'```python\n("""trl_trainer\.py:.*?)```', README, re.S)
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in (("trl_trainer", trainer), ("trl_toy", TOY)):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        sys.modules.pop(name, None)
    return importlib.import_module("trl_toy")
SLICES = {}, dict(per_device_train_batch_size=16, gradient_accumulation_steps=4, steps_per_generation=4)
@pytest.mark.slow
@pytest.mark.parametrize("slices", SLICES, ids=["whole", "accumulated"])
@pytest.mark.parametrize("loss, low, high", [("gspo", 0.03, 0.05), ("grpo", 0.2, 0.28)])
def test_trl_recipe_makes_the_update_of_trl_itself(trl_toy, loss, low, high, slices):
    """Two rollouts, three steps on each: the gradient norms of `off` are TRL's, the others' are not."""
    norms, level = {}, "sequence" if loss == "gspo" else "token"
    settings = dict(importance_sampling_level=level, epsilon=low, epsilon_high=high, **slices)
    for arm in ("stock", "off", "min", "orth", "mean", "shrink"):
        trainer = trl_toy.toy_trainer(arm, loss=loss, **settings)
        trainer.train()
        logs = [log for log in trainer.state.log_history if "grad_norm" in log]
        assert arm != "stock" or sum(log["clip_ratio/region_mean"] > 0 for log in logs) >= 2, "the clip acts"
        norms[arm] = [log["grad_norm"] for log in logs]
    assert len(norms["off"]) == 6 and norms["off"] == pytest.approx(norms["stock"], rel=1e-6)
    assert all(norms[arm] != pytest.approx(norms["off"], rel=1e-3) for arm in [*norms][2:])
@pytest.mark.slow
def test_trl_recipe_on_two_processes_is_the_one_of_one(trl_toy, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for command, out in (([sys.executable], "one.pt"), (two, "two.pt")):
        subprocess.run([*command, "trl_toy.py", out], cwd=tmp_path, env=environment, check=True)
    one, both = map(torch.load, (tmp_path / "one.pt", tmp_path / "two.pt"))
    start = trl_toy.toy_trainer("min").model.parameters()
    assert max((a - b).abs().max() for a, b in zip(one, start)) > 0.01
    assert max((a - b).abs().max() for a, b in zip(one, both)) < 1e-6
@pytest.mark.slow
def test_trl_recipe_refuses_what_would_do_nothing_or_break_groups(trl_toy):
    for wrong in ({"num_iterations": 1}, {"steps_per_generation": 2, "per_device_train_batch_size": 32},
                  {"entropy_coef": 0.5}, {"delta": 1.5}, {"mask_truncated_completions": True}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must "):
            trl_toy.toy_trainer("min", **wrong)

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for a console without ρ or −
    for place, *rest, word in (audit(*arguments) for audit, *arguments in AUDIT):
        print(f"{place:<22} " + f"\n{'':22} ".join([*rest, f"-> {word}"]))
    print("\nρ: ratio of the shared token, u: product of the others, h*: its place, η: step size")
