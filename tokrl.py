"""tokrl: which tokens of a group cancel, and what happens when they do not. One paper in one file.

    python tokrl.py                     train without and with the paper's remedy, and draw both
    python tokrl.py --transform orth    another transform, drawn beside what is finished
    python tokrl.py --help              all options

Paper: F. Ding et al., "Design Conditions for Intra-Group Learning of Sequence-Level Rewards: Token
Gradient Cancellation", arXiv:2604.13088v1 (equations as in v1; we worked from summaries).

The words. From one *prompt* a policy samples a *group* of G *completions* (with the prompt:
trajectories). Each gets a *reward*, 1 or 0, at its end; its *advantage* is its reward minus the
group's mean, over the group's standard deviation. A *rollout* is B such groups, on which we take a
few gradient steps. After the first, each token has an importance *ratio*: its probability now over
the one it was sampled with. GRPO clips each token's ratio, GSPO the geometric mean over a
completion, and `seq`, the paper's object, takes the product and does not clip.

The claim. Inside a group, a token that all share cannot explain why one completion was right and
another wrong, so its pushes, advantage times weight, should cancel over the group (Eq. 2).
Sequence-level weights differ, so they do not: each step moves the shared token by what came after
it (Prop. 3.1, "learning tax"), equally right solutions drift apart (Cor. 3.2), and one is left in
the end (entropy collapse). Weights that are equal (Min-Replace, Eq. 17) or orthogonal to the
advantages (Adv-Orthogonal, Eq. 18) restore the cancellation.

Where this program departs from the paper:
 1. The policy is tiny and the tasks can be enumerated: all measures but net push are exact.
 2. A group shares its first `fork` tokens because they are sampled once for all of it (tree
    rollouts); a language model's, an opening that all happened to choose: `--task habit`.
 3. The paper's method, DFPO, is taken to be `--loss seq --transform on`, as summaries describe it.
 4. Ours: `--at` limits a transform to shared tokens or to the rest, the loss `prefix` cancels
    without a transform (its ratio is CTPO's), `--duplicates share` lets copies share a reward.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "matplotlib==3.11.2", "tqdm==4.70.1"]
# ///

import copy
import functools
import hashlib
import json
import math
import os
import random
import signal
import sys
import zlib
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, spawn
from tqdm import tqdm

from toy_tasks import EOS, PAD, TASKS, VOCAB, decode, encode

LOSSES = ("reinforce", "grpo", "dr_grpo", "dapo", "grpo_sym", "cispo", "gspo", "seq", "prefix")
CLIPS = {"grpo": 0.2, "dr_grpo": 0.2, "dapo": 0.2, "grpo_sym": 0.2, "cispo": 0.2, "gspo": 0.04}
TRANSFORMS = ("off", "min", "orth")
PLACES = ("all", "shared", "rest")


# ---- 1. Configuration
def option(default, text: str, choices=None, least=None):
    """A field of Config, which is also an option of the command line (chapter 13)."""
    return field(default=default, metadata={"text": text, "choices": choices, "least": least})


@dataclass(frozen=True)
class Config:
    """One training run, all but its seed. ValueError names a field that is out of range."""

    task: str = option("commute", "prompts and their right answers: toy_tasks.py", tuple(TASKS))
    loss: str = option("seq", "which weight a token gets", LOSSES)
    transform: str = option("off", "what is done to a group's weights; on is min", TRANSFORMS)
    at: str = option("all", "at which tokens the transform acts", PLACES)
    duplicates: str = option("keep", "do copies of an answer share a reward?", ("keep", "share"))
    fork: int = option(None, "opening tokens that a group shares; None: the task's own", least=0)
    group_size: int = option(8, "G, completions per prompt", least=2)
    prompts: int = option(8, "B, prompts per rollout", least=1)
    inner_steps: int = option(8, "gradient steps on each rollout", least=1)
    steps: int = option(400, "rollouts", least=1)
    lr: float = option(1e-4, "learning rate of AdamW", least=0)
    max_grad_norm: float = option(1.0, "limit on the gradient's norm; inf: none", least=0)
    kl: float = option(0.02, "weight of the KL to the warm start", least=0)
    clip_eps: float = option(
        None, "clip outside 1 ± this; inf: never; None: the loss's own", least=0
    )

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            choices = f.metadata["choices"]
            least = f.metadata["least"]
            if choices and value not in choices:
                raise ValueError(f"{f.name} must be one of {', '.join(choices)}; got {value!r}")
            if least is not None and value is not None and not value >= least:
                raise ValueError(f"{f.name} must be at least {least}; got {value!r}")
        if self.clip_eps is not None and self.loss not in CLIPS:
            raise ValueError(f"clip_eps: {self.loss} has no clip")
        if self.fork is None:
            object.__setattr__(self, "fork", TASKS[self.task].fork)
        if self.fork >= TASKS[self.task].max_completion:
            raise ValueError(f"fork must be below {TASKS[self.task].max_completion}")
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
        return x + self.down(self.up(norm(x)).relu().square())


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
        """tokens (N,T) int64 -> log-probabilities (N,T,V) in nats of the token after each.

        Equal rows are computed once: in a toy most completions are copies.
        """
        distinct, row_of = tokens.unique(dim=0, return_inverse=True)
        x = self.token(distinct) + self.position.weight[: tokens.shape[1]]
        return self.head(norm(self.blocks(x))).log_softmax(-1).index_select(0, row_of)


def completion_logprobs(policy, prompts, tokens):
    """Log-probabilities of every token of the vocabulary at each place of the completions, in nats.

    prompts (B,P), tokens (B,G,T) -> (B,G,T,V).
    """
    repeated = prompts[:, None].expand(-1, tokens.shape[1], -1)  # (B,G,P)
    rows = torch.cat([repeated, tokens[..., :-1]], dim=-1)  # nothing follows the last token
    logprobs = policy(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])  # (B,G,P+T−1,V)
    return logprobs[:, :, -tokens.shape[2] :]


def pick(logprobs, tokens):
    """Of the log-probabilities of every token, those of `tokens`: (B,G,T,V), (B,G,T) -> (B,G,T)."""
    return logprobs.gather(-1, tokens[..., None]).squeeze(-1)


def token_logprobs(policy, prompts, tokens):
    """Log-probabilities of the completions' own tokens: (B,P), (B,G,T) -> (B,G,T) in nats."""
    return pick(completion_logprobs(policy, prompts, tokens), tokens)


