"""tokrl: which tokens of a group cancel, and what happens when they do not. One paper in one file.

Paper: F. Ding, Y. Zhang, Y. Wang, Z. Zeng, "Design Conditions for Intra-Group Learning of Sequence-Level Rewards: Token
Gradient Cancellation", arXiv:2604.13088v1. Equation numbers are "as in v1"; we worked from its abstract and from
summaries, not from the full text.

The words. A *policy* is a network that gives the next token's probabilities. From one *prompt* it samples a *group* of
G *completions* (each with its prompt: a trajectory). A verifier gives each a *reward*, 1 or 0, at its end; its
*advantage* is its reward minus the group's mean, over the group's standard deviation. A *rollout* is B such groups, on
which we take a few gradient steps. After the first the policy is no longer the one that sampled ("off-policy"), so
every token has an importance *ratio*, its probability now over its probability then; most losses *clip* it.

The claim. A token that the whole group shares cannot explain why one completion was right and another wrong, so its
pushes, advantage times weight, should cancel over the group (Eq. 2). Sequence-level weights differ from trajectory to
trajectory, so they do not: each step moves the shared token for no reason (Prop. 3.1, "learning tax"), equally right
solutions drift apart (Cor. 3.2), and in the end one is left (entropy collapse). Making the weights alike (Min-Replace,
Eq. 17) or orthogonal to the advantages (Adv-Orthogonal, Eq. 18) restores the cancellation: chapters 5 to 7.

Where this program departs from the paper:
 1. A policy of 0.1 million parameters on toy arithmetic that can be enumerated, so that every measure is exact.
 2. A group shares its first `fork` tokens by construction (chapter 3). In a language model they are shared because they
    are nearly certain; in a toy such tokens would have no gradient to look at.
 3. The transforms act position by position, over the trajectories that have not ended there.
 4. The baseline is GSPO as people run it, clipped. The paper's own method, DFPO, is transformed weights without a clip:
    `on` with --clip-eps inf (mean of the log-ratios) or --loss seq (their sum); our sources leave open which.
 5. A small KL penalty pulls towards the warm-started policy; --kl 0 turns it off.
 6. Only w differs between the losses. All share the advantages of chapter 4 (Dr. GRPO has no division by the standard
    deviation), one symmetric clip (DAPO's is asymmetric) and a limit on the gradient's norm.

    paper                 function                                                  test
    objective, Eq. 2      effective_weights, policy_loss, cancellation_residual     test_eq2
    section 4, Cor. 3.3   effective_weights (loss "seq")                            test_section4, test_cor33
    Prop. 3.1             learning_tax                                              test_prop31
    Cor. 3.2              evaluate                                                  test_cor32
    Eqs. 17, 18           transform_weights                                         test_eq17_and_eq18
"""

import argparse, contextlib, copy, functools, hashlib, json, math, multiprocessing, os, random, shlex, signal, sys
import threading, time, zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm  # matplotlib is imported where a figure is drawn

from toy_tasks import EOS, LARGER_FIRST, PAD, TASKS, VOCAB, Task, decode, encode

LOSSES = ("reinforce", "grpo", "dr_grpo", "dapo", "grpo_sym", "cispo", "gspo", "seq")
TRANSFORMS = ("off", "min", "orth")  # "on" is a word of the command line and means "min"

# ---- 1. Configuration -----------------------------------------------------------------------------------------------

def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)

def default_clip_eps(loss: str) -> float | None:
    """GSPO's ratio, a geometric mean over tokens, stays closer to 1 than a single token's; two losses have no clip."""
    return {"gspo": 0.04, "reinforce": None, "seq": None}.get(loss, 0.2)

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
        own = {"fork": TASKS[self.task].fork, "clip_eps": default_clip_eps(self.loss)}
        require(own["clip_eps"] or self.clip_eps is None, f"clip-eps does not apply to {self.loss}, which has no clip")
        for name, value in own.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # the one write to a frozen field
        for name, low in dict(fork=0, group_size=2, prompts=1, inner_steps=1, steps=1, adapt=0).items():
            value, flag = getattr(self, name), name.replace("_", "-")
            require(type(value) is int and value >= low, f"{flag} must be a whole number, at least {low}; got {value}")
        longest = TASKS[self.task].max_completion
        require(self.fork < longest, f"fork must be below {longest}, the longest {self.task} text; got {self.fork}")
        require(0 < self.lr < math.inf, f"lr must be positive and finite; got {self.lr}")
        require(0 <= self.kl < math.inf, f"kl must be at least 0 and finite; got {self.kl}")
        require(self.clip_eps is None or self.clip_eps > 0, f"clip-eps must be positive or inf; got {self.clip_eps}")

# ---- 2. The policy, a small causal transformer, and the log-probabilities it gives to completions -------------------

class Block(nn.Module):
    """Attention and a two-layer perceptron, each added to the stream after a layer norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x, past=None):
        """x (N,T,D) -> (N,T,D) and this block's keys and values, `past` ones included, each (N,H,past+T,D/H)."""
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)  # (N,H,T,D/H)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        up = self.up(self.norm2(x))
        return x + self.down(F.relu(up) * up), (k, v)  # ReLU² learns the warm start's task, ReLU hardly

