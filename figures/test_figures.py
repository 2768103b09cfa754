"""Tests of experiments.py and audit.py, of the recorded results, and of what the pages say."""

import argparse
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import tokrl
from figures import audit, experiments
from test_tokrl import tensor
from tokrl import Config

HERE = Path(__file__).resolve().parent
README = (HERE.parent / "README.md").read_text(encoding="utf-8")
PAGE = (HERE / "README.md").read_text(encoding="utf-8")
AUDIT = (HERE / "audit.md").read_text(encoding="utf-8")
NUMBER = r"(?<![\d.:/])\d+\.\d+(?![\d.])"  # with a decimal point, and no part of a version or link


# ---- 1. Statistics and tables
def test_t_interval_covers_what_it_says():
    inside = 0
    for values in np.random.default_rng(1).normal(0.3, 1.0, (2000, 8)):
        _, low, high, _ = experiments.t_interval(values)
        inside += low < 0.3 < high
    assert 0.935 < inside / 2000 < 0.965  # 0.95 ± three standard deviations of 0.005


def test_t_interval_by_hand():
    # t(0.975, 7) = 2.36462: 1 .. 8 have mean 4.5, std sqrt(6), half = 2.36462 sqrt(6 / 8) = 2.04782;
    # t = 4.5 / 0.86603 = 5.19615, of which p = 0.00126
    got = experiments.t_interval(range(1, 9))
    assert got == pytest.approx((4.5, 2.45218, 6.54782, 0.00126), abs=5e-5)


def test_t_interval_of_other_sizes():
    # tables of t: 12.706 for two values, 4.303 for three, 2.776 for five
    for n, want in ((2, 12.706), (3, 4.303), (5, 2.776)):
        x, below = experiments.t_distribution(n)
        assert np.interp(0.975, below, x) == pytest.approx(want, abs=3e-3)


def test_t_interval_needs_two_values_and_numbers():
    assert all(math.isnan(x) for x in experiments.t_interval([3.0])[1:])
    assert all(math.isnan(x) for x in experiments.t_interval([math.nan] * 3))
    assert experiments.t_interval([0.0] * 3) == (0, 0, 0, 1), "no difference at all: p = 1"


HOLM = [  # .01 .02 .03 against .05/3 .05/2 .05/1: all survive
    ([0.02, 0.01, 0.03], [1, 1, 1]),
    ([0.03, 0.01, 0.03], [0, 1, 0]),  # .03 > .025, and the rest falls with it
    ([math.nan, 0.02, 0.04], [0, 1, 1]),  # nan is no comparison: a family of two
]


@pytest.mark.parametrize("p, survive", HOLM)
def test_holm_by_hand(p, survive):
    assert experiments.holm(p).tolist() == survive


def two_arms(drifts: dict) -> dict:
    """{label: a drift per seed} -> runs with these drifts, all else equal in both arms."""
    found = {}
    for label, values in drifts.items():
        finals = [dict.fromkeys(tokrl.MEASURES, x) for x in (0.5, 0.5, 0.8)]
        found[label] = [
            {"final": final | {"solution_drift": drift}}
            for final, drift in zip(finals, values, strict=True)
        ]
    return found


def test_tables_are_paired_by_seed():
    # drifts 2 4 8 against 1 1 2: ratios 2 4 4, geometric mean 32^(1/3) = 3.17; differences 1 3 6,
    # mean 3.33, half 4.3027 · 2.517 / sqrt(3) = 6.25: not established, so no star
    found = two_arms({"off": [2, 4, 8], "on": [1, 1, 2]})
    *_, off, on = experiments.spread_table(found).splitlines()
    assert "4.67 ± 3.06" in off
    assert "0.60 ± 0.17" in on
    pair = experiments.pairs_table(found, [("off", "on")]).splitlines()[-1]
    assert re.search(r"\| \+3\.33 \[-2\.9\d, \+9\.5\d\] \|", pair)
    assert re.search(r"\| 3\.17 \[.*\] \|$", pair)


def test_tables_star_what_is_established_and_not_what_is_rounding():
    # differences 3.0 3.1 2.9: t = 3 / (0.1 / sqrt(3)) = 52, p = 0.0004
    found = two_arms({"off": [4, 4.1, 4], "on": [1, 1, 1.1]})
    for run in found["on"]:
        run["final"]["accuracy"] += 1e-9
    pair = experiments.pairs_table(found, [("off", "on")]).splitlines()[-1]
    assert "+3.00 [+2.75, +3.25]*" in pair
    assert pair.count("*") == 1


def test_insert_writes_between_the_marks_and_only_there():
    page = "before\n<!-- x -->\nold\n<!-- end of x -->\nafter\n"
    want = "before\n<!-- x -->\n\nnew\n\n<!-- end of x -->\nafter\n"
    assert experiments.insert(page, "x", "new") == want
    assert experiments.insert(want, "x", "new") == want
    with pytest.raises(ValueError, match="marks of y"):
        experiments.insert(page, "y", "new")


