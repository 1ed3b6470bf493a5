"""Supervised fine-tuning: its loss and mask, the tokens that it trains, what a run writes, and bad input."""

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from test_run import read, same, weights
from tiny import CHAT_TEMPLATE, WORDS, gpt2_config, llama_config, make_policy, make_tokenizer, save_policy, start
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from nano_rl import reinforce, remax, sft

ROOT = Path(__file__).parent.parent
TINY = dict(batch_size=4, num_steps=3, learning_rate=1e-3, max_length=60)
ROWS = [  # of ragged lengths
    {"prompt": f"write about the {word}" + " old" * (i % 3), "completion": "the sun" + f" {word}" * (1 + i % 4)}
    for i, word in enumerate(WORDS)
]
TEXTS = [{"text": f"the {word} sings of the sea"} for word in WORDS]
EOS = 1  # in tests/tiny.py's vocabulary


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(model: str, folder: Path, rows: list[dict] = ROWS, **args) -> Path:
    file = write(folder.with_name(folder.name + ".jsonl"), rows)
    return sft.train(sft.Args(model=model, output_dir=str(folder), data=file, **(TINY | args)))


def build(row: dict, tokenizer=None, stop_ids=(EOS,), room: int = 60) -> dict:
    tokenizer = tokenizer or make_tokenizer()
    tokenizer.model_max_length = 64
    return sft.build_row(make_policy(llama_config(27)), tokenizer, list(stop_ids), sft.Args(max_length=room), row)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    """A GPT-2 without a chat template and without a pad token."""
    tokenizer = make_tokenizer(chat=False, pad=None)
    return save_policy(tmp_path_factory.mktemp("plain") / "gpt2", gpt2_config(len(tokenizer)), tokenizer)


# ---- The loss and its mask ------------------------------------------------------------------------------------------


def naive_sum(policy, prompt_ids: list[int], completion_ids: list[int]) -> float:
    """-log π of a completion, from an unpadded forward pass for every prefix."""
    total = 0.0
    for t, token in enumerate(completion_ids):
        logits = policy(torch.tensor([prompt_ids + completion_ids[:t]])).logits[0, -1]
        total -= (logits[token] - logits.logsumexp(dim=0)).item()
    return total


def test_the_loss_is_that_of_a_naive_loop_and_its_gradient_finite_differences():
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(3, 4, generator=generator, dtype=torch.float64, requires_grad=True).exp()
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    expected = 0.0
    for i in range(3):
        for t in range(4):
            expected -= logprobs[i, t].item() * mask[i, t].item() / 7
    assert sft.compute_loss(logprobs, mask, 7).item() == pytest.approx(expected)
    logprobs = logprobs.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sft.compute_loss(x, mask, 7), (logprobs,))
    parts = [sft.compute_loss(logprobs[rows], mask[rows], 7) for rows in (slice(1), slice(1, 3))]
    assert sum(parts).item() == pytest.approx(expected), "the parts of a batch add up to it"


@pytest.mark.parametrize("kind", ["model", "plain"])
@pytest.mark.parametrize("rows", [ROWS, TEXTS], ids=["prompts", "texts"])
def test_the_loss_of_a_run_is_over_completion_tokens_only(kind, rows, tmp_path, monkeypatch, request):
    """Loss of the first step and of the held-out rows, ragged and padded, against unpadded passes token by token."""
    monkeypatch.setattr(sft, "has_bfloat16", lambda device: False)
    drawn, make_batch = [], sft.make_batch

    def spy(rows, device):
        drawn.append(rows)
        return make_batch(rows, device)

    monkeypatch.setattr(sft, "make_batch", spy)
    name = request.getfixturevalue(kind)
    metrics = read(run(name, tmp_path / "run", rows, num_steps=1, micro_batch_tokens=30))
    policy = AutoModelForCausalLM.from_pretrained(name).eval()
    with torch.no_grad():
        for (key, row), examples in zip([("eval/loss", 0), ("loss", 1)], drawn):
            sums = [naive_sum(policy, *example["ids"]) for example in examples]
            lengths = [len(example["ids"][1]) for example in examples]
            loss = sum(sums) / sum(lengths)
            assert metrics[row][key] == pytest.approx(loss, rel=1e-5)
            if key == "loss":
                assert metrics[row]["completions/mean_length"] == sum(lengths) / 4