class Policy(nn.Module):
    """A decoder-only transformer over toy_tasks.VOCAB: 2 layers, width 64, 2 heads, about 0.1 million parameters."""

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
        Raises ValueError for another shape or dtype, or for more tokens than the context holds.
        """
        require(tokens.dim() == 2 and tokens.dtype == torch.int64,
                f"tokens must be int64 of shape (N,T); got {tokens.dtype} {tuple(tokens.shape)}")
        past, new, context = cache[0][0].shape[2] if cache else 0, tokens.shape[1], self.position.num_embeddings
        require(past + new <= context, f"{past + new} tokens exceed the policy's context of {context}")
        require(not past or new == 1, f"with a filled cache pass one token at a time; got {new}")
        x = self.token(tokens) + self.position.weight[past : past + new]
        for i, block in enumerate(self.blocks):
            x, keys_values = block(x, cache[i] if past else None)
            if cache is not None:
                cache[i] = keys_values
        return self.head(self.norm(x))

def completion_logprobs(policy, prompts, tokens):
    """Log-probabilities of every possible token at every place: prompts (B,P), tokens (B,G,T) -> (B,G,T,V) in nats."""
    require(tokens.dim() == 3 and prompts.dim() == 2 and len(prompts) == len(tokens),
            f"need prompts (B,P) and tokens (B,G,T); got {tuple(prompts.shape)} and {tuple(tokens.shape)}")
    b, g, t = tokens.shape
    rows = torch.cat([prompts[:, None].expand(b, g, -1), tokens[..., :-1]], dim=-1).flatten(0, 1)  # (BG, P+T-1)
    return policy(rows)[:, prompts.shape[1] - 1 :].log_softmax(-1).view(b, g, t, -1)

def token_logprobs(policy, prompts, tokens):
    """Log-probabilities of the completions' own tokens: prompts (B,P), tokens (B,G,T) -> (B,G,T) in nats.

    No temperature, no top-k: what is scored is the distribution that is sampled. Raises ValueError for other shapes.
    """
    return completion_logprobs(policy, prompts, tokens).gather(-1, tokens[..., None]).squeeze(-1)

# ---- 3. Sampling groups that share an opening -----------------------------------------------------------------------

def completion_mask(tokens):
    """True up to and including the first EOS (which is scored and trained), then False: (...,T) -> (...,T) bool."""
    is_eos = tokens == EOS
    return is_eos.cumsum(-1) - is_eos.long() == 0

@torch.no_grad()
def sample_groups(policy, prompts, group_size, fork, max_completion, generator):
    """Sample `group_size` completions of each prompt; the first `fork` tokens are sampled once for the whole group.

    Until the fork a group is a single row; from there G rows go on from copies of that row's keys and values.
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
    rewards teaches nothing and gets exactly 0, not rounding dust. Raises ValueError for a wrong shape or dtype.
    """
    require(rewards.dim() == 2 and rewards.shape[1] >= 2, f"rewards must be (B,G), G >= 2; got {tuple(rewards.shape)}")
    require(rewards.is_floating_point(), f"rewards must be of a floating-point dtype; got {rewards.dtype}")
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if normalize:
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-4)
    all_equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return advantages.masked_fill(all_equal, 0.0)

def checked_mask(advantages, mask, **tensors):
    """The mask as bool. Raises ValueError naming the tensor that is not (B,G,T), or (B,G) for advantages."""
    require(mask.dim() == 3, f"mask must be (B,G,T); got {tuple(mask.shape)}")
    require(mask.dtype == torch.bool or bool(((mask == 0) | (mask == 1)).all()), "mask must hold only 0 and 1")
    require(advantages.shape == mask.shape[:2],
            f"advantages must be {tuple(mask.shape[:2])} for this mask; got {tuple(advantages.shape)}")
    for name, tensor in tensors.items():
        require(tensor.shape == mask.shape, f"{name} must be {tuple(mask.shape)} like mask; got {tuple(tensor.shape)}")
        require(tensor.is_floating_point(), f"{name} must be of a floating-point dtype; got {tensor.dtype}")
    return mask.bool()

# ---- 5. Effective weights: every published loss is one line ---------------------------------------------------------
#
# The gradient of each loss with respect to the log-probability of token t of trajectory i is −(1/BG) Â_i w_{i,t}. The
# effective weight w_{i,t} gathers the importance ratio, the clip and the length normalisation, and is all that differs.
# At a token that the group shares, log π is one and the same number for all i, so its push is ∝ Σ_i Â_i w_{i,t}: it
# cancels (Eq. 2) where that sum is 0, which equal weights guarantee because Σ_i Â_i = 0.
# Sources: grpo arXiv:2402.03300, dr_grpo 2503.20783, dapo 2503.14476, cispo 2506.13585, gspo 2507.18071; reinforce,
# Williams 1992 with the group's mean as baseline; grpo_sym ("GRPO-fix") and seq, the paper's section 4.

def effective_weights(loss, logprobs, old_logprobs, advantages, mask, clip_eps=None, max_length=None):
    """The weight w_{i,t} of every token under `loss`, one of LOSSES: exactly 0 off the mask, and without gradient.

    logprobs, old_logprobs (B,G,T) in nats, advantages (B,G), mask (B,G,T) bool or 0/1 in any pattern -> (B,G,T).
    clip_eps: a number, or (low, high); inf means no clip; None means 0.04 for gspo, 0.2 for the others that clip.
    max_length: the constant length L of reinforce, dr_grpo, grpo_sym and seq; None means T.
    Raises ValueError naming an unknown loss, a wrong shape or dtype, or a clip_eps or max_length out of range.
    """
    require(loss in LOSSES, f"loss must be one of {', '.join(LOSSES)}; got {loss!r}")
    mask = checked_mask(advantages, mask, logprobs=logprobs, old_logprobs=old_logprobs)
    eps = clip_eps if clip_eps is not None else default_clip_eps(loss) or math.inf
    low, high = eps if isinstance(eps, (tuple, list)) and len(eps) == 2 else (eps, eps)
    require(all(isinstance(x, (int, float)) and x > 0 for x in (low, high)),
            f"clip_eps must be a positive number or a pair (low, high) of them; got {clip_eps!r}")
    require(max_length is None or isinstance(max_length, (int, float)) and max_length >= 1,
            f"max_length must be at least 1; got {max_length}")

    log_r = (logprobs - old_logprobs).detach().masked_fill(~mask, 0.0)  # (B,G,T)
    r = log_r.exp()  # the token's importance ratio
    log_R = log_r.sum(dim=-1, keepdim=True)  # (B,G,1) the whole completion's
    largest = 0.8 * math.log(torch.finfo(r.dtype).max)  # 71 in float32: past any real ratio, and safe to sum afterwards
    A = advantages[..., None]  # (B,G,1); only its sign matters here
    n = mask.sum(dim=-1, keepdim=True).clamp(min=1)  # (B,G,1) scored tokens of each trajectory
    L = mask.shape[-1] if max_length is None else max_length
    BG, M = mask.shape[0] * mask.shape[1], mask.sum().clamp(min=1)  # trajectories and scored tokens in the batch

    def clipped(x):
        """The PPO clip: 0 where the ratio has already moved past the clip in the direction that Â asks for."""
        return x.masked_fill((A > 0) & (x > 1 + high) | (A < 0) & (x < 1 - low), 0.0)

    match loss:                                                      # at a token shared by all:
        case "reinforce": w = torch.ones_like(r) / L                 # cancels: w is one constant
        case "grpo":      w = clipped(r) / n                         # broken by 1/n, and where a clip bites
        case "dr_grpo":   w = clipped(r) / L                         # broken where a clip bites: it looks at Â's sign
        case "dapo":      w = clipped(r) * BG / M                    # broken where a clip bites
        case "grpo_sym":  w = r.masked_fill((r < 1 - low) | (r > 1 + high), 0.0) / L  # cancels: the clip ignores Â
        case "cispo":     w = r.clamp(max=1 + high) * BG / M         # cancels
        case "gspo":      w = clipped((log_R / n).exp()) / n         # broken: ratio, clip and n differ by trajectory
        case "seq":       w = log_R.clamp(max=largest).exp() / L     # broken by the other tokens' ratios (section 4)
    return w.expand_as(r).masked_fill(~mask, 0.0)

# ---- 6. Transforms: make the weights cancel at shared tokens --------------------------------------------------------

def transform_weights(weights, advantages, mask, kind):
    """Change w along the group, position by position, over the trajectories still scored ("alive") at that position.

        off    w̃_i = w_i
        min    w̃_i = min_j w_j                  Min-Replace (Eq. 17): equal weights, and Σ_i Â_i = 0
        orth   w̃ = w − (Âᵀw / ‖Â‖²) Â           Adv-Orthogonal (Eq. 18): Âᵀw̃ = 0 by construction

    weights (B,G,T), advantages (B,G), mask (B,G,T) bool or 0/1 -> (B,G,T), exactly 0 off the mask. Where ‖Â‖ = 0 over
    the alive, orth returns w. A lone survivor keeps its weight under min and gets 0 under orth. Both are meant for
    weights without gradient: with one, the transform itself couples the trajectories again. Two consequences:
    - the min of *clipped* weights is 0 as soon as one trajectory is clipped, so Min-Replace on gspo also stops the
      whole group (a trust region: no step once the policy has moved too far), which needs no shared token to act;
    - at the first inner step ("on-policy") and with equal lengths all weights are equal, and off, min and orth
      (Âᵀ1 = 0) are the same.
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
    """−(1/BG) Σ_{i,t} Â_i sg[w̃_{i,t}] log π(a_{i,t} | h_{i,t}): a scalar with the gradient of `loss` and `transform`.

    sg: stop-gradient; h: the prompt and the text so far. The gradient is the point, not the value, which is not the
    published objective's. A trajectory whose mask is all zero adds nothing and still counts in BG. Shapes, units and
    errors as in effective_weights and transform_weights.
    """
    weights = effective_weights(loss, logprobs, old_logprobs, advantages, mask, clip_eps, max_length)
    weights = transform_weights(weights, advantages, mask, transform)
    scored = logprobs.masked_fill(weights == 0, 0.0)  # a log-probability of −inf off the mask must not give 0 · inf
    return -(advantages[..., None] * weights * scored).sum() / advantages.numel()

