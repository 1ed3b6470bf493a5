"""The gradient of each file's loss against the true policy gradient, by enumeration of every completion.

pitfalls 1, 2, 6, 18, 19, 20, 27, 28, 44: expectations are exact sums in float64, so there is no tolerance for noise.
"""

import contextlib
import itertools

import pytest
import torch
from tiny import all_completions, as_batch, exact_logprobs, float64, fork, gradient, llama_config, make_policy, score
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, AutoModelForCausalLM

from nano_rl import grpo, ppo, raft, reinforce, remax, rloo

V, T, EOS = 5, 3, 1
PROMPT = [2, 4]
COMPLETIONS = all_completions(V, T, {EOS})  # 85


def make_world(temperature: float, completions: list[list[int]]):
    """The policy, its exact sequence probabilities, rewards, and the file's own log-probabilities of every path."""
    policy = float64(make_policy(llama_config(V)))
    exact = exact_logprobs(policy, PROMPT, completions, temperature)
    rewards = torch.rand(len(completions), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batch = as_batch(PROMPT, completions, pad=EOS)
    logprobs = reinforce.compute_logprobs(policy, batch, temperature)
    return policy, exact, rewards, batch["mask"], logprobs, temperature


@pytest.fixture(scope="module", params=[1.0, 0.6], ids=["T=1", "T=0.6"])
def world(request):
    return make_world(request.param, COMPLETIONS)


def advantages_of(rewards, baseline, ema=0.37, greedy=0.21, whiten=False):
    return reinforce.compute_advantages(rewards, baseline, ema, torch.full_like(rewards, greedy), whiten)


def expected_loss(world, coefficients):
    """E[L], where `coefficients` is E[Â_i 1(y_i = y)] over the batch; the loss is linear in the advantages."""
    _, _, _, mask, logprobs, _ = world
    return reinforce.compute_loss(logprobs, coefficients, mask, num_completions=1)


def test_the_enumeration_is_complete(world):
    policy, exact, _, _, logprobs, _ = world
    assert exact.exp().sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(logprobs.sum(dim=1), exact, atol=1e-9, rtol=0)


@pytest.mark.parametrize("baseline", ["none", "ema", "scst"])
def test_unbiased_baselines_have_the_true_gradient(world, baseline):
    policy, exact, rewards, _, _, _ = world
    truth = gradient((exact.exp() * rewards).sum(), policy)
    advantages = torch.cat([advantages_of(reward[None], baseline) for reward in rewards])  # each in a batch of its own
    ours = -gradient(expected_loss(world, exact.exp().detach() * advantages), policy)
    assert truth.norm() > 1e-2
    torch.testing.assert_close(ours, truth, atol=1e-9, rtol=0)


@pytest.mark.parametrize("num_completions, max_tokens", [(2, 3), (3, 2)])
def test_mean_baseline_has_exactly_one_minus_one_over_n_of_it(num_completions, max_tokens):
    world = make_world(0.6, all_completions(V, max_tokens, {EOS}))
    policy, exact, rewards, _, _, _ = world
    truth = gradient((exact.exp() * rewards).sum(), policy)
    probabilities, coefficients = exact.exp().detach(), torch.zeros_like(rewards)
    for batch in itertools.product(range(len(rewards)), repeat=num_completions):  # 85^2 or 21^3 of them
        batch = list(batch)
        advantages = advantages_of(rewards[batch], "mean")
        coefficients.index_add_(0, torch.tensor(batch), probabilities[batch].prod() * advantages / num_completions)
    ours = -gradient(expected_loss(world, coefficients), policy)
    torch.testing.assert_close(ours, (1 - 1 / num_completions) * truth, atol=1e-9, rtol=0)


def test_kl_in_the_reward_has_the_gradient_of_j_minus_beta_kl(world):
    policy, exact, rewards, _, logprobs, temperature = world
    beta, ref_policy = 0.3, float64(make_policy(llama_config(V), seed=7))
    batch = as_batch(PROMPT, COMPLETIONS, pad=EOS)
    with torch.no_grad():
        ref_logprobs = reinforce.compute_logprobs(ref_policy, batch, temperature)
        ref_exact = exact_logprobs(ref_policy, PROMPT, COMPLETIONS, temperature)
    kl = (logprobs.detach() - ref_logprobs).sum(dim=1)  # k1
    kl_rewards = rewards - beta * kl  # (1)
    advantages = torch.cat([advantages_of(reward[None], "none") for reward in kl_rewards])
    ours = -gradient(expected_loss(world, exact.exp().detach() * advantages), policy)
    divergence = (exact.exp() * (exact - ref_exact)).sum()
    truth = gradient((exact.exp() * rewards).sum() - beta * divergence, policy)
    assert divergence > 0.1
    torch.testing.assert_close(ours, truth, atol=1e-9, rtol=0)


def test_k1_as_a_loss_would_have_no_gradient(world):
    """Why the KL stands in the reward: in the loss its expected gradient is zero (pitfall 20)."""
    policy, exact, _, _, logprobs, _ = world
    assert gradient((exact.exp().detach() * logprobs.sum(dim=1)).sum(), policy).norm() < 1e-9


def test_the_stop_token_is_trained(world):
    """Pad and EOS are the same token here; the gradient still reaches the EOS that was sampled (pitfall 1)."""
    policy, _, _, mask, logprobs, _ = world
    stopped = COMPLETIONS.index([EOS])
    assert mask[stopped].tolist() == [1, 0, 0]
    assert gradient(logprobs[stopped].sum(), policy).norm() > 1e-2


def test_loss_against_a_naive_loop():
    generator = torch.Generator().manual_seed(0)
    logprobs, advantages = -torch.rand(4, 6, generator=generator), torch.randn(4, generator=generator)
    mask = (torch.arange(6)[None] < torch.tensor([1, 6, 3, 4])[:, None]).long()
    loss = 0.0
    for i in range(4):
        for t in range(6):
            if mask[i, t]:
                loss -= advantages[i] * logprobs[i, t] / 10
    torch.testing.assert_close(reinforce.compute_loss(logprobs, advantages, mask, num_completions=10), loss)


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 2.0, 6.0])
    assert advantages_of(rewards, "none").tolist() == [1, 2, 6]
    assert advantages_of(rewards, "mean").tolist() == [-2, -1, 3]
    assert advantages_of(rewards, "ema", ema=2.0).tolist() == [-1, 0, 4]
    assert advantages_of(rewards, "scst", greedy=5.0).tolist() == [-4, -3, 1]
    whitened = advantages_of(rewards, "none", whiten=True)
    assert whitened.mean().abs() < 1e-6 and abs(whitened.std() - 1) < 1e-3
    assert advantages_of(torch.ones(3), "none", whiten=True).tolist() == [0, 0, 0]  # equal rewards: zero, not NaN


