"""tokrl: which tokens of a group cancel, and what happens when they do not. One paper in one file.

The paper: F. Ding, Y. Zhang, Y. Wang, Z. Zeng, "Design Conditions for Intra-Group Learning of Sequence-Level Rewards:
Token Gradient Cancellation", arXiv:2604.13088v1. Equation numbers are "as in v1"; we worked from its abstract and from
summaries, not from the full text.

The words. A *policy* is a network that gives the next token's probabilities. From one *prompt* it samples a *group* of G
*completions* (with their prompt: trajectories). A verifier gives each a *reward*, 1 or 0, at its end; the *advantage* is
the reward minus the group's mean, so a group's advantages sum to 0. A *rollout* is B such groups, on which we take a few
gradient steps ("inner steps"). After the first of them the policy is no longer the one that sampled (training is
"off-policy"), so every token gets an importance *ratio*, its probability now over its probability then, and most losses
*clip* that ratio.

The paper in four sentences. A token that the whole group shares cannot explain why one completion was right and another
wrong, so its pushes, advantage times weight, should cancel over the group (Eq. 2). Sequence-level weights differ from
trajectory to trajectory, so they do not: each step moves the shared token for no reason (Prop. 3.1, the "learning tax"),
equally right solutions drift apart (Cor. 3.2), and in the end one is left (entropy collapse). Making the weights alike
(Min-Replace, Eq. 17) or orthogonal to the advantages (Adv-Orthogonal, Eq. 18) restores the cancellation. That is all of
chapters 5 to 7; the rest is what it takes to watch it.

    python tokrl.py                    trains without and with the transform and draws runs/failure-modes.png

Where this program departs from the paper:
 1. The policy has 0.1 million parameters and the tasks are toy arithmetic, enumerable, so every measure is exact.
 2. A group shares its first `fork` tokens by construction (chapter 3). In a language model they are shared because they
    are nearly certain; in a toy such tokens would have no gradient to look at.
 3. The transforms act position by position over the trajectories not yet ended there: beyond the shortest completion the
    paper's one weight per trajectory would be compared with trajectories that no longer exist.
 4. The baseline is GSPO as people run it, clipped. The paper's DFPO drops the clip: --clip-eps inf.
 5. A small KL penalty towards the warm-started policy (--kl 0 turns it off).

    paper                 function                                                  test
    objective, Eq. 2      effective_weights, policy_loss, cancellation_residual     test_eq2
    Prop. 3.1             learning_tax                                              test_prop31
    Cor. 3.2              evaluate                                                  test_cor32
    Cor. 3.3, section 4   effective_weights (loss "seq")                            test_cor33, test_section4
    Eqs. 17, 18           transform_weights                                         test_eq17, test_eq18
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import shlex
import signal
import sys
import threading
import time
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm  # matplotlib is imported where a figure is drawn

from toy_tasks import EOS, LARGER_FIRST, PAD, TASKS, VOCAB, Task, decode, encode

LOSSES = ("reinforce", "grpo", "dr_grpo", "dapo", "grpo_sym", "cispo", "gspo", "seq")
TRANSFORMS = ("off", "min", "orth")  # "on" is a word of the command line and means "min"


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)

# ---- 1. Configuration -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """One training run, all but its seed. Raises ValueError naming the field that is out of range."""

    task: str = "commute"  # one of toy_tasks.TASKS
    loss: str = "gspo"  # one of LOSSES
    transform: str = "off"  # one of TRANSFORMS
    fork: int | None = None  # tokens that a group shares by construction; None: the task's own number
    group_size: int = 8  # G, completions per prompt
    prompts: int = 8  # B, prompts per rollout, drawn with replacement
    inner_steps: int = 4  # full-batch gradient steps on each rollout
    steps: int = 400  # rollouts
    lr: float = 1e-4  # AdamW's learning rate
    kl: float = 0.02  # weight of the exact KL to the warm-started policy
    clip_eps: float | None = None  # ratios are clipped outside 1 ± clip_eps; inf: no clip; None: the loss's own default
    adapt: int = 0  # further rollouts under a stricter verifier (the `adapt` experiment)

    def __post_init__(self):
        for name, allowed in (("task", TASKS), ("loss", LOSSES), ("transform", TRANSFORMS)):
            value = getattr(self, name)
            require(value in allowed, f"{name} must be one of {', '.join(allowed)}; got {value!r}")
        if self.fork is None:
            object.__setattr__(self, "fork", TASKS[self.task].fork)
        if self.clip_eps is None and self.loss not in ("reinforce", "seq"):
            object.__setattr__(self, "clip_eps", default_clip_eps(self.loss))
        least = {"fork": 0, "group_size": 2, "prompts": 1, "inner_steps": 1, "steps": 1, "adapt": 0}
        for name, low in least.items():
            value, flag = getattr(self, name), name.replace("_", "-")
            require(type(value) is int and value >= low, f"{flag} must be a whole number of at least {low}; got {value}")
        longest = TASKS[self.task].max_completion
        require(self.fork < longest, f"fork must be below {longest}, task {self.task}'s longest completion; got {self.fork}")
        require(self.lr > 0 and math.isfinite(self.lr), f"lr must be positive and finite; got {self.lr}")
        require(self.kl >= 0 and math.isfinite(self.kl), f"kl must be at least 0 and finite; got {self.kl}")
        if self.clip_eps is not None:
            require(self.loss not in ("reinforce", "seq"), f"clip-eps does not apply to {self.loss}, which has no clip")
            require(self.clip_eps > 0, f"clip-eps must be positive (inf: no clip); got {self.clip_eps}")


def default_clip_eps(loss: str) -> float:
    """GSPO's ratio is a geometric mean over tokens and stays much closer to 1 than a single token's."""
    return 0.04 if loss == "gspo" else 0.2

# ---- 2. The policy: a small causal transformer, and the log-probabilities it gives to completions -------------------


class Block(nn.Module):
    """Attention and a two-layer perceptron, each added to the stream after a layer norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x, past=None):
        """x (N,T,D) -> (N,T,D) and this block's keys and values, `past` ones included, each (N,H,past+T,D/H)."""
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)  # (N,H,T,D/H)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.relu(self.up(self.norm2(x))).square()), (k, v)


class Policy(nn.Module):
    """A decoder-only transformer over toy_tasks.VOCAB; 2 layers, width 64, 2 heads: about 0.1 million parameters."""

    def __init__(self, generator=None, width: int = 64, layers: int = 2, heads: int = 2, context: int = 16):
        super().__init__()
        self.token, self.position = nn.Embedding(len(VOCAB), width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(VOCAB), bias=False)
        for matrix in (p for p in self.parameters() if p.dim() == 2):
            nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5, generator=generator)

    def forward(self, tokens, cache: dict | None = None):
        """tokens (N,T) int64 -> logits (N,T,V): row t is for the token after tokens[:, t].

        With a `cache` (a dict, empty at first) keys and values are kept, and each later call passes one new token.
        Raises ValueError for another shape or dtype, or more tokens than the context holds.
        """
        require(tokens.dim() == 2 and tokens.dtype == torch.int64,
                f"tokens must be int64 of shape (N,T); got {tokens.dtype} {tuple(tokens.shape)}")
        past = cache[0][0].shape[2] if cache else 0
        context = self.position.num_embeddings
        require(past + tokens.shape[1] <= context, f"{past + tokens.shape[1]} tokens exceed the context of {context}")
        require(not past or tokens.shape[1] == 1, f"with a filled cache pass one token at a time; got {tokens.shape[1]}")
        x = self.token(tokens) + self.position.weight[past : past + tokens.shape[1]]
        for i, block in enumerate(self.blocks):
            x, keys_values = block(x, cache[i] if past else None)
            if cache is not None:
                cache[i] = keys_values
        return self.head(self.norm(x))


