"""Several turns: the gradient by enumeration, which tokens are trained, environments of all kinds, and whole runs."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import pytest
import torch
from test_run import TINY, flags, fork_group, read, same, weights
from tiny import (
    WORDS,
    exact_logprobs,
    float64,
    fork,
    gradient,
    llama_config,
    make_byte_tokenizer,
    make_policy,
    save_policy,
    start,
)
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from nano_rl import multi_turn, rloo

CPU = torch.device("cpu")


class Echo:
    """Says something again, for a number of turns, and rewards each action by its length."""

    turns = 2

    def reset(self, prompt: str):
        self.left = self.turns
        return prompt, {}

    def step(self, action: str):
        self.left -= 1
        return "the sun falls", reward_of(action), self.left == 0, False, {}


def reward_of(action: str) -> float:
    return float(len(action) % 2)


def make_echo(turns: int) -> Callable:
    return type("Echo", (Echo,), {"turns": turns})


PROMPTS = [{"prompt": f"write {word}"} for word in WORDS[:16]]


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return str(path)


def train(model: str, folder: Path, prompts: str = "", make_env: Callable | None = Echo, **args) -> Path:
    args = TINY | {"model": model, "prompts": prompts, "output_dir": str(folder), "max_new_tokens": 3} | args
    return multi_turn.train(multi_turn.Args(**args), make_env)


# ---- The algorithm --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    """Every episode of a small environment that answers at random: its probability under both, and its file's tensors.

    An action is one of four tokens; 1 ends the episode, after another comes 2 or 3, by chance, and a second action."""
    policy = float64(make_policy(llama_config(4)))
    prompt, generator = [2, 3], torch.Generator().manual_seed(4)
    chances, draw = {}, lambda: torch.rand(1, generator=generator).item()
    episodes = []
    for first in range(4):
        chances[first] = 0.2 + 0.6 * draw()
        reward = draw()
        for said, second in [(None, None)] if first == 1 else itertools.product((2, 3), range(4)):
            ids = prompt + [first] + ([] if said is None else [said, second])
            mask, turns = ([1], [0]) if said is None else ([1, 0, 1], [0, 0, 1])
            chance = 1 if said is None else chances[first] if said == 2 else 1 - chances[first]
            rewards = [reward, 0.0 if said is None else draw() * 2]
            episode = {"ids": ids, "num_prompt": 2, "mask": mask, "turns": turns, "rewards": rewards, "chance": chance}
            episodes.append(episode)
    batch = multi_turn.collate(episodes, 0, CPU)
    logprobs = multi_turn.compute_logprobs(policy, batch, 0.6)  # (25, 3)
    exact = []  # log π of each action, from unpadded passes
    for episode in episodes:
        ids, actions = episode["ids"], [t for t, sampled in enumerate(episode["mask"], start=2) if sampled]
        exact.append(torch.stack([exact_logprobs(policy, ids[:t], [[ids[t]]], 0.6)[0] for t in actions]))
    chance = torch.tensor([episode["chance"] for episode in episodes], dtype=torch.float64)
    probabilities = chance * torch.stack([log.sum() for log in exact]).exp()
    rewards = torch.tensor([episode["rewards"] for episode in episodes], dtype=torch.float64)
    return SimpleNamespace(
        policy=policy, batch=batch, logprobs=logprobs, exact=exact, probabilities=probabilities, rewards=rewards
    )


def expected_gradient(world, gamma: float) -> torch.Tensor:
    """That of the file's loss, over every pair of episodes; it is linear in the advantages."""
    p, coefficients = world.probabilities.detach(), torch.zeros_like(world.rewards)
    for pair in itertools.product(range(len(p)), repeat=2):
        pair = list(pair)
        advantages = multi_turn.compute_advantages(world.rewards[pair], 2, gamma)
        coefficients.index_add_(0, torch.tensor(pair), p[pair].prod() * advantages)
    advantages = coefficients.gather(1, world.batch["turns"])
    loss = multi_turn.compute_loss(world.logprobs, advantages, world.batch["mask"], num_episodes=2)
    return gradient(loss, world.policy)


def test_the_enumeration_is_complete(world):
    assert world.probabilities.sum().item() == pytest.approx(1, abs=1e-12) and len(world.exact) == 25
    for row, exact in enumerate(world.exact):
        sampled = world.batch["mask"][row].bool()
        torch.testing.assert_close(world.logprobs[row][sampled], exact, atol=1e-9, rtol=0)
        assert world.logprobs[row][~sampled].tolist() == [0] * int((~sampled).sum()), "what is only read"


