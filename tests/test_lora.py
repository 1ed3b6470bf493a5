"""--lora-rank: small trained adapters over frozen weights that the sampler and the reference share."""

import importlib
import sys

import peft
import pytest
import torch
from test_run import TINY, read
from tiny import as_batch, llama_config, make_policy, make_tokenizer
from transformers import AutoModelForCausalLM

import nano_rl.ppo as ppo
import nano_rl.reinforce as reinforce

CPU = torch.device("cpu")


def train(name: str, model: str, folder, **args):
    file = importlib.import_module(f"nano_rl.{name}")
    args = TINY | {"lora_rank": 2, "kl_coef": 0.1, "learning_rate": 0.02, "num_steps": 2} | args
    if name == "ppo":
        args |= {"value_warmup_steps": 1, "num_minibatches": 1}
    return file.train(file.Args(model=model, output_dir=str(folder), **args))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[2, 7, 3, 9]])).logits


@pytest.mark.parametrize("name", ["reinforce", "rloo", "remax", "raft", "grpo", "ppo"])
def test_a_run_saves_the_adapter_and_a_merged_policy(model, tmp_path, name):
    folder = train(name, model, tmp_path / "run")
    base, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (model, folder / "policy"))
    if reinforce.has_bfloat16(CPU):  # the frozen weights were rounded, and the adapter learnt beside those
        for parameter in base.parameters():
            parameter.data = parameter.data.bfloat16().float()
    start = logits(base)
    adapted = logits(peft.PeftModel.from_pretrained(base, folder / "adapter"))
    torch.testing.assert_close(logits(merged), adapted, atol=1e-4, rtol=1e-3)
    assert (adapted - start).abs().max() > 0.01
    rows = read(folder)
    assert rows[1]["kl"] == 0 and rows[2]["grad_norm"] > 0


@pytest.mark.parametrize("name", ["reinforce", "ppo"])
def test_it_resumes(model, tmp_path, name):
    straight = train(name, model, tmp_path / "straight", num_steps=4)
    folder = train(name, model, tmp_path / "run", save_every=1)
    file = importlib.import_module(f"nano_rl.{name}")
    file.train(file.Args(resume=str(folder), num_steps=4))
    assert read(folder)[-1] == read(straight)[-1]


@pytest.mark.parametrize("bfloat16", [True, False])
def test_only_the_adapters_are_trained_and_copied(bfloat16, monkeypatch):
    monkeypatch.setattr(reinforce, "has_bfloat16", lambda device: bfloat16)
    args = reinforce.Args(lora_rank=2)
    policy = reinforce.add_lora(make_policy(llama_config(25)), args)
    sampler = reinforce.make_sampler(policy, make_tokenizer(), args)
    trained, copied = reinforce.trained_weights(policy), reinforce.trained_weights(sampler)
    assert all("lora_" in name and weight.dtype == torch.float32 for name, weight in trained.items())
    assert len(trained) == 2 * 7 * 2 and trained.keys() == copied.keys()  # A and B of 7 layers in each of 2 blocks
    theirs = dict(sampler.named_parameters())
    for name, weight in policy.named_parameters():
        assert (theirs[name].data_ptr() == weight.data_ptr()) == (name not in trained)
        assert name in trained or weight.dtype == (torch.bfloat16 if bfloat16 else torch.float32)


def test_the_reference_is_the_policy_with_its_adapters_off():
    args = reinforce.Args(lora_rank=2)
    policy = reinforce.add_lora(make_policy(llama_config(25)), args)
    sampler = reinforce.make_sampler(policy, make_tokenizer(), args)
    ref_weights = {name: weight.clone() for name, weight in reinforce.trained_weights(sampler).items()}
    for weight in reinforce.trained_weights(policy).values():
        weight.normal_()
    batch = as_batch([2, 7], [[3, 1], [4, 5, 6]], pad=1)
    sampler.load_state_dict(reinforce.trained_weights(policy), strict=False)
    moved = reinforce.score_logprobs(sampler, batch, args)
    sampler.load_state_dict(ref_weights, strict=False)
    ours = reinforce.score_logprobs(sampler, batch, args)
    with sampler.disable_adapter():
        off = reinforce.score_logprobs(sampler, batch, args)
    assert torch.equal(ours, off) and not torch.allclose(ours, moved, atol=0.1)


def test_the_value_model_has_adapters_and_a_head_of_its_own():
    policy = ppo.add_lora(make_policy(llama_config(25)), ppo.Args(lora_rank=2))
    value_model = ppo.make_value_model(policy, None, CPU)
    batch = as_batch([2, 7], [[3, 4, 5]], pad=0)
    assert (ppo.compute_values(value_model, batch) == 0).all()
    shared = {weight.data_ptr() for weight in policy.parameters()}
    own = {name for name, weight in value_model.named_parameters() if weight.data_ptr() not in shared}
    assert own == ppo.trained_weights(value_model).keys() and len(own) == 2 * 7 * 2 + 1


def test_without_peft_one_line_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match="^--lora-rank needs peft: pip install peft, or here uv run --extra lora"):
        train("reinforce", model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_value_model_from_elsewhere_shares_nothing(model, tmp_path):
    with pytest.raises(SystemExit, match="choose one of --value-model and --lora-rank"):
        train("ppo", model, tmp_path / "run", value_model="rm")
