"""A look inside single groups: what the transforms do to one, and what shared tokens contribute.

experiments.py records and draws these two, `mechanism` and `sharing`, beside its tables of runs.
"""

import copy
import math
from functools import partial
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch

import tokrl
from tokrl import COLOURS, Config
from toy_tasks import TASKS, decode

SHARING = {  # groups that share an opening: because it was forked, or by chance
    "commute, fork 2": Config(),
    "commute, independent samples": Config(fork=0),
    "habit, independent samples": Config(task="habit"),
}
WATCHED = (10, 50, 200, 400)  # rollouts, each with the nine before it


def start_of_run(config: Config, seed: int):
    """What `train` begins with: task, start, policy, optimizer, generator."""
    task = TASKS[config.task]
    start = tokrl.warm_start(task, seed)
    policy = copy.deepcopy(start)
    optimizer = tokrl.adamw(policy, config.lr)
    return task, start, policy, optimizer, tokrl.named_generator(seed, "sampling")


# ---- 1. Mechanism: one group, three transforms
def record_mechanism(seeds: list) -> dict:
    """The group of a first rollout that breaks Eq. 2 most, and its weights after the inner steps.

    Weights times L, which under `seq` is the product of a completion's ratios.
    """
    config = Config()
    task, start, policy, optimizer, generator = start_of_run(config, seeds[0])
    prompts, tokens, rewards = tokrl.collect(policy, task, config, generator)
    tokrl.update(policy, start, optimizer, config, prompts, tokens, rewards)
    logprobs = tokrl.token_logprobs(policy, prompts, tokens)
    old_logprobs = tokrl.token_logprobs(start, prompts, tokens)
    A = tokrl.group_advantages(rewards)
    mask = tokrl.completion_mask(tokens)
    w = tokrl.effective_weights(config.loss, logprobs, old_logprobs, A, mask, max_length=1)
    worst = tokrl.net_push(w, A)[:, 0].argmax()
    weights = {}
    for kind in tokrl.TRANSFORMS:
        transformed = tokrl.transform_weights(w, A, mask, kind)
        weights[kind] = transformed[worst, :, 0].tolist()
    return {
        "prompt": decode(prompts[worst]),
        "completions": [decode(row) for row in tokens[worst]],
        "advantages": A[worst].tolist(),
        "weights": weights,
    }


def draw_mechanism(result: dict, path: Path):
    """A row per trajectory with its advantage; under each transform its weight and its push Â w."""
    figure = matplotlib.figure.Figure(figsize=(9, 4.2), dpi=150, layout="constrained")
    A = np.array(result["advantages"])
    panels = figure.subplots(1, len(COLOURS), sharex=True, sharey=True)
    for panel, (kind, colour) in zip(panels, COLOURS.items(), strict=True):
        w = np.array(result["weights"][kind])
        panel.barh(range(len(A)), w, color=colour, alpha=0.35)
        panel.barh(range(len(A)), A * w, height=0.3, color=colour)
        panel.axvline(0, color="0.3", lw=0.8)
        panel.spines[["top", "right"]].set_visible(False)
        word = "on" if kind == "min" else kind
        mean = round(float(np.mean(A * w)), 2) + 0.0  # + 0.0: no −0.00
        panel.set_title(f"{word}\nmean push {mean:+.2f}", fontsize=11)
    rows = zip(result["completions"], A, strict=True)
    panels[0].set_yticks(range(len(A)), labels=[f"{text}   Â {a:+.2f}" for text, a in rows])
    panels[0].invert_yaxis()
    title = f"Prompt {result['prompt']}, shared token: product of ratios (light), push (dark)"
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


# ---- 2. Sharing: how much of a gradient comes from shared tokens
def record_sharing(seeds: list) -> dict:
    """{"gradients": {setting: for each seed its rows}}; see sharing_of_run."""
    gradients = {}
    for label, config in SHARING.items():
        gradients[label] = [sharing_of_run(config, seed) for seed in seeds]
    return {"gradients": gradients}


