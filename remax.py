# SPDX-License-Identifier: MIT
"""ReMax in one file: REINFORCE whose baseline is the reward of the policy's own greedy answer.

One step of the algorithm (Li et al., https://arxiv.org/abs/2310.10505, Algorithm 1):
  1. Roll out    for each prompt x draw a response y ~ pi(.|x), and decode the greedy one, ybar.
  2. Score       reward r = r(x, y), baseline b = r(x, ybar). No critic: greedy decoding stands in.
  3. Mask        a response ends with its first EOS; everything after it is padding.
  4. Reference   log-probs of y under pi_ref, the frozen model that training started from.
  5. Gradient    of -sum_t log pi(y_t|x,y_<t) * A_t, A_t = r - b - beta * sum_{s>=t} log(pi/pi_ref).
  6. Update      clip the gradient norm, one optimizer step, throw the rollout away.
Gone from PPO: critic, GAE, gamma, lambda, ratios, clip range, inner epochs, whitened advantages.
Symbols: B prompts, P prompt tokens (padded on the left), T response tokens (padded on the right),
V vocabulary; x prompt, y response, ybar greedy, r reward, b baseline, A advantage, beta kl_coef.
  python remax.py                        # a tiny GPT-2 on the CPU: under a minute, no download
  python remax.py --model gpt2-large     # one GPU: film reviews, rewarded for being positive
"""
import argparse, gc, inspect, json, math, os, random, re, runpy, shutil, signal, sys, time
from contextlib import contextmanager
from dataclasses import dataclass, fields
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
GROUPS = dict(model="task", baseline="algorithm", micro_batch_size="memory", output_dir="run")

@dataclass
class Config:  # a flag a line; the comment is what --help prints
    model: str = None  # policy: a causal language model, hub id or folder
    reward: str = "lvwerra/distilbert-imdb"  # classifier, hub id or folder; or FILE.py:FUNCTION
    prompts: str = f"{DATA}/prompts.jsonl"  # json, jsonl, csv, parquet or txt file, or hub dataset
    prompt_column: str = "prompt"  # its column of texts, or of lists of {role, content}
    max_prompt_tokens: int = 64  # P: longer texts are cut to it, longer chats are dropped
    max_new_tokens: int = 48  # T: a response without EOS is cut here
    missing_eos_penalty: float = 0.0  # taken off the reward of such a response, sampled or greedy
    baseline: Literal["greedy", "none"] = "greedy"  # b: greedy is ReMax, none is REINFORCE
    kl_coef: float = 0.01  # beta: price of a nat of KL to the reference; 0 loads no reference
    steps: int = 300  # rollouts, and updates: one each
    batch_size: int = 32  # B: prompts a step, drawn anew
    lr: float = 1e-6  # learning rate at the start; it falls to 0 along a cosine
    optimizer: Literal["adamw", "adafactor"] = "adamw"  # adafactor: small state, a higher lr
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this norm
    seed: int = 0  # of the choice of prompts and of the sampling
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16, else fp16, on a GPU
    micro_batch_size: int = 8  # rows per backward pass: changes memory, not the gradient
    gradient_checkpointing: bool = True  # recompute activations in the backward pass
    offload: bool = None  # reference and reward model wait on the CPU; None: if memory is short
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda, cuda:1, ...
    output_dir: str = None  # for metrics, checkpoint and model; None: runs/MODEL-SEED
    eval_every: int = 50  # steps between evaluations on held-out prompts
    save_every: int = 100  # steps between checkpoints; the last step and Ctrl-C write one too
    resume: bool = False  # continue the run in output_dir: the same command, steps may be more
    def flag(self, name): return f"--{name.replace('_', '-')} {getattr(self, name)}"