def completion_logprobs(policy, prompts, tokens):
    """Log-probabilities of every possible token at every place: prompts (B,P), tokens (B,G,T) -> (B,G,T,V), in nats."""
    require(tokens.dim() == 3 and prompts.dim() == 2 and len(prompts) == len(tokens),
            f"need prompts (B,P) and tokens (B,G,T); got {tuple(prompts.shape)} and {tuple(tokens.shape)}")
    b, g, t = tokens.shape
    rows = torch.cat([prompts[:, None].expand(b, g, -1), tokens[..., :-1]], dim=-1).flatten(0, 1)  # (BG, P+T-1)
    return policy(rows)[:, prompts.shape[1] - 1 :].log_softmax(-1).view(b, g, t, -1)


def token_logprobs(policy, prompts, tokens):
    """Log-probabilities of the completions' own tokens: prompts (B,P), tokens (B,G,T) -> (B,G,T), in nats.

    No temperature and no top-k: what is scored is the distribution that is sampled. Raises ValueError for other shapes.
    """
    return completion_logprobs(policy, prompts, tokens).gather(-1, tokens[..., None]).squeeze(-1)

# ---- 3. Sampling groups that share an opening -----------------------------------------------------------------------


def completion_mask(tokens):
    """True up to and including the first EOS (which is scored and trained), False after it: (...,T) -> (...,T) bool."""
    is_eos = tokens == EOS
    return is_eos.cumsum(-1) - is_eos.long() == 0


@torch.no_grad()
def sample_groups(policy, prompts, group_size, fork, max_completion, generator):
    """Sample `group_size` completions of each prompt; the first `fork` tokens are sampled once for the whole group.

    Until the fork a group is a single row, after it G rows that start from copies of that row's keys and values.
    prompts (B,P) int64 -> tokens (B,G,T), PAD after EOS; old_logprobs (B,G,T) in nats, 0 after EOS; mask (B,G,T) bool;
    T = max_completion always. Raises ValueError for a wrong shape, or a fork outside 0 .. max_completion - 1.
    """
    require(prompts.dim() == 2, f"prompts must be (B,P); got {tuple(prompts.shape)}")
    require(group_size >= 1, f"group_size must be at least 1; got {group_size}")
    require(0 <= fork < max_completion, f"fork must be within 0 .. {max_completion - 1}; got {fork}")
    cache: dict = {}
    logits, tokens, logprobs = policy(prompts, cache)[:, -1], [], []
    for t in range(max_completion):
        if t == fork:
            logits, *rest = (x.repeat_interleave(group_size, dim=0) for x in (logits, *tokens, *logprobs))
            tokens, logprobs = rest[:fork], rest[fork:]
            cache = {i: [x.repeat_interleave(group_size, dim=0) for x in cache[i]] for i in cache}
        distribution = logits.log_softmax(-1)  # (B,V) before the fork, (BG,V) after it
        tokens.append(torch.multinomial(distribution.exp(), 1, generator=generator))
        logprobs.append(distribution.gather(1, tokens[-1]))
        if t + 1 < max_completion:
            logits = policy(tokens[-1], cache)[:, -1]
    shape = (len(prompts), group_size, max_completion)
    tokens, logprobs = torch.cat(tokens, dim=1).view(shape), torch.cat(logprobs, dim=1).view(shape)
    mask = completion_mask(tokens)
    return tokens.masked_fill(~mask, PAD), logprobs.masked_fill(~mask, 0.0), mask

# ---- 4. Advantages: what one trajectory did better than its group ---------------------------------------------------


def group_advantages(rewards, normalize: bool = True):
    """Â_i = (R_i − mean R) / (std R + 1e-4) within each group, std with G − 1 (DeepSeekMath, arXiv:2402.03300).

    rewards (B,G) -> (B,G). Without `normalize` the division is left out (Dr. GRPO, arXiv:2503.20783). A group of equal
    rewards teaches nothing and gets exactly 0, not rounding dust. Raises ValueError for another shape or G < 2.
    """
    require(rewards.dim() == 2 and rewards.shape[1] >= 2, f"rewards must be (B,G) with G >= 2; got {tuple(rewards.shape)}")
    require(rewards.is_floating_point(), f"rewards must be of a floating-point dtype; got {rewards.dtype}")
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if normalize:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    all_equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return advantages.masked_fill(all_equal, 0.0)

# ---- 5. Effective weights: every published loss is one line ---------------------------------------------------------
#
# The gradient of each loss with respect to the log-probability of token t of trajectory i is −(1/BG) Â_i w_{i,t}. The
# effective weight w_{i,t} gathers the importance ratio, the clip and the length normalisation, and is all that differs.
# At a token that the group shares, log π is one and the same number for all i, so its push is ∝ Σ_i Â_i w_{i,t}: it
# cancels (Eq. 2) where that sum is 0, which equal weights guarantee because Σ_i Â_i = 0.


def effective_weights(loss, logprobs, old_logprobs, advantages, mask, clip_eps=None, max_length=None):
    """The weight w_{i,t} of every token under `loss`, one of LOSSES; exactly 0 where the mask is 0; carries no gradient.

    logprobs, old_logprobs (B,G,T) in nats, advantages (B,G), mask (B,G,T) bool or 0/1, holes allowed -> (B,G,T).
    clip_eps: a number, or (low, high); inf means no clip; None means 0.04 for gspo and 0.2 for the others.
    max_length: the constant length L of reinforce, dr_grpo, grpo_sym and seq; None means T.
    Raises ValueError naming an unknown loss, a wrong shape or dtype, or a clip_eps or max_length out of range.
    """
    require(loss in LOSSES, f"loss must be one of {', '.join(LOSSES)}; got {loss!r}")
    mask = checked_mask(advantages, mask, logprobs=logprobs, old_logprobs=old_logprobs)
    low, high = checked_clip_eps(default_clip_eps(loss) if clip_eps is None else clip_eps)
    require(max_length is None or max_length >= 1, f"max_length must be at least 1; got {max_length}")

    log_r = (logprobs - old_logprobs).detach().masked_fill(~mask, 0.0)  # (B,G,T)
    r = log_r.exp()  # the token's importance ratio
    A = advantages.detach()[..., None]  # (B,G,1)
    n = mask.sum(dim=-1, keepdim=True).clamp(min=1)  # (B,G,1) scored tokens of each trajectory
    L = max_length or mask.shape[-1]
    BG, M = mask.shape[0] * mask.shape[1], mask.sum().clamp(min=1)  # trajectories and scored tokens in the batch

    def keep(x):
        """The PPO clip: 0 where the ratio has already moved past the clip in the direction that Â asks for."""
        return ~((A > 0) & (x > 1 + high) | (A < 0) & (x < 1 - low))

    match loss:                                                          # at a token shared by all:
        case "reinforce": w = torch.ones_like(r) / L                     # cancels: w is one constant
        case "grpo":      w = r * keep(r) / n                            # broken by the clip's sign and by 1/n
        case "dr_grpo":   w = r * keep(r) / L                            # broken by the clip's sign
        case "dapo":      w = r * keep(r) * BG / M                       # broken by the clip's sign
        case "grpo_sym":  w = r * ((1 - low <= r) & (r <= 1 + high)) / L  # cancels: the clip ignores Â ("GRPO-fix")
        case "cispo":     w = r.clamp(max=1 + high) * BG / M             # cancels
        case "gspo":      # broken: s, its clip and n all differ by trajectory
            s = (log_r.sum(dim=-1, keepdim=True) / n).exp()
            w = s * keep(s) / n
        case "seq":       # broken: the other tokens' ratios differ by trajectory (the paper's section 4)
            # A product over many tokens can exceed the dtype: far beyond any real ratio it saturates, so inf · 0 never occurs
            largest = 0.8 * math.log(torch.finfo(r.dtype).max)
            w = log_r.sum(dim=-1, keepdim=True).clamp(max=largest).exp() / L
    return w.expand_as(r).masked_fill(~mask, 0.0)

