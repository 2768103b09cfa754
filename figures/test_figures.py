"""Tests of experiments.py and audit.py, of the recorded results, and of what the pages say."""

import json
import math
import re
import runpy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import tokrl
from figures import audit, experiments, groups
from test_tokrl import tensor
from tokrl import LOSSES, TRANSFORMS, Config

torch.set_num_threads(1)
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
    (["tasks", "--plot", "--out", "nowhere"], "nowhere/tasks.json"),
]


@pytest.mark.parametrize("arguments, says", BAD_COMMANDS)
def test_experiments_say_what_is_wrong_with_a_command(arguments, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        experiments.main(arguments)
    assert says in capsys.readouterr().err


def test_experiments_name_a_damaged_result(tmp_path, capsys):
    (tmp_path / "price.json").write_text('{"experiment": "pri')
    with pytest.raises(SystemExit, match="2"):
        experiments.main(["price", "--plot", "--out", str(tmp_path)])
    assert "price.json is damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_mechanism_shows_one_group_of_a_first_rollout():
    result = groups.record_mechanism([0])
    off = tensor([result["weights"]["off"]])[..., None]
    A = tensor([result["advantages"]])
    assert tokrl.net_push(off, A) > 1e-2
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
        seen = []
        old_logprobs = logprobs.detach() - change
        groups.look_at_groups(seen, policy, "seq", old_logprobs, prompts, tokens, rewards)
        (row,) = seen
        assert row["shared tokens"] == 2
        assert row["scored tokens"] == pytest.approx((7 + 6 + 6) / 3)
        assert (row["shared"] < 1e-12) == equal
        assert row["rest"] > 1e-3


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


@pytest.mark.parametrize("name", sorted({*RECORDED} - {"mechanism", "sharing"}))
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


def test_readme_shows_answers_that_were_recorded():
    (shown,) = re.findall(r"```\n(off, seed 0:\n.*?)```", README, re.DOTALL)
    for block in shown.strip().split("\n\n"):
        label, _, answers = block.partition(", seed 0:\n")
        assert f"{label}, seed 0:\n\n```\n{answers}\n```" in PAGE


def test_readme_commands_parse():
    parser = tokrl.command_line()
    commands = re.findall(r"python tokrl\.py(?! --help)([^\n`#|]*)", README + PAGE)
    assert commands
    for command in commands:
        parser.parse_args(command.partition("  ")[0].split())


def test_readme_names_of_functions_exist():
    names = re.findall(r"^\| \d+ \| `(\w+)`, ", README, re.MULTILINE)
    assert len(names) == 9
    for name in names:
        assert hasattr(tokrl, name), name


# ---- 4. The audit: the verdicts that we know
EQ2 = {
    "seq": "holds except: off-policy",
    "dr_grpo": "holds except: a clip bites",
    "dapo": "holds except: a clip bites",
    "grpo": "holds except: unequal lengths, a clip bites",
    "gspo": "holds except: unequal lengths, off-policy, a clip bites",
}


@pytest.mark.parametrize("loss", LOSSES)
def test_audit_of_eq2(loss):
    want = EQ2.get(loss, "holds")  # a loss of your own should always cancel
    assert audit.audit_eq2(loss).verdict == want
    weights = audit.Group("on-policy").weights(loss)
    assert (weights > 0).all(), "nothing is clipped; a weight of 0 cancels, and learns nothing"


def test_audit_of_section4_and_prefix():
    assert audit.audit_part_of_a_group().verdict == "holds"
    assert audit.audit_past_and_future().verdict == "holds"
    assert audit.audit_section4("dr_grpo", "").verdict == "holds"
    assert audit.audit_section4("seq", "").verdict == "holds"
    assert audit.audit_section4_clip().verdict == "holds"


def test_audit_of_prop31():
    assert audit.audit_prop31().verdict == "holds"
    assert audit.audit_prop31_other_tokens().verdict == "the quoted statement fails"
    assert audit.group_step("min", own_term_only=True)[2] < 1e-20, "its own term does cancel"


def test_audit_of_cor32():
    assert audit.audit_cor32().verdict == "holds except: κ = (1, 1) at p = (.6, .3, .1)"
    assert audit.audit_cor32_collapse().verdict == "holds except: pushed equally often"


def test_audit_of_cor33():
    assert audit.audit_cor33_random().verdict == "holds"
    exceptions = "first inner step, identical completions, fully clipped group"
    assert audit.audit_cor33_norm().verdict == f"holds except: {exceptions}"
    assert audit.audit_cor33_necessary().verdict == "the quoted statement fails"


@pytest.mark.parametrize("kind", ["min", "orth"])
def test_audit_of_eq17_and_eq18(kind):
    assert audit.audit_transform(kind).verdict == "holds"
    assert audit.audit_transform(kind, at="shared").verdict == "holds"
    assert audit.audit_stop_gradient(kind).verdict == "holds"
    assert audit.audit_one_gradient().verdict == "holds"


# ---- 5. The bias of the expected gradient, by enumeration
@pytest.mark.parametrize("G", [2, 3])
@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("loss", ["reinforce", "dr_grpo", "seq", "prefix"])
def test_expected_gradient_is_unbiased_on_policy(loss, kind, G):
    assert audit.bias(*audit.enumerated_gradients(loss, kind, spread=0.0, G=G)) < 1e-12


def test_expected_gradient_is_unbiased_off_policy_only_under_seq():
    word = audit.audit_bias("seq", "off").verdict
    assert word == "the quoted statement holds except: Â divided by std"
    for loss, kind in (("seq", "min"), ("seq", "orth"), ("prefix", "off"), ("dr_grpo", "off")):
        assert audit.audit_bias(loss, kind).verdict == "the quoted statement fails"
        assert 1e-2 < audit.bias(*audit.enumerated_gradients(loss, kind, seed=5)) < 0.3


# ---- 6. The paper's three predictions
def fake_runs(accuracies: list, finals: list) -> list:
    """A run per final accuracy, all with the same curve, evaluated every ten rollouts."""
    curves = {"step": [0, 10, 20, 30], "accuracy": accuracies}
    return [{"curves": curves, "final": {"accuracy": final}} for final in finals]


def test_rollouts_and_jitter_by_hand():
    # differences .2 .2 −.1, second differences 0 −.3
    (run,) = fake_runs([0.5, 0.7, 0.9, 0.8], [0.8])
    assert audit.rollouts_to_90(run) == 20
    assert audit.jitter(run) == pytest.approx(0.15)
    (run,) = fake_runs([0.5, 0.7, 0.8, 0.8], [0.8])
    assert audit.rollouts_to_90(run) == 30, "never: all rollouts"


def test_audit_of_predictions():
    # second differences: −.9 0; 0 0; −1.8 1.7
    # final accuracy: on − gspo has mean .025, error .0129 / 2, t = 3.87, p = .03: the fifth of six
    # in Holm's order, and not below .05 / 2
    arms = {
        "on seq": fake_runs([0.0, 0.9, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9]),
        "off gspo": fake_runs([0.0, 0.3, 0.6, 0.9], [0.89, 0.88, 0.87, 0.86]),
        "off seq": fake_runs([0.0, 0.9, 0.0, 0.8], [0.8, 0.8, 0.8, 0.8]),
    }
    words = [row.verdict for row in audit.audit_predictions(arms)]
    assert words[:2] == ["holds", "not established"]  # rollouts
    assert words[2:4] == ["the opposite holds", "holds"]  # jitter
    assert words[4:] == ["not established", "holds"]  # final accuracy


@pytest.mark.parametrize("content", [None, "", '{"arms": {"on s', "[]", '{"arms": {"on seq": []}}'])
def test_audit_says_that_its_runs_are_damaged(content, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(audit, "HERE", tmp_path)
    if content is not None:
        (tmp_path / "losses.json").write_text(content)
    assert audit.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("losses.json is missing or damaged: record it with: python -m ")


def test_audit_computes_nothing_when_imported(monkeypatch):
    # a student has blanked a function: the rows that do without it can still be asked for
    for name in ("group_advantages", "effective_weights", "Policy", "prompt_tokens"):
        monkeypatch.setattr(tokrl, name, None)
    assert runpy.run_path(audit.__file__)["verdict"](True) == "holds"


def without_numbers(page: str) -> list:
    """Its lines, those of the table without the third column: another machine rounds otherwise."""
    cells = [line.split(" | ") for line in page.splitlines()]
    return [row[:2] + row[3:] for row in cells]


def test_recorded_audit_says_what_the_audit_says():
    fresh = audit.page(audit.audit(audit.recorded_arms(HERE / "losses.json")))
    stale = "audit.md is out of date: python -m figures.audit writes it again"
    assert without_numbers(AUDIT) == without_numbers(fresh), stale
