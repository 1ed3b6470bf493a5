"""RLOO: the leave-one-out advantage, its exact gradient, and the groups that reach it."""

import itertools

import pytest
import torch
from test_run import TINY, read, weights
from tiny import all_completions, as_batch, exact_logprobs, float64, gradient, llama_config, make_policy
from transformers import AutoModelForCausalLM

import nano_rl.rloo as rloo


def run(model, folder, reward_fn=None, **args):
    return rloo.train(rloo.Args(model=model, output_dir=str(folder), **(TINY | {"group_size": 2} | args)), reward_fn)


@pytest.mark.parametrize("vocab_size, max_tokens, group_size", [(5, 3, 2), (5, 2, 3), (2, 3, 4)])
def test_the_expected_gradient_is_the_true_one(vocab_size, max_tokens, group_size):
    """Over every group of every completion: 85^2, 21^3, and the EOS chain's 4^4 (pitfall 18)."""
    policy, completions = float64(make_policy(llama_config(vocab_size))), all_completions(vocab_size, max_tokens, {1})
    exact = exact_logprobs(policy, [0], completions, 0.6)
    rewards = torch.rand(len(completions), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = gradient((exact.exp() * rewards).sum(), policy)
    probabilities, coefficients = exact.exp().detach(), torch.zeros_like(rewards)
    groups = torch.tensor(list(itertools.product(range(len(completions)), repeat=group_size)))
    advantages = rloo.compute_advantages(rewards[groups].flatten(), group_size).view(-1, group_size)
    group_probabilities = probabilities[groups].prod(dim=1, keepdim=True)
    coefficients.index_add_(0, groups.flatten(), (group_probabilities * advantages / group_size).flatten())
    batch = as_batch([0], completions, pad=1)
    logprobs = rloo.compute_logprobs(policy, batch, 0.6)
    ours = -gradient(rloo.compute_loss(logprobs, coefficients, batch["mask"], num_completions=1), policy)
    torch.testing.assert_close(ours, truth, atol=1e-9, rtol=0)


def test_advantages_by_hand():
    assert rloo.compute_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2).tolist() == [-2, 2, 0, 0]
    assert rloo.compute_advantages(torch.tensor([0.0, 3.0, 6.0]), 3).tolist() == [-4.5, 0, 4.5]
    equal = torch.tensor([0.1] * 3 + [0.7] * 3).double()  # numbers of float32, as `score` returns them
    assert rloo.compute_advantages(equal, 3).tolist() == [0] * 6  # exactly


def test_advantages_against_a_naive_loop():
    rewards, G = torch.randn(12, generator=torch.Generator().manual_seed(0)), 4
    expected = []
    for i in range(12):
        others = [rewards[j] for j in range(12) if j // G == i // G and j != i]
        expected.append(rewards[i] - sum(others) / (G - 1))
    torch.testing.assert_close(rloo.compute_advantages(rewards, G), torch.stack(expected))


def test_loss_against_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(6)[None] < torch.tensor([1, 6, 3, 4])[:, None]).long()
    logprobs, advantages = torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator)
    loss = 0.0
    for i in range(4):
        for t in range(int(mask[i].sum())):
            loss -= advantages[i] * logprobs[i, t] / 7
    torch.testing.assert_close(rloo.compute_loss(logprobs, advantages, mask, num_completions=7), loss)


def test_a_group_is_one_prompt(model, tmp_path):
    """A reward that depends on the prompt alone leaves nothing to learn (pitfall 15)."""
    folder = run(model, tmp_path / "run", lambda prompts, **_: [len(prompt) / 10 for prompt in prompts], batch_size=6)
    metrics = read(folder)
    assert [row["grad_norm"] for row in metrics[1:]] == [0, 0, 0]
    assert [row["frac_reward_zero_std"] for row in metrics[1:]] == [1, 1, 1]
    assert all(row["reward_std"] > 0 for row in metrics[1:])
    prompts = [row["prompt"] for row in read(folder, "completions.jsonl") if row["split"] == "train"]
    assert prompts[::2] == prompts[1::2] and len(set(prompts)) == 9
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert all(torch.equal(before[name], weight) for name, weight in weights(folder).items())


def test_it_trains_and_resumes(model, tmp_path):
    straight = run(model, tmp_path / "straight", num_steps=4, kl_coef=0.1)
    folder = run(model, tmp_path / "run", num_steps=2, kl_coef=0.1, save_minutes=0)
    rloo.train(rloo.Args(resume=str(folder), num_steps=4))
    last, ours = read(straight)[-1], read(folder)[-1]
    assert ours == last and ours["grad_norm"] > 0


@pytest.mark.parametrize("group_size, batch_size", [(1, 4), (0, 4), (3, 4)])
def test_group_sizes_that_cannot_be(model, tmp_path, group_size, batch_size):
    with pytest.raises(rloo.InputError, match="--group-size"):
        run(model, tmp_path / "run", group_size=group_size, batch_size=batch_size)
    assert not (tmp_path / "run").exists()
