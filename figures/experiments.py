"""The evidence: experiments of many runs, with their tables and figures.

    python -m figures.experiments ablation    train what is missing, then table and figure
    python -m figures.experiments all         every experiment: about two hours on two cores
    python -m figures.experiments --plot      tables and figures again, without training

From the project's root. Runs are kept in RUNS as those of tokrl.py are, and shared by experiments
that need the same one. An experiment gathers its runs in OUT/NAME.json. From that file alone come
OUT/NAME.png and the tables, which go into OUT/README.md (written by people) between the marks of
NAME.
"""

import json
import math
import sys
from argparse import ArgumentParser
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.figure
import numpy as np

import tokrl
from figures import groups
from tokrl import COLOURS, LOSSES, MEASURES, Config

HERE = Path(__file__).resolve().parent
SEEDS = list(range(8))


# ---- 1. The experiments
@dataclass(frozen=True)
class Experiment:
    """A question, and the arms that answer it.

    Each arm is compared with `off` under the same settings, and beside these the pairs `also`; all
    of them are one family for Holm's correction. The page shows the answers of the arms `answers`.
    """

    question: str
    arms: dict[str, Config]
    also: tuple = ()
    answers: tuple = ()

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
            kind = "min" if transform == "on" else transform
            config = Config(transform=kind, at=place or "all", **settings)
            found[" ".join([word, *names])] = config
    return found


def several(key: str, values) -> list[dict]:
    """One setting with several values."""
    return [{key: value} for value in values]


