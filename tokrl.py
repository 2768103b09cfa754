"""tokrl: which tokens of a group cancel, and what happens when they do not. One paper in one file.

Paper: F. Ding et al., "Design Conditions for Intra-Group Learning of Sequence-Level Rewards: Token Gradient
Cancellation", arXiv:2604.13088v1 (equations as in v1; we worked from summaries, not from the full text).

The words. From one *prompt* a policy samples a *group* of G *completions* (with the prompt: trajectories). A
verifier gives each a *reward*, 1 or 0, at its end; its *advantage* is its reward minus the group's mean, over
the group's standard deviation. A *rollout* is B such groups, on which we take a few gradient steps. After the
first, each token has an importance *ratio*: its probability now over the one it was sampled with. GRPO and
its relatives *clip* each token's own (no weight once it has moved far enough), GSPO clips the geometric mean
over a completion, and `seq`, the paper's object, takes the product and does not clip.

The claim. A token that the whole group shares cannot explain why one completion was right and another wrong,
so its pushes, advantage times weight, should cancel over the group (Eq. 2). Sequence-level weights differ, so
they do not: each step moves the shared token for no reason (Prop. 3.1, "learning tax"), equally right
solutions drift apart (Cor. 3.2), and one is left in the end (entropy collapse). Weights that are equal
(Min-Replace, Eq. 17) or orthogonal to the advantages (Adv-Orthogonal, Eq. 18) restore the cancellation.

Where this program departs from the paper:
 1. A policy of 0.1 million parameters on toy arithmetic that can be enumerated, so every measure is exact.
 2. A group shares its first `fork` tokens by construction; a language model's, being nearly certain anyway.
 3. DFPO, the paper's method, is taken to be `--loss seq --transform on`: two summaries give the product.
"""

import copy, functools, hashlib, json, math, os, random, shlex, signal, sys, threading, zlib
import multiprocessing as mp
from argparse import SUPPRESS, ArgumentParser
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from toy_tasks import EOS, LARGER_FIRST, PAD, TASKS, VOCAB, decode, encode

LOSSES = {"reinforce": None, "grpo": 0.2, "dr_grpo": 0.2, "dapo": 0.2, "grpo_sym": 0.2, "cispo": 0.2,
          "gspo": 0.04, "seq": None}  # each with its usual clip; None: it has none
TRANSFORMS = {"off": "unequal weights, full size", "min": "equal weights, smaller",
              "orth": "cancels by projection, full size", "mean": "equal weights, full size",
              "shrink": "unequal weights, smaller"}

# ---- 1. Configuration
def require(condition, message: str):
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)

def option(default, valid, text: str):
    """A field of Config and option of the command line; `valid`: the choices, or the least number."""
    return field(default=default, metadata={"valid": valid, "help": text})

@dataclass(frozen=True)
class Config:
    """One training run, all but its seed. Raises ValueError naming the field that is out of range."""
    task: str = option("commute", tuple(TASKS), "prompts and their right completions")
    loss: str = option("seq", tuple(LOSSES), "which weight a token gets")
    transform: str = option("off", tuple(TRANSFORMS), "what is done to a group's weights")
    duplicates: str = option("keep", ("keep", "once", "share"), "what copies in a group count for")
    fork: int = option(None, 0, "opening tokens that a group shares (default: the task's own)")
    group_size: int = option(8, 2, "G, completions per prompt")
    prompts: int = option(8, 1, "B, prompts per rollout")
    inner_steps: int = option(8, 1, "gradient steps on each rollout")
    steps: int = option(400, 1, "rollouts")
    lr: float = option(1e-4, 1e-9, "learning rate of AdamW")
    max_grad_norm: float = option(1.0, 1e-9, "limit on the gradient's norm; inf: none")
    kl: float = option(0.02, 0.0, "weight of the exact KL to the warm start")
    clip_eps: float = option(None, 1e-9, "clip outside 1 ± this; inf: no clip (default: the loss's own)")
    adapt: bool = option(False, 0, "then half as many again, under a stricter verifier")
    def __post_init__(self):
        for f in fields(self):
            value, valid = getattr(self, f.name), f.metadata["valid"]
            choices, number = isinstance(valid, tuple), type(value) in (int, f.type)
            fine = value in valid if choices else value is f.default or number and value >= valid
            wanted = f"one of {', '.join(valid)}" if choices else f"{f.type.__name__}, at least {valid:g}"
            require(fine, f"{f.name.replace('_', '-')} must be {wanted}; got {value!r}")
        if self.fork is None:
            object.__setattr__(self, "fork", TASKS[self.task].fork)  # the one write to a frozen field
        require(self.fork < TASKS[self.task].max_completion, f"fork {self.fork} is too long for {self.task}")
        require(self.clip_eps is None or LOSSES[self.loss], f"clip-eps: the loss {self.loss} has no clip")

# ---- 2. The policy, a small causal transformer, and its log-probabilities
class Block(nn.Module):
    """Attention and a perceptron, each behind a layer norm and added to its input."""
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
    def forward(self, x):
        """x (N,T,D) -> (N,T,D)."""
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # each (N,H,T,D/H)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.down(self.up(self.norm2(x)).relu_().square())  # ReLU alone hardly learns the task

class Policy(nn.Module):
    """A decoder-only transformer over toy_tasks.VOCAB with 0.1 million parameters."""
    def __init__(self, generator=None, width: int = 64, layers: int = 2, heads: int = 2, context: int = 16):
        super().__init__()
        self.token, self.position = nn.Embedding(len(VOCAB), width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(VOCAB), bias=False)
        for matrix in (p for p in self.parameters() if p.dim() == 2):
            nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5, generator=generator)
    def forward(self, tokens):
        """tokens (N,T) int64 -> log-probabilities (N,T,V) in nats of the token after each."""
        distinct, copy_of = tokens.unique(dim=0, return_inverse=True)  # most rows of a toy are copies
        x = self.token(distinct) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x))).log_softmax(-1).index_select(0, copy_of)

