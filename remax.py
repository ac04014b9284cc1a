# SPDX-License-Identifier: MIT
"""ReMax in one file: REINFORCE whose baseline is the reward of the policy's own greedy answer.

One step of the algorithm (Li et al., https://arxiv.org/abs/2310.10505, Algorithm 1):

  1. Roll out    for each prompt x draw a response y ~ pi(.|x), and decode the greedy one, ybar.
  2. Score       reward r = r(x, y), baseline b = r(x, ybar). No critic: greedy decoding stands in.
  3. Mask        a response ends with its first EOS; everything after it is padding.
  4. Reference   log-probs of y under pi_ref, the frozen model that training started from.
  5. Gradient    of -sum_t log pi(y_t|x,y_<t) * A_t,  A_t = r - b - beta * sum_{s>=t} log pi/pi_ref.
  6. Update      clip the gradient norm, one optimizer step, throw the rollout away.

What PPO has and this has not: value model and its optimizer, GAE, gamma and lambda, probability
ratios, clip range, several epochs over one rollout, whitened advantages.
Symbols: B prompts, P prompt tokens (padded on the left), T response tokens (padded on the right),
V vocabulary; x prompt, y response, ybar greedy, r reward, b baseline, A advantage, beta kl_coef.
  python remax.py                        # a tiny GPT-2 on the CPU: under a minute, no download
  python remax.py --model gpt2-large     # one GPU: film reviews, rewarded for being positive
"""
import argparse
import gc
import inspect
import json
import random
import re
import runpy
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoTokenizer, StaticCache, get_cosine_schedule_with_warmup, set_seed)

DATA = Path(__file__).resolve().parent / "data"
# Without --model these replace the defaults below, which follow the paper's GPT-2 runs (App. F.4).
TINY = dict(model=f"{DATA}/tiny-policy", reward=f"{DATA}/tiny-reward", max_new_tokens=40, steps=60,
            kl_coef=0.05, lr=6e-4, eval_every=20, gradient_checkpointing=False)
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


@dataclass
class Config:  # a flag a line; the comment is what --help prints
    model: str = None  # policy: a causal language model, hub id or folder
    reward: str = "lvwerra/distilbert-imdb"  # classifier, hub id or folder; or FILE.py:FUNCTION
    prompts: str = f"{DATA}/prompts.jsonl"  # json, jsonl, csv, parquet or txt file, or hub dataset
    prompt_column: str = "prompt"  # its column of texts, or of lists of {role, content}
    max_prompt_tokens: int = 64  # P: longer texts are cut to it, longer chats are dropped
    max_new_tokens: int = 48  # T: a response without EOS is cut here
    baseline: Literal["greedy", "none"] = "greedy"  # b: greedy is ReMax, none is REINFORCE
    kl_coef: float = 0.01  # beta: price of a nat of KL to the reference; 0 loads no reference
    steps: int = 300  # rollouts, and updates: one each
    batch_size: int = 32  # B: prompts a step
    lr: float = 1e-6  # learning rate at the start; it falls to 0 along a cosine
    optimizer: Literal["adamw", "adafactor"] = "adamw"  # adafactor: no moments, a higher lr
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this norm
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16, else fp16, on a GPU
    micro_batch_size: int = 8  # rows per backward pass: changes memory, not the gradient
    gradient_checkpointing: bool = True  # recompute activations in the backward pass
    offload: bool = None  # reference and reward model wait on the CPU; None: if memory is short
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda, cuda:1, ...
    output_dir: str = None  # for metrics and model; None: runs/MODEL-SEED
    eval_every: int = 50  # steps between evaluations on held-out prompts
    seed: int = 0  # of the sampling and of the order of the prompts


