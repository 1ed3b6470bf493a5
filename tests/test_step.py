"""One step of every file on a tiny model, recomputed with naive loops from its docstring: the gradient and the metrics.

That the functions are right is proven elsewhere. Here it is what `train` makes of them: which log π, which sign, which
flag, and that completions which were cut off count (pitfalls 23, 25, 29). π_ref is another model than π_θ, so that the
KL is not 0.
"""

import math
from pathlib import Path
from statistics import mean, pstdev, stdev

import pytest
import torch
from test_run import read
from transformers import AutoModelForCausalLM

from nano_rl import (
    cispo,
    dapo,
    distill,
    dr_grpo,
    grpo,
    gspo,
    maxrl,
    ppo,
    raft,
    reinforce,
    reinforce_pp,
    remax,
    rloo,
)

N, G, T, BETA, TEMPERATURE, START, STOP = 12, 4, 6, 0.3, 0.8, 0.5, 1  # START is the first held-out reward


class Step:
    """Of completion i its reward r, the greedy answer's and, of its token t, log π and k1 = log π - log π_ref."""

    def __init__(self, models: list, batch: dict, rewards: list[float], greedy_rewards: list[float]) -> None:
        self.r, self.greedy = rewards, greedy_rewards
        self.ids, self.logprobs, self.k1 = [], [], []
        for row, attended, mask in zip(batch["input_ids"], batch["attention_mask"], batch["mask"]):
            ids, length = row[attended.bool()], int(mask.sum())  # no padding
            both = [(model(ids[None]).logits[0] / TEMPERATURE).log_softmax(dim=1) for model in models]
            logprobs, ref_logprobs = (table[:-1].gather(1, ids[1:, None])[-length:, 0] for table in both)
            self.ids.append(ids[-length:].tolist())
            self.logprobs.append(logprobs)
            self.k1.append((logprobs - ref_logprobs).tolist())
        self.lengths = list(map(len, self.ids))

    def R(self, i: int) -> float:
        return self.r[i] - BETA * sum(self.k1[i])

    def group(self, i: int) -> range:
        return range(i - i % G, i - i % G + G)

    def grpo(self, i: int) -> float:
        group = [self.r[j] for j in self.group(i)]
        return (self.r[i] - mean(group)) / (stdev(group) + 1e-4)

    def k3_slope(self, i: int, t: int) -> float:  # of k = π_ref/π - log(π_ref/π) - 1 in log π
        return 1 - math.exp(-self.k1[i][t])

    def to_go(self, i: int, t: int) -> float:
        return sum(self.k1[i][t:])


def whitened(s: Step, i: int, t: int) -> float:
    returns = [s.r[j] - BETA * s.to_go(j, u) for j in range(N) for u in range(s.lengths[j])]
    return (s.r[i] - BETA * s.to_go(i, t) - mean(returns)) / (pstdev(returns) + 1e-4)


def gae(s: Step, i: int, t: int, gamma: float, gae_lambda: float) -> float:
    advantage, last = 0.0, s.lengths[i] - 1
    for u in range(t, last + 1):
        delta = -BETA * s.k1[i][u] - START + (s.r[i] if u == last else gamma * START)  # every V is START
        advantage += (gamma * gae_lambda) ** (u - t) * delta
    return advantage


def gae_whitened(s: Step, i: int, t: int) -> float:
    every = [gae(s, j, u, 0.95, 0.7) for j in range(N) for u in range(s.lengths[j])]
    return (gae(s, i, t, 0.95, 0.7) - mean(every)) / (pstdev(every) + 1e-4)


def dapos_reward(s: Step, i: int) -> float:
    return s.r[i] - min(1, max(0, (s.lengths[i] - (T - 3)) / 3))


def dapos(s: Step, i: int) -> float:
    group = [dapos_reward(s, j) for j in s.group(i)]
    return (dapos_reward(s, i) - mean(group)) / (stdev(group) + 1e-4)