def test_the_mask_is_the_completion_and_its_stop():
    tokenizer = make_tokenizer(pad="<eos>")  # a mask by the pad token would lose the stop (pitfall 1)
    examples = [build(row, tokenizer) for row in ROWS[:4]]
    batch = sft.make_batch(examples, torch.device("cpu"))
    width = batch["mask"].shape[1]
    for example, ids, mask, attention in zip(examples, batch["input_ids"], batch["mask"], batch["attention_mask"]):
        assert ids[-width:][mask.bool()].tolist() == example["ids"][1] and example["ids"][1][-1] == EOS
        assert ids[attention.bool()].tolist() == example["ids"][0] + example["ids"][1]
        assert ids[:-width][attention[:-width].bool()].tolist() == example["ids"][0]


def test_only_completion_tokens_have_a_gradient(model):
    """Of the logits: none at the prompt's, none at the padding's places (pitfalls 1 and 6)."""
    policy = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = make_tokenizer()
    examples = [build(row, tokenizer) for row in ROWS[:4]]
    batch = sft.make_batch(examples, torch.device("cpu"))
    grads = []
    policy.lm_head.register_forward_hook(lambda module, inputs, logits: (logits.register_hook(grads.append), None)[1])
    logprobs = sft.compute_logprobs(policy, batch, 1.0)
    sft.compute_loss(logprobs, batch["mask"], int(batch["mask"].sum())).backward()
    assert torch.equal(grads[0].abs().sum(dim=2) > 0, batch["mask"].bool())  # (n, T)


# ---- The tokens that are trained ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("prompt", ["the sea sings", [{"role": "user", "content": "the sea sings"}]])
def test_the_prompt_is_that_of_reinforcement_learning(tmp_path, chat, prompt):
    tokenizer = make_tokenizer(chat=chat)
    file = write(tmp_path / "prompts.jsonl", [{"prompt": prompt}, {"prompt": "a"}, {"prompt": "b"}])
    policy = make_policy(llama_config(len(tokenizer)))
    (example, *_), _ = reinforce.load_prompts(reinforce.Args(prompts=file, max_new_tokens=8), tokenizer, policy)
    assert build({"prompt": prompt, "completion": "of stone"}, tokenizer)["ids"][0] == example["prompt_ids"]


@pytest.mark.parametrize("completion", ["of stone", [{"role": "assistant", "content": "of stone"}]])
@pytest.mark.parametrize(
    "template, chat",
    [
        (CHAT_TEMPLATE, True),
        (CHAT_TEMPLATE.replace("<eos>", "<eos> <pad>"), True),  # like the newline after SmolLM2's stop
        (CHAT_TEMPLATE.replace("<eos>", ""), True),  # a template without a stop gets one
        (CHAT_TEMPLATE, False),
    ],
    ids=["stop", "more after the stop", "no stop", "no template"],
)
def test_the_completion_ends_in_its_stop(completion, template, chat):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template if chat else None
    example = build({"prompt": "the sea sings", "completion": completion}, tokenizer)
    assert example["ids"][1] == tokenizer("of stone")["input_ids"] + [EOS]
    assert not example["cut"]


