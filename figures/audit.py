"""The audit: what each place of the paper says, what is measured, and whether it holds.

    python -m figures.audit        prints the table and writes figures/audit.md; a few seconds

Each audit_... function returns rows of the table. A verdict is computed, never written down
beforehand. A policy that has learnt nothing is enough: what cancels does so at any parameters. Only
the last six rows read recorded runs, those of figures/losses.json.
"""

import itertools
import json
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import tokrl
from figures.experiments import holm, t_interval
from tokrl import effective_weights, group_advantages, net_push, policy_loss, transform_weights
from toy_tasks import encode

HERE = Path(__file__).resolve().parent
ROUNDING = 1e-12  # in float64 what cancels leaves about 1e-16
PAGE = """# The audit

What each place of the paper says, and what is measured; written by `python -m figures.audit`. A
statement in quotation marks is not the paper's: a reader may take it from there. The verdict says
whether the statement holds.

{table}

0: below 1e-12, which is rounding. Â: advantages, r: ratio of a token, ρ: of the shared one, u:
product of the others, h*: place of the shared token, η: step, g: gradient, F: Fisher matrix at h*.
"""


# ---- 1. Rows and verdicts
@dataclass
class Row:
    """One line of the table: a place in the paper and a statement, put to the test."""

    place: str
    statement: str
    measured: str
    verdict: str


def objection(place: str, statement: str, measured: str, word: str) -> Row:
    """A row whose statement is not the paper's, but may be read into that place."""
    return Row(f"{place}, objection", f"“{statement}”", measured, f"the quoted statement {word}")


def verdict(holds) -> str:
    """Of a statement."""
    return "holds" if holds else "fails"


def verdict_by_case(holds: dict[str, bool]) -> str:
    """Of a statement tested in several cases; without the first, the plainest, it fails."""
    exceptions = [case for case in holds if not holds[case]]
    plainest = next(iter(holds))
    if exceptions and plainest not in exceptions:
        return "holds except: " + ", ".join(exceptions)
    return verdict(not exceptions)


def listed(numbers: dict) -> str:
    """Names and numbers in a line; rounding, which differs between machines, as 0."""
    parts = []
    for name, x in numbers.items():
        digits = ".1e" if ROUNDING < abs(x) < 1e-3 else ".3g"
        parts.append(f"{name} {0.0 if abs(x) < ROUNDING else x:{digits}}")
    return ", ".join(parts)


def tensor(values):
    """In float64, where numbers made by hand are exact to 1e-15."""
    return torch.tensor(values, dtype=torch.float64)


# ---- 2. Eq. 2: a group of five that shares the opening "7+" of the prompt "75="
PROMPT = torch.tensor([encode("75=")])
OPENING = torch.tensor(encode("7+"))
A = group_advantages(tensor([[1, 0, 0, 1, 0]]))  # Â
SITUATIONS = {  # name: options of shared_group
    "on-policy": {},
    "unequal lengths": {"lengths": (3, 5, 4, 6, 5)},
    "off-policy": {"spread": 0.03, "shared_ratio": 1.02},
    "a clip bites": {"shared_ratio": 1.8},
}


@dataclass
class Group:
    """A policy and a group of its completions as `update` sees them, with B = 1."""

    policy: tokrl.Policy
    tokens: torch.Tensor  # (1,G,T)
    mask: torch.Tensor  # (1,G,T)
    every: torch.Tensor  # log-probabilities of every token, (1,G,T,V)
    logprobs: torch.Tensor  # (1,G,T)
    old_logprobs: torch.Tensor  # (1,G,T)

    def weights(self, loss: str, kind: str = "off", at: str = "all"):
        """Effective weights, transformed everywhere or at shared tokens only."""
        w = effective_weights(loss, self.logprobs, self.old_logprobs, A, self.mask)
        changed = transform_weights(w, A, self.mask, kind)
        shared = tokrl.shared_tokens(self.tokens)[:, None]  # (1,1,T)
        return torch.where(shared, changed, w) if at == "shared" else changed

    def loss(self, weights):
        """The policy loss under these weights."""
        return policy_loss(self.logprobs, weights, A)

    def left(self, loss) -> float:
        """‖Σ_i push_i‖ / Σ_i ‖push_i‖ at the opening, by autograd: 0 cancels, 1 does not at all."""
        (gradient,) = torch.autograd.grad(loss, self.every, retain_graph=True)
        pushes = gradient[0, :, : len(OPENING)]  # (G,2,V); at a place one distribution for all G
        total = pushes.norm(dim=-1).sum().item()
        return pushes.sum(0).norm(dim=-1).sum().item() / total if total else 0.0  # all clipped


