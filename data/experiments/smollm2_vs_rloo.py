# SPDX-License-Identifier: MIT
"""One training run of SmolLM2-135M, by remax.py or by TRL's RLOO: reward, KL and seconds.

    pip install "trl==1.16.0" vaderSentiment     # and data/experiments/smollm2.py before
    python data/experiments/smollm2_vs_rloo.py remax --lr 1e-4 --seed 1
    python data/experiments/smollm2_vs_rloo.py rloo --lr 1e-4 --seed 1

Same model, prompts, reward, KL penalty, learning rate schedule and precision, 16 prompts a step,
two responses a prompt on both sides: RLOO draws two, ReMax one and one greedy. Both are evaluated
by Run.evaluate, off the clock. Each run appends a row to data/results/smollm2_vs_rloo.jsonl.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import torch
import transformers
import trl
from datasets import Dataset
from transformers import TrainerCallback

import remax


def remax_run(run, args):
    """Train; return (seconds of each step, evaluations)."""
    seconds, evaluations = [], []
    names = "rollout_seconds", "score_seconds", "update_seconds"
    for step in range(1, args.steps + 1):
        metrics = run.train_step(step)
        seconds.append(sum(metrics[name] for name in names))
        if step % args.every == 0:
            evaluations.append({"step": step} | run.evaluate()[0])
    return seconds, evaluations


class Clock(TrainerCallback):
    """Notes the seconds of each step, and evaluates between them."""

    def __init__(self, run, every):
        self.run, self.every = run, every
        self.seconds, self.evaluations = [], []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)
        if state.global_step % self.every == 0:
            training = self.run.policy.training
            with torch.random.fork_rng():  # RLOO's own noise is left alone
                metrics, _ = self.run.evaluate()
            self.run.policy.train(training)
            self.evaluations.append({"step": state.global_step} | metrics)


def rloo_run(run, args):
    """Train; return (seconds of each step, evaluations)."""
    clock = Clock(run, args.every)
    run.optimizer = run.reference = None  # RLOO brings its own
    trainer = trl.RLOOTrainer(
        model=run.policy,
        processing_class=run.tokenizer,
        callbacks=[clock],
        reward_funcs=run.reward_function,
        train_dataset=Dataset.from_dict({"prompt": [row.prompt_text for row in run.training_rows]}),
        args=trl.RLOOConfig(
            output_dir=f"{run.folder}/rloo",
            per_device_train_batch_size=2 * run.args.batch_size,
            num_generations=2,
            max_completion_length=run.args.max_new_tokens,
            beta=run.args.kl_coef,
            max_steps=args.steps,
            learning_rate=args.lr,
            seed=args.seed,
            lr_scheduler_type="cosine",
            use_cpu=run.device.type == "cpu",
            bf16=run.dtype == torch.bfloat16,
            gradient_checkpointing=False,
            logging_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    run.reference = trainer.ref_model  # for the KL of the evaluations
    trainer.train()
    return clock.seconds, clock.evaluations


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("remax", "rloo"))
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=30, help="steps between evaluations")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--model {ROOT}/runs/smollm2 --batch-size 16 --max-new-tokens 32 --lr {args.lr} "
            f"--steps {args.steps} --seed {args.seed} --no-gradient-checkpointing "
            f"--device {args.device} "
            f"--reward {ROOT}/data/experiments/vader_reward.py:positive --output-dir {folder}/run"
        )
        run = remax.Run(remax.parse_args(flags.split()))
        before = {"step": 0} | run.evaluate()[0]
        seconds, evaluations = {"remax": remax_run, "rloo": rloo_run}[args.kind](run, args)
    hardware = f"{os.cpu_count()} virtual {platform.machine()} cores"
    if run.device.type == "cuda":
        hardware += f", {torch.cuda.get_device_name()}"
    row = {
        "kind": args.kind,
        "lr": args.lr,
        "seed": args.seed,
        "steps": args.steps,
        "decoded_tokens_at_most": args.steps * 2 * 16 * 32,
        "evaluations": [before, *evaluations],
        "seconds_per_step": statistics.median(seconds),
        "precision": str(run.dtype),
        "threads": args.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "hardware": hardware,
        "command": "python data/experiments/smollm2_vs_rloo.py " + " ".join(sys.argv[1:]),
    }
    print(json.dumps(row))
    with open(ROOT / "data/results/smollm2_vs_rloo.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
