# SPDX-License-Identifier: MIT
"""Seconds per step: remax.py beside TRL's RLOO and GRPO, interleaved in one process.

    pip install "trl==1.16.0"
    python data/experiments/step_seconds.py --threads 1 >> data/results/cpu.jsonl
    python data/experiments/step_seconds.py --threads 2 >> data/results/cpu.jsonl
    python data/experiments/step_seconds.py --device cuda --sizes gpt2-large --batch 64 \\
        --micro 8 --prompt-tokens 64 --new-tokens 128 --rounds 2 >> data/results/gpu.jsonl

Same random GPT-2, prompts, new tokens (never an EOS: every response is full) and KL penalty.
Rounds take turns (ReMax, RLOO, GRPO, ReMax, ...); the median second of each round's steps is kept,
and the ratio taken per round. TRL draws two completions a prompt; ReMax one, and one greedy.

On a CPU: float32, gradient checkpointing off, and one backward pass over all rows: 32 for TRL, 16
for ReMax, which trains on the sampled response alone. --threads holds for all three: left alone,
remax.py takes one below 5M parameters. On a GPU: float32 weights and bfloat16 autocast, gradient
checkpointing on, --micro rows in a backward pass on all sides, and the peak of the memory too.
"""

import argparse
import contextlib
import gc
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
    "gpt2-large": dict(vocab_size=50257, n_embd=1280, n_layer=36, n_head=20),
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


def trl_round(kind, model, tokenizer, prompts, args, folder):
    config, trainer = {
        "RLOO": (trl.RLOOConfig, trl.RLOOTrainer),
        "GRPO": (trl.GRPOConfig, trl.GRPOTrainer),
    }[kind]
    on_gpu = args.device == "cuda"
    rows = 2 * args.batch
    rows_at_once = args.micro if on_gpu else rows
    clock = Clock()
    trainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=reward,
        processing_class=tokenizer,
        callbacks=[clock],
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        args=config(
            output_dir=folder,
            per_device_train_batch_size=rows_at_once,
            gradient_accumulation_steps=rows // rows_at_once,
            num_generations=2,
            max_completion_length=args.new_tokens,
            beta=0.05,
            max_steps=args.steps,
            learning_rate=1e-5,
            use_cpu=not on_gpu,
            bf16=on_gpu,
            gradient_checkpointing=on_gpu,
            logging_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=0,
        ),
    ).train()
    return statistics.median(clock.seconds[1:])


def remax_round(model, prompts, args, folder):
    path = Path(folder) / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    output = tempfile.mkdtemp(dir=folder)
    flags = (
        f"--model {model} --prompts {path} --reward {__file__}:reward --output-dir {output} "
        f"--batch-size {args.batch} --micro-batch-size {args.micro} --steps {args.steps} "
        f"--max-new-tokens {args.new_tokens} --kl-coef 0.05 --lr 1e-5 --eval-every {10**6} "
        f"--max-prompt-tokens {args.prompt_tokens or 64} --device {args.device}"
    )
    if args.device == "cpu":
        flags += " --no-gradient-checkpointing"
    remax_run = remax.Run(remax.parse_args(flags.split()))
    torch.set_num_threads(args.threads)  # the same on all sides: Run takes one for a small model
    rows = [remax_run.train_step(step) for step in range(1, args.steps + 1)]
    assert all(row["tokens"] == args.new_tokens for row in rows)
    names = "rollout_seconds", "score_seconds", "update_seconds"
    return statistics.median(sum(row[name] for name in names) for row in rows[1:])


def peak_gb_of(device, call):
    """(what the call returns, the peak of the GPU's memory meanwhile in GB or None)."""
    gc.collect()
    if device == "cpu":
        return call(), None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    return result, torch.cuda.max_memory_allocated() / 1e9


def make_prompts(tokenizer, tokens):
    """The tiny world's prompts, or pieces of its text of about so many tokens."""
    lines = (TINY / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    if tokens is None:
        return prompts[:128]
    ids = tokenizer(" ".join(prompts)).input_ids
    starts = range(0, len(ids) - tokens, 16)
    return [tokenizer.decode(ids[start : start + tokens]) for start in starts]


def save_model(size, tokenizer, folder):
    """A random GPT-2 that never draws an EOS, with the tiny world's tokenizer."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_positions=256,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
        **SIZES[size],
    )
    model = AutoModelForCausalLM.from_config(config)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.transformer.ln_f.bias.data[:] = 1.0  # with the next line: EOS is never drawn
    model.lm_head.weight.data[0] = -1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def measure(size, tokenizer, prompts, args, folder):
    """The row of one size."""
    model = f"{folder}/model"
    parameters = save_model(size, tokenizer, model)
    seconds = {"ReMax": [], "RLOO": [], "GRPO": []}
    peak_gb = {}
    for _ in range(args.rounds):
        for kind, numbers in seconds.items():

            def call(kind=kind):
                if kind == "ReMax":
                    return remax_round(model, prompts, args, folder)
                return trl_round(kind, model, tokenizer, prompts, args, folder)

            with contextlib.redirect_stdout(sys.stderr):  # the rows alone go to standard output
                number, peak_gb[kind] = peak_gb_of(args.device, call)
            numbers.append(number)
            print(f"{size} {kind}: {number:.3f} s, {peak_gb[kind]} GB", file=sys.stderr)
    ratios = {
        kind: [a / b for a, b in zip(seconds["ReMax"], seconds[kind], strict=True)]
        for kind in ("RLOO", "GRPO")
    }
    row = dict(
        size=size,
        parameters=parameters,
        batch=args.batch,
        new_tokens=args.new_tokens,
        micro_batch=args.micro,
        threads=args.threads,
        rounds=args.rounds,
        seconds={kind: round(statistics.median(s), 4) for kind, s in seconds.items()},
        ratio={f"ReMax/{kind}": round(statistics.median(r), 3) for kind, r in ratios.items()},
        ratios={kind: [round(x, 3) for x in r] for kind, r in ratios.items()},
        torch=torch.__version__,
        transformers=transformers.__version__,
        trl=trl.__version__,
        machine=platform.processor() or platform.machine(),
        command="python data/experiments/step_seconds.py " + " ".join(sys.argv[1:]),
    )
    if args.device == "cuda":
        row |= {"prompt_tokens": args.prompt_tokens, "peak_gb": peak_gb}
        row["machine"] = torch.cuda.get_device_name()
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["1M", "15M", "135M"], choices=SIZES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="prompts a step")
    parser.add_argument("--micro", type=int, default=16, help="rows in a backward pass")
    parser.add_argument("--prompt-tokens", type=int, help="[the tiny world's prompts as they are]")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    remax.silence_libraries()
    tokenizer = AutoTokenizer.from_pretrained(
        TINY / "policy", pad_token="<|endoftext|>", padding_side="left"
    )
    prompts = make_prompts(tokenizer, args.prompt_tokens)
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(size, tokenizer, prompts, args, folder)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
