"""The evidence: experiments of many runs, with their tables and figures.

    python -m figures.experiments ablation    train what is missing, then table and figure
    python -m figures.experiments all         every experiment: some hours on two cores
    python -m figures.experiments --plot      tables and figures again, without training

From the project's root. Runs are kept in RUNS as those of tokrl.py are, and shared by experiments
that need the same one. An experiment gathers its runs in OUT/NAME.json. From that file alone come
OUT/NAME.png and the tables, which go into OUT/README.md (written by people) between the marks of
NAME.
"""

import copy
import json
import math
import sys
from argparse import ArgumentParser
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib.figure
import numpy as np

import tokrl
from tokrl import ARMS, MEASURES, Config, require
from toy_tasks import TASKS, decode

HERE = Path(__file__).resolve().parent
SEEDS = list(range(8))


# ---- 1. The experiments
@dataclass(frozen=True)
class Experiment:
    """A question, and the arms that answer it.

    Each arm is compared with `off` under the same settings, and beside these the pairs `also`; all
    of them are one family for Holm's correction.
    """

    question: str
    arms: dict[str, Config]
    also: tuple = ()

    def pairs(self) -> list[tuple[str, str]]:
        """(label, label) of all comparisons."""
        labels = {config: label for label, config in self.arms.items()}
        found = []
        for label, config in self.arms.items():
            off = labels.get(replace(config, transform="off"))
            if off not in (None, label):
                found.append((off, label))
        return [*found, *self.also]


def arms(words: list[str], *every: dict) -> dict[str, Config]:
    """The arms `words`, such as "on at shared", under each of the settings: {label: Config}."""
    found = {}
    for settings in every:
        names = [x if isinstance(x, str) else f"{key}={x:g}" for key, x in settings.items()]
        for word in words:
            transform, _, place = word.partition(" at ")
            config = Config(transform=ARMS[transform][0], at=place or "all", **settings)
            found[" ".join([word, *names])] = config
    return found


def several(key: str, values) -> list[dict]:
    """One setting with several values."""
    return [{key: value} for value in values]


