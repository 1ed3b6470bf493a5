"""The experiments' commands and tables, with runs that only write down what a run leaves."""

import importlib
import itertools
import json
import re
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import tyro
from test_judge import save_judge
from tiny import make_tokenizer

from nano_rl import compare, judge, rloo
from tests.experiments import run, trl_run

ROWS = {
    "imdb": [{"text": f"a film\x85 number {i} of the year that I saw", "label": i % 2} for i in range(260)],
    "preferences": [{"prompt": f"write {i}", "chosen": "a", "rejected": "b"} for i in range(130)],
}
METRICS = {"eval/reward": 0.5, "eval/words": 50.0, "eval/kl": 0.1, "eval/ref_logprob": -1.0, "eval/accuracy": 0.7}
METRICS |= {"eval/accuracy_se": 0.02, "eval/longer_accuracy": 0.65, "eval/loss": 0.6, "completions/mean_length": 9.0}
METRICS |= {"grad_norm": 1.0}


@pytest.mark.parametrize("name", [name for name in run.EXPERIMENTS if name != "variance"])  # which trains nothing
def test_every_command_parses_and_reads_what_another_wrote(name, tmp_path, monkeypatch, capsys):
    for split in ("train", "test"):
        run.write(tmp_path / f"data/{split}.jsonl", ROWS.get(name, []))
    written, logs = set(), tmp_path / "logs"

    def pretend(args, job):
        _, command = job
        file, *flags = command.split()
        module = importlib.import_module(file)
        parsed = vars(tyro.cli(module.Args, args=flags))
        for flag in "model reward_model prompts eval_prompts data labels pairs eval_pairs policies".split():
            for path in [parsed.get(flag)] if isinstance(parsed.get(flag), str) else parsed.get(flag) or []:
                assert path in (written | {"", rloo.Args.model}) or Path(path).is_file(), path
        folder = Path(parsed["output_dir"])
        assert str(folder) not in written
        written.update(map(str, (folder, folder / "policy", folder / "reward_model")))
        steps = {0: {"eval/reward": 0.25}, 5: {"eval/reward": 0.375}, 10: {}}
        if "policies" not in parsed:
            run.write(folder / "metrics.jsonl", [METRICS | row | {"step": step} for step, row in steps.items()])
        config = {"algorithm": file.rpartition(".")[2]} | {name: str(value) for name, value in parsed.items()}
        numbers = {name: value for name, value in parsed.items() if isinstance(value, int | float)}
        numbers["num_steps"] = numbers.get("num_steps") or 15
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config | numbers))
        row = {"split": "held_out", "completion": "b c"}
        evaluations = [row | {"step": step, "reward": step - 1.0, "prompt": p} for step in (0, 10) for p in "abcd"]
        run.write(folder / "completions.jsonl", evaluations)
        policies = dict.fromkeys(range(len(parsed.get("policies", ()))), {"mean": 0.25 * (len(written) % 2)})
        if "policies" in parsed:
            (folder / "completions.jsonl").unlink()
            run.write(folder / "completions.jsonl", [{"prompt": "a", "A": {"completion": "b c"}}])
        (folder / "comparison.json").write_text(json.dumps({"table": {"reward": policies}}))
        Path(f"{folder}.json").write_text('{"seconds": 60, "memory": 4}')

    monkeypatch.setattr(run, "run_job", pretend)
    monkeypatch.setattr(run.AutoTokenizer, "from_pretrained", lambda _: make_tokenizer())
    monkeypatch.setattr(run, "read_again", lambda options: [options.env, "1.0", "0.5", "50%"])
    monkeypatch.setattr(run, "doubts", lambda *_: None)  # which asks the real judge; it has a test of its own
    monkeypatch.setattr(run.judges, "score", lambda prompts, completions: [len(text) + 1.0 for text in completions])
    monkeypatch.setattr(run.judges, "yes", lambda prompts, completions: [0.5 for _ in completions])
    run.main(run.Args(name, data=tmp_path / "data", seeds=(0, 1, 2), output_dir=tmp_path / "out", workers=1, logs=logs))
    out = capsys.readouterr().out
    if name == "distill":
        assert "| distill, 5 steps | 288 ± 0 | 0.375 ± 0.000 |" in out  # two steps of 16 completions of 9 tokens
        assert "| grpo, 10 steps | 288 ± 0 | 0.500 ± 0.000 |" in out and "| sft, 10 steps | 480 ± 0 | 0." in out
        assert "| of 15 differences, the clearest | right |" in out
        assert "| grpo, 10 steps - sft, 10 steps | 0.250 ± 0.000 |" in out
    elif name == "turns":
        assert "| start | 0.250 |  | 0.500 |  |  |  |" in out and "| lines | 0.250 |  | 0.500 |  |  |  |" in out
        assert "| game | 0.250 ± 0.000 |  | 0.500 ± 0.000 |  |  |  |" in out
        (games,) = (tmp_path / "out").rglob("games.jsonl")
        rows = [json.loads(line) for line in games.read_text().splitlines()]
        assert 6 * 63 < len(rows) < 18 * 63 and all(row["completion"].isdigit() for row in rows)
        learn, unseen = (run.read(games.with_name(f"{part}.jsonl")) for part in ("learn", "unseen"))
        assert len(learn) == 63 and len(unseen) == 84 and not [start for start in unseen if start in learn]
        assert max(len(row["prompt"]) for row in rows) == 5 and rows[0]["prompt"][0]["role"] == "user"
    elif name == "sums":
        assert "| start | " in out and "| maxrl | " in out and "| trl-dapo | " in out and "raft" not in out
        budgets = {line.split(" | ")[0].strip("| "): line.split(" | ")[3:5] for line in out.splitlines()}
        assert budgets["grpo"] == ["160 ± 0", "20 ± 0"] and budgets["trl-grpo"] == ["160 ± 0", "10 ± 0"]
        assert budgets["remax"] == ["320 ± 0", "10 ± 0"] and budgets["ppo"] == ["160 ± 0", "16 ± 0"]
        configs = [json.loads(path.read_text()) for path in logs.glob("sums-*/config.json")]
        assert {config["learning_rate"] for config in configs if "learning_rate" in config} == {2e-5}
    else:
        assert "| 0.250 ± 0.000 | 0.500 ± 0.000 | 0.250 ± 0.000 | +0.250, +0.250, +0.250 | 50 ± 0 |" in out
    if name == "ladder":
        assert compare.read_run(logs / "grpo-2", "eval/reward", "step")[1].keys() == {0, 5, 10}
        assert json.loads((logs / "grpo-2/topics.json").read_text()) == {"0": 0.5, "10": 0.5}
    assert str(tmp_path) not in "".join(path.read_text() for path in logs.rglob("*.json"))
    if name == "sums":
        assert {path.name for path in (logs / "sums-trl-dapo-1").iterdir()} == {"config.json", "metrics.jsonl"}
    if name in ("ladder", "trl"):  # the completion "b c" names b and c
        assert "rloo, 10 | 0.250 ± 0.000 | 0.100 ± 0.000 | 0.500 ± 0.000 |" in out
    if name == "ladder":
        assert out.count("of 15 differences") == 3 and "| reinforce - rloo | 0.000 ± 0.000 | 1.000 |" in out
        assert "| grpo | 240 ± 0 | 30 ± 0 |" in out
        assert out.count("\n  before (-1.000): b c\n  after (9.000): b c") == 3
    if name == "preferences":
        assert "| probabilistic - penalty | 0.000 ± 0.000 | 1.000 |" in out
    if name == "judge":
        assert "| nothing | 1.000 ± 0.000 | -3.000 ± 0.000 | 0.500 ± 0.000 | 0.000 ± 0.000 |" in out
    if name == "imdb":
        assert "| ppo | 0.000 ± 0.000 | 1.000 ± 0.000 | 1.000 ± 0.000 | +1.000, +1.000, +1.000 | 0.250 ± 0.000 |" in out
        assert "| of 15 differences, the clearest | positive after |" in out
        assert "- ppo | 0.000 ± 0.000 | 1.000 |" in out
        learn, unseen = (run.read(tmp_path / f"out/imdb/{part}.jsonl") for part in ("prompts", "held_out"))
        assert len(learn) == len(unseen) == 128 and not [row for row in unseen if row in learn]


