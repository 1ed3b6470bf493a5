"""Inputs from public bug reports, a test for each by its number, which tries what else is of its kind."""

import asyncio
import itertools
import json
import math
import re
import sys
import time
from pathlib import Path

import accelerate.tracking
import numpy as np
import pytest
import torch
from test_run import TINY, read, run
from tiny import (
    CHAT_TEMPLATE,
    gpt2_config,
    llama_config,
    make_examples,
    make_policy,
    make_tokenizer,
    save_policy,
    save_reward_model,
    score,
    start,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BloomConfig, MptConfig, RobertaConfig

import nano_rl.compare as compare
import nano_rl.grpo as grpo
import nano_rl.ppo as ppo
import nano_rl.raft as raft
import nano_rl.reinforce as reinforce
import nano_rl.reward_model as reward_model
import nano_rl.sft as sft
from nano_rl.gsm8k import formatted

CPU = torch.device("cpu")
THINKING = CHAT_TEMPLATE.replace("<assistant>{%", "<assistant> <think>{%")  # the policy goes on inside a thought


def prompts_file(path: Path, *prompts, **columns) -> str:
    path.write_text("".join(json.dumps({"prompt": prompt} | columns) + "\n" for prompt in prompts))
    return str(path)


def read_one(prompt, tokenizer, tmp_path, config=None, **args) -> dict:
    """The example that a file's line becomes."""
    args = reinforce.Args(max_new_tokens=8, **args)
    file = prompts_file(tmp_path / "one.jsonl", prompt)
    return reinforce.read_prompts(file, args, tokenizer, make_policy(config or llama_config(len(tokenizer))))[0]


# ---- 2: nothing checks that what is written is finite ---------------------------------------------------------------
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["policy", "reward model", "value model"])
def test_2_weights_that_are_not_finite_are_refused(model, tmp_path, value, kind):
    """In a row that no prompt reads, too: whatever model has them."""
    name = save_policy(tmp_path / "m") if kind == "policy" else save_reward_model(tmp_path / "m")
    broken = AutoModelForCausalLM.from_pretrained(name) if kind == "policy" else None
    if not broken:
        broken = reinforce.transformers.AutoModelForSequenceClassification.from_pretrained(name)
    broken.get_input_embeddings().weight.data[20, 3] = value
    broken.save_pretrained(name)
    flag = {"policy": "model", "reward model": "reward_model", "value model": "value_model"}[kind]
    file = ppo if kind == "value model" else reinforce
    with pytest.raises(file.InputError, match="not finite: .*embed_tokens"):
        file.train(file.Args(**TINY | {"model": model, "output_dir": str(tmp_path / "run"), flag: name}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "file, flags",
    [
        (grpo, {"learning_rate": 1.0, "num_updates": 4, "kl_coef": 0.1}),
        (raft, {"learning_rate": 4e9, "num_epochs": 4}),
        (reinforce, {"learning_rate": 4e9, "eval_every": 1}),  # whose next samples come from logits of NaN
        (ppo, {"value_learning_rate": 4e9, "value_warmup_steps": 1, "num_minibatches": 1}),
    ],
    ids=lambda value: value.__name__[8:] if hasattr(value, "train") else "",
)
def test_2_a_run_that_diverges_ends_before_it_overwrites_what_was_good(model, tmp_path, monkeypatch, file, flags):
    """And says which step it was; what is in its folder is finite and JSON."""
    monkeypatch.setattr(file, "has_bfloat16", lambda device: False)  # with it, grpo's six steps stay finite
    args = TINY | {"num_steps": 6, "save_minutes": 0} | flags
    with pytest.raises(file.InputError, match=r"^step \d: .* not finite; not saved"):
        file.train(file.Args(model=model, output_dir=str(tmp_path / "run"), **args))
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert not (tmp_path / "run" / "policy").exists()


def test_2_what_diverges_says_its_step_and_keeps_the_checkpoint(model, tmp_path, monkeypatch):
    """The gradient of step 3 is not finite: the checkpoint of step 2 stays, and no line of step 3 is written."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def clip_and_break(parameters, max_norm):
        calls.append(1)
        if len(calls) == 3:
            parameters[0].grad[0] = math.nan
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_break)
    with pytest.raises(reinforce.InputError, match="^step 3: grad_norm not finite; not saved. Try a smaller"):
        run(model, tmp_path / "run", save_minutes=0, num_steps=4, eval_every=0)
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt")
    assert checkpoint["step"] == 2 and all(value.isfinite().all() for value in checkpoint["parts"][0].values())
    assert [row["step"] for row in read(tmp_path / "run")] == [0, 1, 2]
    assert not (tmp_path / "run" / "policy").exists()


@pytest.mark.parametrize("value", [1e39, -1e300, math.nan])
def test_2_rewards_are_finite_in_the_precision_that_they_are_kept_in(value):
    with pytest.raises(reinforce.InputError, match="must return 2 finite numbers"):
        score(reinforce, lambda **_: [0.0, value], ["x", "y"])


# ---- 3: the text that is judged is not the assistant's turn as the policy reads and writes it -----------------------
def test_3_what_the_template_begins_belongs_to_the_answer(tmp_path):
    """`<think>`, which the policy reads and does not write, is in the completion that is judged."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = THINKING
    model = save_policy(tmp_path / "model", tokenizer=tokenizer)
    seen = []

    def reward_fn(prompts, completions, **_):
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    folder = run(model, tmp_path / "run", reward_fn=reward_fn, num_steps=1, eval_every=0)
    assert seen and all(text.startswith("<think>") for text in seen)
    assert all(row["completion"].startswith("<think>") for row in read(folder, "completions.jsonl"))
    assert formatted(["q"], ["<think>" + "5 </think> <answer> 7 </answer>"]) == [1]


LAST = "{% if m.role == 'assistant' and loop.last %}<think> </think> {% endif %}"
QWEN_LIKE = "{% for m in messages %}<|{{ m.role }}|>\n" + LAST + "{{ m.content.split('</think>')[-1].strip() }}<end>\n"
QWEN_LIKE += "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}"


@pytest.mark.parametrize(
    "template, begun",
    [
        (CHAT_TEMPLATE, ""),
        (THINKING, "<think>"),
        (QWEN_LIKE, "<think>\n"),  # which leaves the thoughts of earlier turns out, and adds one to the last
        (CHAT_TEMPLATE.replace("<assistant>{%", "<assistant> Answer:\n{%"), "Answer:\n"),
        (
            CHAT_TEMPLATE.replace("> {{", "></think>{{").replace("<assistant>{%", "<assistant><think>{%"),
            "<think>",
        ),  # GLM
        (
            CHAT_TEMPLATE.replace("> {{", "><think></think>{{").replace("<assistant>{%", "<assistant><think>{%"),
            "<think>",
        ),
        (None, ""),
    ],
)
def test_3_of_the_generation_prompt_the_header_is_no_part_of_the_answer(template, begun):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert reinforce.read_template(tokenizer, reinforce.Args())[0] == begun
    assert reinforce.read_template(tokenizer, reinforce.Args(chat_template=False)) == ("", None)


@pytest.mark.parametrize("role", ["assistant", "user", "system"])
def test_3_a_template_may_refuse_a_role_or_ask_for_one(tmp_path, role):
    """What the prompts do not have is no fault of theirs."""
    tokenizer = make_tokenizer()
    refuse = "{{ raise_exception('no ' ~ m.role) }}"
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "%}<", "%}{% if m.role == '" + role + "' %}" + refuse + "{% endif %}<", 1
    )
    model = save_policy(tmp_path / "model", tokenizer=tokenizer)
    if role == "user":
        with pytest.raises(reinforce.InputError, match="line 1: .*no user"):
            run(model, tmp_path / "run")
    else:
        run(model, tmp_path / "run", num_steps=1, eval_every=0)


