"""Tests of the figures' code, of the recorded results, and of what the pages say."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

import tokrl
from figures import audit, experiments, groups, report
from figures.audit import tensor
from test_tokrl import EXERCISES
from tokrl import TRANSFORMS, Config

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent
README = (HERE.parent / "README.md").read_text(encoding="utf-8")
PAGE = (HERE / "README.md").read_text(encoding="utf-8")
AUDIT = (HERE / "audit.md").read_text(encoding="utf-8")
NUMBER = r"(?<![\d.:/])\d+\.\d+(?![\d.])"  # with a decimal point, and no part of a version or link


# ---- 1. Statistics and tables
def test_t_interval_by_hand():
    # t(0.975, 7) = 2.36462: 1 .. 8 have mean 4.5, std sqrt(6), half = 2.36462 sqrt(6 / 8) = 2.04782;
    # t = 4.5 / 0.86603 = 5.19615, of which p = 0.00126
    got = report.t_interval(range(1, 9))
    assert got == pytest.approx((4.5, 2.45218, 6.54782, 0.00126), abs=5e-5)
    # tables of t: 12.706 for two values, 4.303 for three; half = t · std / sqrt(n)
    assert report.t_interval([0, 2])[2] == pytest.approx(1 + 12.706, abs=3e-3)
    assert report.t_interval([0, 1, 2])[2] == pytest.approx(1 + 4.303 / math.sqrt(3), abs=3e-3)
    assert report.t_interval([0.0] * 3) == (0, 0, 0, 1), "no difference at all: p = 1"
    for undefined in ([3.0], [math.nan] * 3):
        assert all(math.isnan(x) for x in report.t_interval(undefined)[1:])


HOLM = [  # .01 .02 .03 against .05/3 .05/2 .05/1: all survive
    ([0.02, 0.01, 0.03], [1, 1, 1]),
    ([0.03, 0.01, 0.03], [0, 1, 0]),  # .03 > .025, and the rest falls with it
    ([math.nan, 0.02, 0.04], [0, 1, 1]),  # nan is no comparison: a family of two
]


@pytest.mark.parametrize("p, survive", HOLM)
def test_holm_by_hand(p, survive):
    assert report.holm(p).tolist() == survive


def test_tables_are_paired_by_seed_and_star_what_is_established():
    # drift 2 4 8 against 1 1 2: ratios 2 4 4, geometric mean 32^(1/3) = 3.17; in logarithms .693
    # 1.386 1.386, mean 1.155, half 4.3027 · .4002 / sqrt(3) = .994: e^.161 = 1.17 to e^2.149 = 8.58
    # entropy 4 4.1 4 against 1 1 1.1: differences 3 3.1 2.9, half 4.3027 · .1 / sqrt(3) = .248
    # accuracy: 1e-9 apart at every seed, which is rounding
    def runs(drifts, entropies, accuracy):
        same = {"net_push": 0.5, "accuracy": accuracy}
        both = zip(drifts, entropies, strict=True)
        return [{"final": same | {"solution_drift": d, "solution_entropy": e}} for d, e in both]

    found = {
        "off": runs([2, 4, 8], [4, 4.1, 4], 0.8),
        "on": runs([1, 1, 2], [1, 1, 1.1], 0.8 + 1e-9),
    }
    assert "4.67 ± 3.06, 2.00 to 8.00" in report.spread_table(found)
    pair = report.pairs_table(found, [("off", "on")]).splitlines()[-1]
    assert "3.17 [1.17, 8.58]* | +3.000 [+2.752, +3.248]* | +0.000 [+0.000, +0.000] |" in pair
    # twice the same pair is a family of two: p = .0379 of the drift is above .05 / 2
    pair = report.pairs_table(found, [("off", "on")] * 2).splitlines()[-1]
    assert "3.17 [1.17, 8.58] | +3.000 [+2.752, +3.248]*" in pair


# ---- 2. Experiments
def test_arms_are_what_their_labels_say():
    want = Config("add", lr=3e-5, group_size=4, prompts=16, transform="min", at="rest")
    assert experiments.config_of("on at rest add lr=3e-05 G=4") == want
    assert experiments.config_of("off fork=0 share") == Config(fork=0, duplicates="share")
    assert experiments.config_of("off prefix max_grad_norm=inf").max_grad_norm == math.inf
    want = Config(transform=experiments.Scale(0.1), at="shared")
    assert experiments.config_of("scale=0.1 at shared") == want


def test_function_arms_by_hand():
    # two groups of three, two places; the third completion of the first group has ended at the
    # second place
    w = tensor([[[1, 2], [2, 4], [6, 0]], [[1, 1], [1, 1], [1, 2]]])
    mask = w > 0
    A = tensor([[1, 1, -2], [1, 1, -2]])

    def changed(transform):
        return tokrl.transform_weights(w, A, mask, transform).tolist()

    # first place: smallest 1, mean 3; second: smallest 2, mean 3
    assert changed(experiments.GroupMean())[0] == [[3, 3], [3, 3], [3, 0]]
    shrunk = [[1 / 3, 4 / 3], [2 / 3, 8 / 3], [2, 0]]
    assert tensor(changed(experiments.Shrink())[0]).tolist() == pytest.approx(tensor(shrunk))
    assert changed(experiments.Scale(0.5))[0] == [[0.5, 1], [1, 2], [3, 0]]


def test_random_sign_is_one_coin_for_a_group_and_fair():
    w = torch.rand(4000, 3, 5, generator=tokrl.named_generator(0, "test"))
    mask = torch.ones_like(w).bool()
    signs = experiments.RandomSign()(w, None, mask) / w
    assert set(signs.unique().tolist()) == {-1, 1}
    assert (signs == signs[:, :1, :1]).all()
    assert abs(signs[:, 0, 0].sum()) < 5 * math.sqrt(4000)  # five standard deviations


def test_pairs_have_off_under_the_same_settings():
    labels = experiments.arms(["off", "on at rest"], "add", "split")
    found = experiments.Experiment("?", labels, also=(("off add", "off split"),)).pairs()
    assert found[:2] == [("off add", "on at rest add"), ("off split", "on at rest split")]
    assert found[2:] == [("off add", "off split")]


@pytest.mark.slow
def test_recording_trains_gathers_and_draws(tmp_path, monkeypatch, capsys):
    short = experiments.arms(["off", "shrink"], "steps=2 prompts=2")
    monkeypatch.setitem(experiments.EXPERIMENTS, "tasks", experiments.Experiment("?", short))
    (tmp_path / "README.md").write_text("<!-- tasks -->\nold\n<!-- end of tasks -->\n")
    folders = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    experiments.main(["tasks", "--seeds", "0-1", *folders])
    result = json.loads((tmp_path / "tasks.json").read_text())
    assert [run["seed"] for run in result["arms"]["shrink steps=2 prompts=2"]] == [0, 1]
    assert (tmp_path / "tasks.png").exists()
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "off steps=2 prompts=2, shrink steps=2 prompts=2" in page and "old" not in page


@pytest.mark.slow
def test_mechanism_shows_one_group_of_a_first_rollout():
    result = groups.record_mechanism([0], None)
    off = tensor([result["weights"]["off"]])[..., None]
    assert tokrl.net_push(off, tensor([result["advantages"]])) > 1e-2
    assert result["weights"]["min"] == [min(result["weights"]["off"])] * 8


def test_sharing_splits_the_gradient_of_the_policy_loss():
    # ratios of 1: the pushes of the shared 7+ cancel, so all of the gradient is from the rest;
    # then ratios that differ by answer
    policy = tokrl.Policy(tokrl.named_generator(0, "test")).double()
    prompts = tokrl.prompt_tokens(["75=", "31="])
    tokens = torch.stack([tokrl.completion_tokens(["7+5=12", "7+1=8", "7+5=1"], 8)] * 2)
    rewards = tensor([[1, 0, 0], [0, 0, 0]])  # the second group has no signal
    logprobs = tokrl.token_logprobs(policy, prompts, tokens)
    for equal, change in ((True, 0.0), (False, 0.1 * torch.arange(3)[:, None])):
        old_logprobs = logprobs.detach() - change
        (row,) = groups.rows_of_groups(policy, "seq", old_logprobs, prompts, tokens, rewards)
        assert row["shared tokens"] == 2
        assert row["scored tokens"] == pytest.approx((7 + 6 + 6) / 3)
        assert (row["shared"] < 1e-12) == equal
        assert row["rest"] > 1e-3


# ---- 3. What was recorded, and what the pages say
@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_recorded_result_is_what_the_page_shows(name):
    result = json.loads((HERE / f"{name}.json").read_text())
    configs = experiments.EXPERIMENTS[name].configs()
    assert list(result.get("arms", {})) == list(configs)
    for label, config in configs.items():
        want = {k: "inf" if v == math.inf else v for k, v in vars(config).items()}
        if callable(config.transform):
            want["transform"] = repr(config.transform)
        runs = result["arms"][label]
        assert [run["seed"] for run in runs] == experiments.SEEDS
        assert all(run["config"] == want for run in runs)
    assert (HERE / f"{name}.png").exists()
    assert experiments.insert(PAGE, name, experiments.section(result)) == PAGE

    # the numbers in the text stand in the tables of their section
    section = PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    before, _, rest = section.partition(f"<!-- {name} -->")
    tables, _, after = rest.partition(f"<!-- end of {name} -->")
    if configs:
        assert set(re.findall(NUMBER, before + after)) <= set(re.findall(NUMBER, tables))


def test_readme_numbers_stand_on_the_page_of_results_or_in_the_audit():
    findings = README.partition("\n## What it shows\n")[2].partition("\n## ")[0]
    first, *parts = findings.split("\n### ")
    assert len(parts) == 4
    assert set(re.findall(NUMBER, first)) <= set(re.findall(NUMBER, PAGE))
    for part in parts:  # each links the sections that hold its numbers
        source = AUDIT if "figures/audit.md" in part else ""
        for name in re.findall(r"figures/README\.md#([\w-]+)", part):
            source += PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        said = set(re.findall(NUMBER, part))
        assert said and said <= set(re.findall(NUMBER, source)), part.splitlines()[0]


def test_readme_shows_answers_that_were_recorded():
    (shown,) = re.findall(r"```\n(off, seed 0:\n.*?)```", README, re.DOTALL)
    for block in shown.strip().split("\n\n"):
        label, _, answers = block.partition(", seed 0:\n")
        assert f"{label}, seed 0:\n\n```\n{answers}\n```" in PAGE


def test_readme_commands_parse_and_name_the_functions_of_the_tests():
    commands = re.findall(r"python tokrl\.py(?! --help)([^\n`#|]*)", README + PAGE)
    assert commands
    for command in commands:
        tokrl.command_line().parse_args(command.partition("  ")[0].split())
    written = re.findall(r"^\| (\d+) \| `(\w+)\(", README, re.MULTILINE)
    assert sorted((int(number), name) for number, name in written) == list(EXERCISES.items())[:9]


# ---- 4. The audit
@pytest.mark.parametrize("G", [2, 3])
@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("loss", ["reinforce", "dr_grpo", "seq", "prefix"])
def test_mean_gradient_is_unbiased_on_policy(loss, kind, G):
    assert audit.bias(*audit.enumerated_gradients(loss, kind, spread=0.0, G=G)) < 1e-12


def fake_runs(accuracies: list, finals: list) -> list:
    """A run per final accuracy, all with the same curve, evaluated every ten rollouts."""
    curves = {"step": [0, 10, 20, 30], "accuracy": accuracies}
    return [{"curves": curves, "final": {"accuracy": final}} for final in finals]


def test_audit_of_predictions_by_hand():
    # rollouts to 0.9: 10 against 30 and 10. Mean |second difference|: (.9 + 0) / 2; 0; (1.8 + 1.7) / 2
    # final accuracy: on − gspo has mean .025, error .0129 / 2, t = 3.87, p = .03: the fifth of six
    # in Holm's order, and not below .05 / 2
    arms = {
        "on seq": fake_runs([0.0, 0.9, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9]),
        "off gspo": fake_runs([0.0, 0.3, 0.6, 0.8], [0.89, 0.88, 0.87, 0.86]),
        "off seq": fake_runs([0.0, 0.9, 0.0, 0.8], [0.8, 0.8, 0.8, 0.8]),
    }
    assert [audit.rollouts_to_90(arms[label][0]) for label in arms] == [10, 30, 10]
    assert audit.jitter(arms["off seq"][0]) == pytest.approx(1.75)
    words = [row[3] for row in audit.predictions(arms)]
    assert words[:2] == ["holds", "not established"]  # rollouts
    assert words[2:4] == ["the opposite holds", "holds"]  # jitter
    assert words[4:] == ["not established", "holds"]  # final accuracy


def without_numbers(page: str) -> list:
    """Its lines, those of the table without the third column: another machine rounds otherwise."""
    cells = [line.split(" | ") for line in page.splitlines()]
    return [row[:2] + row[3:] for row in cells]


def test_recorded_audit_has_the_verdicts_that_the_audit_finds():
    arms = json.loads((HERE / "losses.json").read_text())["arms"]
    fresh = audit.page(audit.audit(arms))
    stale = "audit.md is out of date: python -m figures.audit writes it again"
    assert without_numbers(AUDIT) == without_numbers(fresh), stale