def test_what_makes_a_score_doubtful(tmp_path, monkeypatch, capsys):
    """The probability of the words that count, by one plain pass a text; how far a score moves alone, and rounded."""
    monkeypatch.setattr(judge, "MODEL", save_judge(tmp_path))
    for name in ("JUDGE_MODEL", "JUDGE_QUESTIONS"):
        monkeypatch.setenv(name, "")
    prompts, stories = ["write about the sea", "a"], ["the sea sings " * 9, ""]
    run.doubts(prompts, stories)
    out = capsys.readouterr().out
    model, tokenizer = judge.load_judge(judge.MODEL)
    assert model.dtype == torch.float32, "the next score is not a rough one"
    for questions, words in ((judge.SCORE_QUESTIONS, "123456789"), (judge.YES_QUESTIONS, ("Yes", "No"))):
        shares = []
        for prompt, story in zip(prompts, stories):
            for question in questions.split("|"):
                dialogue = f"user: {prompt}\n\nassistant: {story}"
                text = f"<user> A user and an assistant:\n\n{dialogue}\n\n{question} <assistant> "
                p = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].softmax(dim=0)
                shares.append(sum(p[tokenizer.convert_tokens_to_ids(word)].item() for word in words))
        assert f"{', '.join(words)}: {sum(shares) / len(shares):.3f} of the probability" in out
    moves = re.findall(r"a score moves by (\S+), at most by (\S+)", out)
    (alone, most_alone), (rough, most_rough) = [map(float, pair) for pair in moves]
    assert alone <= most_alone < 1e-4 < most_rough and rough <= most_rough