def test_the_expected_gradient_is_that_of_the_expected_return(world):
    truth = gradient((world.probabilities * world.rewards.sum(dim=1)).sum(), world.policy)
    assert truth.norm() > 1e-2
    torch.testing.assert_close(-expected_gradient(world, 1.0), truth, atol=1e-9, rtol=0)


def test_a_discount_weighs_the_future_of_each_turn_alike(world):
    """E[Σ_k R_k ∇ log π(a_k)], where R_k begins with the full reward of turn k, whatever k."""
    total = 0.0
    for p, (r_0, r_1), exact in zip(world.probabilities.detach(), world.rewards, world.exact):
        total = total + p * ((r_0 + 0.5 * r_1) * exact[0] + (r_1 * exact[1] if len(exact) == 2 else 0))
    truth = gradient(total, world.policy)
    torch.testing.assert_close(-expected_gradient(world, 0.5), truth, atol=1e-9, rtol=0)
    assert (truth + expected_gradient(world, 1.0)).norm() > 1e-3


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0])
def test_advantages_and_loss_against_naive_loops(gamma):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    advantages = multi_turn.compute_advantages(rewards, 3, gamma)
    for i, k in itertools.product(range(6), range(4)):
        returns = [sum(gamma ** (m - k) * rewards[j, m].item() for m in range(k, 4)) for j in range(6)]
        others = [returns[j] for j in range(i // 3 * 3, i // 3 * 3 + 3) if j != i]
        assert advantages[i, k].item() == pytest.approx(returns[i] - sum(others) / 2, abs=1e-12)
    logprobs, mask = -torch.rand(6, 5, generator=generator), torch.rand(6, 5, generator=generator) > 0.5
    of_tokens = torch.randn(6, 5, generator=generator)
    loss = -sum(of_tokens[i, t] * logprobs[i, t] / 9 for i in range(6) for t in range(5) if mask[i, t])
    torch.testing.assert_close(multi_turn.compute_loss(logprobs, of_tokens, mask, num_episodes=9), loss)


def test_advantages_by_hand():
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    assert multi_turn.compute_advantages(rewards, 2, 1.0).tolist() == [[1, 1], [-1, -1]]
    assert multi_turn.compute_advantages(rewards, 2, 0.5).tolist() == [[0.5, 1], [-0.5, -1]]


def test_one_turn_is_rloo(model, prompts, tmp_path):
    ours = train(model, tmp_path / "ours", prompts, make_echo(1), kl_coef=0.1)
    options = TINY | {"max_new_tokens": 3, "kl_coef": 0.1}
    args = rloo.Args(model=model, prompts=prompts, output_dir=str(tmp_path / "rloo"), **options)
    theirs = rloo.train(args, lambda completions, **_: [reward_of(text) for text in completions])
    assert same(weights(ours), weights(theirs))
    names = "reward reward_std frac_reward_zero_std entropy_estimate kl grad_norm eval/reward eval/kl".split()
    names += ["completions/mean_length", "completions/clipped_ratio"]
    for a, b in zip(read(ours), read(theirs), strict=True):
        assert {name: a.get(name) for name in names} == {name: b.get(name) for name in names}
    assert any(row["grad_norm"] > 0 for row in read(ours)[1:]) and read(ours)[2]["kl"] != 0


def test_turns_add_up(model, prompts, tmp_path):
    """Two, each with a reward of 1, and each cut off but where the one token is a stop."""

    def step(self, action):
        self.left -= 1
        return "", 1.0, self.left == 0, False, {}

    always = type("Always", (Echo,), {"step": step})
    rows = read(train(model, tmp_path / "run", prompts, always, num_steps=1, max_new_tokens=1))
    assert rows[0]["eval/reward"] == rows[1]["reward"] == 2 and 0.5 < rows[1]["completions/clipped_ratio"] <= 1


def test_equal_rewards_move_nothing(model, prompts, tmp_path):
    """Three times 0.1 is not 0.3 in float64, nor is 2.7 - 0.9 twice 0.9."""
    same_for_all = type("Same", (Echo,), {"step": lambda self, action: ("", 0.1, True, False, {})})
    rows = read(train(model, tmp_path / "run", prompts, same_for_all, batch_size=4, group_size=4))[1:]
    assert rows and all(row["frac_reward_zero_std"] == 1 and row["grad_norm"] == 0 for row in rows)

    def step(self, action):
        self.left -= 1
        return "", float(self.left == 0), self.left == 0, False, {}

    at_the_end = type("AtTheEnd", (Echo,), {"step": step})
    options = dict(num_steps=1, batch_size=6, group_size=3, gamma=0.9)
    row = read(train(model, tmp_path / "two", prompts, at_the_end, **options))[1]
    assert row["frac_reward_zero_std"] == 1 and row["grad_norm"] < 1e-9


def test_one_start_beside_those_that_are_held_out(model, prompts, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps(PROMPTS[0]) + "\n")
    folder = train(model, tmp_path / "run", str(tmp_path / "one.jsonl"), eval_prompts=prompts, num_steps=1)
    assert len(read(folder)) == 2


def test_each_turn_pays_for_its_own_kl(model, prompts, tmp_path, monkeypatch):
    """And --gamma arrives."""
    calls, names = [], ("play", "score_logprobs", "compute_advantages")
    for name in names:
        function = getattr(multi_turn, name)

        def spy(*inputs, name=name, function=function):
            calls.append((name, inputs, function(*inputs)))
            return calls[-1][2]

        monkeypatch.setattr(multi_turn, name, spy)
    train(model, tmp_path / "run", prompts, eval_every=0, kl_coef=0.3, gamma=0.5)
    i = max(i for i, (name, _, _) in enumerate(calls) if name == "compute_advantages")  # of the last step
    (_, _, (batch, episodes)), (_, _, logprobs), (_, _, ref_logprobs), (_, inputs, _) = calls[i - 3 : i + 1]
    kl = logprobs - ref_logprobs
    for row, episode in enumerate(episodes):
        for k in range(8):
            of_turn = sum(kl[row, t].item() for t in range(kl.shape[1]) if batch["turns"][row, t] == k)
            assert inputs[0][row, k].item() == pytest.approx(episode["rewards"][k] - 0.3 * of_turn, abs=1e-5)
    assert kl.abs().sum() > 1e-3 and inputs[1:] == (4, 0.5) and [len(e["rewards"]) for e in episodes] == [8] * 4


def test_no_sampler_is_kept(tmp_path):
    policy, tokenizer, args = load(tmp_path, make_byte_tokenizer(), max_new_tokens=4)
    sampler = multi_turn.make_sampler(policy, tokenizer, args)
    multi_turn.play(sampler, tokenizer, args, PROMPTS[:2], Echo)
    alive = weakref.ref(sampler)
    del sampler
    assert alive() is None


# ---- What is trained ------------------------------------------------------------------------------------------------


def load(tmp_path, tokenizer, **args):
    model = save_policy(tmp_path / "policy", llama_config(len(tokenizer), max_position_embeddings=512), tokenizer)
    args = multi_turn.Args(**{"model": model, "temperature": 1.0} | args)
    policy, _, tokenizer = multi_turn.load_policy(args, CPU)
    return policy, tokenizer, args


@pytest.mark.parametrize("chat_template", [True, False])
def test_the_sampled_ids_are_trained_and_the_environments_are_read(tmp_path, monkeypatch, chat_template):
    """In episodes of one to three turns, in one batch."""
    monkeypatch.setattr(multi_turn, "has_bfloat16", lambda device: False)  # whose rounding is larger
    options = {"max_new_tokens": 4, "temperature": 0.8, "chat_template": chat_template}
    policy, tokenizer, args = load(tmp_path, make_byte_tokenizer(), **options)
    calls, sample = [], multi_turn.sample

    def spy(sampler, tokenizer, examples, temperature):
        assert temperature == 0.8
        batch, texts = sample(sampler, tokenizer, examples, temperature)
        sampled = [row[mask.bool()].tolist() for row, mask in zip(ids_of(batch), batch["mask"])]
        calls.append([(list(example["prompt_ids"]), ids) for example, ids in zip(examples, sampled)])
        return batch, texts

    def ids_of(batch):
        return batch["input_ids"][:, -batch["mask"].shape[1] :]

    monkeypatch.setattr(multi_turn, "sample", spy)
    envs = iter([make_echo(turns)() for turns in (1, 3, 2)])
    torch.manual_seed(0)
    sampler = multi_turn.make_sampler(policy, tokenizer, args)
    starts = [{"prompt": f"é {i}"} for i in range(3)]
    batch, episodes = multi_turn.play(sampler, tokenizer, args, starts, lambda: next(envs))
    assert [episode["num_turns"] for episode in episodes] == [1, 3, 2] and [len(call) for call in calls] == [3, 2, 1]
    logprobs = multi_turn.compute_logprobs(policy, batch, 1.0)
    for row, (turns, places) in enumerate([(1, [0]), (3, [1, 0, 0]), (2, [2, 1])]):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        sampled, expected = [], []
        for call, place in zip(calls, places):
            context, action = call[place]
            assert ids[: len(context) + len(action)] == context + action, "as they were sampled, and what they followed"
            sampled += action
            expected.append(exact_logprobs(policy, context, [action], 1.0).item())
            text = tokenizer.decode(context)
            assert text.endswith(
                "<assistant>" if chat_template else f"é {row}" if not expected[1:] else "the sun falls"
            )
        mask = batch["mask"][row].bool()
        assert batch["input_ids"][row][-len(mask) :][mask].tolist() == sampled
        assert logprobs[row].sum().item() == pytest.approx(sum(expected), abs=1e-4)
        assert batch["turns"][row][mask].max() == turns - 1


def test_an_observation_follows_an_action_as_the_template_has_it():
    tokenizer, args = make_byte_tokenizer(), multi_turn.Args()
    eos, assistant = tokenizer.convert_tokens_to_ids(["<eos>", "<assistant>"])

    def after(stop_id=None, text="b", continues=False):
        return tokenizer.decode(multi_turn.encode_answer(tokenizer, args, text, stop_id, continues))

    assert tokenizer.decode(multi_turn.encode_beginning(tokenizer, args, "b")) == "<user> b <assistant>"
    assert after() == " <eos><user> b <assistant>", "its turn is ended"
    assert after(eos) == "<user> b <assistant>", "it has ended it itself"
    assert after(assistant) == " <eos><user> b <assistant>", "a stop token that opens the next turn, as Phi has"
    assert after(assistant, "a <eos> b") == " <eos><user> a <eos> b <assistant>", "what is said is whole"
    assert after(continues=True) == after(eos, continues=True) == "b"
    args.chat_template = False
    assert after() == tokenizer.decode(multi_turn.encode_beginning(tokenizer, args, "b")) == "b"
    assert after(eos, "a <eos> b") == "a <eos> b"


def test_words_that_go_on_have_no_space_before_them():
    """SentencePiece's tokenizers put one before every text."""
    words = {word: i for i, word in enumerate(["<unk>", "▁", "\n", *"0123456789<>=*ab"])}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert fast.decode(fast("12>>")["input_ids"]) == " 12>>"
    assert fast.decode(multi_turn.encode_answer(fast, multi_turn.Args(), "12>>", None, True)) == "12>>"


@pytest.mark.parametrize("stop, limit, ends", [("", 5, {"length", "stop"}), ("[a-z]", 120, {"string", "stop"})])
def test_where_an_action_ends(tmp_path, stop, limit, ends):
    policy, tokenizer, args = load(tmp_path, make_byte_tokenizer(), max_new_tokens=limit)
    sampler = multi_turn.make_sampler(policy, tokenizer, args)
    torch.manual_seed(1)
    prompts = [[10 + i, 20] for i in range(64)]

    def text_of(ids: list[int]) -> str:
        return tokenizer.decode(ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids)

    actions = multi_turn.sample_actions(sampler, tokenizer, prompts, 1.0, SimpleNamespace(stop=stop))
    assert {end for _, _, end in actions} >= ends - {"stop"} and {end for _, _, end in actions} <= ends
    for ids, text, end in actions:
        assert (ids[-1] == tokenizer.eos_token_id) == (end == "stop") and 1 <= len(ids) <= limit
        assert text == text_of(ids)
        assert end != "length" or len(ids) == limit
        found = [bool(stop) and bool(re.search(stop, text_of(ids[:count]))) for count in range(len(ids) + 1)]
        assert found == [False] * len(ids) + [end == "string"], "it ends at the first"
    if stop:
        assert max(len(ids) for ids, _, _ in actions) < limit, "nobody waits for the longest possible"


# ---- Environments ---------------------------------------------------------------------------------------------------


def test_halving_always_finds_the_number():
    env = multi_turn.HigherOrLower()
    starts = env.starts()
    assert len(starts) == 84 == len({(row["low"], row["secret"]) for row in starts})
    held_out = {row["low"] for row in starts[-21:]}
    assert len(held_out) == 3 and not held_out & {row["low"] for row in starts[:-21]}
    for row in starts:
        assert env.reset(**row)[0] == f"Guess my number from {row['low']} to {row['low'] + 6}. Answer with a number."
        low, high, terminated, rewards = row["low"], row["low"] + 6, False, []
        while not terminated:
            guess = (low + high) // 2
            answer, reward, terminated, truncated, _ = env.step(f"{guess}")
            rewards.append(reward)
            low, high = (guess + 1, high) if answer.startswith("Higher") else (low, guess - 1)
            assert terminated or answer.endswith(f", from {low} to {high}.")
        assert sum(rewards) == rewards[-1] == 1 and len(rewards) <= 3 and not truncated


@pytest.mark.parametrize("action, answer", [
    ("3", "Higher, from 4 to 7."), ("It is 3.", "Higher, from 4 to 7."), ("6", "Lower, from 1 to 5."),
    ("9", "Lower, from 1 to 7."), ("0", "Higher, from 1 to 7."), ("3 or 5", "Answer with one number."),
    ("5.", "Right."), ("05", "Right."), ("５", "Right."),
    ("", "Answer with one number."), ("9" * 5000, "Answer with one number."), ("5 5", "Answer with one number."),
])  # fmt: skip
def test_the_games_answers(action, answer):
    env = multi_turn.HigherOrLower()
    env.reset(low=1, secret=5)
    assert env.step(action) == (answer, float(answer == "Right."), answer == "Right.", False, {})
    env.reset(low=1, secret=5)
    assert [env.step(guess)[0] for guess in ("3", "1")] == ["Higher, from 4 to 7."] * 2, "no guess brings a number back"
    env.step("2"), env.reset(low=1, secret=5)
    assert [env.step("2")[2] for _ in range(3)] == [False, False, True]


def test_a_question_is_answered_line_by_line():
    env = multi_turn.Lines()
    assert env.reset("What is 3 times 4, and 1?", "3*4=<<3*4=12>>12\n#### 13")[0].startswith(
        "What is 3 times 4, and 1?\n"
    )
    assert env.step("First <<3*4=") == ("12>>", 0.0, False, False, {})
    assert env.step("12\n") == ("", 0.0, False, False, {})
    assert env.step("#### 13") == ("", 1.0, True, False, {})
    env.reset("?", "12")
    assert env.step("#### <<3*4=") == ("12>>", 0.0, False, False, {})
    assert env.step("12\n") == ("", 1.0, True, False, {}), "an answer may be calculated"
    env.reset("?", "12")
    for action in ("First 3\n  ", "<<3-5=-", "2>>\n", "=\n\n", "<<3*4=\n"):
        assert env.step(action) == ("", 0.0, False, False, {}), "a token may go on after what it ends at"
    assert env.step("a line that is too lo") == ("", 0.0, True, False, {})
    right, wrong = ("#### 13\n", "#### 13.0", "#### 1,3"), ("####", "13", "#### 14", "#### -13")
    for last, reward in [(last, 1) for last in right] + [(last, 0) for last in wrong]:
        env.reset("?", "13")
        env.step("12 is next to\n")
        assert env.step(last)[1:3] == (reward, True)
    with pytest.raises(multi_turn.InputError, match="no number in the answer 'none' to '?'"):
        env.reset("?", "none")


RIGHT = {
    "3*4": "12", " 3 * 4 ": "12", "48/2": "24", "1/3": "0.3333333333", "0.5*4": "2", "-3+1": "-2", "--3": "3",
    "+3": "3", "(1+2)*3": "9", "1+2*3": "7", "10/4": "2.5", "0.1+0.2": "0.3", "1,000*3": "3000", "2-5": "-3",
    ".5+.5": "1", "7": "7", "1e3*2": "2000", "1_000+1": "1001", "0x10": "16", "9" * 15: "9" * 15, "-" * 90 + "1": "1",
    "(" * 45 + "1" + ")" * 45: "1", "1e14*9": "900000000000000",
}  # fmt: skip
WRONG = {
    "division by 0": ["1/0", "1/(2-2)", "1/0.0"],
    "too large": ["9" * 16, "999999999999999*2", "-1e15", "1e999", "1e14*10"],
    "too long": ["(" * 60 + "1" + ")" * 60, "+".join(["1"] * 200), "1" + "0" * 200],
    "only numbers, + - * / and brackets": [
        "9**9", "9**9**9", "2^3", "5%3", "7//2", "", " ", "three", "3 apples", "x", "abs(3)", "[1]*9", "'a'*9",
        "True+1", "__import__('os').system('ls')", "1j*1j", "1 if 1 else 2", "1 < 2", "(1;2)", "lambda: 1", "1;2",
        "a:=1", "f'{1}'", "nan", "\0", "\ud800", "１+１", "½*2", "3*4=12", "$3*4", "10%*50", "...", "await x", "(" * 95,
        "not 1", "~1", "1@2",
    ],
}  # fmt: skip


@pytest.mark.parametrize("expression, result", RIGHT.items(), ids=ascii)
def test_the_calculator(expression, result):
    assert multi_turn.calculate(expression) == result


@pytest.mark.parametrize("error, text", [(error, text) for error, texts in WRONG.items() for text in texts], ids=ascii)
def test_what_the_calculator_refuses(error, text):
    assert multi_turn.calculate(text) == f"error: {error}"


class Mood(gymnasium.Env):
    """A text environment as Gymnasium has them."""

    observation_space = action_space = gymnasium.spaces.Text(500)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.turn = 0
        return f"write about {self.np_random.choice(['the sea', 'a song'])}", {}

    def step(self, action: str):
        self.turn += 1
        return "and now?", float("sea" in action), False, self.turn == 3, {}


def test_an_environment_of_gymnasium_works_unchanged(model, tmp_path):
    path = tmp_path / "seeds.jsonl"
    path.write_text("".join(json.dumps({"seed": seed}) + "\n" for seed in range(8)))
    folder = train(model, tmp_path / "run", str(path), None, env="test_multi_turn:Mood", num_steps=1)
    (row,) = read(folder)[1:]
    assert row["episodes/turns"] == 3 and row["episodes/truncated"] == 1 and row["eval/turns"] == 3
    lines = read(folder, "completions.jsonl")
    assert {line["prompt"] for line in lines} == {"write about the sea", "write about a song"}
    assert all(line["completion"].count("[environment] and now?") == 3 for line in lines)
    assert lines[0]["completion"].startswith("[policy, ")


class Broken(Echo):
    answer = ("a", 0.0, False, False, {})
    beginning = ("the sea", {})

    def reset(self, prompt: str):
        return self.beginning

    def step(self, action: str):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_every_environment_is_closed(model, prompts, tmp_path):
    made = []

    class Door(Echo):
        is_open = False

        def __init__(self):
            made.append(self)

        def reset(self, prompt: str):
            self.is_open = True
            return super().reset(prompt)

        def close(self):
            self.is_open = False

    train(model, tmp_path / "run", prompts, Door, num_steps=1)
    assert len(made) > 16 + 4 and not any(door.is_open for door in made)


def test_an_environment_that_raises(model, prompts, tmp_path):
    broken = type("Broken", (Broken,), {"answer": ZeroDivisionError("its own")})
    with pytest.raises(ZeroDivisionError, match="its own"):
        train(model, tmp_path / "run", prompts, broken)


WRONG_ANSWERS = [(None, 0.0, False, False, {}), ("a", math.nan, False, False, {}), ("a", None, False, False, {})]


@pytest.mark.parametrize("answer", [*WRONG_ANSWERS, ("a", 1.0, False), None], ids=str)
def test_an_environment_that_answers_wrongly(model, prompts, tmp_path, answer):
    broken = type("Broken", (Broken,), {"answer": answer})
    with pytest.raises(multi_turn.InputError, match=r"must answer an action with \(text, finite number, terminated, "):
        train(model, tmp_path / "run", prompts, broken)


@pytest.mark.parametrize("beginning", [(3, {}), "ab", None, ("a", {}, 1), 3], ids=str)
def test_an_environment_that_begins_wrongly(model, prompts, tmp_path, beginning):
    with pytest.raises(multi_turn.InputError, match=r"reset\(\) must return \(text, info\), not "):
        train(model, tmp_path / "run", prompts, type("Broken", (Broken,), {"beginning": beginning}))
    assert not (tmp_path / "run").exists()


def test_a_start_that_does_not_fit_is_found_before_the_run(model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*PROMPTS[:9], {"prompt": "sea " * 100}, *PROMPTS[9:]]))
    with pytest.raises(multi_turn.InputError, match="102 tokens; context less .* leaves 61: {'prompt': 'sea"):
        train(model, tmp_path / "run", str(path))
    assert not (tmp_path / "run").exists()