def random_policy() -> tokrl.Policy:
    """A policy in float64 that has learnt nothing."""
    return tokrl.Policy(tokrl.named_generator(0, "audit, policy")).double()


def flat_gradient(value, policy):
    """The gradient of one number in all parameters, a vector."""
    parameters = list(policy.parameters())
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def shared_group(lengths=(5, 5, 5, 5, 5), spread=0.0, shared_ratio=1.0) -> Group:
    """Random digits behind the opening; their log-ratios have this spread."""
    generator = tokrl.named_generator(0, "audit, group")
    shape = (1, len(lengths), max(lengths))
    tokens = torch.randint(2, 12, shape, generator=generator)
    tokens[..., : len(OPENING)] = OPENING
    log_ratio = spread * torch.randn(shape, dtype=torch.float64, generator=generator)
    log_ratio[..., : len(OPENING)] = math.log(shared_ratio)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    policy = random_policy()
    rows = tokrl.distinct_rows(PROMPT, tokens)
    every = tokrl.completion_logprobs(policy, *rows, max(lengths))
    logprobs = tokrl.pick(every, tokens)
    return Group(policy, tokens, mask[None], every, logprobs, logprobs.detach() - log_ratio)


def left_in(situation: str, loss: str, kind: str = "off", at: str = "all") -> float:
    """What does not cancel at the shared tokens in one of SITUATIONS."""
    group = shared_group(**SITUATIONS[situation])
    return group.left(group.loss(group.weights(loss, kind, at)))


def audit_eq2(loss: str) -> Row:
    """Eq. 2 at a token that the whole group shares, for one loss."""
    left = {name: left_in(name, loss) for name in SITUATIONS}
    word = verdict_by_case({case: x < ROUNDING for case, x in left.items()})
    return Row("Eq. 2", f"{loss}: the pushes on a shared token cancel", listed(left), word)


def audit_part_of_a_group() -> Row:
    """Where only some share a token their Â do not sum to 0: what is left is their credit."""
    texts = ["7+5=12", "7+5=13", "7+4=11", "5+7=12", "5+7=21"]
    tokens = tokrl.completion_tokens(texts, 8)[None]
    mask = tokrl.completion_mask(tokens)
    policy = random_policy()
    old_logprobs = tokrl.token_logprobs(policy, PROMPT, tokens)
    parameters = parameters_to_vector(policy.parameters())
    noise = torch.randn(len(parameters), generator=tokrl.named_generator(0, "audit, noise"))
    vector_to_parameters(parameters + 0.01 * noise, policy.parameters())
    logprobs = tokrl.token_logprobs(policy, PROMPT, tokens)
    apart = {}
    for loss in ("prefix", "seq"):
        w = effective_weights(loss, logprobs, old_logprobs, A, mask)[0]
        found = []
        for i, j in itertools.combinations(range(len(texts)), 2):
            together = tokrl.shared_tokens(tokens[:, [i, j]])[0]  # (T,)
            found += (w[i] / w[j] - 1)[together].abs().tolist()
        apart[loss] = max(found)
    says = "prefix: those of a group that share a token, all or some, push it with one weight"
    text = "largest relative difference: " + listed(apart)
    return Row("Eq. 2", says, text, verdict(apart["prefix"] < ROUNDING))


