"""tokrl: which tokens of a group cancel, and what happens when they do not. One paper in one file.

Paper: F. Ding et al., "Design Conditions for Intra-Group Learning of Sequence-Level Rewards: Token
Gradient Cancellation", arXiv:2604.13088v1 (equations as in v1; we worked from summaries, not from
the full text).

The words. From one *prompt* a policy samples a *group* of G *completions* (with the prompt:
trajectories). A verifier gives each a *reward*, 1 or 0, at its end; its *advantage* is its reward
minus the group's mean, over the group's standard deviation. A *rollout* is B such groups, on which
we take a few gradient steps. After the first, each token has an importance *ratio*: its probability
now over the one it was sampled with. GRPO and its relatives *clip* each token's ratio (no weight
once it has moved far enough), GSPO clips the geometric mean over a completion, and `seq`, the
paper's object, takes the product and does not clip.

The claim. Inside a group, a token that all share cannot explain why one completion was right and
another wrong. So its pushes, advantage times weight, should cancel over the group (Eq. 2).
Sequence-level weights differ, so they do not: each step moves the shared token by what came after
it (Prop. 3.1, "learning tax"), equally right solutions drift apart (Cor. 3.2), and one is left in
the end (entropy collapse). Weights that are equal (Min-Replace, Eq. 17) or orthogonal to the
advantages (Adv-Orthogonal, Eq. 18) restore the cancellation. With them, and without a clip, the
paper's method is called DFPO, Drift Fixing Policy Optimization.

Where this program departs from the paper:
 1. The policy has 0.1 million parameters and the tasks can be enumerated: all measures are exact.
 2. A group shares its first `fork` tokens because they are sampled once for all of it; a language
    model's group shares its opening because the model is nearly certain of it.
 3. DFPO is taken to be `--loss seq --transform on`: the summaries that speak of its ratio say so.
 4. Ours: `--at` limits a transform to shared tokens or to the rest, the loss `prefix` cancels
    without a transform (its ratio is CTPO's), `--duplicates` counts copies of a completion.
"""

import ast
import contextlib
import copy
import functools
import hashlib
import inspect
import json
import math
import operator
import os
import random
import re
import subprocess
import sys
import threading
import zlib
from argparse import ArgumentParser
from collections import Counter
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from toy_tasks import EOS, PAD, TASKS, VOCAB, decode, encode

LOSSES = ("reinforce", "grpo", "dr_grpo", "dapo", "grpo_sym", "cispo", "gspo", "seq", "prefix")
CLIPS = {"grpo": 0.2, "dr_grpo": 0.2, "dapo": 0.2, "grpo_sym": 0.2, "cispo": 0.2, "gspo": 0.04}
TRANSFORMS = ("off", "min", "orth", "mean", "shrink")
PLACES = ("all", "shared", "rest")
DUPLICATES = ("keep", "once", "share")


# ---- 1. Configuration
@dataclass(frozen=True)
class Config:
    """One training run, all but its seed. ValueError names a field that is out of range."""

    task: str = "commute"  # prompts and their right completions, from toy_tasks.py
    loss: str = "seq"  # which weight a token gets: one of LOSSES
    transform: str = "off"  # what is done to a group's weights: one of TRANSFORMS
    at: str = "all"  # at which tokens the transform acts: all, shared, rest
    duplicates: str = "keep"  # what copies of a completion count for: keep, once, share
    fork: int | None = None  # opening tokens that a group shares; None: the task's own
    group_size: int = 8  # G, completions per prompt
    prompts: int = 8  # B, prompts per rollout
    inner_steps: int = 8  # gradient steps on each rollout
    steps: int = 400  # rollouts
    lr: float = 1e-4  # learning rate of AdamW
    max_grad_norm: float = 1.0  # limit on the gradient's norm; inf: none
    kl: float = 0.02  # weight of the exact KL to the warm start
    clip_eps: float | None = None  # clip outside 1 ± this; inf: never; None: the loss's own

    def __post_init__(self):
        check_config(self)  # chapter 12
        if self.fork is None:
            object.__setattr__(self, "fork", TASKS[self.task].fork)
        if self.transform == "off":  # acts nowhere: one and the same run
            object.__setattr__(self, "at", "all")


# ---- 2. The policy, a small causal transformer, and its log-probabilities
def norm(x):
    """Layer norm without parameters: (...,D) -> (...,D)."""
    return nn.functional.layer_norm(x, x.shape[-1:])


class Block(nn.Module):
    """Attention and a perceptron, each behind a layer norm and added to its input."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        """x (N,T,D) -> (N,T,D)."""
        n, t, d = x.shape
        q, k, v = self.qkv(norm(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # (N,H,T,D/H)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.down(self.up(norm(x)).relu_().square())


class Policy(nn.Module):
    """A decoder-only transformer over toy_tasks.VOCAB with 0.1 million parameters."""

    def __init__(self, generator=None, width=64, layers=2, heads=2, context=16):
        super().__init__()
        self.token = nn.Embedding(len(VOCAB), width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.head = nn.Linear(width, len(VOCAB), bias=False)
        for matrix in self.parameters():
            nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5, generator=generator)

    def forward(self, tokens):
        """tokens (N,T) int64 -> log-probabilities (N,T,V) in nats of the token after each."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(norm(self.blocks(x))).log_softmax(-1)


def distinct_rows(prompts, tokens):
    """The rows that the policy reads in a rollout, without copies: in a toy most rows are copies.

    prompts (B,P), tokens (B,G,T) -> rows (N,P+T−1); which of them is each completion's, (B,G).
    """
    repeated = prompts[:, None].expand(-1, tokens.shape[1], -1)  # (B,G,P)
    rows = torch.cat([repeated, tokens[..., :-1]], dim=-1)  # nothing follows the last token
    distinct, row_of = rows.flatten(0, 1).unique(dim=0, return_inverse=True)
    return distinct, row_of.view(tokens.shape[:2])