# ---- 3. Sampling groups that share an opening
def completion_mask(tokens):
    """True up to and including the first EOS (it is scored and trained), then False: (...,T) bool.

    It knows the toy's EOS only: a trainer of language models brings its own mask.
    """
    is_eos = (tokens == EOS).long()
    earlier = is_eos.cumsum(-1) - is_eos  # how many EOS stand before each token
    return earlier == 0


@torch.no_grad()
def sample_groups(policy, prompts, group_size: int, fork: int, max_completion: int, generator):
    """Sample `group_size` completions of each prompt, the first `fork` tokens once for the group.

    prompts (B,P) int64 -> tokens (B,G,T), PAD after EOS; T = max_completion > fork. No temperature,
    no top-k: what samples is what is scored.
    """
    rows = prompts
    for t in range(max_completion):
        if t == fork:  # until here a group is a single row
            rows = rows.repeat_interleave(group_size, dim=0)
        probabilities = policy(rows)[:, -1].exp()
        sampled = torch.multinomial(probabilities, 1, generator=generator)
        ended = (rows[:, prompts.shape[1] :] == EOS).any(1, keepdim=True)
        rows = torch.cat([rows, sampled.masked_fill(ended, PAD)], dim=1)
    return rows[:, prompts.shape[1] :].view(len(prompts), group_size, max_completion)


# ---- 4. Advantages: what one trajectory did better than its group
def group_advantages(rewards, normalize: bool = True):
    """Â_i = (R_i − mean R) / (std R + 1e-4) in each group (arXiv:2402.03300; std with G − 1, as TRL).

    rewards (B,G) -> (B,G), float32 at least. Without `normalize` (Dr. GRPO) no division.
    """
    assert rewards.dim() == 2
    rewards = at_least_float32(rewards)
    advantages = rewards - rewards.mean(1, keepdim=True)
    if normalize:
        variance = advantages.square().sum(1, keepdim=True) / (rewards.shape[1] - 1)
        advantages = advantages / (variance.sqrt() + 1e-4)
    equal = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return advantages.masked_fill(equal, 0.0)  # exactly 0: a mean of equal numbers may be rounded


