"""Whole runs on a tiny model: what they write, that they repeat, resume and divide, and what reaches the algorithm."""

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import fork, gpt2_config, llama_config, main, make_tokenizer, save_policy, save_reward_model, start
from transformers import AutoModelForCausalLM, AutoTokenizer

from nano_rl import grpo, ppo, raft, reinforce, remax, reward_model, rloo, sft

LADDER = [reinforce, rloo, remax, raft, grpo, ppo]
ROOT = Path(__file__).parent.parent
TINY = dict(batch_size=4, num_steps=3, max_new_tokens=6, eval_every=2, temperature=1.0, learning_rate=1e-3)


def run(model: str, folder: Path, reward_fn=None, **args) -> Path:
    return reinforce.train(reinforce.Args(model=model, output_dir=str(folder), **(TINY | args)), reward_fn)


def read(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "step_time"} for row in rows]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(run / "policy").state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "options",
    [
        {"baseline": "none"},
        {"baseline": "mean", "whiten_advantages": True},
        {"baseline": "ema", "ema_beta": 0.5, "kl_coef": 0.1},
        {"baseline": "scst", "brevity_penalty_scale": 0.4, "eval_every": 0},
    ],
    ids=lambda options: options["baseline"],
)
def test_a_run_writes_its_files(model, tmp_path, options, capsys):
    folder = run(model, tmp_path / "run", **options)
    names = ["checkpoint.pt", "completions.jsonl", "config.json", "metrics.jsonl", "policy"]
    assert sorted(path.name for path in folder.iterdir()) == names
    config = json.loads((folder / "config.json").read_text())
    assert config["baseline"] == options["baseline"] and config["algorithm"] == "reinforce"
    assert config["torch"] == torch.__version__
    metrics = read(folder)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert [row["step"] for row in metrics if "eval/reward" in row] == (
        [0, 3] if "eval_every" in options else [0, 2, 3]
    )
    names = "step reward reward_std frac_reward_zero_std completions/mean_length completions/clipped_ratio"
    names += " entropy_estimate kl grad_norm"
    if "kl_coef" in options:
        assert list(metrics[1]) == names.split()
        assert metrics[1]["kl"] == 0, "equal weights, so exactly 0"
        assert metrics[3]["kl"] != 0
    else:
        assert list(metrics[1]) == names.replace(" kl", "").split(), "what was not computed is absent"
    assert metrics[1]["grad_norm"] > 0
    completions = read(folder, "completions.jsonl")
    assert len([row for row in completions if row["split"] == "train"]) == 3 * 4
    assert len([row for row in completions if row["split"] == "held_out" and row["step"] == 3]) == 32
    assert {row["step"] for row in completions} == {0, 1, 2, 3}
    out = capsys.readouterr().out
    for step in range(4):
        assert f"step {step}/3" + ("  " if step else "\n") in out
    assert out.count("  eval/reward ") == (2 if "eval_every" in options else 3)
    assert max(len(line) for line in out.splitlines() if line.startswith(("step ", "  eval"))) <= 80
    assert out.count("Write a long story about a ferry.\n  > ") == (2 if "eval_every" in options else 3)
    assert out.endswith(f"trained policy: {folder / 'policy'}\n")


def test_metrics_are_those_of_the_completions(model, tmp_path):
    """Recomputed from completions.jsonl; test_step.py recomputes the others from the weights."""
    folder = run(model, tmp_path / "run", baseline="none", num_steps=1)
    samples = [row for row in read(folder, "completions.jsonl") if row["split"] == "train"]
    rewards = torch.tensor([row["reward"] for row in samples], dtype=torch.float64)
    metrics = read(folder)[1]
    assert metrics["reward"] == pytest.approx(rewards.mean().item())
    assert metrics["reward_std"] == pytest.approx(rewards.std(correction=0).item())
    held_out = [row["reward"] for row in read(folder, "completions.jsonl") if row["split"] == "held_out"][-32:]
    prompt_means = torch.tensor(held_out, dtype=torch.float64).view(8, 4).mean(dim=1)
    assert metrics["eval/reward"] == pytest.approx(prompt_means.mean().item())
    assert metrics["eval/reward_se"] == pytest.approx(prompt_means.std().item() / 8**0.5)


def test_the_policy_is_an_ordinary_folder_and_has_learnt(model, tmp_path):
    folder = run(model, tmp_path / "run", reward_fn=lambda completions, **_: [float(len(c)) for c in completions])
    assert not same(weights(folder), AutoModelForCausalLM.from_pretrained(model).state_dict())
    policy, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "policy"),
        AutoTokenizer.from_pretrained(folder / "policy"),
    )
    assert policy.dtype == torch.float32 and policy.generation_config.eos_token_id == 1
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(model).chat_template
    again = run(str(folder / "policy"), tmp_path / "again", num_steps=1)
    assert (again / "policy").is_dir()