def sharing_of_run(config: Config, seed: int) -> list[dict]:
    """One run as `train` does it, and a row for each of WATCHED.

    Means over the groups whose rewards differ, inner steps and ten rollouts: how many tokens are
    shared and how many scored, and ‖gradient‖ of the policy loss in all parameters, from the shared
    tokens' own terms and from all others. None: there was no such group.
    """
    task, start, policy, optimizer, generator = start_of_run(config, seed)
    rows = []
    seen = []
    for step in range(1, max(WATCHED) + 1):
        rollout = tokrl.collect(policy, task, config, generator)
        hooks = []
        if any(last - 10 < step <= last for last in WATCHED):
            old_logprobs = tokrl.token_logprobs(policy, *rollout[:2]).detach()
            look = partial(look_at_groups, seen, policy, config.loss, old_logprobs, *rollout)
            hooks.append(optimizer.register_step_pre_hook(look))
        tokrl.update(policy, start, optimizer, config, *rollout)
        for hook in hooks:
            hook.remove()
        if step in WATCHED:
            rows.append(mean_of_rows(seen))
            seen.clear()
    return rows


def mean_of_rows(rows: list[dict]) -> dict | None:
    """The mean of each number over rows; None: there are none."""
    if not rows:
        return None
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def look_at_groups(seen, policy, loss, old_logprobs, prompts, tokens, rewards, *_):
    """Append to `seen` a row for each group whose rewards differ; called before each inner step."""
    logprobs = tokrl.token_logprobs(policy, prompts, tokens)
    A = tokrl.group_advantages(rewards)
    mask = tokrl.completion_mask(tokens)
    w = tokrl.effective_weights(loss, logprobs, old_logprobs, A, mask)
    terms = tokrl.pushes(w, A) * logprobs  # (B,G,T)
    shared = tokrl.shared_tokens(tokens)[:, None] & mask  # (B,G,T)
    for b in torch.nonzero(A.abs().sum(1)).flatten():
        row = {"shared tokens": shared[b, 0].sum().item()}
        row["scored tokens"] = mask[b].sum(1).float().mean().item()
        for name, part in (("shared", shared[b]), ("rest", ~shared[b])):
            total = (terms[b] * part).sum()
            gradients = torch.autograd.grad(total, list(policy.parameters()), retain_graph=True)
            row[name] = math.sqrt(sum(g.square().sum().item() for g in gradients))
        seen.append(row)


def shared_over_rest(rows: list[dict]):
    """Of one run, at each of WATCHED: ‖gradient‖ from shared tokens over that from the rest."""
    return [row["shared"] / row["rest"] if row else math.nan for row in rows]


def sharing_columns(result: dict) -> dict[str, list]:
    """{head: cells}: a row per setting; mean over seeds, lowest to highest, and the tokens."""
    columns = {"shared over rest, at rollouts": list(result["gradients"])}
    for k, last in enumerate(WATCHED):
        cells = []
        for runs in result["gradients"].values():
            x = np.array([shared_over_rest(rows)[k] for rows in runs])
            spread = f"{np.nanmean(x):.0%}, {np.nanmin(x):.0%} to {np.nanmax(x):.0%}"
            tokens = np.mean([rows[k]["shared tokens"] for rows in runs if rows[k]])
            scored = np.mean([rows[k]["scored tokens"] for rows in runs if rows[k]])
            cells.append(f"{spread}; {tokens:.1f} of {scored:.1f} tokens")
        columns[f"{last - 9} to {last}"] = cells
    return columns


def draw_sharing(result: dict, path: Path):
    """The ratio of gradients over training: faint each seed, a line for the mean."""
    figure = matplotlib.figure.Figure(figsize=(9, 3.4), dpi=150, layout="constrained")
    panel = figure.subplots()
    styles = zip(result["gradients"].items(), COLOURS.values(), "os^", strict=True)
    for (label, runs), colour, marker in styles:
        percent = 100 * np.array([shared_over_rest(run) for run in runs])
        panel.plot(WATCHED, percent.T, marker, color=colour, alpha=0.25, ms=4, mew=0)
        panel.plot(WATCHED, np.nanmean(percent, axis=0), f"-{marker}", color=colour, label=label)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title("gradient from shared tokens, in % of that from all others", fontsize=11)
    panel.set_xlabel("rollouts")
    panel.set_ylim(bottom=0)
    figure.legend(loc="outside right center")
    figure.savefig(path)