# ---- 3. Section 4: two trajectories, Â = ∓A, a shared token, the product u of the others' ratios
def audit_section4(loss: str, formula: str) -> Row:
    """What is left of the two pushes, in 100 groups of random values."""
    generator = torch.Generator().manual_seed(0)
    size, rho, u1, u2 = torch.rand(4, 100, dtype=torch.float64, generator=generator) + 0.5
    log_r = torch.stack([rho, u1, rho, u2], dim=1).view(100, 2, 2).log()
    advantages = torch.stack([-size, size], dim=1)
    mask = torch.ones(100, 2, 2)
    w = effective_weights(loss, log_r, 0 * log_r, advantages, mask, math.inf, max_length=1)
    expected = size * rho * (u2 - u1).abs() / 2 if loss == "seq" else 0.0
    error = (net_push(w, advantages)[:, 0] - expected).abs().max().item()
    text = listed({f"{loss}, 100 groups, largest error": error})
    return Row("§4", f"left of two pushes, {formula}", text, verdict(error < ROUNDING))


def audit_section4_clip() -> Row:
    """A clip that looks at the sign of Â, and one that does not."""
    left = {loss: left_in("a clip bites", loss) for loss in ("dr_grpo", "grpo_sym")}
    says = "an asymmetric clip breaks the cancellation, a symmetric one (GRPO-fix) repairs it"
    word = verdict(left["dr_grpo"] > 0.1 and left["grpo_sym"] < ROUNDING)
    return Row("§4", says, listed(left), word)


def audit_past_and_future() -> Row:
    """The coupled weight in two: trajectories that share a token share its past, no more."""
    group = shared_group(**SITUATIONS["off-policy"])
    log_r = (group.logprobs - group.old_logprobs).detach()
    log_from_here = log_r.flip(-1).cumsum(-1).flip(-1)  # Σ_{u≥t}
    past = group.weights("prefix")
    future = (log_from_here - log_r).exp()
    error = (past * future / group.weights("seq") - 1).abs().max().item()
    weights = {"past": past, "future": future, "future and own": log_from_here.exp()}
    left = {name: group.left(group.loss(w)) for name, w in weights.items()}
    says = "seq = past (prefix, Π_{u≤t} r) · future (Π_{u>t} r); only the future breaks Eq. 2"
    text = listed({"largest error of the product": error}) + "; left: " + listed(left)
    broken = min(left["future"], left["future and own"]) > 1e-3
    return Row("§4", says, text, verdict(error < ROUNDING and left["past"] < ROUNDING and broken))


# ---- 4. Prop. 3.1: one step moves the policy at the shared place h*
def logprobs_at_h(policy):
    """log π(·|h*): after the prompt, where the first shared token is chosen."""
    return policy(PROMPT)[0, -1]


def group_step(kind: str, own_term_only: bool):
    """A step of a group under seq, off-policy: the policy, its direction g, and gᵀFg at h*."""
    group = shared_group(**SITUATIONS["off-policy"])
    w = group.weights("seq", kind)
    if own_term_only:  # Eq. 2's term: what the first shared token itself does
        w = w * (torch.arange(w.shape[-1]) == 0)
    g = -flat_gradient(group.loss(w), group.policy)
    log_p = logprobs_at_h(group.policy)
    p = log_p.detach().exp()
    change = torch.stack([flat_gradient(x, group.policy) @ g for x in log_p])
    gFg = (p * change**2).sum() - (p * change).sum() ** 2  # variance of log π's change
    return group.policy, g, gFg.item()


def audit_prop31() -> Row:
    """The KL after one step in parameter space, at nine step sizes."""
    policy, g, gFg = group_step("off", own_term_only=True)
    before = logprobs_at_h(policy).detach()
    start = parameters_to_vector(policy.parameters()).detach()
    predicted = np.logspace(-9.9, -5.1, 9)
    found = []
    for eta in np.sqrt(2 * predicted / gFg):
        vector_to_parameters(start + eta * g, policy.parameters())
        after = logprobs_at_h(policy).detach()
        change = before - after
        kl = after.exp() * (torch.expm1(change) - change)  # KL(after ‖ before), losing no digits
        found.append(kl.sum().item())
    slope = np.polyfit(np.log(predicted) / 2, np.log(found), 1)[0]
    worst = np.abs(found / predicted - 1).max()
    text = f"nine η: slope of log KL over log η {slope:.3f}, largest relative error {worst:.0e}"
    word = verdict(abs(slope - 2) < 0.01 and worst < 0.01)
    return Row("Prop. 3.1", "the KL at h* after a step is ½ η² gᵀFg", text, word)