def test_an_environment_that_never_ends(model, prompts, tmp_path):
    """By the number of turns, and by the context of 64 tokens."""
    rows = read(train(model, tmp_path / "few", prompts, Broken, num_turns=3, num_steps=1))
    assert rows[1]["episodes/turns"] == 3 and rows[1]["episodes/truncated"] == 1
    broken = type("Broken", (Broken,), {"answer": ("the sea sings " * 4, 0.5, False, False, {})})
    rows = read(train(model, tmp_path / "full", prompts, broken, num_turns=40, num_steps=1))
    assert 2 <= rows[1]["episodes/turns"] <= 4 and rows[1]["episodes/truncated"] == 1
    assert rows[1]["reward"] == pytest.approx(rows[1]["episodes/turns"] / 2)


def test_what_cannot_be_played(model, tmp_path):
    def error(**args):
        with pytest.raises(multi_turn.InputError) as caught:
            train(model, tmp_path / "run", make_env=None, **args)
        return str(caught.value)

    assert "cannot import --env Chess as module:Class" in error(env="Chess")
    assert "cannot import --env test_multi_turn:Chess as module:Class" in error(env="test_multi_turn:Chess")
    assert "give --prompts with 3 different lines" in error(env="Lines")
    twice = '{"low": 1, "secret": 2}\n{"secret": 2, "low": 1}\n{"low": 1, "secret": 3}\n'
    (tmp_path / "rows.jsonl").write_text(twice)
    assert "give --prompts with 3 different lines" in error(prompts=str(tmp_path / "rows.jsonl"))
    assert "cannot read none.jsonl: each line must be a JSON object" in error(prompts="none.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"low": 1, "secret": 2}\n[1]\n')
    assert "rows.jsonl, line 2: each line must be a JSON object" in error(prompts=str(tmp_path / "rows.jsonl"))
    assert "give --prompts with 3 different" in error(env="Lines", eval_prompts=str(tmp_path / "rows.jsonl"))
    assert "--group-size 3: must be 2 or more and divide --batch-size 4" in error(group_size=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'prompt'"):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
        train(model, tmp_path / "other", str(tmp_path / "rows.jsonl"), None)


# ---- Whole runs -----------------------------------------------------------------------------------------------------


def test_the_games_of_this_file(tmp_path):
    tokenizer = make_byte_tokenizer()
    model = save_policy(tmp_path / "policy", llama_config(len(tokenizer), max_position_embeddings=512), tokenizer)
    rows = read(train(model, tmp_path / "game", make_env=None, num_steps=1))
    assert rows[1]["episodes/turns"] == 3 and rows[1]["episodes/truncated"] == 0


def test_a_question_is_played_line_by_line(tmp_path, monkeypatch):
    """With what `generate` would write: a calculation, the rest of its line, and the answer in a token of its own."""
    policy, tokenizer, args = load(tmp_path, make_byte_tokenizer(), max_new_tokens=9)
    script = iter(["so <<3*4=", "12\n", "#### 12"])

    def generate(sampler, input_ids, stopping_criteria, **_):
        action = tokenizer(next(script))["input_ids"]
        stop = action == [] or "####" in tokenizer.decode(action)
        for length in range(1, len(action) + 1):
            whole = torch.cat([input_ids, torch.tensor([action[:length]])], dim=1)
            assert stopping_criteria[0](whole, None).tolist() == [length == len(action) and not stop]
        return torch.cat([whole, torch.tensor([[tokenizer.eos_token_id]])], dim=1) if stop else whole

    sampler = multi_turn.make_sampler(policy, tokenizer, args)
    monkeypatch.setattr(type(sampler), "generate", generate)
    start = {"question": "What is 3 times 4?", "answer": "#### 12"}
    batch, (episode,) = multi_turn.play(sampler, tokenizer, args, [start], multi_turn.Lines)
    sampled = tokenizer.decode(batch["input_ids"][0, -batch["mask"].shape[1] :][batch["mask"][0].bool()])
    assert sampled == "so <<3*4=12\n#### 12<eos>" and tokenizer.decode(episode["ids"]).endswith(
        "<assistant>so <<3*4=12>>12\n#### 12<eos>"
    )
    assert episode["transcript"].splitlines() == [
        "[policy, string] so <<3*4=",
        "[environment] 12>>",
        "[policy, string] 12",
        "    ",
        "[policy, stop] #### 12",
    ]
    assert episode["rewards"] == [0, 0, 1, 0, 0, 0, 0, 0] and episode["end"] == "terminated"
    assert [batch["turns"][0].tolist().count(k) for k in range(3)] == [9 + 4, 3, 8]


def test_micro_batches_do_not_change_a_run(model, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(multi_turn, "has_bfloat16", lambda device: False)  # whose rounding depends on the batch
    options = {"num_steps": 1, "eval_every": 0, "batch_size": 8, "max_grad_norm": 1e-3, "kl_coef": 0.1}
    one, all_at_once = (
        read(train(model, tmp_path / str(n), prompts, micro_batch_tokens=n, **options))[1] for n in (1, 9999)
    )
    assert one["grad_norm"] == pytest.approx(all_at_once["grad_norm"], rel=1e-4) and one["grad_norm"] > 0


def train_and_die(model: str, folder: Path, prompts: str) -> None:
    log = multi_turn.Run.log

    def log_and_die(run, step, *rest):
        log(run, step, *rest)
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    multi_turn.Run.log = log_and_die
    train(model, folder, prompts, num_steps=4, save_minutes=0)


def test_a_killed_run_goes_on_to_the_same_bits(model, prompts, tmp_path):
    straight = train(model, tmp_path / "straight", prompts, num_steps=4, save_minutes=0)
    killed = fork(train_and_die, model, tmp_path / "killed", prompts)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and not (tmp_path / "killed/policy").exists()
    multi_turn.train(multi_turn.Args(resume=str(tmp_path / "killed")), Echo)
    assert read(tmp_path / "killed") == read(straight)
    assert read(tmp_path / "killed", "completions.jsonl") == read(straight, "completions.jsonl")
    assert same(weights(tmp_path / "killed"), weights(straight))


def test_adapters_are_trained_and_merged(model, prompts, tmp_path):
    folder = train(model, tmp_path / "run", prompts, lora_rank=2, learning_rate=0.02, num_steps=2)
    start = multi_turn.transformers.AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert weights(folder).keys() == start.keys() and not same(weights(folder), start)


def test_a_copied_file_trains(model, tmp_path):
    """Alone in an empty folder, without this project on the path."""
    copied = Path(shutil.copy(multi_turn.__file__, tmp_path))
    (tmp_path / "probe.py").write_text(
        "class Short:\n    def reset(self, x):\n        return 'write', {}\n"
        "    def step(self, a):\n        return '', len(a) % 2, True, False, {}\n"
    )
    (tmp_path / "x.jsonl").write_text('{"x": 1}\n{"x": 2}\n{"x": 3}\n')
    done = start(tmp_path, copied, *flags(model=model, env="probe:Short", prompts="x.jsonl", output_dir="run", **TINY))
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read(tmp_path / "run")] == [0, 1, 2, 3] and (tmp_path / "run/policy").is_dir()


def train_divided(rank: int, processes: int, args: dict) -> None:
    """A row's random numbers depend on its place in the whole batch, however it is divided."""
    clip, sample = torch.nn.utils.clip_grad_norm_, multi_turn.sample
    place, grads = {"seed": -1, "call": 0, "token": 0}, []

    def set_seed(seed):  # an evaluation has an even number, a step an odd one
        place.update(seed=place["seed"] + 1, call=-1)

    def sample_by_place(sampler, tokenizer, examples, temperature):  # two turns: an evaluation's parts come in twos
        place.update(call=place["call"] + 1, token=0)
        first = rank * len(examples)
        if place["seed"] % 2 == 0:
            first = rank * 32 // processes + place["call"] // 2 * len(examples)

        def rand_like(column):  # (n, 1), one number a row
            place["token"] += 1
            seed = 10_000 * place["seed"] + 100 * (place["call"] % 2) + place["token"]
            drawn = torch.rand(100, 1, dtype=column.dtype, generator=torch.Generator().manual_seed(seed))
            return drawn[first : first + len(column)]

        torch.rand_like = rand_like
        return sample(sampler, tokenizer, examples, temperature)

    def keep_and_clip(parameters, max_norm):
        grads.append([parameter.grad.clone() for parameter in parameters])
        return clip(parameters, max_norm)

    multi_turn.set_seed, multi_turn.sample = set_seed, sample_by_place
    torch.nn.utils.clip_grad_norm_ = keep_and_clip
    multi_turn.has_bfloat16 = lambda device: False  # its rounding depends on the batch
    folder = multi_turn.train(multi_turn.Args(**args), Echo)
    if rank == 0:
        torch.save(grads, folder / "grads.pt")


def test_two_processes_are_one_with_the_doubled_batch(model, prompts, tmp_path):
    folders = []
    for processes in (2, 1):
        folders.append(tmp_path / str(processes))
        args = TINY | {"num_steps": 2, "eval_every": 1, "kl_coef": 0.1, "learning_rate": 1e-4, "max_new_tokens": 3}
        args |= {"model": model, "prompts": prompts, "output_dir": str(folders[-1]), "batch_size": 8 // processes}
        assert fork_group(processes, train_divided, processes, args) == [0] * processes
    two, one = folders
    for ours, theirs in zip(torch.load(two / "grads.pt"), torch.load(one / "grads.pt"), strict=True):
        largest = max(1.0, *(grad.abs().max().item() for grad in theirs))  # what float32 rounds a sum by
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6 * largest, rtol=1e-4)
    for a, b in zip(read(two), read(one), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
