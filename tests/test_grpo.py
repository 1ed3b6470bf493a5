"""GRPO: the standardised advantage, the clipped objective on and off policy, and the first update."""

import itertools

import pytest
import torch
from test_run import TINY, read
from tiny import all_completions, as_batch, exact_logprobs, float64, gradient, llama_config, make_policy

import nano_rl.grpo as grpo


def run(model, folder, reward_fn=None, **args):
    return grpo.train(grpo.Args(model=model, output_dir=str(folder), **(TINY | {"group_size": 2} | args)), reward_fn)


def test_advantages_by_hand():
    advantages = grpo.compute_advantages(torch.tensor([1.0, 3.0, 5.0] + [0.1] * 3), 3)  # std 2, and 0
    torch.testing.assert_close(advantages[:3], torch.tensor([-2.0, 0.0, 2.0]) / 2.0001)
    assert advantages[3:].tolist() == [0, 0, 0]


def test_advantages_against_a_naive_loop():
    rewards, G = torch.randn(12, generator=torch.Generator().manual_seed(0)), 4
    expected = []
    for i in range(12):
        group = [rewards[j].item() for j in range(12) if j // G == i // G]
        mean = sum(group) / G
        std = (sum((r - mean) ** 2 for r in group) / (G - 1)) ** 0.5
        expected.append((rewards[i].item() - mean) / (std + 1e-4))
    torch.testing.assert_close(grpo.compute_advantages(rewards, G), torch.tensor(expected))


@pytest.mark.parametrize("advantage, ratio, loss, slope", [
    (1, 0.5, -0.5, -1), (1, 1.0, -1.0, -1), (1, 1.5, -1.2, 0),
    (-1, 0.5, 0.8, 0), (-1, 1.0, 1.0, 1), (-1, 1.5, 1.5, 1),
])  # fmt: skip
def test_clipping(advantage, ratio, loss, slope):
    """Value and derivative in the ratio, for both signs of the advantage (pitfall 26)."""
    old = torch.tensor([[-1.0]])
    ratio = torch.tensor([[ratio]], requires_grad=True)
    ratio_again, one = grpo.compute_ratio(old + ratio.log(), old), torch.ones(1, 1)
    value = grpo.compute_loss(ratio_again, torch.zeros(1, 1), torch.tensor([float(advantage)]), one, 0.2, 0.0, 1)
    value.backward()
    assert value.item() == pytest.approx(loss) and ratio.grad.item() == pytest.approx(slope)


def test_a_loss_of_zero_has_a_gradient():
    """On policy the advantages of a group cancel in the loss, not in its gradient (pitfall 30)."""
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -1.5]], requires_grad=True)
    ratio, ones = grpo.compute_ratio(logprobs, logprobs.detach()), torch.ones(2, 2)
    advantages = grpo.compute_advantages(torch.tensor([0.0, 1.0]), 2)
    loss = grpo.compute_loss(ratio, 0 * ones, advantages, ones, 0.2, 0.0, 2)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7) and logprobs.grad.abs().min() > 0.1


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("off_policy", [False, True])
def test_the_expected_gradient_is_that_of_the_stated_objective(off_policy, kl_coef):
    """Over every pair of completions that π_old can give, with clipping of both signs where π_θ has moved."""
    completions, G = all_completions(5, 2, {1}), 2
    policy, ref_policy = (float64(make_policy(llama_config(5), seed)) for seed in (0, 7))
    old_policy = float64(make_policy(llama_config(5), 3 if off_policy else 0))
    batch = as_batch([2, 4], completions, pad=1)
    logprobs = grpo.compute_logprobs(policy, batch, 0.6)
    with torch.no_grad():
        old, ref = (grpo.compute_logprobs(model, batch, 0.6) for model in (old_policy, ref_policy))
        probabilities = exact_logprobs(old_policy, [2, 4], completions, 0.6).exp()
    ratio, kl = grpo.compute_ratio(logprobs, old), grpo.compute_kl(logprobs, ref)
    rewards = torch.rand(len(completions), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = truth = 0.0
    clipped = {True: 0, False: 0}
    for group in itertools.product(range(len(completions)), repeat=G):
        group, weight = list(group), probabilities[list(group)].prod()
        advantages = grpo.compute_advantages(rewards[group], G)
        rows = (ratio[group], kl[group], advantages, batch["mask"][group])
        ours = ours + weight * grpo.compute_loss(*rows, 0.2, kl_coef, num_completions=G)
        scores = rewards[group]
        for i, a in zip(group, (scores - scores.mean()) / (scores.std() + 1e-4)):
            tokens = 0.0
            for t in range(len(completions[i])):
                rho = (logprobs[i, t] - old[i, t]).exp()
                bounded = min(max(rho, 0.8), 1.2)
                if (rho * a).item() > float(torch.as_tensor(bounded * a).detach()):
                    clipped[bool(a > 0)] += 1
                k3 = (ref[i, t] - logprobs[i, t]).exp() - (ref[i, t] - logprobs[i, t]) - 1
                tokens = tokens + min(rho * a, bounded * a) - kl_coef * k3
            truth = truth - weight * tokens / len(completions[i]) / G
    assert (min(clipped.values()) > 0) == off_policy
    torch.testing.assert_close(ours, truth, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient(ours, policy), gradient(truth, policy), atol=1e-9, rtol=0)


def test_the_kl_in_the_loss_has_the_gradient_of_kl_of_ref_and_policy():
    """Of one token, on policy, as the docstring says; and not of the KL that RLOO's reward pays for (pitfall 22)."""
    policy, ref_policy = (float64(make_policy(llama_config(5), seed)) for seed in (0, 7))
    batch = as_batch([2, 4], [[token] for token in range(5)], pad=1)
    logprobs = grpo.compute_logprobs(policy, batch, 0.6)
    with torch.no_grad():
        ref_logprobs = grpo.compute_logprobs(ref_policy, batch, 0.6)
    ours = gradient((logprobs.detach().exp() * grpo.compute_kl(logprobs, ref_logprobs)).sum(), policy)
    truth = gradient((ref_logprobs.exp() * (ref_logprobs - logprobs)).sum(), policy)  # KL(π_ref, π_θ)
    other = gradient((logprobs.exp() * (logprobs - ref_logprobs)).sum(), policy)  # KL(π_θ, π_ref)
    torch.testing.assert_close(ours, truth, atol=1e-9, rtol=0)
    assert (other - truth).norm() > 1e-2


def test_the_first_update_is_on_policy(model, tmp_path, monkeypatch):
    """The ratio is identically 1 and the KL 0; with a second update the ratio leaves 1 (pitfalls 7, 12, 32)."""
    scored, ratios, kls = [], [], []
    compute_logprobs, compute_ratio, compute_kl = grpo.compute_logprobs, grpo.compute_ratio, grpo.compute_kl

    def spy_logprobs(policy, batch, temperature):
        if torch.is_grad_enabled():
            scored.append(batch["input_ids"])
        return compute_logprobs(policy, batch, temperature)

    def spy_ratio(logprobs, old_logprobs):
        ratios.append((compute_ratio(logprobs, old_logprobs).detach(), old_logprobs.clone()))
        return compute_ratio(logprobs, old_logprobs)

    def spy_kl(logprobs, ref_logprobs):
        kls.append((compute_kl(logprobs, ref_logprobs).detach(), ref_logprobs.clone()))
        return compute_kl(logprobs, ref_logprobs)

    monkeypatch.setattr(grpo, "compute_logprobs", spy_logprobs)
    monkeypatch.setattr(grpo, "compute_ratio", spy_ratio)
    monkeypatch.setattr(grpo, "compute_kl", spy_kl)
    args = {"num_updates": 2, "kl_coef": 0.1, "num_steps": 1, "learning_rate": 0.05, "micro_batch_tokens": 40}
    folder = run(model, tmp_path / "run", **args)
    parts = len(ratios) // 2
    assert parts > 1 and len(scored) == len(ratios) == len(kls) == 2 * parts, "no pass but those of the updates"
    for part in range(parts):
        (first, old), (second, same_old) = ratios[part], ratios[part + parts]
        assert (first == 1).all() and (second != 1).any() and torch.equal(old, same_old)
        (first, ref), (second, same_ref) = kls[part], kls[part + parts]
        assert (first == 0).all() and (second > 0).any() and torch.equal(ref, same_ref)
    masks = [old != 0 for _, old in ratios]  # log π of a sampled token is never 0 here
    row = read(folder)[1]
    assert row["ratio"] == pytest.approx(torch.cat([r[m] for (r, _), m in zip(ratios, masks)]).mean().item())
    assert row["kl"] == pytest.approx(torch.cat([k[m] for (k, _), m in zip(kls, masks)]).mean().item())
    assert row["entropy_estimate"] == pytest.approx(
        -torch.cat([o[m] for (_, o), m in zip(ratios, masks)]).mean().item()
    )


@pytest.mark.parametrize("num_updates", [1, 3])
def test_metrics_are_over_all_updates(model, tmp_path, monkeypatch, num_updates):
    """The norm is their mean, and clipped is a token whose loss has no gradient for that."""
    norms, slopes, clip, compute_loss = [], [], torch.nn.utils.clip_grad_norm_, grpo.compute_loss

    def spy_loss(ratio, kl, advantages, mask, *coefs):
        own = ratio.detach().clone().requires_grad_()
        compute_loss(own, kl.detach(), advantages, mask, *coefs).backward()
        slopes.append((own.grad == 0)[mask.bool() & (advantages != 0)[:, None]])
        return compute_loss(ratio, kl, advantages, mask, *coefs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *inputs: norms.append(clip(*inputs)) or norms[-1])
    monkeypatch.setattr(grpo, "compute_loss", spy_loss)

    def reward_fn(completions, **_):  # no two are equal, so that every token has an advantage
        return [len(text) + 0.01 * i for i, text in enumerate(completions)]

    args = {"num_updates": num_updates, "num_steps": 1, "learning_rate": 0.05, "max_grad_norm": 0.5}
    row = read(run(model, tmp_path / "run", reward_fn, **args))[1]
    assert len(norms) == num_updates and row["grad_norm"] == pytest.approx(torch.stack(norms).mean().item())
    assert row["clip_ratio/region_mean"] == pytest.approx(torch.cat(slopes).float().mean().item())
    if num_updates == 1:
        assert row["ratio"] == 1 and row["clip_ratio/region_mean"] == 0
    else:
        assert row["ratio"] != 1 and row["clip_ratio/region_mean"] > 0
    assert "kl" not in row, "what was not computed is absent"


def test_equal_rewards_still_have_the_gradient_of_the_kl(model, tmp_path):
    def equal(completions, **_):
        return [0.7] * len(completions)

    still = read(run(model, tmp_path / "still", equal))
    assert [row["grad_norm"] for row in still[1:]] == [0, 0, 0]
    calls = []  # 8 of the first evaluation, then one a step

    def equal_in_the_second_step(completions, **_):
        calls.append(1)
        return equal(completions) if len(calls) == 10 else [float(len(text)) for text in completions]

    moved = read(run(model, tmp_path / "moved", equal_in_the_second_step, kl_coef=0.1, eval_every=0))
    assert moved[2]["frac_reward_zero_std"] == 1 and moved[2]["grad_norm"] > 0


def test_group_sizes_that_cannot_be(model, tmp_path):
    with pytest.raises(grpo.InputError, match="--group-size 1: must be 2 or more"):
        run(model, tmp_path / "run", group_size=1)