def test_3_the_space_after_what_was_begun_is_kept():
    """Some decoders leave out the first one of a text."""
    tokenizer = make_tokenizer()
    sampler = reinforce.make_sampler(make_policy(llama_config(27)), tokenizer, reinforce.Args())
    sea, sings = tokenizer.convert_tokens_to_ids(["sea", "sings"])
    sampler.generate = lambda input_ids, **_: torch.tensor([[*input_ids[0], sings, sings, 1]])
    for begun, text in ("the sea", "the sea sings sings"), ("", "sings sings"):
        examples = [example | {"begun": begun} for example in make_examples([3, sea])]
        assert reinforce.sample(sampler, tokenizer, examples, 1.0)[1] == [text]


def test_3_tags_that_are_special_tokens_are_judged():
    """Of what is written only the stop is left out; a tokenizer may call its tags special."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["sea"]})
    sampler = reinforce.make_sampler(make_policy(llama_config(len(tokenizer))), tokenizer, reinforce.Args())
    sea, eos = tokenizer.convert_tokens_to_ids(["sea", "<eos>"])
    sampler.generate = lambda input_ids, **_: torch.tensor([[*input_ids[0], 7, sea, eos, 5]])
    _, (text,) = reinforce.sample(sampler, tokenizer, make_examples([3, 4]), 1.0)
    assert text == "a sea"


def test_a_reward_that_never_varies_is_said_once(model, tmp_path, capsys):
    """After three whole steps; one that varies in one of them is not, or from one step to the next."""
    flags = {"num_steps": 5, "eval_every": 0, "max_new_tokens": 2}
    run(model, tmp_path / "run", reward_fn=lambda completions, **_: [0.0] * len(completions), **flags)
    assert capsys.readouterr().out.count("no reward differs in three steps") == 1
    calls = []

    def sometimes(completions, **_):
        calls.append(1)
        return [float(i == 0 and len(calls) == 10) for i in range(len(completions))]

    run(model, tmp_path / "two", reward_fn=sometimes, **flags | {"num_steps": 4})
    assert "no reward differs" not in capsys.readouterr().out
    count = itertools.count()
    run(model, tmp_path / "one", batch_size=1, baseline="ema", reward_fn=lambda **_: [float(next(count))])
    assert "no reward differs" not in capsys.readouterr().out


# ---- 4: the contract is narrower than the one that the README names -------------------------------------------------
async def later(completions, **_):
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


class Later:
    async def __call__(self, completions, **_):
        return await later(completions)


@pytest.mark.parametrize(
    "reward_fn, expected",
    [
        (lambda completion_ids, **_: [float(len(ids)) for ids in completion_ids], [1, 1]),
        (lambda trainer_state, **_: [trainer_state.global_step, trainer_state.max_steps], [0, 3]),
        (lambda log_metric, log_extra, **_: log_metric("a", 1.0) or log_extra("b", ["c", "d"]) or [0, 1], [0, 1]),
        (lambda completions, **_: (float(len(text)) for text in completions), [1, 2]),
        (lambda completions, **_: map(len, completions), [1, 2]),
        (lambda completions, **_: np.array([1, 2]), [1, 2]),
        (lambda completions, **_: {0: "x", 1: "y"}.keys(), [0, 1]),
        (later, [1, 2]),
        (Later(), [1, 2]),
    ],
    ids="ids state logs generator map array keys async async-object".split(),
)
def test_4_reward_functions_are_called_as_trl_calls_them(reward_fn, expected):
    """In a thread of its own loop or in a running one, as a notebook's is."""
    rewards, _ = score(reinforce, reward_fn, ["x", "yy"])

    async def notebook():
        return score(reinforce, reward_fn, ["x", "yy"])[0]

    assert rewards.tolist() == asyncio.run(notebook()).tolist() == expected