def test_differences_are_as_rare_as_they_are(capsys):
    """Two files and three seeds: 8 ways to turn the signs of 1, 4, 4, of which 2 have the largest |t|, 3."""
    run.differences({"a": [2.0, 5.0, 9.0], "b": [1.0, 1.0, 5.0]})
    _, _, row = capsys.readouterr().out.splitlines()
    name, gap, p = row.strip("| ").split(" | ")
    assert (name, gap) == ("a - b", "3.000 ± 1.000") and float(p) == 2 / 8
    noise = torch.randn(7, 6, generator=torch.Generator().manual_seed(0)).tolist()
    files = dict(zip("abcdefg", noise))
    run.differences(files | {"g": [99 + x for x in noise[6]]})
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert all(" - g " in row and row.endswith("| 0.031 |") for row in rows) and len(rows) == 6
    run.differences(files)
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert all(float(row.split()[-2]) > 0.05 for row in rows)
    run.differences({name: values[:1] for name, values in files.items()})
    assert capsys.readouterr().out == "", "one seed tells nothing"


@pytest.mark.parametrize("name", ["trl", "imdb", "distill"])
def test_what_stands_beside_runs_without_flags_takes_none(tmp_path, name):
    with pytest.raises(SystemExit, match=f"{name} takes no --flags"):
        run.main(run.Args(name, data=tmp_path, output_dir=tmp_path, flags="--num-steps 5"))
    assert not list(tmp_path.iterdir())


def test_a_wide_file_hides_no_difference_of_others(capsys):
    narrow = 0.1 * torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    a, b = narrow.tolist()
    run.differences({"a": a, "b": [1 + x for x in b], "wide": [50.0, -50.0, 40.0, -40.0, 30.0, -30.0]})
    _, _, first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("| a - b | -") and first.endswith("| 0.031 |")


def test_a_file_that_differs_makes_no_other_pair_clearer(capsys):
    """p of each pair against naive loops, alone and beside a file that is far away."""
    noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).tolist()

    def p_of(files: dict) -> dict[str, float]:
        run.differences(files)
        rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
        return {name: float(p) for name, _, p in rows}

    def t_of(gaps: list[float]) -> float:
        return abs(statistics.mean(gaps)) / statistics.stdev(gaps)

    files = dict(zip("abc", noise))
    pairs = {f"{x} - {y}": [i - j for i, j in zip(files[x], files[y])] for x, y in ("ab", "ac", "bc")}
    ways = [
        max(t_of([sign * gap for sign, gap in zip(signs, gaps)]) for gaps in pairs.values())
        for signs in itertools.product((1, -1), repeat=6)
    ]
    alone = p_of(files)
    for name, gaps in pairs.items():
        assert alone[name] == pytest.approx(sum(way >= t_of(gaps) - 1e-9 for way in ways) / 64, abs=5e-4)
    beside = p_of(files | {"far": [9 + x for x in noise[3]]})
    assert all(beside[name] >= p for name, p in alone.items()) and min(alone.values()) < 0.9