def completion_logprobs(policy, prompts, tokens):
    """Log-probabilities of every token at every place: prompts (B,P), tokens (B,G,T) -> (B,G,T,V) in nats."""
    b, g, t = tokens.shape
    rows = torch.cat([prompts[:, None].expand(b, g, -1), tokens[..., :-1]], -1).flatten(0, 1)  # (BG,P+T-1)
    return policy(rows)[:, prompts.shape[1] - 1 :].view(b, g, t, -1)

def token_logprobs(policy, prompts, tokens):
    """Log-probabilities of the completions' own tokens: prompts (B,P), tokens (B,G,T) -> (B,G,T) in nats."""
    return completion_logprobs(policy, prompts, tokens).gather(-1, tokens[..., None]).squeeze(-1)

# ---- 3. Sampling groups that share an opening
def completion_mask(tokens):
    """True up to and including the first EOS (which is scored and trained), then False: (...,T) -> bool."""
    return (tokens == EOS).cumsum(-1) - (tokens == EOS).long() == 0

@torch.no_grad()
def sample_groups(policy, prompts, group_size: int, fork: int, max_completion: int, generator):
    """Sample `group_size` completions of each prompt; the first `fork` tokens are sampled once for the group.
    prompts (B,P) int64 -> tokens (B,G,T), PAD after EOS; T = max_completion. No temperature, no top-k."""
    rows, p = prompts, prompts.shape[1]
    for t in range(max_completion):
        if t == fork:  # until here a group is a single row
            rows = rows.repeat_interleave(group_size, dim=0)
        sampled = torch.multinomial(policy(rows)[:, -1].exp(), 1, generator=generator)  # (B,1), then (BG,1)
        ended = (rows[:, p:] == EOS).any(1, keepdim=True)
        rows = torch.cat([rows, sampled.masked_fill(ended, PAD)], dim=1)
    return rows[:, p:].view(len(prompts), group_size, max_completion)

# ---- 4. Advantages: what one trajectory did better than its group
def group_advantages(rewards, normalize: bool = True, counted=None):
    """Â_i = (R_i − mean R) / (std R + 1e-4) within each group, std with G − 1 (arXiv:2402.03300).
    rewards (B,G) -> (B,G). Without `normalize` (Dr. GRPO) no division. `counted` (B,G) bool: only these make
    up the group, the others get 0. Equal rewards: exactly 0, not dust. ValueError: wrong shape or dtype."""
    fine = rewards.dim() == 2 and rewards.is_floating_point()
    require(fine, f"rewards must be floating-point (B,G); got {rewards.dtype} {tuple(rewards.shape)}")
    counted = torch.ones_like(rewards, dtype=torch.bool) if counted is None else counted
    n = counted.sum(1, keepdim=True)  # (B,1)
    mean = (rewards * counted).sum(1, keepdim=True) / n.clamp(min=1)
    advantages = (rewards - mean) * counted
    if normalize:
        variance = advantages.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + 1e-4)
    first = rewards.gather(1, counted.int().argmax(1, keepdim=True))
    differ = ((rewards != first) & counted).any(1, keepdim=True)
    return advantages.masked_fill(~differ, 0.0)

def credit(tokens, rewards, duplicates: str):
    """tokens (B,G,T), rewards (B,G) -> advantages, and which trajectories the loss counts, both (B,G).
    A right solution is pushed as often as it is sampled: a lead feeds itself, shared opening or not. Under
    `once` only a completion's first copy counts (ours; nearest: arXiv:2601.08763), under `share` copies
    share their reward (IPS-GRPO, arXiv:2601.21669). A language model's copies are rare: compare answers."""
    same = (tokens[:, :, None] == tokens[:, None]).all(-1)  # (B,G,G): is completion i a copy of j?
    if duplicates == "share":
        rewards = rewards / same.sum(-1)
    has_earlier = same.tril(-1).any(-1)  # (B,G)
    counted = ~has_earlier | (duplicates != "once")
    return group_advantages(rewards, counted=counted), counted

# ---- 5. Effective weights: every published loss is one line (Eq. 2, section 4)
# The gradient of each loss in log π of token t of trajectory i is −(1/BG) Â_i w_{i,t}, where the effective
# weight w_{i,t} gathers ratio, clip and length normalisation. At a token that the group shares, log π is one
# number for all i, so its push is ∝ Σ_i Â_i w_{i,t}: it cancels (Eq. 2) where that sum is 0.
# Sources: reinforce, Williams 1992; grpo arXiv:2402.03300; dr_grpo 2503.20783; gspo 2507.18071; dapo
# 2503.14476, cispo 2506.13585 (the batch-wide token mean is TRL's and verl's); grpo_sym and seq, the paper.
def check_shapes(advantages, mask, *others):
    """The mask as bool. ValueError unless mask and others are (B,G,T) and advantages (B,G)."""
    shapes = [tuple(x.shape) for x in (mask, *others)]
    fine = mask.dim() == 3 and len(set(shapes)) == 1 and advantages.shape == mask.shape[:2]
    require(fine, f"advantages must be (B,G), mask and the rest (B,G,T); got {[*advantages.shape]}, {shapes}")
    return mask.bool()