def test_4_all_calls_of_a_run_have_one_event_loop(model, tmp_path):
    """As in TRL: a client that is made once is of the loop of its first call."""
    loops = []

    async def reward_fn(completions, **_):
        loops.append(asyncio.get_running_loop())
        return [float(len(text)) for text in completions]

    run(model, tmp_path / "run", reward_fn=reward_fn, num_steps=2, eval_every=0)
    assert len(loops) > 3 and len(set(map(id, loops))) == 1


def test_4_what_they_get(model, tmp_path):
    """Ids as sampled, with the stop; every column of the file in every draw; the state of the run."""
    file = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": f"the {word}"} | ({"answer": 1} if word == "sea" else {}) for word in "sea sun a b c d e".split()
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    steps = []

    def reward_fn(prompts, completions, completion_ids, answer, trainer_state, **_):
        assert len(answer) == len(prompts) == len(completion_ids)
        assert all(0 < len(ids) <= 6 and 1 not in ids[:-1] for ids in completion_ids)
        assert all((a == 1) == (p == "the sea") for p, a in zip(prompts, answer))
        steps.append(trainer_state.global_step)
        return [float(len(ids)) for ids in completion_ids]

    run(model, tmp_path / "run", reward_fn=reward_fn, prompts=str(file), num_steps=3, eval_every=0, max_new_tokens=6)
    assert steps[8:11] == [0, 1, 2]