def at_least_float32(x):
    """Cast up: in bfloat16 ratios move in steps of .004 and more, and a clip of 3e-4 never acts."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- 5. Effective weights: every published loss is one line (Eq. 2, section 4)

# A loss puts a ratio r = π / π_old in front of the advantage, and ∇r = r ∇log π. So the gradient of
# each loss in log π of token t of trajectory i is −(1/BG) Â_i w_{i,t}, where the effective weight
# w_{i,t} gathers ratio, clip and length normalisation. Call Â_i w_{i,t} a push. At a token that the
# group shares, log π is one number for all i, so the pushes add up to Σ_i Â_i w_{i,t}: they cancel
# (Eq. 2) where that sum is 0.
# Sources: reinforce, Williams 1992; grpo arXiv:2402.03300; dr_grpo 2503.20783 (its own advantages
# are not divided by std, here all are); dapo 2503.14476, cispo 2506.13585 (averaged as by TRL and
# verl); gspo 2507.18071; grpo_sym and seq, the paper; prefix, CTPO without its clip, 2605.07331.


def effective_weights(
    loss, logprobs, old_logprobs, advantages, mask, clip_eps=None, max_length=None
):
    """The weight w_{i,t} of every token under `loss`: exactly 0 off the mask, and without gradient.

    logprobs, old_logprobs (B,G,T) in nats, advantages (B,G), mask (B,G,T) bool -> (B,G,T).
    clip_eps: a number or a pair (low, high); inf: no clip; None: as in CLIPS. max_length: the
    constant length L of reinforce, dr_grpo, grpo_sym, seq and prefix; None: T. Give it where T
    varies by batch. ValueError: unknown loss.
    """
    assert logprobs.shape == old_logprobs.shape == mask.shape and mask.dtype == torch.bool
    assert advantages.shape == mask.shape[:2]
    if clip_eps is None:
        clip_eps = CLIPS.get(loss, math.inf)
    low, high = clip_eps if isinstance(clip_eps, (tuple, list)) else (clip_eps, clip_eps)
    L = mask.shape[-1] if max_length is None else max_length

    log_r = at_least_float32(logprobs.detach()) - at_least_float32(old_logprobs.detach())
    log_r = log_r.masked_fill(~mask, 0.0)  # (B,G,T)
    r = log_r.exp()  # the token's importance ratio
    log_s = log_r.sum(-1, keepdim=True)  # (B,G,1) the whole completion's
    A = advantages[..., None]  # (B,G,1); only its sign matters here
    n = mask.sum(-1, keepdim=True).clamp(min=1)  # (B,G,1) scored tokens of each trajectory
    BG = advantages.numel()
    M = mask.sum()  # scored tokens of the batch

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
        case _:           raise ValueError(f"unknown loss {loss!r}")
    # fmt: on
    return w.expand_as(r).masked_fill(~mask, 0.0)


# ---- 6. Transforms: make the weights cancel at shared tokens (Eqs. 17 and 18)
def transform_weights(weights, advantages, mask, kind: str):
    """Change w along the group, place by place, over the trajectories scored there ("alive").

        off      w_i
        min      min_j w_j             Min-Replace, Eq. 17: equal weights, and Σ_i Â_i = 0
        orth     w − (Âᵀw / ‖Â‖²) Â    Adv-Orthogonal, Eq. 18: takes out what does not cancel

    At a token that is not shared a transform changes what each trajectory teaches: `--at` tells the
    two apart. On a clipped loss min silences a group wherever one of its trajectories is clipped.

    weights (B,G,T), advantages (B,G), mask (B,G,T) bool -> (B,G,T), exactly 0 off the mask.
    Under orth a lone survivor gets 0, and a weight may be negative. ValueError: unknown kind.
    """
    assert weights.shape == mask.shape and advantages.shape == mask.shape[:2]
    w = weights.masked_fill(~mask, 0.0)
    if kind == "min":
        w = w.masked_fill(~mask, math.inf).amin(1, keepdim=True).expand_as(w)
    elif kind == "orth":
        A = advantages[..., None] * mask  # (B,G,T)
        norm2 = A.square().sum(1, keepdim=True)  # (B,1,T): ‖Â‖², and 0 where nobody has an Â
        along = pushes(w, advantages).sum(1, keepdim=True) / norm2.masked_fill(norm2 == 0, 1.0)
        w = w - along * A
    elif kind != "off":
        raise ValueError(f"unknown transform {kind!r}")
    return w.masked_fill(~mask, 0.0)


def pushes(weights, advantages):
    """Â_i w_{i,t}: (B,G,T), (B,G) -> (B,G,T). 0 where Â is 0, also at a ratio that overflowed."""
    A = advantages.detach()[..., None]  # they may come from a reward model, or hold a KL
    return (A * weights).masked_fill(A == 0, 0.0)


def shared_tokens(tokens):
    """Where the whole group agrees, up to and including the token: (B,G,T) -> (B,T) bool.

    A row of nothing but padding, as some trainers add, agrees with nobody: leave it out first.
    """
    agree = (tokens == tokens[:, :1]).all(1)  # (B,T)
    return agree.long().cumprod(-1).bool()  # once branched, never shared again


# ---- 7. The loss
def policy_loss(logprobs, weights, advantages):
    """−(1/BG) Σ_{i,t} Â_i sg[w_{i,t}] log π_{i,t}, sg: stop-gradient.

    logprobs, weights (B,G,T), advantages (B,G) -> scalar. A trajectory of weight 0 counts in BG.
    """
    assert logprobs.shape == weights.shape and advantages.shape == weights.shape[:2]
    return -(pushes(weights.detach(), advantages) * logprobs).sum() / advantages.numel()


def net_push(weights, advantages):
    """|Σ_i Â_i w_{i,t}| / G, the size of Eq. 2's left side: (B,G,T), (B,G) -> (B,T)."""
    assert advantages.shape == weights.shape[:2]
    return pushes(weights, advantages).mean(1).abs()


