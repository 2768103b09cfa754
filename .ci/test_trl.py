"""The README's recipe for TRL, in an environment where TRL is installed: pytest .ci/test_trl.py"""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trl import GRPOTrainer

HERE = Path(__file__).resolve().parent
TOP = HERE.parent


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The module trl_toy, with the trainer taken out of the README."""
    readme = (TOP / "README.md").read_text(encoding="utf-8")
    (trainer,) = re.findall(r'```python\n("""trl_trainer\.py:.*?)```', readme, re.DOTALL)
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "trl_trainer.py").write_text(trainer, encoding="utf-8")
    sys.path[:0] = [str(HERE), str(TOP), str(folder)]
    return importlib.import_module("trl_toy")


def logs_of(trainer):
    """What TRL has logged for each of the six steps: two rollouts, three steps on each."""
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert len(logs) == 6
    return logs


def norms_of(trainer):
    return [log["grad_norm"] for log in logs_of(trainer)]


WHOLE = {}
ACCUMULATED = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 4,
    "steps_per_generation": 4,
}


@pytest.mark.parametrize("slices", [WHOLE, ACCUMULATED], ids=["whole", "accumulated"])
@pytest.mark.parametrize(
    "loss, level, low, high", [("gspo", "sequence", 0.03, 0.05), ("grpo", "token", 0.2, 0.28)]
)
def test_trl_off_is_trl_itself_and_transforms_are_not(toy, loss, level, low, high, slices):
    settings = {"importance_sampling_level": level, "epsilon": low, "epsilon_high": high, **slices}
    logs = logs_of(toy.toy_trainer(GRPOTrainer, **settings))
    clipped = [log for log in logs if log["clip_ratio/region_mean"] > 0]
    assert len(clipped) >= 2, "the clip acts"

    own = pytest.approx([log["grad_norm"] for log in logs], rel=1e-6)
    assert norms_of(toy.toy_trainer(ours={"loss": loss, "transform": "off"}, **settings)) == own

    close = pytest.approx([log["grad_norm"] for log in logs], rel=1e-3)
    for kind in ("min", "orth"):
        ours = {"loss": loss, "transform": kind}
        assert norms_of(toy.toy_trainer(ours=ours, **settings)) != close


@pytest.mark.parametrize("slices", [WHOLE, ACCUMULATED], ids=["whole", "accumulated"])
def test_trl_at_changes_weights_where_the_group_agrees_or_elsewhere(toy, slices):
    trainer = toy.toy_trainer(toy.FixedOurs, **slices)
    trainer.train()
    slices = trainer._buffered_inputs

    def rollout(name):
        """All rows in the order in which TRL made them, in groups."""
        rows = torch.cat([one["row"] for one in slices])
        values = torch.cat([one[name] for one in slices])
        return values[rows.argsort()].unflatten(0, (-1, 8))

    weights = {}
    for kind, at in (("off", "all"), ("min", "all"), ("min", "shared"), ("min", "rest")):
        trainer.tokrl = replace(trainer.tokrl, transform=kind, at=at)
        trainer.set_weights(slices)
        weights[kind, at] = rollout("weights")

    scored = rollout("completion_mask").bool()
    shared = torch.zeros_like(scored)
    for b, group in enumerate(rollout("completion_ids").tolist()):
        shared[b, :, : len(os.path.commonprefix(group))] = True
    changed = weights["off", "all"] != weights["min", "all"]
    assert (changed & shared).any() and (changed & ~shared).any()
    assert ((weights["min", "shared"] != weights["off", "all"]) == (changed & shared)).all()
    assert ((weights["min", "rest"] != weights["off", "all"]) == (changed & ~shared)).all()
    assert ((weights["min", "shared"] == weights["min", "all"]) | ~shared).all()
    assert ((weights["min", "rest"] == weights["min", "all"]) | shared).all()


def test_trl_prefix_has_nothing_left_for_min_at_shared_tokens(toy):
    def norms(**ours):
        return norms_of(toy.toy_trainer(toy.FixedOurs, ours))

    prefix = norms(loss="prefix", transform="off")
    assert min(prefix) > 0
    assert norms(loss="prefix", transform="min", at="shared") == pytest.approx(prefix, rel=1e-6)
    assert norms(loss="prefix", transform="min", at="all") != pytest.approx(prefix, rel=1e-3)
    assert norms(loss="seq", transform="off") != pytest.approx(prefix, rel=1e-3)


def test_trl_on_two_processes_trains_as_on_one_and_as_trl_itself(toy, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for arguments, out in (([], "one.pt"), (two, "two.pt")):
        command = [sys.executable, *arguments, str(HERE / "trl_toy.py"), out]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    one = torch.load(tmp_path / "one.pt")
    both = torch.load(tmp_path / "two.pt")

    def apart(a, b):
        return (a - b).abs().max()

    for loss in ("gspo", "grpo"):
        assert apart(one[f"{loss}, off"], one[f"{loss}, TRL"]) < 1e-6
        assert apart(both[f"{loss}, off"], both[f"{loss}, TRL"]) < 1e-6
    assert apart(one["gspo, off"], one["min"]) > 0.01
    assert apart(one["min"], both["min"]) < 1e-6


REWARDS = [
    {"scale": 3e4, "offset": 0.7, "scale_rewards": "none"},
    {"scale": 0.0, "offset": 0.7},  # all equal; with eight of them TRL's mean is rounded
    {"scale_rewards": "batch"},
    {"multi_objective_aggregation": "normalize_then_sum"},
]


@pytest.mark.parametrize("settings", REWARDS)
def test_trl_off_is_trl_itself_whatever_the_rewards(toy, settings):
    settings = {"importance_sampling_level": "sequence", **settings}
    own = pytest.approx(norms_of(toy.toy_trainer(GRPOTrainer, **settings)), rel=1e-6)
    assert norms_of(toy.toy_trainer(ours={"transform": "off"}, **settings)) == own


def test_trl_recipe_refuses_groups_whose_advantages_do_not_sum_to_0(toy):
    class Shifted(toy.FixedOurs):
        def _generate_and_score_completions(self, inputs):
            rollout = super()._generate_and_score_completions(inputs)
            return rollout | {"advantages": rollout["advantages"] + 0.1}

    with pytest.raises(ValueError, match="must sum to 0"):
        toy.toy_trainer(Shifted).train()


WRONG = [
    ("num_iterations", {"num_iterations": 1}),
    ("steps_per_generation", {"steps_per_generation": 2, "per_device_train_batch_size": 32}),
    ("entropy_coef", {"entropy_coef": 0.5}),
    ("delta", {"delta": 1.5}),
    ("mask_truncated_completions", {"mask_truncated_completions": True}),
    ("at", {"ours": {"at": "here"}}),
    ("loss", {"ours": {"loss": "ppo"}}),
]


@pytest.mark.parametrize("name, settings", WRONG)
def test_trl_recipe_refuses_what_it_does_not_do(toy, name, settings):
    with pytest.raises(ValueError, match=f"^{name} must "):
        toy.toy_trainer(**settings)