NOTES = dict(re.findall(r"(\w+): .+  # (.+)", inspect.getsource(Config)))

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
    cache = StaticCache(config=policy.config, max_cache_len=P + max_new_tokens)
    done = torch.zeros_like(ids[:, 0], dtype=torch.bool)                               # (2B,)
    rows, start, last = B, 0, P + max_new_tokens - 1  # columns before start are cached
    for end in range(P, last + 1):
        logits = policy(ids[:rows, start:end], attention_mask=attention[:rows], use_cache=True,
                        position_ids=positions[:rows, start:end], past_key_values=cache,
                        logits_to_keep=1).logits[:, -1].float()
        cdf = logits[:B].softmax(-1).double().cumsum(-1)  # (B,V); float32 sums would lose rare v
        sampled = torch.searchsorted(cdf, torch.rand_like(cdf[:, :1]) * cdf[:, -1:])   # (B,1) y_t
        best = logits[-B:].argmax(-1, keepdim=True)                                 # (B,1) ybar_t
        token = torch.cat([sampled, best] if greedy else [sampled])[:, 0]              # (2B,)
        ids[:, end] = token.clamp(max=logits.size(-1) - 1).masked_fill(done, pad_id)  # NaN gives V
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
    positions = (attention.cumsum(1) - 1).clamp(min=0)  # without: tens of nats off (trl#6800)
    logits = model(ids, attention_mask=attention, position_ids=positions, use_cache=False,
                   logits_to_keep=T + 1).logits[:, -T - 1:-1]  # (B,T,V): column t predicts y_t
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
    """Inside, the model's weights are in dtype: decoding reads all of them for every token."""
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
    """One update from B prompts (B,P), one a rollout: so no ratio, no clip range. Returns figures.
    score: responses (N,T), sampled rows before greedy ones, -> rewards (N,). greedy False: b = 0.
    reference None: give kl_coef 0; between uses it rests on the device home."""
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
    policy.train()  # for gradient checkpointing; its dropout is 0
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
def check_model(cfg):
    """(device, dtype to compute in, the policy's tokenizer), or what is wrong with them."""
    device = torch.zeros(1, device=cfg.device).device
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    auto = "bf16" if bf16 else "fp16" if device.type == "cuda" else "fp32"
    cfg.precision = auto if cfg.precision == "auto" else cfg.precision  # for --resume
    tokenizer, config = (kind.from_pretrained(cfg.model) for kind in (AutoTokenizer, AutoConfig))
    assert "Classification" not in str(config.architectures), "a classifier is no language model"
    limit = getattr(config, "max_position_embeddings", math.inf)
    assert cfg.max_prompt_tokens + cfg.max_new_tokens <= limit, f"it has only {limit} positions"
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.all_special_tokens[0]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    print(f"EOS {tokenizer.eos_token!r}, pad {tokenizer.pad_token!r}; output in {cfg.output_dir}")
    return device, DTYPES[cfg.precision], tokenizer

def load_prompts(cfg, tokenizer):
    """(training rows, held-out rows): prompt "ids", their "text", and the dataset's "columns"."""
    import datasets  # here: --help need not wait for it
    path, longest, suffix = cfg.prompts, cfg.max_prompt_tokens, Path(cfg.prompts).suffix[1:]
    kind = dict(jsonl="json", txt="text").get(suffix, suffix) if Path(path).is_file() else None
    for number, line in enumerate(list(open(path, "rb"))[:9999] if suffix == "jsonl" else []):
        json.loads(b"\n" * number + (line.strip() or b"0"))  # its error names the line
    data = datasets.load_dataset(kind or path, data_files=path if kind else None, split="train")
    prompts = data["text" if kind == "text" else cfg.prompt_column][:]
    if chat := isinstance(prompts[0], list):
        prompts = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
    # A template writes the special tokens itself: added again, BOS would stand there twice.
    tokens, rows = tokenizer(prompts, add_special_tokens=not chat)["input_ids"], []
    for columns, ids in zip(data, tokens):  # a text is to be continued, but half a chat is none
        text = tokenizer.decode(ids[:longest], skip_special_tokens=True)
        if text.strip() and (len(ids) <= longest or not chat):
            columns["prompt"] = columns[cfg.prompt_column] if chat else text  # what pi sees
            rows.append({"ids": ids[:longest], "text": text, "columns": columns})
    print(f"{len(rows)} of {len(data)} prompts; the others are empty, or chats that are too long")
    random.Random(0).shuffle(rows)  # the same rows are held out for every seed
    held_out = min(128, math.ceil(len(rows) / 5))
    assert len(rows) - held_out >= cfg.batch_size, f"{len(rows) - held_out} prompts to train on"
    return rows[held_out:], rows[:held_out]