def cancellation_residual(weights, advantages):
    """|Σ_i Â_i w_{i,t}| / G, the size of Eq. 2's left side: weights (B,G,T), advantages (B,G) -> (B,T)."""
    require(weights.dim() == 3 and weights.shape[:2] == advantages.shape,
            f"need weights (B,G,T) and advantages (B,G); got {tuple(weights.shape)} and {tuple(advantages.shape)}")
    return (advantages[..., None] * weights).mean(dim=1).abs()

def relative_residual(weights, advantages) -> float:
    """Mean over groups and positions of |Σ_i Â_i w_i| / Σ_i |Â_i w_i|: from 0 (all cancels, or nothing pushes) to 1."""
    total = (advantages[..., None] * weights).abs().mean(dim=1)  # (B,T)
    return (cancellation_residual(weights, advantages) / total.masked_fill(total == 0, 1.0)).mean().item()

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
    """AdamW without decay: nothing but the loss and the KL should move the policy."""
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

def collect(policy, task: Task, config: Config, generator):
    """A rollout: B prompts are drawn, a group is sampled for each, and the verifier judges every completion.

    Returns prompts (B,P), tokens (B,G,T), old_logprobs (B,G,T) in nats, mask (B,G,T), rewards (B,G) of 0 or 1.
    """
    texts = task.prompts()
    chosen = torch.randint(len(texts), (config.prompts,), generator=generator).tolist()
    prompts = prompt_tokens([texts[i] for i in chosen])
    sample = sample_groups(policy, prompts, config.group_size, config.fork, task.max_completion, generator)
    rewards = [[task.reward(texts[i], decode(row)) for row in group] for i, group in zip(chosen, sample[0].tolist())]
    return prompts, *sample, torch.tensor(rewards)

def update(policy, reference, optimizer, config: Config, prompts, tokens, old_logprobs, mask, rewards) -> dict:
    """`inner_steps` full-batch gradient steps on one rollout; returns means over them (token entropy: of the first).

    Raises FloatingPointError naming the inner step and a quantity that is not finite, or a first ratio that is not 1.
    """
    advantages, lengths = group_advantages(rewards), mask.sum(-1)
    seen = defaultdict(list, reward=[rewards.mean().item()], tokens=[lengths.sum().item()])
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
        if inner == 1:
            log_ratio = ((logprobs - old_logprobs) * mask).abs().max().item()
            if log_ratio > 1e-4:  # sampler and scorer are the same policy: rounding leaves about 1e-5
                raise FloatingPointError(f"inner step 1: a log-ratio is {log_ratio:.1e} instead of 0")
            seen["token_entropy"].append(-((every.exp() * every).sum(-1) * mask).sum().item() / mask.sum().item())
        seen["kl"].append(kl.item())
        seen["grad_norm"].append(grad_norm.item())
        if config.fork:
            weights = effective_weights(config.loss, logprobs, old_logprobs, advantages, mask, config.clip_eps)
            weights = transform_weights(weights, advantages, mask, config.transform)[..., : config.fork]
            seen["residual"].append(relative_residual(weights, advantages))
        optimizer.step()
    return {name: sum(values) / len(values) for name, values in seen.items()}

# ---- 10. Exact measures, over every prompt and every right completion -----------------------------------------------

MEASURES = {"accuracy": "accuracy", "solution_entropy": "solution entropy", "solution_drift": "solution drift (nats)",
            "learning_tax": "learning tax (nats)", "residual": "residual", "reward": "sampled reward"}  # name: title
DIAGNOSTICS = ("token_entropy", "kl", "grad_norm")  # logged beside them

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
    """log π(y|x) of every right completion y with its EOS: (B,S) in nats, −inf where a prompt has fewer than S."""
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
        measures["solution_entropy"] = (-(q.exp() * q).sum(1) / n.to(q).log()).mean().item()
        if start is not None:
            moved = (logp - solution_logprobs(start, task)[several]).masked_fill(~exists, 0.0)
            both = exists[:, :, None] & exists[:, None, :]  # (B,S,S): ordered pairs; a solution with itself adds 0
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
    prompts, openings = rows[:, : prompts.shape[1]], rows[:, None, prompts.shape[1] :]
    share = torch.zeros(len(rows)).index_add(0, index, share)[:, None, None]
    return prompts, openings, share * completion_mask(openings)

@torch.no_grad()
def opening_logprobs(policy, task: Task, fork: int):
    """What the policy would do at every place of every opening: (N,1,K,V) in nats."""
    return completion_logprobs(policy, *opening_table(task, fork)[:2])

def learning_tax(after, before, share) -> float:
    """One rollout's tax: KL(π_after ‖ π_before) in nats, summed over an opening, averaged over openings (Prop. 3.1)."""
    return (((after.exp() * (after - before)).sum(-1)) * share).sum().item()

# ---- 11. One training run: (configuration, seed) -> curves, the same bits every time --------------------------------