def effective_weights(loss, logprobs, old_logprobs, advantages, mask, clip_eps=None, max_length=None):
    """The weight w_{i,t} of every token under `loss`: exactly 0 off the mask, and without gradient.
    logprobs, old_logprobs (B,G,T) in nats, advantages (B,G), mask (B,G,T) bool or 0/1 -> (B,G,T).
    clip_eps: a number or a pair (low, high); inf: no clip; None: the loss's own, as in LOSSES.
    max_length: the constant length L of reinforce, dr_grpo, grpo_sym and seq; None: T.
    ValueError: unknown loss, wrong shape, or a clip that is not positive."""
    require(loss in LOSSES, f"loss must be one of {', '.join(LOSSES)}; got {loss!r}")
    mask = check_shapes(advantages, mask, logprobs, old_logprobs)
    eps = clip_eps if clip_eps is not None else LOSSES[loss] or math.inf
    low, high = eps if isinstance(eps, (tuple, list)) else (eps, eps)
    require(low > 0 and high > 0, f"clip_eps must be positive; got {clip_eps}")
    log_r = (logprobs - old_logprobs).detach().masked_fill(~mask, 0.0)  # (B,G,T)
    r = log_r.exp()  # the token's importance ratio
    log_s = log_r.sum(-1, keepdim=True)  # (B,G,1) the whole completion's
    A = advantages[..., None]  # (B,G,1); only its sign matters here
    n = mask.sum(-1, keepdim=True).clamp(min=1)  # (B,G,1) scored tokens of each trajectory
    L = max_length or mask.shape[-1]
    BG, M = advantages.numel(), mask.sum().clamp(min=1)  # the batch's trajectories and scored tokens

    def clipped(x):
        """The PPO clip: 0 where the ratio has moved past it in the direction that Â asks for."""
        return x.masked_fill((A > 0) & (x > 1 + high) | (A < 0) & (x < 1 - low), 0.0)

    match loss:                                                      # at a token shared by all:
        case "reinforce": w = torch.ones_like(r) / L                 # cancels: w is one constant
        case "grpo":      w = clipped(r) / n                         # broken by 1/n, and where a clip bites
        case "dr_grpo":   w = clipped(r) / L                         # broken where a clip bites: it sees Â
        case "dapo":      w = clipped(r) * BG / M                    # broken where a clip bites
        case "grpo_sym":  w = r.masked_fill((r < 1 - low) | (r > 1 + high), 0.0) / L  # cancels: blind to Â
        case "cispo":     w = r.clamp(max=1 + high) * BG / M         # cancels
        case "gspo":      w = clipped((log_s / n).exp()) / n         # broken: ratio, clip and n differ
        case "seq":       w = log_s.exp() / L                        # broken by the other tokens' ratios
    return w.expand_as(r).masked_fill(~mask, 0.0)

# ---- 6. Transforms: make the weights cancel at shared tokens (Eqs. 17 and 18)
def transform_weights(weights, advantages, mask, kind: str):
    """Change w along the group, position by position, over the trajectories still scored ("alive") there.

        kind     w̃_i                                                 equal      smaller
        off      w_i                                                  no         no
        min      min_j w_j                     Min-Replace, Eq. 17    yes        yes
        orth     w − (Âᵀw / ‖Â‖²) Â            Adv-Orthogonal, 18     Âᵀw̃ = 0    no
        mean     mean_j w_j                    control                yes        no
        shrink   w_i (min_j w_j / mean_j w_j)  control                no         yes

    Min-Replace does two things: equal weights make a shared token's pushes cancel, as Σ_i Â_i = 0, and the
    smallest makes a group whose ratios have spread count for less. off, mean, shrink and min are the 2 x 2.
    On a clipped loss min and shrink stop a group once one trajectory is clipped: a trust region of a kind.

    weights (B,G,T), advantages (B,G), mask (B,G,T) bool or 0/1 -> (B,G,T), exactly 0 off the mask. A lone
    survivor gets 0 under orth. ValueError: unknown kind or wrong shape."""
    require(kind in TRANSFORMS, f"transform must be one of {', '.join(TRANSFORMS)}; got {kind!r}")
    alive = check_shapes(advantages, mask, weights)
    w = weights.masked_fill(~alive, 0.0)
    A = advantages[..., None].expand_as(w).masked_fill(~alive, 0.0)
    norm2 = (A * A).sum(1, keepdim=True)  # (B,1,T): ‖Â‖² over the alive
    mean = w.sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp(min=1)  # (B,1,T)
    smallest = w.masked_fill(~alive, math.inf).amin(1, keepdim=True)  # (B,1,T), inf where nobody is alive
    match kind:
        case "min":    w = smallest.expand_as(w)
        case "orth":   w = w - (A * w).sum(1, keepdim=True) / norm2.masked_fill(norm2 == 0, 1.0) * A
        case "mean":   w = mean.expand_as(w)
        case "shrink": w = w * (smallest / mean.masked_fill(mean == 0, 1.0))
    return w.masked_fill(~alive, 0.0)

# ---- 7. The loss
def policy_loss(logprobs, weights, advantages):
    """−(1/BG) Σ_{i,t} Â_i sg[w_{i,t}] log π_{i,t}, sg: stop-gradient. (B,G,T), (B,G,T), (B,G) -> scalar."""
    scored = logprobs.masked_fill(weights == 0, 0.0)  # log π = −inf off the mask must not give 0 · inf
    return -(advantages[..., None] * weights.detach() * scored).sum() / advantages.numel()

def cancellation_residual(weights, advantages):
    """|Σ_i Â_i w_{i,t}| / G, the size of Eq. 2's left side: weights (B,G,T), advantages (B,G) -> (B,T)."""
    return (advantages[..., None] * weights).mean(1).abs()

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
    return torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)