def test_another_stop_token(tmp_path):
    """Of several, any ends a completion; the tokenizer's EOS is the one that is put where none is (pitfall 4)."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<eos>", "<unk>")
    row = {"prompt": "the sea", "completion": "of stone"}
    assert build(row, tokenizer, stop_ids=(EOS, 2))["ids"][1][2:] == [2]
    assert build(row, tokenizer, stop_ids=(EOS,))["ids"][1][2:] == [2, EOS]
    assert build(row, make_tokenizer(chat=False), stop_ids=(EOS, 2))["ids"][1][2:] == [EOS]
    assert build({"prompt": "the sea", "completion": ""}, make_tokenizer(chat=False))["ids"][1] == [EOS]
    seen, make_batch = [], sft.make_batch
    name = save_policy(tmp_path / "model", llama_config(27, eos_token_id=[2, 1]), tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "make_batch", lambda *inputs: seen.extend(inputs[0]) or make_batch(*inputs))
        run(name, tmp_path / "run", num_steps=1)
        assert all(example["ids"][1][-1] == 2 and EOS not in example["ids"][1] for example in seen)
        seen.clear()
        run(name, tmp_path / "plain", num_steps=1, chat_template=False)
    assert all(example["ids"][1][-1] == EOS for example in seen)


def test_the_templates_own_end_of_a_turn_is_the_stop():
    """As where the other files sample: with Qwen2.5 base and a template that ends turns in a token that is no EOS."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<end>"])
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<eos>", "<end> ")
    example = sft.build_row(
        make_policy(llama_config(len(tokenizer))), tokenizer, [EOS], sft.Args(), {"prompt": "the", "completion": "sea"}
    )
    assert example["ids"][1] == tokenizer("sea <end>")["input_ids"] and EOS not in example["ids"][1]


def test_an_answer_that_is_begun_goes_on():
    """A last message of the assistant's is the beginning of the completion, as in reinforcement learning."""
    begun = [{"role": "user", "content": "write"}, {"role": "assistant", "content": "the sea"}]
    tokenizer = make_tokenizer()
    example = build({"prompt": begun, "completion": " sings"}, tokenizer)
    expected = ["<user> write <assistant> the sea", "sings <eos>"]
    assert example["ids"] == [tokenizer(text)["input_ids"] for text in expected]


def test_an_answer_that_ends_in_an_added_token_has_a_stop_of_its_own():
    """Where the template writes no end of a turn, `</answer>` is none."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["</answer>"])
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<eos>", "")
    policy = make_policy(llama_config(len(tokenizer)))
    row = sft.build_row(policy, tokenizer, [EOS], sft.Args(), {"prompt": "the", "completion": "sea </answer>"})
    assert row["ids"][1] == tokenizer("sea </answer> <eos>")["input_ids"]


def test_an_empty_answer_that_is_begun_is_not_closed():
    tokenizer = make_tokenizer()
    begun = [{"role": "user", "content": "write"}, {"role": "assistant", "content": ""}]
    ids = build({"prompt": begun, "completion": "sings"}, tokenizer)["ids"]
    assert sum(ids, []) == tokenizer("<user> write <assistant> sings <eos>")["input_ids"]


def test_no_space_is_put_before_the_completion():
    """A SentencePiece tokenizer puts one before a text; the completion goes on with one."""
    tokenizer = make_tokenizer(chat=False)
    pieces = {piece: i for i, piece in enumerate(["<pad>", "<eos>", "<unk>", *"▁abc"])}
    tokenizer.backend_tokenizer.model = BPE(pieces, [], unk_token="<unk>")
    tokenizer.backend_tokenizer.pre_tokenizer = Metaspace(prepend_scheme="first")
    assert tokenizer("a")["input_ids"] == [3, 4]
    assert build({"prompt": "a", "completion": "b"}, tokenizer)["ids"] == [[3, 4], [5, EOS]]
    assert build({"text": "ab"}, tokenizer)["ids"] == [[3], [4, 5, EOS]], "plain text begins with it"


def test_plain_text_may_hold_stops_and_a_row_more_columns():
    tokenizer = make_tokenizer()
    ids = tokenizer("the sea <eos> the sun <eos>")["input_ids"]
    assert sum(build({"text": "the sea <eos> the sun"}, tokenizer)["ids"], []) == ids
    row = {"prompt": "the", "completion": "sea"}
    assert build(row | {"text": "the sea"}, tokenizer)["ids"] == build(row, tokenizer)["ids"]


def test_a_row_that_is_cut_still_knows_its_stop():
    assert build({"prompt": "the sea", "completion": "sings " * 30}, room=12)["stop"] == EOS


def test_an_end_that_the_tokenizer_adds_is_not_in_the_prompt():
    """It would stand between prompt and completion; reinforcement learning samples without it."""
    tokenizer = make_tokenizer(chat=False)
    ends = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", EOS)])
    tokenizer.backend_tokenizer.post_processor = ends
    assert tokenizer("the sea")["input_ids"][-1] == EOS
    example = build({"prompt": "the sea", "completion": "sings"}, tokenizer)
    assert example["ids"] == [tokenizer("the sea")["input_ids"][:-1], tokenizer("sings")["input_ids"]]
    around = TemplateProcessing(single="<unk> $A <eos>", special_tokens=[("<unk>", 2), ("<eos>", EOS)])  # as BERT's do
    tokenizer.backend_tokenizer.post_processor = around
    assert build({"text": "the sea"}, tokenizer)["ids"] == [[2], tokenizer("the sea")["input_ids"][1:]]


def test_a_stop_that_has_no_row_is_not_learnt():
    """As GPT-2's config names 50256 for a smaller vocabulary whose tokenizer has no end."""
    tokenizer = make_tokenizer(chat=False)
    for stop_ids, end in ([50256], []), ([50256, EOS], [EOS]):
        example = build({"prompt": "the", "completion": "sea"}, tokenizer, stop_ids)
        assert example["ids"][1] == tokenizer("sea")["input_ids"] + end


