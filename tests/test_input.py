"""Bad input: one clear line that says what to do, a failing exit code, and nothing lost."""

import math
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_run import RESUMABLE, TINY, read, run
from transformers import AutoTokenizer

import nano_rl.reinforce as reinforce
from nano_rl import grpo, ppo, raft, remax, rloo


def line(error) -> str:
    """The one line that the user reads, where the exit code is 1."""
    message = error.value.code
    assert isinstance(message, str) and "\n" not in message
    return message


def refused(model, tmp_path, **args) -> str:
    with pytest.raises(SystemExit) as error:
        run(model, tmp_path / "run", **args)
    return line(error)


@pytest.mark.parametrize("name", ["batch_size", "num_steps", "max_new_tokens", "micro_batch_tokens", "temperature"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_that_must_be_positive(model, tmp_path, name, value):
    flag = f"--{name.replace('_', '-')}"
    assert refused(model, tmp_path, **{name: value}) == f"{flag} {value}: must be above 0 and below 2**32"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags", [{"kl_coef": -0.1}, {"save_every": -1}, {"learning_rate": math.nan}, {"ema_beta": 1.5}, {"seed": 2**32}]
)
def test_other_impossible_numbers(model, tmp_path, flags):
    assert "must be" in refused(model, tmp_path, **flags)


def test_one_completion_is_its_own_mean(model, tmp_path):
    assert "need two completions or more" in refused(model, tmp_path, batch_size=1, baseline="mean")
    assert "need two completions" in refused(model, tmp_path, batch_size=1, baseline="none", whiten_advantages=True)
    run(model, tmp_path / "run", batch_size=1, baseline="ema", num_steps=1)


def test_a_model_that_is_not_there(tmp_path):
    """Neither a folder nor, without a network, on the hub."""
    message = refused("no-one/no-such-model", tmp_path)
    assert message.startswith("cannot load no-one/no-such-model: check the name (a run's is its policy/), the network")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in refused(str(empty), tmp_path)


def test_what_the_libraries_say_of_a_model_is_left_out(model):
    """A policy has no score: transformers reports it in nine lines, in colours."""
    command = [sys.executable, "-m", "nano_rl.rloo", "--model", model, "--reward-model", model]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"cannot load {model}: ") and "no weights for ['score.weight']" in done.stderr


def test_a_gated_model(tmp_path, monkeypatch):
    def gated(*_, **__):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.\n401 Client Error.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", gated)
    message = refused("meta-llama/Llama-3.2-1B-Instruct", tmp_path)
    assert "if gated, HF_TOKEN in .env" in message and "gated repo" in message


def test_a_reward_model_without_a_head(model, tmp_path):
    message = refused(model, tmp_path, reward_model=model)
    assert "no weights for ['score.weight'] of AutoModelForSequenceClassification" in message


@pytest.mark.parametrize(
    "text, where, what",
    [
        ('{"prompt": "a"}\n{"prompt": "b"\n{"prompt": "c"}\n', "line 2", "JSONDecodeError"),
        ('{"prompt": "a"}\n{"text": "b"}\n{"prompt": "c"}\n', "line 2", "KeyError: 'question'"),
        ('{"prompt": "a"}\n{"prompt": "b"}\n["c"]\n', "line 3", "TypeError"),
        ('{"prompt": "a"}\n\n{"prompt": "c"}\n', "line 2", "JSONDecodeError"),
        ('{"prompt": "a"}\n{"prompt": null}\n{"prompt": "c"}\n', "line 2", "TypeError"),
        ('{"prompt": "a"}\n{"prompt": [{"role": "user"}]}\n{"prompt": "c"}\n', "line 2", "KeyError: 'content'"),
        ('{"prompt": "a"}\n{"prompt": "b"}\n', "needs 3 prompts or more", ""),
        ("", "line 1", "JSONDecodeError"),
        (
            '{"prompt": "%s"}\n' % ("sun " * 60) * 3,
            "line 1",
            "less --max-new-tokens leave 56",
        ),
    ],
)
def test_prompts_files(model, tmp_path, text, where, what):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    message = refused(model, tmp_path, prompts=str(file))
    assert message.startswith(str(file)) and where in message and what in message


def test_prompts_that_cannot_be_read(model, tmp_path):
    assert "No such file" in refused(model, tmp_path, prompts=str(tmp_path / "none.jsonl"))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "UnicodeDecodeError" in refused(model, tmp_path, prompts=str(tmp_path / "binary.jsonl"))


