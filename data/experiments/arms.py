# SPDX-License-Identifier: MIT
"""Run an experiment: the same training with several baselines, rewards or seeds, and keep the logs.

    python data/experiments/arms.py tiny              # five seeds of each of three baselines
    python data/experiments/arms.py smollm2 --jobs 2  # three seeds, one to two hours on two cores

Every run is a command that a person could type. Its metrics.jsonl goes to
data/results/EXPERIMENT/ARM-SEED.jsonl, and what it printed to ARM-SEED.txt; its command, versions
and seconds go into the runs.jsonl there. --arm and --seed choose one run and replace its row.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
SMOLLM2 = "--model runs/smollm2 --batch-size 16 --max-new-tokens 32 --lr 5e-5 --eval-every 30"
SMOLLM2 += " --no-gradient-checkpointing"
REVIEWS = f"{SMOLLM2} --steps 60 --reward data/experiments/vader_reward.py:positive"
SHIFTED_REVIEWS = f"{SMOLLM2} --steps 60"
SHIFTED_REVIEWS += " --reward data/experiments/shifted_vader.py:plus_number_of_prompt"
CHAT = f"{SMOLLM2} --steps 60 --prompts runs/json_task.jsonl --max-prompt-tokens 80"
CHAT += " --reward data/experiments/json_task.py:is_bare_json"
ON_A_GPU = "--model runs/smollm2 --lr 5e-5 --steps 100 --eval-every 25"
ON_A_GPU += " --reward data/experiments/vader_reward.py:positive"
SHIFTED = "--reward data/experiments/shifted_reward.py"
EXPERIMENTS = {  # name: (seeds, {arm: flags})
    "tiny": (range(5), {"remax": "", "reinforce": "--baseline none", "batch": ""}),
    "smollm2": (
        (1, 2, 3),
        {"remax": REVIEWS, "reinforce": f"{REVIEWS} --baseline none", "batch": REVIEWS},
    ),
    "smollm2_shift": ((1, 2, 3), {"remax-x": SHIFTED_REVIEWS, "batch-x": SHIFTED_REVIEWS}),
    "smollm2_gpu": (range(1, 6), {"remax": ON_A_GPU, "reinforce": f"{ON_A_GPU} --baseline none"}),
    "smollm2_kl": ((1,), {"remax": f"{REVIEWS} --kl-coef 0.1"}),
    "chat": ((1,), {"remax": CHAT}),
    "shift": (
        range(5),
        {
            "remax-0": f"{SHIFTED}:plus_0",
            "remax-5": f"{SHIFTED}:plus_5",
            "remax-x": f"{SHIFTED}:plus_number_of_prompt",
            "reinforce-0": f"{SHIFTED}:plus_0 --baseline none",
            "reinforce-5": f"{SHIFTED}:plus_5 --baseline none",
            "reinforce-x": f"{SHIFTED}:plus_number_of_prompt --baseline none",
            "batch-0": f"{SHIFTED}:plus_0",
            "batch-5": f"{SHIFTED}:plus_5",
            "batch-x": f"{SHIFTED}:plus_number_of_prompt",
        },
    ),
}
BATCH_MEAN = "data/experiments/batch_mean.py"  # the script of the arms whose name begins with batch
PACKAGES = ("torch", "transformers", "datasets")


def run_arm(experiment, arm, seed, flags, threads):
    """Run one command, copy its metrics and return what there is to say about it."""
    output = f"runs/arms/{experiment}-{arm}-{seed}"
    script = BATCH_MEAN if arm.startswith("batch") else "remax.py"
    command = ["python", script, *shlex.split(flags), "--seed", str(seed)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    folder = ROOT / "data/results" / experiment
    log = f"{arm}-{seed}.jsonl"
    start = time.perf_counter()
    with open(folder / f"{arm}-{seed}.txt", "w") as console:
        subprocess.run(
            [sys.executable, *command[1:], "--output-dir", output],
            cwd=ROOT,
            env=environment,
            stdout=console,
            check=True,
        )
    shutil.copy(ROOT / output / "metrics.jsonl", folder / log)
    shutil.rmtree(ROOT / output)  # the weights are not needed any more
    print(f"{experiment} {log} {time.perf_counter() - start:.0f} s", flush=True)
    return {
        "log": log,
        "command": shlex.join(command),
        "whole_seconds": time.perf_counter() - start,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "threads": threads,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time [1]")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run [1]")
    parser.add_argument("--arm", help="this arm alone")
    parser.add_argument("--seed", type=int, help="this seed alone")
    args = parser.parse_args()
    seeds, arms = EXPERIMENTS[args.experiment]
    folder = ROOT / "data/results" / args.experiment
    folder.mkdir(parents=True, exist_ok=True)
    hardware = f"{os.cpu_count()} virtual {platform.machine()} cores, {args.jobs} runs at a time"
    if torch.cuda.is_available():
        hardware += f", {torch.cuda.get_device_name()}"
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [
            pool.submit(run_arm, args.experiment, arm, seed, flags, args.threads)
            for seed in seeds
            for arm, flags in arms.items()
            if args.arm in (None, arm) and args.seed in (None, seed)
        ]
    path = folder / "runs.jsonl"
    rows = {}
    if path.exists():
        for row in map(json.loads, path.read_text().splitlines()):
            rows[row["log"]] = row
    for run in runs:
        row = run.result() | {"hardware": hardware}
        rows[row["log"]] = row
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))


if __name__ == "__main__":
    main()