# =============== THE ALGORITHM: tensors, scalars and models; no config, no tokenizer ==============
@torch.inference_mode()
def rollout(policy, prompt, attention, max_new_tokens, eos_id, pad_id, greedy=True):
    """Draw y ~ pi(.|x) and decode the greedy ybar, in one loop over 2B rows.
    prompt, attention: (B,P), padded on the left. Returns response (B,T) and greedy (B,T) or None,
    pad_id after the first eos_id. policy in eval() mode: in train() mode gradient checkpointing
    drops the cache, silently. Not generate(), which samples from the top 50 unless told otherwise
    (transformers#38549) and reads the checkpoint's generation_config (trl#5783): that is not pi.
    """
    B, P = prompt.shape
    ids = torch.cat([prompt, prompt.new_full((B, max_new_tokens), pad_id)], 1).repeat(1 + greedy, 1)
    # Columns still to come count as attended (causality hides them), so that no shape ever changes.
    attention = torch.cat([attention, torch.ones_like(ids[:B, P:])], 1).repeat(1 + greedy, 1)
    positions = (attention.cumsum(1) - 1).clamp(min=0)                                 # (2B,P+T)
    takes_positions = "position_ids" in inspect.signature(policy.forward).parameters
    cache = StaticCache(config=policy.config, max_cache_len=P + max_new_tokens)
    done = torch.zeros_like(ids[:, 0], dtype=torch.bool)                               # (2B,)
    rows, start, last = B, 0, P + max_new_tokens - 1  # the cache ends before start
    for end in range(P, last + 1):
        position = {"position_ids": positions[:rows, start:end]} if takes_positions else {}
        logits = policy(ids[:rows, start:end], attention_mask=attention[:rows], use_cache=True,
                        past_key_values=cache, logits_to_keep=1, **position).logits[:, -1].float()
        cdf = logits[:B].softmax(-1).double().cumsum(-1)  # (B,V); float32 sums would lose rare v
        sampled = torch.searchsorted(cdf, torch.rand_like(cdf[:, :1]) * cdf[:, -1:])   # (B,1) y_t
        best = logits[-B:].argmax(-1, keepdim=True)                                 # (B,1) ybar_t
        token = torch.cat([sampled, best] if greedy else [sampled])[:, 0]              # (2B,)
        ids[:, end] = token.masked_fill(done, pad_id)
        done |= ids[:, end] == eos_id
        if (end % 16 == 0 or end == last or not done.is_cuda) and done.all():  # asking a GPU waits
            break
        if greedy and start == 0:  # the prompts were read once, (B,V) logits; from here on 2B rows
            cache.reorder_cache(torch.arange(B, device=ids.device).repeat(2))
            rows = 2 * B
        start = end
    return ids[:B, P:end + 1], ids[B:, P:end + 1] if greedy else None                  # (B,T) each


def response_mask(response, eos_id):
    """1 up to and including the first EOS, then 0: by position, as pad may be EOS. (B,T)->(B,T)"""
    is_eos = (response == eos_id).long()                                               # (B,T)
    return (is_eos.cumsum(1) - is_eos == 0).long()                                     # (B,T)


def token_logprobs(model, prompt, attention, response, mask):
    """log pi(y_t | x, y_<t) in nats, float32, 0 where masked: (B,P) twice, (B,T) twice -> (B,T)"""
    ids, T = torch.cat([prompt, response], 1), response.size(1)                        # (B,P+T)
    attention = torch.cat([attention, mask], 1)                                        # (B,P+T)
    # Without positions a left-padded GPT-2 is tens of nats off (trl#6800); BLOOM takes none.
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    position = {"position_ids": (attention.cumsum(1) - 1).clamp(min=0)} if takes_positions else {}
    logits = model(ids, attention_mask=attention, use_cache=False, logits_to_keep=T + 1,
                   **position).logits[:, -T - 1:-1]  # (B,T,V): the logits before token t predict it

    def pick(logits, token):  # (T,V), (T,) -> (T,), float32: bf16 would be 0.02 nats a token off
        return logits.gather(1, token[:, None])[:, 0].float() - logits.float().logsumexp(1)

    # Recomputed in the backward pass row by row: no float32 copy of all logits is ever kept.
    picked = [checkpoint(pick, *row, use_reentrant=False) for row in zip(logits, ids[:, -T:])]
    return torch.stack(picked).masked_fill(mask == 0, 0.0)                               # (B,T)