OFF = ["off"]
OFF_ON = ["off", "on"]
PLACES = ["off", "on", "on at shared", "on at rest"]
EVERY = [
    *PLACES,
    *["mean", "mean at rest", "orth", "orth at rest"],
    *["shrink", "shrink at shared", "shrink at rest"],
]
LOSSES = ["reinforce", "grpo", "dr_grpo", "dapo", "grpo_sym", "cispo", "gspo", "seq", "prefix"]
NOTHING_SHARED = [
    {"fork": 0},
    {"fork": 0, "duplicates": "once"},
    {"fork": 0, "duplicates": "share"},
]
EXPERIMENTS = {
    "failure-modes": Experiment(
        "Does the paper's method stop the three failure modes?",
        arms(["off", "on", "orth"], {}),
    ),
    "ablation": Experiment(
        "What does it: cancellation at the shared tokens, smaller weights, or something else?",
        arms(EVERY, {}) | arms(PLACES, {"loss": "gspo"}),
        also=(("on", "on at shared"), ("on gspo", "on at shared gspo")),
    ),
    "price": Experiment(
        "Why does accuracy suffer on some tasks?",
        arms(PLACES, {"task": "add"})
        | arms(OFF_ON, {"task": "add", "fork": 0})
        | arms(PLACES, {"task": "split"})
        | arms(OFF_ON, {"task": "split", "fork": 0}),
    ),
    "tasks": Experiment(
        "Does it hold elsewhere, and does a loss that cancels by itself do as well?",
        arms(OFF_ON, *several("task", TASKS))
        | arms(["on at shared"], {"task": "chain"})
        | arms(OFF, *[{"loss": "prefix", "task": task} for task in TASKS]),
        also=[(f"off {task}", f"off prefix {task}") for task in TASKS]
        + [("on chain", "on at shared chain")],
    ),
    "long": Experiment(
        "Does it only delay? 1,200 rollouts in place of 400",
        arms(OFF_ON, *[{"task": task, "steps": 1200} for task in ("commute", "add", "split")]),
    ),
    "control": Experiment(
        "Nothing is shared (fork 0): what is left, and what helps there?",
        arms(OFF_ON, *NOTHING_SHARED)
        | arms(["orth"], {"fork": 0})
        | arms(OFF, {"fork": 0, "loss": "prefix"}),
        also=[("off fork=0", f"off fork=0 {other}") for other in ("once", "share", "prefix")],
    ),
    "losses": Experiment(
        "Which losses drift, and is DFPO (on seq) better than they are?",
        arms(OFF, *several("loss", LOSSES))
        | arms(["on"], *several("loss", ["seq", "gspo", "grpo"]))
        | arms(OFF, *[{"loss": "gspo", "clip_eps": eps} for eps in (0.02, math.inf)]),
        also=[(f"off {loss}", "on seq") for loss in LOSSES if loss != "seq"],
    ),
    "frontier": Experiment(
        "Is it only slower learning? And where training is rough?",
        arms(OFF_ON, *several("lr", [3e-5, 1e-4, 3e-4])),
        also=[("off lr=3e-05", "on lr=0.0001")],
    ),
    "sensitivity": Experiment(
        "Does the headline hang on our choices?",
        arms(
            OFF_ON,
            *several("inner_steps", [1, 2, 4, 8]),
            *several("max_grad_norm", [0.15, math.inf]),
            {"kl": 0.0},
        ),
        also=[("off inner_steps=2", "on inner_steps=8")],
    ),
    "group-size": Experiment(
        "The gap over G = 2 to 16, with 64 trajectories a rollout",
        arms(OFF_ON, *[{"group_size": G, "prompts": 64 // G} for G in (2, 4, 8, 16)]),
    ),
    "mechanism": Experiment("What do the transforms do to one group?", {}),
}


def record(name: str, seeds: list, runs: Path, out: Path):
    """Train what is missing and gather it in OUT/NAME.json."""
    result = {"experiment": name, "seeds": seeds}
    if name == "mechanism":
        result |= mechanism(Config(), seeds[0])
    else:
        configs = EXPERIMENTS[name].arms
        tokrl.train_missing(configs, seeds, runs)
        result["arms"] = tokrl.finished_arms(configs, seeds, runs)
        missing = configs.keys() - result["arms"].keys()
        require(not missing, f"{name}: runs are missing of {', '.join(sorted(missing))}")
    (out / f"{name}.json").write_text(json.dumps(result) + "\n")


def mechanism(config: Config, seed: int) -> dict:
    """The group of a first rollout that breaks Eq. 2 most, and its weights after the inner steps.

    Weights times L, which under `seq` is the product of a completion's ratios.
    """
    task = TASKS[config.task]
    start = tokrl.warm_start(task, seed)
    policy = copy.deepcopy(start)
    generator = tokrl.named_generator(seed, "sampling")
    prompts, tokens, rewards = tokrl.collect(policy, task, config, generator)
    optimizer = tokrl.adamw(policy, config.lr)
    tokrl.update(policy, start, optimizer, config, prompts, tokens, rewards)
    logprobs = tokrl.token_logprobs(policy, prompts, tokens)
    old_logprobs = tokrl.token_logprobs(start, prompts, tokens)
    A = tokrl.group_advantages(rewards)
    mask = tokrl.completion_mask(tokens)
    w = tokrl.effective_weights(config.loss, logprobs, old_logprobs, A, mask, max_length=1)
    worst = tokrl.net_push(w, A)[:, 0].argmax()
    weights = {}
    for word, (kind, _) in ARMS.items():
        transformed = tokrl.transform_weights(w, A, mask, kind)
        weights[word] = transformed[worst, :, 0].tolist()
    return {
        "prompt": decode(prompts[worst]),
        "completions": [decode(row) for row in tokens[worst]],
        "advantages": A[worst].tolist(),
        "weights": weights,
    }


# ---- 2. Statistics
def t_distribution(n: int):
    """Points x and P(t < x) for n − 1 degrees of freedom: x = √ν tan θ has density cos^(ν−1) θ."""
    theta = np.linspace(-np.pi / 2, np.pi / 2, 200_001)[1:-1]
    below = np.cumsum(np.cos(theta) ** (n - 2))
    return math.sqrt(n - 1) * np.tan(theta), below / below[-1]


def t_interval(values):
    """A value per seed, (S,) -> mean; low and high of its 95% t interval; p of a mean of 0."""
    mean = np.mean(values)
    n = len(values)
    if n < 2 or math.isnan(mean):
        return mean, math.nan, math.nan, math.nan
    x, below = t_distribution(n)
    error = np.std(values, ddof=1) / math.sqrt(n)
    half = np.interp(0.975, below, x) * error
    p = 2 * np.interp(-abs(mean / error), x, below) if error > 0 else float(mean == 0)
    return mean, mean - half, mean + half, p


def holm(p_values, level: float = 0.05):
    """Which comparisons of a family survive Holm's correction: (M,) -> (M,) bool; nan is none."""
    p = np.array(p_values, dtype=float)
    order = np.argsort(p)[: np.sum(~np.isnan(p))]  # nan comes last
    survive = np.zeros(len(p), dtype=bool)
    survive[order] = np.cumprod(p[order] <= level / np.arange(len(order), 0, -1))
    return survive


# ---- 3. Tables
HEADS = {
    "solution_drift": "drift",
    "solution_entropy": "entropy",
    "accuracy": "accuracy",
    "learning_tax": "learning tax",
    "net_push": "net push",
}


def final(found: dict, label: str, measure: str):
    """One number per seed, (S,): the mean over the last quarter of training."""
    return np.array([run["final"][measure] for run in found[label]], dtype=float)


def number(x: float, measure: str, sign: str = "") -> str:
    """Three digits for accuracy, two for the rest."""
    return f"{x:{sign}.{3 if measure == 'accuracy' else 2}f}"


def markdown(columns: dict[str, list]) -> str:
    """{head: cells} -> a table; what is not defined (nan) is –."""
    lines = [" | ".join(columns), " | ".join(["---"] * len(columns))]
    for row in zip(*columns.values(), strict=True):
        lines.append(" | ".join("–" if "nan" in cell else cell for cell in row))
    return "\n".join(f"| {line} |" for line in lines)


def short_table(found: dict) -> str:
    """A row per arm, the four columns that matter: means over seeds."""
    columns = {"arm": list(found)}
    for measure in list(HEADS)[:4]:
        means = [final(found, label, measure).mean() for label in found]
        columns[HEADS[measure]] = [number(x, measure) for x in means]
    return markdown(columns)


def spread_table(found: dict) -> str:
    """A row per arm, all measures: mean ± standard deviation over seeds, lowest to highest."""
    columns = {"arm": list(found)}
    for measure, head in HEADS.items():
        columns[head] = []
        for label in found:
            values = final(found, label, measure)
            numbers = (values.mean(), values.std(ddof=1), values.min(), values.max())
            mean, spread, low, high = (number(x, measure) for x in numbers)
            columns[head].append(f"{mean} ± {spread}, {low} to {high}")
    return markdown(columns)


def pairs_table(found: dict, pairs: list) -> str:
    """A row per pair: difference by seed with its 95% t interval, * where it survives Holm's
    correction over its column; in the end the geometric mean of the ratios of drifts."""
    columns = {f"{len(pairs)} pairs": [f"{a} − {b}" for a, b in pairs]}
    for measure, head in HEADS.items():
        differences = [final(found, a, measure) - final(found, b, measure) for a, b in pairs]
        intervals = [t_interval(np.round(x, 5)) for x in differences]  # below that it is rounding
        survive = holm([p for _, _, _, p in intervals])
        columns[head] = []
        for (mean, low, high, _), star in zip(intervals, survive, strict=True):
            mean, low, high = (number(x, measure, "+") for x in (mean, low, high))
            columns[head].append(f"{mean} [{low}, {high}]" + "*" * bool(star))
    columns["ratio of drifts"] = []
    for a, b in pairs:
        drifts = final(found, a, "solution_drift"), final(found, b, "solution_drift")
        mean, low, high = np.exp(t_interval(np.log(drifts[0] / drifts[1]))[:3])
        columns["ratio of drifts"].append(f"{mean:.2f} [{low:.2f}, {high:.2f}]")
    return markdown(columns)


def report(result: dict) -> str:
    """What the page says of an experiment: command, figure, tables."""
    name = result["experiment"]
    experiment = EXPERIMENTS[name]
    image = f"![{experiment.question}]({name}.png)"
    parts = [f"`python -m figures.experiments {name}`", image]
    if name == "mechanism":
        return "\n\n".join(parts)
    found = result["arms"]
    parts.append(short_table(found))
    if len(result["seeds"]) > 1:
        parts.append("<details><summary>Spread over seeds, and differences by seed</summary>")
        parts += [spread_table(found), pairs_table(found, experiment.pairs()), "</details>"]
    if name == "failure-modes":
        for label, runs in found.items():
            parts.append(f"{label}, seed 0, 100 samples:\n\n```\n{runs[0]['samples']}\n```")
    return "\n\n".join(parts)


def insert(page: str, name: str, text: str) -> str:
    """The page with `text` between its marks of NAME."""
    first = f"<!-- {name} -->\n"
    last = f"<!-- end of {name} -->\n"
    require(page.count(first) == page.count(last) == 1, f"README.md lacks the marks of {name}")
    before, _, rest = page.partition(first)
    _, _, after = rest.partition(last)
    return f"{before}{first}\n{text}\n\n{last}{after}"


# ---- 4. Figures
def plain(panel, title: str):
    """A title, and no more lines than needed."""
    panel.set_title(title, fontsize=11)
    panel.spines[["top", "right"]].set_visible(False)


def draw_measure(panel, found: dict, measure: str):
    """A row per arm: each seed as a faint dot, the mean with its 95% t interval."""
    for row, label in enumerate(found):
        values = final(found, label, measure)
        _, colour = ARMS[label.split()[0]]
        mean, low, high, _ = t_interval(values)
        panel.plot(values, [row] * len(values), "o", color=colour, alpha=0.25, ms=4, mew=0)
        panel.plot([low, mean, high], [row] * 3, "-o", color=colour, markevery=[1])
    panel.grid(axis="x", color="0.9")
    panel.set_axisbelow(True)


def draw_dots(found: dict, path: Path):
    """All measures but net push, side by side."""
    size = (9, 1.2 + 0.27 * len(found))
    figure = matplotlib.figure.Figure(figsize=size, dpi=150, layout="constrained")
    measures = list(HEADS)[:4]
    panels = figure.subplots(1, len(measures), sharey=True)
    for panel, measure in zip(panels, measures, strict=True):
        draw_measure(panel, found, measure)
        plain(panel, MEASURES[measure])
    panels[0].set_yticks(range(len(found)), labels=list(found), fontsize=10)
    panels[0].invert_yaxis()
    figure.savefig(path)


def draw_ablation(found: dict, path: Path):
    """Left, the tokens of 7+5=12 and at which of them the weights are changed; right, drift."""
    size = (9, 1.2 + 0.27 * len(found))
    figure = matplotlib.figure.Figure(figsize=size, dpi=150, layout="constrained")
    where, drift, accuracy = figure.subplots(1, 3, sharey=True, width_ratios=[1.3, 2, 1.3])
    text = "7+5=12."
    for row, label in enumerate(found):
        word = label.split()[0]
        for place, character in enumerate(text):
            acts = "shared" if place < 2 else "rest"
            changed = word != "off" and not (" at " in label and acts not in label)
            colour = ARMS[word][1] if changed else "white"
            where.barh(row, 0.9, left=place, color=colour, edgecolor="0.7", height=0.8, lw=0.6)
            ink = "white" if changed else "0.4"
            where.text(place + 0.45, row, character, ha="center", va="center", color=ink)
    plain(where, "weights changed at\nshared 7+ | rest")
    where.set_xticks([])
    where.spines[["left", "bottom"]].set_visible(False)
    where.tick_params(axis="y", length=0)
    for panel, measure in ((drift, "solution_drift"), (accuracy, "accuracy")):
        draw_measure(panel, found, measure)
        plain(panel, MEASURES[measure])
    drift.set_xlim(left=0)
    where.set_yticks(range(len(found)), labels=list(found), fontsize=10)
    where.invert_yaxis()
    figure.savefig(path)


def draw_mechanism(result: dict, path: Path):
    """A row per trajectory with its advantage; under each transform its weight and its push Â w."""
    figure = matplotlib.figure.Figure(figsize=(9, 4.5), dpi=150, layout="constrained")
    A = np.array(result["advantages"])
    panels = figure.subplots(1, len(ARMS), sharex=True, sharey=True)
    for panel, (word, (_, colour)) in zip(panels, ARMS.items(), strict=True):
        w = np.array(result["weights"][word])
        panel.barh(range(len(A)), w, color=colour, alpha=0.35)
        panel.barh(range(len(A)), A * w, height=0.3, color=colour)
        panel.axvline(0, color="0.3", lw=0.8)
        plain(panel, f"{word}\nmean push {np.mean(A * w):+.2f}")
    rows = zip(result["completions"], A, strict=True)
    panels[0].set_yticks(range(len(A)), labels=[f"{text}   Â {a:+.2f}" for text, a in rows])
    panels[0].invert_yaxis()
    title = f"Prompt {result['prompt']}, shared token: product of ratios (light), push (dark)"
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def show(name: str, out: Path):
    """Draw OUT/NAME.json, print its tables, and write them into OUT/README.md."""
    result = json.loads((out / f"{name}.json").read_text())
    path = out / f"{name}.png"
    if name == "mechanism":
        draw_mechanism(result, path)
    elif name == "failure-modes":
        tokrl.draw_failure_modes(result["arms"], path)
    elif name == "ablation":
        draw_ablation(result["arms"], path)
    else:
        draw_dots(result["arms"], path)
    text = report(result)
    print(f"\n## {name}\n\n{text}")
    page = out / "README.md"
    if page.exists():
        page.write_text(insert(page.read_text(encoding="utf-8"), name, text), encoding="utf-8")


def run(args):
    """Record the experiments that are named, or only show what there is."""
    require(args.name or args.plot, f"which experiment? {', '.join(EXPERIMENTS)}, all, or --plot")
    ours = args.out.resolve() == HERE and not args.plot
    reason = "figures/ holds the results of seeds 0-7: choose another --out for other seeds"
    require(args.seeds == SEEDS or not ours, reason)
    args.runs.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in list(EXPERIMENTS) if args.name in (None, "all") else [args.name]:
        if not args.plot:
            record(name, args.seeds, args.runs, args.out)
        if (args.out / f"{name}.json").exists():
            show(name, args.out)


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 with one line for bad input, 130 after Ctrl-C."""
    parser = ArgumentParser("figures.experiments", description=__doc__.splitlines()[0])
    parser.error = partial(require, False)  # one line, as for all bad input
    parser.add_argument("name", nargs="?", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("--plot", action="store_true", help="only tables and figures, no training")
    parser.add_argument("--seeds", type=tokrl.seed_range, default=SEEDS, help="default 0-7")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept")
    parser.add_argument("--out", type=Path, default=HERE, help="where results go")
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"figures.experiments: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The same command continues with what is missing.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
