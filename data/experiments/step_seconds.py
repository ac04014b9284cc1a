"""Seconds per step on a CPU: remax.py beside TRL's RLOO and GRPO, interleaved in one process.

    pip install "trl==1.16.0"
    python data/experiments/step_seconds.py --threads 1 >> data/results/cpu.jsonl
    python data/experiments/step_seconds.py --threads 2 >> data/results/cpu.jsonl

Same random GPT-2, prompts, new tokens (never an EOS: every response is full), KL penalty, float32,
threads, gradient checkpointing off. --threads holds for all three: left alone, remax.py takes one
below 5M parameters. TRL draws two completions a prompt; ReMax one, and one greedy. Rounds take
turns (ReMax, RLOO, GRPO, ReMax, ...); the median second of each round's steps is kept, and the
ratio taken per round. Each side goes backward over all its rows at once: 32 rows for TRL, 16 for
ReMax, which trains on the sampled response alone.
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
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, TrainerCallback

import remax

TINY = Path(__file__).resolve().parent.parent / "tiny"
SIZES = {
    "1M": dict(vocab_size=700, n_embd=128, n_layer=4, n_head=4),
    "15M": dict(vocab_size=8192, n_embd=384, n_layer=6, n_head=6),
    "135M": dict(vocab_size=32768, n_embd=768, n_layer=12, n_head=12),
}


def reward(completions, **kwargs):
    return [len(set(text)) / 50 for text in completions]


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def trl_round(kind, model, tokenizer, prompts, steps, args, folder):
    config, trainer = {
        "RLOO": (trl.RLOOConfig, trl.RLOOTrainer),
        "GRPO": (trl.GRPOConfig, trl.GRPOTrainer),
    }[kind]
    clock = Clock()
    trainer(
        model=model,
        reward_funcs=reward,
        processing_class=tokenizer,
        callbacks=[clock],
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        args=config(
            output_dir=folder,
            per_device_train_batch_size=2 * args.batch,
            num_generations=2,
            max_completion_length=args.new_tokens,
            beta=0.05,
            max_steps=steps,
            learning_rate=1e-5,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=0,
        ),
    ).train()
    return statistics.median(clock.seconds[1:])


def remax_round(model, tokenizer, prompts, steps, args, folder):
    path = Path(folder) / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    output = tempfile.mkdtemp(dir=folder)
    flags = (
        f"--model {model} --prompts {path} --reward {__file__}:reward --output-dir {output} "
        f"--batch-size {args.batch} --micro-batch-size {args.micro} --steps {steps} --device cpu "
        f"--max-new-tokens {args.new_tokens} --kl-coef 0.05 --lr 1e-5 --eval-every {10**6} "
        "--no-gradient-checkpointing"
    )
    remax_run = remax.Run(remax.parse_args(flags.split()))
    torch.set_num_threads(args.threads)  # the same on all sides: Run takes one for a small model
    rows = [remax_run.train_step(step) for step in range(1, steps + 1)]
    assert all(row["tokens"] == args.new_tokens for row in rows)
    names = "rollout_seconds", "score_seconds", "update_seconds"
    return statistics.median(sum(row[name] for name in names) for row in rows[1:])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["1M", "15M", "135M"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(
        TINY / "policy", pad_token="<|endoftext|>", padding_side="left"
    )
    lines = (TINY / "prompts.jsonl").read_text().splitlines()[:128]
    prompts = [json.loads(line)["prompt"] for line in lines]
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                GPT2Config(
                    n_positions=128,
                    resid_pdrop=0,
                    embd_pdrop=0,
                    attn_pdrop=0,
                    bos_token_id=0,
                    eos_token_id=0,
                    **SIZES[size],
                )
            )
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            model.config.tie_word_embeddings = False
            model.transformer.ln_f.bias.data[:] = 1.0  # with the next line: EOS is never drawn
            model.lm_head.weight.data[0] = -1.0
            model.save_pretrained(f"{folder}/model")
            tokenizer.save_pretrained(f"{folder}/model")
            seconds = {"ReMax": [], "RLOO": [], "GRPO": []}
            for _ in range(args.rounds):
                seconds["ReMax"].append(
                    remax_round(f"{folder}/model", tokenizer, prompts, args.steps, args, folder)
                )
                for kind in "RLOO", "GRPO":
                    policy = AutoModelForCausalLM.from_pretrained(
                        f"{folder}/model", dtype=torch.float32
                    )
                    seconds[kind].append(
                        trl_round(kind, policy, tokenizer, prompts, args.steps, args, folder)
                    )
            ratios = {
                kind: [a / b for a, b in zip(seconds["ReMax"], seconds[kind], strict=True)]
                for kind in ("RLOO", "GRPO")
            }
            print(
                json.dumps(
                    dict(
                        size=size,
                        parameters=model.num_parameters(),
                        batch=args.batch,
                        new_tokens=args.new_tokens,
                        micro_batch=args.micro,
                        threads=args.threads,
                        rounds=args.rounds,
                        seconds={
                            kind: round(statistics.median(s), 4) for kind, s in seconds.items()
                        },
                        ratio={
                            f"ReMax/{kind}": round(statistics.median(r), 3)
                            for kind, r in ratios.items()
                        },
                        ratios={kind: [round(x, 3) for x in r] for kind, r in ratios.items()},
                        torch=torch.__version__,
                        transformers=transformers.__version__,
                        trl=trl.__version__,
                        machine=platform.processor() or platform.machine(),
                        command="python data/experiments/step_seconds.py " + " ".join(sys.argv[1:]),
                    )
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