def completion_logprobs(policy, distinct, row_of, length: int):
    """Log-probabilities of every token at each of the last `length` positions: (B,G,T,V), nats."""
    logprobs = policy(distinct).index_select(0, row_of.flatten())  # (BG,P+T−1,V)
    return logprobs[:, -length:].unflatten(0, row_of.shape)


def pick(logprobs, tokens):
    """Of the log-probabilities of every token, those of `tokens`: (B,G,T,V), (B,G,T) -> (B,G,T)."""
    return logprobs.gather(-1, tokens[..., None]).squeeze(-1)


def token_logprobs(policy, prompts, tokens):
    """Log-probabilities of the completions' own tokens: (B,P), (B,G,T) -> (B,G,T) in nats."""
    rows = distinct_rows(prompts, tokens)
    return pick(completion_logprobs(policy, *rows, tokens.shape[2]), tokens)


# ---- 3. Sampling groups that share an opening
def completion_mask(tokens):
    """True up to and including the first EOS (it is scored and trained), then False: (...,T)."""
    is_eos = (tokens == EOS).long()
    earlier = is_eos.cumsum(-1) - is_eos  # how many EOS stand before each token
    return earlier == 0


@torch.no_grad()
def sample_groups(policy, prompts, group_size: int, fork: int, max_completion: int, generator):
    """Sample `group_size` completions of each prompt, the first `fork` tokens once for the group.

    prompts (B,P) int64 -> tokens (B,G,T), PAD after EOS; T = max_completion. No temperature, no
    top-k: what samples is what is scored. ValueError: no prompts, or not 0 <= fork < T.
    """
    require(len(prompts) > 0, "there must be at least one prompt")
    require(0 <= fork < max_completion, f"fork must be in 0..{max_completion - 1}; got {fork}")
    rows = prompts
    for t in range(max_completion):
        if t == fork:  # until here a group is a single row
            rows = rows.repeat_interleave(group_size, dim=0)
        distinct, row_of = rows.unique(dim=0, return_inverse=True)  # copies are computed once
        probabilities = policy(distinct)[:, -1].exp()[row_of]
        sampled = torch.multinomial(probabilities, 1, generator=generator)
        ended = (rows[:, prompts.shape[1] :] == EOS).any(1, keepdim=True)
        rows = torch.cat([rows, sampled.masked_fill(ended, PAD)], dim=1)
    return rows[:, prompts.shape[1] :].view(len(prompts), group_size, max_completion)


# ---- 4. Advantages: what one trajectory did better than its group
def group_advantages(rewards, normalize: bool = True, counted=None):
    """Â_i = (R_i − mean R) / (std R + 1e-4) in each group (arXiv:2402.03300; std with G − 1, as TRL).

    rewards (B,G), floating-point -> (B,G), float32 at least; equal rewards give exactly 0, not
    dust. Without `normalize` (Dr. GRPO) no division. `counted` (B,G), bool or 0/1: only these make
    up the group; the others get 0, and their rewards may be anything.
    ValueError: wrong shape or dtype, or a reward that counts and is not finite.
    """
    fine = rewards.dim() == 2 and rewards.numel() > 0 and rewards.is_floating_point()
    require(fine, f"rewards must be floating-point (B,G); got {rewards.dtype} {[*rewards.shape]}")
    counted = torch.ones_like(rewards) if counted is None else counted
    require(counted.shape == rewards.shape, f"counted must be (B,G); got {[*counted.shape]}")
    counted = as_bool(counted)
    rewards = at_least_float32(rewards).masked_fill(~counted, 0.0)

    n = counted.sum(1, keepdim=True)  # (B,1)
    mean = rewards.sum(1, keepdim=True) / n.clamp(min=1)
    advantages = (rewards - mean).masked_fill(~counted, 0.0)
    require(bool(advantages.isfinite().all()), "rewards and their sum must be finite")
    if normalize:
        scale = advantages.abs().amax(1, keepdim=True).clamp(min=1.0)  # squares of 1e20 overflow
        squares = (advantages / scale).square().sum(1, keepdim=True)
        std = scale * (squares / (n - 1).clamp(min=1)).sqrt()
        advantages = advantages / (std + 1e-4)
    highest = rewards.masked_fill(~counted, -math.inf).amax(1, keepdim=True)
    lowest = rewards.masked_fill(~counted, math.inf).amin(1, keepdim=True)
    return advantages.masked_fill(highest <= lowest, 0.0)


# ---- 5. Effective weights: every published loss is one line (Eq. 2, section 4)

# The gradient of each loss in log π of token t of trajectory i is −(1/BG) Â_i w_{i,t}, where the
# effective weight w_{i,t} gathers ratio, clip and length normalisation. At a token that the group
# shares, log π is one number for all i, so its push is ∝ Σ_i Â_i w_{i,t}: it cancels (Eq. 2) where
# that sum is 0.
# Sources: reinforce, Williams 1992; grpo arXiv:2402.03300; dr_grpo 2503.20783 (its own advantages
# are not divided by std, here all are); dapo 2503.14476, cispo 2506.13585 (the token mean over the
# batch is TRL's and verl's); gspo 2507.18071; grpo_sym and seq, the paper; prefix, CTPO without
# its clip, 2605.07331.


