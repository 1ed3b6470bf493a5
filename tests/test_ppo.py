"""PPO: advantages by GAE, values that are read before their token, both losses, and the first update."""

import pytest
import torch
from test_run import TINY, read, weights
from tiny import (
    all_completions,
    as_batch,
    exact_logprobs,
    float64,
    gpt2_config,
    gradient,
    llama_config,
    make_policy,
    make_tokenizer,
    save_policy,
    save_reward_model,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma2Config, GraniteConfig

import nano_rl.ppo as ppo


def run(model, folder, reward_fn=None, **args):
    args = TINY | {"value_warmup_steps": 1, "num_minibatches": 1} | args
    return ppo.train(ppo.Args(model=model, output_dir=str(folder), **args), reward_fn)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_with_lambda_1_the_expected_gradient_is_the_true_one_whatever_the_values(beta):
    completions = all_completions(5, 3, {1})
    policy, ref_policy, other = (float64(make_policy(llama_config(5), seed)) for seed in (0, 7, 11))
    value_model = ppo.make_value_model(other, ppo.Args()).double()
    torch.nn.init.normal_(value_model["head"].weight, std=1.0)
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
    weighted = exact.exp().detach()[:, None] * advantages
    ratio = ppo.compute_ratio(logprobs, logprobs.detach())
    ours = -gradient(ppo.compute_loss(ratio, weighted, batch["mask"], 0.2, 1), policy)
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
    ratio_again = ppo.compute_ratio(old + ratio.log(), old)
    value = ppo.compute_loss(ratio_again, torch.tensor([[float(advantage)]]), one, 0.2, 1)
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
    torch.testing.assert_close(ppo.compute_loss(ppo.compute_ratio(a, b), c, mask, 0.2, 10), loss)
    torch.testing.assert_close(ppo.compute_value_loss(a, b, c, mask, 0.3, 10), value_loss)


def test_a_value_does_not_see_its_token():
    """Change token t: the values up to t stay, one after it moves (pitfall 37)."""
    value_model = ppo.make_value_model(make_policy(llama_config(8)), ppo.Args())
    torch.nn.init.normal_(value_model["head"].weight)
    first, second = (ppo.compute_values(value_model, as_batch([2, 7], [ids], pad=1)) for ids in ([3, 4, 5], [3, 6, 5]))
    assert torch.equal(first[:, :2], second[:, :2]) and not torch.equal(first[:, 2], second[:, 2])


def test_values_start_at_the_held_out_reward_or_at_a_reward_models(model, tmp_path, monkeypatch):
    values, compute_values = [], ppo.compute_values
    monkeypatch.setattr(ppo, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(ppo, "compute_values", lambda *inputs: values.append(compute_values(*inputs)) or values[-1])
    folder = run(model, tmp_path / "run", num_steps=1)
    start = torch.tensor(read(folder)[0]["eval/reward"])
    assert set(values[0].flatten().tolist()) <= {start.item(), 0.0} and (values[0] == start).any(), "0 after the stop"
    assert read(folder)[1]["explained_variance"] == pytest.approx(0, abs=1e-6), "one number explains nothing"

    name = save_reward_model(tmp_path / "rm")
    policy = AutoModelForCausalLM.from_pretrained(model)
    value_model = ppo.make_value_model(policy, ppo.Args(value_model=name))
    ours = compute_values(value_model, as_batch([2, 7], [[3, 4, 5]], pad=0))
    score = AutoModelForSequenceClassification.from_pretrained(name)(torch.tensor([[2, 7, 3, 4]])).logits
    assert ours[0, 2].item() == pytest.approx(score.item(), abs=1e-5)


def test_value_models_that_cannot_be(model, tmp_path):
    """Several labels, another architecture, fewer tokens or positions; and none without a head for scores."""
    tokenizer = make_tokenizer()
    others = {
        "labels": save_reward_model(tmp_path / "labels", num_labels=3),
        "architecture": save_reward_model(tmp_path / "gpt2", config=gpt2_config(len(tokenizer), pad_token_id=0)),
        "tokens": save_reward_model(tmp_path / "tokens", config=llama_config(9, pad_token_id=0)),
    }
    for name in others.values():
        with pytest.raises(ppo.InputError, match=f"--value-model {name}: must have one label, and --model's class"):
            run(model, tmp_path / "run", value_model=name)
    policy = save_policy(tmp_path / "policy", gpt2_config(len(tokenizer)))
    short = save_reward_model(tmp_path / "short", config=gpt2_config(len(tokenizer), n_positions=32, pad_token_id=0))
    with pytest.raises(ppo.InputError, match="must have one label, and --model's class and sizes"):
        run(policy, tmp_path / "run", value_model=short)
    with pytest.raises(ppo.InputError, match="missing: \\[.*score.weight"):
        run(model, tmp_path / "run", value_model=model)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["softcap", "scale"])
def test_no_softcap_or_scale_of_logits_touches_a_value(kind):
    """Gemma's logits never pass its softcap, Granite's are divided by its scale; V is neither."""
    sizes = dict(vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=1, max_position_embeddings=64, head_dim=8)
    if kind == "softcap":
        config = Gemma2Config(**sizes, final_logit_softcapping=2.0, attn_implementation="eager")
    else:
        config = GraniteConfig(**sizes, logits_scaling=8.0)
    value_model = ppo.make_value_model(make_policy(config), ppo.Args())
    torch.nn.init.constant_(value_model["head"].bias, 5.0)
    values = ppo.compute_values(value_model, as_batch([2, 7], [[3, 4, 5]], pad=0))
    assert values.tolist() == [[5.0, 5.0, 5.0]]


@pytest.mark.parametrize("bfloat16", [True, False], ids=["bfloat16", "float32"])
def test_values_have_the_grain_of_float32(monkeypatch, bfloat16):
    """Also where the trunk computes in bfloat16, whose neighbour of 5 is 5.03."""
    monkeypatch.setattr(ppo, "has_bfloat16", lambda device: bfloat16)
    value_model = ppo.make_value_model(make_policy(llama_config(8)), ppo.Args())
    torch.nn.init.constant_(value_model["head"].bias, 5.01)
    values = ppo.compute_values(value_model, as_batch([2, 7], [[3, 4, 5]], pad=0))
    assert values.dtype == torch.float32 and values.tolist() == [[pytest.approx(5.01, abs=1e-6)] * 3]


def test_the_first_update_is_on_policy_and_the_warm_up_leaves_the_policy_alone(model, tmp_path, monkeypatch):
    ratios, batches, compute_ratio, compute_logprobs = [], [], ppo.compute_ratio, ppo.compute_logprobs
    monkeypatch.setattr(
        ppo, "compute_ratio", lambda *inputs: ratios.append(compute_ratio(*inputs).detach()) or compute_ratio(*inputs)
    )
    monkeypatch.setattr(ppo, "compute_logprobs", lambda *inputs: batches.append(inputs[1]) or compute_logprobs(*inputs))
    many = {"num_epochs": 3, "num_minibatches": 2, "learning_rate": 0.05, "micro_batch_tokens": 20}
    run(model, tmp_path / "run", num_steps=1, value_warmup_steps=0, eval_every=0, **many)
    assert (ratios[0] == 1).all() and (ratios[-1] != 1).any()
    scored = [batch for batch in batches if "rewards" in batch]
    passes = [scored[first : first + 4] for first in range(0, len(scored), 4)]  # one completion in each part
    assert len(passes) == 4, "scored once, then trained in three"
    assert all(a is b is c is d for a, b, c, d in zip(*passes, strict=True))
    warm = run(model, tmp_path / "warm", num_steps=2, value_warmup_steps=2, **many)
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert all(torch.equal(before[name], weight) for name, weight in weights(warm).items())
    assert [row["ratio"] for row in read(warm)[1:]] == [1, 1]
    moved = run(model, tmp_path / "moved", num_steps=3, value_warmup_steps=2, **many)
    assert not torch.equal(weights(moved)["lm_head.weight"], before["lm_head.weight"])


def test_it_logs_the_value_models_loss_and_both_gradients(model, tmp_path, monkeypatch):
    """Means over the updates; the variance of the returns that V_old explained, recomputed from what went in."""
    losses, norms, seen, clip = [], [], [], torch.nn.utils.clip_grad_norm_
    compute_value_loss, compute_advantages = ppo.compute_value_loss, ppo.compute_advantages
    compute_loss = ppo.compute_loss

    def spy(rewards, kl, values, mask, *coefs):
        outputs = compute_advantages(rewards, kl, values, mask, *coefs)
        seen.append([tensor[mask.bool()] for tensor in (values, outputs[1])])
        return outputs

    def spy_value_loss(values, old_values, returns, mask, value_clip, num_completions):
        assert value_clip == 0.3 and num_completions == 2, "of a minibatch"
        losses.append(compute_value_loss(values, old_values, returns, mask, value_clip, num_completions))
        return losses[-1]

    def spy_loss(*inputs):
        assert inputs[-1] == 2
        return compute_loss(*inputs)

    monkeypatch.setattr(ppo, "compute_advantages", spy)
    monkeypatch.setattr(ppo, "compute_value_loss", spy_value_loss)
    monkeypatch.setattr(ppo, "compute_loss", spy_loss)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *inputs: norms.append(clip(*inputs)) or norms[-1])
    args = {"num_minibatches": 2, "num_epochs": 3, "value_warmup_steps": 0, "value_learning_rate": 0.05}
    args["value_clip"] = 0.3
    row = read(run(model, tmp_path / "run", num_steps=1, value_model=save_reward_model(tmp_path / "rm"), **args))[1]
    assert row["value_loss"] == pytest.approx(torch.stack(losses).sum().item() / 6, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(torch.stack(norms[::2]).mean().item(), rel=1e-5)
    assert row["value_grad_norm"] == pytest.approx(torch.stack(norms[1::2]).mean().item(), rel=1e-5)
    values, returns = (torch.cat(tensors) for tensors in zip(*seen))
    expected = 1 - ((returns - values).var() / returns.var()).item()
    assert row["explained_variance"] == pytest.approx(expected, abs=1e-4)


def test_lambda_is_1_in_the_warm_up(model, tmp_path, monkeypatch):
    """The value model then learns the rewards, not its own first guesses."""
    seen, compute_advantages = [], ppo.compute_advantages
    monkeypatch.setattr(ppo, "compute_advantages", lambda *inputs: seen.append(inputs) or compute_advantages(*inputs))
    run(model, tmp_path / "run", num_steps=3, value_warmup_steps=2, gae_lambda=0.9)
    assert [inputs[-1] for inputs in seen] == [1.0, 1.0, 0.9]


def test_equal_advantages_are_whitened_to_zero(model, tmp_path):
    """Not to NaN: rounding can leave a variance below 0."""
    args = {"value_warmup_steps": 0, "gae_lambda": 1.0, "whiten_advantages": True, "num_steps": 1}
    folder = run(model, tmp_path / "run", lambda completions, **_: [0.7] * len(completions), **args)
    row = read(folder)[1]
    assert row["grad_norm"] == pytest.approx(0, abs=1e-5) and "explained_variance" not in row


def test_one_token_is_whitened_to_zero(model, tmp_path):
    """Not to NaN, with all weights after it."""
    one = {"batch_size": 1, "max_new_tokens": 1, "whiten_advantages": True, "value_warmup_steps": 0, "num_steps": 1}
    folder = run(model, tmp_path / "run", **one)
    assert read(folder)[1]["grad_norm"] == 0
    assert all(weight.isfinite().all() for weight in weights(folder).values())


@pytest.mark.parametrize("flags", [{"num_minibatches": 3}, {"gae_lambda": 1.5}, {"gamma": 1.1}])
def test_numbers_that_cannot_be(model, tmp_path, flags):
    with pytest.raises(ppo.InputError, match="must divide --batch-size, --gamma and --gae-lambda be at most 1"):
        run(model, tmp_path / "run", **flags)
    assert not (tmp_path / "run").exists()