@contextlib.contextmanager
def stopwatch(seconds: Counter, phase: str):
    """Add the time that the block takes to seconds[phase]."""
    began = time.perf_counter()
    yield
    seconds[phase] += time.perf_counter() - began

def train(config: Config, seed: int, report=lambda row: None) -> dict:
    """Warm start, then `steps` rollouts with an update on each; 40 to 80 evaluations, each passed to `report`.

    Returns {"curves", "final", "examples", "samples", "timing"}, ready for JSON. Raises FloatingPointError naming the
    rollout and the quantity where training diverges.
    """
    torch.set_num_threads(1)  # parallelism is one process per run: faster here, and the same bits with any core count
    task, timing, generator = TASKS[config.task], Counter(), named_generator(seed, "sampling")
    with stopwatch(timing, "warm start"):
        reference = warm_start(task, seed)
    policy, total, tax, rows, seen = copy.deepcopy(reference), config.steps + config.adapt, 0.0, [], []
    optimizer, before = adamw(policy, config.lr), opening_logprobs(policy, task, config.fork)
    for step in range(total + 1):
        if step == config.steps + 1:  # the `adapt` experiment: now a stricter verifier, and one loss for all arms
            task, config = LARGER_FIRST, replace(config, loss="grpo", transform="off", clip_eps=None, fork=0)
            before = opening_logprobs(policy, task, config.fork)
        try:
            if step:
                with stopwatch(timing, "sampling"):
                    rollout = collect(policy, task, config, generator)
                with stopwatch(timing, "update"):
                    seen.append(update(policy, reference, optimizer, config, *rollout))
                timing["tokens sampled"] += seen[-1]["tokens"]
                timing["tokens trained"] += seen[-1]["tokens"] * config.inner_steps
            with stopwatch(timing, "exact measures"):
                after = opening_logprobs(policy, task, config.fork)
                tax += learning_tax(after, before, opening_table(task, config.fork)[2])
                before = after
                if not math.isfinite(tax):
                    raise FloatingPointError(f"after the update: the learning tax is {tax}")
                if step % max(1, config.steps // 40) == 0 or step in (config.steps, total):
                    means = {k: sum(one[k] for one in seen) / len(seen) for k in (seen[0] if seen else ())}
                    rows.append({"step": step, **evaluate(policy, task, reference), "learning_tax": tax, **means})
                    seen = []
                    report(rows[-1])
        except FloatingPointError as error:
            raise FloatingPointError(f"rollout {step}, {error}") from None
    return summary(rows, policy, reference, task, seed) | {"timing": dict(timing)}

def summary(rows: list[dict], policy, reference, task: Task, seed: int) -> dict:
    """Curves and their "final" values, six digits each; how two prompts' solutions fared; three samples.

    A final value is the mean over the evaluations of the last quarter of training: a single one is noisy.
    """
    six_digits, final = lambda value: None if value is None else float(f"{value:.6g}"), {}
    curves = {"step": [row["step"] for row in rows]}
    for name in (*MEASURES, *DIAGNOSTICS):
        curves[name] = [six_digits(row.get(name)) for row in rows]
        last = [v for v, row in zip(curves[name], rows) if row["step"] > 0.75 * rows[-1]["step"] and v is not None]
        final[name] = six_digits(sum(last) / len(last)) if last else None
    texts, then, now = task.prompts(), solution_logprobs(reference, task).exp(), solution_logprobs(policy, task).exp()
    asked = (len(texts) // 3, 2 * len(texts) // 3, 0)  # the places of three prompts
    examples = [[f"{texts[i]} {y}", then[i, j].item(), now[i, j].item()]
                for i in asked[:2] for j, y in enumerate(task.solutions(texts[i])[:2])]
    prompts, generator = prompt_tokens([texts[i] for i in asked]), named_generator(seed, "evaluation")
    tokens = sample_groups(policy, prompts, 1, 0, task.max_completion, generator)[0]
    judged = [(texts[i], text, task.reward(texts[i], text)) for i, text in zip(asked, map(decode, tokens[:, 0]))]
    samples = [f"{prompt} {text} ({'right' if reward else 'wrong'})" for prompt, text, reward in judged]
    return {"curves": curves, "final": final, "examples": examples, "samples": samples}

# =====================================================================================================================
# A reader of the paper may stop here. What follows trains many runs side by side, keeps what is finished, and draws.

# ---- 12. Many runs, in processes ------------------------------------------------------------------------------------

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# glibc hands freed memory back to the system at every step and asks for it again; keeping it is a tenth faster
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "1000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000",
               "MALLOC_TOP_PAD_": "67108864"}

def worker(connection) -> None:
    """Train the (config, seed) pairs that the parent sends, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    end_with_parent = lambda: (multiprocessing.parent_process().join(), os._exit(1))
    threading.Thread(target=end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            config, seed = connection.recv()
            try:
                connection.send(("done", train(config, seed, lambda row: connection.send(("row", row)))))
            except FloatingPointError as error:
                connection.send(("diverged", str(error)))
            except RuntimeError as error:  # torch's word for too little memory
                connection.send(("failed", str(error).splitlines()[0]))

def start_worker(context):
    """Our end of the pipe to a new worker, and its process."""
    os.environ.update(KEEP_MEMORY | os.environ)  # inherited
    ours, theirs = context.Pipe()
    process = context.Process(target=worker, args=(theirs,), daemon=True)
    ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by a worker that still imports (not on Windows)
    process.start()
    signal.signal(signal.SIGINT, ctrl_c)
    theirs.close()  # so that a dead worker reads as the end of the file
    return ours, process

def show_progress(name: str, bar: tqdm, row: dict) -> None:
    """Put one evaluation on its run's live bar; where there is no terminal, print a line per 50 rollouts."""
    shown = [k for k in ("accuracy", "solution_entropy", "residual") if row.get(k) is not None]
    text = ", ".join(f"{MEASURES[k]} {row[k]:.2f}" for k in shown)
    if bar.disable and (row["step"] // 50 > bar.n // 50 or row["step"] in (0, bar.total)):
        print(f"{name}: rollout {row['step']}/{bar.total}, {text}", file=sys.stderr, flush=True)
    if row["step"] == 0:
        bar.unpause()  # the clock and the rate start after the warm start
    bar.n = row["step"]
    bar.set_postfix_str(text)

def train_all(units: list, save) -> list[str]:
    """Train every (label, config, seed), one process per core, and save(label, seed, run) each as it finishes.

    Returns a message for each run that diverged or whose process died; the others finish.
    """
    context, waiting, workers, busy, failed = multiprocessing.get_context("spawn"), units[::-1], {}, {}, []
    try:
        workers.update(start_worker(context) for _ in range(min(len(units), CORES)))
        idle = list(workers)
        while busy or (waiting and idle):
            while waiting and idle:
                connection, (label, config, seed) = idle.pop(), waiting.pop()
                with contextlib.suppress(BrokenPipeError):  # its process has died: the next recv says so
                    connection.send((config, seed))
                bar = tqdm(desc=f"{label}, seed {seed}", total=config.steps + config.adapt, unit=" rollouts",
                           position=list(workers).index(connection), leave=False, dynamic_ncols=True, disable=None)
                bar.set_postfix_str("warm start")
                busy[connection] = label, seed, bar
            for connection in wait(list(busy)):
                label, seed, bar = busy[connection]
                name = f"{label}, seed {seed}"
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError):
                    kind, value = "died", "the same command continues with what is missing"
                if kind == "row":
                    show_progress(name, bar, value)
                    continue
                save(label, seed, value) if kind == "done" else failed.append(f"{name} {kind}: {value}")
                bar.close()
                del busy[connection]
                if kind == "died" and waiting:  # another takes its place
                    connection, process = start_worker(context)
                    workers[connection] = process
                if kind != "died" or waiting:
                    idle.append(connection)
    finally:
        for process in workers.values():
            process.kill()
    return failed

# ---- 13. What is finished is kept -----------------------------------------------------------------------------------

def kept_path(out: Path, config: Config, seed: int) -> Path:
    """Where the finished run of (config, seed) is kept: an edit of the code, or another torch, is another place."""
    code = [Path(__file__).resolve().with_name(name).read_bytes() for name in ("tokrl.py", "toy_tasks.py")]
    key = repr((config, seed, torch.__version__, code))
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
    """Write strict JSON, which knows neither NaN nor Infinity."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(data, allow_nan=False) + "\n"))

def kept_run(path: Path) -> dict | None:
    """A run that was finished earlier, or None; a file that is something else is named and ignored."""
    if path.exists():
        with contextlib.suppress(ValueError, AttributeError, LookupError):
            run = json.loads(path.read_text())
            whole = {"examples", "samples", "timing"} <= run.keys()
            if whole and MEASURES.keys() <= run["final"].keys() & run["curves"].keys():
                return run
        print(f"{path} is not a finished run: it is ignored", file=sys.stderr)
    return None

# ---- 14. Experiments: lists of labelled configurations --------------------------------------------------------------

ARMS = {"off": "off", "on": "min", "orth": "orth"}  # the first word of an arm's label -> its transform
EXPERIMENTS = ("failure-modes", "control", "frontier", "losses", "group-size", "adapt")
MECHANISM = "mechanism"  # not a comparison of runs but a look into one

def experiment_arms(experiment: str, base: Config) -> dict[str, Config]:
    """The experiment's configurations by label: `base`, with what the experiment itself sets."""
    adapt = {"task": "commute", "adapt": max(1, base.steps // 2)}
    settings = {  # suffix of the label -> fields to replace
        "failure-modes": {"": {}},
        "control": {"": {"fork": 0}},
        "frontier": {f"lr={lr:g}": {"lr": lr} for lr in (3e-5, 6e-5, 1e-4, 3e-4)},
        "losses": {**{loss: {"loss": loss, "clip_eps": None} for loss in LOSSES},
                   "gspo unclipped": {"clip_eps": math.inf}},
        "group-size": {f"G={size}": {"group_size": size, "prompts": 64 // size} for size in (2, 4, 8, 16)},
        "adapt": {f"kl={kl:g}": {"kl": kl, **adapt} for kl in (0.0, Config.kl)},
    }[experiment]
    words = ARMS if experiment in ("failure-modes", "control", "frontier") else ("off", "on")
    return {f"{word} {suffix}".strip(): replace(base, transform=ARMS[word], **fields)
            for suffix, fields in settings.items() for word in words}

def as_json(config: Config) -> dict:
    """The fields of a configuration; JSON has no Infinity."""
    return asdict(config) | ({"clip_eps": "inf"} if config.clip_eps == math.inf else {})

def run_experiment(name: str, base: Config, arms: dict, wanted: list[str], seeds: list[int], out: Path, fresh: bool):
    """Train what is not kept yet -> (result as in EXPERIMENT.json, runs by (label, seed), messages of failed runs).

    Only the arms whose labels are `wanted` are trained; another joins where all its runs are kept.
    """
    paths = {(label, seed): kept_path(out, config, seed) for label, config in arms.items() for seed in seeds}
    runs = {unit: run for unit, path in paths.items() if not (fresh and unit[0] in wanted) and (run := kept_run(path))}
    waiting = [(label, arms[label], seed) for seed in seeds for label in wanted if (label, seed) not in runs]
    minutes = sum(config.steps + config.adapt for _, config, _ in waiting) / 13 / 60 / min(len(waiting) or 1, CORES)
    message = f"{len(waiting)} of {len(wanted) * len(seeds)} runs to train, about {math.ceil(minutes)} min"
    print(f"{name}: {message} at 13 rollouts a second in each process", file=sys.stderr, flush=True)

    def save(label, seed, run):
        write_json(paths[label, seed], run)
        runs[label, seed] = run

    failed = train_all(waiting, save)
    for unit in paths.keys() - runs.keys():  # another command may have finished its arm meanwhile
        if unit[0] not in wanted and (run := kept_run(paths[unit])):
            runs[unit] = run
    result = {"experiment": name, "config": as_json(base), "arms": {}, "timing": {},
              "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}}
    for label, config in arms.items():
        each = [runs[label, seed] for seed in seeds if (label, seed) in runs]
        if len(each) == len(seeds):
            gather = lambda kind, names: {k: [run[kind][k] for run in each] for k in names}
            result["arms"][label] = {**as_json(config), "seeds": seeds, "final": gather("final", MEASURES),
                                     "curves": {"step": each[0]["curves"]["step"], **gather("curves", MEASURES)},
                                     "diagnostics": gather("curves", DIAGNOSTICS)}
            result["timing"][label] = dict(sum((Counter(run["timing"]) for run in each), Counter()))
    return result, runs, failed

def mechanism(config: Config, seed: int) -> dict:
    """One group of a real run: its advantages and, under each transform, its weights at the first token, a shared one.

    It is the group of the tenth rollout that breaks Eq. 2 most, and the weights are those that one more inner step on
    that rollout would have.
    """
    torch.set_num_threads(1)
    task, generator = TASKS[config.task], named_generator(seed, "sampling")
    reference = warm_start(task, seed)
    policy = copy.deepcopy(reference)
    optimizer = adamw(policy, config.lr)
    for _ in range(10):
        rollout = prompts, tokens, old_logprobs, mask, rewards = collect(policy, task, config, generator)
        update(policy, reference, optimizer, config, *rollout)
        if not opening_logprobs(policy, task, config.fork).isfinite().all():
            raise FloatingPointError("after the update: a log-probability is not finite")
    logprobs, advantages = token_logprobs(policy, prompts, tokens), group_advantages(rewards)
    weights = effective_weights(config.loss, logprobs, old_logprobs, advantages, mask, config.clip_eps)
    group = cancellation_residual(weights, advantages)[:, 0].argmax()
    under = {word: transform_weights(weights, advantages, mask, kind) for word, kind in ARMS.items()}
    return {"experiment": MECHANISM, "config": as_json(config), "seed": seed, "prompt": decode(prompts[group]),
            "completions": [decode(row) for row in tokens[group]], "rewards": rewards[group].tolist(),
            "advantages": advantages[group].tolist(),
            "weights": {word: w[group, :, 0].tolist() for word, w in under.items()}}

# ---- 15. Tables -----------------------------------------------------------------------------------------------------

DECIMALS = defaultdict(lambda: 2, residual=4)  # residuals are small numbers

def reached(arm: dict, row: int, after: int = 0, level: float = 0.9) -> int | None:
    """Index of the first evaluation past rollout `after` with an accuracy of at least `level`; None: there is none."""
    points = zip(arm["curves"]["step"], arm["curves"]["accuracy"][row])
    return next((i for i, (step, accuracy) in enumerate(points) if step > after and accuracy >= level), None)

def columns_of(result: dict) -> dict[str, dict[str, list]]:
    """{title: {arm's label: a value per seed}}: the final measures, and what only this experiment asks for."""
    columns, adapt = defaultdict(dict), result["experiment"] == "adapt"
    for label, arm in result["arms"].items():
        for measure in list(MEASURES)[:5]:  # the sampled reward estimates the accuracy, which is exact
            columns[MEASURES[measure]][label] = arm["final"][measure]
        steps, change = arm["curves"]["step"], arm["steps"] if adapt else 0
        first = [reached(arm, row, after=change) for row in range(len(arm["seeds"]))]
        if adapt:
            entropy = arm["curves"]["solution_entropy"]
            columns["entropy at the change"][label] = [row[steps.index(change)] for row in entropy]
            columns["rollouts to accuracy 0.9"][label] = [steps[-1 if i is None else i] - change for i in first]
            columns["never reached"][label] = [float(i is None) for i in first]
        elif result["experiment"] == "frontier":
            rows = zip(arm["curves"]["solution_drift"], first)
            columns["drift at accuracy 0.9"][label] = [None if i is None else drift[i] for drift, i in rows]
    return {title: each for title, each in columns.items() if any(set(values) - {None} for values in each.values())}

def bootstrap(off: list, on: list, combine=np.subtract) -> tuple[float, float, float]:
    """combine(mean off, mean on) with its 95% interval: seeds resampled in pairs 10,000 times, percentiles."""
    pairs = np.array([off, on], dtype=float).T  # (seeds, 2)
    picks = np.random.default_rng(0).integers(len(pairs), size=(10_000, len(pairs)))
    low, high = np.percentile(combine(*pairs[picks].mean(axis=1).T), [2.5, 97.5])
    return float(combine(*pairs.mean(axis=0))), float(low), float(high)

def compare(off: list, on: list, title: str, ratio: bool) -> str:
    """off − on, or off / on (of 1 − H for an entropy H), with its interval, over the seeds where both are defined."""
    pairs = [(a, b) for a, b in zip(off, on) if None not in (a, b)]
    if not pairs or (ratio and not title.startswith(("solution", "learning"))):
        return ""
    if ratio and "entropy" in title:
        pairs = [(1 - a, 1 - b) for a, b in pairs]
    sign = "" if ratio else "+"
    each = [f"{x:{sign}.{DECIMALS[title]}f}" for x in bootstrap(*zip(*pairs), np.divide if ratio else np.subtract)]
    return "{} [{}, {}]".format(*each)

def spread(values: list, title: str) -> str:
    """Mean ± standard deviation over the seeds where the value is defined, and their number if that is not all."""
    defined, digits = [v for v in values if v is not None], DECIMALS[title]
    deviation = f" ± {np.std(defined, ddof=1):.{digits}f}" if len(defined) > 1 else ""
    missing = f" (n={len(defined)})" if len(defined) < len(values) else ""
    return f"{np.mean(defined):.{digits}f}{deviation}{missing}" if defined else "none"

def mechanism_rows(result: dict) -> list[list[str]]:
    """A row per trajectory: Â and its weights; then the mean push (1/G) Σ_i Â_i w_i on the shared token (Eq. 2)."""
    A, weights = result["advantages"], result["weights"]
    rows = zip(result["completions"], A, *weights.values())
    push = [np.dot(A, w) / len(A) for w in weights.values()]
    return [["completion", "Â", *(f"weight, {word}" for word in weights)],
            *([text, f"{a:+.2f}", *(f"{x:.3f}" for x in w)] for text, a, *w in rows),
            ["mean push", "", *(f"{x:+.3f}".replace("-0.000", "+0.000") for x in push)]]

def arm_rows(result: dict) -> list[list[str]]:
    """Each arm's mean ± standard deviation over seeds; then paired differences with 95% intervals."""
    columns, labels = columns_of(result), list(result["arms"])
    rows = [["arm", *columns]]
    rows += [[label, *(spread(each[label], title) for title, each in columns.items())] for label in labels]
    pairs = [(label, word + label[3:]) for label in labels if label[:3] == "off" for word in ("on", "orth")]
    signs = "−/" if result["experiment"] == "failure-modes" else "−"
    for off, on in pairs if len(result["arms"][labels[0]]["seeds"]) > 1 else ():
        for sign in signs if on in labels else ():
            cells = (compare(column[off], column[on], title, sign == "/") for title, column in columns.items())
            rows.append([f"{off} {sign} {on}", *cells])
    return rows

def table(result: dict) -> str:
    """A result as a table in Markdown."""
    rows = (mechanism_rows if result["experiment"] == MECHANISM else arm_rows)(result)
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows)

def print_details(runs: dict, labels: list[str], seed: int) -> None:
    """What one seed learnt, in full: probabilities of right completions, samples, and where the time went."""
    each = [runs[label, seed] for label in labels]
    print(f"\n{f'Probability of a right completion, seed {seed}':<46}" + "".join(f"{k:>8}" for k in ("start", *labels)))
    for i, (text, start, _) in enumerate(each[0]["examples"]):
        numbers = (start, *(run["examples"][i][2] for run in each))
        print(f"    {text:<42}" + "".join(f"{number:8.2f}" for number in numbers))
    for label, run in zip(labels, each):
        t, phases = run["timing"], ("warm start", "sampling", "update", "exact measures")
        print(f"\nThree samples, {label}: {', '.join(run['samples'])}")
        print(f"Seconds: {', '.join(f'{t[k]:.0f} {k}' for k in phases)}; tokens per second: "
              f"{t['tokens sampled'] / t['sampling']:,.0f} sampled, {t['tokens trained'] / t['update']:,.0f} trained")

# ---- 16. Figures ----------------------------------------------------------------------------------------------------

COLOURS = {"off": "#D55E00", "on": "#0072B2", "orth": "#009E73"}  # Okabe-Ito: told apart by colour-blind readers
STYLES = {"off": "-", "on": "-", "orth": "--"}
PANELS = {"learning_tax": "Ineffective updates", "solution_drift": "Solution drift",
          "solution_entropy": "Entropy collapse", "accuracy": "Accuracy"}

def draw(result: dict, path: Path) -> None:
    """Draw a result, from its JSON alone, as a PNG."""
    import matplotlib  # here and not above: starting the program should not wait for it
    from matplotlib.figure import Figure

    kinds = {"failure-modes": draw_curves, "frontier": draw_frontier, MECHANISM: draw_mechanism}
    plain = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    with matplotlib.rc_context({**plain, "font.size": 11, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
        kinds.get(result["experiment"], draw_dots)(figure, result)
        write_whole(path, figure.savefig)

def draw_curves(figure, result: dict) -> None:
    """The three failure modes over training, accuracy below: mean over seeds, band from the lowest to the highest."""
    for measure, axes in figure.subplot_mosaic([list(PANELS)[:3], ["accuracy"] * 3], height_ratios=(5, 2)).items():
        ends = {}
        for label, arm in result["arms"].items():
            steps, rows = arm["curves"]["step"], np.array(arm["curves"][measure], dtype=float)  # None becomes nan
            axes.plot(steps, rows.mean(0), STYLES[label], color=COLOURS[label], lw=2)
            axes.fill_between(steps, rows.min(0), rows.max(0), color=COLOURS[label], alpha=0.15, lw=0)
            ends[label] = rows.mean(0)[-1]
        axes.set(title=PANELS[measure], ylabel=MEASURES[measure], xlabel="rollouts", xlim=(0, steps[-1]))
        axes.set_ylim(0, 1.03 if measure in ("accuracy", "solution_entropy") else None)
        if np.isnan(rows).all():
            axes.text(0.5, 0.5, "one right answer:\nnot defined", transform=axes.transAxes, ha="center", color="0.35")
        elif measure != "accuracy":  # there the lines lie on one another
            place = -math.inf
            for label in sorted(ends, key=ends.get):  # names at the ends of the lines, pushed apart
                place = max(ends[label], place + 0.07 * axes.get_ylim()[1])
                axes.text(1.02, place, label, transform=axes.get_yaxis_transform(), color=COLOURS[label], va="center")
    seeds, config = arm["seeds"], result["config"]
    spread = f"mean of seeds {seeds[0]}-{seeds[-1]}, band: lowest to highest" if len(seeds) > 1 else f"seed {seeds[0]}"
    figure.supxlabel(f"{config['loss']}, {config['task']}, fork {config['fork']}; {spread}", fontsize=10, color="0.35")

def draw_interval(axes, x: list, y: list, colour: str, size: float = 6) -> tuple[float, float]:
    """A dot at the means of x and y (one value per seed), a line along each one's 95% interval; returns the means."""
    (x, *xs), (y, *ys) = (bootstrap(values, [0.0] * len(values)) for values in (x, y))
    axes.plot(xs, [y, y], [x, x], ys, color=colour, lw=2, alpha=0.6)
    axes.plot([x], [y], "o", color=colour, ms=size)
    return x, y

def draw_dots(figure, result: dict) -> None:
    """A row per arm: each seed as a faint dot, the mean with its 95% interval."""
    columns, labels = columns_of(result), list(result["arms"])
    figure.set_size_inches(9, 1.3 + 0.3 * len(labels))
    for axes, (title, column) in zip(figure.subplots(1, len(columns), sharey=True), columns.items()):
        for y, label in enumerate(labels):
            values, colour = [v for v in column[label] if v is not None], COLOURS[label.split()[0]]
            axes.plot(values, [y] * len(values), "o", color=colour, alpha=0.25, ms=4, mew=0)
            if values:
                draw_interval(axes, values, [y] * len(values), colour)
        axes.set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.4, -0.6))
        axes.set_xlim(None if title == "accuracy" else 0, 1.03 if title in ("accuracy", "solution entropy") else None)
        axes.set_title(title.replace(" ", "\n", 1), fontsize=10)
        axes.grid(axis="x", color="0.9")

def draw_frontier(figure, result: dict) -> None:
    """Accuracy against drift at the end of training: a curve per transform, a larger dot for a larger learning rate."""
    axes, curves = figure.subplots(), defaultdict(list)
    for label, arm in result["arms"].items():
        word, final = label.split()[0], arm["final"]
        size = 5 + 3 * len(curves[word])
        curves[word].append(draw_interval(axes, final["accuracy"], final["solution_drift"], COLOURS[word], size))
    for word, points in curves.items():
        axes.plot(*zip(*points), STYLES[word], color=COLOURS[word], lw=1.5, label=word)
    rates = ", ".join(f"{rate:g}" for rate in sorted({arm["lr"] for arm in result["arms"].values()}))
    axes.set(title="Lower right is better", xlabel="accuracy", ylabel="solution drift (nats, log scale)",
             yscale="log", yticks=(0.3, 0.5, 1, 2, 4))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    figure.legend(title=f"dots, small to large: learning rate {rates}", loc="outside upper right", ncols=3)

def draw_mechanism(figure, result: dict) -> None:
    """A row per trajectory: its advantage; under each transform its weight (light) and its push Â w (dark)."""
    A, config = np.array(result["advantages"]), result["config"]
    figure.set_size_inches(9, 1.8 + 0.4 * len(A))
    first, *panels = figure.subplots(1, 1 + len(result["weights"]), sharey=True)
    first.barh(range(len(A)), A, color="0.6")
    names = [f"{text}  {'right' if r else 'wrong'}" for text, r in zip(result["completions"], result["rewards"])]
    first.set(title="advantage Â", yticks=range(len(A) + 1), yticklabels=[*names, "mean push"])
    first.invert_yaxis()
    for axes, (word, w) in zip(panels, result["weights"].items()):
        axes.barh(range(len(A)), w, color=COLOURS[word], alpha=0.35, label="weight w")
        axes.barh(range(len(A)), A * w, height=0.3, color=COLOURS[word], label="push Â w")
        axes.barh(len(A), np.mean(A * w), color="black")
        if not any(w):
            axes.text(0, (len(A) - 1) / 2, "all weights 0", ha="center", color="0.35", backgroundcolor="white")
        axes.set(title=word)
        axes.sharex(panels[0])
    for axes in (first, *panels):
        axes.axvline(0, color="0.35", lw=0.8)
    opening = result["completions"][0][: config["fork"]]
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2,
                  title=f"{config['loss']}, prompt {result['prompt']}, the opening {opening} is shared by all")

# ---- 17. Command line -----------------------------------------------------------------------------------------------

def seeds_from(text: str) -> list[int]:
    """'3' -> [3]; '0-7' -> [0, ..., 7]."""
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and (last.isdecimal() or not dash) and 0 <= int(last or first) - int(first) < 1000):
        raise argparse.ArgumentTypeError(f"must be N or A-B with 0 <= A <= B, a thousand at most; got {text!r}")
    return list(range(int(first), int(last or first) + 1))

def parser() -> argparse.ArgumentParser:
    """The options; those of Config's fields carry their names. Only what is given appears in the parsed namespace."""
    p = argparse.ArgumentParser(prog="tokrl.py", argument_default=argparse.SUPPRESS, allow_abbrev=False,
                                description="Train a tiny policy with and without the paper's transform; draw both.")
    p.error = functools.partial(require, False)  # a ValueError, which main prints on one line
    p.add_argument("--transform", choices=["both", "on", *TRANSFORMS], help="on means min; arms that are finished are "
                   "drawn beside it (default both: off and on; --experiment failure-modes adds orth)")
    for name, kind, text in (
            ("loss", LOSSES, "the weights"), ("task", TASKS, "what is learnt"),
            ("fork", int, "opening tokens that a group shares (default: the task's own; commute: 2)"),
            ("group-size", int, "completions per prompt"), ("prompts", int, "prompts per rollout"),
            ("inner-steps", int, "gradient steps per rollout"), ("steps", int, "rollouts"),
            ("lr", float, "learning rate"), ("kl", float, "weight of the KL to the warm-started policy"),
            ("clip-eps", float, "clip ratios outside 1 ± this; inf: no clip (default 0.04 for gspo, else 0.2)"),
            ("seeds", seeds_from, "N or A-B (default 0)"), ("out", Path, "folder for results (default runs)"),
            ("experiment", (*EXPERIMENTS, MECHANISM), "default failure-modes; the next five set loss and "
             "transform themselves; mechanism looks into one group, in ten seconds")):
        default = getattr(Config, name.replace("-", "_"), None)
        choice = {"type": kind} if callable(kind) else {"choices": kind}
        p.add_argument(f"--{name}", **choice, help=text if default is None else f"{text} (default {default})")
    p.add_argument("--plot", action="store_true", help="redraw the figures in --out from their JSON, without training")
    p.add_argument("--fresh", action="store_true", help="train again what is already finished")
    return p

def arms_from(given: dict) -> tuple[str, Config, dict, list[str]]:
    """What the options ask for: experiment, base configuration, its arms, and the labels of those to train."""
    name, word = given.get("experiment", "failure-modes"), given.get("transform", "both")
    fields = {k: v for k, v in given.items() if k in Config.__dataclass_fields__}
    base = Config(**fields | {"transform": "off"})
    if name == MECHANISM:
        extra = sorted(given.keys() & {"transform", "steps", "fresh"})
        require(not extra, f"experiment {name} is always ten rollouts; leave out --{', --'.join(extra)}")
        require(len(given.get("seeds", [0])) == 1, f"experiment {name} shows one seed; give --seeds a single number")
        require(base.fork > 0, f"experiment {name} needs a shared token: --fork of at least 1")
        return name, base, {}, []
    arms = experiment_arms(name, base)
    require(name != "frontier" or base.task != "add", "experiment frontier needs a task of several right answers")
    if name == "failure-modes":
        both = ["off", "on"] if "transform" in given or "experiment" not in given else list(arms)
        return name, base, arms, {"both": both, "min": ["on"]}.get(word, [word])
    for field, value in fields.items():
        fixed = field in ("loss", "transform") or any(getattr(arm, field) != value for arm in arms.values())
        require(not fixed, f"experiment {name} sets --{field.replace('_', '-')} itself; leave it out")
    return name, base, arms, list(arms)

def plot_all(out: Path, names) -> int:
    """Redraw every result in `out` and print its table; returns 2 if one is not whole. ValueError if there is none."""
    paths, status = [path for name in names if (path := out / f"{name}.json").exists()], 0
    require(bool(paths), f"no results in {out} for --plot; the same command without --plot makes one")
    for path in paths:
        try:
            result = json.loads(path.read_text())
            require(result["experiment"] == path.stem, f"it holds {result['experiment']}")
            text = f"\n{path.with_suffix('.png')}, from: {result['command']}\n\n{table(result)}"
            draw(result, path.with_suffix(".png"))
            print(text)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            again = f"make it again with: python tokrl.py --experiment {path.stem} --out {out}"
            print(f"tokrl.py: {path} is not a whole result ({error!r}); {again}", file=sys.stderr)
            status = 2
    return status

def run(given: dict, command: str) -> int:
    """Do what the options ask for; returns the exit status."""
    out, seeds = given.get("out", Path("runs")), given.get("seeds", [0])
    if "plot" in given:
        extra = sorted(given.keys() - {"plot", "out", "experiment"})
        require(not extra, f"--plot trains nothing; leave out --{', --'.join(extra).replace('_', '-')}")
        return plot_all(out, [given["experiment"]] if "experiment" in given else [*EXPERIMENTS, MECHANISM])
    name, base, arms, wanted = arms_from(given)
    (out / ".cache").mkdir(parents=True, exist_ok=True)
    if name == MECHANISM:
        result, runs, failed = mechanism(base, seeds[0]), {}, []
    else:
        result, runs, failed = run_experiment(name, base, arms, wanted, seeds, out, "fresh" in given)
    for message in failed:
        print(f"tokrl.py: {message}", file=sys.stderr)
    if result.get("arms") != {}:  # empty where every run failed
        write_json(out / f"{name}.json", {"command": command, **result})
        draw(result, out / f"{name}.png")
        print(f"\n{table(result)}")
        if name == "failure-modes":
            print_details(runs, list(result["arms"]), seeds[0])
        print(f"\nFigure: {out / f'{name}.png'}")
    return 1 if failed else 0

def main(argv: list[str] | None = None) -> int:
    """The program; returns its exit status: 0, 1 where a run failed, 2 for bad input, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return run(vars(parser().parse_args(argv)), shlex.join(["python", "tokrl.py", *argv]))
    except SystemExit as done:  # --help
        return done.code
    except FloatingPointError as error:
        print(f"tokrl.py: mechanism diverged: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        hint = "; --out needs a folder that can be written, with space left" if isinstance(error, OSError) else ""
        print(f"tokrl.py: {error}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The same command (without --fresh) continues with what is missing.", file=sys.stderr)
        return 130

if __name__ == "__main__":
    for stream in filter(None, (sys.stdout, sys.stderr)):  # a console without "−" shows "?"; a closed one is None
        stream.reconfigure(errors="replace")
    sys.exit(main())
