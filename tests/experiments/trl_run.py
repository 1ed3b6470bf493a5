"""TRL's RLOO or GRPO on NanoRL's own task, evaluated by NanoRL and written down like one of its runs.

    uv run --with trl==1.16.0 --with datasets -m tests.experiments.trl_run rloo --output-dir runs/trl-rloo

Model, prompts, reward, completions and steps, temperature, precision, Adam, its constant learning rate and, for GRPO,
the paper's loss are what nano_rl/rloo.py and grpo.py have, by default or by the same flags, and there is no KL. The
rest is TRL's default, such as one update on a batch (GRPO's here are two), fused attention, one pass for all
completions and samples from float32 weights under autocast (ours come from a bfloat16 copy), but for gradient
checkpointing, which is off: it costs time to save memory.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
import tyro
from tyro.conf import Positional

from nano_rl import rloo

GRPO_LOSSES = {  # by what divides the sum over a completion's tokens
    "grpo": {"loss_type": "grpo"},  # its length
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},  # a constant, and no deviation, as its paper has it
    "dapo": {"loss_type": "dapo"},  # the tokens of the batch; nothing else of DAPO
}


@dataclass
class Args:
    algorithm: Positional[Literal["rloo", "grpo"]]
    output_dir: Path
    model: str = rloo.Args.model
    prompts: str = ""  # as in rloo.py, like the next
    reward_fn: str = ""
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "grpo"  # of GRPO_LOSSES; the default is the paper's, as in grpo.py
    learning_rate: float = rloo.Args.learning_rate
    batch_size: int = rloo.Args.batch_size
    seed: int = 0
    num_steps: int = 15
    max_new_tokens: int = rloo.Args.max_new_tokens
    eval_every: int = rloo.Args.eval_every


def make_trainer(algorithm: str, model, tokenizer, rows: list[dict], reward_fn, callback, loss_type="grpo", **options):
    """TRL's trainer of `algorithm` on rows of "prompt" and other columns; `options` are of its config."""
    import datasets
    import trl

    trainer_class = {"rloo": trl.RLOOTrainer, "grpo": trl.GRPOTrainer}[algorithm]
    config_class = {"rloo": trl.RLOOConfig, "grpo": trl.GRPOConfig}[algorithm]
    cuda = torch.cuda.is_available()
    config = config_class(
        num_generations=rloo.Args.group_size,
        temperature=rloo.Args.temperature,
        lr_scheduler_type="constant",
        beta=0.0,
        bf16=rloo.has_bfloat16(torch.device("cuda" if cuda else "cpu")),
        use_cpu=not cuda,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **(GRPO_LOSSES[loss_type] if algorithm == "grpo" else {}),
        **options,
    )
    rows = [row | {"prompt": rloo.as_messages(row["prompt"], "user")} for row in rows]
    return trainer_class(
        model=model,
        args=config,
        reward_funcs=reward_fn,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[callback],
    )


class Evaluations(transformers.TrainerCallback):
    """Calls `evaluate` with the step: at the start, every so many steps, and after the last."""

    def __init__(self, evaluate, every: int, last: int) -> None:
        self.evaluate, self.every, self.last = evaluate, every, last

    def on_train_begin(self, *_, **__) -> None:
        self.evaluate(0)

    def on_step_end(self, _, state, *__, **___) -> None:
        if state.global_step == self.last or self.every and state.global_step % self.every == 0:
            self.evaluate(state.global_step)


def main(args: Args) -> None:
    given = {name: value for name, value in asdict(args).items() if hasattr(rloo.Args, name)}
    ours = rloo.Args(**given | {"output_dir": str(args.output_dir)})
    run = rloo.Run(ours)
    policy, ref_policy, tokenizer = rloo.load_policy(ours, run.device)
    examples, held_out = rloo.load_prompts(ours, tokenizer, policy)
    policy.set_attn_implementation("sdpa")  # transformers' default, which TRL's user gets; `load` may choose another
    reward_fn = rloo.load_reward_fn(ours, run.device)
    args.output_dir.mkdir(parents=True)
    (args.output_dir / "config.json").write_text(
        json.dumps(asdict(args) | {"algorithm": f"trl-{args.algorithm}", "output_dir": str(args.output_dir)})
    )

    def evaluate(step: int) -> None:
        policy.eval()  # the trainer calls train() in every step
        policy.set_attn_implementation(ref_policy.config._attn_implementation)  # equal weights have a KL of 0
        with torch.random.fork_rng():  # TRL's draws go on as if there were no evaluation
            metrics, samples = rloo.evaluate(run, policy, ref_policy, tokenizer, held_out, reward_fn)
        policy.set_attn_implementation("sdpa")
        metrics = {name: value.item() for name, value in metrics.items() if value is not None}
        rows = [(split, *row) for split, *columns in samples for row in zip(*columns)]
        rows = [{"split": s, "prompt": e["prompt"], "completion": c, "reward": r} for s, e, c, r in rows]
        for name, lines in ("metrics.jsonl", [metrics]), ("completions.jsonl", rows):
            with open(args.output_dir / name, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step} | line, ensure_ascii=False) + "\n" for line in lines)

    def reward(prompts: list, completions: list, **columns) -> list[float]:  # TRL asks for a function with a name
        return reward_fn(prompts=prompts, completions=completions, **columns)

    make_trainer(
        args.algorithm,
        policy,
        tokenizer,
        [example["columns"] | {"prompt": example["prompt"]} for example in examples],
        reward,
        Evaluations(evaluate, args.eval_every, args.num_steps),
        loss_type=args.loss_type,
        output_dir=str(args.output_dir / "trl"),
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch_size,
        max_completion_length=args.max_new_tokens,
        max_steps=args.num_steps,
        seed=args.seed,
    ).train()
    run.finish(policy, tokenizer)


if __name__ == "__main__":
    main(tyro.cli(Args))
