"""The audit: what each place of the paper says, what is measured, and whether it holds.

    python -m figures.audit        prints the table and writes figures/audit.md; a few seconds

Each audit_... function gives rows of the table; a verdict is computed, never written down
beforehand. A policy that has learnt nothing is enough: what cancels does so at any parameters. Only
the predictions read recorded runs, those of figures/losses.json.
"""

import itertools
import json
import math
import sys
from dataclasses import astuple, dataclass
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


def verdict(holds: bool | dict[str, bool]) -> str:
    """Of a statement, or of its cases: without the first, the plainest, it fails."""
    cases = holds if isinstance(holds, dict) else {"": holds}
    exceptions = [case for case in cases if not cases[case]]
    if exceptions and exceptions[0] != next(iter(cases)):
        return "holds except: " + ", ".join(exceptions)
    return "fails" if exceptions else "holds"


def listed(numbers: dict) -> str:
    """Names and numbers in a line; rounding, which differs between machines, as 0."""
    parts = []
    for name, x in numbers.items():
        digits = ".1e" if ROUNDING < abs(x) < 1e-3 else ".3g"
        parts.append(f"{name} {0.0 if abs(x) < ROUNDING else x:{digits}}")
    return ", ".join(parts)


def tested(place: str, statement: str, numbers: dict, holds, head: str = "") -> Row:
    """A row whose numbers are named, after some words on all of them."""
    return Row(place, statement, head + listed(numbers), verdict(holds))


def objection(row: Row) -> Row:
    """The same where the statement is not the paper's, but may be read into that place."""
    word = f"the quoted statement {row.verdict}"
    return Row(f"{row.place}, objection", f"“{row.statement}”", row.measured, word)


def tensor(values):
    """In float64, where numbers made by hand are exact to 1e-15."""
    return torch.tensor(values, dtype=torch.float64)


# ---- 2. Eq. 2: a group of five that shares the opening "7+" of the prompt "75="
SITUATIONS = {  # lengths; spread of the log-ratios after the opening; ratio at the opening
    "on-policy": ((5, 5, 5, 5, 5), 0.0, 1.0),
    "unequal lengths": ((3, 5, 4, 6, 5), 0.0, 1.0),
    "off-policy": ((5, 5, 5, 5, 5), 0.03, 1.02),
    "a clip bites": ((5, 5, 5, 5, 5), 0.0, 1.8),
}


class Group:
    """A policy that has learnt nothing, and completions as `update` sees them: 7+ and digits."""

    def __init__(self, situation: str):
        lengths, spread, shared_ratio = SITUATIONS[situation]
        generator = tokrl.named_generator(0, "audit, group")
        shape = (1, len(lengths), max(lengths))  # (B,G,T), B = 1
        self.tokens = torch.randint(2, 12, shape, generator=generator)
        self.tokens[..., :2] = torch.tensor(encode("7+"))
        self.mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])[None]
        self.advantages = group_advantages(tensor([[1, 0, 0, 1, 0]]))
        self.policy = tokrl.Policy(tokrl.named_generator(0, "audit, policy")).double()
        self.logprobs = tokrl.token_logprobs(self.policy, prompt(), self.tokens)
        log_ratio = spread * torch.randn(shape, dtype=torch.float64, generator=generator)
        log_ratio[..., :2] = math.log(shared_ratio)
        self.old_logprobs = self.logprobs.detach() - log_ratio

    def weights(self, loss: str, kind: str = "off", at: str = "all"):
        """Effective weights, transformed everywhere or at shared tokens only."""
        w = effective_weights(loss, self.logprobs, self.old_logprobs, self.advantages, self.mask)
        changed = transform_weights(w, self.advantages, self.mask, kind)
        shared = tokrl.shared_tokens(self.tokens)[:, None]  # (1,1,T)
        return torch.where(shared, changed, w) if at == "shared" else changed

    def loss(self, weights):
        """The policy loss under these weights."""
        return policy_loss(self.logprobs, weights, self.advantages)

    def left(self, loss) -> float:
        """|Σ_i push_i| / Σ_i |push_i| at the opening, by autograd: 0 cancels, 1 does not at all."""
        (pushes,) = torch.autograd.grad(loss, self.logprobs, retain_graph=True)
        pushes = pushes[0, :, :2]  # (G,2); at each of the two places log π is one number for all G
        total = pushes.abs().sum().item()
        return pushes.sum(0).abs().sum().item() / total if total else 0.0  # all clipped