def load_reward(name, dtype, device, home):
    """reward(prompts, completions, **columns) -> list of floats, TRL's signature: FILE.py:FUNCTION,
    or a classifier, by its label's logit if it has one label, else its last label's probability."""
    if ".py:" in name:
        path, function = name.rsplit(":", 1)
        assert function in (found := runpy.run_path(path)), f"{path} has no function {function}"
        return found[function]
    config = AutoConfig.from_pretrained(name)
    assert "Classification" in str(config.architectures), "a language model is no classifier"
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right", truncation_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    model = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype)
    model.requires_grad_(False).config.pad_token_id = tokenizer.pad_token_id  # GPT-2's needs it
    longest = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 512))
    def reward(prompts, completions, **columns):
        texts = [p + c for p, c in zip(prompts, completions)]  # two texts, or two lists of messages
        if chat := isinstance(texts[0], list):
            texts = tokenizer.apply_chat_template(texts, tokenize=False)
        batch = tokenizer(texts, padding=True, truncation=True, max_length=longest,
                          add_special_tokens=not chat, return_tensors="pt").to(device)
        logits = model.to(device)(**batch).logits.float()                              # (N,labels)
        model.to(home())
        return logits[:, 0] if logits.size(1) == 1 else logits.softmax(1)[:, -1]       # (N,)
    return reward

def score_responses(reward, tokenizer, missing_eos_penalty, rows, responses):
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
    assert rewards.shape == (len(rows),) and rewards.isfinite().all(), (
        f"one finite number is due for each of {len(rows)} completions, not {rewards}")
    return rewards - missing_eos_penalty * (responses != tokenizer.eos_token_id).all(1), texts

def load_models(cfg, device, dtype, weights):
    """(policy in float32, frozen reference in dtype or None without KL, optimizer)."""
    config, load = AutoConfig.from_pretrained(cfg.model), AutoModelForCausalLM.from_pretrained
    reference = load(cfg.model, dtype=dtype).to(device) if cfg.kl_coef else None
    # Dropout makes two passes over one text disagree (trl#3500). Off before the modules read it.
    no_dropout = {key: 0.0 for key, value in config.to_dict().items()
                  if "drop" in key and isinstance(value, float)}
    # float32: bf16 rounds an update of 1e-6 away, and transformers 5 keeps the dtype of the file.
    policy = load(weights, dtype=torch.float32, **no_dropout).to(device)
    policy.config = config  # to be saved: dropout as it was
    if cfg.gradient_checkpointing:
        old = policy.gradient_checkpointing_enable  # its name in early transformers 5
        getattr(policy, "activation_checkpointing_enable", old)({"use_reentrant": False})
    if policy.num_parameters() < 5e6:  # so small a model is no faster on two threads, and 20 times
        torch.set_num_threads(1)       # slower when another process wants one of the cores
    # fused: what torch does by default on CUDA takes as much memory again as the gradients
    optimizer = (torch.optim.Adafactor(policy.parameters(), cfg.lr) if cfg.optimizer == "adafactor"
                 else torch.optim.AdamW(policy.parameters(), cfg.lr, weight_decay=0, fused=True))
    return policy, reference, optimizer

def collate(tokenizer, rows, device):
    """prompt (B,P) and attention (B,P), padded on the left: all responses start in one column."""
    return tokenizer.pad({"input_ids": [row["ids"] for row in rows]}, padding_side="left",
                         return_tensors="pt").to(device).values()

@torch.no_grad()
def evaluate(policy, reference, score, tokenizer, rows, dtype, home, cfg):
    """Means over the held-out rows; prints the first three of them."""
    eos_id, seen = tokenizer.eos_token_id, []
    with weights_as(policy.eval(), dtype):
        for part in (rows[i:i + cfg.batch_size] for i in range(0, len(rows), cfg.batch_size)):
            torch.manual_seed(len(seen))  # the same noise every time
            x = tuple(collate(tokenizer, part, cfg.device))                            # (B,P) twice
            x += rollout(policy, *x, cfg.max_new_tokens, eos_id, tokenizer.pad_token_id)  # (B,T)
            reward, texts = score(part, torch.cat(x[2:]))                              # (2B,)
            kl = [None] * len(part)
            if reference is not None:
                x = *x[:3], response_mask(x[2], eos_id)                                # (B,T) last
                kl = (token_logprobs(policy, *x) - token_logprobs(reference.to(cfg.device), *x)
                      ).sum(1).tolist()                                                # (B,)
                reference.to(home)
            seen += zip(*reward.view(2, -1).tolist(), kl, texts, texts[len(part):])
    for row, (r, b, _, y, ybar) in zip(rows[:3], seen):
        tqdm.write(f"> {row['text']}\n  sampled {r:6.3f}  {y!r}\n  greedy  {b:6.3f}  {ybar!r}")
    return {key: None if None in column else sum(column) / len(rows) for key, column in
            zip(("eval_reward", "eval_greedy_reward", "eval_kl"), zip(*seen))}