@pytest.mark.parametrize("value", [0.7, 0.1, 1 / 3, -2.3])
@pytest.mark.parametrize("n", [3, 7, 16])
def test_equal_rewards_have_an_advantage_of_exactly_zero(value, n):
    """As `score` returns them: the sum of a few float32 numbers is exact in float64."""
    rewards, _ = score(reinforce, lambda **_: [value] * n, [""] * n)
    assert rewards.dtype == torch.float64
    for whiten in (False, True):
        assert advantages_of(rewards, "mean", whiten=whiten).tolist() == [0] * n
    assert rloo.compute_advantages(rewards, n).tolist() == [0] * n


@pytest.mark.parametrize("max_tokens", [1, 9, 100, 10**6])
def test_micro_batches_do_not_change_the_gradient(world, max_tokens):
    policy, _, rewards, _, logprobs, temperature = world
    batch, advantages = as_batch(PROMPT, COMPLETIONS, pad=EOS, left=64), rewards - 0.5
    whole = gradient(reinforce.compute_loss(logprobs, advantages, batch["mask"], 85), policy)
    rows_seen, total = [], 0.0
    columns = {"advantages": advantages, "rows": torch.arange(85)}
    for part in reinforce.micro_batches(batch | columns, max_tokens):
        assert len(part["rows"]) == 1 or batch["input_ids"].shape[1] * len(part["rows"]) <= max_tokens
        assert part["input_ids"].shape[1] == 64 + T, "a block of padding was left"
        part_logprobs = reinforce.compute_logprobs(policy, part, temperature)
        loss = reinforce.compute_loss(part_logprobs, part["advantages"], part["mask"], 85)
        total = total + gradient(loss, policy)
        rows_seen += part["rows"].tolist()
    assert sorted(rows_seen) == list(range(85))
    torch.testing.assert_close(total, whole, atol=1e-12, rtol=1e-9)