def remax_loss(logprobs, ref_logprobs, mask, reward, baseline, kl_coef):
    """The scalar whose gradient is the ReMax estimator (Algorithm 1; full-step KL of App. B).
    logprobs, ref_logprobs, mask: (B,T); reward, baseline: (B,). The gradient runs through logprobs
    alone. With baseline = 0 this is REINFORCE, literally.
    By hand, one row: logprobs (-1, -2), ref_logprobs (-1.5, -1), r = 1, b = 0.4, beta = 0.1: KL is
    (0.5, -1), to go (-0.5, -1), A = (0.6 + 0.05, 0.6 + 0.1), loss = 1 * 0.65 + 2 * 0.7 = 2.05.
    """
    kl = (logprobs.detach() - ref_logprobs) * mask                                     # (B,T)
    kl_to_go = kl.flip(1).cumsum(1).flip(1)                            # (B,T): sum over all s >= t
    advantage = (reward - baseline)[:, None] - kl_coef * kl_to_go                      # (B,T)
    # Summed over tokens: a mean would make a token of a short answer count more than of a long one.
    return -(logprobs * advantage * mask).sum(1).mean()


@contextmanager
def weights_as(model, dtype):
    """Inside, the model's weights are copies in dtype: decoding reads them all for every token."""
    own = [p.data for p in model.parameters()]
    try:
        for p in model.parameters():
            p.data = p.data.to(dtype)
        yield
    finally:
        for p, data in zip(model.parameters(), own):
            p.data = data


def micro_batches(prompt, attention, response, mask, size):
    """Yield (rows, (prompt, attention, response, mask)): sorted by length, padding cut off."""
    for rows in mask.sum(1).argsort().split(size):                                     # (size,)
        P, T = attention[rows].sum(1).max(), mask[rows].sum(1).max()
        yield rows, (prompt[rows, -P:], attention[rows, -P:], response[rows, :T], mask[rows, :T])


def remax_step(policy, reference, optimizer, scaler, score, prompt, attention, *, eos_id, pad_id,
               max_new_tokens, greedy, kl_coef, micro_batch_size, max_grad_norm, dtype, home):
    """One update from B prompts (B,P); returns its figures. score: responses (N,T) -> rewards (N,).
    A rollout serves one update and is the policy's own, so there is no ratio and no clip range.
    greedy False: b = 0. reference None: no KL; between uses it rests on the device home.
    """
    B, device, times = len(prompt), prompt.device, [time.perf_counter()]
    autocast = torch.autocast(device.type, dtype, dtype != torch.float32, cache_enabled=False)
    with weights_as(policy.eval(), dtype):                                             # 1. roll out
        responses = rollout(policy, prompt, attention, max_new_tokens, eos_id, pad_id, greedy)
    times.append(time.perf_counter())
    scores = score(torch.cat(responses) if greedy else responses[0])                   # 2. score
    reward, baseline = scores.chunk(2) if greedy else (scores, torch.zeros_like(scores))
    times.append(time.perf_counter())
    mask = response_mask(responses[0], eos_id)                                         # 3. (B,T)
    batches = list(micro_batches(prompt, attention, responses[0], mask, micro_batch_size))
    refs, sums = [0.0] * len(batches), torch.zeros(3, device=device)
    if reference is not None:                                                        # 4. reference
        with torch.no_grad(), autocast:
            refs = [token_logprobs(reference.to(device), *batch) for _, batch in batches]
        reference.to(home)
    policy.train()  # for gradient checkpointing; the config has dropout at 0
    for (rows, batch), ref in zip(batches, refs):                                      # 5. gradient
        with autocast:
            logprobs = token_logprobs(policy, *batch)                                  # (rows,T)
        # One denominator for the whole batch: the micro-batch size does not change the gradient.
        loss = remax_loss(logprobs, ref, batch[-1], reward[rows], baseline[rows], kl_coef)
        scaler.scale(loss * len(rows) / B).backward()
        sums += torch.stack([loss * len(rows), (logprobs - ref).sum(), -logprobs.sum()]).detach()
    scaler.unscale_(optimizer)                                                         # 6. update
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    if grad_norm.isfinite():  # else the step is skipped, and counted
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    # ---- diagnostics only below: means over the whole batch ----
    row = dict(reward=reward, greedy_reward=baseline if greedy else None, grad_norm=grad_norm,
               advantage=reward - baseline, zero_advantage=reward == baseline, tokens=mask.sum(1),
               kl=None if reference is None else sums[1] / B, entropy=sums[2] / mask.sum(),
               loss=sums[0] / B, eos=(responses[0] == eos_id).any(1), skipped=~grad_norm.isfinite())
    row = {key: v if v is None else v.float().mean().item() for key, v in row.items()}
    spans = [end - start for start, end in zip(times, times[1:] + [time.perf_counter()])]
    return row | dict(zip(("rollout_seconds", "score_seconds", "update_seconds"), spans))