def test_no_room_for_a_prompt(model, tmp_path):
    message = refused(model, tmp_path, max_new_tokens=60)
    assert message.startswith("the built-in prompts, line 1: ") and "of at most 4 tokens" in message


def test_two_ways_to_score(model, tmp_path):
    message = refused(model, tmp_path, reward_model=model, brevity_penalty_scale=0.4)
    assert message.startswith("choose one of --reward-fn, --reward-model and --brevity-penalty-scale")


def test_an_empty_prompt_without_a_template(model, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": ""}\n{"prompt": "c"}\n')
    assert "line 2" in refused(model, tmp_path, prompts=str(file), chat_template=False)


@pytest.mark.parametrize("name", ["no_such_module:f", "math:no_such_function", "math", "a:b:c"])
def test_a_reward_function_that_cannot_be_imported(model, tmp_path, name):
    with pytest.raises(SystemExit) as error:
        reinforce.train(reinforce.Args(model=model, output_dir=str(tmp_path / "run"), reward_fn=name))
    assert f"cannot import --reward-fn {name} as module:function" in line(error)


def test_a_reward_function_by_name(model, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def length(prompts, completions, **columns): return list(map(len, completions))"
    )
    monkeypatch.syspath_prepend(tmp_path)
    args = reinforce.Args(model=model, output_dir=str(tmp_path / "run"), reward_fn="my_rewards:length", **TINY)
    assert read(reinforce.train(args))[1]["reward"] > 1


@pytest.mark.parametrize(
    "bad, what",
    [
        (lambda texts: 1 / 0, "failed: test_input.py:"),
        (lambda texts: [1.0] * (len(texts) - 1), "zip() argument 2 is longer"),
        (lambda texts: [1.0] * (len(texts) + 1), "zip() argument 2 is shorter"),
        (lambda texts: None, "TypeError"),
        (lambda texts: [1.0] * (len(texts) - 1) + [math.nan], "nan for completion "),
        (lambda texts: [math.inf] + [1.0] * (len(texts) - 1), "inf for completion "),
        (lambda texts: [None] + [1.0] * (len(texts) - 1), "None for completion "),
        (lambda texts: ["high"] * len(texts), "TypeError"),
    ],
)
def test_a_reward_function_that_fails_in_the_second_step(model, tmp_path, bad, what):
    calls, seen = [], []

    def reward_fn(prompts, completions, **_):
        calls.append(1)
        seen[:] = completions
        return bad(completions) if len(calls) == 3 else [float(len(text)) for text in completions]

    message = refused(model, tmp_path, reward_fn=reward_fn, eval_every=0)
    must = "the reward function must return a finite number for each of 4 completions"
    assert message.startswith("the reward function failed: " if "failed" in what else must) and what in message
    assert message.endswith(f"; when it is mended, go on with --resume {tmp_path / 'run'}")
    if " for " in what:
        assert repr(seen[-1 if what.startswith("nan") else 0]) in message
    assert [row["step"] for row in read(tmp_path / "run")] == [0, 1]  # whole, up to the step that failed
    assert len(read(tmp_path / "run", "completions.jsonl")) == 32 + 4
    reinforce.train(reinforce.Args(resume=str(tmp_path / "run")), reward_fn)
    assert [row["step"] for row in read(tmp_path / "run")] == [0, 1, 2, 3]


@pytest.mark.parametrize("file", [reinforce, rloo, remax, raft, grpo, ppo], ids=lambda file: file.__name__[8:])
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


@pytest.mark.parametrize("file", [reinforce, rloo, remax, raft, grpo, ppo], ids=lambda file: file.__name__[8:])
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


def test_a_second_ctrl_c_in_the_reward_function_stops_at_once(model, tmp_path, monkeypatch):
    calls = []

    def reward_fn(completions, **_):
        calls.append(1)
        if len(calls) == 3:  # in the second step
            monkeypatch.setattr(reinforce, "INTERRUPTS", [1])
            reinforce.interrupt(2, None)
        return [float(len(text)) for text in completions]

    assert refused(model, tmp_path, reward_fn=reward_fn) == "stopped"
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_reward_function_that_fails_in_the_first_step(model, tmp_path):
    calls = []

    def reward_fn(completions, **_):
        calls.append(1)
        return [0.0] * len(completions) if len(calls) == 1 else None

    assert "--resume" not in refused(model, tmp_path, reward_fn=reward_fn)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_an_output_folder_that_holds_something(model, tmp_path):
    run(model, tmp_path / "run", num_steps=1)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "is not empty: choose another" in refused(model, tmp_path)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_two_runs_that_start_at_once_in_one_folder(model, tmp_path, monkeypatch):
    (load_prompts, folder) = (reinforce.load_prompts, tmp_path / "run")

    def slower_than_the_other(*inputs):
        folder.mkdir()
        (folder / "config.json").write_text("the other's")
        return load_prompts(*inputs)

    monkeypatch.setattr(reinforce, "load_prompts", slower_than_the_other)
    assert refused(model, tmp_path).startswith(f"cannot start in {folder}: choose another --output-dir")
    assert [path.read_text() for path in folder.iterdir()] == ["the other's"]


def test_a_disk_that_is_full_before_the_checkpoint(model, tmp_path):
    def reward_fn(completions, **_):
        if (tmp_path / "run" / "completions.jsonl").exists():
            (tmp_path / "run" / "metrics.jsonl").chmod(0o400)
            (tmp_path / "run" / "metrics.jsonl").rename(tmp_path / "run" / "kept.jsonl")
            (tmp_path / "run" / "metrics.jsonl").mkdir()  # what cannot be written to
        return [float(len(text)) for text in completions]

    assert refused(model, tmp_path, reward_fn=reward_fn).startswith(f"cannot write to {tmp_path / 'run'}: make room")
    assert len((tmp_path / "run" / "kept.jsonl").read_text().splitlines()) == 1


def test_resume_of_what_cannot_be_resumed(model, tmp_path):
    run(model, tmp_path / "run", num_steps=1)
    run(model, tmp_path / "done", num_steps=2, save_every=1)
    for args, message in [
        ({"resume": str(tmp_path / "none")}, "it takes a run of this file that has a checkpoint"),
        ({"resume": str(tmp_path / "run")}, "it takes a run of this file that has a checkpoint"),
        ({"resume": str(tmp_path / "run"), "learning_rate": 1.0}, "only --num-steps may stand beside it"),
        ({"resume": str(tmp_path / "done")}, "has done 2 steps: give a larger --num-steps"),
        ({"resume": str(tmp_path / "done"), "num_steps": 1}, "has done 2 steps: give a larger --num-steps"),
    ]:
        with pytest.raises(SystemExit) as error:
            reinforce.train(reinforce.Args(**args))
        assert message in line(error)


@pytest.mark.parametrize("words", [["--num-steps", "15"], ["--num_steps=15"]], ids=" ".join)
def test_a_number_of_steps_that_is_the_default_is_given_too(model, tmp_path, monkeypatch, words):
    folder = run(model, tmp_path / "run", num_steps=1, save_every=1, eval_every=0)
    monkeypatch.setattr(sys, "argv", ["reinforce.py", "--resume", str(folder), *words])
    reinforce.train(reinforce.tyro.cli(reinforce.Args))
    assert len(read(folder)) == 1 + 15


def test_resume_of_another_algorithms_run(model, tmp_path):
    folder = run(model, tmp_path / "run", num_steps=1, save_every=1)
    for file in (rloo, remax, raft, grpo, ppo):
        with pytest.raises(SystemExit) as error:
            file.train(file.Args(resume=str(folder)))
        assert "the run of another algorithm" in line(error)


@pytest.mark.parametrize("file, flag", [(raft, "num_epochs"), (grpo, "num_updates"), (ppo, "value_learning_rate")])
def test_the_other_files_numbers(model, tmp_path, file, flag):
    with pytest.raises(SystemExit) as error:
        file.train(file.Args(model=model, output_dir=str(tmp_path / "run"), **{flag: 0}))
    assert line(error) == f"--{flag.replace('_', '-')} 0: must be above 0 and below 2**32"


def test_a_full_disk_while_saving(model, tmp_path, monkeypatch):
    """The checkpoint of step 2 survives the one of step 4 that did not fit, and the run goes on from there."""
    args = RESUMABLE | {"reward_fn": None}
    straight, save = run(model, tmp_path / "straight", **args), reinforce.save

    def save_on_a_full_disk(path, write):
        if (path.parent / "checkpoint.pt").exists():
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # a file larger than that fails to be written
            try:
                save(path, write)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        else:
            save(path, write)

    monkeypatch.setattr(reinforce, "save", save_on_a_full_disk)
    message = refused(model, tmp_path, **args)
    assert message.startswith(f"cannot save {tmp_path / 'run' / 'checkpoint.pt'}; what the run saved before is whole")
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["step"] == 2
    assert not list((tmp_path / "run").glob("*.partial")), "what did not fit makes room again"
    monkeypatch.setattr(reinforce, "save", save)
    reinforce.train(reinforce.Args(resume=str(tmp_path / "run")))
    assert read(tmp_path / "run") == read(straight)