# ---- 6. Transforms: make the weights cancel at shared tokens --------------------------------------------------------


def transform_weights(weights, advantages, mask, kind):
    """Change w along the group, position by position, over the trajectories still scored ("alive") at that position.

        off    w̃_i = w_i
        min    w̃_i = min_j w_j                  Min-Replace (Eq. 17): equal weights, and Σ_i Â_i = 0
        orth   w̃ = w − (Âᵀw / ‖Â‖²) Â           Adv-Orthogonal (Eq. 18): Âᵀw̃ = 0 by construction

    weights (B,G,T), advantages (B,G), mask (B,G,T) bool or 0/1 -> (B,G,T), exactly 0 off the mask. Where ‖Â‖ = 0 over the
    alive, orth returns w. A lone survivor keeps its weight under min and gets 0 under orth. Both act on weights without
    gradient: with one, the transform itself would couple the trajectories again. Two consequences:
    - the min of *clipped* weights is 0 as soon as one trajectory is clipped, so Min-Replace on gspo is also a trust region
      for the whole group: the `control` experiment separates this from the cancellation;
    - on-policy and with equal lengths all weights are equal, and off, min and orth (Âᵀ1 = 0) are the same.
    Raises ValueError naming an unknown kind or a wrong shape.
    """
    require(kind in TRANSFORMS, f"transform must be one of {', '.join(TRANSFORMS)}; got {kind!r}")
    alive = checked_mask(advantages, mask, weights=weights)
    w = weights.masked_fill(~alive, 0.0)
    if kind == "min":
        w = weights.masked_fill(~alive, math.inf).amin(dim=1, keepdim=True).expand_as(weights)
    elif kind == "orth":
        A = advantages[..., None].expand_as(weights).masked_fill(~alive, 0.0)
        norm2 = (A * A).sum(dim=1, keepdim=True)  # (B,1,T): ‖Â‖² over the alive
        w = w - (A * w).sum(dim=1, keepdim=True) / norm2.masked_fill(norm2 == 0, 1.0) * A
    return w.masked_fill(~alive, 0.0)

# ---- 7. The loss ----------------------------------------------------------------------------------------------------


def policy_loss(logprobs, old_logprobs, advantages, mask, loss="gspo", transform="off", clip_eps=None, max_length=None):
    """−(1/BG) Σ_{i,t} Â_i sg[w̃_{i,t}] log π(a_{i,t} | h_{i,t}): a scalar with the gradient of `loss` under `transform`.

    Its gradient is the point, not its value, which is not the published objective's. A trajectory whose mask is all zero
    adds nothing and still counts in BG. Shapes, units and errors as in effective_weights and transform_weights.
    """
    weights = effective_weights(loss, logprobs, old_logprobs, advantages, mask, clip_eps, max_length)
    weights = transform_weights(weights, advantages, mask, transform)
    scored = logprobs.masked_fill(weights == 0, 0.0)  # so that −inf off the mask cannot turn 0 · inf into NaN
    return -(advantages[..., None] * weights * scored).sum() / advantages.numel()


def cancellation_residual(weights, advantages):
    """|Σ_i Â_i w_{i,t}| / G, the size of Eq. 2's left side at a shared token: weights (B,G,T), advantages (B,G) -> (B,T)."""
    require(weights.dim() == 3 and weights.shape[:2] == advantages.shape,
            f"need weights (B,G,T) and advantages (B,G); got {tuple(weights.shape)} and {tuple(advantages.shape)}")
    return (advantages[..., None] * weights).mean(dim=1).abs()


def checked_mask(advantages, mask, **tensors):
    """The mask as bool; ValueError naming the tensor whose shape or dtype does not fit (B,G,T), or advantages (B,G)."""
    require(mask.dim() == 3, f"mask must be (B,G,T); got {tuple(mask.shape)}")
    require(mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all()), "mask must hold only 0 and 1")
    require(advantages.shape == mask.shape[:2], f"advantages must be {tuple(mask.shape[:2])}; got {tuple(advantages.shape)}")
    for name, tensor in tensors.items():
        require(tensor.shape == mask.shape, f"{name} must be {tuple(mask.shape)} like mask; got {tuple(tensor.shape)}")
        require(tensor.is_floating_point(), f"{name} must be of a floating-point dtype; got {tensor.dtype}")
    return mask.bool()


def checked_clip_eps(clip_eps) -> tuple[float, float]:
    """(low, high) from one number or a pair; ValueError unless both are positive."""
    low, high = clip_eps if isinstance(clip_eps, (tuple, list)) and len(clip_eps) == 2 else (clip_eps, clip_eps)
    require(all(isinstance(x, (int, float)) and x > 0 for x in (low, high)),
            f"clip_eps must be a positive number or a pair (low, high) of them; got {clip_eps!r}")
    return low, high

# ---- 8. Warm start: a policy that knows the form of the task and gets a third of it right ---------------------------

WARM_STEPS, WARM_ROWS, WARM_LR = 300, 64, 2e-3


def named_generator(seed: int, use: str) -> torch.Generator:
    """One generator per seed and use, so that drawing more for one use never moves another."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {use}".encode()))


def prompt_tokens(prompts: list[str]):
    """Texts of one length -> (B,P) int64."""
    return torch.tensor([encode(prompt) for prompt in prompts])


def completion_tokens(texts: list[str], max_completion: int):
    """Texts -> (N,T) int64, each with its EOS and filled up with PAD."""
    rows = [encode(text) + [EOS] for text in texts]
    return torch.tensor([row + [PAD] * (max_completion - len(row)) for row in rows])


def adamw(policy, lr: float):
    """AdamW without decay: the paper's mechanisms should be all that moves the policy."""
    return torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)


