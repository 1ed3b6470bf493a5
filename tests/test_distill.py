"""The teacher's KL and its gradient by enumeration, and what a teacher may be. Whole runs are in test_variants.py."""

import pytest
import torch
from test_run import read, same
from test_variants import train
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
)
from transformers import AutoModelForCausalLM

from nano_rl import distill

LONGER = {"batch_size": 32, "num_steps": 60, "learning_rate": 1e-2, "eval_every": 0, "save_minutes": 9}
V, PROMPT, COMPLETIONS = 4, [2, 3], all_completions(4, 3, {1})  # 40, of one to three tokens


@pytest.fixture(scope="module", params=[1.0, 0.6], ids=["T=1", "T=0.6"])
def world(request):
    """A policy, its log-probabilities of every completion, exact and by the file, their mask, and the teacher's."""
    policy, teacher = (float64(make_policy(llama_config(V), seed)) for seed in (0, 7))
    batch = as_batch(PROMPT, COMPLETIONS, pad=1)
    logprobs = distill.compute_logprobs(policy, batch, request.param)
    with torch.no_grad():
        teacher_logprobs = distill.compute_logprobs(teacher, batch, request.param)
    return policy, exact_logprobs(policy, PROMPT, COMPLETIONS, request.param), logprobs, batch["mask"], teacher_logprobs


def expected_gradient(world, reward_to_go: bool) -> torch.Tensor:
    """That of the file's loss, over every completion; the loss is linear in the advantages."""
    policy, exact, logprobs, mask, teacher_logprobs = world
    advantages = distill.compute_advantages((logprobs - teacher_logprobs).detach(), reward_to_go)
    expected = exact.exp().detach()[:, None] * advantages
    return gradient(distill.compute_loss(logprobs, expected, mask, num_completions=1), policy)


def test_the_expected_gradient_is_that_of_the_kl(world):
    policy, exact, _, _, teacher_logprobs = world
    divergence = (exact.exp() * (exact - teacher_logprobs.sum(dim=1))).sum()
    truth = gradient(divergence, policy)
    assert divergence > 0.1 and truth.norm() > 1e-2
    torch.testing.assert_close(expected_gradient(world, reward_to_go=True), truth, atol=1e-9, rtol=0)


def test_by_default_it_is_that_of_each_tokens_kl(world):
    """KL(π_θ(·|x, y_<t) ‖ π_T(·|x, y_<t)) of every beginning, as often as it comes, which is held fixed."""
    policy, exact, logprobs, mask, teacher_logprobs = world
    total = torch.zeros((), dtype=torch.float64)
    for beginning in {tuple(ids[:t]) for ids in COMPLETIONS for t in range(len(ids))}:
        t = len(beginning)
        children = {}  # the next token, and a completion that has it
        for row, ids in enumerate(COMPLETIONS):
            if tuple(ids[:t]) == beginning and len(ids) > t:
                children.setdefault(ids[t], row)
        assert len(children) == V
        rows = list(children.values())
        p = logprobs[rows, t].exp()
        reached = logprobs[rows[0], :t].sum().exp().detach()
        total = total + reached * (p * (logprobs[rows, t] - teacher_logprobs[rows, t])).sum()
    ours = expected_gradient(world, reward_to_go=False)
    torch.testing.assert_close(ours, gradient(total, policy), atol=1e-9, rtol=0)
    assert (ours - expected_gradient(world, reward_to_go=True)).norm() > 1e-3, "the two are not the same"


@pytest.mark.parametrize("reward_to_go", [True, False])
def test_advantages_and_loss_against_naive_loops(reward_to_go):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(4)[None] < torch.tensor([1, 4, 3])[:, None]).double()
    kl = torch.randn(3, 4, generator=generator, dtype=torch.float64) * mask
    logprobs = -torch.rand(3, 4, generator=generator, dtype=torch.float64) * mask
    advantages, loss = distill.compute_advantages(kl, reward_to_go), 0.0
    for i in range(3):
        for t in range(4):
            cost = sum(kl[i, s].item() for s in range(t, 4 if reward_to_go else t + 1))
            assert advantages[i, t].item() == pytest.approx(-cost, abs=1e-12)
            loss += mask[i, t] * logprobs[i, t] * cost / 10
    torch.testing.assert_close(distill.compute_loss(logprobs, advantages, mask, num_completions=10), loss)