def test_small_updates_are_not_lost(tmp_path):
    """In bfloat16 weights a step of 1e-6 would round away (pitfall 9)."""
    name = save_policy(tmp_path / "tied", llama_config(25, tie_word_embeddings=True))
    before = AutoModelForCausalLM.from_pretrained(name).state_dict()
    after = weights(run(name, tmp_path / "run", num_steps=1, learning_rate=1e-6))
    changed = torch.cat([(before[key] != after[key]).flatten() for key in before])
    assert changed.float().mean() > 0.9


def test_same_seed_same_bits(model, tmp_path):
    first, second = run(model, tmp_path / "1"), run(model, tmp_path / "2")
    assert read(first) == read(second)
    assert same(weights(first), weights(second))
    assert read(first) != read(run(model, tmp_path / "3", seed=1))


def test_what_reaches_the_algorithm(model, tmp_path, monkeypatch):
    """The KL is in the reward, before the baseline; EMA is the value from before the batch (pitfalls 18, 19)."""
    seen, compute_advantages = [], reinforce.compute_advantages

    def spy(kl_rewards, baseline, ema, greedy_rewards, whiten):
        seen.append((kl_rewards.clone(), ema, greedy_rewards.clone()))
        return compute_advantages(kl_rewards, baseline, ema, greedy_rewards, whiten)

    monkeypatch.setattr(reinforce, "compute_advantages", spy)
    folder = run(model, tmp_path / "run", baseline="ema", ema_beta=0.75, kl_coef=0.5, learning_rate=1e-2)
    metrics = read(folder)
    train = [row["reward"] for row in read(folder, "completions.jsonl") if row["split"] == "train"]
    ema = metrics[0]["eval/reward"]
    for step, (kl_rewards, used, greedy_rewards) in enumerate(seen, start=1):
        assert used == pytest.approx(ema)
        assert kl_rewards.dtype == torch.float64
        ema = 0.75 * ema + 0.25 * kl_rewards.mean().item()
        penalty = torch.tensor(train[4 * (step - 1) : 4 * step], dtype=torch.float64) - kl_rewards  # β times each KL
        row = metrics[step]
        assert penalty.mean().item() == pytest.approx(0.5 * row["kl"] * row["completions/mean_length"], abs=1e-5)
        assert (penalty == 0).all() == (step == 1)
        assert (greedy_rewards == 0).all()


def test_a_deviation_counts(model, tmp_path):
    """Of a pair with σ = 0 it is nothing."""

    def reward_fn(scale, completions, **_):
        return [(float(len(text)), scale * i) for i, text in enumerate(completions)]

    options = {"num_steps": 1, "eval_every": 0}
    numbers = run(model, tmp_path / "1", lambda **how: [reward for reward, _ in reward_fn(0.0, **how)], **options)
    none, some = [
        run(model, tmp_path / f"{scale}", partial(reward_fn, scale), uncertainty_penalty=True, **options)
        for scale in (0.0, 1.0)
    ]
    assert same(weights(numbers), weights(none)) and not same(weights(numbers), weights(some))


def test_an_evaluation_measures_the_kl_to_the_start(model, tmp_path, monkeypatch):
    """Of a token, on the completions that it sampled: log π - log π_ref, each by a plain pass over the whole batch."""
    batches, sample = [], reinforce.sample
    monkeypatch.setattr(reinforce, "has_bfloat16", lambda device: False)
    monkeypatch.setattr(reinforce, "sample", lambda *args: batches.append(sample(*args)) or batches[-1])
    folder = run(model, tmp_path / "run", batch_size=32)
    first, last = [row for row in read(folder) if "eval/kl" in row][::2]
    assert first["eval/kl"] == 0, "equal weights, so exactly 0"
    batch = batches[-1][0]
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (folder / "policy", model)]
    logprobs = [reinforce.compute_logprobs(policy, batch, 1.0).sum() / batch["mask"].sum() for policy in models]
    assert last["eval/kl"] == pytest.approx((logprobs[0] - logprobs[1]).item(), rel=1e-3) and last["eval/kl"] != 0
    assert last["eval/ref_logprob"] == pytest.approx(logprobs[1].item(), rel=1e-4)


def test_an_evaluation_comes_in_parts_of_the_batch_size(model, tmp_path, monkeypatch):
    """So that it needs no more memory than a step; a file of held-out prompts is read whole."""
    calls, sample = [], reinforce.sample
    monkeypatch.setattr(reinforce, "sample", lambda *args: calls.append((len(args[2]), args[3])) or sample(*args))
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"the {word}"}) + "\n" for word in "abc"))
    folder = run(model, tmp_path / "run", num_steps=1, temperature=0.6, eval_prompts=str(path))
    sizes = [4] * 7 + [2] + [4] + [4] * 7 + [2]  # 10 completions of each of 3 prompts, a step, and again
    assert calls == [(size, 0.6) for size in sizes]
    prompts = [row["prompt"] for row in read(folder, "completions.jsonl") if row["split"] == "held_out"]
    assert prompts == [f"the {word}" for word in "abc" for _ in range(10)] * 2


def test_one_held_out_prompt_has_no_error_over_prompts(model, tmp_path):
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "the sea"}\n')
    folder = run(model, tmp_path / "run", num_steps=1, eval_prompts=str(tmp_path / "held_out.jsonl"))
    assert all("eval/reward" in row and "eval/reward_se" not in row for row in read(folder))
    assert "NaN" not in (folder / "metrics.jsonl").read_text()