def test_plain_text_trains_all_but_its_first_token():
    tokenizer = make_tokenizer()
    ids = tokenizer("the sea sings")["input_ids"]
    assert build({"text": "the sea sings"}, tokenizer)["ids"] == [ids[:1], ids[1:] + [EOS]]


def test_a_long_row_loses_its_end_and_its_stop(model, tmp_path, capsys):
    row = {"prompt": "the sea", "completion": "sings " * 30}
    whole, cut = build(row), build(row, room=12)
    assert cut["cut"] and not whole["cut"]
    assert cut["ids"][0] == whole["ids"][0] and cut["ids"][1] == whole["ids"][1][: 12 - len(cut["ids"][0])]
    assert whole["ids"][1][-1] == EOS != cut["ids"][1][-1]
    assert build(row, room=sum(map(len, whole["ids"]))) == whole, "what just fits is not cut"
    run(model, tmp_path / "run", [row, *ROWS], num_steps=1, max_length=20)
    assert "19 rows to train on, 1 of them cut; 2 held out" in capsys.readouterr().out
    longer = build(row | {"completion": "sings " * 90}, room=1000)
    assert len(sum(longer["ids"], [])) == 64, "the model's context"


# ---- Runs -----------------------------------------------------------------------------------------------------------


def test_the_greedy_answer_is_the_policys_own(tmp_path):
    """A model that ships a repetition penalty keeps it, but its answer is not bent by it."""
    answers = {}
    for penalty in (1.0, 5.0):
        policy = save_policy(tmp_path / f"model-{penalty}")
        config = GenerationConfig.from_pretrained(policy)
        config.repetition_penalty = penalty
        config.save_pretrained(policy)
        folder = run(policy, tmp_path / f"run-{penalty}", num_steps=1, learning_rate=1e-9)
        answers[penalty] = read(folder, "completions.jsonl")[0]["completion"]
        assert GenerationConfig.from_pretrained(folder / "policy").repetition_penalty == penalty
    assert answers[1.0] == answers[5.0] != ""


def test_a_prompt_near_the_end_of_the_context_has_an_answer(plain, tmp_path):
    """GPT-2 has no position beyond its 64: the greedy answer ends there."""
    rows = [*ROWS[:6], {"prompt": "sun " * 60, "completion": "sea"}, ROWS[7]]
    assert read(run(plain, tmp_path / "run", rows, num_steps=1, max_length=64), "completions.jsonl")[0]["completion"]


def test_it_learns_an_answer_and_when_to_stop(tmp_path):
    """Also where only the tokenizer knows the stop token."""
    model = save_policy(tmp_path / "model", llama_config(27, eos_token_id=None))
    rows = [{"prompt": f"the {word}", "completion": "red sun falls"} for word in WORDS]
    folder = run(model, tmp_path / "run", rows, num_steps=60, learning_rate=1e-2)
    assert read(folder)[-1]["eval/loss"] < 0.1
    before, after = (row["completion"] for row in read(folder, "completions.jsonl"))
    assert before != after == "red sun falls"