def effective_weights(
    loss, logprobs, old_logprobs, advantages, mask, clip_eps=None, max_length=None
):
    """The weight w_{i,t} of every token under `loss`: exactly 0 off the mask, and without gradient.

    logprobs, old_logprobs (B,G,T) in nats, advantages (B,G), mask (B,G,T) bool or 0/1 -> (B,G,T),
    float32 at least. clip_eps: a number or a pair (low, high); inf: no clip; None: as in CLIPS.
    max_length: the constant length L of reinforce, dr_grpo, grpo_sym, seq and prefix; None: T.
    ValueError: unknown loss, wrong shape, a clip that is not positive, max_length below 1.
    """
    require(loss in LOSSES, f"loss must be one of {', '.join(LOSSES)}; got {loss!r}")
    check_shapes(advantages, mask, logprobs, old_logprobs)
    mask = as_bool(mask)
    if clip_eps is None:
        clip_eps = CLIPS.get(loss, math.inf)
    low, high = clip_eps if isinstance(clip_eps, (tuple, list)) else (clip_eps, clip_eps)
    require(low > 0 and high > 0, f"clip_eps must be positive; got {clip_eps}")
    L = mask.shape[-1] if max_length is None else max_length
    require(L >= 1, f"max_length must be at least 1; got {L}")

    log_r = at_least_float32(logprobs) - at_least_float32(old_logprobs)
    log_r = log_r.detach().masked_fill(~mask, 0.0)  # (B,G,T)
    r = log_r.exp()  # the token's importance ratio
    log_s = log_r.sum(-1, keepdim=True)  # (B,G,1) the whole completion's
    A = advantages[..., None]  # (B,G,1); only its sign matters here
    n = mask.sum(-1, keepdim=True).clamp(min=1)  # (B,G,1) scored tokens of each trajectory
    BG = advantages.numel()
    M = mask.sum().clamp(min=1)  # scored tokens of the batch

    def clipped(x):
        """The clip of PPO: 0 once a ratio has passed the bound on the side to which Â pushes it."""
        return x.masked_fill((A > 0) & (x > 1 + high) | (A < 0) & (x < 1 - low), 0.0)

    # fmt: off
    match loss:                                               # at a token shared by all:
        case "reinforce": w = torch.ones_like(r) / L          # cancels: w is one constant
        case "grpo":      w = clipped(r) / n                  # broken by 1/n and where a clip bites
        case "dr_grpo":   w = clipped(r) / L                  # broken where a clip bites: it sees Â
        case "dapo":      w = clipped(r) * BG / M             # broken where a clip bites
        case "grpo_sym":  w = r.masked_fill((r < 1 - low) | (r > 1 + high), 0.0) / L  # cancels
        case "cispo":     w = r.clamp(max=1 + high) * BG / M  # cancels
        case "gspo":      w = clipped((log_s / n).exp()) / n  # broken: ratio, clip and n differ
        case "seq":       w = log_s.exp() / L                 # broken by the ratios *after* it
        case "prefix":    w = log_r.cumsum(-1).exp() / L      # cancels: a shared past, one product
    # fmt: on
    return w.expand_as(r).masked_fill(~mask, 0.0)


# ---- 6. Transforms: make the weights cancel at shared tokens (Eqs. 17 and 18)
def pushes(weights, advantages):
    """Â_i w_{i,t}, how hard each trajectory pushes each of its tokens: (B,G,T), (B,G) -> (B,G,T).

    Where Â or w is 0 it is exactly 0, whatever the other: a ratio that has overflowed would give
    inf · 0 = nan, and one such trajectory would spread it to all. ValueError: a push that is not
    finite all the same.
    """
    A = advantages[..., None]
    push = (A * at_least_float32(weights)).masked_fill((A == 0) | (weights == 0), 0.0)
    finite = math.isfinite(push.sum().item())  # of a sum all terms are, or it is not
    require(finite, "advantage times weight is inf or nan: a ratio has overflowed")
    return push


def transform_weights(weights, advantages, mask, kind: str):
    """Change w along the group, position by position, over the trajectories scored there ("alive").

        kind     w̃_i                                                  cancels   smaller
        off      w_i                                                   no        no
        min      min_j w_j                     Min-Replace, Eq. 17     yes       yes
        orth     w − (Âᵀw / ‖Â‖²) Â            Adv-Orthogonal, Eq. 18  yes       no
        mean     mean_j w_j                    control                 yes       no
        shrink   w_i (min_j w_j / mean_j w_j)  control                 no        yes

    Equal weights make the pushes of a shared token cancel, as Σ_i Â_i = 0; orth takes out what does
    not. At all other tokens a transform changes what each trajectory teaches: `--at` tells the two
    apart. On a clipped loss min and shrink silence a group once one trajectory is clipped.

    weights (B,G,T), advantages (B,G), mask (B,G,T) bool or 0/1 -> (B,G,T), exactly 0 off the mask.
    Under orth a lone survivor gets 0, and a weight may be negative. ValueError: unknown kind, wrong
    shape, or under orth a push that is not finite.
    """
    require(kind in TRANSFORMS, f"transform must be one of {', '.join(TRANSFORMS)}; got {kind!r}")
    check_shapes(advantages, mask, weights)
    alive = as_bool(mask)
    w = at_least_float32(weights).masked_fill(~alive, 0.0)
    if kind == "off":
        return w
    smallest = w.masked_fill(~alive, math.inf).amin(1, keepdim=True)  # (B,1,T), inf: nobody
    mean = w.sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp(min=1)  # (B,1,T)
    if kind == "min":
        w = smallest.expand_as(w)
    elif kind == "mean":
        w = mean.expand_as(w)
    elif kind == "shrink":
        w = w * (smallest / mean.masked_fill(mean == 0, 1.0))
    elif kind == "orth":
        A = advantages[..., None].expand_as(w).masked_fill(~alive, 0.0)  # (B,G,T)
        norm2 = A.square().sum(1, keepdim=True)  # (B,1,T): ‖Â‖²
        along = pushes(w, advantages).sum(1, keepdim=True) / norm2.masked_fill(norm2 == 0, 1.0)
        w = w - along * A
    return w.masked_fill(~alive, 0.0)


