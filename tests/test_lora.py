"""--lora-rank: small trained adapters over frozen weights that the sampler and the reference share."""

import importlib
import json
import sys
from dataclasses import fields

import pytest
import torch
from test_run import TINY, read
from tiny import as_batch, main, save_reward_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import nano_rl.ppo as ppo
import nano_rl.reinforce as reinforce

CPU = torch.device("cpu")
SHARED = {field.name for field in fields(reinforce.Args)}  # flags of every file


def train(name: str, model: str, folder, **args):
    file = importlib.import_module(f"nano_rl.{name}")
    args = TINY | {"lora_rank": 2, "kl_coef": 0.1, "learning_rate": 0.02, "num_steps": 2} | args
    if name == "ppo":
        args |= {"value_warmup_steps": 1, "num_minibatches": 1}
    if name == "grpo":
        args |= {"num_updates": 1}  # whose KL is that of equal weights in the first step
    return file.train(file.Args(model=model, output_dir=str(folder), **args))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[2, 7, 3, 9]])).logits


@pytest.mark.parametrize("bfloat16", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["reinforce", "rloo", "remax", "raft", "grpo", "ppo"])
def test_a_run_saves_its_merged_policy(model, tmp_path, monkeypatch, name, bfloat16):
    monkeypatch.setattr(importlib.import_module(f"nano_rl.{name}"), "has_bfloat16", lambda device: bfloat16)
    folder = train(name, model, tmp_path / "run")
    base, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (model, folder / "policy"))
    assert {weight.dtype for weight in merged.parameters()} == {torch.float32}
    args = reinforce.Args(**{n: v for n, v in json.loads((folder / "config.json").read_text()).items() if n in SHARED})
    file = importlib.import_module(f"nano_rl.{name}")
    policy, *_ = file.load_policy(args, CPU)
    adapters = torch.load(folder / "checkpoint.pt")["parts"][0].values()
    for weight, trained in zip([weight for weight in policy.parameters() if weight.requires_grad], adapters):
        weight.data.copy_(trained)
    adapted = logits(policy.float())
    torch.testing.assert_close(logits(merged), adapted, atol=1e-4, rtol=1e-3)
    assert (adapted - logits(base)).abs().max() > 0.01
    rows = read(folder)
    assert rows[1]["kl"] == 0 and rows[2]["grad_norm"] > 0


@pytest.mark.parametrize("name", ["reinforce", "ppo"])
def test_it_resumes(model, tmp_path, name):
    straight = train(name, model, tmp_path / "straight", num_steps=4)
    folder = train(name, model, tmp_path / "run", save_minutes=0)
    file = importlib.import_module(f"nano_rl.{name}")
    file.train(file.Args(resume=str(folder), num_steps=4))
    assert read(folder)[-1] == read(straight)[-1]


@pytest.mark.parametrize("bfloat16", [True, False])
def test_only_the_adapters_are_trained_and_all_is_shared(model, bfloat16, monkeypatch):
    monkeypatch.setattr(reinforce, "has_bfloat16", lambda device: bfloat16)
    args = reinforce.Args(model=model, lora_rank=2)
    policy, ref_policy, tokenizer = reinforce.load_policy(args, CPU)
    sampler = reinforce.make_sampler(policy, tokenizer, args)
    weights = dict(policy.named_parameters())
    ours = {weight.data_ptr() for weight in weights.values()}
    assert all(weight.data_ptr() in ours for weight in ref_policy.parameters()), "the reference is its frozen weights"
    trained = {name for name, weight in weights.items() if weight.requires_grad}
    assert trained == {name for name in weights if "lora_" in name}
    assert len(trained) == 2 * 7 * 2  # A and B of 7 layers in each of 2 blocks
    frozen = torch.bfloat16 if bfloat16 else torch.float32
    assert all(weight.dtype == (torch.float32 if name in trained else frozen) for name, weight in weights.items())
    theirs = dict(sampler.named_parameters())
    assert weights.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], weights[name].to(theirs[name].dtype)) for name in weights)
    shared = {name for name, weight in theirs.items() if weight.data_ptr() in ours}
    assert shared == ({name for name in weights.keys() - trained if weights[name].dim() > 1} if bfloat16 else set())
    assert sampler.generation_config.max_new_tokens == 64 and policy.generation_config.max_new_tokens is None