def audit_prop31_other_tokens() -> Row:
    """Shared parameters carry the other tokens' gradients to h*."""
    forms = {}
    forms["own term, min"] = group_step("min", own_term_only=True)[2]
    for kind in ("min", "off"):
        forms[f"whole step, {kind}"] = group_step(kind, own_term_only=False)[2]
    says = "where the net push is 0, a step does not move π(·|h*)"
    word = verdict(forms["whole step, min"] < 1e-3 * forms["whole step, off"])
    return objection("Prop. 3.1", says, "gᵀFg at h*: " + listed(forms), word)


# ---- 5. Cor. 3.2: a softmax of three outputs; a and b, the first two, are right
def push_outputs(logits, a: float, b: float):
    """Logits after the step a (e_a − p) + b (e_b − p)."""
    return logits + tensor([a, b, 0.0]) - (a + b) * logits.softmax(0)


def log_odds_change(p, kappa_a: float, kappa_b: float) -> float:
    """Of a and b, each pushed half of the time."""
    moved = push_outputs(tensor(p).log(), kappa_a / 2, kappa_b / 2) - tensor(p).log()
    return (moved[0] - moved[1]).item()


def audit_cor32() -> Row:
    """Exact where a and b are equally likely, with c(x) = ½; where they are not, no c(x) serves."""
    even = [0.45, 0.45, 0.1]
    errors = {
        "κ = (1, 1)": log_odds_change(even, 1.0, 1.0),
        "κ = (1.2, 1)": log_odds_change(even, 1.2, 1.0) - 0.1,
        "κ = (1, 2)": log_odds_change(even, 1.0, 2.0) + 0.5,
        "κ = (1, 1) at p = (.6, .3, .1)": log_odds_change([0.6, 0.3, 0.1], 1.0, 1.0),
    }
    says = "the log-odds of a and b change by η c (κ_a − κ_b), so not at all under equal weights"
    text = "error over η at p = (.45, .45, .1), c = ½: " + listed(errors)
    word = verdict_by_case({case: abs(x) < ROUNDING for case, x in errors.items()})
    return Row("Cor. 3.2", says, text, word)


def audit_cor32_collapse() -> Row:
    """κ_a = 1.1, κ_b = 1 for 3,000 steps, pushed as often as sampled, or equally often."""
    sampled = tensor([0.42, 0.42, 0.16]).log()
    equally = sampled
    for _ in range(3000):
        p = sampled.softmax(0)
        sampled = push_outputs(sampled, 1.1 * p[0].item(), p[1].item())
        equally = push_outputs(equally, 1.1 / 2, 1.0 / 2)
    entropy = {}
    ends = {"pushed as often as sampled": sampled, "pushed equally often": equally}
    for name, logits in ends.items():
        log_q = logits[:2].log_softmax(0)
        entropy[name] = -(log_q.exp() * log_q).sum().item() / math.log(2)
    word = verdict_by_case({case: x < 0.05 for case, x in entropy.items()})
    says = "where κ_a > κ_b persists, the entropy of a and b goes to 0"
    return Row("Cor. 3.2", says, "entropy after 3,000 steps: " + listed(entropy), word)


# ---- 6. Cor. 3.3: how rare is cancellation?
def audit_cor33_random() -> Row:
    """Random unclipped sequence-coupled weights, 100,000 groups of four."""
    shape = (100_000, 4, 3)
    generator = torch.Generator().manual_seed(0)
    log_ratio = 0.1 * torch.randn(shape, dtype=torch.float64, generator=generator)
    rewards = torch.rand(shape[:2], dtype=torch.float64, generator=generator)
    advantages = group_advantages(rewards, normalize=False)
    mask = torch.ones(shape)
    w = effective_weights("seq", log_ratio, torch.zeros(shape), advantages, mask, max_length=1)
    smallest = net_push(w, advantages)[:, 0].min().item()
    text = listed({"smallest net push of 100,000 draws": smallest})
    says = "seq, off-policy: cancellation has measure zero"
    return Row("Cor. 3.3", says, text, verdict(smallest > 1e-9))