# ================================= END OF THE ALGORITHM; the task ================================
def load_prompts(path, column, tokenizer, max_tokens):
    """(training rows, held-out rows): prompt "ids", their "text", and the dataset's "columns"."""
    import datasets  # here: --help need not wait for it
    suffix = Path(path).suffix[1:]
    kind = dict(jsonl="json", txt="text").get(suffix, suffix) if Path(path).is_file() else None
    data = datasets.load_dataset(kind or path, data_files=path if kind else None, split="train")
    prompts = data["text" if kind == "text" else column][:]
    if chat := isinstance(prompts[0], list):
        prompts = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
    # A template writes the special tokens itself: added again, BOS would stand there twice.
    tokens, rows = tokenizer(prompts, add_special_tokens=not chat)["input_ids"], []
    for columns, ids in zip(data, tokens):  # a text is to be continued, but half a chat is none
        if ids and (len(ids) <= max_tokens or not chat):
            text = tokenizer.decode(ids[:max_tokens], skip_special_tokens=True)
            columns["prompt"] = columns[column] if chat else text  # the reward sees what pi sees
            rows.append({"ids": ids[:max_tokens], "text": text, "columns": columns})
    print(f"{len(rows)} of {len(data)} prompts; the others are empty, or chats that are too long")
    random.Random(0).shuffle(rows)  # the same rows are held out for every seed
    held_out = min(128, len(rows) // 5)
    return rows[held_out:], rows[:held_out]


def load_reward(name, dtype, device, home):
    """reward(prompts, completions, **columns) -> list of floats, TRL's signature: FILE.py:FUNCTION,
    or a classifier, by its label's logit if it has one label, else its last label's probability."""
    if ".py:" in name:
        path, function = name.rsplit(":", 1)
        return runpy.run_path(path)[function]
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right", truncation_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    model = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype).eval()
    model.config.pad_token_id = tokenizer.pad_token_id  # GPT-2's classifier reads the token before
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))

    @torch.no_grad()
    def reward(prompts, completions, **columns):
        texts = [p + c for p, c in zip(prompts, completions)]  # two texts, or two lists of messages
        if chat := isinstance(texts[0], list):
            texts = tokenizer.apply_chat_template(texts, tokenize=False)
        batch = tokenizer(texts, padding=True, truncation=True, max_length=longest,
                          add_special_tokens=not chat, return_tensors="pt").to(device)
        logits = model.to(device)(**batch).logits.float()                              # (N,labels)
        model.to(home)
        return logits[:, 0] if logits.size(1) == 1 else logits.softmax(1)[:, -1]       # (N,)
    return reward


def collate(tokenizer, rows, device):
    """prompt (B,P) and attention (B,P), padded on the left: all responses start in one column."""
    return tokenizer.pad({"input_ids": [row["ids"] for row in rows]}, padding_side="left",
                         return_tensors="pt").to(device).values()