@functools.lru_cache(maxsize=4)  # all arms of a seed start from the same policy
def warm_start(task, seed: int, steps=300, batch=64, lr=2e-3) -> Policy:
    """A policy after a short supervised phase on the task's demonstrations, half of which are wrong."""
    torch.set_num_threads(1)  # a process per run: faster, the same bits on any number of cores
    policy = Policy(named_generator(seed, "initialisation"))
    rng, optimizer = random.Random(f"{seed} demonstrations"), adamw(policy, lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        texts = [rng.choice(task.prompts()) for _ in range(batch)]
        answers = [task.demonstration(text, rng) for text in texts]
        tokens = completion_tokens(answers, task.max_completion)[:, None]  # (N,1,T)
        logprobs = token_logprobs(policy, prompt_tokens(texts), tokens)
        optimizer.zero_grad()
        (-logprobs[completion_mask(tokens)].mean()).backward()
        optimizer.step()
    return policy

# ---- 9. One rollout and the update on it
def collect(policy, task, config: Config, generator):
    """Draw B prompts, sample a group for each, judge it: prompts (B,P), tokens (B,G,T), rewards (B,G)."""
    drawn = torch.randint(len(task.prompts()), (config.prompts,), generator=generator)
    texts = [task.prompts()[i] for i in drawn]
    prompts = prompt_tokens(texts)
    tokens = sample_groups(policy, prompts, config.group_size, config.fork, task.max_completion, generator)
    rewards = [[task.reward(text, decode(row)) for row in rows] for text, rows in zip(texts, tokens.tolist())]
    return prompts, tokens, torch.tensor(rewards)

def update(policy, reference, optimizer, config: Config, prompts, tokens, rewards) -> dict:
    """`inner_steps` full-batch gradient steps on one rollout; returns means of what was seen."""
    mask, seen = completion_mask(tokens), []  # (B,G,T)
    advantages, counted = credit(tokens, rewards, config.duplicates)  # (B,G), (B,G)
    scored = mask & counted[..., None]  # by the policy loss; the KL counts every completion
    with torch.no_grad():
        reference_logprobs = completion_logprobs(reference, prompts, tokens)  # (B,G,T,V)
    for inner in range(config.inner_steps):
        every = completion_logprobs(policy, prompts, tokens)  # (B,G,T,V)
        logprobs = every.gather(-1, tokens[..., None]).squeeze(-1)  # (B,G,T)
        if inner == 0:
            old_logprobs = logprobs.detach()  # this is still the policy that sampled
        weights = effective_weights(config.loss, logprobs, old_logprobs, advantages, scored, config.clip_eps)
        weights = transform_weights(weights, advantages, scored, config.transform)
        kl = (every.exp() * (every - reference_logprobs)).sum(-1)  # KL(π ‖ reference), exact: (B,G,T)
        kl = ((kl * mask).sum(-1) / mask.sum(-1)).mean()  # over each trajectory's tokens, then over all
        loss = policy_loss(logprobs, weights, advantages) + config.kl * kl
        optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
        shared = weights[..., : config.fork]  # empty for fork 0: the two means below are nan
        push = cancellation_residual(shared, advantages)  # (B,fork)
        size = (advantages[..., None] * shared).abs().mean(1)
        residual = push / size.masked_fill(size == 0, 1.0)  # from 0, all cancels, to 1, nothing does
        seen.append(dict(net_push=push.mean() * config.inner_steps, residual=residual.mean(), kl=kl.detach(),
                         grad_norm=grad_norm, reward=rewards.mean()))
    return means(seen)  # of net_push so the sum

def means(rows: list[dict]) -> dict:
    """The mean of each number over rows."""
    return {name: sum(float(row[name]) for row in rows) / len(rows) for name in rows[0]}

# ---- 10. Exact measures, over every prompt and every right completion
@functools.cache
def solution_table(task):
    """All prompts (B,P); all their solutions, like groups, (B,S,T); which of them exist, (B,S) bool."""
    groups = [task.solutions(prompt) for prompt in task.prompts()]
    most = max(len(group) for group in groups)
    tokens = [completion_tokens(group + [""] * (most - len(group)), task.max_completion) for group in groups]
    exists = torch.arange(most) < torch.tensor([[len(group)] for group in groups])
    return prompt_tokens(task.prompts()), torch.stack(tokens), exists

@torch.no_grad()
def solution_logprobs(policy, task):
    """log π(y|x) of every right completion y with its EOS: (B,S) in nats, −inf where there are fewer."""
    prompts, tokens, exists = solution_table(task)
    logprobs = token_logprobs(policy, prompts, tokens) * completion_mask(tokens)
    return logprobs.sum(-1).masked_fill(~exists, -math.inf)

def evaluate(policy, task, start) -> dict:
    """Exact measures against `start`, a policy or its solution_logprobs; nan: no prompt has two solutions.
    accuracy          Σ_y π(y|x) over right y, mean over prompts
    solution_entropy  entropy of π(y | x, right) / log(number of right y): 1 even, 0 one left
    solution_drift    |change of the log-odds of y_a and y_b| in nats, over pairs, then prompts (Cor. 3.2)"""
    log_p, exists = solution_logprobs(policy, task), solution_table(task)[2]  # both (B,S)
    accuracy = log_p.exp().sum(1).mean().item()
    several = exists.sum(1) >= 2
    before = start if torch.is_tensor(start) else solution_logprobs(start, task)
    log_p, exists, before = log_p[several], exists[several], before[several]
    n = exists.sum(1)  # solutions of each prompt
    log_q = log_p.log_softmax(1).masked_fill(~exists, 0.0)  # log π(y | x, right)
    entropy = -(log_q.exp() * log_q).sum(1) / n.log()
    moved = (log_p - before).masked_fill(~exists, 0.0)
    pairs = exists[:, :, None] & exists[:, None, :]  # (B,S,S), ordered; a solution with itself adds 0
    drift = ((moved[:, :, None] - moved[:, None, :]).abs() * pairs).sum((1, 2)) / (n * (n - 1))
    return dict(accuracy=accuracy, solution_entropy=entropy.mean().item(), solution_drift=drift.mean().item())

@torch.no_grad()
def opening_logprobs(policy, task, fork: int):
    """Log-probabilities at the right openings, 7+ and 5+ for 75= at fork 2: (B,S,max(fork,1),V) in nats."""
    prompts, tokens, _ = solution_table(task)
    return completion_logprobs(policy, prompts, tokens[..., : max(fork, 1)])

def learning_tax(after, before, task) -> float:
    """KL(after ‖ before) of two opening_logprobs, summed over an opening, mean over openings (Prop. 3.1)."""
    _, tokens, exists = solution_table(task)
    mask = completion_mask(tokens)[..., : after.shape[2]]  # (B,S,fork)
    kl = ((after.exp() * (after - before)).sum(-1) * mask).sum(-1)  # (B,S)
    return ((kl * exists).sum(1) / exists.sum(1)).mean().item()

def samples(policy, task, seed: int) -> str:
    """What the policy says most often to three prompts, of 100 samples each."""
    prompts, generator = random.Random(seed).sample(task.prompts(), 3), named_generator(seed, "samples")
    tokens, lines = sample_groups(policy, prompt_tokens(prompts), 100, 0, task.max_completion, generator), []
    for prompt, rows in zip(prompts, tokens):
        common = Counter(map(decode, rows)).most_common(3)
        said = (f"{n} x {text}" + " (wrong)" * (not task.reward(prompt, text)) for text, n in common)
        lines.append(f"{prompt}  {',  '.join(said)}")
    return "\n".join(lines)

# ---- 11. One training run: (configuration, seed) -> curves, the same bits every time
def train(config: Config, seed: int, **bar) -> dict:
    """Warm start, then `steps` rollouts with an update on each, under a live bar with tqdm's options `bar`.
    Returns "curves", 40 to 80 evaluations, "final", means of their last quarter (one is noisy), "samples"."""
    task, stage = TASKS[config.task], config
    reference, generator = warm_start(task, seed), named_generator(seed, "sampling")
    policy = copy.deepcopy(reference)
    optimizer = adamw(policy, config.lr)
    change = config.steps if config.adapt else 0
    total = config.steps + change // 2
    cadence = max(1, config.steps // 40)  # rollouts between two evaluations
    rows, seen, tax, net_push = [], [], 0.0, 0.0 if config.fork else math.nan
    start, openings = solution_logprobs(reference, task), opening_logprobs(policy, task, config.fork)
    for step in tqdm(range(total + 1), unit=" rollouts", leave=False, dynamic_ncols=True, **bar):
        if change and step == change + 1:  # now the larger operand must come first; all arms train alike
            task, stage = LARGER_FIRST, replace(config, loss="grpo", transform="off", clip_eps=None, fork=0)
            start, openings = solution_logprobs(reference, task), opening_logprobs(policy, task, 0)
        if step > 0:
            rollout = collect(policy, task, stage, generator)
            seen.append(update(policy, reference, optimizer, stage, *rollout))
            require(math.isfinite(seen[-1]["grad_norm"]), f"rollout {step}: the gradient norm is not finite")
            before, openings = openings, opening_logprobs(policy, task, stage.fork)
            tax += learning_tax(openings, before, task)
            net_push += seen[-1]["net_push"]
        if step % cadence == 0 or step in (config.steps, total):
            row = evaluate(policy, task, start) | (means(seen) if seen else {})
            row |= {"learning_tax": tax, "net_push": net_push}
            rows.append({"step": step} | {name: float(f"{value:.6g}") for name, value in row.items()})
            seen = []
    final = means([row for row in rows if row["step"] > 0.75 * total])
    curves = {name: [row.get(name, math.nan) for row in rows] for name in rows[-1]}
    return {"curves": curves, "final": final, "samples": samples(policy, task, seed)}

# ==== 12. Experiments (a reader of the paper may stop here)
ARMS = {"off": "off", "on": "min", "orth": "orth", "mean": "mean", "shrink": "shrink"}  # word: transform
CODE = [Path(__file__).with_name(name).read_bytes() for name in ("tokrl.py", "toy_tasks.py")]
COLOURS = {"off": "#D55E00", "on": "#0072B2", "orth": "#009E73", "mean": "#CC79A7", "shrink": "#56B4E9"}
EXPERIMENTS = {  # name: the question, the arms' words, the settings under which each is trained
    "failure-modes": ("Does the paper's method stop the three failure modes?", "off on orth", [{}]),
    "ablation": ("Is it cancellation, or smaller weights?", "off mean orth shrink on",
                 [{"loss": loss} for loss in ("seq", "gspo")]),
    "control": ("Nothing is shared (fork 0): what helps there?", "off on orth",
                [{"fork": 0}, *({"fork": 0, "duplicates": x} for x in ("once", "share"))]),
    "tasks": ("Does it hold elsewhere? Where does it hurt?", "off on shrink", [{"task": x} for x in TASKS]),
    "frontier": ("Is it only slow learning?", "off on shrink", [{"lr": x} for x in (3e-5, 1e-4, 2e-4, 3e-4)]),
    "losses": ("Which losses break? Is DFPO (on seq) better than gspo?", "off on", [
        *({"loss": x} for x in LOSSES), *({"loss": "gspo", "clip_eps": x} for x in (0.02, 0.1, math.inf))]),
    "sensitivity": ("What does it depend on?", "off on", [{}, {"kl": 0.0}, {"max_grad_norm": 0.15},
                    {"max_grad_norm": math.inf}, *({"inner_steps": x} for x in (1, 2, 4))]),
    "group-size": ("How does the gap grow with the group, at 64 trajectories?", "off on",
                   [{"group_size": g, "prompts": 64 // g} for g in (2, 4, 8, 16)]),
    "adapt": ("What is diversity worth when the verifier changes?", "off on",
              [{"task": "commute", "adapt": True, "kl": kl} for kl in (0.0, 0.02)]),
    "mechanism": ("What do the transforms do to one group?", "", [{"fork": 2, "duplicates": "keep"}])}

def experiment_arms(name: str, given: dict) -> dict[str, Config]:
    """{"on lr=0.0001": Config, ...}: what is given, and what the experiment itself sets."""
    _, words, every = EXPERIMENTS[name]
    own = [key.replace("_", "-") for settings in every for key in settings if key in given]
    require(not own, f"experiment {name} sets --{''.join(own[:1])} itself; leave it out")
    words, arms = ARMS if name == "failure-modes" else words.split(), {}  # there mean and shrink may join
    for settings in every:
        rest = [value if isinstance(value, str) else f"{key}={value:g}" for key, value in settings.items()]
        arms |= {" ".join([w, *rest]): Config(**given, **settings, transform=ARMS[w]) for w in words}
    return arms

def compared(labels):
    """What a table compares: `off` with other words and with `off` under one more setting; all with DFPO."""
    pairs = [("off" + label.removeprefix(label.split()[0]), label) for label in labels]
    pairs += [(a, b) for a in labels for b in labels if a[:3] == "off" and b.startswith(a + " ")]
    pairs += [(f"off {loss}", "on seq") for loss in LOSSES if loss != "seq"]
    return [(a, b) for a, b in pairs if a != b and {a, b} <= set(labels)]

# ---- 13. Many runs, one process per core, kept when finished
def kept_path(out: Path, config: Config, seed: int) -> Path:
    """Where a run is kept: an edit of the code, or another torch, is another place."""
    key = hashlib.sha256(repr((config, seed, torch.__version__, CODE)).encode())
    return out / ".cache" / f"{key.hexdigest()[:24]}.json"

def write_json(path: Path, data):
    """Write, then rename: a reader finds the old file or the new one, never a half. nan becomes null."""
    temporary = path.with_suffix(f".{os.getpid()}")
    plain = json.loads(json.dumps(data), parse_constant={"NaN": None, "Infinity": "inf"}.get)
    temporary.write_text(json.dumps(plain) + "\n")
    temporary.replace(path)

def read_json(path: Path) -> dict:
    """What write_json wrote; {} if there is none, or a damaged one: made again."""
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}

def start_worker(lock):
    """First in a worker: share the bars' lock, and end when the parent does."""
    tqdm.set_lock(lock)
    threading.Thread(target=lambda: os._exit(mp.parent_process().join() or 1), daemon=True).start()

def train_and_keep(label: str, config: Config, seed: int, path: Path) -> str | None:
    """Train and keep one run in a worker, with a bar on its own line, or say what failed."""
    line = mp.current_process()._identity[0]  # 1, 2, ...; the bar of all runs is on line 0
    try:
        write_json(path, train(config, seed, desc=f"{label}, seed {seed}", position=line, disable=None))
    except Exception as error:  # diverged, or memory or disk is full
        return f"{label}, seed {seed}: {(str(error) or repr(error)).splitlines()[0]}"

def train_all(units: list) -> list:
    """train_and_keep the units, side by side; returns what failed."""
    context = mp.get_context("spawn")
    tqdm.set_lock(lock := context.RLock())
    pool = ProcessPoolExecutor(min(os.cpu_count() or 1, len(units)), context, start_worker, (lock,))
    ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: it is for the parent
    messages = pool.map(train_and_keep, *zip(*units))
    signal.signal(signal.SIGINT, ctrl_c)
    try:
        return [message for message in tqdm(messages, "runs", len(units), False, disable=None) if message]
    except BrokenExecutor:
        return ["a worker process died; the same command continues with what is missing"]
    except KeyboardInterrupt:
        for process in mp.active_children():
            process.kill()
        raise

def run_experiment(name: str, given: dict, words: str, seeds, out: Path, command: str) -> list:
    """Train the arms `words`; OUT/NAME.json has every arm whose runs are all kept. Returns what failed."""
    arms, whole, path = experiment_arms(name, given), {}, out / f"{name}.json"
    (out / ".cache").mkdir(parents=True, exist_ok=True)
    if name == "mechanism":
        write_json(path, {"experiment": name, "command": command} | mechanism(Config(**given), seeds[0]))
        return []
    units = [(label, x, seed, kept_path(out, x, seed)) for seed in seeds for label, x in arms.items()]
    wanted = [unit for unit in units if unit[0].split()[0] in words.split()]
    missing = [unit for unit in wanted if not read_json(unit[3])]
    print(f"{name}: {len(missing)} runs to train, {len(wanted) - len(missing)} kept from before", flush=True)
    failed = train_all(missing) if missing else []
    for label, config in arms.items():
        runs = [read_json(kept) for each, *_, kept in units if each == label]
        if all(runs):
            gather = lambda part: {m: [run[part][m] for run in runs] for m in runs[0][part]}
            curves = gather("curves") | {"step": runs[0]["curves"]["step"]}
            whole[label] = dict(config=asdict(config), seeds=seeds, final=gather("final"), curves=curves,
                                samples=runs[0]["samples"])
    setting, old = f"{[*arms.values()][0]}, seeds {seeds}", read_json(path)
    if whole and old and (old.get("setting") != setting or old["arms"].keys() - whole):
        print(f"{name}: replaces the result of: {old.get('command')}")
    if whole:
        write_json(path, {"experiment": name, "command": command, "setting": setting, "arms": whole})
    return failed

def mechanism(config: Config, seed: int) -> dict:
    """The group of a first rollout that breaks Eq. 2 most, and its weights after the inner steps."""
    task, start = TASKS[config.task], warm_start(TASKS[config.task], seed)
    policy = copy.deepcopy(start)
    prompts, tokens, rewards = collect(policy, task, config, named_generator(seed, "sampling"))
    update(policy, start, adamw(policy, config.lr), config, prompts, tokens, rewards)
    logprobs, old_logprobs = (token_logprobs(each, prompts, tokens) for each in (policy, start))
    A, mask = group_advantages(rewards), completion_mask(tokens)
    w = effective_weights(config.loss, logprobs, old_logprobs, A, mask, config.clip_eps)
    worst = cancellation_residual(w, A)[:, 0].argmax()
    weights = {word: transform_weights(w, A, mask, kind)[worst, :, 0].tolist() for word, kind in ARMS.items()}
    return {"prompt": decode(prompts[worst]), "completions": [decode(row) for row in tokens[worst]],
            "advantages": A[worst].tolist(), "weights": weights}

# ---- 14. Tables, figures and the page of results, from JSON alone
MEASURES = {"net_push": "ineffective: net push\n(lower is better)",
            "learning_tax": "learning tax, nats\n(lower is better)",
            "solution_drift": "solution drift, nats\n(lower is better)",
            "solution_entropy": "solution entropy\n(1 even, 0 collapsed)",
            "accuracy": "accuracy\n(higher is better)", "residual": "residual"}

@functools.cache
def t_draws(n: int):
    """A million draws of |t|, n − 1 degrees of freedom: numpy has no quantile."""
    return np.abs(np.random.default_rng(0).standard_t(n - 1, 1_000_000))

def t_interval(values):
    """A value per seed, (S,) -> mean; low and high of its 95% t interval; two-sided p of a mean of 0."""
    mean, n = np.mean(values), len(values)
    if n < 2 or math.isnan(mean):
        return mean, math.nan, math.nan, math.nan
    spread = t_draws(n) * np.std(values, ddof=1) / math.sqrt(n)
    half, p = np.quantile(spread, 0.95), (np.sum(spread >= abs(mean)) + 1) / (len(spread) + 1)
    return mean, mean - half, mean + half, p

def holm(p_values, level: float = 0.05):
    """Which of a family of comparisons survive Holm's correction: (M,) -> (M,) bool; nan is no comparison."""
    p = np.array(p_values, dtype=float)
    order, survive = np.argsort(p)[: np.sum(p == p)], np.zeros(len(p), dtype=bool)  # nan comes last
    survive[order] = np.cumprod(p[order] <= level / np.arange(len(order), 0, -1))
    return survive

def table(arms: dict) -> str:
    """Arms: last quarter of training, mean ± standard deviation over seeds. Pairs: difference by seed, 95% t
    interval, * where it survives Holm's correction over its column; last, the geometric mean of ratios."""
    data = {label: {m: np.array(arm["final"][m], float) for m in MEASURES} for label, arm in arms.items()}
    many = all(len(x["accuracy"]) > 1 for x in data.values())
    pairs = compared(arms) if many else []
    columns = [[f"arm; {len(pairs)} pairs" if pairs else "arm", *arms, *(f"{a} - {b}" for a, b in pairs)]]
    for m, title in MEASURES.items():
        f = ".3f" if m == "residual" else ".2f"
        cells = [f"{x[m].mean():{f}}" + (f" ± {x[m].std(ddof=1):{f}}" if many else "") for x in data.values()]
        found = [t_interval(np.round(data[a][m] - data[b][m], 5)) for a, b in pairs]
        for (mean, low, high, _), survives in zip(found, holm([p for *_, p in found])):
            cells.append(f"{mean:+{f}} [{low:+{f}}, {high:+{f}}]" + ("*" if survives else ""))
        columns.append([title.split("\n")[0], *cells])
    if pairs:
        logs = [np.log(data[a]["solution_drift"] / data[b]["solution_drift"]) for a, b in pairs]
        ratios = ("{:.2f} [{:.2f}, {:.2f}]".format(*np.exp(t_interval(x)[:3])) for x in logs)
        columns.append(["ratio of drifts", *[""] * len(arms), *ratios])
    columns = [["–" if "nan" in cell else cell for cell in column] for column in columns]
    lines = [*zip(*([cell.ljust(max(map(len, column))) for cell in column] for column in columns))]
    lines.insert(1, ["-" * len(cell) for cell in lines[0]])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

def draw_curves(figure, arms):
    """The three failure modes over training, and accuracy: mean over seeds, band from lowest to highest."""
    *panels, corner = figure.subplots(2, 3).flat
    for axes, measure in zip(panels, MEASURES):
        for word, arm in arms.items():
            steps, rows = arm["curves"]["step"], np.array(arm["curves"][measure], float)
            axes.plot(steps, rows.mean(0), color=COLOURS[word], label=f"{word}: {TRANSFORMS[ARMS[word]]}")
            axes.fill_between(steps, rows.min(0), rows.max(0), color=COLOURS[word], alpha=0.2, lw=0)
        axes.set(title=MEASURES[measure], xlabel="rollouts", ylim=(-0.02 * axes.get_ylim()[1], None))
    corner.legend(*panels[0].get_legend_handles_labels(), loc="center", title="mean over seeds, and range")
    corner.axis("off")

def draw_dots(figure, arms):
    """A row per arm: each seed as a faint dot, the mean with its 95% t interval."""
    figure.set_size_inches(9, 1.4 + 0.27 * len(arms))
    explain = lambda label: f"{label}: {TRANSFORMS[ARMS[label.split()[0]]]}" if "mean seq" in arms else label
    for axes, measure in zip(figure.subplots(1, 4, sharey=True), [*MEASURES][1:5]):
        for y, (label, arm) in enumerate(arms.items()):
            values, colour = np.array(arm["final"][measure], float), COLOURS[label.split()[0]]
            mean, low, high, _ = t_interval(values)
            axes.plot(values, [y] * len(values), "o", color=colour, alpha=0.25, ms=4, mew=0)
            axes.plot([low, mean, high], [y] * 3, "-o", color=colour, markevery=[1])
        axes.set(title=MEASURES[measure], yticks=range(len(arms)), yticklabels=map(explain, arms))
        axes.grid(axis="x", color="0.9")
    axes.invert_yaxis()

def draw_mechanism(figure, result):
    """A row per trajectory with its advantage; under each transform its weight and its push Â w."""
    A, panels = np.array(result["advantages"]), figure.subplots(1, len(ARMS), sharex=True, sharey=True)
    for axes, (word, w) in zip(panels, result["weights"].items()):
        axes.barh(range(len(A)), w, color=COLOURS[word], alpha=0.35)
        axes.barh(range(len(A)), A * w, height=0.3, color=COLOURS[word])
        axes.set(title=f"{word}\nmean push {np.mean(A * w):+.3f}", yticks=range(len(A)))
    panels[0].set_yticklabels([f"{text}   Â {a:+.2f}" for text, a in zip(result["completions"], A)])
    figure.suptitle(f"Prompt {result['prompt']}, first token: weights w (light) and pushes Â w (dark)")

def write_page(out: Path) -> dict:
    """Draw every result in OUT and write OUT/README.md; returns {experiment: its part of it}."""
    import matplotlib.figure  # it is slow to start
    matplotlib.rcParams.update({"axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False})
    draw, parts = {"failure-modes": draw_curves, "mechanism": draw_mechanism}, {}
    for name in (name for name in EXPERIMENTS if (out / f"{name}.json").exists()):
        figure = matplotlib.figure.Figure(figsize=(9, 5), dpi=150, layout="constrained")
        try:
            result = json.loads((out / f"{name}.json").read_text())
            arms = result.get("arms", {})
            draw.get(name, draw_dots)(figure, arms or result)
            lines = [f"## {name}", EXPERIMENTS[name][0], f"`{result['command']}`", f"![{name}]({name}.png)"]
            lines += [table(arms)] if arms else []
            lines += [f"{x}, 100 samples:\n```\n{arms[x]['samples']}\n```" for x in arms if name in draw]
        except Exception as error:
            raise ValueError(f"{out / name}.json is no result of tokrl, delete it: {error!r}") from error
        figure.savefig(out / f"{name}.png")
        parts[name] = "\n\n".join(lines)
    require(parts, f"no results in {out}")
    text = "\n\n".join(["# Results", " ".join(table.__doc__.split()), *parts.values()])
    (out / "README.md").write_text(text + "\n", encoding="utf-8")
    return parts

# ---- 15. Command line
def seed_range(text: str) -> list[int]:
    """'3' -> [3]; '0-7' -> [0, ..., 7]."""
    first, _, last = (text if "-" in text else f"{text}-{text}").partition("-")
    fine = first.isdecimal() and last.isdecimal() and int(first) <= int(last)
    require(fine, f"seeds must be N, or A-B with A <= B; got {text!r}")
    return list(range(int(first), int(last) + 1))

def parse(argv: list[str]) -> dict:
    """The options that are given. ValueError names a bad one."""
    parser = ArgumentParser("tokrl.py", description=__doc__.splitlines()[0], argument_default=SUPPRESS)
    parser.error = lambda message: require(False, f"{message}; --help lists every option")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--transform", choices=(*ARMS, "min", "both"), help="of the weights (both: off, on)")
    what.add_argument("--experiment", choices=EXPERIMENTS, help="a comparison; it sets some options")
    what.add_argument("--plot", action="store_true", help="only draw the results in --out again")
    for f in (f for f in fields(Config) if f.name not in ("transform", "adapt")):
        valid, default = f.metadata["valid"], "" if f.default is None else f" (default {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, help=f.metadata["help"] + default,
                            choices=valid if isinstance(valid, tuple) else None)
    parser.add_argument("--seeds", help="N or A-B (default 0)")
    parser.add_argument("--out", type=Path, help="folder for results (default runs)")
    return vars(parser.parse_args(argv))

def main(argv: list[str] | None = None) -> int:
    """Returns the status: 0, 1 where a run failed, 2 with one line for bad input, 130 after Ctrl-C."""
    argv, failed = sys.argv[1:] if argv is None else argv, []
    try:
        given = parse(argv)
        out, plot = given.pop("out", Path("runs")), given.pop("plot", False)
        require(not (plot and given), "--plot draws all of --out; leave out the rest")
        seeds, word = seed_range(given.pop("seeds", "0")), given.pop("transform", "both")
        name = given.pop("experiment", "")
        words = EXPERIMENTS[name][1] if name else {"both": "off on", "min": "on"}.get(word, word)
        name = name or "failure-modes"
        page = out / "README.md"
        require(not page.exists() or page.read_bytes()[:9] == b"# Results", f"--out: {page} is not tokrl's")
        if not plot:
            failed = run_experiment(name, given, words, seeds, out, shlex.join(["python", "tokrl.py", *argv]))
            require(not failed or any(out.glob("*.json")), "\ntokrl.py: ".join(failed))
            sys.stderr.writelines(f"tokrl.py: {message}\n" for message in failed)
        print(*(y for x, y in write_page(out).items() if plot or x == name), f"Results: {page}", sep="\n\n")
    except (ValueError, OSError) as error:
        print(f"tokrl.py: {error}", file=sys.stderr)
        return 1 if failed else 2
    except KeyboardInterrupt:
        print("\nStopped. The same command continues with what is missing.", file=sys.stderr)
        return 130
    return 1 if failed else 0

if __name__ == "__main__":
    sys.exit(main())