def audit_cor33_norm() -> Row:
    """Measure zero is about continuous ratios; some cases have positive probability."""
    advantages = tensor([[1.0, -1.0]])
    old = tensor([[[-1.0, -2.0], [-1.0, -0.5]]])
    moved = old + tensor([[[0.0, 1.0], [0.0, -1.0]]])
    copies = tensor([[[-1.0, -2.0], [-1.0, -2.0]]])
    cases = {
        "later inner steps": ("seq", moved, old),
        "first inner step": ("seq", old, old),
        "identical completions": ("seq", copies + 0.3, copies),
        "fully clipped group": ("gspo", moved, old),
    }
    found = {}
    for name, (loss, logprobs, old_logprobs) in cases.items():
        w = effective_weights(loss, logprobs, old_logprobs, advantages, torch.ones(1, 2, 2))
        found[name] = net_push(w, advantages)[0, 0].item()
    word = verdict_by_case({case: x > ROUNDING for case, x in found.items()})
    return Row("Cor. 3.3", "non-cancellation is the norm", "net push: " + listed(found), word)


def audit_cor33_necessary() -> Row:
    """Equal weights suffice."""
    found = net_push(tensor([[[1.0], [3.0], [2.0]]]), tensor([[1.0, 1.0, -2.0]])).item()
    text = listed({"Â = (1, 1, −2), w = (1, 3, 2): net push": found})
    return objection("Cor. 3.3", "only equal weights cancel", text, verdict(found > ROUNDING))


# ---- 7. Eqs. 17 and 18, and the two controls
EQUATIONS = {"min": "Eq. 17", "orth": "Eq. 18", "mean": "control", "shrink": "control"}


def audit_transform(kind: str, at: str = "all") -> Row:
    """Every loss in every situation, by autograd."""
    worst = max(left_in(name, loss, kind, at) for name in SITUATIONS for loss in tokrl.LOSSES)
    where = " at shared tokens only" if at == "shared" else ""
    says = f"{kind}{where}: the pushes on a shared token cancel under every loss"
    text = listed({"most that is left": worst})
    return Row(EQUATIONS[kind], says, text, verdict(worst < ROUNDING))


def audit_stop_gradient(kind: str) -> Row:
    """Let the gradient flow through the weights of seq, and the shared token is pushed again."""
    group = shared_group(**SITUATIONS["off-policy"])
    ratio = (group.logprobs - group.old_logprobs).sum(-1, keepdim=True).exp()
    with warnings.catch_warnings(action="ignore"):  # tokrl's weights carry no gradient
        w = transform_weights(ratio.expand_as(group.logprobs), A, group.mask, kind)
    left = {
        "stopped": group.left(group.loss(w)),  # by policy_loss
        "flowing": group.left(-(A[..., None] * w * group.logprobs).sum()),
    }
    word = verdict(left["stopped"] < ROUNDING and left["flowing"] > 1e-3)
    return Row(EQUATIONS[kind], f"{kind}: the stop-gradient is needed", listed(left), word)


def audit_one_gradient() -> Row:
    """What cancels adds nothing to the gradient of the parameters, whatever it is that cancels."""
    group = shared_group(**SITUATIONS["off-policy"])
    apart = {}
    for at in ("shared", "all"):
        g = flat_gradient(group.loss(group.weights("seq", "min", at)), group.policy)
        for kind in ("mean", "orth"):
            other = flat_gradient(group.loss(group.weights("seq", kind, at)), group.policy)
            apart[f"{kind} at {at}"] = ((other - g).norm() / g.norm()).item()
    says = "min, mean, orth at shared tokens only: one gradient of the parameters"
    word = verdict(max(apart["mean at shared"], apart["orth at shared"]) < ROUNDING)
    return Row("Eqs. 17, 18", says, "relative difference from min: " + listed(apart), word)


