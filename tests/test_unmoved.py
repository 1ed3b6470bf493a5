"""Whole runs of the files that have not moved to the new shape yet: remax, raft, grpo, ppo."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_run import ROOT, TINY, flags, read

from nano_rl import grpo, ppo, raft, remax

FILES = [remax, raft, grpo, ppo]


def line(error) -> str:
    """The one line that the user reads, where the exit code is 1."""
    message = error.value.code
    assert isinstance(message, str) and "\n" not in message
    return message


@pytest.mark.parametrize("name", ["remax", "raft", "grpo", "ppo"])
def test_micro_batches_do_not_change_a_run(model, tmp_path, monkeypatch, name):
    """One completion at a time, or all at once: the same gradient, through every update (pitfall 28)."""
    file = importlib.import_module(f"nano_rl.{name}")
    several = {"raft": {"num_epochs": 2}, "grpo": {"num_updates": 2}, "ppo": {"value_warmup_steps": 0}}.get(name, {})
    args = TINY | several | {"model": model, "kl_coef": 0.1, "num_steps": 1}
    monkeypatch.setattr(file, "has_bfloat16", lambda device: False)  # whose rounding depends on the batch
    one, all_at_once = (
        read(file.train(file.Args(output_dir=str(tmp_path / str(size)), micro_batch_tokens=size, **args)))[1]
        for size in (1, 10**6)
    )
    assert one["grad_norm"] == pytest.approx(all_at_once["grad_norm"], rel=1e-4) and one["grad_norm"] > 0
    assert one["reward"] == all_at_once["reward"]


DIVIDED = """
import importlib, os, sys
import torch

file = importlib.import_module("nano_rl." + sys.argv.pop(1))
args, rank, tokens, grads = file.tyro.cli(file.Args), int(os.environ.get("RANK", 0)), 0, []
seeds = -1 if args.lora_rank else 0  # adapters, an evaluation, the first step
clip = torch.nn.utils.clip_grad_norm_

# The same samples however the batch is divided: a row's numbers depend on its place in the whole batch.
def set_seed(seed):
    global seeds, tokens
    seeds, tokens = seeds + 1, 0
    torch.manual_seed(seed)

def rand(rows, one, **options):
    global tokens
    tokens += 1
    generator = torch.Generator().manual_seed(1000 * seeds + tokens)
    first = 0 if rows == 32 else rank * rows  # an evaluation is the same in every process
    return torch.empty(100, 1, **options).uniform_(generator=generator)[first : first + rows]

def reward(prompts, completions, **columns):  # in the first step, after one evaluation, the second half has nothing
    rows = range(rank * len(prompts), (rank + 1) * len(prompts))
    return [len(text) / 40 * (seeds != 2 or row < 4) for row, text in zip(rows, completions)]

def keep_and_clip(parameters, max_norm):
    parameters = list(parameters)
    grads.append([parameter.grad.clone() for parameter in parameters])
    return clip(parameters, max_norm)

file.set_seed, torch.rand, torch.nn.utils.clip_grad_norm_ = set_seed, rand, keep_and_clip
file.has_bfloat16 = lambda device: False  # its rounding depends on the batch
file.train(args, reward)
if rank == 0:
    torch.save(grads, args.output_dir + "/grads.pt")