def test_adapters_are_the_same_in_every_process(model):
    """Whatever was drawn before; another seed has others."""

    def adapters(seed):
        policy, *_ = reinforce.load_policy(reinforce.Args(model=model, lora_rank=2, seed=seed), CPU)
        return [weight.detach() for weight in policy.parameters() if weight.requires_grad]

    torch.manual_seed(1)
    first = adapters(0)
    torch.manual_seed(2)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, adapters(0), strict=True))
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(first, adapters(1), strict=True))


def test_the_reference_is_the_policy_with_its_adapters_off(model):
    args = reinforce.Args(model=model, lora_rank=2)
    policy, ref_policy, _ = reinforce.load_policy(args, CPU)
    batch = as_batch([2, 7], [[3, 1], [4, 5, 6]], pad=1)
    start = reinforce.score_logprobs(policy, batch, args)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.normal_()
    moved = reinforce.score_logprobs(policy, batch, args)
    assert torch.equal(reinforce.score_logprobs(ref_policy, batch, args), start)
    assert not torch.allclose(start, moved, atol=0.1)
    assert torch.equal(reinforce.score_logprobs(policy, batch, args), moved), "they are on again"


@pytest.mark.parametrize("bfloat16", [True, False], ids=["bfloat16", "float32"])
def test_the_value_model_has_adapters_and_a_head_of_its_own(model, monkeypatch, bfloat16):
    """Beside the policy's frozen weights, which it shares; training V leaves the policy as it was."""
    monkeypatch.setattr(ppo, "has_bfloat16", lambda device: bfloat16)
    args = ppo.Args(model=model, lora_rank=2)
    policy, *_ = ppo.load_policy(args, CPU)
    value_model = ppo.make_value_model(policy, args)
    batch = as_batch([2, 7], [[3, 4, 5]], pad=0)
    assert (ppo.compute_values(value_model, batch) == value_model["head"].bias).all()
    shared = {weight.data_ptr() for weight in policy.parameters()}
    own = {name for name, weight in value_model.named_parameters() if weight.data_ptr() not in shared}
    assert own == {name for name, weight in value_model.named_parameters() if weight.requires_grad}
    assert len(own) == 2 * 7 * 2 + 2
    before, values = logits(policy), ppo.compute_values(value_model, batch)
    torch.nn.init.normal_(value_model["head"].weight)
    for _ in range(2):  # the second adapter matrix is 0 at first, and so is the gradient of the first
        ppo.compute_values(value_model, batch).sum().backward()
        for weight in value_model.parameters():
            if weight.requires_grad:
                weight.data -= 0.1 * weight.grad
    assert torch.equal(logits(policy), before) and not torch.equal(ppo.compute_values(value_model, batch), values)
    assert all(weight.grad is None for weight in policy.parameters())


def test_without_peft_one_line_says_so(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    message = main(
        monkeypatch, "reinforce", "--model", model, "--output-dir", str(tmp_path / "run"), "--lora-rank", "2"
    )
    assert "peft" in message and "\n" not in message
    assert not (tmp_path / "run").exists()


def test_a_value_model_from_elsewhere_is_trained_whole(model, tmp_path):
    folder = train("ppo", model, tmp_path / "run", value_model=save_reward_model(tmp_path / "rm"))
    parameters = torch.load(folder / "checkpoint.pt")["parts"][0]
    assert len(parameters) == 2 * 7 * 2 + len(
        list(AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").parameters())
    )