# ---- 5: where a prompt ends and the answer begins is assumed, not looked at -----------------------------------------
@pytest.mark.parametrize("content", ["the sea", " the sea ", "", "the <eos> sea"])
@pytest.mark.parametrize("chat", [True, False])
def test_5_a_message_of_the_assistants_is_continued(tmp_path, content, chat):
    """It is part of the answer: of what is judged, and not of the prompts that a reward function gets."""
    messages = [{"role": "user", "content": "write"}, {"role": "assistant", "content": content}]
    tokenizer = make_tokenizer()
    example = read_one(messages, tokenizer, tmp_path, chat_template=chat)
    text = "<user> write <assistant> " + content if chat else "write " + content
    assert example["prompt_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert example["begun"].strip() == content.strip() and example["prompt"] == messages[:1]


def test_5_a_prompt_does_not_end_in_the_tokenizers_own_end(tmp_path):
    """Some tokenizers end every text; a completion after the end is not what the policy knows."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(chat=False)
    processor = TemplateProcessing(single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)])
    tokenizer._tokenizer.post_processor = processor
    assert tokenizer("the sea")["input_ids"][-1] == 1
    assert tokenizer.decode(read_one("the sea", tokenizer, tmp_path)["prompt_ids"]) == "<pad> the sea"


# ---- 6: the tokenizer's ids are never compared with the model's rows ------------------------------------------------
@pytest.mark.parametrize("file", [reinforce, ppo], ids=lambda file: file.__name__[8:])
def test_6_a_pad_token_without_a_row_is_replaced(tmp_path, file):
    tokenizer = make_tokenizer(pad=None)
    model = save_policy(tmp_path / "model", llama_config(len(tokenizer)), tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(model)
    assert AutoTokenizer.from_pretrained(model).pad_token_id == 27
    prompts = prompts_file(tmp_path / "prompts.jsonl", "the sea", "the", "a", "the old sea")
    args = TINY | {"num_steps": 1, "prompts": prompts} | ({"num_minibatches": 1} if file is ppo else {})
    folder = file.train(file.Args(model=model, output_dir=str(tmp_path / "run"), **args))
    assert AutoTokenizer.from_pretrained(folder / "policy").pad_token == "<eos>"
    prompts = prompts_file(tmp_path / "prompts.jsonl", "a", "the <new>", "the")
    with pytest.raises(file.InputError, match="line 2: .*ids end at 27"):
        file.train(file.Args(model=model, output_dir=str(tmp_path / "two"), prompts=prompts, max_new_tokens=8))


def test_6_a_reward_model_that_cannot_read_its_tokens_is_refused_at_the_start(model, tmp_path):
    tokenizer = make_tokenizer()
    reward_model = save_reward_model(tmp_path / "reward", tokenizer=tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<new>"})  # is never read, as texts are scored one by one
    tokenizer.save_pretrained(reward_model)
    run(model, tmp_path / "works", reward_model=reward_model, num_steps=1, eval_every=0)
    tokenizer.add_tokens(["song2"])
    tokenizer.save_pretrained(reward_model)
    with pytest.raises(reinforce.InputError, match="no embedding of some of its tokenizer's tokens"):
        run(model, tmp_path / "run", reward_model=reward_model)


# ---- 7: a limit that is checked for one model is not for the others -------------------------------------------------
@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("config", [BertConfig, RobertaConfig, llama_config, gpt2_config])
def test_7_a_long_text_is_cut_to_what_a_reward_model_reads(tmp_path, config, pad):
    """The beginning goes; RoBERTa's positions begin after its pad token."""
    sizes = {"vocab_size": 27, "max_position_embeddings": 32, "pad_token_id": pad}
    if config in (BertConfig, RobertaConfig):
        sizes |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = config(**sizes)
    else:
        limit = "n_positions" if config is gpt2_config else "max_position_embeddings"
        config = config(27, pad_token_id=pad, **{limit: 32})
    for chat in (True, False):
        name = save_reward_model(tmp_path / f"reward{chat}", tokenizer=make_tokenizer(chat=chat), config=config)
        reward_fn = reinforce.load_reward_fn(reinforce.Args(reward_model=name), CPU)
        ends = ["the sea sings", "the sun falls"]
        for length in (10, 26, 27, 28, 29, 30, 31, 32, 33, 100):
            one, other = reward_fn(prompts=["a"] * 2, completions=["river " * length + end for end in ends])
            assert math.isfinite(one) and one != other, "the end is read"


def test_7_the_limit_has_two_names_in_configs_and_some_models_have_none(tmp_path):
    mpt = MptConfig(vocab_size=27, eos_token_id=1, d_model=16, n_heads=2, n_layers=1, max_seq_len=32)
    bloom = BloomConfig(vocab_size=27, eos_token_id=1, hidden_size=16, n_head=2, n_layer=1)
    limits = [(llama_config(27, max_position_embeddings=32), 32), (gpt2_config(27, n_positions=32), 32)]
    for config, limit in [*limits, (mpt, 32), (bloom, 2**31)]:
        name = save_policy(tmp_path / config.model_type, config)
        policy, _, tokenizer = reinforce.load_policy(reinforce.Args(model=name), CPU)
        assert tokenizer.model_max_length == limit
        prompts = prompts_file(tmp_path / "prompts.jsonl", "a", "b", "sea " * 40)
        args = reinforce.Args(prompts=prompts, max_new_tokens=4)
        if limit == 2**31:
            reinforce.load_prompts(args, tokenizer, policy)
            continue
        with pytest.raises(reinforce.InputError, match="line 3: .* context less --max-new-tokens leaves 28"):
            reinforce.load_prompts(args, tokenizer, policy)


# ---- 8: what was loaded is not checked to be a model that can be trained and saved ----------------------------------
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_8_an_adapter_is_refused_at_once(model, tmp_path, lora_rank):
    import peft

    base = AutoModelForCausalLM.from_pretrained(model)
    adapter = peft.PeftModelForCausalLM(base, peft.LoraConfig(r=2, target_modules="all-linear"))
    adapter.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": model}))
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "adapter")
    with pytest.raises(reinforce.InputError, match="merge an adapter"):
        run(str(tmp_path / "adapter"), tmp_path / "run", lora_rank=lora_rank)
    with pytest.raises(reinforce.InputError, match="merge an adapter; missing"):
        run(model, tmp_path / "run", reward_model=str(tmp_path / "adapter"))  # whose head would be random
    with pytest.raises(ppo.InputError, match="merge an adapter; missing"):
        args = TINY | {"model": model, "value_model": str(tmp_path / "adapter"), "num_minibatches": 1}
        ppo.train(ppo.Args(output_dir=str(tmp_path / "run"), **args))
    assert not (tmp_path / "run").exists()


