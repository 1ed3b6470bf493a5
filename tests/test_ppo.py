"""PPO: advantages by GAE, values that are read before their token, both losses, and the first update."""

import pytest
import torch
from test_run import TINY, read, weights
from tiny import (
    all_completions,
    as_batch,
    exact_logprobs,
    float64,
    gradient,
    llama_config,
    make_policy,
    make_tokenizer,
    save_reward_model,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import nano_rl.ppo as ppo

CPU = torch.device("cpu")


def run(model, folder, reward_fn=None, **args):
    args = TINY | {"value_warmup_steps": 1, "num_minibatches": 1} | args
    return ppo.train(ppo.Args(model=model, output_dir=str(folder), **args), reward_fn)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_with_lambda_1_the_expected_gradient_is_the_true_one_whatever_the_values(beta):
    completions = all_completions(5, 3, {1})
    policy, ref_policy, other = (float64(make_policy(llama_config(5), seed)) for seed in (0, 7, 11))
    value_model = ppo.make_value_model(other, None, CPU).double()
    torch.nn.init.normal_(value_model.get_output_embeddings().weight, std=1.0)
    exact = exact_logprobs(policy, [2, 4], completions, 0.6)
    with torch.no_grad():
        ref_exact = exact_logprobs(ref_policy, [2, 4], completions, 0.6)
    rewards = torch.rand(85, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = gradient((exact.exp() * (rewards - beta * (exact - ref_exact))).sum(), policy)

    batch = as_batch([2, 4], completions, pad=1)
    logprobs = ppo.compute_logprobs(policy, batch, 0.6)
    with torch.no_grad():
        token_kl = logprobs - ppo.compute_logprobs(ref_policy, batch, 0.6)
        values = ppo.compute_values(value_model, batch)
    assert values.std() > 0.5
    advantages, returns = ppo.compute_advantages(rewards, token_kl, values, batch["mask"], beta, 1.0, 1.0)
    # Every completion is weighted by its probability, so (5) is linear in what it weighs only where the ratio is 1.
    old, weighted = logprobs.detach(), exact.exp().detach()[:, None] * advantages
    ours = -gradient(ppo.compute_loss(logprobs, old, weighted, batch["mask"], 0.2, 1), policy)
    torch.testing.assert_close(ours, truth, atol=1e-9, rtol=0)
    if not beta:
        torch.testing.assert_close(returns, rewards[:, None] * batch["mask"])  # with λ = 1 the return is the reward


def test_advantages_against_a_naive_double_loop():
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(5)[None] < torch.tensor([1, 5, 3])[:, None]).long()
    rewards, (kl, values) = torch.randn(3, generator=generator), torch.randn(2, 3, 5, generator=generator)
    values = values + 100 * (1 - mask)  # what stands beyond the end must not matter (pitfall 35)
    beta, gamma, lam = 0.1, 0.9, 0.8
    advantages, returns = ppo.compute_advantages(rewards, kl, values, mask, beta, gamma, lam)
    for i in range(3):
        length = int(mask[i].sum())
        for t in range(length):
            expected = 0.0
            for s in range(t, length):
                reward = -beta * kl[i, s] + (rewards[i] if s == length - 1 else 0)
                after = values[i, s + 1] if s + 1 < length else 0
                expected += (gamma * lam) ** (s - t) * (reward + gamma * after - values[i, s])
            assert advantages[i, t].item() == pytest.approx(expected.item(), abs=1e-5)
            assert returns[i, t].item() == pytest.approx((expected + values[i, t]).item(), abs=1e-5)
        assert (advantages[i, length:] == 0).all()


def test_advantages_by_hand():
    """T = 3, a reward of 1 at the end, values 0.5: δ = 0, 0, 0.5, and λ = 0.5 passes half of it on."""
    values, mask = torch.full((1, 3), 0.5), torch.ones(1, 3, dtype=torch.long)
    advantages, returns = ppo.compute_advantages(torch.ones(1), torch.zeros(1, 3), values, mask, 0.0, 1.0, 0.5)
    assert advantages.tolist() == [[0.125, 0.25, 0.5]] and returns.tolist() == [[0.625, 0.75, 1.0]]
    zero = torch.zeros(1, 3)
    assert ppo.compute_advantages(torch.ones(1), zero, zero, mask, 0.0, 1.0, 1.0)[0].tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("advantage, ratio, loss, slope", [
    (1, 0.5, -0.5, -1), (1, 1.0, -1.0, -1), (1, 1.5, -1.2, 0),
    (-1, 0.5, 0.8, 0), (-1, 1.0, 1.0, 1), (-1, 1.5, 1.5, 1),
])  # fmt: skip
def test_clipping(advantage, ratio, loss, slope):
    old, ratio = torch.tensor([[-1.0]]), torch.tensor([[ratio]], requires_grad=True)
    one = torch.ones(1, 1)
    value = ppo.compute_loss(old + ratio.log(), old, torch.tensor([[float(advantage)]]), one, 0.2, 1)
    value.backward()
    assert value.item() == pytest.approx(loss) and ratio.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize("value, target, loss, slope", [
    (0.1, 1.0, 0.405, -0.9),  # within the range: half the squared error
    (0.5, 1.0, 0.32, 0.0),  # too far towards the target: no reason to go on
    (0.5, -1.0, 1.125, 1.5),  # too far away from it: back
])  # fmt: skip
def test_value_clipping(value, target, loss, slope):
    value = torch.tensor([[value]], requires_grad=True)
    one = torch.ones(1, 1)
    error = ppo.compute_value_loss(value, torch.zeros(1, 1), torch.tensor([[target]]), one, 0.2, 1)
    error.backward()
    assert error.item() == pytest.approx(loss) and value.grad.item() == pytest.approx(slope)


def test_losses_against_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(6)[None] < torch.tensor([1, 6, 3, 4])[:, None]).long()
    a, b, c = torch.randn(3, 4, 6, generator=generator)
    loss = value_loss = 0.0
    for i in range(4):
        for t in range(int(mask[i].sum())):
            rho = (a[i, t] - b[i, t]).exp()
            loss -= min(rho * c[i, t], rho.clamp(0.8, 1.2) * c[i, t]) / 10
            bounded = min(max(a[i, t], b[i, t] - 0.3), b[i, t] + 0.3)
            value_loss += max((a[i, t] - c[i, t]) ** 2, (bounded - c[i, t]) ** 2) / 2 / 10
    torch.testing.assert_close(ppo.compute_loss(a, b, c, mask, 0.2, 10), loss)
    torch.testing.assert_close(ppo.compute_value_loss(a, b, c, mask, 0.3, 10), value_loss)