# ---- 8. Warm start: a policy that knows the form of the task and gets part of it right
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


def warm_start(task, seed: int, steps=300, batch=64, lr=2e-3) -> Policy:
    """A policy after a short supervised phase on the task's demonstrations, half of them wrong.

    The learning rate falls to 0 over the steps. From here on torch uses one thread: so small a
    network is faster with it, and has the same bits on any number of cores.
    """
    torch.set_num_threads(1)
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


def share_reward(tokens, rewards):
    """Copies of a completion share their reward (IPS-GRPO, arXiv:2601.21669).

    Beyond the paper: a right answer is pushed as often as it is sampled, so the likelier gets more.
    tokens (B,G,T), rewards (B,G) -> (B,G).
    """
    same = (tokens[:, :, None] == tokens[:, None]).all(-1)  # (B,G,G): is completion i a copy of j?
    return rewards / same.sum(-1)


def update(policy, reference, optimizer, config: Config, prompts, tokens, rewards) -> float:
    """`inner_steps` full-batch gradient steps on one rollout.

    Returns the net push at the first `fork` tokens: mean over groups and tokens, summed over the
    steps; nan at fork 0. FloatingPointError: loss or gradient is not finite; the optimizer has then
    not stepped.
    """
    L = tokens.shape[2]
    longest = max(config.fork, int(completion_mask(tokens).sum(-1).max()))
    tokens = tokens[..., :longest]  # no need to compute what nobody has reached
    mask = completion_mask(tokens)  # (B,G,T)

    credited = share_reward(tokens, rewards) if config.duplicates == "share" else rewards
    A = group_advantages(credited)  # (B,G)
    shared = shared_tokens(tokens)[:, None]  # (B,1,T)
    acts = {"all": torch.ones_like(shared), "shared": shared, "rest": ~shared}[config.at]

    with torch.no_grad():
        reference_logprobs = completion_logprobs(reference, prompts, tokens)  # (B,G,T,V)
    total_push = 0.0

    for inner in range(config.inner_steps):
        every = completion_logprobs(policy, prompts, tokens)  # (B,G,T,V)
        logprobs = pick(every, tokens)  # (B,G,T)
        if inner == 0:
            old_logprobs = logprobs.detach()  # this is still the policy that sampled
        w = effective_weights(config.loss, logprobs, old_logprobs, A, mask, config.clip_eps, L)
        w = torch.where(acts, transform_weights(w, A, mask, config.transform), w)

        kl = (every.exp() * (every - reference_logprobs)).sum(-1)  # KL(π ‖ reference): (B,G,T)
        kl = ((kl * mask).sum(-1) / mask.sum(-1)).mean()  # over a trajectory's tokens, then all
        loss = policy_loss(logprobs, w, A) + config.kl * kl
        optimizer.zero_grad()
        loss.backward()
        gradient = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        if not (loss.isfinite() and gradient.isfinite()):
            where = f"at inner step {inner + 1}"
            raise FloatingPointError(f"loss {loss:.3g}, gradient norm {gradient:.3g} {where}")
        optimizer.step()
        total_push += net_push(w[..., : config.fork], A).mean().item()
    return total_push


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
    """Exact measures of a policy, beside that of the start. nan: no prompt has two solutions.

    accuracy          Σ_y π(y|x) over right y, mean over prompts
    solution_entropy  entropy of π(y | x, right) / log(number of right y): 1 even, 0 one left
    solution_drift    |change of the log-odds of y_a and y_b| over pairs, then prompts (Cor. 3.2)
    """
    _, _, exists = solution_table(task)  # (B,S)
    n = exists.sum(1)  # solutions of each prompt; of one alone neither entropy nor drift: 0 / 0
    log_p = solution_logprobs(policy, task)
    log_q = log_p.log_softmax(1).masked_fill(~exists, 0.0)  # log π(y | x, right); not 0 · −inf
    entropy = -(log_q.exp() * log_q).sum(1) / n.log()
    moved = (log_p - solution_logprobs(start, task)).masked_fill(~exists, 0.0)
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
    return completion_logprobs(policy, prompts, tokens[..., : max(fork, 1)])


