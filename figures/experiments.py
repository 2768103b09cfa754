"""The evidence: experiments of many runs, with their tables and figures.

    python -m figures.experiments ablation    train what is missing, then table and figure
    python -m figures.experiments all         every experiment: two to three hours on two cores
    python -m figures.experiments --plot      tables and figures again, without training

Run it from the project's root. It trains on all cores. Runs go into runs/, as with tokrl.py;
experiments that need the same run share it. (After an edit of a function arm, below,
start with another --runs: the name of a run's file depends on tokrl.py and toy_tasks.py only.)

An experiment gathers its runs in OUT/NAME.json. OUT/NAME.png and the tables are made from that file
alone. The tables go into OUT/README.md, which people write, between the marks of NAME.
"""

import io
import json
import os
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from pathlib import Path

from tqdm import tqdm

import tokrl
from figures import groups, report
from tokrl import LOSSES, TASKS, Config

HERE = Path(__file__).resolve().parent
SEEDS = list(range(8))


# ---- 1. Transforms that are functions; their repr names them in a run's file
@dataclass(frozen=True)
class Scale:
    """Each weight times c: what does not cancel is c times as large."""

    c: float

    def __call__(self, w, A, mask):
        return self.c * w


@dataclass(frozen=True)
class RandomSign:
    """All weights of a group times 1 or −1: what does not cancel keeps its size.

    A group's last binary digits toss the coin, so that a seed still gives the same bits.
    """

    def __call__(self, w, A, mask):
        digits = (w.double().sum((1, 2), keepdim=True) * 2**24).long()  # (B,1,1)
        return w * (1 - 2 * (digits % 2))


@dataclass(frozen=True)
class Shrink:
    """w_i · min_j w_j / mean_j w_j: unequal weights, whose mean is Min-Replace's weight."""

    def __call__(self, w, A, mask):
        least = w.masked_fill(~mask, float("inf")).amin(1, keepdim=True)  # (B,1,T)
        return w * least / GroupMean()(w, A, mask)


@dataclass(frozen=True)
class GroupMean:
    """mean_j w_j for all: equal weights, whose mean is that of the loss itself."""

    def __call__(self, w, A, mask):
        return (w.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).expand_as(w)


FUNCTIONS = {"on": "min", "shrink": Shrink(), "mean": GroupMean(), "random-sign": RandomSign()}


