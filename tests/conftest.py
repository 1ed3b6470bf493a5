import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need a network
os.environ["WANDB_MODE"] = "offline"
os.environ["ACCELERATE_USE_CPU"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # they are about the CPU, also on a machine with a GPU
os.environ["OMP_NUM_THREADS"] = "1"  # two workers, one core each: threads that wait for a core spin

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """The folder of a tiny random policy; beside it stands another, `teacher`."""
    from tiny import llama_config, save_policy  # torch takes seconds, and what starts the workers needs none

    folder = tmp_path_factory.mktemp("model")
    save_policy(folder / "teacher", seed=5)
    return save_policy(folder / "llama", llama_config(27, attention_dropout=0.5))  # which no run may have on
