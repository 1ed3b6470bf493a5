"""RAFT: the best of each group, the exact gradient of its objective, and several passes."""

import itertools

import pytest
import torch
from test_run import TINY, read, same, weights
from tiny import all_completions, as_batch, exact_logprobs, float64, gradient, llama_config, make_policy

import nano_rl.raft as raft


def run(model, folder, reward_fn=None, **args):
    return raft.train(raft.Args(model=model, output_dir=str(folder), **(TINY | {"group_size": 2} | args)), reward_fn)


def test_the_first_of_the_best_is_chosen():
    rewards = torch.tensor([0.1, 0.7, 0.3, 0.7] + [0.5] * 4 + [3.0, -1.0, 2.0, 0.0])
    assert raft.compute_advantages(rewards, 4).tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    for order in itertools.permutations(range(4)):  # permute a group: the same completion trains
        chosen = raft.compute_advantages(rewards[[8, 9, 10, 11]][list(order)], 4)
        assert order[chosen.argmax()] == 0 and chosen.sum() == 1


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("vocab_size, max_tokens, group_size", [(5, 2, 2), (2, 3, 4)])
def test_the_expected_gradient_is_that_of_the_stated_objective(vocab_size, max_tokens, group_size, off_policy):
    """Of E[log-likelihood of the best of G, a mean over its tokens], the groups drawn by π_θ or by another policy."""
    policy, completions = float64(make_policy(llama_config(vocab_size))), all_completions(vocab_size, max_tokens, {1})
    exact = exact_logprobs(policy, [0], completions, 0.6)
    sampled_by = float64(make_policy(llama_config(vocab_size), 3 if off_policy else 0))
    probabilities = exact_logprobs(sampled_by, [0], completions, 0.6).exp().detach()
    rewards = torch.randint(0, 4, (len(completions),), generator=torch.Generator().manual_seed(1)).double()  # with ties
    truth, coefficients = 0.0, torch.zeros_like(rewards)
    for group in itertools.product(range(len(completions)), repeat=group_size):
        probability = probabilities[list(group)].prod()
        best = max(group, key=lambda i: rewards[i])  # max returns the first
        if len({rewards[i].item() for i in group}) > 1:
            truth = truth + probability * exact[best] / len(completions[best])
        advantages = raft.compute_advantages(rewards[list(group)], group_size)
        coefficients.index_add_(0, torch.tensor(group), probability * advantages)
    batch = as_batch([0], completions, pad=1)
    logprobs = raft.compute_logprobs(policy, batch, 0.6)
    ours = gradient(raft.compute_loss(logprobs, coefficients, batch["mask"], num_prompts=1), policy)
    torch.testing.assert_close(-ours, gradient(truth, policy), atol=1e-9, rtol=0)


def test_loss_against_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(6)[None] < torch.tensor([1, 6, 3, 4])[:, None]).long()
    logprobs, advantages = -torch.rand(4, 6, generator=generator) * mask, torch.tensor([1.0, 0.0, 1.0, 1.0])
    loss = -sum(advantages[i] * sum(logprobs[i, : mask[i].sum()]) / mask[i].sum() for i in range(4)) / 2
    torch.testing.assert_close(raft.compute_loss(logprobs, advantages, mask, num_prompts=2), loss)


def test_groups_without_a_best_are_left_out_and_counted(model, tmp_path):
    folder = run(model, tmp_path / "run", lambda completions, **_: [0.7] * len(completions))
    assert [row["frac_reward_zero_std"] for row in read(folder)[1:]] == [1, 1, 1]
    assert [row["grad_norm"] for row in read(folder)[1:]] == [0, 0, 0]


def test_it_trains_on_the_chosen_alone_and_in_epochs(model, tmp_path, monkeypatch):
    """The second pass finds them more likely; nothing is called entropy."""
    passes, compute_logprobs = [], raft.compute_logprobs

    def spy(policy, batch, temperature):
        logprobs = compute_logprobs(policy, batch, temperature)
        if torch.is_grad_enabled():
            passes.append((batch["advantages"], logprobs.detach()))
        return logprobs

    def reward_fn(completions, **_):  # no two are equal, so that every group has a best
        return [len(text) + 0.01 * i for i, text in enumerate(completions)]

    monkeypatch.setattr(raft, "compute_logprobs", spy)
    row = read(run(model, tmp_path / "run", reward_fn, num_steps=1, num_epochs=2, learning_rate=1e-2))[1]
    (first, before), (second, after) = passes
    assert first.tolist() == second.tolist() == [1, 1], "the best of each of two groups"
    assert after.sum() > before.sum()
    assert row["best_reward"] > row["reward"] and not any("entropy" in name for name in row)


def test_a_step_without_a_best_moves_as_a_gradient_of_zero_does(model, tmp_path):
    """In one process as in two: Adam goes on with what it remembers."""
    calls = []  # 8 of the first evaluation, then one a step

    def equal_in_the_second_step(completions, **_):
        calls.append(1)
        return [1.0 if len(calls) == 10 else float(len(text)) for text in completions]

    one = run(model, tmp_path / "one", equal_in_the_second_step, num_steps=1, eval_every=0)
    calls.clear()
    two = run(model, tmp_path / "two", equal_in_the_second_step, num_steps=2, eval_every=0)
    assert read(two)[2]["frac_reward_zero_std"] == 1 and read(two)[2]["grad_norm"] == 0
    assert not same(weights(one), weights(two))


@pytest.mark.parametrize("group_size", [0, 1])
def test_group_sizes_that_cannot_be(model, tmp_path, group_size):
    with pytest.raises(raft.InputError, match=f"--group-size {group_size}: must be 2 or more"):
        run(model, tmp_path / "run", group_size=group_size)