def score(reward, tokenizer, rows, responses):
    """Rewards (N,) and texts of responses (N,T); N = len(rows), or twice that: sampled, greedy."""
    rows = rows * (len(responses) // len(rows))
    # Decoded behind its prompt: alone, a response loses its first space in Llama's tokenizer.
    texts = [tokenizer.decode(row["ids"] + ids, skip_special_tokens=True)[len(row["text"]):]
             for row, ids in zip(rows, responses.tolist())]
    columns = {key: [row["columns"][key] for row in rows] for key in rows[0]["columns"]}
    prompts = columns.pop("prompt")
    completions = texts if isinstance(prompts[0], str) else [
        [{"role": "assistant", "content": text}] for text in texts]
    rewards = reward(**columns | dict(prompts=prompts, completions=completions))
    rewards = torch.as_tensor(rewards, dtype=torch.float32, device=responses.device)   # (N,)
    if rewards.shape != (len(rows),) or not rewards.isfinite().all():
        raise ValueError(f"--reward gave {rewards} for {len(rows)} responses")
    return rewards, texts


def load_models(cfg, device, dtype):
    """(policy in float32, frozen reference in dtype or None without KL, tokenizer, optimizer)."""
    tokenizer = AutoTokenizer.from_pretrained(cfg.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = AutoConfig.from_pretrained(cfg.model)
    # Dropout makes two passes over one text disagree (trl#3500). Off before the modules read it.
    config.update({key: 0.0 for key, value in config.to_dict().items()
                   if "drop" in key and isinstance(value, float)})
    load = partial(AutoModelForCausalLM.from_pretrained, cfg.model, config=config)
    reference = load(dtype=dtype).to(device).eval().requires_grad_(False) if cfg.kl_coef else None
    # float32: bf16 rounds an update of 1e-6 away, and transformers 5 keeps the dtype of the file.
    policy = load(dtype=torch.float32).to(device)
    policy.config = AutoConfig.from_pretrained(cfg.model)  # to be saved: dropout as it was
    if cfg.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    if policy.num_parameters() < 5e6:  # so small a model is no faster on two threads, and 20 times
        torch.set_num_threads(1)       # slower when another process wants one of the cores
    # fused: what torch does by default on CUDA takes as much memory again as the gradients
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.lr, weight_decay=0.0, fused=True)
    if cfg.optimizer == "adafactor":
        optimizer = torch.optim.Adafactor(policy.parameters(), cfg.lr)
    return policy, reference, tokenizer, optimizer


@torch.no_grad()
def evaluate(policy, reference, reward, tokenizer, rows, dtype, home, cfg):
    """Means over the held-out rows; prints the first three of them."""
    eos_id, pad_id, sums = tokenizer.eos_token_id, tokenizer.pad_token_id, torch.zeros(3).double()
    with torch.random.fork_rng(), weights_as(policy.eval(), dtype):
        torch.manual_seed(0)  # the same noise every time; training's is left alone
        for part in (rows[i:i + cfg.batch_size] for i in range(0, len(rows), cfg.batch_size)):
            x = tuple(collate(tokenizer, part, cfg.device))                            # (B,P) twice
            response, greedy = rollout(policy, *x, cfg.max_new_tokens, eos_id, pad_id)  # (B,T) each
            scores, texts = score(reward, tokenizer, part, torch.cat([response, greedy]))  # (2B,)
            sums[:2] += scores.view(2, -1).sum(1).cpu()
            if reference is not None:
                x += response, response_mask(response, eos_id)                         # (B,T) twice
                kl = token_logprobs(policy, *x) - token_logprobs(reference.to(cfg.device), *x)
                sums[2] += kl.sum().cpu()
                reference.to(home)
            for j in range(len(part[:3]) if part[0] is rows[0] else 0):
                tqdm.write(f"> {part[j]['text']}\n  sampled {scores[j]:6.3f}  {texts[j]!r}\n"
                           f"  greedy  {scores[j + len(part)]:6.3f}  {texts[j + len(part)]!r}")
    means = dict(zip(("eval_reward", "eval_greedy_reward", "eval_kl"), (sums / len(rows)).tolist()))
    return means if reference is not None else means | {"eval_kl": None}


def peak_memory_gb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform != "win32":  # of the whole process; Windows has no such call
        from resource import RUSAGE_SELF, getrusage
        return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Without --model: " + ", ".join(f"{key} {value}" for key, value in TINY.items()))
    notes = dict(re.findall(r"(\w+): .+  # (.+)", inspect.getsource(Config)))
    for f in fields(Config):
        kind = ({"action": argparse.BooleanOptionalAction} if f.type is bool else
                {"choices": get_args(f.type)} if get_args(f.type) else {"type": f.type})
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, **kind,
                            help=notes[f.name] + " [%(default)s]")
    if parser.parse_args(argv).model is None:
        parser.set_defaults(**TINY)
    return Config(**vars(parser.parse_args(argv)))


