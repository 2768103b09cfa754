"""A look inside single groups: what the transforms do to one, and what shared tokens contribute.

experiments.py records and draws these two, `mechanism` and `sharing`, beside its tables of runs.
"""

import copy
import itertools
import math
import os
from pathlib import Path

import numpy as np
import torch

import tokrl
from figures.report import bare
from tokrl import COLORS, Config, new_figure
from toy_tasks import TASKS, decode

SHARING = {  # groups that share an opening: because it was forked, or by chance
    "commute, fork 2": Config(),
    "commute, independent samples": Config(fork=0),
    "habit, independent samples": Config(task="habit"),
}
WATCHED = (10, 50, 200, 400)  # rollouts, each with the nine before it


def start_of_run(config: Config, seed: int):
    """What `train` begins with: task, start, policy, optimizer, generator."""
    torch.set_num_threads(1)
    task = TASKS[config.task]
    start = tokrl.warm_start(task, seed)
    policy = copy.deepcopy(start).requires_grad_(True)
    optimizer = tokrl.adamw(policy, config.lr)
    return task, start, policy, optimizer, tokrl.named_generator(seed, "sampling")


# ---- 1. Mechanism: one group, three transforms
def record_mechanism(seeds: list, _) -> dict:
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
    from matplotlib.patches import Patch

    figure = new_figure(7, 4.1)
    A = np.array(result["advantages"])
    texts = result["completions"]
    panels = figure.subplots(1, len(COLORS), sharex=True, sharey=True)
    for panel, (kind, color) in zip(panels, COLORS.items(), strict=True):
        w = np.array(result["weights"][kind])
        panel.barh(range(len(A)), w, color=color, alpha=0.35)
        panel.barh(range(len(A)), A * w, height=0.3, color=color)
        panel.axvline(0, color="0.3", lw=0.8)
        word = "on" if kind == "min" else kind
        mean = round(float(np.mean(A * w)), 2) + 0.0  # + 0.0: no −0.00
        bare(panel, f"{word}\nmean push {mean:+.2f}")
        panel.set_xlabel("w, and Â w")
    opening = len(os.path.commonprefix(texts))
    names = []
    for text, a in zip(texts, A, strict=True):
        names.append(f"[{text[:opening]}]{text[opening:]}  Â {a:+.2f}".replace("-", "−"))
    panels[0].set_yticks(range(len(A)), labels=names)
    panels[0].invert_yaxis()
    bars = [Patch(color="0.3", alpha=0.35), Patch(color="0.3")]
    words = ["weight w of a shared token (times L)", "its push Â w"]
    figure.legend(bars, words, loc="outside lower center", ncols=2)
    title = f"prompt {result['prompt']}   (in brackets: the tokens that the group shares)"
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


# ---- 2. Sharing: how much of a gradient comes from shared tokens
def record_sharing(seeds: list, on_all_cores) -> dict:
    """{"gradients": {setting: for each seed its rows}}; see sharing_of_run."""
    rows = on_all_cores(sharing_of_run, list(itertools.product(SHARING.values(), seeds)))
    split = np.split(np.array(rows, dtype=object), len(SHARING))
    return {"gradients": dict(zip(SHARING, [part.tolist() for part in split], strict=True))}


def sharing_of_run(config: Config, seed: int) -> list[dict]:
    """One run as `train` does it, and a row for each of WATCHED.

    Means over ten rollouts and over the groups whose rewards differ, each seen after its last inner
    step: how many tokens are shared and how many scored, and ‖gradient‖ of the policy loss in all
    parameters, from the shared tokens' own terms and from all others. None: no such group.
    """
    task, start, policy, optimizer, generator = start_of_run(config, seed)
    rows = []
    seen = []
    for step in range(1, max(WATCHED) + 1):
        prompts, tokens, rewards = tokrl.collect(policy, task, config, generator)
        with torch.no_grad():
            old_logprobs = tokrl.token_logprobs(policy, prompts, tokens)
        tokrl.update(policy, start, optimizer, config, prompts, tokens, rewards)
        if any(last - 10 < step <= last for last in WATCHED):
            seen += rows_of_groups(policy, config.loss, old_logprobs, prompts, tokens, rewards)
        if step in WATCHED:
            rows.append(mean_of_rows(seen))
            seen = []
    return rows


