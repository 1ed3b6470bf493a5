"""The GPU's page, on a CPU with tiny models: it is run by hand, so that nothing else would notice that it broke."""

import json
import time

import pytest

from tests.experiments import gpu
from tests.test_benchmark import SHAPE

STEPS = [("135M", "grpo", 8, 4, 0), ("135M", "ppo", 8, 4, 0), ("1B", "grpo", 8, 4, 2), ("1B", "ppo", 8, 4, 2)]
STEP_ROWS = [[shape, f"{file}.py", "8 × 4", rank or "no"] for shape, file, _, _, rank in STEPS]
SAMPLING_ROWS = [["135M", 2], ["135M", 3], ["1B", 2], ["1B", 3], ["135M", 2], ["1B", 2]]  # eager, static cache


@pytest.fixture
def options(monkeypatch, tmp_path) -> dict:
    monkeypatch.setattr(gpu, "STEPS", STEPS)
    monkeypatch.setattr(gpu, "SHAPES", dict.fromkeys(("135M", "1B"), SHAPE | {"vocab_size": 64}))
    monkeypatch.setattr(gpu, "machine_limits", lambda *_: (1e12, 1e10))
    sizes = {"rows": (2, 3), "compiled_rows": 2, "length": 4, "learning_steps": 1}
    return sizes | {"shapes": ("135M", "1B"), "output_dir": tmp_path / "page"}


def rows_of(folder) -> list[list]:
    rows = json.loads((folder / "gpu.json").read_text())
    assert all(value >= 0 for row in rows for name, value in row.items() if name != "names")
    return [row["names"] for row in rows]


def test_the_page_with_real_weights(model, options, capsys):
    gpu.main(gpu.Args(model=model, **options))
    page = (options["output_dir"] / "gpu.md").read_text()
    assert page in capsys.readouterr().out
    assert "Stopped" not in page and "failed" not in page and "random" not in page
    assert rows_of(options["output_dir"]) == STEP_ROWS + [["rloo.py"], ["grpo.py"]] + SAMPLING_ROWS


def test_the_page_where_no_weights_are_at_hand(options):
    gpu.main(gpu.Args(model="no/such", **options))
    assert "No weights of no/such are at hand" in (options["output_dir"] / "gpu.md").read_text()
    assert rows_of(options["output_dir"]) == STEP_ROWS + SAMPLING_ROWS


def test_it_stops_in_time_and_says_what_is_missing(options, monkeypatch):
    monkeypatch.setattr(gpu, "show_steps", lambda args, page, load: page.say("the steps"))  # in no time
    monkeypatch.setattr(gpu, "seconds_of_sampling", lambda *_: time.sleep(600))
    gpu.main(gpu.Args(model="no/such", minutes=0.01, **options))
    page = (options["output_dir"] / "gpu.md").read_text()
    assert "the steps" in page, "what was done is kept"
    assert "Stopped after 0.01 minutes, before the end of: eager, compiled, static cache." in page
