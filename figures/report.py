"""From runs to what the page shows: statistics, tables, dot plots. Nothing here trains.

`found` is {label of an arm: its runs, one per seed}.
"""

import itertools
import math
from pathlib import Path

import numpy as np

from tokrl import COLORS, MEASURES, new_figure

HEADS = {  # measures as the tables name them
    "solution_drift": "drift",
    "solution_entropy": "entropy",
    "accuracy": "accuracy",
    "net_push": "net push",
}
MAIN = list(HEADS)[:3]


# ---- 1. Statistics
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


# ---- 2. Tables
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
    """A row per arm, the three columns that matter: means over seeds."""
    columns = {"arm": list(found)}
    for measure in MAIN:
        means = [final(found, label, measure).mean() for label in found]
        columns[HEADS[measure]] = [number(x, measure) for x in means]
    return markdown(columns)


def spread_table(found: dict) -> str:
    """A row per arm, all measures: mean ± standard deviation over seeds, lowest to highest."""
    columns = {"arm": list(found)}
    for measure, head in HEADS.items():
        columns[head] = []
        for label in found:
            x = final(found, label, measure)
            numbers = (x.mean(), x.std(ddof=1), x.min(), x.max())
            mean, spread, low, high = (number(x, measure) for x in numbers)
            columns[head].append(f"{mean} ± {spread}, {low} to {high}")
    return markdown(columns)


def compare(found: dict, a: str, b: str, measure: str):
    """t_interval of a − b by seed; of drifts, whose scale differs by seed, it is log(a / b)."""
    x = final(found, a, measure)
    y = final(found, b, measure)
    difference = np.log(x / y) if measure == "solution_drift" else x - y
    return t_interval(np.round(difference, 5))  # what is smaller is rounding


def pairs_table(found: dict, pairs: list) -> str:
    """A row per pair: ratio of drifts and differences, with 95% t intervals.

    A * marks what survives Holm's correction over its column.
    """
    columns = {f"{len(pairs)} pairs: a, b": [f"{a}, {b}" for a, b in pairs]}
    for measure, head in HEADS.items():
        intervals = [compare(found, a, b, measure) for a, b in pairs]
        survive = holm([p for *_, p in intervals])
        cells = []
        for (*interval, _), star in zip(intervals, survive, strict=True):
            if measure == "solution_drift":
                mean, low, high = (f"{x:.2f}" for x in np.exp(interval))
            else:
                mean, low, high = (number(x, measure, "+") for x in interval)
            cells.append(f"{mean} [{low}, {high}]" + "*" * bool(star))
        columns[f"{head} a / b" if measure == "solution_drift" else f"{head} a − b"] = cells
    return markdown(columns)


# ---- 3. Figures
def bare(panel, title: str):
    """A title, and no more lines than needed."""
    panel.set_title(title, fontsize=11)
    panel.spines[["top", "right"]].set_visible(False)


def color_of(runs: list) -> str:
    """The color of an arm's transform; gray for a function."""
    return COLORS.get(runs[0]["config"]["transform"], "0.4")


def rows_of(found: dict) -> list[float]:
    """Where each arm stands, from the top down: a gap sets arms of the same settings apart."""
    configs = [runs[0]["config"] | {"transform": "", "at": ""} for runs in found.values()]
    rows = []
    row = 0.0
    before = 1
    for _, same in itertools.groupby(configs):
        arms = len(list(same))
        if rows and max(before, arms) > 1:
            row += 0.6
        for _ in range(arms):
            rows.append(row)
            row += 1
        before = arms
    return rows


def arms_figure(found: dict, columns: int, **options):
    """A figure with a row per arm, named at the left, and panels side by side."""
    rows = rows_of(found)
    figure = new_figure(7, 1 + 0.24 * (rows[-1] + 1))
    panels = figure.subplots(1, columns, sharey=True, **options)
    panels[0].set_yticks(rows, labels=list(found))
    panels[0].invert_yaxis()
    return figure, panels