@pytest.mark.parametrize("rows", [ROWS, TEXTS], ids=["prompts", "texts"])
def test_a_run_writes_its_files(model, tmp_path, rows, capsys):
    folder = run(model, tmp_path / "run", rows, eval_every=2)
    files = ["checkpoint.pt", "completions.jsonl", "config.json", "metrics.jsonl", "policy"]
    assert sorted(path.name for path in folder.iterdir()) == files
    metrics = read(folder)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert [row["step"] for row in metrics if "eval/loss" in row] == [0, 2, 3]
    names = "step epoch loss completions/mean_length grad_norm"
    assert list(metrics[1]) == names.split()
    assert [row["step"] for row in read(folder, "completions.jsonl")] == [0, 2, 3]
    out = capsys.readouterr().out
    assert "18 rows to train on, 0 of them cut; 2 held out" in out
    for step in range(4):
        assert f"step {step}/3" + ("  " if step else "\n") in out
    assert max(len(line) for line in out.splitlines() if line.startswith("step ")) <= 80
    assert "\n  eval/loss " in out and ((rows[18].get("prompt") or "the") + "\n  > ") in out
    args = dict(batch_size=4, num_steps=1, max_new_tokens=8, output_dir=str(tmp_path / "rl"))
    assert reinforce.train(reinforce.Args(model=str(folder / "policy"), **args)).is_dir()


def test_one_pass_by_default_and_each_sees_every_row_once(model, tmp_path, monkeypatch):
    seen, make_batch = [], sft.make_batch

    def spy(rows, device):
        if len(rows) == 4:  # a step, not an evaluation
            seen.extend(row["prompt"] for row in rows)
        return make_batch(rows, device)

    monkeypatch.setattr(sft, "make_batch", spy)
    assert read(run(model, tmp_path / "1", num_steps=0, batch_size=5))[-1]["step"] == 4  # of 18 rows
    run(model, tmp_path / "2", num_steps=9)
    prompts = sorted(row["prompt"] for row in ROWS[:18])
    assert sorted(seen[:18]) == sorted(seen[18:]) == prompts and seen[:18] != seen[18:]


def test_held_out_rows_of_their_own(model, tmp_path, capsys):
    held_out = write(tmp_path / "held_out.jsonl", TEXTS[:5])
    run(model, tmp_path / "run", eval_data=held_out, num_steps=1)
    assert "20 rows to train on, 0 of them cut; 5 held out" in capsys.readouterr().out


def test_micro_batches_do_not_change_a_run(model, tmp_path, monkeypatch):
    """Ragged rows one by one, or all at once: each token weighs the same (pitfall 28)."""
    monkeypatch.setattr(sft, "has_bfloat16", lambda device: False)  # whose rounding depends on the batch
    one, all_at_once = (read(run(model, tmp_path / str(size), micro_batch_tokens=size)) for size in (1, 10**6))
    for a, b in zip(one, all_at_once, strict=True):
        for name in a:
            assert a[name] == b[name] or a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


def test_the_gradient_is_clipped(model, tmp_path, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, max_norm):
        parameters = list(parameters)
        total = clip(parameters, max_norm)
        norms.append(torch.stack([parameter.grad.norm() for parameter in parameters]).norm().item())
        return total

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    metrics = read(run(model, tmp_path / "run", max_grad_norm=0.25))
    for row, after in zip(metrics[1:], norms, strict=True):
        assert row["grad_norm"] > 0.25 and after == pytest.approx(0.25, rel=1e-3)


def test_same_seed_same_bits(model, tmp_path):
    first, second = run(model, tmp_path / "1"), run(model, tmp_path / "2")
    assert read(first) == read(second) and same(weights(first), weights(second))
    assert read(first) != read(run(model, tmp_path / "3", seed=1))