def test_scst_scores_the_greedy_completion_of_the_same_prompts(model, tmp_path, monkeypatch):
    calls, sample = [], reinforce.sample

    def spy(sampler, tokenizer, examples, temperature):
        batch, texts = sample(sampler, tokenizer, examples, temperature)
        prompts = [example["prompt"] for example in examples]
        calls.append((prompts, temperature, next(sampler.parameters()).clone(), texts))
        return batch, texts

    seen = []
    compute_advantages = reinforce.compute_advantages
    monkeypatch.setattr(reinforce, "sample", spy)
    monkeypatch.setattr(reinforce, "evaluate", lambda *_: ({"eval/reward": torch.tensor(0.5)}, []))
    monkeypatch.setattr(
        reinforce, "compute_advantages", lambda *inputs: seen.append(inputs) or compute_advantages(*inputs)
    )
    run(model, tmp_path / "run", baseline="scst", num_steps=1)
    (prompts, temperature, sampled_with, _), (greedy_prompts, zero, greedy_with, greedy_texts) = calls
    assert prompts == greedy_prompts and torch.equal(sampled_with, greedy_with)
    assert temperature == TINY["temperature"] and zero == 0
    expected = reinforce.lexical_richness(reinforce.Args.brevity_penalty_scale, greedy_texts)
    assert seen[0][3].tolist() == pytest.approx(expected)