def draw_measure(panel, found: dict, measure: str):
    """A row per arm: each seed as a faint dot, the mean with its 95% t interval."""
    for row, runs, label in zip(rows_of(found), found.values(), found, strict=True):
        values = final(found, label, measure)
        mean, low, high, _ = t_interval(values)
        color = color_of(runs)
        panel.plot(values, [row] * len(values), "o", color=color, alpha=0.25, ms=4, mew=0)
        panel.plot([low, mean, high], [row] * 3, "-o", color=color, markevery=[1], ms=5)
    panel.set_xlim(0, None if measure == "solution_drift" else 1.02)
    panel.grid(axis="x", color="0.9")
    panel.set_axisbelow(True)
    bare(panel, MEASURES[measure])


def draw_dots(found: dict, path: Path):
    """All measures but net push, side by side."""
    figure, panels = arms_figure(found, len(MAIN))
    for panel, measure in zip(panels, MAIN, strict=True):
        draw_measure(panel, found, measure)
    figure.savefig(path)


def draw_ablation(found: dict, path: Path):
    """Left, at which tokens of an example the weights are changed; right, drift and accuracy."""
    figure, (where, drift, accuracy) = arms_figure(found, 3, width_ratios=[1.5, 2, 1.6])
    shared = "7+5="  # forked: 7+; that all go on with 5= is chance
    for row, runs in zip(rows_of(found), found.values(), strict=True):
        config = runs[0]["config"]
        for place, character in enumerate("7+5=12."):
            acts = "shared" if place < len(shared) else "rest"
            changed = config["transform"] != "off" and config["at"] in ("all", acts)
            color = color_of(runs) if changed else "white"
            where.barh(row, 0.9, left=place, color=color, edgecolor="0.7", height=0.8, lw=0.6)
            ink = "white" if changed else "0.4"
            where.text(place + 0.45, row, character, ha="center", va="center", color=ink)
    bare(where, f"weights changed,\nif all share {shared}")
    where.set_xticks([])
    where.spines[["left", "bottom"]].set_visible(False)
    where.tick_params(axis="y", length=0)
    draw_measure(drift, found, "solution_drift")
    draw_measure(accuracy, found, "accuracy")
    figure.savefig(path)


def draw_dose(found: dict, path: Path):
    """Drift over the factor c of the weights at shared tokens: seeds faint, mean with interval."""
    figure = new_figure(7, 3.4)
    panel = figure.subplots()
    arms = {1.0: "off"}
    for label in found:
        if label.startswith("scale="):
            arms[float(label.split()[0].removeprefix("scale="))] = label
    doses = sorted(arms)
    drifts = np.array([final(found, arms[c], "solution_drift") for c in doses])  # (doses,S)
    panel.plot(doses, drifts, "-", color=COLORS["off"], alpha=0.2)
    draw_interval(panel, doses, drifts, "-o", COLORS["off"], "each weight times c")
    coin = final(found, "random-sign at shared", "solution_drift")
    panel.plot([1] * len(coin), coin, "s", color="0.3", alpha=0.25, ms=4, mew=0)
    draw_interval(panel, [1], coin[None], "s", "0.3", "as c = 1, with a random sign")
    bare(panel, "solution drift, nats (lower is better)")
    panel.set_xlabel("c, the factor of the weights at shared tokens (0: no policy loss there)")
    panel.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path)


def draw_interval(panel, x, values, style: str, color: str, label: str):
    """The mean of each row of values (N,S), with its 95% t interval."""
    intervals = np.array([t_interval(row)[:3] for row in values])  # (N,3)
    mean = intervals[:, 0]
    error = np.abs(intervals[:, 1:].T - mean)  # (2,N)
    panel.errorbar(x, mean, error, fmt=style, color=color, label=label, ms=5, capsize=3)
