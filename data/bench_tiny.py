"""Training seconds until held-out P(positive) reaches 0.9 in the tiny world: remax.py beside TRL's RLOO.

    pip install "trl==1.16.0"  &&  python data/bench_tiny.py --out data/results/tiny_vs_rloo.jsonl

Same policy, prompts (32 a step), reward model, KL penalty, new tokens, one thread; 64 responses a step on both
sides: RLOO draws two a prompt, ReMax one and one greedy. RLOO gets the best of several learning rates, chosen on
seed 0; ReMax keeps its default. Both are evaluated by remax.evaluate every few steps, off the clock.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import transformers
import trl
from datasets import Dataset
from transformers import TrainerCallback

import remax

CPU = torch.device("cpu")


def first(curve, goal):
    """Seconds at which a curve of (seconds, reward) first reaches the goal; None if never."""
    return next((seconds for seconds, reward in curve if reward >= goal), None)


def remax_curve(seed, args, folder):
    remax.main(["--seed", str(seed), "--steps", str(args.steps), "--eval-every", str(args.every),
                "--output-dir", f"{folder}/remax-{args.steps}-{seed}"])
    seconds, curve = 0.0, []
    for row in map(json.loads, open(f"{folder}/remax-{args.steps}-{seed}/metrics.jsonl")):
        seconds += sum(row.get(f"{phase}_seconds", 0) for phase in ("rollout", "score", "update"))
        if "eval_reward" in row:
            curve.append((seconds, row["eval_reward"]))
    return curve


class Clock(TrainerCallback):
    """Adds up the seconds of the steps and evaluates in between."""
    def __init__(self, evaluate, every):
        self.seconds, self.curve, self.evaluate, self.every = 0.0, [(0.0, evaluate())], evaluate, every

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self.start
        if state.global_step % self.every == 0:
            self.curve.append((self.seconds, self.evaluate()))


def rloo_curve(seed, lr, args, folder):
    cfg = remax.Config(**remax.TINY, seed=seed)
    _, _, tokenizer = remax.check_model(cfg)
    policy, _, _ = remax.load_models(cfg, CPU, torch.float32, cfg.model)
    rows, held_out = remax.load_prompts(cfg, tokenizer)
    reward = remax.load_reward(cfg.reward, torch.float32, CPU, lambda: CPU)

    def evaluate():
        training = policy.training
        with torch.random.fork_rng():  # RLOO's own noise is left alone
            figures = remax.evaluate(policy, None, partial(remax.score_responses, reward, tokenizer, 0.0),
                                     tokenizer, held_out, torch.float32, CPU, cfg)
        policy.train(training)
        return figures["eval_reward"]
    clock = Clock(evaluate, args.every)
    trl.RLOOTrainer(
        model=policy, processing_class=tokenizer, callbacks=[clock],
        reward_funcs=lambda prompts, completions, **kwargs: reward(prompts=prompts, completions=completions).tolist(),
        train_dataset=Dataset.from_dict({"prompt": [row["text"] for row in rows]}),
        args=trl.RLOOConfig(
            output_dir=f"{folder}/rloo", per_device_train_batch_size=2 * cfg.batch_size, num_generations=2,
            max_completion_length=cfg.max_new_tokens, beta=cfg.kl_coef, max_steps=args.steps, learning_rate=lr, seed=seed,
            lr_scheduler_type="cosine", use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=10**6,
            save_strategy="no", report_to="none", disable_tqdm=True)).train()
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
    out = dict(goal=args.goal, rloo_lr=best, tried={lr: first(curve, args.goal) for lr, curve in tried.items()}, versions=dict(
        torch=torch.__version__, transformers=transformers.__version__, trl=trl.__version__), threads=1,
        command="python data/bench_tiny.py " + " ".join(sys.argv[1:]))
    for kind in curves:
        seconds = [first(curve, args.goal) for curve in curves[kind]]
        out[kind] = dict(seconds=seconds, median=statistics.median(s or float("inf") for s in seconds),
                         final_reward=[curve[-1][1] for curve in curves[kind]],
                         seconds_per_step=[curve[-1][0] / args.steps for curve in curves[kind]])
    print(json.dumps(out))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a") as file:
        file.write(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
