"""Right answers to exercises 9 to 21, written otherwise than in tokrl.py. `run` checks them."""

import math

import torch

import tokrl


def group_advantages(rewards, normalize=True):
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    A = rewards - rewards.mean(1, keepdim=True)
    if normalize:
        A = A / (rewards.std(1, keepdim=True) + 1e-4)
    return torch.where((rewards == rewards[:, :1]).all(1, keepdim=True), torch.zeros_like(A), A)


def gspo(log_r, A, mask, L):
    n = mask.sum(-1, keepdim=True)
    s = (log_r.sum(-1, keepdim=True) / n).exp()
    A = A[..., None]
    clipped = (A > 0) & (s > 1.04) | (A < 0) & (s < 0.96)
    return torch.where(clipped, 0.0, s) / n


def prefix(log_r, A, mask, L):
    return log_r.exp().cumprod(-1) / L


def min_replace(w, A, mask):
    return torch.where(mask, w, math.inf).min(1, keepdim=True).values.expand_as(w)


def orth(w, A, mask):
    A = (A[..., None] * mask).to(w.dtype)
    Aw = torch.where(A == 0, 0.0, A * w).sum(1, keepdim=True)
    AA = (A * A).sum(1, keepdim=True)
    return w - torch.where(AA > 0, Aw / AA.clamp(min=1e-30), 0.0) * A


def shared_tokens(tokens):
    same = (tokens == tokens[:, :1]).all(1)
    return same.cumprod(1) > 0


def share_reward(tokens, rewards):
    shared = rewards.clone()
    for b in range(len(tokens)):
        rows = [tuple(row) for row in tokens[b].tolist()]
        for i, row in enumerate(rows):
            shared[b, i] = rewards[b, i] / rows.count(row)
    return shared


@torch.no_grad()
def sample_groups(policy, prompts, group_size, fork, max_completion, generator):
    rows = prompts
    if fork == 0:
        rows = rows.repeat_interleave(group_size, 0)
    for t in range(max_completion):
        p = policy(rows)[:, -1].exp()
        new = torch.multinomial(p, 1, generator=generator)
        done = (rows[:, prompts.shape[1] :] == tokrl.EOS).any(1, keepdim=True)
        new[done] = tokrl.PAD
        rows = torch.cat([rows, new], 1)
        if t + 1 == fork:
            rows = rows.repeat_interleave(group_size, 0)
    return rows[:, prompts.shape[1] :].reshape(len(prompts), group_size, max_completion)


def evaluate(policy, task, start):
    now = tokrl.solution_logprobs(policy, task)
    then = tokrl.solution_logprobs(start, task)
    rows = []
    for b in range(len(now)):
        exists = now[b] > -math.inf
        p, q = now[b][exists], then[b][exists]
        accuracy = p.exp().sum()
        entropy = drift = torch.tensor(math.nan)
        if len(p) > 1:
            given_right = p.softmax(0)
            entropy = -(given_right * given_right.log()).sum() / math.log(len(p))
            moved = p - q
            apart = (moved[:, None] - moved[None]).abs()
            drift = apart.sum() / (len(p) * (len(p) - 1))
        rows.append(torch.stack([accuracy, entropy, drift]))
    means = torch.stack(rows).nanmean(0).tolist()
    return dict(zip(["accuracy", "solution_entropy", "solution_drift"], means, strict=True))


def own(log_r, A, mask, L):
    past = log_r.cumsum(-1)
    return past.exp().masked_fill(past.abs() > 0.5, 0.0) / L


def future(log_r, A, mask, L):
    return log_r.flip(-1).cumsum(-1).flip(-1).exp() / L


def shrink(w, A, mask):
    n = mask.sum(1, keepdim=True)
    least = w.masked_fill(~mask, math.inf).amin(1, keepdim=True)
    mean = w.sum(1, keepdim=True) / n
    return torch.where(mean > 0, w * least / mean, 0.0)


def zero(w, A, mask):
    return w * 0