def test_topics_are_words():
    for text, names in ("pay attention", False), ("Two tents.", True), ("tent", True), ("content", False):
        assert run.names_topic({"prompt": "Write a long story about a tent.", "completion": text}) is names


def test_what_a_finished_run_read_is_not_changed(tmp_path):
    run.write(tmp_path / "rows.jsonl", [{"a": 1}])
    run.write(tmp_path / "rows.jsonl", [{"a": 1}])
    with pytest.raises(RuntimeError, match="rows.jsonl would change: choose another --output-dir"):
        run.write(tmp_path / "rows.jsonl", [{"a": 2}])


def test_what_dapo_samples_and_skips_is_counted(tmp_path):
    steps = [{"completions/num_sampled": 32, "grad_norm": 1.0}, {"completions/num_sampled": 64}]
    run.write(tmp_path / "dapo-0/metrics.jsonl", [{"eval/reward": 0.0}, *steps])
    config = {"algorithm": "dapo", "batch_size": 16, "num_steps": 2, "num_updates": 2}
    (tmp_path / "dapo-0/config.json").write_text(json.dumps(config))
    assert run.budget(run.Args("sums", seeds=(0,), output_dir=tmp_path), "dapo") == ["96", "2"]


def test_the_logs_are_small_and_of_no_machine():
    logs = Path(run.__file__).parent / "logs"
    assert sum(path.stat().st_size for path in logs.rglob("*.json*")) < 3e6
    runs = sorted(path.parent for path in logs.glob("*/config.json"))
    assert runs and all("step" in run.read(folder / "metrics.jsonl")[-1] for folder in runs)
    texts = [(folder / "config.json").read_text() for folder in runs]
    assert not [text for text in texts if '"/' in text or str(Path.home()) in text]


def test_a_job_runs_once_and_a_failure_says_where(tmp_path):
    args = run.Args("ladder", output_dir=tmp_path)
    run.run(args, {"first": "calendar 2026 1"})
    assert "January 2026" in (tmp_path / "first.log").read_text()
    assert json.loads((tmp_path / "first.json").read_text())["memory"] > 0
    (tmp_path / "first.log").unlink()
    run.run(args, {"first": "calendar 2026 1"})
    assert not (tmp_path / "first.log").exists()
    with pytest.raises(RuntimeError, match="first was run as calendar 2026 1: choose another --output-dir"):
        run.run(args, {"first": "calendar 2026 2"})
    with pytest.raises(RuntimeError, match="second failed: .*No module named no_such"):
        run.run(args, {"second": "no_such"})
    assert not (tmp_path / "second.json").exists()


def test_what_trl_is_told(monkeypatch):
    """Our settings, and of GRPO's losses the one that is asked for; TRL itself is not installed for the tests."""
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(Dataset=SimpleNamespace(from_list=list)))
    names = ("RLOOTrainer", "GRPOTrainer", "RLOOConfig", "GRPOConfig")
    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(**dict.fromkeys(names, dict)))
    losses = {"grpo": None, "dr_grpo": "none", "dapo": None}  # what GRPO's rewards are divided by, if not its default
    for loss_type, scale_rewards in losses.items():
        inputs = None, None, [{"prompt": "x", "n": 1}], print, None
        trainer = trl_run.make_trainer("grpo", *inputs, loss_type=loss_type, seed=3)
        ours = {"num_generations": 4, "temperature": 0.7, "beta": 0.0, "lr_scheduler_type": "constant", "seed": 3}
        assert ours.items() <= trainer["args"].items() and trainer["args"]["loss_type"] == loss_type
        assert trainer["args"].get("scale_rewards") == scale_rewards
        assert trainer["train_dataset"] == [{"prompt": [{"role": "user", "content": "x"}], "n": 1}]
    assert not {"loss_type", "scale_rewards"} & trl_run.make_trainer("rloo", *inputs)["args"].keys()


