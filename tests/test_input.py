"""Bad input: an InputError whose message says what to do, one line in the terminal, and nothing lost."""

import json
import math
import resource
import shutil
import sys

import numpy as np
import pytest
import torch
from test_run import LADDER, RESUMABLE, TINY, read, run, same, weights
from tiny import llama_config, main, make_policy, make_tokenizer, save_reward_model, score
from transformers import AutoModelForCausalLM, AutoTokenizer

import nano_rl.dr_grpo as dr_grpo
import nano_rl.grpo as grpo
import nano_rl.ppo as ppo
import nano_rl.raft as raft
import nano_rl.reinforce as reinforce
import nano_rl.rloo as rloo


def refused(model, tmp_path, **args) -> str:
    """The message of the exception."""
    with pytest.raises(reinforce.InputError) as error:
        run(model, tmp_path / "run", **args)
    return str(error.value)


@pytest.mark.parametrize("name", ["batch_size", "max_new_tokens", "micro_batch_tokens", "temperature", "max_grad_norm"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_that_must_be_positive(model, tmp_path, name, value):
    flag = f"--{name.replace('_', '-')}"
    message = refused(model, tmp_path, **{name: value})
    assert message.startswith(f"{flag} {value}") and ": must be above 0 and below 2**32" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "file, flag",
    [(raft, "num_epochs"), (grpo, "num_updates"), (ppo, "num_epochs"), (ppo, "num_minibatches")],
    ids=lambda value: value if isinstance(value, str) else value.__name__[8:],
)
def test_numbers_of_updates_must_be_positive(model, tmp_path, file, flag):
    with pytest.raises(file.InputError, match=f"--{flag.replace('_', '-')} 0: must be above 0"):
        file.train(file.Args(model=model, output_dir=str(tmp_path / "run"), **{flag: 0}))


@pytest.mark.parametrize(
    "flags", [{"kl_coef": -0.1}, {"save_minutes": -1}, {"learning_rate": math.nan}, {"num_steps": -1}, {"seed": 2**32}]
)
def test_other_impossible_numbers(model, tmp_path, flags):
    assert "must be" in refused(model, tmp_path, **flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", LADDER, ids=lambda file: file.__name__[8:])
def test_the_terminal_gets_one_line_and_a_library_call_the_exception(file, monkeypatch):
    message = main(monkeypatch, file.__name__[8:], "--batch-size", "0")
    assert message.startswith("--batch-size 0: must be above 0") and "\n" not in message
    with pytest.raises(ValueError, match="--batch-size 0: must be above 0"):
        file.train(file.Args(batch_size=0))


def test_a_past_of_more_than_its_whole_weight(model, tmp_path):
    assert refused(model, tmp_path, baseline="ema", ema_beta=1.5) == "--ema-beta 1.5: must be at most 1"


def test_one_completion_is_its_own_mean(model, tmp_path):
    assert "need two completions or more" in refused(model, tmp_path, batch_size=1, baseline="mean")
    assert "need two completions" in refused(model, tmp_path, batch_size=1, baseline="none", whiten_advantages=True)
    run(model, tmp_path / "run", batch_size=1, baseline="ema", num_steps=1)


def test_a_model_that_is_not_there(tmp_path):
    """Neither a folder nor, without a network, on the hub."""
    message = refused("no-one/no-such-model", tmp_path)
    assert message.startswith("cannot load no-one/no-such-model: check name (RUN/policy), network, HF_TOKEN in .env (")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in refused(str(empty), tmp_path)


def test_a_failed_start_leaves_no_trace(model, tmp_path):
    """Whatever is wrong, it is said before the folder is made."""
    wrong = [("model", "none/none"), ("prompts", "none.jsonl"), ("reward_fn", "none:f"), ("reward_model", model)]
    for name, value in wrong:
        options = TINY | {"model": model, "output_dir": str(tmp_path / "run"), name: value}
        with pytest.raises(reinforce.InputError, match=value):
            reinforce.train(reinforce.Args(**options))
        assert not (tmp_path / "run").exists()


def test_a_gated_model(tmp_path, monkeypatch):
    def gated(*_, **__):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.\n401 Client Error.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", gated)
    message = refused("meta-llama/Llama-3.2-1B-Instruct", tmp_path)
    assert "HF_TOKEN in .env" in message and "gated repo" in message


def test_a_reward_model_without_a_head(model, tmp_path):
    message = refused(model, tmp_path, reward_model=model)
    assert "missing: ['score.weight'], quantized or not finite: []" in message


@pytest.mark.parametrize(
    "text, where, what",
    [
        ('{"prompt": "a"}\n{"prompt": "b"\n{"prompt": "c"}\n', "line 2", "JSONDecodeError"),
        ('{"prompt": "a"}\n{"text": "b"}\n{"prompt": "c"}\n', "line 2", "KeyError: 'question'"),
        ('{"prompt": "a"}\n{"prompt": "b"}\n["c"]\n', "line 3", "TypeError"),
        ('{"prompt": "a"}\n\n{"prompt": "c"}\n', "line 2", "JSONDecodeError"),
        ('{"prompt": "a"}\n{"prompt": null}\n{"prompt": "c"}\n', "line 2", "TypeError"),
        ('{"prompt": "a"}\n{"prompt": [{"role": "user"}]}\n{"prompt": "c"}\n', "line 2", "KeyError: 'content'"),
        ('{"prompt": "a"}\n{"prompt": "b"}\n', "needs 3 different prompts", ""),
        ("", "line 1", "JSONDecodeError"),
        (
            '{"prompt": "%s"}\n' % ("sun " * 60) * 3,
            "line 1",
            "context less --max-new-tokens leaves 58",
        ),
        ('{"prompt": "a"}\n', "needs 3 different prompts", "--eval-prompts"),
    ],
)
def test_prompts_files(model, tmp_path, text, where, what):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    message = refused(model, tmp_path, prompts=str(file))
    assert message.startswith(str(file)) and where in message and what in message


def test_separators_inside_a_prompt_and_windows_line_ends(model, tmp_path):
    """U+2028 and U+0085 may stand in JSON; lines end at line feeds alone."""
    prompts = ["the\u2028sea", "the\u0085sun", "a", "b"]
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "prompts.jsonl").write_bytes(("\r\n".join(lines) + "\r\n\n").encode())
    args = reinforce.Args(prompts=str(tmp_path / "prompts.jsonl"), max_new_tokens=8)
    policy, tokenizer = reinforce.load(AutoModelForCausalLM, model, torch.device("cpu"))
    examples, held_out = reinforce.load_prompts(args, tokenizer, policy)
    assert [example["prompt"] for example in examples + held_out] == prompts


def test_prompts_that_cannot_be_read(model, tmp_path):
    assert "No such file" in refused(model, tmp_path, prompts=str(tmp_path / "none.jsonl"))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "UnicodeDecodeError" in refused(model, tmp_path, prompts=str(tmp_path / "binary.jsonl"))


def test_no_room_for_a_prompt(model, tmp_path):
    message = refused(model, tmp_path, max_new_tokens=60)
    assert message.startswith("the built-in prompts, line 1: ") and "leaves 4" in message


def test_two_ways_to_score(model, tmp_path):
    message = refused(model, tmp_path, reward_model=model, brevity_penalty_scale=0.4)
    assert message.startswith("choose one of --reward-fn, --reward-model and --brevity-penalty-scale")


def test_an_empty_prompt_without_a_template(model, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": ""}\n{"prompt": "c"}\n')
    assert "line 2" in refused(model, tmp_path, prompts=str(file), chat_template=False)


@pytest.mark.parametrize("name", ["no_such_module:f", "math:no_such_function", "math", "a:b:c"])
def test_a_reward_function_that_cannot_be_imported(model, tmp_path, name):
    with pytest.raises(reinforce.InputError, match=f"cannot import --reward-fn {name} as module:function"):
        reinforce.train(reinforce.Args(model=model, output_dir=str(tmp_path / "run"), reward_fn=name))


def test_a_reward_function_by_name(model, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def length(prompts, completions, **columns): return list(map(len, completions))"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # another test's
    args = reinforce.Args(model=model, output_dir=str(tmp_path / "run"), reward_fn="my_rewards:length", **TINY)
    assert read(reinforce.train(args))[1]["reward"] > 1


@pytest.mark.parametrize(
    "bad, what",
    [
        (lambda texts: [1.0] * (len(texts) - 1), "zip() argument 2 is longer"),
        (lambda texts: [1.0] * (len(texts) + 1), "zip() argument 2 is shorter"),
        (lambda texts: None, "None for "),
        (lambda texts: [1.0] * (len(texts) - 1) + [math.nan], "nan for "),
        (lambda texts: [math.inf] + [1.0] * (len(texts) - 1), "inf for "),
        (lambda texts: [None] + [1.0] * (len(texts) - 1), "None for "),
        (lambda texts: ["high"] * len(texts), "'str'"),
        (lambda texts: [(1.0, 0.5)] * len(texts), "not a sequence"),  # --uncertainty-penalty's
    ],
)
def test_a_reward_function_that_returns_no_numbers_in_the_second_step(model, tmp_path, bad, what):
    calls, seen = [], []

    def reward_fn(prompts, completions, **_):
        calls.append(len(completions))
        seen[:] = completions
        return bad(completions) if len(calls) == 10 else [float(len(text)) for text in completions]

    message = refused(model, tmp_path, reward_fn=reward_fn, save_minutes=0)
    assert message.startswith("the reward function must return 4 finite numbers (") and what in message
    if " for " in what:
        assert repr(seen[-1 if what.startswith("nan") else 0]) in message
    assert [row["step"] for row in read(tmp_path / "run")] == [0, 1]  # whole, up to the step that failed
    reinforce.train(reinforce.Args(resume=str(tmp_path / "run")), reward_fn)
    assert [row["step"] for row in read(tmp_path / "run")] == [0, 1, 2, 3]


@pytest.mark.parametrize("file", LADDER, ids=lambda file: file.__name__[8:])
def test_a_reward_function_that_raises(model, tmp_path, file):
    """In a step or in the last evaluation: its own traceback, and a resumed run ends as one that never failed."""
    calls = []

    def reward_fn(completions, **_):
        calls.append(1)
        if len(calls) == failing:
            raise KeyError("no judge")
        return [float(len(text)) for text in completions]

    args = TINY | {"model": model, "num_steps": 3, "eval_every": 0, "save_minutes": 0, "kl_coef": 0.1}
    failing = 0
    whole = file.train(file.Args(output_dir=str(tmp_path / "whole"), **args), reward_fn)
    for failing in (11, len(calls) - 1):  # 8 in the first evaluation
        calls.clear()
        folder = tmp_path / str(failing)
        with pytest.raises(KeyError, match="no judge") as error:
            file.train(file.Args(output_dir=str(folder), **args), reward_fn)
        assert error.traceback[-1].name == "reward_fn"
        file.train(file.Args(resume=str(folder)), reward_fn)
        assert read(folder) == read(whole)
        assert read(folder, "completions.jsonl") == read(whole, "completions.jsonl")
        assert same(weights(folder), weights(whole))


def test_rewards_of_any_kind_of_number():
    """torch's and numpy's; a generator is listed once."""
    for cast in (torch.tensor, np.float32, int):
        rewards, deviations = score(reinforce, lambda cast=cast, **_: map(cast, (1, 2)), ["x", "y"])
        assert rewards.tolist() == [1, 2] and deviations.tolist() == [0, 0] and rewards.dtype == torch.float64
    pairs = [(1.5, 0.5), (2.5, 0.25)]
    rewards, deviations = score(reinforce, lambda **_: pairs, ["x", "y"], uncertainty_penalty=True)
    assert rewards.tolist() == [1.5, 2.5] and deviations.tolist() == [0.5, 0.25]


@pytest.mark.parametrize("reward", [1.0, (1.0,), (1.0, 0.0, 2.0), (1.0, None), (1.0, math.nan)])
def test_a_penalty_for_uncertainty_needs_pairs(reward):
    with pytest.raises(reinforce.InputError, match="the reward function must return 2 finite numbers"):
        score(reinforce, lambda **_: [reward, (1.0, 0.0)], ["x", "y"], uncertainty_penalty=True)


def test_columns_may_have_any_name(model, tmp_path):
    """Also those of what scores, and of what every reward function gets."""
    columns = {"model": "m", "tokenizer": "t", "deviations": 1, "penalty": 2, "prompts": "p", "completions": "c"}
    lines = [json.dumps({"prompt": f"the {word}"} | columns) for word in "abcd"]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    for folder, args in ("rm", {"reward_model": save_reward_model(tmp_path / "model")}), ("richness", {}):
        run(model, tmp_path / folder, prompts=str(tmp_path / "prompts.jsonl"), num_steps=1, eval_every=0, **args)


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
    assert refused(model, tmp_path).startswith(f"--output-dir {folder} is not empty: choose another")
    assert [path.read_text() for path in folder.iterdir()] == ["the other's"]


def test_resume_of_what_cannot_be_resumed(model, tmp_path):
    run(model, tmp_path / "done", num_steps=2, eval_every=0)
    shutil.copytree(tmp_path / "done", tmp_path / "without")
    (tmp_path / "without" / "checkpoint.pt").unlink()
    shutil.copytree(tmp_path / "done", tmp_path / "half")
    checkpoint = (tmp_path / "half" / "checkpoint.pt").read_bytes()
    (tmp_path / "half" / "checkpoint.pt").write_bytes(checkpoint[: len(checkpoint) // 2])
    for args, message in [
        ({"resume": str(tmp_path / "none")}, "no run of this file and checkpoint"),
        ({"resume": str(tmp_path / "without")}, "no run of this file and checkpoint"),
        ({"resume": str(tmp_path / "half")}, "no run of this file and checkpoint"),
        ({"resume": str(tmp_path / "done"), "learning_rate": 1.0}, "only --num-steps may stand beside it"),
        ({"resume": str(tmp_path / "done"), "num_steps": 1}, "or under 2 steps"),
    ]:
        with pytest.raises(reinforce.InputError) as error:
            reinforce.train(reinforce.Args(**args))
        assert message in str(error.value)


def test_resume_of_another_algorithms_run(model, tmp_path):
    folder = run(model, tmp_path / "run", num_steps=1, eval_every=0)
    with pytest.raises(rloo.InputError, match="no run of this file and checkpoint"):
        rloo.train(rloo.Args(resume=str(folder)))
    args = TINY | {"num_steps": 1, "eval_every": 0, "model": model, "output_dir": str(tmp_path / "grpo")}
    grpo.train(grpo.Args(**args))
    with pytest.raises(dr_grpo.InputError, match="--resume: other script"):  # their flags have the same names
        dr_grpo.train(dr_grpo.Args(resume=str(tmp_path / "grpo"), num_steps=2))


def test_the_numbers_of_the_help(tmp_path):
    """15 steps, and 32 held-out prompts at most."""
    assert reinforce.Run(reinforce.Args(output_dir=str(tmp_path))).args.num_steps == 15
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "the sea {i}"}}\n' for i in range(200)))
    args = reinforce.Args(prompts=str(tmp_path / "prompts.jsonl"))
    train, held_out = reinforce.load_prompts(args, make_tokenizer(), make_policy(llama_config(25)))
    assert (len(train), len(held_out)) == (168, 32)


def test_a_full_disk_while_saving(model, tmp_path, monkeypatch):
    """The checkpoint of step 1 survives the one of step 2 that did not fit, and the run goes on from there."""
    straight, write = run(model, tmp_path / "straight", **RESUMABLE), reinforce.Run.write

    def write_on_a_full_disk(run, name, save):
        if name == "checkpoint.pt" and (run.folder / name).exists():
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # a file larger than that fails to be written
            try:
                write(run, name, save)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        else:
            write(run, name, save)

    monkeypatch.setattr(reinforce.Run, "write", write_on_a_full_disk)
    message = refused(model, tmp_path, **RESUMABLE)
    assert message.startswith(f"cannot write {tmp_path / 'run' / 'checkpoint.pt'}: make room")
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["step"] == 1
    assert not list((tmp_path / "run").glob("partial")), "what did not fit makes room again"
    monkeypatch.setattr(reinforce.Run, "write", write)
    reinforce.train(reinforce.Args(resume=str(tmp_path / "run")))
    assert read(tmp_path / "run") == read(straight)