def test_dropout_is_off(tmp_path):
    configs = [gpt2_config(27, attn_pdrop=p, resid_pdrop=p, embd_pdrop=p) for p in (0.5, 0.0)]
    with_dropout, without = (save_policy(tmp_path / str(i), config) for i, config in enumerate(configs))
    assert read(run(with_dropout, tmp_path / "a")) == read(run(without, tmp_path / "b"))


def test_wandb_offline(model, tmp_path):
    assert list(run(model, tmp_path / "run", track=True, num_steps=1).glob("wandb/offline-run-*/*.wandb"))


# ---- A copied file, killed and resumed ------------------------------------------------------------------------------

KILLER = """
import os, signal
import sft

log = sft.Run.log

def log_and_die(run, step, *rest):
    log(run, step, *rest)
    if step == 5:
        with open(run.folder / "metrics.jsonl", "a") as file:
            file.write('{"step": 6, "los')  # killed in the middle of a line
        os.kill(os.getpid(), signal.SIGKILL)

sft.Run.log = log_and_die
sft.train(sft.tyro.cli(sft.Args))
"""


def test_a_copied_file_killed_and_resumed_ends_in_the_same_bits(model, tmp_path):
    """Alone in an empty folder, without this project on the path."""
    file, killer = shutil.copy(ROOT / "nano_rl" / "sft.py", tmp_path), tmp_path / "killer.py"
    killer.write_text(KILLER)
    args = TINY | {"num_steps": 6, "save_minutes": 0, "eval_every": 3}
    straight = run(model, tmp_path / "straight", **args)
    args |= {"model": model, "data": "straight.jsonl", "output_dir": "run"}
    words = [word for flag, value in args.items() for word in (f"--{flag.replace('_', '-')}", str(value))]
    killed = start(tmp_path, killer, *words)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run" / "policy").exists()
    resumed = start(tmp_path, Path(file), "--resume", "run")
    assert resumed.returncode == 0, resumed.stderr
    assert read(tmp_path / "run") == read(straight)
    assert read(tmp_path / "run", "completions.jsonl") == read(straight, "completions.jsonl")
    assert same(weights(tmp_path / "run"), weights(straight))


def test_more_steps(model, tmp_path):
    """Four steps, resumed for two more, are the six of a run that was asked for six."""
    straight = run(model, tmp_path / "straight", num_steps=6)
    folder = run(model, tmp_path / "run", num_steps=4)
    sft.train(sft.Args(resume=str(folder), num_steps=6))
    assert same(weights(folder), weights(straight))


def test_ctrl_c_ends_the_run_after_its_step(model, tmp_path, monkeypatch):
    """And the run goes on to the weights of one without a stop."""
    straight = run(model, tmp_path / "straight", num_steps=4)
    log = sft.Run.log

    def press(run, step, *rest):
        log(run, step, *rest)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="step 2: go on with --resume"):
        patch.setattr(sft.Run, "log", press)
        run(model, tmp_path / "run", num_steps=4)
    sft.train(sft.Args(resume=str(tmp_path / "run")))
    assert same(weights(tmp_path / "run"), weights(straight))
    monkeypatch.setattr(sft.Run, "log", press)
    weights(run(model, tmp_path / "last", num_steps=2))  # in the last step there is nothing to stop


# ---- Bad input ------------------------------------------------------------------------------------------------------


def refused(**args) -> str:
    """The message that the user reads."""
    with pytest.raises(sft.InputError) as error:
        sft.train(sft.Args(**(TINY | args)))
    return str(error.value)