def test_8_weights_that_are_no_numbers_are_refused(model, tmp_path, monkeypatch):
    """As those of a model that was loaded in 8 or 4 bits, whose rest alone would be trained."""
    from_pretrained = AutoModelForCausalLM.from_pretrained

    def load_quantized(*inputs, **options):
        policy, info = from_pretrained(*inputs, **options)
        weight = policy.lm_head.weight.data.to(torch.uint8)
        policy.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
        return policy, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_quantized)
    with pytest.raises(reinforce.InputError, match="quantized or not finite: .*weight"):
        run(model, tmp_path / "run")


# ---- 9: rows are split where prompts are meant ----------------------------------------------------------------------
def test_9_no_prompt_is_trained_on_and_held_out(tmp_path):
    """Each of ten prompts a hundred times, as text and as messages of either order, with answers of its own."""
    words = "a the sea sun tree song stone river walks sings".split()
    rows = []
    for i in range(1000):
        text = f"about {words[i % 10]}"
        messages = [{"role": "user", "content": text}, {"content": text, "role": "user"}][i % 2 : i % 2 + 1]
        rows.append({"prompt": messages if i % 3 else text, "answer": i})
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = make_tokenizer()
    args = reinforce.Args(prompts=str(tmp_path / "prompts.jsonl"), max_new_tokens=8)
    train, held_out = reinforce.load_prompts(args, tokenizer, make_policy(llama_config(27)))
    ids, held_out_ids = [{tuple(example["prompt_ids"]) for example in part} for part in (train, held_out)]
    assert not ids & held_out_ids and len(ids) == 8 and len(held_out_ids) == 2
    assert len(held_out) == 2 and len(train) == 800, "one row of each is enough to evaluate on"
    prompts_file(tmp_path / "prompts.jsonl", "a", "a", "a", "a")
    with pytest.raises(reinforce.InputError, match="needs 3 different prompts"):
        reinforce.load_prompts(args, tokenizer, make_policy(llama_config(27)))


def test_9_policies_are_compared_on_what_a_run_holds_out(model, tmp_path):
    rows = [f"about {word}" for word in "a the sea sun tree song stone river walks sings".split()] * 10
    file = prompts_file(tmp_path / "prompts.jsonl", *rows)
    args = reinforce.Args(prompts=file, max_new_tokens=4)
    _, held_out = reinforce.load_prompts(args, make_tokenizer(), make_policy(llama_config(27)))
    options = compare.Args(prompts=file, policies=[model, model], max_new_tokens=4, num_samples=1)
    reward_fn, loop = (lambda completions, **_: [0.0] * len(completions)), asyncio.Runner()
    _, _, examples, _, _ = compare.complete(options, model, CPU, loop, reward_fn)
    assert [example["prompt"] for example in examples] == [example["prompt"] for example in held_out]


