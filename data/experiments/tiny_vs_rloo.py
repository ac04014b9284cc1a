"""Training seconds until held-out P(positive) reaches 0.9: remax.py beside TRL's RLOO.

    pip install "trl==1.16.0"
    python data/experiments/tiny_vs_rloo.py --out data/results/tiny_vs_rloo.jsonl

Same policy, prompts (32 a step), reward model, KL penalty, new tokens, one thread; 64 responses a
step on both sides: RLOO draws two a prompt, ReMax one and one greedy. RLOO gets the best of several
learning rates, chosen on seed 0; ReMax keeps its default. Both are evaluated by remax.evaluate
every few steps, off the clock.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import torch
import transformers
import trl
from datasets import Dataset
from transformers import TrainerCallback

import remax


def first(curve, goal):
    """Seconds at which a curve of (seconds, reward) first reaches the goal; None if never."""
    return next((seconds for seconds, reward in curve if reward >= goal), None)


def remax_curve(seed, args, folder):
    output = Path(folder) / f"remax-{args.steps}-{seed}"
    flags = f"--seed {seed} --steps {args.steps} --eval-every {args.every} --output-dir {output}"
    remax.main(flags.split())
    names = "rollout_seconds", "score_seconds", "update_seconds"
    seconds, curve = 0.0, []
    for line in (output / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        seconds += sum(row.get(name, 0) for name in names)
        if "eval_reward" in row:
            curve.append((seconds, row["eval_reward"]))
    return curve


class Clock(TrainerCallback):
    """Adds up the seconds of the steps and evaluates in between."""

    def __init__(self, evaluate, every):
        self.seconds, self.curve, self.evaluate, self.every = (
            0.0,
            [(0.0, evaluate())],
            evaluate,
            every,
        )

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.start
        if state.global_step % self.every == 0:
            self.curve.append((self.seconds, self.evaluate()))


def rloo_curve(seed, lr, args, folder):
    output_dir = f"{folder}/rloo-{lr}-{seed}"
    run = remax.Run(remax.parse_args(["--device", "cpu", "--output-dir", output_dir]))
    policy, tokenizer = run.policy, run.tokenizer

    def reward(prompts, completions, **columns):
        return run.reward_function(prompts, completions).tolist()

    def evaluate():
        training = policy.training
        with torch.random.fork_rng():  # RLOO's own noise is left alone
            metrics, _ = run.evaluate()
        policy.train(training)
        return metrics["eval_reward"]

    clock = Clock(evaluate, args.every)
    trl.RLOOTrainer(
        model=policy,
        processing_class=tokenizer,
        callbacks=[clock],
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": [row.prompt_text for row in run.training_rows]}),
        args=trl.RLOOConfig(
            output_dir=f"{folder}/rloo",
            per_device_train_batch_size=2 * run.args.batch_size,
            num_generations=2,
            max_completion_length=run.args.max_new_tokens,
            beta=run.args.kl_coef,
            max_steps=args.steps,
            learning_rate=lr,
            seed=seed,
            lr_scheduler_type="cosine",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    ).train()
    return clock.curve


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--goal", type=float, default=0.9)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4, 8e-4])
    parser.add_argument("--out", default="data/results/tiny_vs_rloo.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tried = {lr: rloo_curve(0, lr, args, folder) for lr in args.rates}
        best = min(tried, key=lambda lr: (first(tried[lr], args.goal) or 1e9, -tried[lr][-1][1]))
        curves = {"ReMax": [], "RLOO": []}
        for seed in range(args.seeds):  # in turn, so that a busy spell of the machine hits both
            curves["ReMax"].append(remax_curve(seed, args, folder))
            curves["RLOO"].append(rloo_curve(seed, best, args, folder))
    out = dict(
        goal=args.goal,
        rloo_lr=best,
        tried={lr: first(curve, args.goal) for lr, curve in tried.items()},
        versions=dict(
            torch=torch.__version__, transformers=transformers.__version__, trl=trl.__version__
        ),
        threads=1,
        command="python data/experiments/tiny_vs_rloo.py " + " ".join(sys.argv[1:]),
    )
    for kind in curves:
        seconds = [first(curve, args.goal) for curve in curves[kind]]
        out[kind] = dict(
            seconds=seconds,
            median=statistics.median(s or float("inf") for s in seconds),
            final_reward=[curve[-1][1] for curve in curves[kind]],
            seconds_per_step=[curve[-1][0] / args.steps for curve in curves[kind]],
        )
    print(json.dumps(out))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a") as file:
        file.write(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