def learning_tax(after, before, task) -> float:
    """KL(after ‖ before) of two opening_logprobs, summed over the opening of each right solution.

    Mean over solutions, then prompts. It is all motion of the opening, not only that of Prop. 3.1,
    and motion to and fro adds up.
    """
    _, tokens, exists = solution_table(task)
    mask = completion_mask(tokens)[..., : after.shape[2]]  # (B,S,fork)
    kl = ((after.exp() * (after - before)).sum(-1) * mask).sum(-1)  # (B,S)
    return ((kl * exists).sum(1) / exists.sum(1)).mean().item()


def answers(policy, start, task) -> str:
    """The likeliest right answers to three prompts, with their probability: start → now."""
    before = solution_logprobs(start, task).exp()
    after = solution_logprobs(policy, task).exp()
    lines = []
    for b in range(0, len(before), math.ceil(len(before) / 3)):
        prompt = task.prompts()[b]
        solutions = task.solutions(prompt)
        cells = []
        for s in after[b, : len(solutions)].argsort(descending=True)[:3]:
            cells.append(f"{solutions[s]} {before[b, s]:4.0%} → {after[b, s]:4.0%}")
        cells.append(f"wrong {1 - before[b].sum():4.0%} → {1 - after[b].sum():4.0%}")
        lines.append(f"{prompt}  " + "   ".join(cells))
    return "\n".join(lines)