def is_best(s: Step, i: int) -> bool:
    return s.R(i) == max(s.R(j) for j in s.group(i))


def over_the_mean(s: Step, i: int) -> float:
    right = mean(s.r[j] for j in s.group(i))
    return (s.r[i] - right) / right if right else 0.0


def all_R(s: Step) -> list[float]:
    return [s.R(j) for j in range(N)]


GAE = {"gamma": 0.95, "gae_lambda": 0.7, "value_warmup_steps": 0, "num_minibatches": 1}
STEPS = {  # name: file, its flags, and of token t of completion i what multiplies ∇ log π in -∇L
    "none": (reinforce, {"baseline": "none"}, lambda s, i, t: s.R(i) / N),
    "mean": (reinforce, {"baseline": "mean"}, lambda s, i, t: (s.R(i) - mean(all_R(s))) / N),
    "ema": (reinforce, {"baseline": "ema"}, lambda s, i, t: (s.R(i) - START) / N),
    "scst": (reinforce, {"baseline": "scst"}, lambda s, i, t: (s.R(i) - s.greedy[i]) / N),
    "whiten": (
        reinforce,
        {"whiten_advantages": True},
        lambda s, i, t: (s.R(i) - mean(all_R(s))) / (stdev(all_R(s)) + 1e-4) / N,
    ),
    "rloo": (rloo, {}, lambda s, i, t: (s.R(i) - mean(s.R(j) for j in s.group(i) if j != i)) / N),
    "remax": (remax, {}, lambda s, i, t: (s.r[i] - s.greedy[i] - BETA * s.to_go(i, t)) / N),
    "raft": (raft, {"num_epochs": 1}, lambda s, i, t: is_best(s, i) / s.lengths[i] / (N / G)),
    "grpo": (grpo, {}, lambda s, i, t: (s.grpo(i) - BETA * s.k3_slope(i, t)) / s.lengths[i] / N),
    "ppo": (ppo, GAE, lambda s, i, t: gae(s, i, t, 0.95, 0.7) / N),
    "ppo whitens": (ppo, GAE | {"whiten_advantages": True}, lambda s, i, t: gae_whitened(s, i, t) / N),
    "ppo warms up": (ppo, GAE | {"value_warmup_steps": 1}, lambda s, i, t: gae(s, i, t, 0.95, 1.0) / N),
    "dr_grpo": (
        dr_grpo,
        {},
        lambda s, i, t: (s.r[i] - mean(s.r[j] for j in s.group(i)) - BETA * s.k3_slope(i, t)) / (N * T),
    ),
    "gspo": (gspo, {}, lambda s, i, t: (s.grpo(i) - BETA * s.k3_slope(i, t)) / s.lengths[i] / N),
    "cispo": (cispo, {}, lambda s, i, t: (s.grpo(i) - BETA * s.k3_slope(i, t)) / sum(s.lengths)),
    "dapo": (dapo, {"overlong_margin": 3}, lambda s, i, t: dapos(s, i) / sum(s.lengths)),
    "reinforce_pp": (reinforce_pp, {}, lambda s, i, t: whitened(s, i, t) / s.lengths[i] / N),
    "maxrl": (maxrl, {}, lambda s, i, t: over_the_mean(s, i) / N),
    "distill": (distill, {}, lambda s, i, t: -s.k1[i][t] / N),
    "distill to go": (distill, {"reward_to_go": True}, lambda s, i, t: -s.to_go(i, t) / N),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_that_of_the_docstring(model, tmp_path, monkeypatch, name):
    file, flags, coefficient = STEPS[name]
    teacher = str(Path(model).parent / "teacher")
    batches, temperatures, rewards, gradients = [], [], [], []
    sample, load_policy, clip = file.sample, file.load_policy, torch.nn.utils.clip_grad_norm_

    def load_with_another_start(args, device):
        policy, _, tokenizer = load_policy(args, device)
        return policy, file.load(AutoModelForCausalLM, teacher, device)[0], tokenizer

    def reward_fn(completions, **_):  # no two are equal, but maxrl's are 0 or 1
        values = [len(text) / 10 + 0.037 * i for i, text in enumerate(completions)]
        rewards.append([float(len(text) % 2) for text in completions] if file is maxrl else values)
        return rewards[-1]

    def spy_sample(*inputs, **how):
        temperatures.append(how.get("temperature", inputs[-1]))
        batches.append(sample(*inputs, **how))
        return batches[-1]

    def spy_clip(parameters, max_norm):
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        return clip(parameters, max_norm)

    monkeypatch.setattr(file, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(file, "evaluate", lambda *_: ({"eval/reward": torch.tensor(START)}, []))
    monkeypatch.setattr(file, "load_policy", load_with_another_start)
    monkeypatch.setattr(file, "sample", spy_sample)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy_clip)
    options = {"batch_size": N, "group_size": G, "max_new_tokens": T, "temperature": TEMPERATURE, "kl_coef": BETA}
    options |= {"num_steps": 1, "num_updates": 1, "micro_batch_tokens": 50, "teacher": teacher}
    options = {flag: value for flag, value in options.items() if hasattr(file.Args, flag)} | flags
    folder = file.train(file.Args(model=model, output_dir=str(tmp_path / "run"), **options), reward_fn)
    policy, ref_policy = (AutoModelForCausalLM.from_pretrained(name) for name in (model, teacher))
    step = Step([policy, ref_policy], batches[0][0], rewards[0], rewards[-1])
    assert temperatures in ([TEMPERATURE], [TEMPERATURE, 0]), "the second: a greedy baseline"

    tokens = [(i, t) for i in range(N) for t in range(step.lengths[i])]
    objective = sum(coefficient(step, i, t) * step.logprobs[i][t] for i, t in tokens)
    expected = -torch.cat([g.flatten() for g in torch.autograd.grad(objective, list(policy.parameters()))])
    torch.testing.assert_close(gradients[0], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())

    if file is ppo:  # V's bias, which stands last: V is V_old here, and what it lacks is A, not whitened
        gae_lambda = 1.0 if name == "ppo warms up" else 0.7
        slope = -sum(gae(step, i, t, 0.95, gae_lambda) for i, t in tokens) / N
        assert gradients[1][-1].item() == pytest.approx(slope, rel=1e-4)

    k3 = [math.exp(-k1) + k1 - 1 for row in step.k1 for k1 in row]
    is_in_the_loss = file in (grpo, dr_grpo, gspo, cispo)
    metrics = {
        "reward": mean(step.r),
        "reward_std": pstdev(step.r),
        "frac_reward_zero_std": mean(file is maxrl and len({step.r[j] for j in step.group(i)}) == 1 for i in range(N)),
        "completions/mean_length": mean(step.lengths),
        "completions/clipped_ratio": mean(ids[-1] != STOP for ids in step.ids),
        "entropy_estimate": -torch.cat(step.logprobs).mean().item(),
        "kl": mean(k3) if is_in_the_loss else mean(k1 for row in step.k1 for k1 in row),
        "grad_norm": expected.norm().item(),
    }
    absent = {raft: {"entropy_estimate"}, dapo: {"kl"}, maxrl: {"kl"}}.get(file, set())
    row = read(folder)[1]
    assert metrics.keys() - row.keys() == absent
    for metric in metrics.keys() - absent:
        assert row[metric] == pytest.approx(metrics[metric], rel=1e-4), metric
    assert 0 < row["completions/clipped_ratio"] < 1 and len(set(step.lengths)) > 2, "both kinds, of several lengths"
    if file is raft:
        assert row["best_reward"] == pytest.approx(mean(max(step.r[i : i + G]) for i in range(0, N, G)))