def prompt():
    """75= as (B,P), B = 1."""
    return tokrl.prompt_tokens(["75="])


def left_in(situation: str, loss: str, kind: str = "off", at: str = "all") -> float:
    """What does not cancel at the shared tokens in one of SITUATIONS."""
    group = Group(situation)
    return group.left(group.loss(group.weights(loss, kind, at)))


def audit_eq2(loss: str) -> Row:
    left = {situation: left_in(situation, loss) for situation in SITUATIONS}
    says = f"{loss}: the pushes on a shared token cancel"
    return tested("Eq. 2", says, left, {case: x < ROUNDING for case, x in left.items()})


def audit_part_of_a_group() -> Row:
    """Where only some share a token their Â do not sum to 0: what is left is their credit."""
    tokens = tokrl.completion_tokens(["7+5=12", "7+5=13", "7+4=11", "5+7=12", "5+7=21"], 8)[None]
    mask = tokrl.completion_mask(tokens)
    group = Group("on-policy")
    policy = group.policy
    old_logprobs = tokrl.token_logprobs(policy, prompt(), tokens)
    parameters = parameters_to_vector(policy.parameters())
    noise = torch.randn(len(parameters), generator=tokrl.named_generator(0, "audit, noise"))
    vector_to_parameters(parameters + 0.01 * noise, policy.parameters())
    logprobs = tokrl.token_logprobs(policy, prompt(), tokens)
    apart = {}
    for loss in ("prefix", "seq"):
        w = effective_weights(loss, logprobs, old_logprobs, group.advantages, mask)[0]
        found = []
        for i, j in itertools.combinations(range(5), 2):
            together = tokrl.shared_tokens(tokens[:, [i, j]])[0]  # (T,)
            found += (w[i] / w[j] - 1)[together].abs().tolist()
        apart[loss] = max(found)
    says = "prefix: those of a group that share a token, all or some, push it with one weight"
    return tested("Eq. 2", says, apart, apart["prefix"] < ROUNDING, "largest relative difference: ")


# ---- 3. Section 4: two trajectories, Â = ∓A, a shared token, the product u of the others' ratios
def audit_section4(loss: str, formula: str) -> Row:
    """What is left of the two pushes, in 100 groups of random values."""
    generator = torch.Generator().manual_seed(0)
    size, rho, u1, u2 = torch.rand(4, 100, dtype=torch.float64, generator=generator) + 0.5
    log_r = torch.stack([rho, u1, rho, u2], dim=1).view(100, 2, 2).log()
    advantages = torch.stack([-size, size], dim=1)
    mask = torch.ones(100, 2, 2, dtype=torch.bool)
    w = effective_weights(loss, log_r, 0 * log_r, advantages, mask, math.inf, max_length=1)
    expected = size * rho * (u2 - u1).abs() / 2 if loss == "seq" else 0.0
    error = (net_push(w, advantages)[:, 0] - expected).abs().max().item()
    name = f"{loss}, 100 groups, largest error"
    return tested("§4", f"left of two pushes, {formula}", {name: error}, error < ROUNDING)


def audit_section4_clip() -> Row:
    left = {loss: left_in("a clip bites", loss) for loss in ("dr_grpo", "grpo_sym")}
    says = "an asymmetric clip breaks the cancellation, a symmetric one (GRPO-fix) repairs it"
    return tested("§4", says, left, left["dr_grpo"] > 0.1 and left["grpo_sym"] < ROUNDING)