def test_trl_is_evaluated_and_written_down_like_our_own_run(model, tmp_path, monkeypatch):
    seen = {}

    class Trainer:  # in the place of TRL's, which the tests do not install
        def __init__(self, algorithm, policy, tokenizer, rows, reward_fn, callback, **options):
            prompts, rewards = [row["prompt"] for row in rows], reward_fn(["a"], ["one one"], note=[1])
            seen.update(prompts=prompts, options=options, rewards=rewards)
            self.policy, self.callback = policy, callback

        def train(self):
            random_state = torch.get_rng_state()
            self.callback.on_train_begin(None)
            for step in range(1, 6):
                self.policy.get_input_embeddings().weight.data += 0.1
                self.callback.on_step_end(None, transformers.TrainerState(global_step=step))
            assert torch.equal(torch.get_rng_state(), random_state)

    monkeypatch.setattr(trl_run, "make_trainer", Trainer)
    options = {"model": model, "seed": 3, "max_new_tokens": 6}
    trl_run.main(trl_run.Args("grpo", tmp_path / "trl", num_steps=5, eval_every=2, **options))
    rloo.train(rloo.Args(num_steps=1, output_dir=str(tmp_path / "ours"), **options))

    metrics, samples = [run.read(tmp_path / "trl" / name) for name in ("metrics.jsonl", "completions.jsonl")]
    ours = run.read(tmp_path / "ours/metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 2, 4, 5]
    assert metrics[0] == {name: value for name, value in ours[0].items() if name != "step_time"}
    assert metrics[-1]["eval/kl"] != 0
    held_out = {row["prompt"] for row in samples}
    assert len(held_out) == 8 and len(seen["prompts"]) == 24 and not held_out & set(seen["prompts"])
    assert seen["options"]["max_steps"] == 5 and seen["options"]["seed"] == 3
    assert seen["options"]["learning_rate"] == rloo.Args.learning_rate and seen["options"]["loss_type"] == "grpo"
    policy = rloo.load(transformers.AutoModelForCausalLM, str(tmp_path / "trl/policy"), torch.device("cpu"))[0]
    start = rloo.load(transformers.AutoModelForCausalLM, model, torch.device("cpu"))[0]
    assert torch.allclose(policy.get_input_embeddings().weight, start.get_input_embeddings().weight + 0.5, atol=1e-5)
    penalty = 0.5 * (1 - 2 / rloo.MIN_WORDS)
    assert seen["rewards"] == pytest.approx([0.5 - penalty])  # one of two words is new
    config, curve = compare.read_run(tmp_path / "trl", "eval/reward", "step")
    assert config["seed"] == 3 and config["algorithm"] == "trl-grpo" and list(curve) == [0, 2, 4, 5]


def test_the_spread_of_vectors():
    vectors = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = [vectors[:, :2].sum(dim=0), vectors[:, 2:].sum(dim=0)]
    of_one, of_mean = run.spread(parts, vectors.square().sum().item(), 6)
    assert of_one == pytest.approx(vectors.var(dim=0).sum().item())
    pairs = [vectors[i] @ vectors[j] for i in range(6) for j in range(6) if i != j]  # E[g g'] = ‖E[g]‖²
    assert of_mean == pytest.approx(sum(pairs).item() / 30)


def test_a_baseline_near_the_rewards_makes_the_gradient_less_noisy(model, monkeypatch, capsys):
    monkeypatch.setattr(run.reinforce, "MIN_WORDS", 8 / 3)  # few are brief: the rewards are near one another
    options = run.reinforce.Args(model=model, max_new_tokens=8)
    run.variance(run.Args("variance"), options, num_batches=3)
    cells = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[3:]]
    found = {name.strip("| "): (float(variance), float(square.strip(" |"))) for name, variance, square in cells}
    assert list(found) == ["none", "mean", "ema", "scst"]
    assert found["none"][0] > 10 * found["mean"][0] > 0


def test_what_is_read_again_is_read_in_later_turns(model):
    for num_turns in (1, 3):
        options = run.multi_turn.Args(model=model, num_turns=num_turns, max_new_tokens=2, batch_size=8)
        env, seconds, again, share = run.read_again(options)
        assert env == "HigherOrLower" and (0 < float(share.rstrip("%")) < 100) == (num_turns > 1)
