"""compare.py: its statistics against naive loops, whole comparisons of tiny policies, and tables of runs."""

import gc
import importlib
import itertools
import json
import math
import statistics
import sys
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from tiny import exact_logprobs, gpt2_config, make_policy, make_tokenizer, save_policy, save_reward_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import nano_rl.compare as compare
import nano_rl.reinforce as reinforce

TINY = dict(max_new_tokens=8, temperature=1.0)


@pytest.fixture(scope="session")
def other(tmp_path_factory) -> str:
    """A policy of another architecture, whose tokenizer numbers the words differently and has no chat template."""
    words = tiny.WORDS
    tiny.WORDS = words[::-1]
    tokenizer = make_tokenizer(chat=False)
    tiny.WORDS = words
    return save_policy(tmp_path_factory.mktemp("other") / "gpt2", gpt2_config(len(tokenizer)), tokenizer, seed=3)


def policies(folder: Path, *names: str, **args) -> tuple[dict, list[dict]]:
    """The two files that a comparison writes."""
    compare.main(compare.Args(policies=names, output_dir=str(folder), **(TINY | args)))
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.json", "completions.jsonl"]
    rows = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    return json.loads((folder / "comparison.json").read_text()), rows


def refused(**args) -> str:
    """What the user reads."""
    with pytest.raises(compare.InputError) as error:
        compare.main(compare.Args(**args))
    return str(error.value)


@pytest.fixture(autouse=True)
def float32(monkeypatch) -> None:
    """The same arithmetic on all hardware."""
    monkeypatch.setattr(reinforce, "has_bfloat16", lambda device: False)


# ---- Statistics -----------------------------------------------------------------------------------------------------


def naive_p(differences: list[float]) -> float:
    """Every pattern of signs, one by one."""
    observed, count = abs(math.fsum(differences)), 0
    for signs in itertools.product((1, -1), repeat=len(differences)):
        count += abs(math.fsum(sign * d for sign, d in zip(signs, differences))) >= observed - 1e-12
    return count / 2 ** len(differences)


