"""Where a step's time and memory go: one step under PyTorch's profiler by kind of work, and what lives at its peak.

    OMP_WAIT_POLICY=passive uv run -m tests.experiments.profile
    OMP_WAIT_POLICY=passive uv run -m tests.experiments.profile --completions 64 --length 256

Sampling stands apart from the rest, which is training: log-probabilities, backward, Adam. A kind of work has the time
that the profiler gives to its operators themselves. "Python, and between" is what is left: the interpreter and the way
into an operator. The profiler makes that longer, so the last line has the seconds of the step before, without it.
"idle" is the part of all cores' time in that step in which they did nothing: without OMP_WAIT_POLICY threads that wait
look busy. The memory is the process's peak before the profiler starts, which keeps what it sees; "a micro-batch, and
the rest" is what the others leave of it. On a CPU, with nothing else running.
"""

import importlib
import resource
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal
from unittest import mock

import torch
import tyro
from torch.profiler import ProfilerActivity, profile, record_function

from nano_rl import reinforce
from tests.experiments.benchmark import CPU, Clock, run_nano_rl

KINDS = {  # of operators, by how their names begin behind "aten::"; the first that fits
    "matrix products": ("mm", "addmm", "mkldnn"),
    "attention, and drawing's softmax": ("_scaled_dot", "bmm", "baddbmm", "_softmax", "_fused_sdp"),
    "copies and casts": ("copy_", "cat", "clone", "index_copy", "_to_copy", "stack"),
    "zeros": ("zero_", "fill_"),
    "sums of gradients": ("add_",),
    "clipping and Adam": ("_fused_adam", "_foreach", "linalg_vector_norm", "mul_"),
    "log-softmax over the vocabulary": ("_log_softmax", "nll_loss"),
    "drawing": ("cumsum", "argmax", "rand"),
    "elementwise": ("",),
}
REST = "Python, and between"


@dataclass
class Args:
    algorithm: Literal["reinforce", "rloo", "raft", "grpo"] = "rloo"  # which sample once a step, and train one model
    completions: int = 16
    length: int = 64
    model: str = reinforce.Args.model


def peak_memory() -> float:
    """Of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


class Profile(Clock):
    """Of a run's three steps the first warms up, the second is timed, the third is profiled."""

    def __init__(self) -> None:
        super().__init__()
        self.profile, self.cpu_time = profile(activities=[ProfilerActivity.CPU]), 0.0
        self.peak = peak_memory()

    def wrap(self, name: str, function):
        def recorded(*inputs):
            with record_function(name):
                return function(*inputs)

        return super().wrap(name, recorded)

    def end_step(self, seconds: float) -> None:
        super().end_step(seconds)
        before, self.cpu_time = self.cpu_time, time.process_time()
        self.steps[-1]["idle"] = 1 - (self.cpu_time - before) / seconds / torch.get_num_threads()
        if len(self.steps) == 2:
            self.peak = peak_memory()
            self.profile.start()
        elif len(self.steps) == 3:
            self.profile.stop()


def seconds_by_kind(events: list) -> dict[str, Counter]:
    """Of sampling and of training: the operators' own seconds by kind."""
    # The sampler is made, and used.
    sampling = [event.time_range for event in events if event.name == "sampling"]
    found = {"sampling": Counter(), "training": Counter()}
    for event in events:
        if event.name.startswith("aten::"):
            is_sampling = any(part.start <= event.time_range.start < part.end for part in sampling)
            phase = "sampling" if is_sampling else "training"
            name = event.name.removeprefix("aten::")
            kind = next(kind for kind, beginnings in KINDS.items() if name.startswith(beginnings))
            found[phase][kind] += event.self_cpu_time_total / 1e6
    return found


def show_time(args: Args, clock: Profile) -> None:
    _, plain, profiled = clock.steps
    found = seconds_by_kind(clock.profile.events())
    for phase, kinds in found.items():
        kinds[REST] = profiled[phase] - sum(kinds.values())
    dtype = "bfloat16" if reinforce.has_bfloat16(CPU) else "float32"
    print(f"\n{args.algorithm}, {args.completions} x {args.length}, {torch.get_num_threads()} threads, {dtype}\n")
    print("| | sampling, s | of it | training, s | of it |\n|---|---|---|---|---|")
    for kind in [*KINDS, REST]:
        print(f"| {kind} |", *[f"{found[p][kind]:.2f} | {found[p][kind] / profiled[p]:.0%} |" for p in found])
    print("| together |", *[f"{profiled[phase]:.2f} | 100% |" for phase in found])
    print("| without the profiler |", *[f"{plain[phase]:.2f} | |" for phase in found])
    print(f"\nidle: {plain['idle']:.0%} of the cores' time")


def show_memory(run, libraries: float, peak: float) -> None:
    parameters, *optimizers = run.parts
    states = [tensor for optimizer in optimizers for state in optimizer.state.values() for tensor in state.values()]
    weights, adam = (sum(t.numel() * t.element_size() for t in tensors) / 1e6 for tensors in (parameters, states))
    lives = {"libraries": libraries, "weights": weights, "their gradient": weights, "Adam's two": adam}
    lives |= {"reference": weights}
    lives["a micro-batch, and the rest"] = peak - sum(lives.values())
    print("\n| at the peak | MB |\n|---|---|")
    for name, size in {**lives, "the process": peak}.items():
        print(f"| {name} | {size:.0f} |")


def main(args: Args) -> None:
    libraries = peak_memory()
    file, clock, runs = importlib.import_module(f"nano_rl.{args.algorithm}"), Profile(), []
    start = file.Run.start
    with tempfile.TemporaryDirectory() as folder:
        job = {"algorithm": args.algorithm, "completions": args.completions, "length": args.length, "steps": 3}
        with mock.patch.object(file.Run, "start", lambda run, *inputs: (runs.append(run), start(run, *inputs))):
            run_nano_rl(job | {"model": args.model}, clock, folder + "/run")
    show_time(args, clock)
    show_memory(runs[0], libraries, clock.peak)


if __name__ == "__main__":
    main(tyro.cli(Args))