# ---- 2. Arms are named for their settings
def config_of(label: str) -> Config:
    """ "on at shared add lr=3e-5" -> Config(transform="min", at="shared", task="add", lr=3e-5).

    "scale=0.1 at shared" -> Config(transform=Scale(0.1), at="shared").
    """
    transform, *words = label.replace(" at ", " at=").split()
    settings = {"transform": FUNCTIONS.get(transform, transform)}
    if transform.startswith("scale="):
        settings["transform"] = Scale(float(transform.removeprefix("scale=")))
    kinds = {f.name: f.type for f in fields(Config)}
    for word in words:
        key, equals, value = word.partition("=")
        if key == "G":  # always 64 completions a rollout
            settings |= {"group_size": int(value), "prompts": 64 // int(value)}
        elif equals:
            settings[key] = kinds[key](value)
        elif word in TASKS:
            settings["task"] = word
        elif word in LOSSES:
            settings["loss"] = word
        else:
            settings["duplicates"] = word
    return Config(**settings)


@dataclass(frozen=True)
class Experiment:
    """A question, and the arms that answer it; or a look at single groups (groups.py).

    Each arm is compared with `off` under the same settings, and then come the pairs `also`. All of
    them are one family for Holm's correction. The page shows the answers of the arms `answers`.
    """

    question: str
    arms: tuple[str, ...] = ()
    also: tuple[tuple[str, str], ...] = ()
    answers: tuple[str, ...] = ()
    draw: Callable = report.draw_dots
    look: Callable | None = None  # (seeds, on_all_cores) -> what to keep, in place of runs

    def configs(self) -> dict[str, Config]:
        return {label: config_of(label) for label in self.arms}

    def pairs(self) -> list[tuple[str, str]]:
        """(label, label) of all comparisons."""
        labels = {config: label for label, config in self.configs().items()}
        found = []
        for config, label in labels.items():
            off = labels.get(replace(config, transform="off"))
            if off not in (None, label):
                found.append((off, label))
        return [*found, *self.also]


def arms(words, *settings: str) -> tuple[str, ...]:
    """Each of the words under each of the settings."""
    return tuple(f"{word} {setting}".strip() for setting in settings for word in words)


OFF = ["off"]
ON = ["on"]
OFF_ON = ["off", "on"]
PLACES = ["off", "on", "on at shared", "on at rest"]
FOUR = ("commute", "split", "chain", "add")
APART = ["off", "on", "on at shared", "shrink", "mean", "off lr=5e-05"]  # what of on acts?
EXPERIMENTS = {
    "failure-modes": Experiment(
        "Does the paper's method stop the three failure modes?",
        ("off", "on", "orth"),
        answers=("off", "on", "orth"),
        draw=tokrl.draw_failure_modes,
    ),
    "ablation": Experiment(
        "Where does it act: at the shared tokens, or at the others?",
        (*PLACES, "orth", "orth at shared", "orth at rest", *arms(PLACES, "gspo")),
        also=(
            ("on", "on at shared"),
            ("on at shared", "orth at shared"),
            ("on gspo", "on at shared gspo"),
        ),
        draw=report.draw_ablation,
    ),
    "choice": Experiment(
        "Is it enough that a group is forked, or must the fork hold the choice?",
        arms(OFF_ON, "fork=1", "late fork=1", "late fork=3"),
    ),
    "dose": Experiment(
        "How small must the push at shared tokens be?",
        ("off", *[f"scale={c} at shared" for c in (0.5, 0.2, 0.1, 0.05, 0)])
        + ("random-sign at shared",),
        also=tuple((f"scale={c} at shared", "scale=0 at shared") for c in (0.5, 0.2, 0.1, 0.05)),
        draw=report.draw_dose,
    ),
    "chance": Experiment(
        "What is left where groups share an opening by chance, as a language model's do?",
        arms([*PLACES, "orth"], "fork=0")
        + arms(OFF, "fork=0 prefix")
        + arms(OFF_ON, "fork=0 share")
        + arms(["off", "on", "on at shared"], "habit")
        + arms(OFF, "habit prefix")
        + arms(OFF_ON, "habit share", "habit fork=2"),
        also=(
            ("off fork=0", "off fork=0 prefix"),
            ("off fork=0", "off fork=0 share"),
            ("off habit", "off habit prefix"),
            ("off habit", "off habit share"),
        ),
        answers=("off habit", "on habit", "off habit share"),
    ),
    "group-size": Experiment(
        "How does the gap depend on G, with 64 completions a rollout?",
        arms(OFF_ON, "G=2", "G=4", "G=8", "G=16")
        + arms(APART, "fork=0 G=2")
        + arms(OFF_ON, "fork=0 G=4")
        + arms(APART, "fork=0 G=8")
        + arms(OFF_ON, "fork=0 G=16"),
        also=(
            ("off fork=0 G=2", "off lr=5e-05 fork=0 G=2"),
            ("on at shared fork=0 G=2", "on fork=0 G=2"),
            ("on fork=0 G=2", "off lr=5e-05 fork=0 G=2"),
            ("on fork=0 G=2", "shrink fork=0 G=2"),
            ("off fork=0 G=8", "off lr=5e-05 fork=0 G=8"),
            ("on at shared fork=0 G=8", "on fork=0 G=8"),
            ("on fork=0 G=8", "off lr=5e-05 fork=0 G=8"),
            ("on fork=0 G=8", "shrink fork=0 G=8"),
        ),
    ),
    "sharing": Experiment(
        "How much of a gradient comes from shared tokens?",
        draw=groups.draw_sharing,
        look=groups.record_sharing,
    ),
    "price": Experiment(
        "Why does accuracy suffer on some tasks?",
        arms(PLACES, "add")
        + arms(OFF_ON, "add fork=0")
        + arms(PLACES, "split")
        + arms(OFF_ON, "split fork=0"),
    ),
    "tasks": Experiment(
        "Does it hold elsewhere, and does a loss that cancels by itself do as well?",
        arms(OFF_ON, *FOUR)
        + arms(["on at shared", "on at rest"], "chain")
        + arms(["off prefix"], *FOUR),
        also=(
            *[(f"off {x}", f"off prefix {x}") for x in FOUR],
            ("on chain", "on at shared chain"),
        ),
    ),
    "long": Experiment(
        "Does it only delay? 1,200 rollouts in place of 400",
        arms(OFF_ON, "commute steps=1200", "add steps=1200", "split steps=1200")
        + arms(OFF_ON, "steps=1200 kl=0"),
    ),
    "losses": Experiment(
        "Which losses drift, and is DFPO (on seq) better than they are?",
        arms(OFF, *LOSSES)
        + arms(ON, "seq", "gspo", "grpo")
        + arms(OFF, "gspo clip_eps=0.02", "gspo clip_eps=inf"),
        also=tuple((f"off {loss}", "on seq") for loss in LOSSES if loss != "seq"),
    ),
    "frontier": Experiment(
        "Is it only slower learning? And where training is rough?",
        arms(OFF_ON, "lr=3e-05", "lr=0.0001", "lr=0.0003"),
        also=(("off lr=3e-05", "on lr=0.0001"),),
    ),
    "sensitivity": Experiment(
        "Does the main result depend on our choices?",
        arms(OFF_ON, "inner_steps=1", "inner_steps=2", "inner_steps=4", "inner_steps=8")
        + arms(OFF, "inner_steps=2 steps=1600")
        + arms(OFF_ON, "max_grad_norm=0.15", "max_grad_norm=inf", "kl=0"),
        also=(
            ("off inner_steps=2", "on inner_steps=8"),
            ("off inner_steps=2 steps=1600", "on inner_steps=8"),
        ),
    ),
    "mechanism": Experiment(
        "What do the transforms do to one group?",
        draw=groups.draw_mechanism,
        look=groups.record_mechanism,
    ),
}


# ---- 3. Recording
def start_worker():
    """In a process of its own: Ctrl-C ends it at once, and only the parent's bar is shown."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdout = sys.stderr = io.StringIO()


def on_all_cores(function, jobs: list[tuple]) -> list:
    """[function(*job) for job in jobs], a process for each core."""
    with ProcessPoolExecutor(initializer=start_worker) as pool:
        results = pool.map(function, *zip(*jobs, strict=True))
        return list(tqdm(results, total=len(jobs), unit=" runs", leave=False))


def record(name: str, seeds: list, runs: Path, out: Path):
    """Train what is missing and gather it in OUT/NAME.json. ValueError: a run has diverged."""
    experiment = EXPERIMENTS[name]
    result = {"experiment": name, "seeds": seeds}
    if experiment.look:
        result |= experiment.look(seeds, on_all_cores)
    else:
        configs = experiment.configs()
        jobs = []
        for seed in seeds:
            for label, config in configs.items():
                if not tokrl.run_path(runs, config, seed).exists():
                    jobs.append(({label: config}, [seed], runs))
        if jobs:
            on_all_cores(tokrl.train_missing, jobs)
        result["arms"] = tokrl.finished_arms(configs, seeds, runs)
        missing = configs.keys() - result["arms"].keys()
        if missing:
            raise ValueError(f"{name}: runs have diverged of {', '.join(sorted(missing))}")
    (out / f"{name}.json").write_text(json.dumps(result) + "\n")


# ---- 4. The page
def section(result: dict) -> str:
    """What the page shows of an experiment: command, figure, tables."""
    name = result["experiment"]
    experiment = EXPERIMENTS[name]
    parts = [
        f"`python -m figures.experiments {name}`",
        f"![{experiment.question}]({name}.png)",
    ]
    if name == "sharing":
        parts.append(report.markdown(groups.sharing_columns(result)))
    if experiment.look:
        return "\n\n".join(parts)
    found = result["arms"]
    parts.append(report.short_table(found))
    for label in experiment.answers:
        run = found[label][0]
        parts.append(f"{label}, seed {run['seed']}:\n\n```\n{run['answers']}\n```")
    if len(result["seeds"]) > 1:
        parts.append("<details><summary>Spread over seeds, and differences by seed</summary>")
        parts.append(report.spread_table(found))
        parts.append(report.pairs_table(found, experiment.pairs()))
        parts.append("</details>")
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


def show(name: str, out: Path) -> str:
    """Draw OUT/NAME.json, write its tables into OUT/README.md, and return them."""
    result = json.loads((out / f"{name}.json").read_text())
    EXPERIMENTS[name].draw(result.get("arms", result), out / f"{name}.png")
    text = section(result)
    page = out / "README.md"
    if page.exists():
        page.write_text(insert(page.read_text(encoding="utf-8"), name, text), encoding="utf-8")
    return f"## {name}\n\n{text}\n"


def main(argv: list[str] | None = None):
    """Record and show the experiments that are named."""
    parser = ArgumentParser("figures.experiments", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("--plot", action="store_true", help="only tables and figures, no training")
    parser.add_argument("--seeds", type=tokrl.seed_range, default=SEEDS, help="default 0-7")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept")
    parser.add_argument("--out", type=Path, default=HERE, help="where results go")
    args = parser.parse_args(argv)
    if not (args.name or args.plot):
        parser.error(f"which experiment? {', '.join(EXPERIMENTS)}, all, or --plot")
    if args.out.resolve() == HERE and args.seeds != SEEDS:
        parser.error("figures/ holds seeds 0-7: choose another --out for other seeds")
    args.runs.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    texts = []
    for name in EXPERIMENTS if args.name in (None, "all") else [args.name]:
        if not args.plot:
            record(name, args.seeds, args.runs, args.out)
        texts.append(show(name, args.out))
    print("\n".join(texts))  # after all is written: "| head" may stop it


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console without "−" shows "?"
    os.environ.pop("MPLBACKEND", None)  # a calling notebook's, which we may not have
    try:
        main()
    except (KeyboardInterrupt, BrokenProcessPool):  # Ctrl-C, or somebody killed a worker
        sys.exit("\nStopped. Finished runs are kept: the same command continues.")