@pytest.mark.parametrize(
    "differences",
    [
        [0.3],
        [0.1] * 7 + [-0.1],
        [5.0, -1e-3, 2.0, 2.0, 0.0],
        [0.6, -0.3, -0.4, 0.2, -0.2],  # sums that are equal, but for their rounding
    ],
)
def test_the_sign_flip_test_is_exact(differences):
    assert compare.sign_flip_test(torch.tensor(differences, dtype=torch.float64)) == naive_p(differences)
    for drawn in torch.randn(10, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist():
        p = compare.sign_flip_test(torch.tensor([*drawn, math.nan], dtype=torch.float64))
        assert p == naive_p(drawn), "a prompt without a value does not count"


def test_the_sign_flip_test_by_hand():
    assert compare.sign_flip_test(torch.ones(8)) == 2 / 2**8
    assert compare.sign_flip_test(-torch.ones(13)) == 2 / 2**13
    assert compare.sign_flip_test(torch.zeros(5)) == 1
    assert compare.sign_flip_test(torch.ones(40)) == 1 / 10_000, "at least the pattern that was seen"
    assert compare.sign_flip_test(torch.zeros(40)) == 1
    assert compare.sign_flip_test(torch.tensor([math.nan])) is None, "no number where there is none"


def test_many_prompts_draw_the_sign_patterns():
    for drawn in torch.randn(3, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.3:
        p = compare.sign_flip_test(drawn)
        assert p == pytest.approx(naive_p(drawn.tolist()), abs=0.02), "10,000 draws: four standard errors at 0.5"
        assert p * 10_000 == pytest.approx(round(p * 10_000)), "so many, not 2^14"
        assert p == compare.sign_flip_test(drawn), "the same draws every time"


def test_estimate():
    values = [1.0, 2.5, -3.0, 4.0]
    mean, error = compare.estimate(torch.tensor([*values, math.nan], dtype=torch.float64))
    assert mean == pytest.approx(statistics.mean(values))
    assert error == pytest.approx(statistics.stdev(values) / 2)
    assert compare.estimate(torch.tensor([3.0])) == (3.0, None)
    assert compare.estimate(torch.tensor([math.nan])) == (None, None)


def test_describe():
    assert compare.describe(["The sun, the sun!", "one", " ...", "a a a b"]) == {
        "type-token ratio": [0.5, 1.0, 0.0, 0.5],
        "words": [4, 1, 0, 4],
        "distinct-2": [pytest.approx(2 / 3), 0.0, 0.0, pytest.approx(2 / 3)],
    }


@pytest.mark.parametrize("config", [tiny.llama_config(27), gpt2_config(27)], ids=["llama", "gpt2"])
def test_perplexity(config):
    """Against an unpadded pass for every prefix; 64 is what the model can read."""
    judge, tokenizer = make_policy(config), make_tokenizer()
    tokenizer.model_max_length = 64  # as `load` sets it
    prompts = ["write about the sea", "old stone", "tree"]
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    texts = ["the sun sings", "far", "", "red blue " * 40, "", ""]
    begun = ["sea", "", ""]  # of the prompt's end, what is the answer's beginning: read once
    rows = list(zip(prompts, prompt_ids, begun))
    examples = [{"prompt": p, "prompt_ids": ids, "begun": b} for p, ids, b in rows for _ in range(2)]
    args = compare.Args(num_samples=2, temperature=0.5)  # the policies' temperature, not the judge's
    answers = [example["begun"] + text for example, text in zip(examples, texts)]
    perplexity = compare.compute_perplexity(judge, tokenizer, examples, args, answers)
    assert perplexity.shape == (3,) and perplexity[2].isnan(), "only empty texts"
    with torch.no_grad():
        first = [tokenizer(text)["input_ids"] for text in texts[:2]]
        logprob = exact_logprobs(judge, prompt_ids[0], first, temperature=1.0).sum()
        assert perplexity[0].item() == pytest.approx(math.exp(-logprob / 4), rel=1e-5), "the mean of all 4 tokens"
        cut = tokenizer(texts[3])["input_ids"][: 64 - 2]
        logprob = exact_logprobs(judge, prompt_ids[1], [cut], temperature=1.0).sum()
        assert perplexity[1].item() == pytest.approx(math.exp(-logprob / 62), rel=1e-5)


# ---- Policies -------------------------------------------------------------------------------------------------------


def test_a_comparison(model, other, tmp_path, capsys, monkeypatch):
    """Three policies, and every number of the table again, from the completions, with loops."""
    (tmp_path / "compare_rewards.py").write_text(
        "def length(prompts, completions, n, **columns): return [len(c) + i for c, i in zip(completions, n)]"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "prompts.jsonl"
    prompts = [f"the {word} sings" for word in tiny.WORDS]
    file.write_text("".join(json.dumps({"prompt": prompt, "n": n}) + "\n" for n, prompt in enumerate(prompts)))
    names = (model, other, save_policy(tmp_path / "third", seed=7))
    options = dict(prompts=str(file), reward_fn="compare_rewards:length", num_samples=3)
    result, rows = policies(tmp_path / "comparison", *names, **options)
    assert result["policies"] == dict(zip("ABC", names)) and result["prompts"] == 5
    assert result["args"]["num_samples"] == 3 and result["args"]["policies"] == list(names)
    held_out = prompts[-5:]  # a quarter of 20, as a run holds out
    assert [row["prompt"] for row in rows] == [prompt for prompt in held_out for _ in range(3)]
    assert len({row[letter]["completion"] for row in rows for letter in "ABC"}) > 20

    judge, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)

    def perplexity(prompt: str, texts: list[str]) -> float:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        texts = [tokenizer(text)["input_ids"] for text in texts if text]
        with torch.no_grad():
            return math.exp(-exact_logprobs(judge, ids, texts, 1.0).sum() / sum(map(len, texts)))

    expected = {}
    for letter in "ABC":
        for start, prompt in zip(range(0, 15, 3), held_out):
            texts = [rows[row][letter]["completion"] for row in range(start, start + 3)]
            rewards = [len(text) + prompts.index(prompt) for text in texts]
            assert rewards == [rows[row][letter]["reward"] for row in range(start, start + 3)]
            words = [text.split() for text in texts]
            for name, value in {
                "reward": statistics.mean(rewards),
                "type-token ratio": statistics.mean(len(set(w)) / max(1, len(w)) for w in words),
                "words": statistics.mean(map(len, words)),
                "distinct-2": statistics.mean(len(set(zip(w, w[1:]))) / max(1, len(w) - 1) for w in words),
                "perplexity at temperature 1": perplexity(prompt, texts),
            }.items():
                expected.setdefault(name, {}).setdefault(letter, []).append(value)
    assert list(result["table"]) == list(expected)
    for name, values in expected.items():
        for letter in "ABC":
            row = {"mean": statistics.mean(values[letter]), "se": statistics.stdev(values[letter]) / math.sqrt(5)}
            if letter != "A":
                differences = [value - first for value, first in zip(values[letter], values["A"])]
                row |= {"difference": statistics.mean(differences), "p": naive_p(differences)}
                row |= {"difference_se": statistics.stdev(differences) / math.sqrt(5)}
            assert result["table"][name][letter] == pytest.approx(row, rel=1e-4, abs=1e-9), (name, letter)

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"A: {model}" and lines[3].startswith("5 prompts, 3 completions of each")
    table = [line.strip("|").split("|") for line in lines if line.startswith("|") and "---" not in line]
    assert [cells[0].strip() for cells in table] == ["", "A", "B", "C", "B - A", "p", "C - A", "p"]
    assert [cell.strip() for cell in table[0][1:]] == list(expected)
    reward = result["table"]["reward"]
    assert table[2][1].strip() == f"{reward['B']['mean']:.3f} ± {reward['B']['se']:.3f}"
    assert table[4][1].strip() == f"{reward['B']['difference']:+.3f} ± {reward['B']['difference_se']:.3f}"
    assert table[5][1].strip() == f"{reward['B']['p']:.3f}"
    place = lines.index(held_out[0])
    assert lines[place + 1 : place + 4] == [f"{letter}: {rows[0][letter]['completion']}" for letter in "ABC"]


def test_a_reward_model(model, other, tmp_path):
    result, rows = policies(tmp_path / "run", model, other, reward_model=save_reward_model(tmp_path / "rm", 3))
    assert all(1 < row[letter]["reward"] < 3 for row in rows for letter in "AB")
    mean = statistics.mean(row["B"]["reward"] for row in rows)
    assert result["table"]["reward"]["B"]["mean"] == pytest.approx(mean)


def test_equal_policies_give_equal_completions(model, tmp_path):
    result, rows = policies(tmp_path / "1", model, model, num_samples=2)
    assert all(row["A"] == row["B"] for row in rows)
    for row in result["table"].values():
        assert row["B"] == row["A"] | {"difference": 0, "difference_se": 0, "p": 1}
    assert len({row["A"]["completion"] for row in rows if row["prompt"] == rows[0]["prompt"]}) == 2
    assert rows == policies(tmp_path / "2", model, model, num_samples=2)[1], "the same seed"
    assert rows != policies(tmp_path / "3", model, model, num_samples=2, seed=1)[1]


def test_the_numbers_are_those_of_a_runs_own_evaluation(model, tmp_path):
    options = dict(TINY, seed=5, brevity_penalty_scale=0.5)
    settings = dict(batch_size=32, num_steps=3, eval_every=0, learning_rate=1e-2)
    run = reinforce.train(reinforce.Args(model=model, output_dir=str(tmp_path / "run"), **settings, **options))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result, _ = policies(tmp_path / "comparison", model, str(run / "policy"), **options)
    for letter, step in ("A", 0), ("B", 3):
        row = result["table"]["reward"][letter]
        assert row["mean"] == pytest.approx(metrics[step]["eval/reward"], abs=1e-6)
        assert row["se"] == pytest.approx(metrics[step]["eval/reward_se"], abs=1e-6)
        assert result["table"]["words"][letter]["mean"] == pytest.approx(metrics[step]["eval/words"])
    assert result["table"]["reward"]["B"]["difference"] != 0


def test_all_prompts_in_batches_of_whole_prompts(model, tmp_path, monkeypatch):
    seeds, batches, sample = [], [], reinforce.sample

    def spy(sampler, tokenizer, examples, temperature):
        batches.append([example["prompt"] for example in examples])
        return sample(sampler, tokenizer, examples, temperature)

    monkeypatch.setattr(reinforce, "sample", spy)
    monkeypatch.setattr(compare, "set_seed", seeds.append)
    result, rows = policies(tmp_path / "run", model, model, all_prompts=True, num_samples=5, seed=3)
    assert result["prompts"] == len(reinforce.TOPICS) == len(rows) / 5
    assert seeds == [3 + start for start in range(0, 160, 30)] * 2, "each policy has the same draws in each batch"
    assert sum(map(len, batches)) == 2 * 160
    for batch in batches:
        assert len(batch) <= 32 and batch == [prompt for prompt in batch[::5] for _ in range(5)]


def test_more_samples_than_a_batch(model, tmp_path):
    """A batch is of whole prompts: here of one, with its four completions."""
    _, rows = policies(tmp_path / "run", model, num_samples=4, batch_size=2)
    assert len(rows) == 4 * 8


def test_the_first_policy_and_one_more_in_memory(model, other, tmp_path, monkeypatch):
    """As a new one is loaded, and as it samples; of the models, by twos a policy and its π_ref, which nothing uses."""
    models, alive, load_policy, make_sampler = [], [], reinforce.load_policy, reinforce.make_sampler

    def look() -> None:
        gc.collect()
        alive.append([number for number, model in enumerate(models) if model()])

    def load(*inputs):
        look()
        loaded = load_policy(*inputs)
        models.extend(map(weakref.ref, loaded[:2]))
        return loaded

    def make(*inputs):
        look()
        return make_sampler(*inputs)

    monkeypatch.setattr(reinforce, "load_policy", load)
    monkeypatch.setattr(reinforce, "make_sampler", make)
    policies(tmp_path / "run", model, other, model, num_samples=1)
    assert alive == [[], [0], [0], [0, 2], [0], [0, 4]]


def test_all_policies_have_one_event_loop(model, other, tmp_path, monkeypatch):
    """As in a run: a client that is made once is of the loop of its first call."""
    (tmp_path / "compare_clients.py").write_text(
        "import asyncio\nloops = []\n"
        "async def reward(completions, **_):\n"
        "    loops.append(asyncio.get_running_loop())\n"
        "    return [0.0] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    policies(tmp_path / "run", model, other, num_samples=1, reward_fn="compare_clients:reward")
    loops = sys.modules["compare_clients"].loops
    assert len(loops) > 1 and len(set(map(id, loops))) == 1


@pytest.mark.parametrize("seed", [-1, 2**32 - 1])
def test_any_seed(model, tmp_path, seed):
    policies(tmp_path / "run", model, num_samples=1, seed=seed)


def test_greedy(model, tmp_path):
    _, rows = policies(tmp_path / "run", model, model, temperature=0, num_samples=2)
    assert all(row["A"] == other["A"] for row, other in zip(rows[::2], rows[1::2]))


def test_a_policy_that_says_nothing(model, tmp_path, monkeypatch, capsys):
    """No words, no perplexity, and JSON that others read, too."""
    sample = reinforce.sample
    monkeypatch.setattr(reinforce, "sample", lambda *inputs: (sample(*inputs)[0], [""] * len(inputs[2])))
    result, _ = policies(tmp_path / "run", model, model)
    nothing = dict.fromkeys(("mean", "se", "difference", "difference_se", "p"))
    assert result["table"]["perplexity at temperature 1"]["B"] == nothing
    assert "NaN" not in (tmp_path / "run" / "comparison.json").read_text()
    assert "none" in capsys.readouterr().out


def test_what_is_printed():
    table = compare.markdown([["", "first"], ["step", "1.000 ± 0.100"]])
    assert table.split("\n") == ["|       | step          |", "| ----- | ------------- |", "| first | 1.000 ± 0.100 |"]
    numbers = [0.0, 0.7, -0.0123, 0.00042, 123.4567, 1234567.0]
    assert [compare.cell(n) for n in numbers] == ["0.000", "0.700", "-0.012", "0.00042", "123.457", "1.23e+06"]
    assert compare.cell(0.8071, 0.00066) == "0.807 ± 0.001" and compare.cell(4e-5, 1e-6) == "4e-05 ± 1e-06"
    assert compare.cell(0.0004, 0.012, "+") == "+0.000 ± 0.012" and compare.cell(None, None) == "none"


@pytest.mark.parametrize(
    "args, message",
    [
        ({}, "give policies (at most 26), --policies A B, or folders of runs, --runs runs/*"),
        ({"policies": ("a",) * 27}, "give policies (at most 26)"),
        ({"policies": ("a", "b"), "runs": ("c",)}, "policies: not for --runs"),
        ({"runs": ("c",), "output_dir": "d", "num_samples": 2}, "num_samples, output_dir: not for --runs"),
        ({"policies": ("a", "b"), "plot": "c.svg"}, "plot: not for --policies"),
        ({"policies": ("a", "b"), "metric": "kl", "x": "kl"}, "metric, x: not for --policies"),
        ({"policies": ("a", "b"), "num_samples": 0}, "--num-samples 0: must be above 0"),
        ({"policies": ("a", "b"), "batch_size": -1}, "--batch-size -1: must be above 0"),
        ({"policies": ("a", "b"), "temperature": -1.0}, "--temperature -1.0: must be above 0"),
        ({"policies": ("a", "b"), "temperature": math.nan}, "--temperature nan: must be above 0"),
        ({"policies": ("a", "b"), "temperature": math.inf}, "--temperature inf: must be above 0"),
        ({"runs": ("c",), "plot": "c.pdf"}, "--plot c.pdf: must end in .svg or .png"),
        ({"runs": ("c",), "plot": "svg"}, "--plot svg: must end in .svg or .png"),
        ({"runs": ("c",), "plot": "no/c.svg"}, "--plot no/c.svg: must end in .svg or .png, in a folder that exists"),
    ],
)
def test_flags_that_do_not_fit(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(**args).startswith(message)
    assert not list(tmp_path.iterdir())


def test_bad_input(model, tmp_path):
    folder = str(tmp_path / "comparison")
    message = refused(policies=(model, "no-one/no-such-model"), output_dir=folder, **TINY)
    assert message.startswith("cannot load no-one/no-such-model: check name (RUN/policy), network")
    message = refused(policies=(model, model), output_dir=folder, prompts=str(tmp_path / "none.jsonl"), **TINY)
    assert "No such file" in message
    assert not list(Path(folder).iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    message = refused(policies=(model, model), output_dir=str(tmp_path / "full"), **TINY)
    assert message == f"--output-dir {tmp_path / 'full'} is not empty: choose another"
    message = refused(policies=(model, model), output_dir=str(tmp_path / "full" / "file"), **TINY)
    assert message == f"--output-dir {tmp_path / 'full' / 'file'} is not empty: choose another"


def test_two_comparisons_of_one_second_do_not_share_a_folder(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare.time, "strftime", lambda _: "now")
    (tmp_path / "runs/now-compare").mkdir(parents=True)  # the first one writes only at its end
    with pytest.raises(FileExistsError, match="runs/now-compare"):
        compare.main(compare.Args(policies=(model, model), **TINY))


# ---- Runs -----------------------------------------------------------------------------------------------------------


def write_run(folder: Path, curve: dict[int, float], tail: str = "", **config) -> str:
    """As a run writes it: a line a step, some without an evaluation."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": 0, "output_dir": str(folder), "lr": 0.1} | config))
    rows = [{"step": step, "kl": None} for step in range(max(curve) + 1)]
    rows = [row | ({"eval/reward": curve[row["step"]]} if row["step"] in curve else {}) for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return str(folder)


def test_runs(tmp_path, capsys):
    """Seeds together, algorithms and arguments apart; values align by step, and say how many runs they have."""
    rloo, grpo = {"algorithm": "rloo"}, {"algorithm": "grpo"}
    runs = [
        write_run(tmp_path / "a", {0: 0.5, 2: 0.6, 4: 0.75}, seed=0, **rloo),
        write_run(tmp_path / "b", {0: 0.7, 4: 0.95}, seed=1, num_steps=4, eval_every=4, torch="2", **rloo),
        write_run(tmp_path / "c", {0: 0.6, 2: 0.8}, '{"step": 3, "eval/rew', seed=2, resume="there", **rloo),
        write_run(tmp_path / "d", {0: 0.5}, '{"step": 1, "eval/reward": 9.0}', seed=0, **grpo),
        write_run(tmp_path / "e", {0: 0.7}, '{"step": 1, "eval/reward": NaN}\n{"step": 2}\n\xe4', seed=1, **grpo),
        write_run(tmp_path / "f", {0: 0.25, 2: 1234.5}, seed=2, lr=0.2, **grpo),
        write_run(tmp_path / "g", {0: 0.75}, seed=2, lr=0.1, beta=None, **grpo),
        str(tmp_path / "no-such-run"),
    ]
    (tmp_path / "comparison").mkdir()
    (tmp_path / "comparison" / "comparison.json").write_text("{}")
    other = write_run(tmp_path / "sft", {0: 0.5}, seed=0)
    (Path(other) / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    compare.main(compare.Args(runs=(*runs, str(tmp_path / "comparison"), other)))
    out, err = capsys.readouterr()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:1] == "|"]
    assert table[:1] + table[2:] == [
        ["step", "rloo (3)", "grpo lr=0.1 (2)", "grpo lr=0.2 (1)", "grpo beta=None lr=0.1 (1)"],
        ["0", "0.600 ± 0.058", "0.600 ± 0.100", "0.250", "0.750"],
        ["2", "0.700 ± 0.100 (2)", "none", "1234.500", "none"],
        ["4", "0.850 ± 0.100 (2)", "none", "none", "none"],
    ]
    assert out.startswith("eval/reward: mean ± standard error over the runs")
    assert err.splitlines() == [
        f"left out {folder}: not a run with eval/reward as yet"
        for folder in (tmp_path / "no-such-run", tmp_path / "comparison", other)
    ]


def test_the_reward_over_the_kl(tmp_path, capsys):
    """At each step the mean of both; a step without one of them is no point."""
    lines = '{"step": 1, "eval/reward": %s, "eval/kl": %s}\n{"step": 2, "eval/kl": 3.0}\n'
    runs = [write_run(tmp_path / str(i), {0: 0.5}, lines % (0.6 + i / 5, 1 + i), seed=i) for i in range(2)]
    compare.main(compare.Args(runs=tuple(runs), x="kl"))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [row.split() for row in rows] == ["| 1 | 0.700 ± 0.100 at KL 1.50 |".split()]
    with pytest.raises(compare.InputError, match="none has eval/reward and eval/kl: give others, or --metric"):
        compare.main(compare.Args(runs=(write_run(tmp_path / "sft", {0: 0.5}),), x="kl"))


def test_the_same_run_twice_is_one_run(tmp_path, capsys):
    """The longer one has more steps, not more evaluations."""
    short = write_run(tmp_path / "20250101-000000-rloo", {0: 0.5, 1: 0.25, 2: 0.5}, algorithm="rloo")
    long = write_run(tmp_path / "20250101-000001-rloo", {0: 0.5, 4: 0.75}, algorithm="rloo")
    for runs in (short, long), (long, short):
        compare.main(compare.Args(runs=runs))
        out, err = capsys.readouterr()
        assert "rloo (1)" in out and "| 4    | 0.750 " in out and "| 1 " not in out
        assert err == f"{runs[1]}: arguments and seed of another run; the longer one is taken\n"


def test_a_run_stands_beside_those_of_another_folder(tmp_path, capsys, monkeypatch):
    """Is my run normal? It is not one of those that it is compared with, though all arguments are the same."""
    monkeypatch.chdir(tmp_path)
    logs = [write_run(Path(f"logs/first-{seed}"), {0: 0.5}, seed=seed, algorithm="rloo") for seed in range(2)]
    mine = write_run(Path("runs/first"), {0: 0.75}, algorithm="rloo")
    compare.main(compare.Args(runs=(mine, *logs)))
    out, err = capsys.readouterr()
    assert "| step | rloo in=runs (1) | rloo in=logs (2) |" in out and not err
    assert "| 0    | 0.750            | 0.500 ± 0.000    |" in out


def test_folders_names_do_not_matter(tmp_path, capsys):
    runs = [write_run(tmp_path / name / "run", {0: 0.5}, algorithm=name) for name in ("rloo", "grpo")]
    runs.append(write_run(tmp_path / "old" / "run", {0: 0.5}, seed=1))  # its config.json does not say
    compare.main(compare.Args(runs=tuple(runs)))
    assert "| step | rloo (1) | grpo (1) | run (1) |" in capsys.readouterr().out


def test_another_metric(tmp_path, capsys):
    folder = write_run(tmp_path / "rloo", {0: 0.5}, '{"step": 1, "kl": 0.25}\n{"step": 2, "kl": 0}\n')
    compare.main(compare.Args(runs=(folder,), metric="kl"))
    out = capsys.readouterr().out
    assert "| 1    | 0.250 " in out and "| 2    | 0.000 " in out and "| 0 " not in out
    assert refused(runs=(folder,), metric="no") == "--runs: none has no: give others, or --metric"


@pytest.mark.parametrize(
    "line", ["{", '["step"]', '{"eval/reward": 1.0}', '{"step": 1, "eval/reward": "high"}', '{"step": 1, "eval/rew\n{}']
)
def test_a_line_that_cannot_be_read(tmp_path, line):
    folder = write_run(tmp_path / "rloo", {0: 0.5}, line + "\n")
    assert refused(runs=(folder,)).startswith(f"cannot read {folder}/metrics.jsonl, line 2: no run of this project")


def test_a_config_that_cannot_be_read(tmp_path):
    folder = write_run(tmp_path / "rloo", {0: 0.5})
    Path(folder, "config.json").write_text('{"seed": 0')
    assert refused(runs=(folder,)).startswith(
        f"cannot read {folder}/config.json: no run of this project wrote it (JSON"
    )


@pytest.mark.parametrize("x", ["step", "kl"])
def test_the_picture(tmp_path, monkeypatch, x):
    """Of two seeds their mean, its error and, over the KL, each point; of one seed no error, which is not one of 0."""
    axes, drawn, points = importlib.import_module("matplotlib.axes").Axes, [], []
    errorbar, scatter = axes.errorbar, axes.scatter
    runs = [write_run(tmp_path / f"{seed}", {0: 0.5}, seed=seed, algorithm="rloo") for seed in (0, 1)]
    runs += [write_run(tmp_path / "alone", {0: 0.5}, algorithm="grpo")]
    for seed, folder in enumerate(runs[:2]):
        rows = [{"step": 0, "eval/reward": 0.5, "eval/kl": 0}]
        rows += [{"step": 2, "eval/reward": 0.6 + seed / 5, "eval/kl": 2 + 2 * seed}]
        (Path(folder) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def spy_errorbar(self, x, means, errors, **look):
        drawn.append((look["label"], list(x), list(means), list(errors)))
        return errorbar(self, x, means, errors, **look)

    monkeypatch.setattr(axes, "errorbar", spy_errorbar)
    monkeypatch.setattr(axes, "scatter", lambda self, *xy, **look: points.append(xy) or scatter(self, *xy, **look))
    compare.main(compare.Args(runs=tuple(runs), x=x, plot=str(tmp_path / "curves.svg")))
    means = pytest.approx([0.5, 0.7]), pytest.approx([0, 0.1])
    assert drawn[0] == ("rloo (2)", [0, 2] if x == "step" else [0, 3], *means)
    assert x == "kl" or drawn[1] == ("grpo (1)", [0], [0.5], pytest.approx([math.nan], nan_ok=True))
    assert points == ([] if x == "step" else [((0, 2, 0, 4), (0.5, 0.6, 0.5, 0.8))])
    assert ">rloo (2)<" in (tmp_path / "curves.svg").read_text()


def test_a_picture_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not there
    message = refused(runs=(write_run(tmp_path / "rloo", {0: 0.5}),), plot=str(tmp_path / "curves.svg"))
    assert message.startswith("--plot needs matplotlib: uv run --with matplotlib -m nano_rl.compare ...")
    assert "| 0    | 0.500 " in capsys.readouterr().out and not (tmp_path / "curves.svg").exists()