def mean_of_rows(rows: list[dict]) -> dict | None:
    """The mean of each number over rows; None: there are none."""
    if not rows:
        return None
    means = {}
    for name in rows[0]:
        means[name] = float(np.mean([row[name] for row in rows]))
    return means


def rows_of_groups(policy, loss, old_logprobs, prompts, tokens, rewards) -> list[dict]:
    """A row for each group whose rewards differ; see sharing_of_run."""
    logprobs = tokrl.token_logprobs(policy, prompts, tokens)
    A = tokrl.group_advantages(rewards)
    mask = tokrl.completion_mask(tokens)
    w = tokrl.effective_weights(loss, logprobs, old_logprobs, A, mask)
    terms = tokrl.pushes(w, A) * logprobs  # (B,G,T)
    shared = tokrl.shared_tokens(tokens)[:, None] & mask  # (B,G,T)
    rows = []
    for b in torch.nonzero(A.abs().sum(1)).flatten():
        row = {"shared tokens": shared[b, 0].sum().item()}
        row["scored tokens"] = mask[b].sum(1).float().mean().item()
        for name, part in (("shared", shared[b]), ("rest", ~shared[b])):
            total = (terms[b] * part).sum()
            gradients = torch.autograd.grad(total, list(policy.parameters()), retain_graph=True)
            row[name] = math.sqrt(sum(g.square().sum().item() for g in gradients))
        rows.append(row)
    return rows


def shared_over_rest(rows: list[dict]):
    """Of one run, at each of WATCHED: ‖gradient‖ from shared tokens over that from the rest."""
    return [row["shared"] / row["rest"] if row else math.nan for row in rows]


def sharing_columns(result: dict) -> dict[str, list]:
    """{head: cells}: a row per setting; median over seeds, lowest to highest; mean of tokens."""
    columns = {"shared over rest, at rollouts": list(result["gradients"])}
    for k, last in enumerate(WATCHED):
        cells = []
        for runs in result["gradients"].values():
            x = np.array([shared_over_rest(rows)[k] for rows in runs])
            spread = f"{np.nanmedian(x):.0%}, {np.nanmin(x):.0%} to {np.nanmax(x):.0%}"
            tokens = np.mean([rows[k]["shared tokens"] for rows in runs if rows[k]])
            scored = np.mean([rows[k]["scored tokens"] for rows in runs if rows[k]])
            cells.append(f"{spread}; {tokens:.1f} of {scored:.1f} tokens")
        columns[f"{last - 9} to {last}"] = cells
    return columns


def draw_sharing(result: dict, path: Path):
    """The ratio of gradients over training: faint each seed, a line for the median."""
    figure = new_figure(7, 3.6)
    panel = figure.subplots()
    styles = zip(result["gradients"].items(), ("0.1", "#CC79A7", "#56B4E9"), "os^", strict=True)
    for (label, runs), color, marker in styles:
        percent = 100 * np.array([shared_over_rest(run) for run in runs])
        panel.plot(WATCHED, percent.T, marker, color=color, alpha=0.25, ms=4, mew=0)
        panel.plot(WATCHED, np.nanmedian(percent, axis=0), f"-{marker}", color=color, label=label)
    bare(panel, "gradient from shared tokens, in % of that from all others")
    panel.set_xlabel("rollouts")
    panel.set_yscale("log")
    panel.set_yticks([0.1, 1, 10, 100, 1000], labels=["0.1%", "1%", "10%", "100%", "1000%"])
    panel.minorticks_off()
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path)