# ---- 8. The price of other weights: bias, by enumeration
def tree_logprobs(root, branches):
    """The two log-probabilities of each of the sequences 00 01 02 10 ... 22: (9,2)."""
    first = root.log_softmax(0).repeat_interleave(3)
    return torch.stack([first, branches.log_softmax(1).flatten()], dim=-1)


def enumerated_gradients(loss, kind, seed=0, spread=0.3, G=2, normalize=False):
    """E[gradient] over all 9^G groups of a random tree, and (G−1)/G ∇E[R]: two vectors.

    The tree has 3 tokens and 2 steps. The second is what the first should be; (G−1)/G, as a reward
    also stands in its own group's mean. `spread` is that of new logits about those that sampled.
    """
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(3, dtype=torch.float64, generator=generator).requires_grad_()
    branches = torch.randn(3, 3, dtype=torch.float64, generator=generator).requires_grad_()
    old_root = root - spread * torch.randn(3, dtype=torch.float64, generator=generator)
    noise = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    new = tree_logprobs(root, branches)
    old = tree_logprobs(old_root, branches - spread * noise).detach()
    reward = tensor([1.0, 0, 0, 1, 0.5, 0, 0, 0, 1])

    groups = torch.cartesian_prod(*[torch.arange(9)] * G)  # (9^G,G)
    advantages = group_advantages(reward[groups], normalize)
    mask = torch.ones(len(groups), G, 2)
    w = effective_weights(loss, new[groups], old[groups], advantages, mask, math.inf, max_length=1)
    w = transform_weights(w, advantages, mask, kind)
    probability = old[groups].sum((1, 2)).exp()[:, None, None]  # of each group
    expected = -policy_loss(new[groups], w * probability, advantages) * len(groups)
    wanted = (new.sum(-1).exp() * reward).sum() * (G - 1) / G
    gradients = []
    for value in (expected, wanted):
        parts = torch.autograd.grad(value, [root, branches], retain_graph=True)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    return gradients


def bias(expected, wanted) -> float:
    """How far a gradient is from what it should be, over the size of that."""
    return ((expected - wanted).norm() / wanted.norm()).item()


def audit_bias(loss: str, kind: str) -> Row:
    """Twenty trees: without dividing Â by the std, and with, as in training.

    That division also changes the gradient's size, which a learning rate could mend: what counts
    there is the bias at the best size.
    """
    plain = []
    divided = []
    for seed in range(20):
        plain.append(bias(*enumerated_gradients(loss, kind, seed)))
        expected, wanted = enumerated_gradients(loss, kind, seed, normalize=True)
        best = (expected @ wanted) / (expected @ expected)
        divided.append(bias(best * expected, wanted))
    text = "relative bias in 20 trees: "
    text += f"Â not divided by std {min(plain):.1%} to {max(plain):.1%}, "
    text += f"divided, at its best size {min(divided):.1%} to {max(divided):.1%}"
    fine = {"Â not divided": max(plain) < ROUNDING, "Â divided by std": max(divided) < ROUNDING}
    says = f"{loss} {kind}, off-policy, no clip: E[gradient] = (1 − 1/G) ∇E[R]"
    return objection("Eqs. 17, 18", says, text, verdict_by_case(fine))


# ---- 9. The paper's three predictions for DFPO, from the recorded runs
DFPO = "on seq"
OTHERS = ("off gspo", "off seq")


def rollouts_to_90(run: dict) -> float:
    """The first evaluation with an accuracy of 0.9, or all rollouts."""
    steps = run["curves"]["step"]
    enough = np.array(run["curves"]["accuracy"]) >= 0.9
    return steps[enough.argmax()] if enough.any() else steps[-1]


def jitter(run: dict) -> float:
    """Mean |second difference| of accuracy over the evaluations."""
    return np.abs(np.diff(run["curves"]["accuracy"], 2)).mean()


def final_accuracy(run: dict) -> float:
    """Mean over the last quarter of training."""
    return run["final"]["accuracy"]