OFF = ["off"]
OFF_ON = ["off", "on"]
PLACES = ["off", "on", "on at shared", "on at rest"]
HABIT = {"task": "habit"}
SHARE = {"duplicates": "share"}
EXPERIMENTS = {
    "failure-modes": Experiment(
        "Does the paper's method stop the three failure modes?",
        arms(["off", "on", "orth"], {}),
        answers=("off", "on", "orth"),
    ),
    "ablation": Experiment(
        "What does it: cancellation at the shared tokens, or something else?",
        arms([*PLACES, "orth", "orth at shared", "orth at rest"], {})
        | arms(PLACES, {"loss": "gspo"}),
        also=(
            ("on", "on at shared"),
            ("on at shared", "orth at shared"),
            ("on gspo", "on at shared gspo"),
        ),
    ),
    "chance": Experiment(
        "What is left where groups share an opening by chance, as a language model's do?",
        arms([*PLACES, "orth"], {"fork": 0})
        | arms(OFF, {"fork": 0, "loss": "prefix"})
        | arms(OFF_ON, {"fork": 0} | SHARE)
        | arms(["off", "on", "on at shared"], HABIT)
        | arms(OFF, HABIT | {"loss": "prefix"})
        | arms(OFF_ON, HABIT | SHARE)
        | arms(OFF_ON, HABIT | {"fork": 2}),
        also=(
            ("off fork=0", "off fork=0 prefix"),
            ("off fork=0", "off fork=0 share"),
            ("off habit", "off habit prefix"),
            ("off habit", "off habit share"),
        ),
        answers=("off habit", "on habit", "off habit share"),
    ),
    "sharing": Experiment("How much of a gradient comes from shared tokens?", {}),
    "price": Experiment(
        "Why does accuracy suffer on some tasks?",
        arms(PLACES, {"task": "add"})
        | arms(OFF_ON, {"task": "add", "fork": 0})
        | arms(PLACES, {"task": "split"})
        | arms(OFF_ON, {"task": "split", "fork": 0}),
    ),
    "tasks": Experiment(
        "Does it hold elsewhere, and does a loss that cancels by itself do as well?",
        arms(["off", "on"], *several("task", ["commute", "split", "chain", "add"]))
        | arms(["on at shared", "on at rest"], {"task": "chain"})
        | arms(OFF, *[{"loss": "prefix", "task": x} for x in ("commute", "split", "chain", "add")]),
        also=(
            *[(f"off {x}", f"off prefix {x}") for x in ("commute", "split", "chain", "add")],
            ("on chain", "on at shared chain"),
        ),
    ),
    "long": Experiment(
        "Does it only delay? 1,200 rollouts in place of 400",
        arms(OFF_ON, *[{"task": task, "steps": 1200} for task in ("commute", "add", "split")])
        | arms(OFF_ON, {"steps": 1200, "kl": 0.0}),
    ),
    "losses": Experiment(
        "Which losses drift, and is DFPO (on seq) better than they are?",
        arms(OFF, *several("loss", LOSSES))
        | arms(["on"], *several("loss", ["seq", "gspo", "grpo"]))
        | arms(OFF, *[{"loss": "gspo", "clip_eps": eps} for eps in (0.02, math.inf)]),
        also=tuple((f"off {loss}", "on seq") for loss in LOSSES if loss != "seq"),
    ),
    "frontier": Experiment(
        "Is it only slower learning? And where training is rough?",
        arms(OFF_ON, *several("lr", [3e-5, 1e-4, 3e-4])),
        also=(("off lr=3e-05", "on lr=0.0001"),),
    ),
    "sensitivity": Experiment(
        "Does the headline hang on our choices?",
        arms(OFF_ON, *several("inner_steps", [1, 2, 4, 8]))
        | arms(OFF, {"inner_steps": 2, "steps": 1600})
        | arms(OFF_ON, *several("max_grad_norm", [0.15, math.inf]), {"kl": 0.0}),
        also=(
            ("off inner_steps=2", "on inner_steps=8"),
            ("off inner_steps=2 steps=1600", "on inner_steps=8"),
        ),
    ),
    "group-size": Experiment(
        "The gap over G = 2 to 16, with 64 trajectories a rollout",
        arms(OFF_ON, *[{"group_size": G, "prompts": 64 // G} for G in (2, 4, 8, 16)]),
    ),
    "mechanism": Experiment("What do the transforms do to one group?", {}),
}


# ---- 2. Recording
def record(name: str, seeds: list, runs: Path, out: Path):
    """Train what is missing and gather it in OUT/NAME.json. ValueError: a run failed."""
    result = {"experiment": name, "seeds": seeds}
    if name == "mechanism":
        result |= groups.record_mechanism(seeds)
    elif name == "sharing":
        result |= groups.record_sharing(seeds)
    else:
        configs = EXPERIMENTS[name].arms
        tokrl.train_missing(configs, seeds, runs)
        result["arms"] = tokrl.finished_arms(configs, seeds, runs)
        missing = configs.keys() - result["arms"].keys()
        if missing:
            raise ValueError(f"{name}: runs are missing of {', '.join(sorted(missing))}")
    (out / f"{name}.json").write_text(json.dumps(result) + "\n")


# ---- 3. Statistics
def t_distribution(n: int):
    """Points x and P(t < x) for n − 1 degrees of freedom: x = √ν tan θ has density cos^(ν−1) θ."""
    theta = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    middle = (theta[1:] + theta[:-1]) / 2
    below = np.cumsum(np.cos(middle) ** (n - 2))
    return math.sqrt(n - 1) * np.tan(theta[1:-1]), below[:-1] / below[-1]


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


# ---- 4. Tables
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
    """Three digits for accuracy and entropy, two for the rest."""
    return f"{x:{sign}.{3 if measure in ('accuracy', 'solution_entropy') else 2}f}"


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
    if name == "sharing":
        parts.append(markdown(groups.sharing_columns(result)))
    if "arms" not in result:
        return "\n\n".join(parts)
    found = result["arms"]
    parts.append(short_table(found))
    for label in experiment.answers:
        run = found[label][0]
        parts.append(f"{label}, seed {run['seed']}:\n\n```\n{run['answers']}\n```")
    if len(result["seeds"]) > 1:
        parts.append("<details><summary>Spread over seeds, and differences by seed</summary>")
        parts += [spread_table(found), pairs_table(found, experiment.pairs()), "</details>"]
    return "\n\n".join(parts)


def insert(page: str, name: str, text: str) -> str:
    """The page with `text` between its marks of NAME."""
    first = f"<!-- {name} -->\n"
    last = f"<!-- end of {name} -->\n"
    if not page.count(first) == page.count(last) == 1:
        raise ValueError(f"README.md lacks the marks of {name}")
    before, _, rest = page.partition(first)
    _, _, after = rest.partition(last)
    return f"{before}{first}\n{text}\n\n{last}{after}"


# ---- 5. Figures
def plain(panel, title: str):
    """A title, and no more lines than needed."""
    panel.set_title(title, fontsize=11)
    panel.spines[["top", "right"]].set_visible(False)


def colour_of(runs: list) -> str:
    """That of the transform of an arm."""
    return COLOURS[runs[0]["config"]["transform"]]


def draw_measure(panel, found: dict, measure: str):
    """A row per arm: each seed as a faint dot, the mean with its 95% t interval."""
    for row, (label, runs) in enumerate(found.items()):
        values = final(found, label, measure)
        mean, low, high, _ = t_interval(values)
        colour = colour_of(runs)
        panel.plot(values, [row] * len(values), "o", color=colour, alpha=0.25, ms=4, mew=0)
        panel.plot([low, mean, high], [row] * 3, "-o", color=colour, markevery=[1])
    panel.grid(axis="x", color="0.9")
    panel.set_axisbelow(True)
    plain(panel, MEASURES[measure])


def draw_dots(found: dict, path: Path):
    """All measures but net push, side by side."""
    size = (9, 1.2 + 0.27 * len(found))
    figure = matplotlib.figure.Figure(figsize=size, dpi=150, layout="constrained")
    measures = list(HEADS)[:4]
    panels = figure.subplots(1, len(measures), sharey=True)
    for panel, measure in zip(panels, measures, strict=True):
        draw_measure(panel, found, measure)
    panels[0].set_yticks(range(len(found)), labels=list(found), fontsize=10)
    panels[0].invert_yaxis()
    figure.savefig(path)


def draw_ablation(found: dict, path: Path):
    """Left, at which tokens of an example the weights are changed; right, drift and accuracy."""
    size = (9, 1.2 + 0.27 * len(found))
    figure = matplotlib.figure.Figure(figsize=size, dpi=150, layout="constrained")
    where, drift, accuracy = figure.subplots(1, 3, sharey=True, width_ratios=[1.3, 2, 1.3])
    shared = "7+5="  # forked: 7+; that all go on with 5= is chance
    for row, runs in enumerate(found.values()):
        config = runs[0]["config"]
        for place, character in enumerate("7+5=12."):
            acts = "shared" if place < len(shared) else "rest"
            changed = config["transform"] != "off" and config["at"] in ("all", acts)
            colour = colour_of(runs) if changed else "white"
            where.barh(row, 0.9, left=place, color=colour, edgecolor="0.7", height=0.8, lw=0.6)
            ink = "white" if changed else "0.4"
            where.text(place + 0.45, row, character, ha="center", va="center", color=ink)
    plain(where, f"weights changed, in a group\nin which all begin with {shared}")
    where.set_xticks([])
    where.spines[["left", "bottom"]].set_visible(False)
    where.tick_params(axis="y", length=0)
    draw_measure(drift, found, "solution_drift")
    draw_measure(accuracy, found, "accuracy")
    drift.set_xlim(left=0)
    where.set_yticks(range(len(found)), labels=list(found), fontsize=10)
    where.invert_yaxis()
    figure.savefig(path)


def show(name: str, out: Path) -> str:
    """Draw OUT/NAME.json, write its tables into OUT/README.md, and return them."""
    path = out / f"{name}.json"
    try:
        result = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} is damaged: record {name} again") from None
    picture = path.with_suffix(".png")
    if name == "mechanism":
        groups.draw_mechanism(result, picture)
    elif name == "sharing":
        groups.draw_sharing(result, picture)
    elif name == "failure-modes":
        tokrl.draw_failure_modes(result["arms"], picture)
    elif name == "ablation":
        draw_ablation(result["arms"], picture)
    else:
        draw_dots(result["arms"], picture)
    text = report(result)
    page = out / "README.md"
    if page.exists():
        page.write_text(insert(page.read_text(encoding="utf-8"), name, text), encoding="utf-8")
    return f"## {name}\n\n{text}\n"


# ---- 6. The command line
def run(args):
    """Record the experiments that are named, or only show what there is."""
    names = list(EXPERIMENTS) if args.name in (None, "all") else [args.name]
    if not args.plot:
        if args.name is None:
            raise ValueError(f"which experiment? {', '.join(EXPERIMENTS)}, all, or --plot")
        if args.out.resolve() == HERE and args.seeds != SEEDS:
            raise ValueError("figures/ holds seeds 0-7: choose another --out for other seeds")
        args.runs.mkdir(parents=True, exist_ok=True)
        args.out.mkdir(parents=True, exist_ok=True)
        for name in names:
            record(name, args.seeds, args.runs, args.out)
    texts = [show(name, args.out) for name in names]
    print("\n".join(texts))  # after all is written: "| head" may stop it


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 where runs failed, 2 for bad input, 130 after Ctrl-C."""
    parser = ArgumentParser("figures.experiments", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("--plot", action="store_true", help="only tables and figures, no training")
    parser.add_argument("--seeds", type=tokrl.seed_range, default=SEEDS, help="default 0-7")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept")
    parser.add_argument("--out", type=Path, default=HERE, help="where results go")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("\nStopped. The same command continues with what is missing.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console without "−" shows "?"
    sys.exit(main())