def shared_tokens(tokens):
    """Where the whole group agrees, up to and including the token: (B,G,T) -> (B,T) bool."""
    agree = (tokens == tokens[:, :1]).all(1)  # (B,T)
    return agree.long().cumprod(-1).bool()  # once branched, never shared again


# ---- 7. The loss
def policy_loss(logprobs, weights, advantages):
    """−(1/BG) Σ_{i,t} Â_i sg[w_{i,t}] log π_{i,t}, sg: stop-gradient.

    logprobs, weights (B,G,T), advantages (B,G) -> scalar. A trajectory of weight 0 counts in BG.
    ValueError: wrong shape, or a push that is not finite.
    """
    check_shapes(advantages, logprobs, weights)
    push = pushes(weights.detach(), advantages)
    logprobs = logprobs.masked_fill(push == 0, 0.0)  # may be −inf there, and 0 · inf is nan
    return -(push * logprobs).sum() / advantages.numel()


def net_push(weights, advantages):
    """|Σ_i Â_i w_{i,t}| / G, the size of Eq. 2's left side: (B,G,T), (B,G) -> (B,T).

    ValueError: as for policy_loss.
    """
    check_shapes(advantages, weights)
    return pushes(weights, advantages).mean(1).abs()


# ---- 8. Warm start: a policy that knows the form of the task and gets a third of it right
def named_generator(seed: int, use: str) -> torch.Generator:
    """One generator per seed and use, so that drawing more for one use never moves another."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {use}".encode()))


def prompt_tokens(texts):
    """N texts of one length -> (N,P) int64."""
    return torch.tensor([encode(text) for text in texts])


def completion_tokens(texts, max_completion: int):
    """N texts -> (N,T) int64, each with its EOS and filled up with PAD."""
    return prompt_tokens([(text + VOCAB[EOS]).ljust(max_completion, VOCAB[PAD]) for text in texts])


def adamw(policy, lr: float):
    """AdamW without decay: nothing but the loss and the KL should move the policy."""
    return torch.optim.AdamW(policy.parameters(), lr, betas=(0.9, 0.99), weight_decay=0, fused=True)


@contextlib.contextmanager
def one_thread():
    """One thread while it lasts: faster for so small a network, and the same bits on any number of
    cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache  # all arms of a seed start from the same policy
@one_thread()
def cached_warm_start(task, seed: int, steps=300, batch=64, lr=2e-3) -> Policy:
    """Train on demonstrations; the learning rate falls to 0 over the steps."""
    policy = Policy(named_generator(seed, "initialisation"))
    optimizer = adamw(policy, lr)
    rng = random.Random(f"{seed} demonstrations")
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        prompts = [rng.choice(task.prompts()) for _ in range(batch)]
        answers = [task.demonstration(prompt, rng) for prompt in prompts]
        tokens = completion_tokens(answers, task.max_completion)[:, None]  # (N,1,T)
        logprobs = token_logprobs(policy, prompt_tokens(prompts), tokens)
        loss = -logprobs[completion_mask(tokens)].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def warm_start(task, seed: int) -> Policy:
    """A policy after a short supervised phase on the task's demonstrations, half of them wrong.

    Each call returns a copy of its own.
    """
    return copy.deepcopy(cached_warm_start(task, seed))


# ---- 9. One rollout and the update on it
def collect(policy, task, config: Config, generator):
    """Draw B prompts, sample a group for each, judge it.

    Returns prompts (B,P), tokens (B,G,T), rewards (B,G).
    """
    drawn = torch.randint(len(task.prompts()), (config.prompts,), generator=generator)
    texts = [task.prompts()[i] for i in drawn]
    prompts = prompt_tokens(texts)
    length = task.max_completion
    tokens = sample_groups(policy, prompts, config.group_size, config.fork, length, generator)
    rewards = torch.zeros(tokens.shape[:2])
    for b, rows in enumerate(tokens.tolist()):
        rewards[b] = torch.tensor([task.reward(texts[b], decode(row)) for row in rows])
    return prompts, tokens, rewards


def credit(tokens, rewards, duplicates: str):
    """tokens (B,G,T), rewards (B,G) -> advantages, and which trajectories the loss counts, (B,G).

    Beyond the paper: a right solution is pushed as often as it is sampled, so the likelier one gets
    more. Under `once` only a completion's first copy counts (ours; nearest: arXiv:2601.08763),
    under `share` copies share their reward (IPS-GRPO, arXiv:2601.21669). ValueError: another word
    or shape.
    """
    require(duplicates in DUPLICATES, f"duplicates must be one of {DUPLICATES}; got {duplicates!r}")
    check_shapes(rewards, tokens)
    same = (tokens[:, :, None] == tokens[:, None]).all(-1)  # (B,G,G): is completion i a copy of j?
    counted = torch.ones_like(rewards, dtype=torch.bool)
    if duplicates == "share":
        rewards = rewards / same.sum(-1)
    elif duplicates == "once":
        counted = ~same.tril(-1).any(-1)  # it has no copy before it
    return group_advantages(rewards, counted=counted), counted