"""


def divided(tmp_path: Path, name: str, processes: int, **args) -> Path:
    (tmp_path / "divided.py").write_text(DIVIDED)
    folder = tmp_path / str(processes)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    arguments = flags(output_dir=folder, batch_size=8 // processes, **args)
    command = [sys.executable, *(launch if processes > 1 else []), "divided.py", name, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 1/") == 1, "one process reports"
    return folder


@pytest.mark.parametrize(
    "name, options",
    [
        ("remax", {"kl_coef": 0.1}),
        ("raft", {"kl_coef": 0.1, "num_epochs": 2}),
        ("grpo", {"num_updates": 2}),
        ("grpo", {"lora_rank": 2, "learning_rate": 0.02}),
        (
            "ppo",
            {
                "num_epochs": 2,
                "num_minibatches": 1,
                "value_warmup_steps": 1,
                "whiten_advantages": True,
                "kl_coef": 0.1,
            },
        ),
    ],
)
def test_two_processes_are_one_with_the_doubled_batch(model, tmp_path, name, options):
    """Also in a step in which the second process has nothing to train: it must not hang the first."""
    args = TINY | options | {"model": model, "num_steps": 2, "eval_every": 0}
    del args["batch_size"]
    two, one = divided(tmp_path, name, 2, **args), divided(tmp_path, name, 1, **args)
    for ours, theirs in zip(torch.load(two / "grads.pt"), torch.load(one / "grads.pt"), strict=True):
        largest = max(1.0, *(gradient.abs().max().item() for gradient in theirs))  # what float32 rounds a sum by
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6 * largest, rtol=1e-4)
    first_step = [row["reward"] for row in read(two, "completions.jsonl") if row["step"] == 1]
    assert any(first_step[:4]) and not any(first_step[4:])
    ours, theirs = read(two), read(one)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for a, b in zip(ours, theirs):
        for key in a:
            assert a[key] == b[key] or a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("name", ["remax", "raft", "grpo", "ppo"])
def test_a_copied_file_trains_stops_at_ctrl_c_and_resumes(model, tmp_path, name):
    """Alone in an empty folder, without this project on the path; `.env` beside it is read."""
    shutil.copy(ROOT / "nano_rl" / f"{name}.py", tmp_path)
    (tmp_path / ".env").write_text("PROBE=0.5\n")
    (tmp_path / "probe.py").write_text(
        "import os, signal\n\ndef reward(prompts, completions, **columns):\n"
        "    if len(completions) == 4 and not os.path.exists('pressed'):  # in the first step\n"
        "        open('pressed', 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return [float(os.environ['PROBE']) * len(text) for text in completions]\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    options = dict(cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    command = [sys.executable, f"{name}.py"]
    start = flags(model=model, reward_fn="probe:reward", **(TINY | {"num_steps": 3}))
    stopped = subprocess.run([*command, *start], **options)
    (folder,) = tmp_path.glob(f"runs/*-{name}")
    advice = f"stopped after step 1: go on with --resume {folder.relative_to(tmp_path)}"
    assert stopped.returncode == 1 and stopped.stderr.splitlines()[-1] == advice
    assert "Traceback" not in stopped.stderr and not (folder / "policy").exists()
    resumed = subprocess.run([*command, *advice.split()[-2:]], **options)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr == "", "a log file holds no progress bars and no warnings"
    assert [row["step"] for row in read(folder)] == [0, 1, 2, 3]
    assert (folder / "policy").exists() and torch.load(folder / "checkpoint.pt")["step"] == 3


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__[8:])
def test_a_reward_function_that_fails_costs_one_step(model, tmp_path, file):
    """The run that is resumed ends as one whose function never failed."""
    calls = []

    def reward_fn(completions, **_):
        calls.append(1)
        if len(calls) == fails_at:
            raise ValueError("no judge")
        return [float(len(text)) for text in completions]

    args = TINY | {"model": model, "batch_size": 4, "num_steps": 3, "eval_every": 0, "seed": 7}
    fails_at = 0
    whole = file.train(file.Args(output_dir=str(tmp_path / "whole"), **args), reward_fn)
    fails_at, calls[:] = len(calls) - 1, []  # in the last step
    with pytest.raises(SystemExit) as error:
        file.train(file.Args(output_dir=str(tmp_path / "run"), **args), reward_fn)
    assert ": ValueError: no judge; " in line(error) and line(error).endswith(f" --resume {tmp_path / 'run'}")
    file.train(file.Args(resume=str(tmp_path / "run")), reward_fn)
    assert read(tmp_path / "run") == read(whole)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__[8:])
def test_a_reward_function_that_fails_in_an_evaluation(model, tmp_path, file):
    """After the last step: the run that is resumed saves the policy of that step."""
    calls = []

    def reward_fn(completions, **_):
        calls.append(len(completions))
        if calls.count(32) == 2:  # evaluations have 32 completions
            raise ValueError("no judge")
        return [float(len(text)) for text in completions]

    args = TINY | {"model": model, "batch_size": 2, "num_steps": 2, "eval_every": 0}
    args |= {"group_size": 2} if hasattr(file.Args, "group_size") else {}
    with pytest.raises(SystemExit) as error:
        file.train(file.Args(output_dir=str(tmp_path / "run"), **args), reward_fn)
    assert ": ValueError: no judge; " in line(error) and line(error).endswith(f" --resume {tmp_path / 'run'}")
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["step"] == 2
    file.train(file.Args(resume=str(tmp_path / "run")), reward_fn)
    assert [row["step"] for row in read(tmp_path / "run")] == [0, 1] and (tmp_path / "run" / "policy").is_dir()


@pytest.mark.parametrize("file, flag", [(raft, "num_epochs"), (grpo, "num_updates"), (ppo, "value_learning_rate")])
def test_the_other_files_numbers(model, tmp_path, file, flag):
    with pytest.raises(SystemExit) as error:
        file.train(file.Args(model=model, output_dir=str(tmp_path / "run"), **{flag: 0}))
    assert line(error) == f"--{flag.replace('_', '-')} 0: must be above 0 and below 2**32"