def parse(argv=None):
    parser = argparse.ArgumentParser(
        usage="python remax.py [--FLAG VALUE] ...", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Without --model:\n  " + "\n  ".join(f"{k} {v}" for k, v in TINY.items()))
    for f in fields(Config):
        group = parser.add_argument_group(GROUPS[f.name]) if f.name in GROUPS else group
        kind = ({"action": argparse.BooleanOptionalAction} if f.type is bool else
                {"choices": get_args(f.type)} if get_args(f.type) else {"type": f.type})
        group.add_argument("--" + f.name.replace("_", "-"), default=f.default, **kind,
                           help=NOTES[f.name] + " [%(default)s]")
    if parser.parse_args(argv).model is None:
        parser.set_defaults(**TINY)
    cfg = Config(**vars(parser.parse_args(argv)))
    cfg.output_dir = cfg.output_dir or f"runs/{Path(cfg.model).name}-{cfg.seed}"
    for f in fields(Config):
        value, zero = getattr(cfg, f.name), f.default == 0 or f.name == "kl_coef"
        if f.type in (int, float) and not (0 < value < math.inf or value == 0 and zero):
            parser.error(f"{cfg.flag(f.name)}: must be finite, above 0{' or 0' * zero}")
    if cfg.batch_size % min(cfg.batch_size, cfg.micro_batch_size):
        parser.error(f"{cfg.flag('micro_batch_size')} does not divide {cfg.flag('batch_size')}")
    return cfg

def open_run(cfg, folder):
    """(metrics.jsonl open for more, the checkpoint's state and weights); step -1 in a new run."""
    folder.mkdir(parents=True, exist_ok=True)
    log, path = open(folder / "metrics.jsonl", "a", buffering=1), folder / "checkpoint/state.pt"
    there = log.tell() > 0 or path.exists()
    assert cfg.resume == there, f"there is {'a' if there else 'no'} run to resume"
    state, weights = {"step": -1, "log_bytes": 0, "args": vars(cfg)}, cfg.model
    if path.exists():  # else the run was killed before its first checkpoint: it starts again
        state = torch.load(path, map_location="cpu", weights_only=True)
        weights = path.with_name(f"step-{state['step']}")
    for name, old in state["args"].items():
        if name == "micro_batch_size":  # from here on, the flags leave the mathematics alone
            break
        same = cfg.steps >= old if name == "steps" else getattr(cfg, name) == old
        assert same, f"{cfg.flag(name)}: the run to resume has {old}"
    log.truncate(min(state["log_bytes"], log.tell()))  # the steps after the checkpoint come again
    (folder / "args.json").write_text(json.dumps(vars(cfg), indent=2))
    return log, state, weights

def save(policy, folder, **state):
    """checkpoint/: weights in a new folder, then state.pt, whose renaming makes them count."""
    weights = folder / f"step-{state['step']}"
    policy.save_pretrained(weights)
    torch.save(state, folder / "state.new")
    for path in [*weights.iterdir(), folder / "state.new"]:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(folder / "state.new", folder / "state.pt")
    for old in set(folder.glob("step-*")) - {weights}:
        shutil.rmtree(old)

def train(cfg, asked):
    (device, dtype, tokenizer), folder = check_model(cfg), Path(cfg.output_dir)
    log, state, weights = open_run(cfg, folder)
    rows, held_out = load_prompts(cfg, tokenizer)
    reward = load_reward(cfg.reward, dtype, device, lambda: home)  # where it rests: see below
    score = lambda batch, ys: score_responses(reward, tokenizer, cfg.missing_eos_penalty, batch, ys)
    policy, reference, optimizer = load_models(cfg, device, dtype, weights)
    gpu, needed = device.type == "cuda", 32 * policy.num_parameters()
    short = gpu and torch.cuda.get_device_properties(device).total_memory < needed
    home = torch.device("cpu") if cfg.offload or cfg.offload is None and short else device
    scaler = torch.amp.GradScaler(device.type, 1024.0, enabled=dtype == torch.float16)
    optimizer.load_state_dict(state.pop("optimizer", optimizer.state_dict()))
    scaler.load_state_dict(state.get("scaler", scaler.state_dict()))
    lrs = get_cosine_schedule_with_warmup(optimizer, 0, cfg.steps, 0.5, max(state["step"], 0) - 1)
    gc.freeze()  # or Python looks for garbage in all that was imported, again and again: 10 %
    skipped, sick, steps = 0, 0, tqdm(range(state["step"] + 1, cfg.steps + 1))
    for step in steps:
        set_seed(random.Random(f"{cfg.seed}/{step}").getrandbits(32))  # a resumed run draws alike
        if step > 0:  # 0 is before training
            batch = random.sample(rows, cfg.batch_size)
            row = {"step": step, "lr": lrs.get_last_lr()[0]} | remax_step(
                policy, reference, optimizer, scaler, lambda ys: score(batch, ys)[0],
                *collate(tokenizer, batch, device), max_new_tokens=cfg.max_new_tokens,
                eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, dtype=dtype,
                greedy=cfg.baseline == "greedy", kl_coef=cfg.kl_coef, home=home,
                micro_batch_size=cfg.micro_batch_size, max_grad_norm=cfg.max_grad_norm)
            row["peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9 if gpu else None
            lrs.step()
            log.write(json.dumps(row) + "\n")
            steps.set_postfix({key: row[key] for key in ("reward", "greedy_reward", "kl")})
            skipped = skipped + 1 if row["skipped"] else 0
            sick = sick + 1 if row["zero_advantage"] == 1 or (row["kl"] or 0) < -1 else 0
            if sick == 20:
                tqdm.write("warning: 20 steps of zero_advantage 1 (collapsed policy, constant "
                           "reward?) or kl below -1 (sampled from what is not the policy?)")
        if step % cfg.eval_every == 0 or step == cfg.steps:
            figures = evaluate(policy, reference, score, tokenizer, held_out, dtype, home, cfg)
            log.write(json.dumps({"step": step} | figures) + "\n")
        if asked or skipped == 5 or step == cfg.steps or step % cfg.save_every == 0:
            save(policy, folder / "checkpoint", step=step, log_bytes=log.tell(), args=vars(cfg),
                 optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        if asked or skipped == 5:
            tqdm.write(f"stopped after step {step}: the same command with --resume continues")
            sys.exit(asked[0] if asked else "remax.py: 5 steps of no finite gradient: lower --lr")
    policy.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(cfg.model).save_pretrained(folder / "model")

FAULT = dict(check_model="model device max_prompt_tokens max_new_tokens", save="output_dir",
    load_prompts="prompts prompt_column batch_size", load_reward="reward", score_responses="reward",
    load_models="model output_dir", open_run="resume output_dir", save_pretrained="output_dir",
    OutOfMemoryError="micro_batch_size batch_size gradient_checkpointing offload optimizer")

def main(argv=None, asked=()):
    cfg = parse(argv)
    try:
        train(cfg, asked)
    except Exception as e:  # where it comes up, or its kind, says which flags to look at
        *_, last = frames = inspect.getinnerframes(e.__traceback__)
        places = [type(e).__name__] + [frame.function for frame in frames]
        if not (names := next((FAULT[place].split() for place in places if place in FAULT), [])):
            raise  # a bug: with its traceback
        e = e.__cause__ if places[0] == "DatasetGenerationError" else e  # the reason is in there
        why = f"{places[0]}: {str(e).strip() or 'no data'}".removeprefix("AssertionError: ")
        sys.exit(f"remax.py: {why.splitlines()[0]} ({last.filename}:{last.lineno})\nlook at "
                 + " ".join(map(cfg.flag, names)) + f" ({NOTES[names[0]]}); what was saved stays")
    logged = [json.loads(line) for line in open(Path(cfg.output_dir, "metrics.jsonl"))]
    evals = [row for row in logged if "eval_reward" in row]
    took = {key: sum(row.get(key, 0) for row in logged) for key in logged[1] if "seconds" in key}
    print(*(f"{k:20}{v:.4g} -> {evals[-1][k]:.4g}" for k, v in evals[0].items() if v is not None),
          *(f"{key:20}{s:.1f} ({s / sum(took.values()):.0%})" for key, s in took.items()), sep="\n")

if __name__ == "__main__":
    asked = []  # exit codes of Ctrl-C and SIGTERM: they wait for the end of the step, once
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda n, _: sys.exit(128 + n) if asked else asked.append(128 + n))
    main(asked=asked)