PREDICTIONS = {  # what is said: the number of a run, and the sign of what is better
    "fewer rollouts to accuracy 0.9": (rollouts_to_90, -1),
    "smaller second differences of accuracy": (jitter, -1),
    "higher final accuracy": (final_accuracy, 1),
}


def recorded_arms(path: Path) -> dict:
    """{label: its runs, one per seed}. ValueError: not recorded, or not in pairs."""
    record = f"record {path.name} with: python -m figures.experiments losses"
    tokrl.require(path.exists(), f"there are no runs: {record}")
    arms = json.loads(path.read_text())["arms"]
    seeds = {}
    for label in (DFPO, *OTHERS):
        tokrl.require(isinstance(arms.get(label), list), f"there are no runs of {label}: {record}")
        seeds[label] = [run["seed"] for run in arms[label]]
        tokrl.require(seeds[label] == seeds[DFPO], f"{label} has other seeds than {DFPO}: {record}")
    return arms


def audit_predictions(arms: dict) -> list[Row]:
    """Differences by seed with 95% t intervals; what counts survives Holm's correction over six."""
    rows = []
    p_values = []
    for says, (value, better) in PREDICTIONS.items():
        ours = np.array([value(run) for run in arms[DFPO]])
        for other in OTHERS:
            theirs = np.array([value(run) for run in arms[other]])
            mean, low, high, p = t_interval(ours - theirs)
            p_values.append(p)
            text = f"{mean:+.3g} [{low:+.3g}, {high:+.3g}], {len(ours)} seeds, p = {p:.2g}"
            word = "holds" if mean * better > 0 else "the opposite holds"
            statement = f"DFPO ({DFPO}) has {says} than {other}"
            rows.append(Row("predictions", statement, "difference " + text, word))
    for row, established in zip(rows, holm(p_values), strict=True):
        if not established:
            row.verdict = "not established"
    return rows


# ---- 10. The table
def audit(arms: dict) -> list[Row]:
    """All rows, in the order of the paper; `arms` are the recorded runs."""
    rows = [audit_eq2(loss) for loss in tokrl.LOSSES]
    rows.append(audit_part_of_a_group())
    rows.append(audit_section4("dr_grpo", "token-factorised: (ρ/2)(Â₁ + Â₂) = 0"))
    rows.append(audit_section4("seq", "sequence-coupled: (Aρ/2)|u₂ − u₁|"))
    rows += [audit_past_and_future(), audit_section4_clip()]
    rows += [audit_prop31(), audit_prop31_other_tokens()]
    rows += [audit_cor32(), audit_cor32_collapse()]
    rows += [audit_cor33_random(), audit_cor33_norm(), audit_cor33_necessary()]
    rows += [audit_transform("min"), audit_stop_gradient("min")]
    rows += [audit_transform("orth"), audit_stop_gradient("orth")]
    rows += [audit_transform("min", at="shared"), audit_one_gradient()]
    rows += [audit_transform("mean"), audit_transform("shrink")]
    rows += [audit_bias("seq", "min"), audit_bias("seq", "orth")]
    rows += [audit_bias(loss, "off") for loss in ("seq", "prefix", "dr_grpo")]
    return rows + audit_predictions(arms)


def page(rows: list[Row]) -> str:
    """Markdown."""
    head = "| place | what the paper says, or “what one may read into it” | measured | verdict |"
    lines = [head, "| --- | --- | --- | --- |"]
    for row in rows:
        cells = [row.place, row.statement, row.measured, row.verdict]
        lines.append("| " + " | ".join(cell.replace("|", "∣") for cell in cells) + " |")
    return PAGE.format(table="\n".join(lines))


def main():
    """Print the table, and write it to audit.md."""
    torch.set_num_threads(1)
    sys.stdout.reconfigure(errors="replace")  # a console without "ρ" shows a "?"
    rows = audit(recorded_arms(HERE / "losses.json"))
    for row in rows:
        print(f"{row.place}: {row.statement}\n    {row.measured}\n    -> {row.verdict}\n")
    (HERE / "audit.md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