@pytest.mark.parametrize(
    "bad, what",
    [
        ('{"prompt": "a", "completion": "b"', "JSONDecodeError"),
        ("", "JSONDecodeError"),
        ("[1]", "TypeError"),
        ('{"prompt": "a"}', "KeyError('completion')"),
        ('{"completion": "a"}', "KeyError('prompt')"),
        ('{"prompt": "a", "completion": null}', "AttributeError"),
        ('{"prompt": null, "completion": "b"}', "TypeError"),
        ('{"prompt": [{"role": "user"}], "completion": "b"}', "KeyError('content')"),
        ('{"prompt": "a", "completion": []}', "ValueError"),
        ('{"text": null}', "TypeError"),
        ('{"text": ""}', "0 + "),
        ('{"prompt": "%s", "completion": "b"}' % ("sun " * 60), "62 + 2 tokens; --max-length or the context leaves 60"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(model, tmp_path, bad, what):
    good = [json.dumps(row) for row in ROWS[:4]]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join([*good[:2], bad, *good[2:]]) + "\n")
    message = refused(model=model, data=str(file), output_dir=str(tmp_path / "run"))
    needs = '{"prompt": text or messages, "completion": text or [message]} or {"text": text}'
    assert message.startswith(f"cannot read {file}, line 3: needs {needs}") and what in message
    message = refused(model=model, data=write(tmp_path / "good", ROWS), eval_data=str(file))
    assert message.startswith(f"cannot read {file}, line 3: ")
    assert not (tmp_path / "run").exists()


def test_a_template_that_changes_its_prompt(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<assistant>{% endif %}", "<assistant> of{% endif %}")
    name = save_policy(tmp_path / "model", tokenizer=tokenizer)
    data = write(tmp_path / "data", ROWS)
    message = refused(model=name, data=data)
    assert message.startswith(f"cannot read {data}, line 1: ") and "try --no-chat-template" in message
    assert sft.train(sft.Args(model=name, data=data, output_dir=str(tmp_path / "run"), chat_template=False, **TINY))


@pytest.mark.parametrize(
    "args, message",
    [
        ({}, "give --data, a file of JSON lines to train on"),
        ({"data": "a", "batch_size": 0}, "--batch-size 0: must be above 0"),
        ({"data": "a", "learning_rate": math.nan}, "--learning-rate nan: must be above 0"),
        ({"data": "a", "num_steps": -1}, "--num-steps -1: must be above 0"),
        ({"data": "a", "max_length": 0}, "--max-length 0: must be above 0"),
        ({"data": "no/such/file"}, "cannot read no/such/file"),
        ({"data": "a", "model": "no-one/none"}, "cannot load no-one/none: check name"),
    ],
)
def test_bad_arguments(model, args, message):
    assert message in refused(**({"model": model} | args))


def test_too_few_rows(model, tmp_path):
    for name, rows in (("1", ROWS[:1] * 3), ("2", ROWS[:2])):
        file = write(tmp_path / name, rows)
        assert f"{file}: needs 2 different prompts to hold out, and one more" in refused(model=model, data=file)
    few = write(tmp_path / "few", ROWS[:1] * 2)
    message = refused(model=model, data=write(tmp_path / "data", ROWS), eval_data=few)
    assert message.startswith(f"{few}: needs 2 different prompts")


def test_resume_of_another_files_run(model, tmp_path):
    args = dict(model=model, batch_size=4, num_steps=1, max_new_tokens=8, eval_every=0)
    folder = remax.train(remax.Args(output_dir=str(tmp_path / "rl"), **args))
    with pytest.raises(sft.InputError, match=f"cannot resume {folder}: no run of this file"):
        sft.train(sft.Args(resume=str(folder)))


def test_a_run_goes_on_without_the_logs_that_were_lost(model, tmp_path):
    folder = run(model, tmp_path / "run", num_steps=1)
    (folder / "completions.jsonl").unlink()
    (folder / "metrics.jsonl").write_text("")
    sft.train(sft.Args(resume=str(folder), num_steps=2))
    assert [row["step"] for row in read(folder)] == [2]


def test_rows_that_grew_are_not_resumed(model, tmp_path):
    """Their last tenth would be others."""
    folder = run(model, tmp_path / "run")
    write(tmp_path / "run.jsonl", ROWS + TEXTS)
    with pytest.raises(sft.InputError, match="--resume: other script"):
        sft.train(sft.Args(resume=str(folder), num_steps=5))


def test_the_loaded_tokenizer_is_the_models(model, tmp_path):
    folder = run(model, tmp_path / "run", num_steps=1)
    ours, theirs = AutoTokenizer.from_pretrained(folder / "policy"), AutoTokenizer.from_pretrained(model)
    assert ours.chat_template == theirs.chat_template and ours.get_vocab() == theirs.get_vocab()