# ---- 11. One training run: (configuration, seed) -> curves, the same bits every time
def train(config: Config, seed: int, **bar) -> dict:
    """Warm start, then `steps` rollouts with an update on each; `bar`: options of tqdm.

    Returns "curves", an evaluation at every step or at 40 to 80 of them, "final", means of the last
    quarter (one point fluctuates), "answers", and what was trained: "config", "seed".
    FloatingPointError: the run has diverged.
    """
    task = TASKS[config.task]
    start = warm_start(task, seed)  # also the reference of the KL
    policy = copy.deepcopy(start)
    optimizer = adamw(policy, config.lr)
    generator = named_generator(seed, "sampling")
    openings = opening_logprobs(policy, task, config.fork)
    tax = 0.0
    push = 0.0 if config.fork else math.nan
    every = max(1, config.steps // 40)  # rollouts between two evaluations
    rows = []
    progress = tqdm(range(config.steps + 1), unit=" rollouts", leave=False, **bar)
    for step in progress:
        if step > 0:
            rollout = collect(policy, task, config, generator)
            push += update(policy, start, optimizer, config, *rollout)
            before = openings
            openings = opening_logprobs(policy, task, config.fork)
            tax += learning_tax(openings, before, task)
            if not math.isfinite(tax):  # the last inner step broke the policy
                raise FloatingPointError(f"the policy is not finite after rollout {step}")
        if step % every == 0 or step == config.steps:
            row = evaluate(policy, task, start) | {"learning_tax": tax, "net_push": push}
            rows.append({"step": step} | {name: float(f"{x:.6g}") for name, x in row.items()})
            progress.set_postfix(accuracy=row["accuracy"])
    last_quarter = [row for row in rows if row["step"] > 0.75 * config.steps]
    curves = {}
    final = {}
    for name in rows[0]:
        curves[name] = [row[name] for row in rows]
        final[name] = sum(row[name] for row in last_quarter) / len(last_quarter)
    return {
        "config": asdict(config),
        "seed": seed,
        "curves": curves,
        "final": final,
        "answers": answers(policy, start, task),
    }


# =================================================================================================
# A reader of the paper may stop here. What follows runs many of these side by side, and shows them.
# =================================================================================================


# ---- 12. Many runs, side by side; a finished run is its file
THIS_FILE = Path(__file__).resolve()
CODE = [THIS_FILE.read_bytes(), THIS_FILE.with_name("toy_tasks.py").read_bytes()]
CORES = torch.get_num_threads()  # those that this process may use; a warm start sets it to one


def run_path(out: Path, config: Config, seed: int) -> Path:
    """The file of one run. An edit of the code, or another torch, is another run."""
    key = hashlib.sha256(repr((config, seed, torch.__version__, CODE)).encode()).hexdigest()
    words = f"{config.task}-{config.loss}-{config.transform}-{config.at}"
    return out / f"{words}-seed{seed}-{key[:10]}.json"


def save_run(path: Path, run: dict):
    """Write and rename, so that a reader finds all of it or nothing. nan is null, inf "inf"."""
    plain = json.loads(json.dumps(run), parse_constant={"NaN": None, "Infinity": "inf"}.get)
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_text(json.dumps(plain) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # half of it, where the disk is full


def work(worker: int, jobs: list, count: int, out: Path):
    """What one of `count` processes does: every count-th run, its bar on a line of its own."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # so torch tells that the parent died
    for label, config, seed in jobs[worker::count]:
        name = f"{label}, seed {seed}"
        try:
            run = train(config, seed, desc=name, position=worker)
            save_run(run_path(out, config, seed), run)  # named for the code that this process runs
        except FloatingPointError as error:  # it has diverged; the other runs go on
            tqdm.write(f"{name}: {error}", file=sys.stderr)


def train_missing(arms: dict, seeds: list, out: Path):
    """Train those runs of {label: Config} that OUT does not have, on all cores."""
    jobs = []
    for seed in seeds:
        for label, config in arms.items():
            if not run_path(out, config, seed).exists():
                jobs.append((label, config, seed))
    kept = len(arms) * len(seeds) - len(jobs)
    print(f"{len(jobs)} runs to train, {kept} kept from before", flush=True)
    if not jobs:
        return
    count = min(len(jobs), CORES)
    workers = spawn(work, (jobs, count, out), count, join=False, daemon=True)
    try:
        while not workers.join():
            pass
    except (ProcessRaisedException, ProcessExitedException) as error:  # in one of them: it ends all
        print(error, file=sys.stderr)  # with the traceback, or the signal that killed it
    finally:  # also at Ctrl-C
        for process in workers.processes:
            process.kill()


def finished_arms(arms: dict, seeds: list, out: Path) -> dict:
    """{label: Config} -> {label: its runs}, of those that OUT has for every seed."""
    finished = {}
    for label, config in arms.items():
        paths = [run_path(out, config, seed) for seed in seeds]
        if all(path.exists() for path in paths):
            finished[label] = [load_run(path) for path in paths]
    return finished


def load_run(path: Path) -> dict:
    """What `train` returned. ValueError: the file is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} is damaged: delete it to train it again") from None


# ---- 13. The figure of the three failure modes, a table, the command line
COLOURS = {"off": "#D55E00", "min": "#0072B2", "orth": "#009E73"}
LINES = {"all": "-", "shared": "--", "rest": ":"}
MEASURES = {
    "net_push": "net push, what does not\ncancel (lower is better)",
    "learning_tax": "learning tax, nats\n(lower is better)",
    "solution_drift": "solution drift, nats\n(lower is better)",
    "solution_entropy": "solution entropy\n(1 even, 0 collapsed)",
    "accuracy": "accuracy\n(higher is better)",
}


def arms_of(transforms, places, **options) -> dict[str, Config]:
    """{"off": Config, "on": Config, "on at shared": Config, ...}, all under the same options."""
    arms = {}
    for transform in transforms:
        for place in places:
            config = Config(transform=transform, at=place, **options)
            word = "on" if transform == "min" else transform
            arms[word if config.at == "all" else f"{word} at {place}"] = config
    return arms


def draw_failure_modes(arms: dict, path: Path):
    """The failure modes over training, and accuracy: mean over seeds, band from low to high."""
    import matplotlib.figure  # slow to load, and the workers do without it

    figure = matplotlib.figure.Figure(figsize=(9, 5), dpi=150, layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    for panel, measure in zip(panels[:5], MEASURES, strict=True):
        for label, runs in arms.items():
            colour = COLOURS[runs[0]["config"]["transform"]]
            line = LINES[runs[0]["config"]["at"]]
            steps = runs[0]["curves"]["step"]
            rows = np.array([run["curves"][measure] for run in runs], dtype=float)
            panel.plot(steps, rows.mean(0), line, color=colour, label=label)
            panel.fill_between(steps, rows.min(0), rows.max(0), color=colour, alpha=0.2, lw=0)
        panel.set_title(MEASURES[measure], fontsize=11)
        panel.set_xlabel("rollouts")
        panel.set_ylim(bottom=-0.02 * panel.get_ylim()[1])
        panel.spines[["top", "right"]].set_visible(False)
    seeds = [run["seed"] for run in next(iter(arms.values()))]
    title = "mean over seeds, and range" if len(seeds) > 1 else f"seed {seeds[0]}"
    handles, labels = panels[0].get_legend_handles_labels()
    panels[5].legend(handles, labels, loc="center", title=title)
    panels[5].axis("off")
    figure.savefig(path)


def table(arms: dict) -> str:
    """A line per arm: means over its seeds and the last quarter of training."""
    width = max(len(label) for label in arms)
    lines = ["  ".join([" " * width, *MEASURES])]
    for label, runs in arms.items():
        cells = [f"{label:{width}}"]
        for name in MEASURES:
            finals = np.array([run["final"][name] for run in runs], dtype=float)
            cells.append(f"{finals.mean():{len(name)}.2f}")
        lines.append("  ".join(cells))
    return "\n".join(lines)


def seed_range(text: str) -> list[int]:
    """'3' -> [3]; '0-7' -> [0, ..., 7]. ValueError: neither."""
    first, _, last = text.partition("-")
    seeds = list(range(int(first), int(last or first) + 1))
    if not seeds:
        raise ValueError(f"no seeds in {text}")
    return seeds


def command_line() -> ArgumentParser:
    """Every field of Config is an option; the seeds, and the folder."""
    usage = "python tokrl.py [--option value ...]"
    parser = ArgumentParser(usage=usage, formatter_class=ArgumentDefaultsHelpFormatter)
    for f in fields(Config):
        name = "--" + f.name.replace("_", "-")
        choices = f.metadata["choices"]
        if f.name == "transform":
            choices = ("both", "on", *choices)
        text = f.metadata["text"]
        parser.add_argument(name, type=f.type, choices=choices, default=f.default, help=text)
    parser.set_defaults(transform="both")
    parser.add_argument("--seeds", type=seed_range, default="0", help="N or A-B")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of runs and figure")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Train what is missing, print and draw every finished arm. Returns the exit status."""
    parser = command_line()
    options = vars(parser.parse_args(argv))
    seeds = options.pop("seeds")
    out = options.pop("out")
    word = options.pop("transform")
    place = options.pop("at")
    chosen = {"both": ("off", "min"), "on": ("min",)}.get(word, (word,))
    try:
        wanted = arms_of(chosen, [place], **options)
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if not os.access(out, os.W_OK):
        parser.error(f"the folder {out} cannot be written")

    try:
        train_missing(wanted, seeds, out)
        finished = finished_arms(arms_of(TRANSFORMS, PLACES, **options), seeds, out)
    except KeyboardInterrupt:
        print("\nStopped. The same command continues with what is missing.", file=sys.stderr)
        return 130
    except ValueError as error:
        parser.error(str(error))
    if finished:
        for name, runs in finished.items():
            print(f"\n{name}, seed {seeds[0]}:\n{runs[0]['answers']}")
        picture = out / "failure-modes.png"
        draw_failure_modes(finished, picture)
        print(f"\n{table(finished)}\n\nFigure: {picture}")
    missing = [name for name in wanted if name not in finished]
    if missing:
        print(f"Not finished: {', '.join(missing)}. The same command retries.", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # we draw into a file, whatever a notebook has set
    sys.stdout.reconfigure(errors="replace")  # a console without "→" shows "?"
    sys.exit(main())