def audit_past_and_future() -> Row:
    """The coupled weight in two: trajectories that share a token share its past, no more."""
    group = Group("off-policy")
    log_r = (group.logprobs - group.old_logprobs).detach()
    log_from_here = log_r.flip(-1).cumsum(-1).flip(-1)  # Σ_{u≥t}
    past = group.weights("prefix")
    future = (log_from_here - log_r).exp()
    error = (past * future / group.weights("seq") - 1).abs().max().item()
    weights = {"past": past, "future": future, "future and own": log_from_here.exp()}
    left = {name: group.left(group.loss(w)) for name, w in weights.items()}
    says = "seq = past (prefix, Π_{u≤t} r) · future (Π_{u>t} r); only the future breaks Eq. 2"
    head = listed({"largest error of the product": error}) + "; left: "
    broken = min(left["future"], left["future and own"]) > 1e-3
    return tested("§4", says, left, error < ROUNDING and left["past"] < ROUNDING and broken, head)


# ---- 4. Prop. 3.1: one step moves the policy at the shared place h*
def logprobs_at_h(policy):
    """log π(·|h*): after the prompt, where the first shared token is chosen."""
    return policy(prompt())[0, -1]


def flat_gradient(value, parameters):
    """The gradient of one number in all parameters, a vector."""
    gradients = torch.autograd.grad(value, list(parameters), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def group_step(kind: str, own_term_only: bool):
    """A step of a group under seq, off-policy: the policy, its direction g, and gᵀFg at h*."""
    group = Group("off-policy")
    w = group.weights("seq", kind)
    if own_term_only:  # Eq. 2's term: what the first shared token itself does
        w[..., 1:] = 0.0
    g = -flat_gradient(group.loss(w), group.policy.parameters())
    log_p = logprobs_at_h(group.policy)
    p = log_p.detach().exp()
    change = torch.stack([flat_gradient(x, group.policy.parameters()) @ g for x in log_p])
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
    still = forms["whole step, min"] < 1e-3 * forms["whole step, off"]
    return objection(tested("Prop. 3.1", says, forms, still, "gᵀFg at h*: "))


# ---- 5. Cor. 3.2: a softmax of three outputs; a and b, the first two, are right
def push_outputs(logits, push):
    """Logits after the step Σ_a push_a (e_a − p): (3,), (3,) -> (3,)."""
    return logits + push - push.sum() * logits.softmax(0)


def log_odds_change(p, kappa_a: float, kappa_b: float) -> float:
    """Of a and b, each pushed half of the time."""
    logits = tensor(p).log()
    moved = push_outputs(logits, tensor([kappa_a, kappa_b, 0.0]) / 2) - logits
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
    holds = {case: abs(x) < ROUNDING for case, x in errors.items()}
    return tested("Cor. 3.2", says, errors, holds, "error over η at p = (.45, .45, .1), c = ½: ")


def audit_cor32_collapse() -> Row:
    """κ_a = 1.1, κ_b = 1 for 3,000 steps, pushed as often as sampled, or equally often."""
    kappa = tensor([1.1, 1.0, 0.0])
    sampled = tensor([0.42, 0.42, 0.16]).log()
    equally = sampled
    for _ in range(3000):
        sampled = push_outputs(sampled, kappa * sampled.softmax(0))
        equally = push_outputs(equally, kappa / 2)
    entropy = {}
    for name, logits in ("pushed as often as sampled", sampled), ("pushed equally often", equally):
        log_q = logits[:2].log_softmax(0)
        entropy[name] = -(log_q.exp() * log_q).sum().item() / math.log(2)
    says = "where κ_a > κ_b persists, the entropy of a and b goes to 0"
    holds = {case: x < 0.05 for case, x in entropy.items()}
    return tested("Cor. 3.2", says, entropy, holds, "entropy after 3,000 steps: ")


# ---- 6. Cor. 3.3: how rare is cancellation?
def audit_cor33_random() -> Row:
    """Random unclipped sequence-coupled weights, 100,000 groups of four."""
    shape = (100_000, 4, 3)
    generator = torch.Generator().manual_seed(0)
    log_ratio = 0.1 * torch.randn(shape, dtype=torch.float64, generator=generator)
    rewards = torch.rand(shape[:2], dtype=torch.float64, generator=generator)
    advantages = group_advantages(rewards, normalize=False)
    mask = torch.ones(shape, dtype=torch.bool)
    w = effective_weights("seq", log_ratio, torch.zeros(shape), advantages, mask, max_length=1)
    smallest = net_push(w, advantages)[:, 0].min().item()
    says = "seq, off-policy: cancellation has measure zero"
    return tested(
        "Cor. 3.3", says, {"smallest net push of 100,000 draws": smallest}, smallest > 1e-9
    )


def audit_cor33_norm() -> Row:
    """Measure zero is about continuous ratios; some cases have positive probability."""
    advantages = tensor([[1.0, -1.0]])
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    log_r = tensor([[[0.0, 1.0], [0.0, -1.0]]])
    cases = {
        "later inner steps": ("seq", log_r),
        "first inner step": ("seq", torch.zeros(1, 2, 2)),
        "identical completions": ("seq", torch.full((1, 2, 2), 0.3)),
        "fully clipped group": ("gspo", log_r),
    }
    found = {}
    for name, (loss, log_ratio) in cases.items():
        w = effective_weights(loss, log_ratio, 0 * log_ratio, advantages, mask)
        found[name] = net_push(w, advantages)[0, 0].item()
    holds = {case: x > ROUNDING for case, x in found.items()}
    return tested("Cor. 3.3", "non-cancellation is the norm", found, holds, "net push: ")


def audit_cor33_necessary() -> Row:
    found = net_push(tensor([[[1.0], [3.0], [2.0]]]), tensor([[1.0, 1.0, -2.0]])).item()
    numbers = {"Â = (1, 1, −2), w = (1, 3, 2): net push": found}
    return objection(tested("Cor. 3.3", "only equal weights cancel", numbers, found > ROUNDING))


# ---- 7. Eqs. 17 and 18
EQUATIONS = {"min": "Eq. 17", "orth": "Eq. 18"}


def audit_transform(kind: str, at: str = "all") -> Row:
    """Every loss in every situation, by autograd."""
    worst = max(left_in(name, loss, kind, at) for name in SITUATIONS for loss in tokrl.LOSSES)
    where = " at shared tokens only" if at == "shared" else ""
    says = f"{kind}{where}: the pushes on a shared token cancel under every loss"
    return tested(EQUATIONS[kind], says, {"most that is left": worst}, worst < ROUNDING)


def audit_stop_gradient(kind: str) -> Row:
    """Let the gradient flow through the weights of seq, and the shared token is pushed again."""
    group = Group("off-policy")
    A = group.advantages
    ratio = (group.logprobs - group.old_logprobs).sum(-1, keepdim=True).exp()
    w = transform_weights(ratio.expand_as(group.logprobs), A, group.mask, kind)
    left = {
        "stopped": group.left(group.loss(w)),  # by policy_loss
        "flowing": group.left(-(A[..., None] * w * group.logprobs).sum()),
    }
    says = f"{kind}: the stop-gradient is needed"
    needed = left["stopped"] < ROUNDING and left["flowing"] > 1e-3
    return tested(EQUATIONS[kind], says, left, needed)


def audit_one_gradient() -> Row:
    """What cancels adds nothing to the gradient of the parameters, whatever it is that cancels."""
    group = Group("off-policy")
    apart = {}
    for at in ("shared", "all"):
        losses = [group.loss(group.weights("seq", kind, at)) for kind in ("min", "orth")]
        by_min, by_orth = (flat_gradient(loss, group.policy.parameters()) for loss in losses)
        apart[f"orth at {at}"] = ((by_orth - by_min).norm() / by_min.norm()).item()
    says = "min and orth at shared tokens only: one gradient of the parameters"
    one = apart["orth at shared"] < ROUNDING
    return tested("Eqs. 17, 18", says, apart, one, "relative difference from min: ")


# ---- 8. The price of other weights: bias, by enumeration
def tree_logprobs(logits):
    """The two log-probabilities of each of the sequences 00 01 02 10 ... 22: (4,3) -> (9,2).

    Row 0 are the logits of the first token, the others those of the second after a 0, 1 and 2.
    """
    logprobs = logits.log_softmax(1)
    return torch.stack([logprobs[0].repeat_interleave(3), logprobs[1:].flatten()], dim=-1)


def enumerated_gradients(loss, kind, seed=0, spread=0.3, G=2, normalize=False):
    """E[gradient] over all 9^G groups of a random tree, and (G−1)/G ∇E[R]: two vectors.

    The second is what the first should be; (G−1)/G, as a reward also stands in its own group's
    mean. `spread` is that of the new logits about those that sampled.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 3, dtype=torch.float64, generator=generator).requires_grad_()
    noise = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    new = tree_logprobs(logits)
    old = tree_logprobs(logits - spread * noise).detach()
    reward = tensor([1.0, 0, 0, 1, 0.5, 0, 0, 0, 1])

    groups = torch.cartesian_prod(*[torch.arange(9)] * G)  # (9^G,G)
    advantages = group_advantages(reward[groups], normalize)
    mask = torch.ones(len(groups), G, 2, dtype=torch.bool)
    w = effective_weights(loss, new[groups], old[groups], advantages, mask, math.inf, max_length=1)
    w = transform_weights(w, advantages, mask, kind)
    probability = old[groups].sum((1, 2)).exp()[:, None, None]  # of each group
    expected = -policy_loss(new[groups], w * probability, advantages) * len(groups)
    wanted = (new.sum(-1).exp() * reward).sum() * (G - 1) / G
    return flat_gradient(expected, [logits]), flat_gradient(wanted, [logits])


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
    says = f"{loss} {kind}, off-policy, no clip: E[gradient] = (1 − 1/G) ∇E[R]"
    text = (
        f"relative bias in 20 trees: Â not divided by std {min(plain):.1%} to {max(plain):.1%}, "
        f"divided, at its best size {min(divided):.1%} to {max(divided):.1%}"
    )
    fine = {"Â not divided": max(plain) < ROUNDING, "Â divided by std": max(divided) < ROUNDING}
    return objection(Row("Eqs. 17, 18", says, text, verdict(fine)))


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


PREDICTIONS = {  # what is said: the number of a run, and the sign of what is better
    "fewer rollouts to accuracy 0.9": (rollouts_to_90, -1),
    "smaller second differences of accuracy": (jitter, -1),
    "higher final accuracy": (lambda run: run["final"]["accuracy"], 1),
}


def recorded_arms(path: Path) -> dict:
    """{label: its runs, one per seed}. ValueError: they cannot be read."""
    try:
        arms = json.loads(path.read_text())["arms"]
        return {label: arms[label] for label in (DFPO, *OTHERS)}
    except (OSError, ValueError, KeyError, TypeError):
        record = "record it with: python -m figures.experiments losses"
        raise ValueError(f"{path.name} is missing or damaged: {record}") from None


def audit_predictions(arms: dict) -> list[Row]:
    """Differences by seed with 95% t intervals; what counts survives Holm's correction over six."""
    rows = []
    p_values = []
    for says, (value, better) in PREDICTIONS.items():
        for other in OTHERS:
            pairs = zip(arms[DFPO], arms[other], strict=True)
            differences = [value(ours) - value(theirs) for ours, theirs in pairs]
            mean, low, high, p = t_interval(differences)
            p_values.append(p)
            statement = f"DFPO ({DFPO}) has {says} than {other}"
            text = f"difference {mean:+.3g} [{low:+.3g}, {high:+.3g}], "
            text += f"{len(differences)} seeds, p = {p:.2g}"
            word = "holds" if mean * better > 0 else "the opposite holds"
            rows.append(Row("predictions", statement, text, word))
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
    rows += [audit_bias("seq", "min"), audit_bias("seq", "orth")]
    rows += [audit_bias(loss, "off") for loss in ("seq", "prefix", "dr_grpo")]
    return rows + audit_predictions(arms)


def page(rows: list[Row]) -> str:
    """The rows as the Markdown of audit.md."""
    head = "| place | what the paper says, or “what one may read into it” | measured | verdict |"
    lines = [head, "| --- | --- | --- | --- |"]
    for row in rows:
        cells = [cell.replace("|", "∣") for cell in astuple(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return PAGE.format(table="\n".join(lines))


def main() -> int:
    """Print the table, and write it to audit.md. Returns 0, or 2 where there are no runs to read."""
    try:
        arms = recorded_arms(HERE / "losses.json")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    rows = audit(arms)
    for row in rows:
        print(f"{row.place}: {row.statement}\n    {row.measured}\n    -> {row.verdict}\n")
    (HERE / "audit.md").write_text(page(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console without "ρ" shows a "?"
    sys.exit(main())
