# SPDX-License-Identifier: MIT
"""Seconds a step: two processes of one thread, by torchrun, beside one process of two threads.

    python data/experiments/two_processes.py    # appends to data/results/two_processes.jsonl

A random GPT-2 of 14M parameters, 16 prompts a step, on a CPU with two cores. The two commands take
turns; of each the median step is kept, the first one left out.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

ROOT = Path(__file__).resolve().parent.parent.parent
ROUNDS, STEPS = 3, 6
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WAYS = {  # name: (command, threads of each process)
    "one process of two threads": ([sys.executable], "2"),
    "two processes of one thread": (TORCHRUN, "1"),
}


def make_model(folder):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=8192, n_embd=384, n_layer=6, n_head=6, n_positions=128)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "data/tiny/policy").save_pretrained(folder)
    return model.num_parameters()


def seconds_per_step(command, threads, model, output):
    flags = f"--model {model} --reward {ROOT}/data/tiny/reward --output-dir {output} --device cpu "
    flags += f"--batch-size 16 --steps {STEPS} --no-gradient-checkpointing --eval-every 1000"
    subprocess.run(
        [*command, str(ROOT / "remax.py"), *flags.split()],
        env=os.environ | {"OMP_NUM_THREADS": threads},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    names = "rollout_seconds", "score_seconds", "update_seconds"
    steps = [sum(row[name] for name in names) for row in rows if "reward" in row]
    return statistics.median(steps[1:])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    seconds = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        parameters = make_model(f"{folder}/model")
        for i in range(ROUNDS):
            for name, (command, threads) in WAYS.items():
                output = f"{folder}/{threads}-{i}"
                seconds[name].append(seconds_per_step(command, threads, f"{folder}/model", output))
    row = {
        "parameters": parameters,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "rounds": seconds,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hardware": f"{os.cpu_count()} virtual {platform.machine()} cores",
        "command": "python data/experiments/two_processes.py",
    }
    print(json.dumps(row))
    with open(ROOT / "data/results/two_processes.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