@functools.lru_cache(maxsize=1)  # all arms of a seed start from the same policy
def warm_start(task: Task, seed: int) -> Policy:
    """A policy after a short supervised phase on the task's demonstrations, half of which are wrong."""
    policy = Policy(named_generator(seed, "initialisation"))
    rng, prompts, optimizer = random.Random(f"{seed} demonstrations"), task.prompts(), adamw(policy, WARM_LR)
    for step in range(WARM_STEPS):
        optimizer.param_groups[0]["lr"] = WARM_LR * (1 - step / WARM_STEPS)
        batch = [rng.choice(prompts) for _ in range(WARM_ROWS)]
        tokens = completion_tokens([task.demonstration(p, rng) for p in batch], task.max_completion)[:, None]  # (N,1,T)
        mask = completion_mask(tokens)
        loss = -(token_logprobs(policy, prompt_tokens(batch), tokens) * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy

# ---- 9. One rollout and the update on it ----------------------------------------------------------------------------

MAX_GRAD_NORM = 0.15  # the weights carry 1/n, so gradients are small and a limit of 1 would never act


class Rollout(NamedTuple):
    """B prompts with a group of G completions each."""

    prompts: torch.Tensor  # (B,P)
    tokens: torch.Tensor  # (B,G,T)
    old_logprobs: torch.Tensor  # (B,G,T) nats, of the policy that sampled
    mask: torch.Tensor  # (B,G,T)
    rewards: torch.Tensor  # (B,G) 0 or 1


def collect(policy, task: Task, config: Config, generator) -> Rollout:
    """Draw prompts, sample a group for each, and let the verifier judge every completion."""
    texts = task.prompts()
    chosen = torch.randint(len(texts), (config.prompts,), generator=generator).tolist()
    prompts = prompt_tokens([texts[i] for i in chosen])
    sample = sample_groups(policy, prompts, config.group_size, config.fork, task.max_completion, generator)
    rewards = [[task.reward(texts[i], decode(row)) for row in group] for i, group in zip(chosen, sample[0].tolist())]
    return Rollout(prompts, *sample, torch.tensor(rewards))


def update(policy, reference, optimizer, config: Config, rollout: Rollout) -> dict:
    """`inner_steps` full-batch gradient steps on one rollout; returns what was seen, as means over those steps.

    Raises FloatingPointError naming the inner step and the quantity that is not finite, or a first ratio that is not 1.
    """
    prompts, tokens, old_logprobs, mask, rewards = rollout
    advantages, lengths, seen = group_advantages(rewards), mask.sum(-1), defaultdict(list)
    with torch.no_grad():
        reference_logprobs = completion_logprobs(reference, prompts, tokens)  # (B,G,T,V)
    for inner in range(1, config.inner_steps + 1):
        every = completion_logprobs(policy, prompts, tokens)  # (B,G,T,V)
        logprobs = every.gather(-1, tokens[..., None]).squeeze(-1)  # (B,G,T)
        loss = policy_loss(logprobs, old_logprobs, advantages, mask, config.loss, config.transform, config.clip_eps)
        # KL(π ‖ reference), exact over the vocabulary: mean over a trajectory's tokens, then over trajectories
        kl = (((every.exp() * (every - reference_logprobs)).sum(-1) * mask).sum(-1) / lengths).mean()
        optimizer.zero_grad()
        (loss + config.kl * kl).backward()
        grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
        for name, value in (("loss", loss), ("KL", kl), ("gradient norm", grad_norm)):
            if not math.isfinite(value.item()):
                raise FloatingPointError(f"inner step {inner}: the {name} is {value.item()}")
        with torch.no_grad():
            if inner == 1:
                off_policy = ((logprobs - old_logprobs) * mask).abs().max().item()
                if off_policy > 1e-4:  # rounding leaves up to about 1e-5
                    raise FloatingPointError(f"inner step 1: a log-ratio is {off_policy:.1e} instead of 0")
                seen["token_entropy"].append(-((every.exp() * every).sum(-1) * mask).sum().item() / mask.sum().item())
            if config.fork:
                weights = effective_weights(config.loss, logprobs, old_logprobs, advantages, mask, config.clip_eps)
                weights = transform_weights(weights, advantages, mask, config.transform)[..., : config.fork]
                seen["residual"].append(relative_residual(weights, advantages))
        seen["kl"].append(kl.item())
        seen["grad_norm"].append(grad_norm.item())
        optimizer.step()
    return {name: sum(values) / len(values) for name, values in seen.items()}

# ---- 10. Exact measures, over every prompt and every right completion -----------------------------------------------

MEASURES = {"accuracy": "accuracy", "solution_entropy": "solution entropy", "solution_drift": "solution drift (nats)",
            "learning_tax": "learning tax (nats)", "residual": "residual", "reward": "sampled reward"}  # and their titles
DIAGNOSTICS = ("token_entropy", "kl", "grad_norm")  # logged with them


def relative_residual(weights, advantages) -> float:
    """Mean over groups and positions of |Σ_i Â_i w_i| / Σ_i |Â_i w_i|: 0, all cancels (or nothing pushes), to 1."""
    total = (advantages[..., None] * weights).abs().mean(dim=1)  # (B,T)
    return (cancellation_residual(weights, advantages) / total.masked_fill(total == 0, 1.0)).mean().item()


@functools.cache
def solution_table(task: Task):
    """All prompts (B,P); all solutions of each, as if they were a group, (B,S,T); which of them exist, (B,S) bool."""
    solutions = [task.solutions(prompt) for prompt in task.prompts()]
    most = max(len(group) for group in solutions)
    exists = torch.arange(most) < torch.tensor([[len(group)] for group in solutions])
    tokens = [completion_tokens(group + [""] * (most - len(group)), task.max_completion) for group in solutions]
    return prompt_tokens(task.prompts()), torch.stack(tokens), exists


@torch.no_grad()
def solution_logprobs(policy, task: Task):
    """log π(y|x) of every right completion y with its EOS: (B,S) nats, −inf where a prompt has fewer than S."""
    prompts, tokens, exists = solution_table(task)
    logprobs = token_logprobs(policy, prompts, tokens) * completion_mask(tokens)
    return logprobs.sum(-1).masked_fill(~exists, -math.inf)


def evaluate(policy, task: Task, start: Policy | None = None) -> dict:
    """Exact accuracy, solution entropy and, against the policy `start`, solution drift; None where not defined.

    accuracy           Σ_y π(y|x) over right y, mean over prompts
    solution_entropy   entropy of π(y | x, right) / log(number of right y), mean over prompts with at least two:
                       1 when all are equally likely, 0 when one is left
    solution_drift     |log-odds(y_a, y_b) now − at the start| in nats, mean over pairs, then over prompts (Cor. 3.2)
    """
    logp, exists = solution_logprobs(policy, task), solution_table(task)[2]
    measures = {"accuracy": logp.exp().sum(1).mean().item(), "solution_entropy": None, "solution_drift": None}
    several = exists.sum(1) >= 2
    if several.any():
        logp, exists = logp[several], exists[several]
        n = exists.sum(1)
        q = logp.log_softmax(1).masked_fill(~exists, 0.0)  # log π(y | x, right)
        measures["solution_entropy"] = (-(q.exp() * q).sum(1) / n.log()).mean().item()
        if start is not None:
            moved = (logp - solution_logprobs(start, task)[several]).masked_fill(~exists, 0.0)
            both = exists[:, :, None] & exists[:, None, :]  # (B,S,S) ordered pairs; a pair of a solution with itself adds 0
            gaps = ((moved[:, :, None] - moved[:, None, :]).abs() * both).sum((1, 2)) / (n * (n - 1))
            measures["solution_drift"] = gaps.mean().item()
    return measures


@functools.cache
def opening_table(task: Task, fork: int):
    """The distinct openings of right solutions: prompts (N,P), tokens (N,1,K), share of each position (N,1,K).

    K = fork, or 1 where nothing is shared. A prompt's share is 1/B, split evenly over its solutions.
    """
    prompts, tokens, exists = solution_table(task)
    b, s, _ = tokens.shape
    rows = torch.cat([prompts[:, None].expand(b, s, -1), tokens[..., : max(fork, 1)]], dim=-1)[exists]
    share = (exists / exists.sum(1, keepdim=True) / b)[exists]
    rows, index = rows.unique(dim=0, return_inverse=True)
    share = torch.zeros(len(rows)).index_add(0, index, share)
    prompts, openings = rows[:, : prompts.shape[1]], rows[:, None, prompts.shape[1] :]
    return prompts, openings, share[:, None, None] * completion_mask(openings)


@torch.no_grad()
def opening_logprobs(policy, task: Task, fork: int):
    """What the policy would do at every place of every opening: (N,1,K,V) in nats."""
    prompts, openings, _ = opening_table(task, fork)
    return completion_logprobs(policy, prompts, openings)


def learning_tax(after, before, share) -> float:
    """One rollout's tax: KL(π_after ‖ π_before) in nats, summed over an opening, averaged over openings (Prop. 3.1)."""
    return (((after.exp() * (after - before)).sum(-1)) * share).sum().item()

# ---- 11. One training run: (configuration, seed) -> curves, and the same bits every time ----------------------------


@contextlib.contextmanager
def stopwatch(seconds: dict, phase: str):
    """Add the time that the block takes to seconds[phase]."""
    began = time.perf_counter()
    yield
    seconds[phase] += time.perf_counter() - began


def train(config: Config, seed: int, report=lambda row: None) -> dict:
    """Warm start, then `steps` rollouts with an update on each; about 40 evaluations, each passed to `report`.

    Returns curves {"step": [...], measure: [...]}, "final" (each measure's mean over the last quarter's evaluations; the
    learning tax accumulates, so this is near its total), examples, samples and timing. Raises FloatingPointError naming
    the rollout and the quantity where training diverges.
    """
    torch.set_num_threads(1)  # parallelism is one process per run: faster here, and the same bits everywhere
    task, timing = TASKS[config.task], Counter()
    with stopwatch(timing, "warm start"):
        reference = warm_start(task, seed)
    policy = copy.deepcopy(reference)
    optimizer = adamw(policy, config.lr)
    generator, total = named_generator(seed, "sampling"), config.steps + config.adapt
    before, tax, rows, seen = opening_logprobs(policy, task, config.fork), 0.0, [], []
    for step in range(total + 1):
        if step == config.steps + 1:  # the `adapt` experiment: from here on a stricter verifier, and one loss for all arms
            task, config = LARGER_FIRST, replace(config, loss="grpo", transform="off", clip_eps=None, fork=0)
            before = opening_logprobs(policy, task, config.fork)
        if step:
            with stopwatch(timing, "sampling"):
                rollout = collect(policy, task, config, generator)
            with stopwatch(timing, "update"):
                try:
                    seen.append({"reward": rollout.rewards.mean().item()}
                                | update(policy, reference, optimizer, config, rollout))
                except FloatingPointError as error:
                    raise FloatingPointError(f"rollout {step}, {error}") from None
            timing["tokens sampled"] += rollout.mask.sum().item()
            timing["tokens trained"] += rollout.mask.sum().item() * config.inner_steps
        with stopwatch(timing, "exact measures"):
            after = opening_logprobs(policy, task, config.fork)
            tax += learning_tax(after, before, opening_table(task, config.fork)[2])
            before = after
            if not math.isfinite(tax):
                raise FloatingPointError(f"rollout {step}: the learning tax is {tax}")
            if step % max(1, config.steps // 40) == 0 or step in (config.steps, total):
                means = {k: sum(one[k] for one in seen) / len(seen) for k in (seen[0] if seen else ())}
                row = {"step": step, **evaluate(policy, task, reference), "learning_tax": tax, **means}
                rows.append({k: None if v is None else float(f"{v:.6g}") for k, v in row.items()} | {"step": step})
                seen = []
                report(rows[-1])
    return summary(config, seed, rows, policy, reference, task, timing)


def summary(config: Config, seed: int, rows: list[dict], policy, reference, task: Task, timing: dict) -> dict:
    """What a finished run leaves behind, ready for JSON."""
    curves = {name: [row.get(name) for row in rows] for name in ("step", *MEASURES, *DIAGNOSTICS)}
    last = [i for i, step in enumerate(curves["step"]) if step > 0.75 * curves["step"][-1]]
    final = {}
    for name in (*MEASURES, *DIAGNOSTICS):
        values = [curves[name][i] for i in last if curves[name][i] is not None]
        final[name] = float(f"{sum(values) / len(values):.6g}") if values else None
    texts, then, now = task.prompts(), solution_logprobs(reference, task).exp(), solution_logprobs(policy, task).exp()
    picked = [len(texts) // 3, 2 * len(texts) // 3]
    examples = [[texts[i], y, then[i, j].item(), now[i, j].item()]
                for i in picked for j, y in enumerate(task.solutions(texts[i])[:2])]
    three = [*picked, 0]
    tokens, *_ = sample_groups(policy, prompt_tokens([texts[i] for i in three]), 1, 0, task.max_completion,
                               named_generator(seed, "evaluation"))
    samples = [[texts[i], text, task.reward(texts[i], text)] for i, text in zip(three, map(decode, tokens[:, 0]))]
    return {"curves": curves, "final": final, "examples": examples, "samples": samples, "timing": dict(timing)}


# =====================================================================================================================
# A reader of the paper may stop here. What follows runs many trainings side by side, keeps what is finished, and draws.

# ---- 12. Many runs in processes -------------------------------------------------------------------------------------


def worker(connection) -> None:
    """Train the (config, seed) pairs that the parent sends, until it sends no more or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            config, seed = connection.recv()
            try:
                connection.send(("done", train(config, seed, lambda row: connection.send(("row", row)))))
            except FloatingPointError as error:
                connection.send(("diverged", str(error)))


class Progress:
    """One run's live bar on a terminal; elsewhere a line per 50 rollouts."""

    def __init__(self, name: str, config: Config, slot: int):
        self.name, self.total, self.last = name, config.steps + config.adapt, 0
        self.bar = tqdm(total=self.total, desc=name, position=slot, leave=False, disable=not sys.stderr.isatty(),
                        dynamic_ncols=True, bar_format="{desc} {percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]")

    def show(self, row: dict) -> None:
        """One evaluation's row."""
        shown = [k for k in ("accuracy", "solution_entropy", "residual") if row.get(k) is not None]
        text = ", ".join(f"{MEASURES[k]} {row[k]:.2f}" for k in shown)
        if not self.bar.disable:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(row["step"] - self.last)
        elif row["step"] // 50 > self.last // 50 or row["step"] in (0, self.total):
            print(f"{self.name}: rollout {row['step']}/{self.total}, {text}", file=sys.stderr, flush=True)
        self.last = row["step"]


def train_all(units: list, save) -> list[str]:
    """Train every (label, config, seed), one process per core, and save(label, seed, result) each as it finishes.

    Returns a message for each run that diverged. Raises ChildProcessError naming the run whose process died.
    """
    context, waiting, busy, processes, diverged = multiprocessing.get_context("spawn"), units[::-1], {}, [], []

    def give_work(connection, slot):
        if waiting:
            label, config, seed = waiting.pop()
            connection.send((config, seed))
            busy[connection] = label, seed, slot, Progress(f"{label}, seed {seed}", config, slot)

    try:
        for slot in range(min(len(units), os.cpu_count() or 1)):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=worker, args=(theirs,), daemon=True))
            ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: a worker still importing ignores it too
            processes[-1].start()
            signal.signal(signal.SIGINT, ctrl_c)
            theirs.close()
            give_work(ours, slot)
        while busy:
            for connection in multiprocessing.connection.wait(list(busy)):
                label, seed, slot, progress = busy[connection]
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError):
                    raise ChildProcessError(f"the process that trained {label}, seed {seed} died") from None
                if kind == "row":
                    progress.show(value)
                    continue
                if kind == "done":
                    save(label, seed, value)
                else:
                    diverged.append(f"{label}, seed {seed} diverged: {value}")
                progress.bar.close()
                del busy[connection]
                give_work(connection, slot)
    finally:
        for process in processes:
            process.kill()
    return diverged