def test_a_value_does_not_see_its_token():
    """Change token t: the values up to t stay, one after it moves (pitfall 37)."""
    value_model = ppo.make_value_model(make_policy(llama_config(8)), None, CPU)
    torch.nn.init.normal_(value_model.get_output_embeddings().weight)
    first, second = (ppo.compute_values(value_model, as_batch([2, 7], [ids], pad=1)) for ids in ([3, 4, 5], [3, 6, 5]))
    assert torch.equal(first[:, :2], second[:, :2]) and not torch.equal(first[:, 2], second[:, 2])


def test_values_start_at_zero_or_at_a_reward_models(tmp_path):
    tokenizer = make_tokenizer()
    policy = make_policy(llama_config(len(tokenizer)))
    batch = as_batch([2, 7], [[3, 4, 5]], pad=0)
    assert (ppo.compute_values(ppo.make_value_model(policy, None, CPU), batch) == 0).all()
    name = save_reward_model(tmp_path / "rm")
    values = ppo.compute_values(ppo.make_value_model(policy, name, CPU), batch)
    score = AutoModelForSequenceClassification.from_pretrained(name)(torch.tensor([[2, 7, 3, 4]])).logits
    assert values[0, 2].item() == pytest.approx(score.item(), abs=1e-5)
    with pytest.raises(SystemExit, match="must have one label and the policy's architecture"):
        ppo.make_value_model(policy, save_reward_model(tmp_path / "rm3", num_labels=3), CPU)