# ---- 2. Experiments
def test_arms_are_what_their_labels_say():
    found = experiments.arms(["off", "on at rest"], {"task": "add", "lr": 3e-5})
    assert found == {
        "off add lr=3e-05": Config(task="add", lr=3e-5),
        "on at rest add lr=3e-05": Config(task="add", lr=3e-5, transform="min", at="rest"),
    }


def test_pairs_have_off_under_the_same_settings():
    every = [{"task": "add"}, {"task": "split"}]
    also = (("off add", "off split"),)
    experiment = experiments.Experiment("?", experiments.arms(["off", "on"], *every), also)
    assert experiment.pairs() == [("off add", "on add"), ("off split", "on split"), *also]


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_pairs_are_of_arms_that_there_are(name):
    experiment = experiments.EXPERIMENTS[name]
    pairs = experiment.pairs()
    assert len(set(pairs)) == len(pairs)
    assert {label for pair in pairs for label in pair} <= experiment.arms.keys()


@pytest.mark.slow
def test_experiment_trains_gathers_and_draws(tmp_path, monkeypatch, capsys):
    short = experiments.arms(["off", "on"], {"steps": 2, "prompts": 2})
    monkeypatch.setitem(experiments.EXPERIMENTS, "tasks", experiments.Experiment("?", short))
    folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    assert experiments.main(["tasks", "--seeds", "0-1", *folders]) == 0
    result = json.loads((tmp_path / "tasks.json").read_text())
    assert list(result["arms"]) == ["off steps=2 prompts=2", "on steps=2 prompts=2"]
    assert [run["seed"] for run in result["arms"]["on steps=2 prompts=2"]] == [0, 1]
    assert (tmp_path / "tasks.png").exists()
    assert "off steps=2 prompts=2 − on steps=2 prompts=2" in capsys.readouterr().out


BAD_COMMANDS = [
    ([], "which experiment"),
    (["nothing"], "nothing"),
    (["tasks", "--seeds", "3"], "another --out"),
    (["tasks", "--seeds", "x"], "seeds"),
]


@pytest.mark.parametrize("arguments, says", BAD_COMMANDS)
def test_experiments_say_what_is_wrong_with_a_command(arguments, says, capsys):
    assert experiments.main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_mechanism_shows_one_group_of_a_first_rollout():
    result = experiments.mechanism(Config(), 0)
    off = tensor([result["weights"]["off"]])[..., None]
    A = tensor([result["advantages"]])
    assert tokrl.net_push(off, A) > 1e-2
    assert result["weights"]["on"] == [min(result["weights"]["off"])] * 8


RECORDED = sorted(path.stem for path in HERE.glob("*.json"))


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_result_is_what_the_page_shows(name):
    result = json.loads((HERE / f"{name}.json").read_text())
    assert (HERE / f"{name}.png").exists()
    assert experiments.insert(PAGE, name, experiments.report(result)) == PAGE


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_result_has_all_arms_and_seeds(name):
    result = json.loads((HERE / f"{name}.json").read_text())
    configs = experiments.EXPERIMENTS[name].arms
    assert list(result.get("arms", {})) == list(configs)
    for label, config in configs.items():
        want = {k: "inf" if v == math.inf else v for k, v in asdict(config).items()}
        runs = result["arms"][label]
        assert [run["seed"] for run in runs] == experiments.SEEDS
        assert all(run["config"] == want for run in runs)


# ---- 3. What the pages say
def prose_and_tables(name: str) -> tuple[str, str]:
    """The section of an experiment on the page of results: outside and inside its marks."""
    section = PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    before, _, rest = section.partition(f"<!-- {name} -->")
    inside, _, after = rest.partition(f"<!-- end of {name} -->")
    return before + after, inside


@pytest.mark.parametrize("name", [name for name in RECORDED if name != "mechanism"])
def test_page_numbers_stand_in_the_tables_of_their_section(name):
    prose, tables = prose_and_tables(name)
    said = set(re.findall(NUMBER, prose))
    assert said
    assert said <= set(re.findall(NUMBER, tables))


def test_readme_numbers_stand_on_the_page_of_results_or_in_the_audit():
    findings = README.partition("\n## What it shows\n")[2].partition("\n## ")[0]
    said = set(re.findall(NUMBER, findings))
    assert said
    assert said <= set(re.findall(NUMBER, PAGE + AUDIT))


def test_readme_commands_parse():
    parser = tokrl.command_line()
    commands = re.findall(r"python tokrl\.py(?! --help)([^\n`#|]*)", README + PAGE)
    assert commands
    for command in commands:
        parser.parse_args(command.partition("  ")[0].split())


def test_readme_names_of_functions_exist():
    names = set(re.findall(r"`(\w+)\(?[^`]*\)?` in `?tokrl", README))
    names |= set(re.findall(r"python test_tokrl\.py blank (\w+)", README))
    assert {name for name in names - {"NAME"} if not hasattr(tokrl, name)} == set()
    assert argparse  # the command line is argparse's: --help says the same as the README