def main(argv=None):
    cfg = parse(argv)
    set_seed(cfg.seed)
    device, gpu = torch.device(cfg.device), cfg.device.startswith("cuda")
    auto = "bf16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    dtype = DTYPES[cfg.precision if cfg.precision != "auto" else auto if gpu else "fp32"]
    policy, reference, tokenizer, optimizer = load_models(cfg, device, dtype)
    small = gpu and torch.cuda.mem_get_info(device)[1] < 32 * policy.num_parameters()
    home = torch.device("cpu") if cfg.offload or cfg.offload is None and small else device
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, cfg.steps)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    reward = load_reward(cfg.reward, dtype, device, home)
    rows, held_out = load_prompts(cfg.prompts, cfg.prompt_column, tokenizer, cfg.max_prompt_tokens)
    folder = Path(cfg.output_dir or f"runs/{Path(cfg.model).name}-{cfg.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "args.json").write_text(json.dumps(vars(cfg), indent=2))
    log = open(folder / "metrics.jsonl", "w", buffering=1)
    gc.freeze()  # or Python looks for garbage in all that was imported, again and again
    for step in (bar := tqdm(range(cfg.steps + 1))):
        if step > 0:  # 0 is before training
            epoch, i = divmod(step - 1, max(len(rows) // cfg.batch_size, 1))
            order = random.Random(f"{cfg.seed}/{epoch}").sample(rows, len(rows))
            batch = order[i * cfg.batch_size:(i + 1) * cfg.batch_size]
            row = {"step": step, "lr": schedule.get_last_lr()[0]} | remax_step(
                policy, reference, optimizer, scaler,
                lambda responses: score(reward, tokenizer, batch, responses)[0],
                *collate(tokenizer, batch, device), max_new_tokens=cfg.max_new_tokens,
                eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
                greedy=cfg.baseline == "greedy", kl_coef=cfg.kl_coef, dtype=dtype, home=home,
                micro_batch_size=cfg.micro_batch_size, max_grad_norm=cfg.max_grad_norm)
            schedule.step()
            log.write(json.dumps(row | {"peak_memory_gb": peak_memory_gb(device)}) + "\n")
            bar.set_postfix({key: row[key] for key in ("reward", "greedy_reward", "kl")})
        if step % cfg.eval_every == 0 or step == cfg.steps:
            figures = evaluate(policy, reference, reward, tokenizer, held_out, dtype, home, cfg)
            log.write(json.dumps({"step": step} | figures) + "\n")
    policy.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(cfg.model).save_pretrained(folder / "model")
    logged = [json.loads(line) for line in open(log.name)]
    spent = {key: sum(r.get(key, 0) for r in logged) for key in row if key.endswith("_seconds")}
    print(*(f"{k:20}{logged[0][k]!s:.6} -> {v!s:.6}" for k, v in figures.items()),
          *(f"{k:20}{v:.1f} ({v / sum(spent.values()):.0%})" for k, v in spent.items()),
          f"written to          {folder}", sep="\n")


if __name__ == "__main__":
    main()