def test_zero_advantages_have_no_gradient(world):
    policy, _, rewards, mask, logprobs, _ = world
    loss = reinforce.compute_loss(logprobs, torch.zeros_like(rewards), mask, 85)
    assert gradient(loss, policy).abs().max() == 0


def losses(file, policy, value_model, part: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What phase 4 of each file makes of one part, after phases 2 and 3 of the same part."""
    logprobs = file.compute_logprobs(policy, part, 0.7)
    rewards, ref_logprobs = torch.rand(4, dtype=torch.float64), logprobs.detach() - 0.1
    assert logprobs.device == part["mask"].device and logprobs.dtype == torch.float32
    if file is ppo:
        old = {"values": file.compute_values(value_model, part).detach(), "logprobs": logprobs.detach()}
        inputs = (rewards.float().to(logprobs.device), old["logprobs"] - ref_logprobs, old["values"], part["mask"])
        advantages, returns = file.compute_advantages(*inputs, 0.1, 1.0, 0.95)
        ratio, values = file.compute_ratio(logprobs, old["logprobs"]), file.compute_values(value_model, part)
        return [
            file.compute_loss(ratio, advantages, part["mask"], 0.2, 4),
            file.compute_value_loss(values, old["values"], returns, part["mask"], 0.2, 4),
        ]
    settings = {
        reinforce: ("mean", 0.0, torch.zeros(4), True),
        remax: (torch.zeros(4), (logprobs.detach() - ref_logprobs).cpu(), 0.1),
    }
    advantages = file.compute_advantages(rewards, *settings.get(file, (4,))).float().to(logprobs.device)
    if file is grpo:
        ratio, kl = file.compute_ratio(logprobs, logprobs.detach()), file.compute_kl(logprobs, ref_logprobs)
        return [file.compute_loss(ratio, kl, advantages, part["mask"], 0.2, 0.1, 4)]
    return [file.compute_loss(logprobs, advantages, part["mask"], 4)]


def check_update(file, device: str, dtype: torch.dtype) -> None:
    dtypes = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(device):
            policy = AutoModelForCausalLM.from_config(llama_config(V)).eval()
            # As make_value_model has it, but not copied: fake tensors have no data to copy.
            trunk, head = AutoModel.from_config(llama_config(V)).eval(), torch.nn.Linear(16, 1)
        value_model = torch.nn.ModuleDict({"trunk": trunk, "head": head})
        policy.lm_head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
        part = {name: t.to(device) for name, t in as_batch(PROMPT, [[3, 1], [4, 3, 2], [3], [2]], pad=EOS).items()}
        for loss in losses(file, policy, value_model, part):
            assert loss.device.type == device and loss.shape == () and loss.requires_grad
            if device == "meta":
                loss.backward()
        assert set(dtypes) == {dtype}
        for weight in [*policy.parameters(), *(value_model.parameters() if file is ppo else [])]:
            if device == "meta":
                assert weight.grad.device == weight.device and weight.grad.shape == weight.shape
        for name in part.keys() - {"attention_mask"}:  # which transformers moves by itself
            with pytest.raises(RuntimeError, match="device"):
                losses(file, policy, value_model, part | {name: part[name].to("cpu")})


@pytest.mark.parametrize("place", ["cuda in bfloat16", "cuda in float32", "meta, with the backward pass"])
@pytest.mark.parametrize("file", [reinforce, rloo, remax, raft, grpo, ppo], ids=lambda file: file.__name__[8:])
def test_an_update_keeps_to_its_device(file, place, monkeypatch):
    """Without a GPU: fake tensors have shapes, types and devices, and operations that mix devices fail.

    Sampling and micro_batches are not in it, as they need real numbers. Autograd asks the driver of a "cuda" for its
    context, even of a fake one, so the backward pass is on "meta", which mixes with the CPU as little. There it starts
    threads, with which no process can fork and train, as other tests do: hence a process of its own.
    """
    device = place.split()[0].strip(",")
    monkeypatch.setattr(file, "has_bfloat16", lambda _: "bfloat16" in place)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    if device == "meta":  # which has no autocast
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    process = fork(check_update, file, device, torch.bfloat16 if "bfloat16" in place else torch.float32)
    process.join()
    assert process.exitcode == 0