def update(policy, reference, optimizer, config: Config, prompts, tokens, rewards) -> dict:
    """`inner_steps` full-batch gradient steps on one rollout.

    Returns means over these steps, and as "net_push" the sum. ValueError: loss, gradient or a push
    is not finite; the optimizer has then not stepped.
    """
    L = tokens.shape[2]
    longest = max(config.fork, int(completion_mask(tokens).sum(-1).max()))
    tokens = tokens[..., :longest]  # no need to compute what nobody has reached
    mask = completion_mask(tokens)  # (B,G,T)

    A, counted = credit(tokens, rewards, config.duplicates)  # (B,G), (B,G)
    scored = mask & counted[..., None]  # by the policy loss; the KL counts every completion
    shared = shared_tokens(tokens)[:, None]  # (B,1,T)
    acts = {"all": torch.ones_like(shared), "shared": shared, "rest": ~shared}[config.at]

    rows = distinct_rows(prompts, tokens)
    parameters = list(policy.parameters())
    with torch.no_grad():
        reference_logprobs = completion_logprobs(reference, *rows, longest)  # (B,G,T,V)
    reward = rewards.mean().item()
    total_push = 0.0
    seen = []

    for inner in range(config.inner_steps):
        every = completion_logprobs(policy, *rows, longest)  # (B,G,T,V)
        logprobs = pick(every, tokens)  # (B,G,T)
        if inner == 0:
            old_logprobs = logprobs.detach()  # this is still the policy that sampled
        w = effective_weights(config.loss, logprobs, old_logprobs, A, scored, config.clip_eps, L)
        w = torch.where(acts, transform_weights(w, A, scored, config.transform), w)

        kl = (every.exp() * (every - reference_logprobs)).sum(-1)  # KL(π ‖ reference): (B,G,T)
        kl = ((kl * mask).sum(-1) / mask.sum(-1)).mean()  # over a trajectory's tokens, then all
        loss = policy_loss(logprobs, w, A) + config.kl * kl
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
        finite = math.isfinite(loss.item()) and math.isfinite(grad_norm)
        require(finite, f"loss {loss.item():.3g}, gradient norm {grad_norm:.3g}")
        optimizer.step()

        total_push += net_push(w[..., : config.fork], A).mean().item()  # nan at fork 0
        seen.append({"kl": kl.item(), "grad_norm": grad_norm, "reward": reward})
    return means(seen) | {"net_push": total_push}


def means(rows: list[dict]) -> dict:
    """The mean of each number over rows."""
    result = {}
    for name in rows[0]:
        result[name] = sum(row[name] for row in rows) / len(rows)
    return result


# ---- 10. Exact measures, over every prompt and every right completion
@functools.cache
def solution_table(task):
    """All prompts (B,P); all their solutions, like groups, (B,S,T); which of them exist, (B,S)."""
    groups = [task.solutions(prompt) for prompt in task.prompts()]
    counts = torch.tensor([len(group) for group in groups])
    most = int(counts.max())
    padded = [group + [""] * (most - len(group)) for group in groups]
    tokens = torch.stack([completion_tokens(group, task.max_completion) for group in padded])
    return prompt_tokens(task.prompts()), tokens, torch.arange(most) < counts[:, None]


@torch.no_grad()
def solution_logprobs(policy, task):
    """log π(y|x) of every right completion y with its EOS: (B,S), −inf where there are fewer."""
    prompts, tokens, exists = solution_table(task)
    logprobs = token_logprobs(policy, prompts, tokens) * completion_mask(tokens)
    return logprobs.sum(-1).masked_fill(~exists, -math.inf)


def evaluate(policy, task, start) -> dict:
    """Exact measures; `start`: a policy or its solution_logprobs. nan: no prompt has two solutions.

    accuracy          Σ_y π(y|x) over right y, mean over prompts
    solution_entropy  entropy of π(y | x, right) / log(number of right y): 1 even, 0 one left
    solution_drift    |change of the log-odds of y_a and y_b| over pairs, then prompts (Cor. 3.2)
    """
    _, _, exists = solution_table(task)  # (B,S)
    n = exists.sum(1)  # solutions of each prompt; of one alone neither entropy nor drift: 0 / 0
    if isinstance(start, nn.Module):
        start = solution_logprobs(start, task)
    log_p = solution_logprobs(policy, task)
    log_q = log_p.log_softmax(1).masked_fill(~exists, 0.0)  # log π(y | x, right); not 0 · −inf
    entropy = -(log_q.exp() * log_q).sum(1) / n.log()
    moved = (log_p - start).masked_fill(~exists, 0.0)
    pairs = exists[:, :, None] & exists[:, None, :]  # (B,S,S), ordered; one with itself adds 0
    apart = (moved[:, :, None] - moved[:, None, :]).abs()
    drift = (apart * pairs).sum((1, 2)) / (n * (n - 1))
    return {
        "accuracy": log_p.exp().sum(1).mean().item(),
        "solution_entropy": entropy.nanmean().item(),
        "solution_drift": drift.nanmean().item(),
    }


@torch.no_grad()
def opening_logprobs(policy, task, fork: int):
    """Log-probabilities at the right openings, 7+ and 5+ for 75= at fork 2: (B,S,max(fork,1),V)."""
    prompts, tokens, _ = solution_table(task)
    openings = tokens[..., : max(fork, 1)]
    return completion_logprobs(policy, *distinct_rows(prompts, openings), openings.shape[2])


def learning_tax(after, before, task) -> float:
    """KL(after ‖ before) of two opening_logprobs, summed over the opening of each right solution.

    Mean over solutions, then prompts. It is all motion of the opening, not only that of Prop. 3.1,
    and motion to and fro adds up.
    """
    _, tokens, exists = solution_table(task)
    mask = completion_mask(tokens)[..., : after.shape[2]]  # (B,S,fork)
    kl = ((after.exp() * (after - before)).sum(-1) * mask).sum(-1)  # (B,S)
    return ((kl * exists).sum(1) / exists.sum(1)).mean().item()