# ---- 2, 6, 8, 11 and 17 before RL -----------------------------------------------------------------------------------
def train_before_rl(file, tmp_path, **args) -> str | None:
    """Why a run of sft.py or reward_model.py ended, None where it ended well."""
    rows = [{"prompt": f"write {word}", "completion": "the sea", "chosen": "a", "rejected": "the"} for word in "abcd"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data" if file is sft else "pairs": str(tmp_path / "rows.jsonl")}
    try:
        file.train(file.Args(**({"num_steps": 2, "output_dir": str(tmp_path / "run")} | data | args)))
    except file.InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("file", [sft, reward_model])
def test_what_trains_before_rl_checks_what_it_loads(model, tmp_path, monkeypatch, file):
    save_policy(tmp_path / "nan")
    broken = AutoModelForCausalLM.from_pretrained(tmp_path / "nan")
    broken.get_input_embeddings().weight.data[20, 3] = math.nan
    broken.save_pretrained(tmp_path / "nan")
    assert "not finite: ['model.embed_tokens.weight'" in train_before_rl(file, tmp_path, model=str(tmp_path / "nan"))
    few = save_policy(tmp_path / "few", llama_config(8))  # "write" is 5, "the" 8
    message = train_before_rl(file, tmp_path, model=few)
    if file is reward_model:
        assert message == "--model: its tokenizer has tokens beyond the 8 that it has an embedding of"
    else:
        assert "line 1: needs" in message and "ids end at 8" in message
    asked, from_pretrained = [], AutoTokenizer.from_pretrained

    def note(*inputs, **options):
        asked.append(options["trust_remote_code"])
        return from_pretrained(*inputs, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", note)
    monkeypatch.setattr(file.PartialState, "print", lambda *_, **__: 1 / 0)  # a screen that is broken
    assert train_before_rl(file, tmp_path, model=model) is None and asked == [False]


@pytest.mark.parametrize("file", [sft, reward_model])
def test_what_diverges_before_rl_is_not_saved(model, tmp_path, file):
    args = {"learning_rate": 4e9, "num_steps": 6, "save_minutes": 0, "model": model}
    assert re.match(r"step \d: .*not finite; not saved", train_before_rl(file, tmp_path, **args))
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert not {"policy", "reward_model"} & {path.name for path in (tmp_path / "run").iterdir()}


# ---- 11 to 19 -------------------------------------------------------------------------------------------------------
def test_11_what_is_shown_cannot_end_a_run(tmp_path, monkeypatch):
    """The kind: something for the eye alone (an encoding, a closed pipe, a full disk behind the screen) raises."""

    class Broken:
        def write(self, *_):
            raise BrokenPipeError("the reader has gone")

        def flush(self):
            pass

    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<assistant>{%", "<assistant> → 🌊{%")
    model = save_policy(tmp_path / "model", tokenizer=tokenizer)
    for encoding in ("cp1252", "ascii"):
        words = ["--model", model, "--output-dir", encoding, "--num-steps", "1", "--eval-every", "0"]
        words += ["--max-new-tokens", "2", "--batch-size", "4"]
        done = start(tmp_path, Path(reinforce.__file__), *words, encoding=encoding)
        assert done.returncode == 0, done.stderr
        assert "  > ? ?" in done.stdout and "trained policy" in done.stdout
    for stdout in (Broken(), None):
        monkeypatch.setattr(sys, "stdout", stdout)
        run(model, tmp_path / f"run{stdout is None}", num_steps=1, eval_every=0)


def test_11_help_is_printed_in_any_encoding(tmp_path):
    done = start(tmp_path, Path(reinforce.__file__), "--help", encoding="cp1252")
    assert done.returncode == 0 and "--kl-coef" in done.stdout, done.stderr


def test_12_runs_of_one_name_are_two_on_wandb(model, tmp_path, monkeypatch):
    """The kind: an id made of what the user chose, which may be another's, or hold what wandb refuses."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for name in ("one/a:b", "two/a:b", "a,b", "a b#c%d"):
        folder = run(model, tmp_path / name, num_steps=1, eval_every=0, track=True)
        ids.append(torch.load(folder / "checkpoint.pt")["wandb_id"])
        assert list((folder / "wandb").glob(f"offline-run-*-{ids[-1]}"))
    assert len(set(ids)) == 4
    time.sleep(1)  # wandb names a run's folder by the second, and a tiny run takes less
    reinforce.train(reinforce.Args(resume=str(folder), num_steps=2))
    assert torch.load(folder / "checkpoint.pt")["wandb_id"] == ids[-1]
    assert len(list((folder / "wandb").glob(f"offline-run-*-{ids[-1]}"))) == 2, "a resumed run goes on there"


def test_12_wandb_is_missed_only_where_it_is_asked_for(model, tmp_path, monkeypatch, recwarn):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    run(model, tmp_path / "run", num_steps=1, eval_every=0)
    assert not [warning for warning in recwarn if "tracker" in str(warning.message)]
    with pytest.raises(ModuleNotFoundError, match="wandb"):
        run(model, tmp_path / "tracked", num_steps=1, eval_every=0, track=True)


def test_13_arguments_of_other_types_work(model, tmp_path):
    """The kind: a value that is right and of a type that JSON does not know."""
    numbers = {"learning_rate": np.float32(1e-4), "num_steps": np.int64(1), "batch_size": torch.tensor(4)}
    args = TINY | numbers | {"temperature": 1, "chat_template": np.bool_(True), "prompts": Path("")}
    args["prompts"] = Path(prompts_file(tmp_path / "prompts.jsonl", "a", "b", "the sea", "c"))
    folder = reinforce.train(reinforce.Args(model=Path(model), output_dir=tmp_path / "run", **args))
    config = json.loads((folder / "config.json").read_text())
    assert config["model"] == model and config["learning_rate"] == pytest.approx(1e-4) and config["temperature"] == 1.0
    reinforce.train(reinforce.Args(resume=folder, num_steps=np.int64(2)))
    assert len(read(folder)) == 3
    nothing = dict.fromkeys(("prompts", "eval_prompts", "reward_fn", "reward_model", "resume"))
    args = TINY | {"num_steps": 1, "output_dir": str(tmp_path / "none")} | nothing
    reinforce.train(reinforce.Args(model=model, **args))
    with pytest.raises(reinforce.InputError, match="is not empty"):
        reinforce.train(reinforce.Args(model=model, **args))


@pytest.mark.parametrize("track", [False, True])
def test_13_a_start_that_failed_is_in_no_ones_way(model, tmp_path, monkeypatch, track):
    """The same command works once its cause is mended; that of another is refused, also where both start at once."""
    args = {"track": track, "num_steps": 1}
    with pytest.raises(ZeroDivisionError):
        run(model, tmp_path / "run", reward_fn=lambda **_: 1 / 0, **args)
    with pytest.raises(reinforce.InputError, match="is not empty"):
        run(model, tmp_path / "run", **args | {"seed": 1})
    run(model, tmp_path / "run", **args)
    own = torch.load(tmp_path / "run/checkpoint.pt")["wandb_id"]  # not that of the start that failed, still open
    assert len(list((tmp_path / "run").glob(f"wandb/offline-run-*/run-{own}.wandb"))) == track
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(reinforce.InputError, match="is not empty"):
        run(model, tmp_path / "other")
    evaluate = reinforce.evaluate

    def slower_than_the_other(*inputs):
        (tmp_path / "two/metrics.jsonl").write_text("the other's")
        return evaluate(*inputs)

    monkeypatch.setattr(reinforce, "evaluate", slower_than_the_other)
    with pytest.raises(FileExistsError):
        run(model, tmp_path / "two", num_steps=1)
    assert (tmp_path / "two/metrics.jsonl").read_text() == "the other's"


def test_15_a_resumed_run_finds_the_prompts_and_processes_that_it_began_with(model, tmp_path, monkeypatch):
    """The kind: flags are compared, and not what they point to. A reward function may have been mended."""
    for flag in ("prompts", "eval_prompts"):
        file = prompts_file(tmp_path / f"{flag}.jsonl", "a", "b", "the sea", "c")
        folder = run(model, tmp_path / flag, num_steps=1, eval_every=0, **{flag: file})
        with open(file, "a") as lines:
            lines.write('{"prompt": "d"}\n')
        with pytest.raises(reinforce.InputError, match="--resume: other script, files, reward_fn, processes"):
            reinforce.train(reinforce.Args(resume=str(folder), num_steps=2))
        prompts_file(Path(file), "a", "b", "the sea", "c")
        reinforce.train(reinforce.Args(resume=str(folder), num_steps=2))
    monkeypatch.setattr(reinforce.Accelerator, "num_processes", 2)
    with pytest.raises(reinforce.InputError, match="processes"):
        reinforce.train(reinforce.Args(resume=str(folder), num_steps=3))


def test_15_a_run_on_a_function_goes_on_with_one(model, tmp_path):
    """In Python, where no flag names it: its curve would go on in lexical richness."""

    def reward_fn(completions, **_):
        return [float(len(completion)) for completion in completions]

    folder = reinforce.train(reinforce.Args(model=model, output_dir=str(tmp_path / "own"), **TINY), reward_fn)
    with pytest.raises(reinforce.InputError, match="--resume: .*reward_fn"):
        reinforce.train(reinforce.Args(resume=str(folder), num_steps=4))
    reinforce.train(reinforce.Args(resume=str(folder), num_steps=4), reward_fn)
    folder = run(model, tmp_path / "richness", num_steps=1, eval_every=0)
    with pytest.raises(reinforce.InputError, match="--resume: .*reward_fn"):
        reinforce.train(reinforce.Args(resume=str(folder), num_steps=2), reward_fn)


def test_16_a_reward_function_may_change_what_it_gets(model, tmp_path):
    """The kind: the run's own objects are handed out; prompts, and what columns hold."""
    messages = [[{"role": "user", "content": word}] for word in ("a", "the sea", "sun", "the")]
    file = prompts_file(tmp_path / "prompts.jsonl", *messages, answers=["x"])
    seen = []

    def reward_fn(prompts, completions, completion_ids, answers, **_):
        assert all(len(prompt) == 1 for prompt in prompts) and all(answer == ["x"] for answer in answers)
        for prompt, completion, answer, ids in zip(prompts, completions, answers, completion_ids):
            prompt.extend(completion)
            answer.append("y")
            ids.clear()
        seen.append(len(prompts))
        return [float(i) for i in range(len(prompts))]

    folder = run(model, tmp_path / "run", reward_fn=reward_fn, prompts=file, eval_every=0)
    assert len(seen) >= 4 and all(len(row["prompt"]) == 1 for row in read(folder, "completions.jsonl"))


def test_17_code_that_a_model_brings_is_not_run_and_not_asked_about(tmp_path, monkeypatch):
    """The kind: a library's advice names a flag that we do not have; the message names where to write True."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    name = save_policy(tmp_path / "custom")
    config = json.loads((tmp_path / "custom" / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}, "model_type": "nobody-knows"}
    (tmp_path / "custom" / "config.json").write_text(json.dumps(config))
    (tmp_path / "custom" / "c.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(reinforce.InputError, match="trust_remote_code=True"):
        run(name, tmp_path / "run")
    assert 'trust_remote_code": False}  #' in Path(reinforce.__file__).read_text()


@pytest.mark.parametrize(
    "ends, stop",
    [("<im_end>\n", True), (" <im_end>", True), ("<im_end>\n<im_start>", True), ("\n", False), (" the end", False)],
)
def test_18_the_templates_own_end_of_turn_stops(ends, stop):
    """The kind: an end that is neither the model's EOS nor the tokenizer's; where it is one token."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<im_end>", "<im_start>"]})
    tokenizer.chat_template = "{% for m in messages %}<im_start>{{ m.role }}\n{{ m.content }}" + ends
    tokenizer.chat_template += "{% endfor %}{% if add_generation_prompt %}<im_start>assistant\n{% endif %}"
    policy = make_policy(llama_config(len(tokenizer)))
    end = tokenizer.convert_tokens_to_ids("<im_end>")
    stops = reinforce.make_sampler(policy, tokenizer, reinforce.Args()).generation_config.eos_token_id
    assert stops == ([1, end] if stop else [1])
    assert reinforce.make_sampler(
        policy, tokenizer, reinforce.Args(chat_template=False)
    ).generation_config.eos_token_id == [1]


def test_18_an_end_that_the_tokenizer_does_not_know_is_none():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<eos>", "<nobody>")
    assert reinforce.read_template(tokenizer, reinforce.Args())[1] is None


@pytest.mark.parametrize(
    "labels, said",
    [
        ({0: "positive", 1: "negative", 2: "neutral"}, "reward: positive is 1, negative is 2, neutral is 3 of "),
        ({0: "good"}, "reward: the score of "),
    ],
)
def test_19_labels_and_their_worth_are_said(tmp_path, capsys, labels, said):
    """The kind: numbers are given to names in the order of a file, and nobody sees it."""
    config = llama_config(27, pad_token_id=0)
    config.id2label = labels
    name = save_reward_model(tmp_path / "reward", len(labels), config=config)
    saved = json.loads((tmp_path / "reward" / "config.json").read_text()) | {"id2label": labels}
    (tmp_path / "reward" / "config.json").write_text(json.dumps(saved))
    reinforce.load_reward_fn(reinforce.Args(reward_model=name), CPU)
    assert capsys.readouterr().out == f"{said}{name}\n"