def test_advantages_by_hand():
    kl = torch.tensor([[1.0, 2.0], [3.0, 0.0]])  # the second has ended
    assert distill.compute_advantages(kl, reward_to_go=True).tolist() == [[-3, -2], [-3, 0]]
    assert distill.compute_advantages(kl, reward_to_go=False).tolist() == [[-1, -2], [-3, 0]]


def test_the_start_learns_nothing_from_itself(model, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "has_bfloat16", lambda device: False)
    rows = read(train(distill, model, tmp_path / "run", teacher=model, temperature=0.6))
    assert rows[1]["kl"] == 0 and rows[1]["grad_norm"] == 0, "in float32 the two are the same to the bit"
    assert rows[-1]["eval/kl"] == 0


def test_the_policy_comes_closer_to_its_teacher(model, tmp_path):
    rows = read(train(distill, model, tmp_path / "run", **LONGER))
    assert mean(rows[1:6]) > 2 and mean(rows[-5:]) < 1.5
    assert rows[1]["entropy_estimate"] > 0 and rows[-1]["eval/kl"] > 0.1


def mean(rows: list[dict], name: str = "kl") -> float:
    return sum(row[name] for row in rows) / len(rows)


def test_the_cheapest_completion_is_short(model, tmp_path):
    """With --reward-to-go: each of its tokens is less likely for the teacher than without, but there are few."""
    args, length = LONGER | {"learning_rate": 3e-3, "num_steps": 80}, "completions/mean_length"
    whole, tokens = (read(train(distill, model, tmp_path / str(go), reward_to_go=go, **args)) for go in (True, False))
    assert whole[1][length] > 4 and mean(whole[-10:], length) < 2 and mean(whole[-10:]) > mean(tokens[-10:])
    assert tokens[1][length] > 4 and mean(tokens[-10:], length) > 5 and mean(tokens[-10:]) < mean(tokens[1:11]) * 2 / 3


def test_the_teacher_is_not_trained(model, tmp_path, monkeypatch):
    load, loaded = distill.load, []
    monkeypatch.setattr(distill, "load", lambda *inputs: loaded.append(load(*inputs)) or loaded[-1])
    monkeypatch.setattr(distill, "has_bfloat16", lambda device: False)
    train(distill, model, tmp_path / "run")
    saved = [AutoModelForCausalLM.from_pretrained(one.config._name_or_path).state_dict() for one, _ in loaded]
    assert [same(one.state_dict(), start) for (one, _), start in zip(loaded, saved)] == [False, True]


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_the_teacher_is_in_bfloat16_where_the_hardware_has_it(model, tmp_path, monkeypatch, has_bfloat16):
    load, dtypes = distill.load, []
    monkeypatch.setattr(distill, "has_bfloat16", lambda device: has_bfloat16)
    monkeypatch.setattr(distill, "load", lambda *inputs: dtypes.append(inputs[3:]) or load(*inputs))
    train(distill, model, tmp_path / "run", num_steps=1)
    assert dtypes == [(torch.float32,), (torch.bfloat16 if has_bfloat16 else torch.float32,)]


@pytest.mark.parametrize("num_words, num_rows", [(1, 1), (0, -1)], ids=["a word more", "a row less"])
def test_a_teacher_of_another_vocabulary_is_refused(model, tmp_path, num_words, num_rows):
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["moon"] * num_words)
    other = save_policy(tmp_path / "other", llama_config(size + num_rows), tokenizer)
    with pytest.raises(distill.InputError, match=f"--teacher {other}: choose one of the family of {model}"):
        train(distill, model, tmp_path / "run", teacher=other)
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_rows_that_no_token_has(model, tmp_path):
    """As the larger models of a family have."""
    tokenizer = make_tokenizer()
    other = save_policy(tmp_path / "other", llama_config(len(tokenizer) + 9), tokenizer)
    assert read(train(distill, model, tmp_path / "run", teacher=other))[1]["kl"] > 0


def test_completions_fit_the_teachers_context(model, tmp_path):
    tokenizer = make_tokenizer()
    other = save_policy(tmp_path / "other", gpt2_config(len(tokenizer), n_positions=10), tokenizer)
    with pytest.raises(distill.InputError, match="context less --max-new-tokens leaves 4"):
        train(distill, model, tmp_path / "run", teacher=other)


def test_a_teacher_that_is_not_there(model, tmp_path):
    with pytest.raises(distill.InputError, match="cannot load none/none: check name"):
        train(distill, model, tmp_path / "run", teacher="none/none")