def test_the_first_update_is_on_policy_and_the_warm_up_leaves_the_policy_alone(model, tmp_path, monkeypatch):
    seen, compute_loss = [], ppo.compute_loss

    def spy(logprobs, old_logprobs, *rest):
        seen.append((logprobs.detach().clone(), old_logprobs.clone()))
        return compute_loss(logprobs, old_logprobs, *rest)

    monkeypatch.setattr(ppo, "compute_loss", spy)
    many = {"num_epochs": 2, "num_minibatches": 2, "learning_rate": 0.05, "micro_batch_tokens": 40}
    run(model, tmp_path / "run", num_steps=2, value_warmup_steps=1, **many)
    assert torch.equal(*seen[0]), "the ratio is identically 1"
    assert not torch.equal(*seen[-1])
    warm = run(model, tmp_path / "warm", num_steps=2, value_warmup_steps=2, **many)
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert all(torch.equal(before[name], weight) for name, weight in weights(warm).items())
    rows = read(warm)
    assert rows[1]["explained_variance"] == 0, "the values are 0 in the first step"
    assert [row["grad_norm"] for row in rows[1:]] == [0, 0]


def test_lambda_is_1_in_the_warm_up(model, tmp_path, monkeypatch):
    """The value model then learns the rewards, not its own first guesses."""
    seen, compute_advantages = [], ppo.compute_advantages
    monkeypatch.setattr(ppo, "compute_advantages", lambda *inputs: seen.append(inputs) or compute_advantages(*inputs))
    run(model, tmp_path / "run", num_steps=3, value_warmup_steps=2, gae_lambda=0.9)
    assert [inputs[-1] for inputs in seen] == [1.0, 1.0, 0.9]


def test_rewards_count_from_the_held_out_reward_of_the_start(model, tmp_path, monkeypatch):
    """Also after a resume; not where the value model comes from elsewhere, and knows rewards as they are."""
    seen, compute_advantages = [], ppo.compute_advantages
    monkeypatch.setattr(
        ppo, "compute_advantages", lambda *inputs: seen.append(inputs[0]) or compute_advantages(*inputs)
    )

    def reward_fn(completions, **_):
        return [0.5 + len(text) / 100 for text in completions]

    def sampled(folder, step):
        rows = [row for row in read(folder, "completions.jsonl") if (row["split"], row["step"]) == ("train", step)]
        return torch.tensor([row["reward"] for row in rows])

    folder = run(model, tmp_path / "run", reward_fn, num_steps=2, save_every=1)
    ppo.train(ppo.Args(resume=str(folder), num_steps=3), reward_fn)
    r_0 = read(folder)[0]["eval/reward"]
    for step in (1, 2, 3):
        torch.testing.assert_close(seen[step - 1] + r_0, sampled(folder, step))
    folder = run(model, tmp_path / "other", reward_fn, num_steps=1, value_model=save_reward_model(tmp_path / "rm"))
    torch.testing.assert_close(seen[-1], sampled(folder, 1))


def test_equal_advantages_are_whitened_to_zero(model, tmp_path):
    """Not to NaN: rounding can leave a variance below 0."""
    args = {"value_warmup_steps": 0, "gae_lambda": 1.0, "whiten_advantages": True, "num_steps": 1}
    folder = run(model, tmp_path / "run", lambda completions, **_: [0.7] * len(completions), **args)
    row = read(folder)[1]
    assert row["grad_norm"] == 0 and row["explained_variance"] is None


def test_it_resumes_with_its_value_model(model, tmp_path):
    args = {"kl_coef": 0.1, "whiten_advantages": True}
    straight = run(model, tmp_path / "straight", num_steps=4, **args)
    folder = run(model, tmp_path / "run", num_steps=2, save_every=1, **args)
    ppo.train(ppo.Args(resume=str(folder), num_steps=4))
    assert read(folder)[-1] == read(straight)[-1] and read(folder)[-1]["grad_norm"] > 0


@pytest.mark.parametrize("flags", [{"num_minibatches": 3}, {"gae_lambda": 1.5}, {"gamma": 0}])
def test_numbers_that_cannot_be(model, tmp_path, flags):
    with pytest.raises(SystemExit) as error:
        run(model, tmp_path / "run", **flags)
    assert "--" in error.value.code and not (tmp_path / "run").exists()