def samples(policy, task, seed: int) -> str:
    """What the policy says most often to three prompts, of 100 samples each."""
    prompts = random.Random(seed).sample(task.prompts(), 3)
    generator = named_generator(seed, "samples")
    groups = sample_groups(policy, prompt_tokens(prompts), 100, 0, task.max_completion, generator)
    lines = []
    for prompt, rows in zip(prompts, groups, strict=True):
        said = []
        for text, count in Counter(map(decode, rows)).most_common(3):
            wrong = "" if task.reward(prompt, text) else " (wrong)"
            said.append(f"{count} x {text}{wrong}")
        lines.append(f"{prompt}  {',  '.join(said)}")
    return "\n".join(lines)


# ---- 11. One training run: (configuration, seed) -> curves, the same bits every time
@one_thread()
def train(config: Config, seed: int, **bar) -> dict:
    """Warm start, then `steps` rollouts with an update on each, with tqdm's options `bar`.

    Returns "curves", an evaluation at every step or at 40 to 80 of them, "final", means of the last
    quarter (one point fluctuates), "samples", and what was trained: "config", "seed".
    ValueError: the run has diverged.
    """
    seed = operator.index(seed)  # numpy's integers, too
    task = TASKS[config.task]
    reference = warm_start(task, seed)
    policy = copy.deepcopy(reference)
    optimizer = adamw(policy, config.lr)
    generator = named_generator(seed, "sampling")
    start = solution_logprobs(reference, task)
    openings = opening_logprobs(reference, task, config.fork)
    tax = 0.0
    push = 0.0 if config.fork else math.nan
    evaluated = {*range(0, config.steps, max(1, config.steps // 40)), config.steps}
    rows = []
    seen = []  # since the last evaluation
    bar = {"unit": " rollouts", "leave": False, "disable": sys.stderr is None} | bar
    for step in tqdm(range(config.steps + 1), **bar):
        if step > 0:
            try:
                rollout = collect(policy, task, config, generator)
                seen.append(update(policy, reference, optimizer, config, *rollout))
            except (ValueError, RuntimeError) as error:  # torch's own: it cannot sample from nan
                raise ValueError(f"stopped at rollout {step}: {error}") from None
            before = openings
            openings = opening_logprobs(policy, task, config.fork)
            tax += learning_tax(openings, before, task)
            push += seen[-1]["net_push"]
        if step in evaluated:
            row = means(seen) if seen else {}
            row |= evaluate(policy, task, start) | {"learning_tax": tax, "net_push": push}
            row = {name: float(f"{value:.6g}") for name, value in row.items()}
            rows.append({"step": step} | row)
            seen = []
    curves = {}
    for name in rows[-1]:
        curves[name] = [row.get(name, math.nan) for row in rows]
    return {
        "config": asdict(config),
        "seed": seed,
        "curves": curves,
        "final": means([row for row in rows if row["step"] > 0.75 * config.steps]),
        "samples": samples(policy, task, seed),
    }


# =================================================================================================
# The paper ends here. What follows checks input, runs many of these side by side, and shows them.
# =================================================================================================


# ---- 12. Checks
def require(condition, message: str):
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def at_least_float32(x):
    """bfloat16 rounds ratios to steps of .004 and more: a clip of 3e-4 would never act."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def as_bool(mask):
    """A mask of 0 and 1 as bool. ValueError: others, as 0 and −inf, which mean the opposite."""
    if mask.dtype != torch.bool:
        require(bool(((mask == 0) | (mask == 1)).all()), "a mask must be bool, or of 0 and 1")
    return mask.bool()


def check_shapes(advantages, *per_token):
    """ValueError unless advantages are (B,G), not empty, and all others (B,G,T)."""
    got = [tuple(x.shape) for x in (advantages, *per_token)]
    fine = len(set(got[1:])) == 1 and len(got[1]) == 3
    fine = fine and got[0] == got[1][:2] and advantages.numel() > 0
    require(fine, f"advantages must be (B,G), weights, mask and the like (B,G,T); got {got}")


VALID = {  # a field's choices, or its least value
    "task": tuple(TASKS),
    "loss": LOSSES,
    "transform": TRANSFORMS,
    "at": PLACES,
    "duplicates": DUPLICATES,
    "fork": 0,
    "group_size": 2,
    "prompts": 1,
    "inner_steps": 1,
    "steps": 1,
    "lr": 1e-9,
    "max_grad_norm": 1e-9,
    "kl": 0.0,
    "clip_eps": 1e-9,
}


def check_config(config: Config):
    """ValueError names a field that is out of range, and what it may be."""
    for f in fields(config):
        value = getattr(config, f.name)
        valid = VALID[f.name]
        if isinstance(valid, tuple):
            wanted = f"one of {', '.join(valid)}"
            fine = value in valid
        else:
            most = math.inf if f.name in ("max_grad_norm", "clip_eps") else 1e9
            wanted = f"{type(valid).__name__}, {valid:g} to {most:g}"
            fine = type(value) in (int, type(valid)) and valid <= value <= most
            fine = fine or (value is None and f.default is None)
        require(fine, f"{f.name} must be {wanted}; got {value!r}")
    longest = TASKS[config.task].max_completion - 1
    require((config.fork or 0) <= longest, f"fork must be at most {longest} for {config.task}")
    require(config.clip_eps is None or config.loss in CLIPS, f"clip_eps: {config.loss} has no clip")


# ---- 13. Many runs, side by side; a finished run is its file
HERE = Path(__file__).resolve().parent  # also where this file is called through a link


@functools.cache
def code_version() -> str:
    """The code, without its comments and layout."""
    texts = [(HERE / name).read_bytes() for name in ("tokrl.py", "toy_tasks.py")]
    return "".join(ast.dump(ast.parse(text)) for text in texts)


def run_path(out: Path, config: Config, seed: int) -> Path:
    """The file of one run. An edit of the code, or another torch, is another run."""
    key = repr((config, seed, torch.__version__, code_version())).encode()
    kind = config.transform if config.at == "all" else f"{config.transform}-at-{config.at}"
    name = f"{config.task}-{config.loss}-{kind}-seed{seed}-{hashlib.sha256(key).hexdigest()[:10]}"
    return out / f"{name}.json"


def save_run(path: Path, run: dict):
    """Write and rename, so that a reader finds all of it or nothing. nan becomes null."""
    plain = json.loads(json.dumps(run), parse_constant={"NaN": None, "Infinity": "inf"}.get)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_text(json.dumps(plain) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_run(path: Path) -> dict | None:
    """A finished run, None if there is none. ValueError: the file is damaged, or something else."""
    if not path.exists():
        return None
    try:
        run = json.loads(path.read_text())
        rows = [[*run["curves"][name], run["final"][name]] for name in MEASURES]
        np.array([[*run["curves"]["step"], 0.0], *rows], dtype=float)  # numbers, as many in each
        require(run["config"]["at"] in PLACES and isinstance(run["samples"], str), "")
    except (ValueError, TypeError, LookupError):
        raise ValueError(f"{path} is not a finished run: delete it to train it again") from None
    return run


def available_cores() -> int:
    """How many workers to start: one for each core that this process may use, at most 61."""
    if hasattr(os, "sched_getaffinity"):  # taskset, containers
        return min(len(os.sched_getaffinity(0)), 61)
    return min(os.cpu_count() or 1, 61)


def work():
    """What one worker does: the runs on its standard input; a line of output for each failure."""
    sys.stdout = sys.stderr  # what you print in train is seen at once, and is not taken for one
    text = sys.stdin.readline()
    if not text.endswith("\n"):  # the parent has ended meanwhile
        return
    line, jobs = json.loads(text)
    threading.Thread(target=end_with_parent, daemon=True).start()
    for name, config, seed, path in jobs:
        try:
            save_run(Path(path), train(Config(**config), seed, desc=name, position=line))
        except (ValueError, RuntimeError, OSError, MemoryError) as error:  # the other runs go on
            reason = str(error) or repr(error)
            os.write(1, f"{name}: {reason.splitlines()[0]}\n".encode(errors="replace"))


def end_with_parent():
    """Standard input ends when the parent does: a worker must not go on alone."""
    os.read(0, 1)
    os._exit(1)


def start_worker(line: int, jobs: list) -> subprocess.Popen:
    """A fresh Python: from which script, thread or notebook we are called makes no difference."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", "import tokrl; tokrl.work()"]
    # a session of its own: Ctrl-C is for the parent, a worker would print a traceback
    worker = subprocess.Popen(command, cwd=HERE, start_new_session=True, **pipes)
    with contextlib.suppress(BrokenPipeError):  # it is dead already: train_missing says so
        worker.stdin.write(json.dumps([line, jobs]).encode() + b"\n")
        worker.stdin.flush()
    return worker


def train_missing(arms: dict, seeds: list, out: Path):
    """Train those runs of {label: Config} that OUT does not have; one line for each that fails."""
    jobs = []
    for seed in seeds:
        for label, config in arms.items():
            path = run_path(out.resolve(), config, seed)
            if load_run(path) is None:
                jobs.append((f"{label}, seed {seed}", asdict(config), seed, str(path)))
    kept = len(arms) * len(seeds) - len(jobs)
    print(f"{len(jobs)} runs to train, {kept} kept from before", flush=True)
    count = min(len(jobs), available_cores())
    workers = []
    failures = []
    try:
        for line in range(count):
            workers.append(start_worker(line, jobs[line::count]))
        for worker in workers:
            failures += worker.stdout.read().decode().splitlines()  # waits until it ends
            if worker.wait() != 0:
                failures.append("a worker died: killed, or out of memory")
    finally:  # Ctrl-C
        for worker in workers:
            worker.kill()
    if failures:  # not before, and on a new line, as there were bars on the screen
        print("\n" + "\n".join(failures), file=sys.stderr)


def finished_arms(arms: dict, seeds: list, out: Path) -> dict:
    """{label: Config} -> {label: its runs}, of those that OUT has for every seed."""
    finished = {}
    for label, config in arms.items():
        runs = [load_run(run_path(out, config, seed)) for seed in seeds]
        if all(runs):
            finished[label] = runs
    return finished


# ---- 14. The figure of the three failure modes, a table, the command line
ARMS = {  # the word on the command line and in figures: transform, colour
    "off": ("off", "#D55E00"),
    "on": ("min", "#0072B2"),
    "orth": ("orth", "#009E73"),
    "mean": ("mean", "#CC79A7"),
    "shrink": ("shrink", "#56B4E9"),
}
LINES = {"all": "-", "shared": "--", "rest": ":"}
MEASURES = {
    "net_push": "net push, what does not\ncancel (lower is better)",
    "learning_tax": "learning tax, nats\n(lower is better)",
    "solution_drift": "solution drift, nats\n(lower is better)",
    "solution_entropy": "solution entropy\n(1 even, 0 collapsed)",
    "accuracy": "accuracy\n(higher is better)",
}


def all_arms(**options) -> dict[str, Config]:
    """{"off": Config, "on": Config, "on at shared": Config, ...} of one configuration."""
    arms = {}
    for word, (kind, _) in ARMS.items():
        for place in PLACES:
            config = Config(transform=kind, at=place, **options)
            arms[word if config.at == "all" else f"{word} at {place}"] = config
    return arms


def draw_failure_modes(arms: dict, path: Path):
    """The failure modes over training, and accuracy: mean over seeds, band from low to high."""
    if "inline" in os.environ.get("MPLBACKEND", "") and find_spec("matplotlib_inline") is None:
        del os.environ["MPLBACKEND"]  # a notebook's, and this Python cannot even import with it
    import matplotlib.figure  # slow to load, and the workers do without it

    settings = {key: x for key, x in matplotlib.rcParamsDefault.items() if key != "backend"}
    with matplotlib.rc_context(settings):  # the user's, such as usetex, may not work here
        figure = matplotlib.figure.Figure(figsize=(9, 5), dpi=150, layout="constrained")
        panels = figure.subplots(2, 3).flatten()
        for panel, measure in zip(panels[:5], MEASURES, strict=True):
            for label, runs in arms.items():
                _, colour = ARMS[label.split()[0]]
                line = LINES[runs[0]["config"]["at"]]
                steps = runs[0]["curves"]["step"]
                rows = np.array([run["curves"][measure] for run in runs], dtype=float)
                panel.plot(steps, rows.mean(0), line, color=colour, label=label)
                panel.fill_between(steps, rows.min(0), rows.max(0), color=colour, alpha=0.2, lw=0)
            panel.set_title(MEASURES[measure], fontsize=11)
            panel.set_xlabel("rollouts")
            panel.set_ylim(bottom=-0.02 * panel.get_ylim()[1])
            panel.spines[["top", "right"]].set_visible(False)
        title = "mean over seeds, and range" if len(runs) > 1 else "one seed"
        handles, labels = panels[0].get_legend_handles_labels()
        panels[5].legend(handles, labels, loc="center", title=title, ncols=1 + len(arms) // 9)
        panels[5].axis("off")
        figure.savefig(path, format="png")


def table(arms: dict) -> str:
    """A line per arm: means over its seeds and the last quarter of training."""
    width = max(len(label) for label in arms)
    lines = ["  ".join([" " * width, *MEASURES])]
    for label, runs in arms.items():
        cells = [f"{label:{width}}"]
        for name in MEASURES:
            finals = np.array([run["final"][name] for run in runs], dtype=float)
            cells.append(f"{finals.mean():{len(name)}.2f}".replace("nan", "  –"))
        lines.append("  ".join(cells))
    return "\n".join(lines)


def seed_range(text: str) -> list[int]:
    """'3' -> [3]; '0-7' -> [0, ..., 7]; at most a thousand. ValueError: anything else."""
    first, dash, last = text.partition("-")
    if not dash:
        last = first
    fine = first.isdecimal() and last.isdecimal() and 0 <= int(last) - int(first) < 1000
    require(fine, f"seeds must be N or A-B, at most a thousand; got {text!r}")
    return list(range(int(first), int(last) + 1))


def command_line() -> ArgumentParser:
    """Every field of Config is an option, explained by its comment; the seeds, and the folder."""
    about = "Train, measure and draw; see README.md. --transform on is min; both is off, and on."
    parser = ArgumentParser("tokrl.py", description=about)
    parser.error = functools.partial(require, False)  # one line, as for all bad input; no usage
    comments = dict(re.findall(r"(\w+): .*  # (.*)", inspect.getsource(Config)))
    for f in fields(Config):
        valid = (*ARMS, "min", "both") if f.name == "transform" else VALID[f.name]
        choices = valid if isinstance(valid, tuple) else None
        kind = str if choices else type(valid)
        name = "--" + f.name.replace("_", "-")
        text = f"{comments[f.name]} (default %(default)s)"
        parser.add_argument(name, type=kind, choices=choices, default=f.default, help=text)
    parser.set_defaults(transform="both")
    parser.add_argument("--seeds", default="0", help="N or A-B (default 0)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder (default runs)")
    return parser


def train_and_show(transform: str, at: str, seeds: str, out: Path, **options) -> int:
    """Train what is missing, print and draw every finished arm of this configuration."""
    seeds = seed_range(seeds)
    arms = all_arms(**options)
    words = {"both": ("off", "on"), "min": ("on",)}.get(transform, (transform,))
    chosen = [Config(transform=ARMS[word][0], at=at, **options) for word in words]
    wanted = {label: config for label, config in arms.items() if config in chosen}
    require(out.is_dir() or not out.exists(), f"--out must be a folder; {out} is a file")
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "failure-modes.png"
    ours = not picture.exists() or any(out.glob("*-seed*.json"))
    require(ours, f"{picture} is not of runs in this folder: delete it, or choose another --out")
    finished_arms(arms, seeds, out)  # names a damaged file before anything is trained

    train_missing(wanted, seeds, out)
    finished = finished_arms(arms, seeds, out)
    missing = [label for label in wanted if label not in finished]
    if missing:
        print(f"Not finished: {', '.join(missing)}. The same command retries.", file=sys.stderr)
    if finished:
        try:
            for label, runs in finished.items():
                print(f"\n{label}, 100 samples:\n{runs[0]['samples']}")
            print(f"\n{table(finished)}\n\nFigure: {picture}", flush=True)
        finally:  # also where "| head" has read enough
            draw_failure_modes(finished, picture)
    return 1 if missing else 0


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 1 where a run failed, 2 with one line for bad input, 130 after Ctrl-C."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a console without "±" shows a "?"
    try:
        return train_and_show(**vars(command_line().parse_args(argv)))
    except BrokenPipeError:  # "| head": else Python complains at its end, too
        sys.stdout = None
        return 1
    except (ValueError, OSError) as error:
        print(f"tokrl.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The same command continues with what is missing.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
