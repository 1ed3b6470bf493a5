"""ReMax: the greedy baseline, the KL from each token on, and their exact gradient."""

import pytest
import torch
from test_run import TINY, read, same, weights
from tiny import all_completions, as_batch, exact_logprobs, float64, gradient, llama_config, make_policy

import nano_rl.reinforce as reinforce
import nano_rl.remax as remax


def run(model, folder, reward_fn=None, **args):
    return remax.train(remax.Args(model=model, output_dir=str(folder), **(TINY | args)), reward_fn)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_expected_gradient_is_that_of_j_minus_beta_kl(beta):
    """The KL as reward-to-go has the full gradient; a token's own KL alone would not (pitfalls 24, 44)."""
    completions = all_completions(5, 3, {1})
    policy, ref_policy = (float64(make_policy(llama_config(5), seed)) for seed in (0, 7))
    exact = exact_logprobs(policy, [2, 4], completions, 0.6)
    with torch.no_grad():
        ref_exact = exact_logprobs(ref_policy, [2, 4], completions, 0.6)
    rewards = torch.rand(85, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = gradient((exact.exp() * (rewards - beta * (exact - ref_exact))).sum(), policy)

    batch = as_batch([2, 4], completions, pad=1)
    logprobs = remax.compute_logprobs(policy, batch, 0.6)
    kl = logprobs.detach() - remax.compute_logprobs(ref_policy, batch, 0.6).detach()
    advantages = remax.compute_advantages(rewards, torch.full_like(rewards, 0.21), kl, beta)
    weighted = exact.exp().detach()[:, None] * advantages
    ours = -gradient(remax.compute_loss(logprobs, weighted, batch["mask"], num_completions=1), policy)
    torch.testing.assert_close(ours, truth, atol=1e-9, rtol=0)


def test_advantages_and_loss_against_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    rewards, greedy = torch.randn(2, 3, generator=generator)
    kl, logprobs = torch.randn(2, 3, 4, generator=generator)
    mask = (torch.arange(4)[None] < torch.tensor([1, 4, 2])[:, None]).long()
    kl, logprobs, expected, loss = kl * mask, logprobs * mask, torch.zeros(3, 4), 0.0
    for i in range(3):
        for t in range(4):
            expected[i, t] = rewards[i] - greedy[i] - 0.5 * sum(kl[i, s] for s in range(t, 4))
            loss -= mask[i, t] * expected[i, t] * logprobs[i, t] / 7
    advantages = remax.compute_advantages(rewards, greedy, kl, 0.5)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(remax.compute_loss(logprobs, advantages, mask, 7), loss)


def test_without_the_kl_it_is_scst(model, tmp_path):
    """A whole run, to the last bit: metrics, completions and weights."""
    args = TINY | {"model": model, "num_steps": 3}
    ours = remax.train(remax.Args(output_dir=str(tmp_path / "remax"), **args))
    scst = reinforce.train(reinforce.Args(output_dir=str(tmp_path / "scst"), baseline="scst", **args))
    assert read(ours) == read(scst) and read(ours, "completions.jsonl") == read(scst, "completions.jsonl")
    assert same(weights(ours), weights(scst)) and read(ours)[1]["grad_norm"] > 0


def test_equal_rewards_are_a_step_of_zero_gradient(model, tmp_path):
    folder = run(model, tmp_path / "run", lambda completions, **_: [0.7] * len(completions))
    assert [row["grad_norm"] for row in read(folder)[1:]] == [0, 0, 0]