# ---- 13. What is finished is kept -----------------------------------------------------------------------------------


@functools.cache
def source_hash() -> str:
    """Part of each kept run's name, so that an edit of the code is never answered with an old curve."""
    here = Path(__file__).resolve().parent
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in ("tokrl.py", "toy_tasks.py"))).hexdigest()


def kept_path(out: Path, config: Config, seed: int) -> Path:
    """Where the finished run of (config, seed) is kept, under this code and this torch."""
    key = repr((config, seed, torch.__version__, source_hash()))
    return out / ".cache" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def write_whole(path: Path, write) -> None:
    """write(temporary path), then rename: a reader finds the old file or the new one, never half of one."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: dict) -> None:
    """Write strict JSON: NaN and Infinity are refused."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(data, allow_nan=False) + "\n"))


def kept_run(path: Path) -> dict | None:
    """A run that was finished earlier, or None; a file that is something else is named and trained again."""
    if not path.exists():
        return None
    with contextlib.suppress(ValueError, AttributeError):
        run = json.loads(path.read_text())
        if {"curves", "final", "examples", "samples", "timing"} <= run.keys():
            return run
    print(f"{path} is not a finished run: it is trained again", file=sys.stderr)
    return None


def read_result(path: Path) -> dict:
    """An EXPERIMENT.json. Raises ValueError saying what to do where it is truncated, empty or something else."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        result = json.loads(path.read_text())
        for arm in result["arms"].values():
            n, points = len(arm["seeds"]), len(arm["curves"]["step"])
            assert n and points and all(len(arm["final"][m]) == n for m in MEASURES)
            assert all([len(row) for row in arm["curves"][m]] == [points] * n for m in MEASURES)
        if result["arms"] and result["experiment"] == path.stem:
            return result
    raise ValueError(f"{path} is not a whole result of this program; make it again with: "
                     f"python tokrl.py --experiment {path.stem} --out {path.parent}")


# ---- 14. Experiments: lists of labelled configurations --------------------------------------------------------------

ARMS = {"off": "off", "on": "min", "orth": "orth"}  # the first word of an arm's label -> its transform
EXPERIMENTS = ("failure-modes", "control", "frontier", "losses", "group-size", "adapt")


def experiment_arms(experiment: str, base: Config) -> dict[str, Config]:
    """The experiment's configurations by label: `base`, with what the experiment itself sets."""
    off_on = {"off": "off", "on": "min"}

    def grid(settings: dict, arms: dict) -> dict[str, Config]:  # settings: suffix of the label -> fields to replace
        return {f"{word} {suffix}".strip(): replace(base, transform=transform, **fields)
                for suffix, fields in settings.items() for word, transform in arms.items()}

    match experiment:
        case "failure-modes": return grid({"": {}}, ARMS)
        case "control":       return grid({"": {"fork": 0}}, ARMS)
        case "frontier":      return grid({f"lr={lr:g}": {"lr": lr} for lr in (3e-5, 6e-5, 1e-4, 3e-4)}, ARMS)
        case "losses":
            named = {loss: {"loss": loss, "clip_eps": None} for loss in LOSSES}
            return grid(named | {"gspo unclipped": {"loss": "gspo", "clip_eps": math.inf}}, off_on)
        case "group-size":
            return grid({f"G={size}": {"group_size": size, "prompts": 64 // size} for size in (2, 4, 8, 16)}, off_on)
        case _:  # adapt
            fixed = {"task": "commute", "adapt": max(1, base.steps // 2)}
            return grid({f"kl={kl:g}": {"kl": kl, **fixed} for kl in (0.0, Config.kl)}, off_on)


def run_experiment(experiment: str, base: Config, arms: dict, beside: dict, seeds: list[int], out: Path, fresh: bool,
                   command: str) -> tuple[dict, dict, list[str]]:
    """Train what is not kept yet and write OUT/EXPERIMENT.json.

    `beside`: arms that join where all their runs are kept. Returns the result, the runs by (label, seed), and messages of
    the runs that diverged.
    """
    paths = {(label, seed): kept_path(out, c, seed) for label, c in {**beside, **arms}.items() for seed in seeds}
    runs = {unit: run for unit, path in paths.items() if not (fresh and unit[0] in arms) and (run := kept_run(path))}
    waiting = [(label, config, seed) for seed in seeds for label, config in arms.items() if (label, seed) not in runs]
    rollouts = sum(config.steps + config.adapt for _, config, _ in waiting)
    minutes = rollouts / 400 * 30 / 60 / max(1, min(len(waiting), os.cpu_count() or 1))
    print(f"{experiment}: {len(arms) * len(seeds)} runs, {len(waiting)} of them still to train: about "
          f"{max(1, round(minutes))} min", file=sys.stderr, flush=True)

    def save(label, seed, run):
        write_json(paths[label, seed], run)
        runs[label, seed] = run

    diverged = train_all(waiting, save)
    complete = {label: config for label, config in {**arms, **beside}.items() if all((label, s) in runs for s in seeds)}
    order = sorted(complete, key=lambda label: list(ARMS).index(label.split()[0])) if beside else list(complete)

    def plain(config):  # JSON has no Infinity
        return asdict(config) | ({"clip_eps": "inf"} if config.clip_eps == math.inf else {})

    result = {"experiment": experiment, "command": command, "config": plain(base), "arms": {}, "timing": {},
              "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}}
    for label in order:
        each = [runs[label, seed] for seed in seeds]
        gather = lambda kind, names: {name: [run[kind][name] for run in each] for name in names}
        result["arms"][label] = {**plain(complete[label]), "seeds": seeds, "final": gather("final", MEASURES),
                                 "curves": {"step": each[0]["curves"]["step"], **gather("curves", MEASURES)},
                                 "diagnostics": gather("curves", DIAGNOSTICS)}
        result["timing"][label] = dict(sum((Counter(run["timing"]) for run in each), Counter()))
    if complete:
        write_json(out / f"{experiment}.json", result)
    return result, runs, diverged


# ---- 15. Tables -----------------------------------------------------------------------------------------------------


def first_reaching(arm: dict, seed: int, after: int = 0, level: float = 0.9) -> int | None:
    """Index of the first evaluation past rollout `after` with an accuracy of at least `level`; None if there is none."""
    found = [i for i, step in enumerate(arm["curves"]["step"])
             if step > after and arm["curves"]["accuracy"][seed][i] >= level]
    return found[0] if found else None


def columns_of(result: dict) -> dict[str, dict[str, list]]:
    """{title: {arm: one value per seed}}: the final measures, and what only this experiment asks."""
    arms, experiment = result["arms"], result["experiment"]
    columns = {MEASURES[m]: {label: arm["final"][m] for label, arm in arms.items()} for m in MEASURES if m != "reward"}
    for label, arm in arms.items():
        steps, change, curves = arm["curves"]["step"], arm["steps"], arm["curves"]
        for seed in range(len(arm["seeds"])):
            if experiment == "frontier":
                i = first_reaching(arm, seed)
                value = None if i is None else curves["solution_drift"][seed][i]
                columns.setdefault("drift at accuracy 0.9", defaultdict(list))[label].append(value)
            if experiment == "adapt":
                i, at_change = first_reaching(arm, seed, after=change), steps.index(change)
                new = {"rollouts to 0.9 after the change": (steps[-1] if i is None else steps[i]) - change,
                       "never reached 0.9": float(i is None),
                       "entropy at the change": curves["solution_entropy"][seed][at_change]}
                for title, value in new.items():
                    columns.setdefault(title, defaultdict(list))[label].append(value)
    return {title: column for title, column in columns.items() if any(v is not None for c in column.values() for v in c)}


def bootstrap(off: list, on: list, combine=np.subtract) -> tuple[float, float, float]:
    """combine(mean off, mean on) with its 95% interval: seeds resampled in pairs, 10,000 times (percentiles)."""
    pairs = np.array([pair for pair in zip(off, on) if None not in pair]).reshape(-1, 2)
    picks = np.random.default_rng(0).integers(len(pairs), size=(10_000, len(pairs)))
    means = pairs[picks].mean(axis=1)  # (10,000, 2)
    low, high = np.percentile(combine(means[:, 0], means[:, 1]), [2.5, 97.5])
    return float(combine(*pairs.mean(axis=0))), float(low), float(high)


def table(result: dict) -> str:
    """Markdown: each arm's mean ± standard deviation over seeds; then differences paired by seed, with 95% intervals."""
    columns, labels = columns_of(result), list(result["arms"])
    seeds = result["arms"][labels[0]]["seeds"]

    def spread(values):
        values = [v for v in values if v is not None]
        short = f" (n={len(values)})" if len(values) < len(seeds) else ""
        deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        return f"{np.mean(values):.2f}{deviation}{short}" if values else "–"

    rows = [["arm", *columns]] + [[label, *(spread(columns[c][label]) for c in columns)] for label in labels]
    for off in (label for label in labels if label.split()[0] == "off" and len(seeds) > 1):
        for on in (word + off[3:] for word in ("on", "orth") if word + off[3:] in labels):
            def compare(title, combine=np.subtract, sign="+"):
                a, b = columns[title][off], columns[title][on]
                if combine is np.divide and "entropy" in title:  # what is lost of it
                    a, b = [1 - x for x in a], [1 - x for x in b]
                if not any(None not in pair for pair in zip(a, b)):
                    return "–"
                value, low, high = bootstrap(a, b, combine)
                return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"
            rows.append([f"{off} − {on}", *map(compare, columns)])
            if result["experiment"] == "failure-modes":
                rows.append([f"{off} / {on}", *(compare(c, np.divide, "") if c[:8] in ("solution", "learning") else "" for c in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows)


def print_details(runs: dict, labels: list[str], seed: int) -> None:
    """What one seed learnt, in full: probabilities of solutions, samples, and where the time went."""
    each = {label: runs[label, seed] for label in labels}
    print(f"\nProbability of a right completion, seed {seed}:   start   " + "   ".join(f"{label:>5}" for label in each))
    for i, (prompt, solution, start, _) in enumerate(next(iter(each.values()))["examples"]):
        now = "   ".join(f"{run['examples'][i][3]:5.2f}" for run in each.values())
        print(f"    {prompt}{solution:<40} {start:5.2f}   {now}")
    for label, run in each.items():
        print(f"Sampled after {label}: " + ", ".join(f"{p}{y} ({'right' if r else 'wrong'})" for p, y, r in run["samples"]))
    for label, run in each.items():
        t = run["timing"]
        print(f"Time, {label}: " + ", ".join(f"{phase} {t[phase]:.1f} s" for phase in ("warm start", "sampling", "update", "exact measures"))
              + f"; {t['tokens sampled'] / t['sampling']:,.0f} tokens/s sampled, {t['tokens trained'] / t['update']:,.0f} trained")


# ---- 16. Figures ----------------------------------------------------------------------------------------------------

COLOURS = {"off": "#D55E00", "on": "#0072B2", "orth": "#009E73"}  # Okabe-Ito: told apart by colour-blind readers
STYLES = {"off": "-", "on": "-", "orth": "--"}


def draw(result: dict, path: Path) -> None:
    """Draw a result, from its JSON alone, as a PNG."""
    import matplotlib  # here and not above: starting the program should not wait for it
    from matplotlib.figure import Figure

    kind = {"failure-modes": draw_curves, "frontier": draw_frontier}.get(result["experiment"], draw_dots)
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
                                "axes.titlesize": 11, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
        kind(figure, result)
        write_whole(path, figure.savefig)


def draw_curves(figure, result: dict) -> None:
    """The three failure modes over training, and accuracy below: mean over seeds, band from the lowest to the highest."""
    panels = {"learning_tax": ("Ineffective updates", "learning tax so far (nats)"),
              "solution_drift": ("Solution probability drift", "|Δ log-odds| of two right\nsolutions (nats)"),
              "solution_entropy": ("Entropy collapse", "solution entropy\n(1 even, 0 one left)"),
              "accuracy": ("Accuracy, for comparison", "")}
    grid = figure.add_gridspec(2, 3, height_ratios=(5, 2))
    for i, (measure, (title, unit)) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[0, i] if i < 3 else grid[1, :])
        axes.set(title=title, ylabel=unit, xlabel="rollouts")
        ends = {}
        for label, arm in result["arms"].items():
            rows = np.array(arm["curves"][measure], dtype=float)  # (seeds, evaluations); None becomes nan
            axes.plot(arm["curves"]["step"], rows.mean(0), STYLES[label], color=COLOURS[label], lw=2)
            axes.fill_between(arm["curves"]["step"], rows.min(0), rows.max(0), color=COLOURS[label], alpha=0.15, lw=0)
            ends[label] = rows.mean(0)[-1]
        low, high = (0, 1.03) if measure in ("accuracy", "solution_entropy") else (0, axes.get_ylim()[1])
        axes.set(ylim=(low, high), xlim=(0, arm["curves"]["step"][-1]))
        place, gap = -math.inf, (high - low) * (0.08 if i < 3 else 0.22)  # labels at the line ends, kept apart
        for label in sorted(ends, key=ends.get):
            place = max(place + gap, ends[label] if math.isfinite(ends[label]) else 0)
            axes.annotate(label, (1.02, place), xycoords=("axes fraction", "data"), color=COLOURS[label], weight="bold", va="center")
    seeds = result["arms"][label]["seeds"]
    note = f"mean of seeds {seeds[0]}-{seeds[-1]}, band: lowest to highest seed" if len(seeds) > 1 else f"seed {seeds[0]}"
    figure.supxlabel(f"{result['config']['loss']}, task {result['config']['task']}; {note}", fontsize=9, color="0.35")


def draw_dots(figure, result: dict) -> None:
    """One row an arm: each seed as a faint dot, the mean with its 95% interval."""
    columns, labels = columns_of(result), list(result["arms"])
    figure.set_size_inches(11, 1.2 + 0.3 * len(labels))
    for axes, (title, column) in zip(figure.subplots(1, len(columns), sharey=True), columns.items()):
        for y, label in enumerate(labels):
            values, colour = [v for v in column[label] if v is not None], COLOURS[label.split()[0]]
            if values:
                axes.plot(values, [y] * len(values), "o", color=colour, alpha=0.25, ms=4, mew=0)
                draw_interval(axes, values, y, colour)
        axes.set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.4, -0.6))
        axes.set_title(title.replace(" (", "\n("), fontsize=10)
        axes.set_xlim(0, 1.03 if title in ("accuracy", "solution entropy") else None)
        axes.grid(axis="x", color="0.9")


def draw_interval(axes, values, y, colour) -> None:
    """The mean of `values` at height y, with its 95% bootstrap interval."""
    mean, low, high = bootstrap(values, [0.0] * len(values))
    axes.plot([low, high], [y, y], color=colour, lw=2)
    axes.plot([mean], [y], "o", color=colour, ms=6)


def draw_frontier(figure, result: dict) -> None:
    """Accuracy against drift at the end of training, one curve per transform over learning rates."""
    axes = figure.subplots()
    for word in ARMS:
        points = []
        for label, arm in result["arms"].items():
            if label.split()[0] == word:
                (x, *xs), (y, *ys) = (bootstrap(arm["final"][m], [0.0] * len(arm["seeds"])) for m in ("accuracy", "solution_drift"))
                axes.plot(xs, [y, y], color=COLOURS[word], lw=1)
                axes.plot([x, x], ys, color=COLOURS[word], lw=1)
                axes.annotate(label.split("=")[1], (x, y), xytext=(5, 5), textcoords="offset points", fontsize=9, color=COLOURS[word])
                points.append((x, y))
        axes.plot(*zip(*points), "o" + STYLES[word], color=COLOURS[word], lw=2)
        axes.annotate(word, points[-1], xytext=(-6, -12), textcoords="offset points", ha="right", color=COLOURS[word], weight="bold")
    axes.set(xlabel="accuracy", ylabel="solution drift (nats)", title="Accuracy against drift, one point per learning rate")
    axes.set_ylim(0)


# ---- 17. Command line -----------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message):
        self.exit(2, f"tokrl.py: {message}\n")


def seeds_from(text: str) -> list[int]:
    """'3' -> [3]; '0-7' -> [0, ..., 7]."""
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and (last.isdecimal() or not dash) and int(first) <= int(last or first)):
        raise argparse.ArgumentTypeError(f"must be N or A-B with 0 <= A <= B; got {text!r}")
    return list(range(int(first), int(last or first) + 1))


def parser() -> Parser:
    """Every option but a few maps to the field of Config of the same name; only options that are given appear."""
    p = Parser(prog="tokrl.py", argument_default=argparse.SUPPRESS, allow_abbrev=False,
               description="Train a tiny policy with and without the paper's transform and draw the three failure modes.")
    p.add_argument("--transform", choices=["both", "on", *TRANSFORMS], help="'on' is min; one arm is drawn beside those "
                   "that exist (default both: off and on; failure-modes, asked for by name, adds orth)")
    p.add_argument("--loss", choices=LOSSES, help=f"default {Config.loss}")
    p.add_argument("--task", choices=list(TASKS), help=f"default {Config.task}")
    p.add_argument("--fork", type=int, help="opening tokens that a group shares (default: the task's own; commute 2)")
    p.add_argument("--group-size", type=int, help=f"completions per prompt (default {Config.group_size})")
    p.add_argument("--prompts", type=int, help=f"prompts per rollout (default {Config.prompts})")
    p.add_argument("--inner-steps", type=int, help=f"gradient steps per rollout (default {Config.inner_steps})")
    p.add_argument("--steps", type=int, help=f"rollouts (default {Config.steps})")
    p.add_argument("--lr", type=float, help=f"learning rate (default {Config.lr:g})")
    p.add_argument("--kl", type=float, help=f"weight of the KL to the warm-started policy (default {Config.kl:g})")
    p.add_argument("--clip-eps", type=float, help="ratios are clipped outside 1 ± this; inf: no clip (default 0.04 for "
                   "gspo, 0.2 for the others)")
    p.add_argument("--seeds", type=seeds_from, help="N or A-B (default 0)")
    p.add_argument("--out", type=Path, help="folder for results (default runs)")
    p.add_argument("--experiment", choices=EXPERIMENTS, help="default failure-modes")
    p.add_argument("--plot", action="store_true", help="redraw the figures of the results in --out, without training")
    p.add_argument("--fresh", action="store_true", help="train again what is already finished")
    return p


def arms_from(given: dict) -> tuple[str, Config, dict, dict]:
    """What the options ask for: experiment, base configuration, arms to train, arms to draw beside them if they exist."""
    experiment, word = given.get("experiment", "failure-modes"), given.get("transform", "both")
    fields = {k: v for k, v in given.items() if k in Config.__dataclass_fields__ and k != "transform"}
    base = Config(**fields)
    arms = experiment_arms(experiment, base)
    if experiment != "failure-modes":
        for name in fields if word == "both" else ["transform"]:
            fixed = name in ("loss", "transform") or any(getattr(arm, name) != fields[name] for arm in arms.values())
            require(not fixed, f"experiment {experiment} sets --{name.replace('_', '-')} itself; leave it out")
        return experiment, base, arms, {}
    if word == "both":
        asked = list(arms) if "experiment" in given and "transform" not in given else ["off", "on"]
        return experiment, base, {label: arms[label] for label in asked}, {}
    label = "on" if word == "min" else word
    return experiment, base, {label: arms.pop(label)}, arms


def plot_all(out: Path, names) -> int:
    """Redraw every result in `out` and print its table; 2 where there is none or one is not whole."""
    paths, status = [path for name in names if (path := out / f"{name}.json").exists()], 0
    if not paths:
        raise ValueError(f"no results in {out}; make one with: python tokrl.py --out {out}")
    for path in paths:
        try:
            result = read_result(path)
        except ValueError as error:
            print(f"tokrl.py: {error}", file=sys.stderr)
            status = 2
            continue
        draw(result, path.with_suffix(".png"))
        print(f"\n{path.with_suffix('.png')}: {result['command']}\n\n{table(result)}")
    return status


def run(given: dict) -> int:
    """Do what the options ask for; returns the exit status."""
    out = given.get("out", Path("runs"))
    if given.get("plot"):
        extra = given.keys() - {"plot", "out", "experiment"}
        require(not extra, f"--plot trains nothing; leave out --{', --'.join(sorted(extra)).replace('_', '-')}")
        return plot_all(out, [given["experiment"]] if "experiment" in given else EXPERIMENTS)
    seeds = given.get("seeds", [0])
    experiment, base, arms, beside = arms_from(given)
    (out / ".cache").mkdir(parents=True, exist_ok=True)
    result, runs, diverged = run_experiment(experiment, base, arms, beside, seeds, out, given.get("fresh", False), given["command"])
    for message in diverged:
        print(f"tokrl.py: {message}", file=sys.stderr)
    if result["arms"]:
        draw(result, out / f"{experiment}.png")
        print(f"\n{table(result)}")
        if experiment == "failure-modes":
            print_details(runs, list(result["arms"]), seeds[0])
        print(f"\nFigure: {out / f'{experiment}.png'}")
    return 1 if diverged else 0


def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit status: 0, 1 where a run failed, 2 for bad input, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return run(vars(parser().parse_args(argv)) | {"command": shlex.join(["python", "tokrl.py", *argv])})
    except SystemExit as stop:
        return stop.code
    except (ValueError, OSError) as error:
        print(f"tokrl.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, ChildProcessError) else 2
    except KeyboardInterrupt:
        print("\nStopped. The same command continues with what is finished.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
