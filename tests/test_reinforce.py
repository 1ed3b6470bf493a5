"""What reinforce.py alone has: --uncertainty-penalty."""

import math

import pytest
import torch
from test_run import TINY
from tiny import save_reward_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import nano_rl.reinforce as reinforce


def test_an_uncertain_score_counts_less(model, tmp_path, monkeypatch):
    """Each advantage is divided by 1 + the deviation of its own score, in the order of the completions."""
    reward_model = save_reward_model(tmp_path / "reward", num_labels=4)
    seen, micro_batches, score = [], reinforce.micro_batches, reinforce.score

    def keep_advantages(batch, max_tokens):  # still in the order of the completions
        seen[-1]["trained"] += batch["advantages"].tolist() if "advantages" in batch else []
        return micro_batches(batch, max_tokens)

    def keep_texts(run, reward_fn, examples, batch, completions):
        texts = [(example["prompt"], completion) for example, completion in zip(examples, completions)]
        seen.append({"texts": texts, "trained": []})
        return score(run, reward_fn, examples, batch, completions)

    monkeypatch.setattr(reinforce, "micro_batches", keep_advantages)
    monkeypatch.setattr(reinforce, "score", keep_texts)
    for penalty in (False, True):
        args = TINY | {"num_steps": 1, "batch_size": 6, "reward_model": reward_model, "uncertainty_penalty": penalty}
        reinforce.train(reinforce.Args(model=model, output_dir=str(tmp_path / str(penalty)), **args))
    plain, penalized = (batch for batch in seen if batch["trained"])
    assert plain["texts"] == penalized["texts"]  # the first step draws the same

    judge = AutoModelForSequenceClassification.from_pretrained(reward_model)
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    factors = []
    for prompt, completion in plain["texts"]:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        p = judge(**ids).logits[0].softmax(dim=0).tolist()
        mean = sum(k * p_k for k, p_k in enumerate(p, start=1))
        factors.append(1 + math.sqrt(sum(p_k * (k - mean) ** 2 for k, p_k in enumerate(p, start=1))))
    assert max(factors) - min(factors) > 0.01
    ratios = [a / b for a, b in zip(plain["trained"], penalized["trained"], strict=True)]
    assert ratios == pytest.approx(factors, rel=1e-4)


@pytest.mark.parametrize("num_labels", [0, 1])
def test_the_penalty_needs_a_distribution(model, tmp_path, num_labels):
    reward_model = save_reward_model(tmp_path / "reward") if num_labels else ""
    args = TINY | {"uncertainty_penalty": True, "reward_model": reward_model}
    with pytest.raises(reinforce.InputError, match="--uncertainty-penalty needs a --reward-model with several labels"):
        reinforce.train(reinforce.Args(model=model, output_dir=str(tmp_path / "run"), **args))
    assert not (tmp_path / "run").exists()


def test_the_penalty_takes_the_pairs_of_a_function():
    args = reinforce.Args(reward_fn="math:hypot")
    assert reinforce.load_reward_fn(args, torch.device("cpu"), deviations=True) is math.hypot


def test_a_reward_is_the_same_beside_its_deviation(tmp_path):
    args = reinforce.Args(reward_model=save_reward_model(tmp_path / "reward", num_labels=4))
    rewards, pairs = (
        reinforce.load_reward_fn(args, torch.device("cpu"), deviations)(prompts=["x", "y"], completions=["a", "sun"])
        for deviations in (False, True)
    )
    assert rewards == [reward for reward, _ in pairs] and rewards[0] != rewards[1]
