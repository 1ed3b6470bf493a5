"""The benchmark's own parts, on a tiny model: it is run by hand, so that nothing else would notice that it broke."""

import time

import pytest
import torch
from transformers import GPT2Config, Qwen2Config

from nano_rl import rloo
from tests.experiments import benchmark, profile

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 25,
}


@pytest.mark.parametrize("algorithm", ["reinforce", "rloo", "remax", "raft", "grpo", "ppo"])
def test_a_job_of_every_file(model, algorithm):
    job = {"framework": "nano_rl", "algorithm": algorithm, "model": model, "completions": 8, "length": 4, "steps": 2}
    result = benchmark.run_job(job)
    assert set(result) == {"step", "sampling", "scoring", "training", "memory"}
    assert result["step"] == pytest.approx(result["sampling"] + result["scoring"] + result["training"])
    assert min(result.values()) > 0
    assert result["memory"] > 0.1


def test_making_the_sampler_is_sampling(model, monkeypatch):
    make_sampler = rloo.make_sampler
    monkeypatch.setattr(rloo, "make_sampler", lambda *inputs: time.sleep(0.5) or make_sampler(*inputs))
    job = {"framework": "nano_rl", "algorithm": "rloo", "model": model, "completions": 8, "length": 4, "steps": 2}
    assert benchmark.run_job(job)["sampling"] > 0.5


@pytest.mark.parametrize("turn", [0, 1])
def test_the_rows_of_a_comparison(monkeypatch, capsys, turn):
    seconds = {"sampling": 1.0, "scoring": 0.001, "training": 2.0, "step": 3.0, "memory": 4.0}
    theirs = {name: 2 * value for name, value in seconds.items()} | {"sampling": 4.0, "step": 8.0, "memory": 5.0}
    monkeypatch.setattr(benchmark, "run_process", lambda job: seconds if job["framework"] == "nano_rl" else theirs)
    job = {"algorithm": "rloo", "completions": 3, "length": 4}
    benchmark.compare(turn, job, benchmark.random_model(SHAPE), 10, (1e6, 1e6), torch.bfloat16)
    lines = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    rows = {line[4]: line[5:-1] for line in lines}
    assert rows["nano_rl"] == ["3.00", "1.00", "0.00", "2.00", "4", "4.00"] and rows["trl"][-2:] == ["2", "5.00"]
    assert rows["ratio"] == ["**0.38**", "0.25", "", "0.50", "2.67", "**0.80**"]
    assert list(rows) == [*(("nano_rl", "trl") if turn == 0 else ("trl", "nano_rl")), "ratio", "of the limit"]


def test_bounds():
    """6 FLOP a weight and token; weights and cache are read once a token."""
    model = benchmark.random_model(SHAPE)
    weights = sum(weight.numel() for weight in model.parameters())
    found = benchmark.bounds(model, {"completions": 3, "length": 4}, 10, (1e6, 1e3), torch.bfloat16)
    cache_a_token = 2 * 2 * 1 * 8  # keys and values, layers, heads, numbers of a head
    assert found["training"] == pytest.approx(6 * weights * 3 * 14 / 1e6)
    assert found["sampling"] == pytest.approx(4 * (weights + 3 * 12 * cache_a_token) * 2 / 1e3)


@pytest.mark.parametrize(
    "config, cache_a_token",
    [
        (Qwen2Config(hidden_size=16, num_attention_heads=4, num_key_value_heads=1, num_hidden_layers=3), 2 * 3 * 4),
        (GPT2Config(n_embd=16, n_head=4, n_layer=3), 2 * 3 * 16),
    ],
    ids=["qwen2", "gpt2"],
)
def test_bounds_of_models_whose_configs_say_less(config, cache_a_token):
    model = torch.nn.Linear(1, 1, bias=False)
    model.config = config
    found = benchmark.bounds(model, {"completions": 3, "length": 4}, 10, (1e6, 1e3), torch.bfloat16)
    assert found["sampling"] == pytest.approx(4 * (1 + 3 * 12 * cache_a_token) * 2 / 1e3)


def test_the_table_of_peaks(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "run_process", lambda job: {"memory": 4.0 if job["lora_rank"] == 0 else 2.04})
    jobs = [{"algorithm": name, "completions": n, "length": 4} for name, n in (("rloo", 8), ("rloo", 16), ("grpo", 8))]
    benchmark.show_memory(jobs, (0, 16))
    title, rule, *rows = capsys.readouterr().out.splitlines()
    assert title.count("|") == rule.count("|") == 5
    assert rows == [
        "| rloo.py | 8 × 4 | 4.0 | 2.0 |",
        "| rloo.py | 16 × 4 | 4.0 | 2.0 |",
        "| grpo.py | 8 × 4 | 4.0 | 2.0 |",
    ]


def test_the_profile(model, capsys, monkeypatch):
    found, seconds_by_kind = {}, profile.seconds_by_kind
    monkeypatch.setattr(profile, "seconds_by_kind", lambda events: found.update(seconds_by_kind(events)) or found)
    profile.main(profile.Args(model=model, completions=8, length=4))
    assert found["sampling"]["drawing"] > 0 == found["training"]["drawing"]
    assert all(kinds["matrix products"] > 0 for kinds in found.values())
    lines = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    rows = {line[1]: line[2:-1] for line in lines if len(line) > 3}
    for column in (0, 2):  # sampling, training
        kinds = [float(rows[kind][column]) for kind in (*profile.KINDS, profile.REST)]
        assert min(kinds) >= 0 and sum(kinds) == pytest.approx(float(rows["together"][column]), abs=0.06)
        assert float(rows["without the profiler"][column]) > 0
    parts = "libraries", "weights", "their gradient", "Adam's two", "reference", "a micro-batch, and the rest"
    sizes = [int(rows[part][0]) for part in parts]  # the rest may be -0 here: tests before this one made the peak
    assert sum(sizes) == pytest.approx(int(rows["the process"][0]), abs=6) and sizes[0] > 100