def test_sampled_ids_are_the_ids_that_train(model, tmp_path, monkeypatch):
    """Nothing is decoded and tokenised again on the way to the loss (pitfall 14)."""
    sampled, trained = [], []
    sample, compute_logprobs = reinforce.sample, reinforce.compute_logprobs

    def spy_sample(*inputs):
        batch, texts = sample(*inputs)
        sampled.append(batch)
        return batch, texts

    def spy_logprobs(policy, batch, temperature):
        if torch.is_grad_enabled():
            trained.append((batch, temperature))
        return compute_logprobs(policy, batch, temperature)

    monkeypatch.setattr(reinforce, "sample", spy_sample)
    monkeypatch.setattr(reinforce, "compute_logprobs", spy_logprobs)
    run(model, tmp_path / "run", num_steps=1, baseline="none", temperature=0.8, eval_every=0)
    (part, temperature), batch = trained[0], sampled[-9]  # eight parts of the last evaluation follow
    assert temperature == 0.8

    def rows(batch):
        return sorted(ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"]))

    trainable = [row for row in rows(batch) if row in rows(part)]
    assert rows(part) == trainable and len(trainable) >= 3


def test_the_gradient_is_clipped(model, tmp_path, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, max_norm):
        parameters = list(parameters)
        total = clip(parameters, max_norm)
        norms.append((total.item(), torch.stack([parameter.grad.norm() for parameter in parameters]).norm().item()))
        return total

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    metrics = read(run(model, tmp_path / "run", baseline="none", max_grad_norm=0.25))
    for row, (before, after) in zip(metrics[1:], norms, strict=True):
        assert row["grad_norm"] == before > 0.25 and after == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("file", LADDER, ids=lambda file: file.__name__[8:])
def test_micro_batches_do_not_change_a_run(model, tmp_path, monkeypatch, file):
    """One completion at a time, or all at once: the same gradient, through every update (pitfall 28)."""
    args = TINY | {"model": model, "kl_coef": 0.1, "num_steps": 1, "eval_every": 0}
    monkeypatch.setattr(file, "has_bfloat16", lambda device: False)  # whose rounding depends on the batch
    one, all_at_once = (
        read(file.train(file.Args(output_dir=str(tmp_path / str(size)), micro_batch_tokens=size, **args)))[1]
        for size in (1, 10**6)
    )
    assert one["grad_norm"] == pytest.approx(all_at_once["grad_norm"], rel=1e-4) and one["grad_norm"] > 0
    assert one["reward"] == all_at_once["reward"]


def test_a_mac_computes_on_its_processor(model, tmp_path, monkeypatch):
    """Nobody has tried its GPU, which accelerate would choose."""
    seen = []

    def accelerator(cpu, **_):
        seen.append(cpu)
        raise KeyError

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(reinforce, "Accelerator", accelerator)
    with pytest.raises(KeyError):
        run(model, tmp_path / "run")
    assert seen == [True]


def test_equal_rewards_are_a_step_of_zero_gradient(model, tmp_path):
    folder = run(model, tmp_path / "run", reward_fn=lambda completions, **_: [0.7] * len(completions))
    metrics = read(folder)
    assert [row["grad_norm"] for row in metrics[1:]] == [0, 0, 0]
    assert [row["frac_reward_zero_std"] for row in metrics[1:]] == [1, 1, 1]
    assert same(weights(folder), AutoModelForCausalLM.from_pretrained(model).state_dict())


@pytest.mark.parametrize("file", [reinforce, rloo, raft], ids=lambda file: file.__name__[8:])
def test_groups_are_equal_where_reward_and_kl_are(model, tmp_path, file):
    """Equal rewards have advantages as soon as the policy has moved, by the KL in R."""
    calls = []  # 8 of the first evaluation, then one a step

    def equal_in_the_second_step(completions, **_):
        calls.append(1)
        return [1.0 if len(calls) == 10 else float(len(text)) for text in completions]

    args = TINY | {"num_steps": 2, "eval_every": 0, "kl_coef": 0.1, "model": model}
    row = read(file.train(file.Args(output_dir=str(tmp_path / "run"), **args), equal_in_the_second_step))[2]
    assert row["reward_std"] == 0 and row["frac_reward_zero_std"] == 0 and row["grad_norm"] > 0


@pytest.mark.parametrize("part", ["pad", "eos", "chat", "all"])
def test_tokenizers_that_lack_something(tmp_path, part):
    lacks = {"pad": {"pad": None}, "eos": {"eos": None}, "chat": {"chat": False}}
    lacks["all"] = {name: value for lack in lacks.values() for name, value in lack.items()}
    tokenizer = make_tokenizer(**lacks[part])
    config = gpt2_config(25) if part != "all" else gpt2_config(25, eos_token_id=None)
    metrics = read(run(save_policy(tmp_path / "model", config, tokenizer), tmp_path / "run", num_steps=1))
    if part == "all":
        assert metrics[1]["completions/clipped_ratio"] == 1 and metrics[1]["completions/mean_length"] == 6


def test_empty_completions_score_zero_and_train_their_stop(tmp_path, monkeypatch):
    name = save_policy(tmp_path / "model")
    policy = AutoModelForCausalLM.from_pretrained(name)
    monkeypatch.setattr(reinforce, "evaluate", lambda *_: ({"eval/reward": torch.tensor(0.5)}, []))
    sample = reinforce.sample

    def stop_at_once(sampler, tokenizer, examples, temperature):
        sampler.generation_config.eos_token_id = list(range(25))
        batch, _ = sample(sampler, tokenizer, examples, temperature)
        return batch, [""] * len(examples)

    monkeypatch.setattr(reinforce, "sample", stop_at_once)
    folder = run(name, tmp_path / "run", num_steps=1, baseline="ema", brevity_penalty_scale=0)
    assert [row["reward"] for row in read(folder, "completions.jsonl")] == [0] * 4
    assert not same(weights(folder), policy.state_dict())


def test_reward_model_and_prompts_file(model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the {word} sings", "n": 1}) + "\n" for word in "abcde"))
    reward_model = save_reward_model(tmp_path / "rm", num_labels=3)
    metrics = read(run(model, tmp_path / "run", prompts=str(prompts), reward_model=reward_model))
    assert all(1 <= row["reward"] <= 3 for row in metrics[1:])


def test_wandb_runs_have_an_id_of_their_own_and_keep_it(model, tmp_path, monkeypatch):
    """Two folders of one name are two runs; a resumed run is the same one. It gets what metrics.jsonl gets."""
    ids, logged, write_log = [], [], reinforce.Accelerator.log

    def spy(accelerator, values, step):
        logged.append({"step": step} | {name: value for name, value in values.items() if name != "step_time"})
        write_log(accelerator, values, step=step)

    monkeypatch.setattr(reinforce.Accelerator, "log", spy)
    for place in "ab":
        folder = run(model, tmp_path / place / "run", track=True, num_steps=1)
        (log,) = folder.glob("wandb/offline-run-*/*.wandb")
        ids.append(log.stem.removeprefix("run-"))
    assert ids[0] != ids[1]
    reinforce.train(reinforce.Args(resume=str(folder), num_steps=2))
    logs = folder.glob("wandb/offline-run-*/*.wandb")
    assert {log.stem.removeprefix("run-") for log in logs} == {ids[1]}
    assert logged == read(tmp_path / "a/run") + read(tmp_path / "b/run") and len(logged) == 5


@pytest.mark.parametrize("key, mode", [("", "offline"), ("0123", "online")])
def test_wandb_is_online_where_there_is_a_key(model, tmp_path, monkeypatch, key, mode):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", key)
    given = []
    monkeypatch.setattr(reinforce.Accelerator, "init_trackers", lambda *inputs: given.append(inputs[-1]["wandb"]))
    run(model, tmp_path / "run", num_steps=1, eval_every=0)
    assert [options["mode"] for options in given] == [mode]
    assert "WANDB_MODE" not in os.environ, "the caller's own runs are as they were"


def test_a_library_call_changes_nothing_outside(model, tmp_path):
    """Twice in one process, in a thread, and in a running event loop; signal handlers are as before."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    folders = [run(model, tmp_path / "first", num_steps=1)]
    thread = threading.Thread(target=lambda: folders.append(run(model, tmp_path / "thread", num_steps=1)))
    thread.start()
    thread.join()

    async def in_a_loop():
        folders.append(run(model, tmp_path / "loop", num_steps=1))

    asyncio.run(in_a_loop())
    assert len(folders) == 3 and all(same(weights(folders[0]), weights(folder)) for folder in folders)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_every_prompt_comes_once_in_every_pass(model, tmp_path):
    """Steps of 8 prompts over 11: passes begin inside steps, and no step starts a new one early."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"the sea {i}"}) + "\n" for i in range(14)))
    folder = run(model, tmp_path / "run", prompts=str(path), batch_size=8, num_steps=5, eval_every=0)
    prompts = [row["prompt"] for row in read(folder, "completions.jsonl") if row["split"] == "train"]
    passes = [prompts[first : first + 11] for first in range(0, 33, 11)]
    assert all(sorted(order) == sorted(f"the sea {i}" for i in range(11)) for order in passes)
    assert passes[0] != passes[1] != passes[2]


# ---- Resume ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(model, tmp_path_factory) -> Path:
    """Six steps without a stop, by the same reward function as the killed runs'."""
    return run(model, tmp_path_factory.mktemp("straight") / "run", **RESUMABLE)


RESUMABLE = dict(num_steps=6, save_minutes=0, baseline="ema", kl_coef=0.1)


def train_until_killed(moment: str, args: dict) -> None:
    save, log, write = torch.save, reinforce.Run.log, reinforce.Run.write

    def kill(number=signal.SIGKILL):
        os.kill(os.getpid(), number)

    def log_and_die(run, step, metrics, samples):
        log(run, step, metrics, samples)
        if step == 5 and moment == "between checkpoints":
            with open(run.folder / "metrics.jsonl", "a") as file:
                file.write('{"step": 6, "rew')  # killed in the middle of a line
            kill()
        if step == 3 and moment in ("SIGINT", "SIGTERM"):
            kill(getattr(signal, moment))

    def save_half_and_die(state, path):
        save(state, path)
        if state["step"] == 4 and moment == "while saving":
            os.truncate(path, path.stat().st_size // 2)
            kill()

    def write_and_die(run, name, save):
        if name == "policy" and moment == "before the policy":
            kill()
        write(run, name, save)
        if moment.isdigit() and name == "checkpoint.pt" and run.state["step"] == 1:
            left = iter(range(int(moment)))  # calls of Python and C
            sys.setprofile(lambda *_: next(left, None) is None and kill())

    reinforce.Run.log, reinforce.Run.write, torch.save = log_and_die, write_and_die, save_half_and_die
    try:
        reinforce.train(reinforce.Args(**args))
    except KeyboardInterrupt as error:
        sys.exit(str(error))


def flags(**args) -> list[str]:
    words = []
    for name, value in args.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


@pytest.mark.parametrize("moment", ["between checkpoints", "while saving", "before the policy", "SIGINT", "SIGTERM"])
def test_a_killed_run_resumes_to_the_same_bits(model, straight, tmp_path, capfd, moment):
    """Whoever ends it, it costs no step, or those since the last save."""
    folder = tmp_path / "run"
    killed = fork(train_until_killed, moment, TINY | RESUMABLE | {"model": model, "output_dir": str(folder)})
    killed.join()
    if moment.startswith("SIG"):
        assert killed.exitcode == 1 and f"stopped after step 3: go on with --resume {folder}" in capfd.readouterr().err
        assert [row["step"] for row in read(folder)] == [0, 1, 2, 3]
    else:
        assert killed.exitcode == -signal.SIGKILL
    assert not (folder / "policy").exists()
    reinforce.train(reinforce.Args(resume=str(folder)))
    assert read(folder) == read(straight)
    assert read(folder, "completions.jsonl") == read(straight, "completions.jsonl")
    assert same(weights(folder), weights(straight))


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_a_random_moment(model, straight, tmp_path, seed):
    """kill -9 at any time after the first checkpoint: the folder can be resumed, to the same bits."""
    folder, moment = tmp_path / "run", str(random.Random(seed).randrange(1_000_000))
    process = fork(train_until_killed, moment, TINY | RESUMABLE | {"model": model, "output_dir": str(folder)})
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (folder / "policy").exists()
    reinforce.train(reinforce.Args(resume=str(folder)))
    assert read(folder) == read(straight)
    assert same(weights(folder), weights(straight))


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl"])
def test_a_run_goes_on_without_the_logs_that_were_lost(model, tmp_path, name):
    """As of a user who made room on a full disk, or of a machine that lost its power."""
    folder = run(model, tmp_path / "run", num_steps=1, eval_every=0)
    shutil.copytree(folder, tmp_path / "deleted")
    (tmp_path / "deleted" / name).unlink()
    shutil.copytree(folder, tmp_path / "shorter")
    (tmp_path / "shorter" / name).write_text("")
    (folder / "own.jsonl").write_text("{}")
    for folder, other_steps in ("run", {0, 1}), ("deleted", set()), ("shorter", set()):
        reinforce.train(reinforce.Args(resume=str(tmp_path / folder), num_steps=2))
        assert {row["step"] for row in read(tmp_path / folder, name)} == other_steps | {2}
    assert (tmp_path / "run" / "own.jsonl").read_text() == "{}"


def test_checkpoints_come_by_the_clock_and_after_the_last_step(model, tmp_path, monkeypatch):
    saved, save_checkpoint = [], reinforce.Run.save_checkpoint
    monkeypatch.setattr(
        reinforce.Run, "save_checkpoint", lambda run: saved.append(run.state["step"]) or save_checkpoint(run)
    )
    run(model, tmp_path / "seldom", num_steps=3)
    run(model, tmp_path / "always", num_steps=3, save_minutes=0)
    assert saved == [3, 1, 2, 3]
    saved.clear()
    log = reinforce.Run.log

    def lose_two_minutes(run, step, *rest):
        log(run, step, *rest)
        run.save_time -= 121 * (step == 2)

    monkeypatch.setattr(reinforce.Run, "log", lose_two_minutes)
    run(model, tmp_path / "once", num_steps=5, eval_every=0)
    assert saved == [2, 5]


def test_more_steps(model, straight, tmp_path):
    """Three steps, resumed for three more, are the six of a run that was asked for six."""
    folder = run(model, tmp_path / "run", **(RESUMABLE | {"num_steps": 3}))
    reinforce.train(reinforce.Args(resume=str(folder), num_steps=6))
    assert same(weights(folder), weights(straight))
    assert json.loads((folder / "config.json").read_text())["num_steps"] == 6
    for steps in 3, 5:
        with pytest.raises(reinforce.InputError, match="or under 6 steps"):
            reinforce.train(reinforce.Args(resume=str(folder), num_steps=steps))
    assert len(read(folder)) == 7, "nothing of a longer run is lost"
    shutil.rmtree(folder / "policy")
    reinforce.train(reinforce.Args(resume=str(folder)))
    assert same(weights(folder), weights(straight)) and len(read(folder)) == 7, "its policy is saved again"


def test_a_number_of_steps_that_is_the_default_is_given_too(model, tmp_path, monkeypatch):
    folder = run(model, tmp_path / "run", num_steps=1, eval_every=0)
    assert main(monkeypatch, "reinforce", "--resume", str(folder), "--num-steps", "15") == 0
    assert len(read(folder)) == 1 + 15


# ---- Several processes, and a copied file ---------------------------------------------------------------------------


def fork_group(processes: int, target: Callable, *inputs) -> list[int]:
    """The exit codes of processes that know of each other, as under torchrun; each is given its rank first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def join_and_run(rank: int) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # what an earlier test has left
        if processes > 1:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({name: str(value) for name, value in (ranks | {"MASTER_PORT": port}).items()})
        target(rank, *inputs)

    forked = [fork(join_and_run, rank) for rank in range(processes)]
    for process in forked:
        process.join(timeout=300)
        process.kill()
    return [process.exitcode for process in forked]


def write_seeds(rank: int, folder: Path, args: dict) -> None:
    seeds, set_seed = [], reinforce.set_seed
    reinforce.set_seed = lambda seed: seeds.append(seed) or set_seed(seed)
    reinforce.train(reinforce.Args(output_dir=str(folder), num_steps=2, eval_every=1, **args))
    (folder / f"seeds-{rank}.json").write_text(json.dumps(seeds))


def test_every_step_draws_anew_and_no_process_as_another(model, tmp_path):
    """An evaluation draws the same as the one before. One held-out prompt leaves a process without any."""
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "the sea"}\n')
    args = {"model": model, "batch_size": 4, "max_new_tokens": 6, "eval_prompts": str(tmp_path / "held_out.jsonl")}
    steps = []
    for seed in (0, 1):
        assert fork_group(2, write_seeds, tmp_path / str(seed), args | {"seed": seed}) == [0, 0]
        of_ranks = [json.loads((tmp_path / f"{seed}/seeds-{rank}.json").read_text()) for rank in (0, 1)]
        evaluations = [of_rank[::2] for of_rank in of_ranks]
        assert [len(set(of_rank)) for of_rank in evaluations] == [1, 1] and evaluations[0] != evaluations[1]
        steps += [number for of_rank in of_ranks for number in of_rank[1::2]]
    assert len(steps) == len(set(steps)) == 8


def train_divided(rank: int, file, processes: int, args: dict) -> None:
    """A row's random numbers depend on its place in the whole batch, however it is divided."""
    clip, sample, load_policy = torch.nn.utils.clip_grad_norm_, file.sample, file.load_policy
    place = {"seed": -1, "row": 0, "token": 0}
    grads = []

    def set_seed(seed):  # an evaluation has an even number, a step an odd one
        place.update(seed=place["seed"] + 1, row=0)
        torch.manual_seed(seed)

    def load_policy_first(*inputs):  # adapters have a seed of their own
        loaded = load_policy(*inputs)
        place.update(seed=-1)
        return loaded

    def sample_by_place(sampler, tokenizer, examples, temperature):
        first = place["row"] + rank * (32 // processes if place["seed"] % 2 == 0 else len(examples))
        place.update(row=place["row"] + len(examples), token=0)

        def rand_like(column):  # (n, 1), one number a row
            place["token"] += 1
            generator = torch.Generator().manual_seed(1000 * place["seed"] + place["token"])
            return torch.rand(100, 1, dtype=column.dtype, generator=generator)[first : first + len(column)]

        torch.rand_like = rand_like
        return sample(sampler, tokenizer, examples, temperature)

    def reward(prompts, completions, **columns):  # in the first step the second half has nothing
        rows = range(rank * len(prompts), (rank + 1) * len(prompts))
        return [len(text) / 40 * (place["seed"] != 1 or row < 4) for row, text in zip(rows, completions)]

    def keep_and_clip(parameters, max_norm):
        grads.append([parameter.grad.clone() for parameter in parameters])
        return clip(parameters, max_norm)

    file.set_seed, file.sample, file.load_policy = set_seed, sample_by_place, load_policy_first
    torch.nn.utils.clip_grad_norm_ = keep_and_clip
    file.has_bfloat16 = lambda device: False  # its rounding depends on the batch
    folder = file.train(file.Args(**args), reward)
    if rank == 0:
        torch.save(grads, folder / "grads.pt")


def divided(file, folder: Path, processes: int, **args) -> Path:
    """The folder of a run by that many processes."""
    args |= {"output_dir": str(folder), "batch_size": 8 // processes}
    assert fork_group(processes, train_divided, file, processes, args) == [0] * processes
    return folder


@pytest.mark.parametrize(
    "file, options",
    [
        (reinforce, {"baseline": "none", "kl_coef": 0.1}),
        (reinforce, {"baseline": "scst", "kl_coef": 0.1}),
        (reinforce, {"baseline": "ema", "kl_coef": 0.1, "whiten_advantages": True}),
        (reinforce, {"baseline": "mean", "lora_rank": 2, "learning_rate": 0.02}),
        (rloo, {"kl_coef": 0.1}),
        (remax, {"kl_coef": 0.1}),
        (raft, {"kl_coef": 0.1}),
        (grpo, {"kl_coef": 0.1}),
        (grpo, {"lora_rank": 2, "learning_rate": 0.02}),
        (ppo, {"kl_coef": 0.1, "whiten_advantages": True, "num_epochs": 2, "num_minibatches": 1}),
    ],
    ids=lambda value: value.__name__[8:] if hasattr(value, "train") else "-".join(value),
)
def test_two_processes_are_one_with_the_doubled_batch(model, tmp_path, capfd, file, options):
    """In gradients, weights and metrics; the second process has nothing to gain in the first step."""
    args = TINY | {"num_steps": 2, "eval_every": 1, "model": model} | options
    if file is ppo:
        args["value_warmup_steps"] = 1
    two = divided(file, tmp_path / "two", 2, **args)
    out = capfd.readouterr().out
    assert out.count("step 1/") == 1 and out.count("trained policy") == 1, "one process reports"
    one = divided(file, tmp_path / "one", 1, **args)
    for ours, theirs in zip(torch.load(two / "grads.pt"), torch.load(one / "grads.pt"), strict=True):
        largest = max(1.0, *(gradient.abs().max().item() for gradient in theirs))  # what float32 rounds a sum by
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6 * largest, rtol=1e-4)
    ours, theirs = weights(two), weights(one)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0)
    first_step = [
        row["reward"] for row in read(two, "completions.jsonl") if (row["step"], row["split"]) == (1, "train")
    ]
    assert len(first_step) == 8 and any(first_step[:4]) and not any(first_step[4:])
    ours, theirs = read(two), read(one)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for a, b in zip(ours, theirs):
        for key in a:
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), key
    for name in "completions.jsonl", "metrics.jsonl":
        assert len(read(two, name)) == len(read(one, name)), "no row is lost or written twice"


def train_rows(rank: int, file, args: dict) -> None:
    file.has_bfloat16 = lambda device: False  # its rounding depends on the batch
    file.train(file.Args(**args))


@pytest.mark.parametrize("file, flag", [(sft, "data"), (reward_model, "pairs"), (reward_model, "labels")])
def test_two_processes_are_one_before_rl_too(model, tmp_path, file, flag):
    """Three held-out rows, of which one process has more, and the loss is a mean over the tokens of both."""
    words = "a the sea sun tree song stone river walks sings falls and".split()
    rows = [{"prompt": f"write {word}", "completion": f"{word} sings " * (1 + i % 3)} for i, word in enumerate(words)]
    if flag != "data":
        rows = [row | {"chosen": row["completion"], "rejected": "the sea", "text": row["completion"]} for row in rows]
    rows = [row | {"label": i % 2} for i, row in enumerate(rows)] if flag == "labels" else rows
    rows = [{key: row[key] for key in ("text", "label")} for row in rows] if flag == "labels" else rows
    for name, part in (("rows", rows[3:]), ("held_out", rows[:3])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    args = {"model": model, flag: str(tmp_path / "rows"), f"eval_{flag}": str(tmp_path / "held_out"), "num_steps": 3}
    for processes in (1, 2):
        own = {"output_dir": str(tmp_path / str(processes)), "batch_size": 4 // processes}
        assert fork_group(processes, train_rows, file, args | own) == [0] * processes
    one, two = [read(tmp_path / name) for name in "12"]
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key
    one, two = [read(tmp_path / name, "completions.jsonl") for name in "12"]
    assert [row["completion"] for row in one] == [row["completion"] for row in two]


def train_and_stop(rank: int, number: int, args: dict) -> None:
    def reward(completions, **_):  # in a step: before the first there is nothing to save
        if rank == 1 and Path(args["output_dir"], "metrics.jsonl").exists():
            os.kill(os.getpid(), number)
        return [0.1 * len(text) for text in completions]

    try:
        reinforce.train(reinforce.Args(**args), reward)
    except KeyboardInterrupt as error:
        sys.exit(str(error))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_process_stops_all_after_the_same_step(model, tmp_path, capfd, number):
    args = TINY | {"model": model, "output_dir": str(tmp_path / "run"), "num_steps": 100, "eval_every": 0}
    assert fork_group(2, train_and_stop, number, args) == [1, 1]
    assert capfd.readouterr().err.count(f"stopped after step 1: go on with --resume {tmp_path / 'run'}") == 2
    assert torch.load(tmp_path / "run/checkpoint.pt")["step"] == 1
    assert [row["step"] for row in read(tmp_path / "run")] == [0, 1]


STOPPED = """
import os, signal, sys
import nano_rl.reinforce as reinforce

number = getattr(signal, sys.argv.pop(1))

def reward(completions, **_):  # in a step: before the first there is nothing to save
    if os.path.exists("run/metrics.jsonl") and not os.path.exists("sent") and os.environ["RANK"] == "1":
        open("sent", "w").close()
        os.kill(os.getppid(), number)
    return [0.1 * len(text) for text in completions]

try:
    reinforce.train(reinforce.tyro.cli(reinforce.Args), reward)
except KeyboardInterrupt as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_torchrun_passes_a_signal_on_to_all_processes(model, tmp_path, number):
    (tmp_path / "stopped.py").write_text(STOPPED)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = flags(model=model, output_dir="run", **(TINY | {"num_steps": 100, "eval_every": 0}))
    command = [sys.executable, *launch, "stopped.py", number, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    stopped = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert stopped.returncode, stopped.stderr
    step = torch.load(tmp_path / "run/checkpoint.pt")["step"]
    assert f"stopped after step {step}: go on with --resume run" in stopped.stderr
    assert [row["step"] for row in read(tmp_path / "run")] == list(range(step + 1)) and step < 100


def start_anew(folder: Path, file: Path, *words: str) -> subprocess.CompletedProcess:
    """A process of its own, which imports what the file says."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, file.name, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("file, begin", [(reinforce, start_anew), (ppo, start)], ids=["reinforce", "ppo"])
def test_a_copied_file_trains_stops_at_ctrl_c_and_resumes(model, tmp_path, file, begin):
    """Alone in an empty folder, without this project on the path; `.env` beside it is read, and on Linux memory comes
    in large pages: torch reads that setting at its first allocation, which must not come before `train` makes it."""
    copied = Path(shutil.copy(file.__file__, tmp_path))
    (tmp_path / ".env").write_text("PROBE=0.5\n")
    (tmp_path / "probe.py").write_text(
        "import glob, os, signal, torch\n\ndef reward(prompts, completions, **columns):\n"
        "    if glob.glob('runs/*/metrics.jsonl') and not os.path.exists('pressed'):  # in the first step\n"
        "        block = torch.ones(2**24)\n"
        "        with open('pressed', 'w') as file:\n"
        "            file.write(''.join(open(path).read() for path in glob.glob('/proc/self/smaps')))\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return [float(os.environ['PROBE']) * len(text) for text in completions]\n"
    )
    stopped = begin(tmp_path, copied, *flags(model=model, reward_fn="probe:reward", **TINY))
    (folder,) = tmp_path.glob(f"runs/*-{copied.stem}")
    advice = f"stopped after step 1: go on with --resume {folder.relative_to(tmp_path)}"
    assert stopped.returncode == 1 and stopped.stderr.splitlines()[-1] == advice
    assert "Traceback" not in stopped.stderr and not (folder / "policy").exists()
    if begin is start_anew and Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        assert " hg" in (tmp_path / "pressed").read_text(), "blocks of large pages"
    resumed = start(tmp_path, copied, *advice.split()[-2:])
    assert resumed.returncode == 0, resumed.stderr
    assert "step 2/3" not in resumed.stderr, "a log file holds no progress bar of ours"
    assert [row["step"] for row in read(folder)] == [0, 1, 2, 3]
    assert (folder / "policy").exists() and torch.load(folder / "checkpoint.pt")["step"] == 3


def test_a_second_signal_stops_at_once(capfd):
    """But not within a second, as torchrun and the terminal may send the same one twice."""
    run = reinforce.Run.__new__(reinforce.Run)
    run.stop_time = None
    run.interrupt(signal.SIGINT, None)
    run.interrupt(signal.SIGINT, None)
    run.stop_time -= 1
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        run.interrupt(signal.SIGTERM, None)
    assert "stopping after this step; again to stop at once" in capfd.readouterr().out
