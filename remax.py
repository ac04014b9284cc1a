# SPDX-License-Identifier: MIT
"""ReMax in one file: REINFORCE whose baseline is the reward of the policy's own greedy response.

One step of the algorithm (Li et al., https://arxiv.org/abs/2310.10505, Algorithm 1):
  1. Roll out    For each prompt x draw a response y ~ pi(.|x) and decode the greedy one, ybar.
  2. Score       Reward r = r(x, y), baseline b = r(x, ybar).
  3. Mask        A response ends with its first EOS; everything after it is padding.
  4. Reference   Log-probs of y under pi_ref, the frozen model that training started from.
  5. Gradient    Of -sum_t log pi(y_t|x,y_<t) * A_t, A_t = r - b - beta sum_{s>=t} log(pi/pi_ref).
  6. Update      Clip the gradient norm, take one optimizer step, throw the rollout away.

What PPO has and ReMax does not need:
  - a critic, its optimizer, and GAE with gamma and lambda: the greedy response is the baseline;
  - probability ratios and their clipping: there is one update per rollout, always on-policy;
  - several epochs over one rollout, and advantages divided by their standard deviation.

Symbols, in shapes and equations:
  B prompts, P prompt tokens (padded on the left), T response tokens (padded on the right),
  V vocabulary; x prompt, y response, ybar greedy response, r reward, b baseline, A advantage,
  pi policy, pi_ref reference, beta kl_coef.

  python remax.py                        # a tiny GPT-2 on the CPU: under a minute, no download
  python remax.py --model gpt2-large     # one GPU: film reviews, rewarded for being positive
  torchrun --nproc-per-node 8 remax.py --model gpt2-large     # eight GPUs share each batch
"""

import argparse
import copy
import glob
import hashlib
import importlib.util
import json
import math
import os
import pickle
import random
import signal
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none: two runs in one folder are not noticed there
    fcntl = None

import datasets
import torch
import torch.distributed as dist
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
)

# =================================================================================================
# The algorithm: tensors, scalars and models. No flags, no tokenizer, no files.
# =================================================================================================


@torch.no_grad()
def rollout(policy, prompt, attention_mask, max_new_tokens, eos_id, pad_id, greedy=True):
    """Draw a response to each prompt, and decode the greedy one beside it, in one loop.

    policy: a Hugging Face causal language model in eval() mode.
    prompt, attention_mask: (B,P), padded on the left.
    Returns response (B,T), greedy_response (B,T), or (0,T) without greedy, both pad_id after the
    first eos_id, and logprobs (B,T): of each sampled token, in nats, as it was drawn.
    Raises ValueError for a model whose cache does not hold all that it has read (Mamba, RWKV,
    BERT): token by token it would see nothing of what came before.

    Why not generate()? It samples from the 50 likeliest tokens unless told otherwise
    (transformers#38549) and obeys the checkpoint's generation_config (trl#5783). That is not pi.
    """
    B = len(prompt)
    inputs = prompt  # (B,P) in the first pass, then the newest tokens, (2B,1)
    cache = None
    tokens, logprobs = [], []
    done = torch.zeros(2 * B if greedy else B, 1, dtype=torch.bool, device=prompt.device)
    for t in range(max_new_tokens):
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (2B,P+t)
        output = policy(
            inputs,
            attention_mask=attention_mask,
            position_ids=positions[:, -inputs.size(1) :],
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        try:
            cache = output.cache  # before transformers 5.24 it was called past_key_values
            tokens_in_cache = cache.get_seq_length()
        except (AttributeError, ValueError):  # there is none, or it is a state without a length
            tokens_in_cache = 0
        if tokens_in_cache < attention_mask.size(1):
            raise ValueError(f"{type(policy).__name__} keeps no cache of the tokens it has read")
        logits = output.logits[:, -1].float()  # (2B,V)
        if greedy and t == 0:  # each prompt was read once; from here on it has two rows
            two_rows_each = torch.arange(B, device=prompt.device).repeat(2)  # (2B,)
            cache.reorder_cache(two_rows_each)
            logits = logits[two_rows_each]  # (2B,V)
            attention_mask = attention_mask[two_rows_each]  # (2B,P)

        probabilities = logits[:B].softmax(-1)  # (B,V): all of pi, no temperature, no top-k
        sampled = torch.multinomial(probabilities, 1)  # (B,1): y_t
        best = logits[B:].argmax(-1, keepdim=True)  # (B,1): ybar_t, or (0,1) without greedy
        logprobs.append(probabilities.gather(1, sampled).log())  # (B,1)

        inputs = torch.cat([sampled, best]).masked_fill(done, pad_id)  # (2B,1)
        tokens.append(inputs)
        done = done | (inputs == eos_id)
        if done.all():
            break
        attention_mask = torch.cat([attention_mask, torch.ones_like(inputs)], 1)  # (2B,P+t+1)
    tokens = torch.cat(tokens, 1)  # (2B,T)
    return tokens[:B], tokens[B:], torch.cat(logprobs, 1)


def response_mask(response, eos_id):
    """1 up to and including the first EOS, then 0: (B,T) -> (B,T).

    By position and not by token: many tokenizers pad with EOS, and then a mask of "no padding"
    would hide the EOS from training, so that the policy forgets how to end.
    """
    is_eos = (response == eos_id).long()  # (B,T)
    eos_before = is_eos.cumsum(1) - is_eos  # (B,T)
    return (eos_before == 0).long()


def token_logprobs(model, prompt, attention_mask, response, mask):
    """log pi(y_t | x, y_<t) in nats, float32, 0 where masked.

    prompt, attention_mask: (B,P), padded on the left; response, mask: (B,T), padded on the right.
    Returns (B,T): column t belongs to response token t.
    """
    T = response.size(1)
    ids = torch.cat([prompt, response], 1)  # (B,P+T)
    attention_mask = torch.cat([attention_mask, mask], 1)  # (B,P+T)
    # Without positions a left-padded GPT-2 is off by tens of nats (trl#6800).
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # (B,P+T)
    logits = model(
        ids,
        attention_mask=attention_mask,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=T + 1,
    ).logits[:, -T - 1 : -1]  # (B,T,V): the logits of one column predict the token of the next

    def log_softmax_at(logits, token):  # (T,V), (T,) -> (T,)
        # In float32: in bfloat16 it would be off by 0.02 nats a token.
        return logits.float().log_softmax(-1).gather(1, token[:, None])[:, 0]

    logprobs = []
    for row_logits, row_tokens in zip(logits, response, strict=True):
        # Recomputed in the backward pass, row by row: no float32 copy of all logits is ever kept.
        row = checkpoint(log_softmax_at, row_logits, row_tokens, use_reentrant=False)  # (T,)
        logprobs.append(row)
    return torch.stack(logprobs).masked_fill(mask == 0, 0.0)  # (B,T)


# Why this loss has the gradient of E[r] - beta * KL(pi || pi_ref), turned round for descent:
#   sum_y pi(y|x) = 1          so  E[grad log pi(y|x)] = sum_y grad pi(y|x) = grad 1 = 0.
#   b depends on x alone       so  E[b * grad log pi] = b * 0: any such b may be subtracted. The
#                                  greedy response is fixed by x and the weights: it may be b.
#   A token cannot undo        so  E[f(y_<t) * grad log pi(y_t|x,y_<t)] = 0 in the same way: what
#   what came before it            was paid for past tokens drops out, only the KL to go is left.
#   log pi inside the KL       has a gradient of its own, but E[1 * grad log pi] = 0 again:
#                                  the KL may be detached, as if it were part of the reward.
def remax_loss(logprobs, ref_logprobs, mask, reward, baseline, kl_coef):
    """The scalar whose gradient is the ReMax estimator (Algorithm 1; full-step KL of App. B).

    logprobs, ref_logprobs, mask: (B,T); reward, baseline: (B,). The gradient runs through logprobs
    alone. With baseline = 0 this is REINFORCE, literally.
    By hand, one row: logprobs (-1, -2), ref_logprobs (-1.5, -1), r = 1, b = 0.4, beta = 0.1: KL is
    (0.5, -1), to go (-0.5, -1), A = (0.6 + 0.05, 0.6 + 0.1), loss = 1 * 0.65 + 2 * 0.7 = 2.05.
    """
    kl = (logprobs.detach() - ref_logprobs) * mask  # (B,T)
    kl_to_go = kl.flip(1).cumsum(1).flip(1)  # (B,T): sum over all s >= t
    advantage = (reward - baseline)[:, None] - kl_coef * kl_to_go  # (B,T)
    # Summed over tokens: a mean would make a token of a short answer count more than of a long one.
    return -(logprobs * advantage * mask).sum(1).mean()


@contextmanager
def weights_as(model, dtype):
    """Inside, the model's weights are in dtype: decoding reads all of them for every token."""
    own_weights = [parameter.data for parameter in model.parameters()]
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, own in zip(model.parameters(), own_weights, strict=True):
            parameter.data = own


def micro_batches(prompt, attention_mask, response, mask, size):
    """Cut a batch into parts of at most `size` rows of like length, without columns of padding.

    prompt, attention_mask: (B,P); response, mask: (B,T). Yields rows, the indices (N,) of the
    part's rows, T, the tokens of its longest response, and its four tensors.
    """
    by_length = mask.sum(1).argsort()  # (B,)
    for rows in by_length.split(size):
        P = attention_mask[rows].sum(1).max()
        T = mask[rows].sum(1).max()
        part = prompt[rows, -P:], attention_mask[rows, -P:], response[rows, :T], mask[rows, :T]
        yield rows, T, part


def average(tensor):
    """Under torchrun, make a tensor its mean over all processes; alone, leave it as it is."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def average_gradients(model):
    """Under torchrun, give every process the mean of all processes' gradients."""
    if not dist.is_initialized():
        return
    for parameter in model.parameters():
        if parameter.grad is None:  # an expert that no token of this process was sent to
            parameter.grad = torch.zeros_like(parameter)
        average(parameter.grad)


def mean(values):
    """The mean of figures (B,), over the prompts of all processes, as a Python number."""
    return average(values.float().mean()).item()


def remax_step(
    policy,
    reference,
    optimizer,
    scaler,
    score,
    prompt,
    attention_mask,
    *,
    eos_id,
    pad_id,
    max_new_tokens,
    greedy,
    kl_coef,
    micro_batch_size,
    max_grad_norm,
    dtype,
):
    """One update of the policy from B prompts. Returns the step's figures, name -> number.

    Under torchrun each process brings B prompts of its own, and all make the same update.

    prompt, attention_mask: (B,P), padded on the left. score: responses (N,T), the sampled ones
    before the greedy ones, -> rewards (N,). reference: a frozen model, or None if kl_coef is 0.
    dtype: what to compute in; the weights stay in float32. greedy False: b = 0, plain REINFORCE.
    """
    B, device = len(prompt), prompt.device
    autocast = torch.autocast(
        device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False
    )
    start_time = time.perf_counter()

    # 1. Roll out. In train() mode gradient checkpointing would drop the cache, silently.
    policy.eval()
    with weights_as(policy, dtype):
        response, greedy_response, sampling_logprobs = rollout(
            policy, prompt, attention_mask, max_new_tokens, eos_id, pad_id, greedy
        )  # (B,T) each
    rollout_time = time.perf_counter()

    # 2. Score. One call for both halves, so that nothing can score them differently.
    rewards = score(torch.cat([response, greedy_response]))  # (2B,)
    reward = rewards[:B]  # (B,)
    baseline = rewards[B:] if greedy else torch.zeros_like(reward)  # (B,)
    score_time = time.perf_counter()

    # 3. Mask.
    mask = response_mask(response, eos_id)  # (B,T)
    parts = list(micro_batches(prompt, attention_mask, response, mask, micro_batch_size))

    # 4. Reference.
    ref_logprobs = torch.zeros(mask.shape, device=device)  # (B,T)
    if reference is not None:
        for rows, T, part in parts:
            with torch.no_grad(), autocast:
                ref_logprobs[rows, :T] = token_logprobs(reference, *part)

    # 5. Gradient. Gradient checkpointing needs train() mode; there is no dropout to fear.
    policy.train()
    logprobs = torch.zeros(mask.shape, device=device)  # (B,T), kept for the figures below
    for rows, T, part in parts:
        with autocast:
            part_logprobs = token_logprobs(policy, *part)  # (N,T)
        part_loss = remax_loss(
            part_logprobs,
            ref_logprobs[rows, :T],
            mask[rows, :T],
            reward[rows],
            baseline[rows],
            kl_coef,
        )
        # One denominator for the whole batch: the micro-batch size does not change the gradient.
        scaler.scale(part_loss * len(rows) / B).backward()
        logprobs[rows, :T] = part_logprobs.detach()

    # 6. Update. A gradient that is not finite is left out, and counted.
    average_gradients(policy)  # under torchrun: each process has had its share of the batch
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    if grad_norm.isfinite():
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()

    # ---- diagnostics only below: means over the whole batch ----
    tokens = mask.sum(1)  # (B,)
    kl = (logprobs - ref_logprobs).sum(1)  # (B,), nats a response: both are 0 where masked
    difference = ((logprobs - sampling_logprobs).abs() * mask).sum(1)  # (B,)
    loss = remax_loss(logprobs, ref_logprobs, mask, reward, baseline, kl_coef)
    return {
        "reward": mean(reward),
        "greedy_reward": mean(baseline) if greedy else None,
        "advantage": mean(reward - baseline),
        "zero_advantage": mean(reward == baseline),
        "kl": mean(kl) if reference is not None else None,
        "entropy": mean(-logprobs.sum(1)) / mean(tokens),
        "tokens": mean(tokens),
        "eos": mean((response == eos_id).any(1)),
        "sampling_logp_difference": mean(difference) / mean(tokens),
        "loss": mean(loss),
        "grad_norm": grad_norm.item(),
        "skipped": float(not grad_norm.isfinite()),
        "rollout_seconds": rollout_time - start_time,
        "score_seconds": score_time - rollout_time,
        "update_seconds": time.perf_counter() - score_time,
    }


# =================================================================================================
# End of the algorithm. The task: prompts in, rewards out. It knows the tokenizer and the flags.
# =================================================================================================

# What the libraries raise when a file, a name or a value that a person gave is no good.
BAD_INPUT = (
    OSError,
    ValueError,
    RuntimeError,
    ImportError,
    EOFError,
    pickle.UnpicklingError,
    datasets.exceptions.DatasetsError,
)


HERE = Path(__file__).resolve().parent


def shown(path):
    """A path below this file's folder without that folder, so that lines stay short."""
    return str(path).removeprefix(f"{HERE}{os.sep}")


def without_function(path):
    """FILE.py of FILE.py:FUNCTION; any other path as it is."""
    return path.rpartition(":")[0] if ".py:" in path else path


def flag(args, name):
    return f"--{name.replace('_', '-')} {shown(getattr(args, name))}"


@contextmanager
def explain(args, *names):
    """Answer bad input in two lines: what is wrong, and the flags to look at. No traceback."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # main() knows the remedies
    except BAD_INPUT as error:
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            error = error.__cause__ or error  # the reason is in there
        reason = str(error).strip() or type(error).__name__
        flags = ", ".join(flag(args, name) for name in names)
        sys.exit(f"remax.py: {reason.splitlines()[0]}\nlook at {flags}")


def load_tokenizer(name, **options):
    """AutoTokenizer, but a folder that holds none is an error: it would read every text alike."""
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"{shown(name)} holds no tokenizer")
    return tokenizer


def load_policy_tokenizer(args):
    """The policy's tokenizer, with an EOS and a padding token."""
    tokenizer = load_tokenizer(args.model)
    if args.eos_token is not None:
        if len(tokenizer.encode(args.eos_token, add_special_tokens=False)) != 1:
            raise ValueError(f"{args.eos_token} is no token of the policy's tokenizer")
        tokenizer.eos_token = args.eos_token
    if tokenizer.eos_token is None:
        raise ValueError("its tokenizer has no EOS, so no response would end: name one")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


FILE_FORMATS = {  # suffix: (the name that datasets has for it, its options)
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}


def read_dataset(name):
    """The rows of a file, by its suffix, or of the training split of a dataset on the hub."""
    path = Path(name)
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    if not path.exists() and suffix in FILE_FORMATS:
        raise FileNotFoundError(f"there is no file {name}")  # the hub would be asked for it
    if not path.is_file():
        return datasets.load_dataset(name, split="train")
    if suffix not in FILE_FORMATS:
        raise ValueError(f"{name} ends in none of {' '.join(FILE_FORMATS)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{name} is empty")
    kind, options = FILE_FORMATS[suffix]
    # Escaped, or datasets would take a [, * or ? in the name for a wildcard.
    dataset = datasets.load_dataset(kind, data_files=glob.escape(name), split="train", **options)
    return dataset.rename_column("text", "prompt") if suffix == ".txt" else dataset


def check_chat(number, chat):
    """Refuse what a template would render as nonsense; number is the row's."""
    for message in chat:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f"row {number} has a message without role or content: {message!r:.60}")


def check_end_of_turn(tokenizer):
    """Without the EOS at the end of a turn, responses would run on into the next turn."""
    content = "the content of a turn"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    end = text[text.rindex(content) + len(content) :]
    if tokenizer.eos_token not in end:
        raise ValueError(
            f"the template ends a turn with {end!r}, which lacks EOS {tokenizer.eos_token!r}: "
            "name the token that ends a turn by --eos-token"
        )


def read_prompts(args, tokenizer):
    """Return (dataset, prompts, token ids), three of one length; a prompt is a text or a chat."""
    dataset = read_dataset(args.prompts)
    if args.prompt_column not in dataset.column_names:
        raise ValueError(f"its columns are {', '.join(dataset.column_names)}")
    if len(dataset) == 0:
        raise ValueError("there are 0 prompts")
    prompts = dataset[args.prompt_column][:]
    kind = list if isinstance(prompts[0], list) else str
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, kind):
            raise ValueError(f"row {number} is no {kind.__name__} as a prompt: {prompt!r:.60}")
    if kind is str:
        if tokenizer.chat_template is not None:
            print("the prompts are texts: the policy's chat template is not applied")
        return dataset, prompts, tokenizer(prompts)["input_ids"]

    check_end_of_turn(tokenizer)
    encoded = []
    for number, chat in enumerate(prompts, 1):
        check_chat(number, chat)
        text = ""
        if chat:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        # The template writes the special tokens itself: added again, BOS would stand there twice.
        encoded.append(tokenizer.encode(text, add_special_tokens=False))
    return dataset, prompts, encoded


def load_prompts(args, tokenizer):
    """Return (training rows, held-out rows).

    A row is a dict: prompt_ids, the tokens that the policy sees; prompt_text, the same as text;
    columns, the dataset's own columns and "prompt", which go to the reward function.
    """
    with explain(args, "prompts", "prompt_column", "eos_token"):
        dataset, prompts, encoded = read_prompts(args, tokenizer)
    rows = []
    for columns, prompt, ids in zip(dataset, prompts, encoded, strict=True):
        is_chat = isinstance(prompt, list)
        if is_chat and len(ids) > args.max_prompt_tokens:
            continue  # a text can be cut anywhere, but half a chat is none
        ids = ids[: args.max_prompt_tokens]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if text.strip():
            columns["prompt"] = prompt if is_chat else text
            rows.append({"prompt_ids": ids, "prompt_text": text, "columns": columns})

    random.Random(0).shuffle(rows)  # the same prompts are held out, whatever the seed
    held_out = min(128, math.ceil(len(rows) / 5))
    training = len(rows) - held_out
    left_out = len(prompts) - len(rows)
    note = f" ({left_out} left out: empty, or chats that are too long)" if left_out else ""
    print(f"{len(rows)} prompts: {training} to train on, {held_out} held out{note}")
    with explain(args, "prompts", "max_prompt_tokens", "batch_size"):
        if training < args.batch_size:
            raise ValueError(f"{training} prompts to train on are fewer than one batch")
    return rows[held_out:], rows[:held_out]


def collate(tokenizer, rows, device):
    """prompt, attention_mask (B,P), padded on the left, so that all responses start in column P."""
    inputs = {"input_ids": [row["prompt_ids"] for row in rows]}
    batch = tokenizer.pad(inputs, padding_side="left", return_tensors="pt").to(device)
    return batch["input_ids"], batch["attention_mask"]


@contextmanager
def no_way_out():
    """A reward that calls sys.exit() must not end the run as if all were well."""
    try:
        yield
    except SystemExit as stop:
        raise RuntimeError("the reward called sys.exit()") from stop


def load_reward_function(args):
    """The function of FILE.py:FUNCTION. What the file itself raises keeps its traceback."""
    path, _, function = args.reward.rpartition(":")
    with explain(args, "reward"):
        if not path.endswith(".py"):
            raise ValueError("name the function too: FILE.py:FUNCTION")
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path}")
    name = Path(path).stem
    sys.path.insert(0, str(Path(path).parent))  # it may import its neighbours
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)  # where a process pool looks for its functions
    with no_way_out():
        spec.loader.exec_module(module)
    with explain(args, "reward"):
        if not callable(getattr(module, function, None)):
            raise ValueError(f"{path} has no function {function}")
    return getattr(module, function)


class RewardModel:
    """A sequence classifier as a reward function: (prompts, completions) -> rewards (N,).

    The reward is the logit of its one label or, if it has several, the last one's probability.
    It reads text with a tokenizer of its own, never the policy's tokens.
    """

    def __init__(self, name, dtype):
        config = AutoConfig.from_pretrained(name)
        if "SequenceClassification" not in str(config.architectures):
            raise ValueError(f"{name} is no sequence classifier")
        tokenizer = load_tokenizer(name, padding_side="right", truncation_side="left")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        self.tokenizer = tokenizer
        self.model = load_model(AutoModelForSequenceClassification, name, dtype=dtype)
        self.model.requires_grad_(False)
        # A GPT-2 classifier reads the last token that is no padding: it must know the padding.
        self.model.config.pad_token_id = tokenizer.pad_token_id
        positions = getattr(config, "max_position_embeddings", 512)
        self.max_length = min(tokenizer.model_max_length, positions)
        self.device = torch.device("cpu")

    def __call__(self, prompts, completions, **columns):
        # Two texts add up to a text, two lists of messages to a chat.
        texts = [p + c for p, c in zip(prompts, completions, strict=True)]
        is_templated = False
        if isinstance(texts[0], list) and self.tokenizer.chat_template is None:
            texts = ["\n".join(message["content"] for message in chat) for chat in texts]
        elif isinstance(texts[0], list):
            texts = self.tokenizer.apply_chat_template(texts, tokenize=False)
            is_templated = True  # with its special tokens
        batch = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.max_length,
            add_special_tokens=not is_templated,
            return_tensors="pt",
        ).to(self.device)
        logits = self.model(**batch).logits.float()  # (N,labels)
        if logits.size(1) == 1:
            return logits[:, 0]
        return logits.softmax(1)[:, -1]


def load_reward(args, dtype):
    """reward(prompts, completions, **columns) -> one number a completion: TRL's signature."""
    if ".py" in args.reward:
        return load_reward_function(args)
    with explain(args, "reward"):
        return RewardModel(args.reward, dtype)


def decode_responses(tokenizer, rows, responses):
    """The texts of responses (N,T) to the prompts of N rows."""
    texts = []
    for row, ids in zip(rows, responses.tolist(), strict=True):
        # Behind its prompt: alone, a response loses its first space in Llama's tokenizer.
        text = tokenizer.decode(row["prompt_ids"] + ids, skip_special_tokens=True)
        texts.append(text[len(row["prompt_text"]) :])
    return texts


def score_responses(args, reward, tokenizer, rows, responses):
    """Rewards (N,) of responses (N,T) to N rows; or to N/2 rows, the sampled ones first."""
    if len(responses) == 2 * len(rows):
        rows = rows + rows
    # Copies: rows are shared between sampled and greedy responses, and between steps.
    columns = {
        name: [copy.deepcopy(row["columns"][name]) for row in rows] for name in rows[0]["columns"]
    }
    prompts = columns.pop("prompt")
    completions = decode_responses(tokenizer, rows, responses)
    if isinstance(prompts[0], list):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    columns["prompts"] = prompts
    columns["completions"] = completions
    with no_way_out():
        rewards = reward(**columns)  # what a person's own function raises keeps its traceback

    with explain(args, "reward"):
        try:
            rewards = torch.as_tensor(rewards, dtype=torch.float32, device=responses.device)
            rewards = rewards.detach()
        except (TypeError, ValueError) as error:
            raise ValueError(f"rewards must be a list of numbers, not {rewards!r:.60}") from error
        if rewards.shape != (len(rows),) or not rewards.isfinite().all():
            raise ValueError(f"{len(rows)} finite numbers are due as rewards, not {rewards}")
    has_no_eos = (responses != tokenizer.eos_token_id).all(1)  # (N,)
    return rewards - args.missing_eos_penalty * has_no_eos


# =================================================================================================
# The models.
# =================================================================================================


def choose_device(name):
    """The device of a name such as cpu, cuda or cuda:1. torchrun's processes get a GPU each."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA GPU here")
    if device.type == "cuda" and dist.is_initialized():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"{device.type} is none of cpu, cuda, mps")
    if device.type == "mps":
        print("device mps: nobody has tested remax.py there")
    return torch.zeros(1, device=device).device  # cuda becomes cuda:0


def choose_dtype(precision, device):
    """What to compute in. auto: on a GPU bfloat16 if it has it, else float16; float32 elsewhere."""
    if precision == "auto" and device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def load_model(auto_class, name, **options):
    """from_pretrained, but weights that the checkpoint lacks are an error: they would be random."""
    model, info = auto_class.from_pretrained(
        name, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    absent = [*info["missing_keys"], *info["mismatched_keys"]]
    if absent:
        raise ValueError(f"{shown(name)} has no fitting weights for {absent[0]}")
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ValueError(f"{shown(name)} has weights that are not finite")
    return model


def turn_off_noise(config):
    """Set every dropout and jitter of a config, and of the configs in it, to 0.

    With them two passes over one text disagree, and the KL is noise (trl#3500).
    """
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            turn_off_noise(value)
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(config, name, 0.0)


def check_policy(args):
    """Refuse a model that cannot be trained here, before its weights are loaded."""
    if Path(args.model, "adapter_config.json").exists():
        raise ValueError("an adapter is no model: merge it into its model first")
    config = AutoConfig.from_pretrained(args.model)
    if "Classification" in str(config.architectures):
        raise ValueError("a classifier is no language model")
    positions = getattr(config.get_text_config(), "max_position_embeddings", math.inf)
    if args.max_prompt_tokens + args.max_new_tokens > positions:
        raise ValueError(f"prompt and response do not fit into its {positions} positions")


def load_policy(args):
    """The model to train: float32 weights, no noise, gradient checkpointing if asked for."""
    config = AutoConfig.from_pretrained(args.model)
    turn_off_noise(config)  # before the modules read it
    # float32: bfloat16 weights would round an update of 1e-6 away.
    policy = load_model(AutoModelForCausalLM, args.model, config=config, dtype=torch.float32)
    policy.config = AutoConfig.from_pretrained(args.model)  # to be saved: dropout as it was
    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable({"use_reentrant": False})
    return policy


def load_reference(args, dtype):
    """The frozen model that training starts from; None without KL."""
    if args.kl_coef == 0:
        return None
    return load_model(AutoModelForCausalLM, args.model, dtype=dtype).requires_grad_(False)


def make_optimizer(args, policy):
    if args.optimizer == "adafactor":
        return torch.optim.Adafactor(policy.parameters(), args.lr)
    # fused: torch's default on CUDA takes as much memory again as the gradients.
    return torch.optim.AdamW(policy.parameters(), args.lr, weight_decay=0.0, fused=True)


def offload(frozen, policy, device):
    """Keep a frozen model's weights in CPU memory while the policy is at work."""

    def fetch(*_):
        frozen.to(device)

    def put_away(*_):
        if frozen.device.type != "cpu":
            frozen.to("cpu")

    frozen.register_forward_pre_hook(fetch)
    policy.register_forward_pre_hook(put_away)


# =================================================================================================
# A run: evaluation, checkpoints, the training loop.
# =================================================================================================

# These flags leave the mathematics of a run alone: they may change when it is resumed.
MAY_CHANGE = (
    "micro_batch_size",
    "gradient_checkpointing",
    "offload",
    "device",
    "output_dir",
    "eval_every",
    "save_every",
    "resume",
)

# Sampler and density are one function: a larger difference, in nats a token, is no rounding.
LARGEST_DIFFERENCE = {torch.float32: 0.02, torch.bfloat16: 0.3, torch.float16: 0.3}


def comparable(args):
    """The flags as --resume compares them: a file by its content, wherever it lies."""
    values = {name: shown(value) for name, value in vars(args).items()}
    for name in "prompts", "reward":
        path = Path(without_function(getattr(args, name)))
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            values[name] = f"{Path(getattr(args, name)).name} with the sha256 {digest[:16]}"
    return values


def lock(file):
    """Refuse a file that another process holds; it is let go when this one ends."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is writing {file.name}") from error


def read_checkpoint(args, path):
    """The checkpoint that --resume goes on from, made by the same command; None without it."""
    if not args.resume:
        return None
    if not path.exists():
        raise ValueError(f"{args.output_dir} holds no checkpoint to resume from")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    now = comparable(args)
    for name, before in checkpoint["args"].items():
        is_longer = name == "steps" and args.steps > int(before)
        if now[name] != before and name not in MAY_CHANGE and not is_longer:
            raise ValueError(f"--{name.replace('_', '-')} {now[name]}: the run has {before}")
    return checkpoint


def open_metrics(folder):
    """metrics.jsonl, open for appending, by this run alone."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115, open for the run
    lock(metrics)
    return metrics


def begin_metrics(args, folder, metrics, checkpoint):
    """Refuse to write over a run; cut a resumed one back to its checkpoint."""
    if checkpoint is not None:
        # The steps after the checkpoint come again.
        metrics.truncate(min(checkpoint["metrics_bytes"], metrics.tell()))
        return
    if (folder / "checkpoint.pt").exists():
        raise ValueError(
            f"{args.output_dir} holds a run: --resume continues it, "
            "another --output-dir starts a new one"
        )
    if metrics.tell() > 0:
        raise ValueError(
            f"{args.output_dir} holds a run without a checkpoint: "
            "delete it, or choose another --output-dir"
        )
    (folder / "args.json").write_text(json.dumps(vars(args), indent=2))


def save_checkpoint(path, checkpoint):
    """Write it beside the old one, then rename: a kill at any instant leaves one of them whole."""
    beside = path.with_suffix(".new")
    try:
        with open(beside, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # a full disk, hidden behind torch's own error
            raise error.__context__ from None
        raise
    finally:
        beside.unlink(missing_ok=True)


class StopRequest:
    """Notes Ctrl-C, SIGTERM or SIGHUP until the end of the step; a second one ends all at once."""

    # Windows has no SIGHUP.
    kinds = [getattr(signal, k) for k in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, k)]
    signal_number = None

    def __call__(self, signal_number, frame):
        if self.signal_number is not None:
            sys.exit(128 + signal_number)
        self.signal_number = signal_number
        if signal_number in (signal.SIGINT, signal.SIGTERM):
            os.write(2, b"\nstopping after this step; press again to stop now, unsaved\n")
        else:  # the terminal is gone: printing to it would fail
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)

    def agreed(self):
        """The signal, if there was one in any process: all stop after the same step."""
        number = torch.tensor(self.signal_number or 0)
        if dist.is_initialized():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def install(self):
        for kind in self.kinds:
            signal.signal(kind, self)
        if hasattr(os, "register_at_fork"):
            # A child that a reward function forks must not inherit this: terminate() has to end
            # it, also in the instant before it has the default handlers.
            os.register_at_fork(
                before=partial(signal.pthread_sigmask, signal.SIG_BLOCK, self.kinds),
                after_in_parent=partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, self.kinds),
                after_in_child=self.uninstall,
            )

    def uninstall(self):
        for kind in self.kinds:
            signal.signal(kind, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.kinds)


def in_words(figures, prefix=""):
    """reward, greedy reward and KL of a step or, with the prefix eval_, of an evaluation."""
    words = f"reward {figures[prefix + 'reward']:.3f}"
    if figures[prefix + "greedy_reward"] is not None:
        words += f", greedy {figures[prefix + 'greedy_reward']:.3f}"
    if figures[prefix + "kl"] is not None:
        words += f", KL {figures[prefix + 'kl']:.3g}"
    return words


class Run:
    """One training run: what it has loaded, and what it does with it."""

    def __init__(self, args):
        """Check and load everything, cheap things first."""
        self.args = args
        self.folder = Path(args.output_dir).resolve()
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.processes = dist.get_world_size() if dist.is_initialized() else 1
        with explain(args, "batch_size"):
            if args.batch_size % self.processes != 0:
                raise ValueError(f"the batch does not divide among {self.processes} processes")
        with explain(args, "device"):
            self.device = choose_device(args.device)
        self.dtype = choose_dtype(args.precision, self.device)
        with explain(args, "model", "eos_token", "max_prompt_tokens", "max_new_tokens"):
            check_policy(args)
            self.tokenizer = load_policy_tokenizer(args)
        with explain(args, "output_dir"):
            if self.rank == 0:
                self.metrics = open_metrics(self.folder)
            checkpoint = read_checkpoint(args, self.folder / "checkpoint.pt")
            if self.rank == 0:
                begin_metrics(args, self.folder, self.metrics, checkpoint)
        self.training_rows, self.held_out_rows = load_prompts(args, self.tokenizer)
        self.reward = load_reward(args, self.dtype)
        with explain(args, "model", "gradient_checkpointing"):
            self.policy = load_policy(args)
            self.reference = load_reference(args, self.dtype)
            self.check_prompts()
        self.policy.to(self.device)
        self.place_frozen_models()
        self.optimizer = make_optimizer(args, self.policy)
        # A sum over tokens is large: the default scale of 65536 would overflow at once.
        is_fp16 = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, 1024.0, enabled=is_fp16)
        self.steps_done = 0
        if checkpoint is not None:
            with explain(args, "output_dir", "model"):
                self.policy.load_state_dict(checkpoint["policy"])
                self.optimizer.load_state_dict(checkpoint["optimizer"])
                self.scaler.load_state_dict(checkpoint["scaler"])
            self.steps_done = checkpoint["step"]
        size = self.policy.num_parameters()
        if size < 5e6:  # so small a model is no faster on two threads, and 20 times slower when
            torch.set_num_threads(1)  # another process wants one of the cores
        print(
            f"policy {shown(args.model)} ({size / 1e6:.1f}M parameters), "
            f"reference {'the same' if args.kl_coef else 'none'}, reward {shown(args.reward)}, "
            f"EOS {self.tokenizer.eos_token!r}, output {args.output_dir}"
        )

    def check_prompts(self):
        """Refuse tokens that the policy has no embedding for; say how a chat is scored."""
        embeddings = self.policy.get_input_embeddings().num_embeddings
        rows = self.training_rows + self.held_out_rows
        if max(max(row["prompt_ids"]) for row in rows) >= embeddings:
            raise ValueError(f"its tokenizer has more tokens than it has embeddings, {embeddings}")
        is_chat = isinstance(rows[0]["columns"]["prompt"], list)
        has_template = getattr(self.reward, "tokenizer", self.tokenizer).chat_template
        if is_chat and not has_template:
            print("the reward model has no chat template: it reads the contents, line by line")

    def place_frozen_models(self):
        """Put reference and reward model on the policy's device, or let them come and go."""
        frozen_models = [self.reference]
        if isinstance(self.reward, RewardModel):
            frozen_models.append(self.reward.model)
            self.reward.device = self.device
        for frozen in frozen_models:
            if frozen is None:
                continue
            if self.args.offload:
                offload(frozen, self.policy, self.device)
            else:
                frozen.to(self.device)

    def log(self, row):
        if self.rank > 0:
            return
        with explain(self.args, "output_dir"):
            self.metrics.write(json.dumps(row) + "\n")

    def score(self, rows, responses):
        return score_responses(self.args, self.reward, self.tokenizer, rows, responses)

    @torch.no_grad()
    def evaluate(self):
        """Return (figures, samples): means over the held-out rows, and three of them in words."""
        tokenizer, rows, size = self.tokenizer, self.held_out_rows, self.args.batch_size
        rewards, greedy_rewards, kls, texts, greedy_texts = [], [], [], [], []
        torch.manual_seed(0)  # the same noise every time
        self.policy.eval()
        with weights_as(self.policy, self.dtype):
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                prompt, attention_mask = collate(tokenizer, batch, self.device)  # (B,P)
                response, greedy_response, _ = rollout(
                    self.policy,
                    prompt,
                    attention_mask,
                    self.args.max_new_tokens,
                    tokenizer.eos_token_id,
                    tokenizer.pad_token_id,
                )  # (B,T)
                both = self.score(batch, torch.cat([response, greedy_response]))  # (2B,)
                rewards += both[: len(batch)].tolist()
                greedy_rewards += both[len(batch) :].tolist()
                texts += decode_responses(tokenizer, batch, response)
                greedy_texts += decode_responses(tokenizer, batch, greedy_response)
                if self.reference is not None:
                    mask = response_mask(response, tokenizer.eos_token_id)  # (B,T)
                    inputs = prompt, attention_mask, response, mask
                    logprobs = token_logprobs(self.policy, *inputs)  # (B,T)
                    ref_logprobs = token_logprobs(self.reference, *inputs)  # (B,T)
                    kls += (logprobs - ref_logprobs).sum(1).tolist()
        figures = {
            "eval_reward": sum(rewards) / len(rows),
            "eval_greedy_reward": sum(greedy_rewards) / len(rows),
            "eval_kl": sum(kls) / len(rows) if kls else None,
        }
        samples = [
            f"  > {rows[i]['prompt_text']}\n"
            f"    sampled {rewards[i]:6.3f}  {texts[i]!r}\n"
            f"    greedy  {greedy_rewards[i]:6.3f}  {greedy_texts[i]!r}"
            for i in range(min(3, len(rows)))
        ]
        return figures, samples

    def evaluate_and_log(self, step):
        if self.rank > 0:
            return
        figures, samples = self.evaluate()
        self.log({"step": step} | figures)
        tqdm.write(f"step {step}: held-out {in_words(figures, 'eval_')}")
        for sample in samples:
            tqdm.write(sample)

    def train_step(self, step):
        """Draw prompts, take one step of the algorithm, log and return its figures."""
        args = self.args
        # Noise that depends on the step alone: a resumed run draws what the whole one drew.
        seed = random.Random(f"{args.seed}/{step}").getrandbits(32)
        transformers.set_seed(seed)
        batch = random.sample(self.training_rows, args.batch_size)
        rows = batch[self.rank :: self.processes]  # this process's share
        torch.manual_seed(seed + self.rank)  # and its own noise
        prompt, attention_mask = collate(self.tokenizer, rows, self.device)  # (B,P)
        lr = args.lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / args.steps))  # a cosine to 0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        figures = remax_step(
            self.policy,
            self.reference,
            self.optimizer,
            self.scaler,
            partial(self.score, rows),
            prompt,
            attention_mask,
            eos_id=self.tokenizer.eos_token_id,
            pad_id=self.tokenizer.pad_token_id,
            max_new_tokens=args.max_new_tokens,
            greedy=args.baseline == "greedy",
            kl_coef=args.kl_coef,
            micro_batch_size=args.micro_batch_size,
            max_grad_norm=args.max_grad_norm,
            dtype=self.dtype,
        )
        figures["peak_memory_gb"] = peak_memory_gb(self.device)
        self.log({"step": step, "lr": lr} | figures)
        return figures

    def check_sampler(self, figures):
        """Refuse a model whose decoding with a cache is not what its full forward computes."""
        difference = figures["sampling_logp_difference"]
        if difference > LARGEST_DIFFERENCE[self.dtype]:
            sys.exit(
                f"remax.py: sampling_logp_difference is {difference:.2g} nats a token: this "
                "model's cached decoding is not what its full forward computes\n"
                f"look at {flag(self.args, 'model')}, {flag(self.args, 'precision')}"
            )

    def save(self, step):
        if self.rank > 0:
            return
        checkpoint = {
            "step": step,
            "metrics_bytes": self.metrics.tell(),
            "args": comparable(self.args),
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        with explain(self.args, "output_dir"):
            save_checkpoint(self.folder / "checkpoint.pt", checkpoint)

    def save_model(self):
        """The policy as found, but for its weights, and its tokenizer as found."""
        with explain(self.args, "output_dir"):
            self.policy.save_pretrained(self.folder / "model")
            AutoTokenizer.from_pretrained(self.args.model).save_pretrained(self.folder / "model")

    def train(self, stop):
        """Every step, with the evaluations and checkpoints that are due after it."""
        args = self.args
        if self.steps_done == 0:
            self.evaluate_and_log(0)
        skipped_in_a_row, idle_in_a_row = 0, 0
        steps = range(self.steps_done + 1, args.steps + 1)
        # disable=None: no bar where there is no terminal to draw it on.
        bar = tqdm(steps, initial=self.steps_done, total=args.steps, disable=None, file=sys.stdout)
        for step in bar:
            figures = self.train_step(step)
            if step == steps[0]:
                self.check_sampler(figures)
            bar.set_description_str(in_words(figures), refresh=False)
            if bar.disable:
                print(f"step {step}: {in_words(figures)}", flush=True)

            is_idle = figures["zero_advantage"] == 1 or (figures["kl"] or 0) < -1
            idle_in_a_row = idle_in_a_row + 1 if is_idle else 0
            if idle_in_a_row == 20:
                tqdm.write(
                    "warning: 20 steps of zero_advantage 1 (a collapsed policy, a constant "
                    "reward?) or of kl below -1 (samples from what is not the policy?)"
                )
            skipped_in_a_row = skipped_in_a_row + 1 if figures["skipped"] else 0
            no_progress = skipped_in_a_row == 5

            is_last = step == args.steps
            if is_last or step % args.eval_every == 0:
                self.evaluate_and_log(step)
            signal_number = stop.agreed()
            if is_last or step % args.save_every == 0 or signal_number or no_progress:
                self.save(step)
            if signal_number:
                tqdm.write(f"stopped after step {step}: the same command with --resume continues")
                sys.exit(128 + signal_number)
            if no_progress:
                sys.exit(
                    "remax.py: no finite gradient in 5 steps; a checkpoint is saved\n"
                    f"look at {flag(args, 'lr')} (lower), {flag(args, 'precision')} (fp32)"
                )


def peak_memory_gb(device):
    """The most GPU memory in use since the last call, in GB of 1e9 bytes; None elsewhere."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak / 1e9


def print_summary(path):
    """The evaluations before and after, and where the seconds of the steps went."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    evaluations = [row for row in rows if "eval_reward" in row]
    for name, before in evaluations[0].items():
        after = evaluations[-1][name]
        if name != "step" and before is not None:
            print(f"{name:20}{before:.4g} -> {after:.4g}")
    steps = [row for row in rows if "reward" in row]
    names = ("rollout_seconds", "score_seconds", "update_seconds")
    seconds = {name: sum(row[name] for row in steps) for name in names}
    for name in names:
        print(f"{name:20}{seconds[name]:.1f} ({seconds[name] / sum(seconds.values()):.0%})")


# =================================================================================================
# The flags and main.
# =================================================================================================

# Without --model these replace the defaults below, which follow the paper's GPT-2 runs (App. F.4).
TINY_WORLD = {
    "model": f"{HERE}/data/tiny/policy",
    "reward": f"{HERE}/data/tiny/reward",
    "max_new_tokens": 40,
    "steps": 60,
    "kl_coef": 0.05,
    "lr": 6e-4,
    "gradient_checkpointing": False,
    "eval_every": 20,
}


def positive_int(text):
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return number


def positive_float(text):
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be finite and above 0")
    return number


def nonnegative_float(text):
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be finite and not below 0")
    return number


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each flag's default, and leaves the lines of the description as they are."""


def parse_args(argv=None):
    tiny_world = "\n".join(f"  {name} {value}" for name, value in TINY_WORLD.items())
    parser = argparse.ArgumentParser(
        usage="python remax.py [--FLAG VALUE] ...",
        description=__doc__,
        epilog=f"Without --model these are the defaults:\n{tiny_world}",
        formatter_class=HelpFormatter,
    )
    on_or_off = argparse.BooleanOptionalAction
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # fmt: off
    flag = parser.add_argument_group("task").add_argument
    flag("--model", help="policy: a causal language model, hub id or folder")
    flag("--reward", default="lvwerra/distilbert-imdb",
         help="a sequence classifier, hub id or folder, or a function, FILE.py:FUNCTION")
    flag("--prompts", default=f"{HERE}/data/tiny/prompts.jsonl",
         help="a json, jsonl, csv, tsv, parquet or txt file, or a dataset of the hub")
    flag("--prompt-column", default="prompt",
         help="its column of texts, or of lists of {role, content}")
    flag("--max-prompt-tokens", default=64, type=positive_int,
         help="longer texts are cut to it, longer chats are left out")
    flag("--max-new-tokens", default=48, type=positive_int,
         help="a response without EOS is cut here")
    flag("--eos-token",
         help="token that ends a response, if it is not the tokenizer's EOS")
    flag("--missing-eos-penalty", default=0.0, type=nonnegative_float,
         help="taken off the reward of such a response, sampled or greedy")

    flag = parser.add_argument_group("algorithm").add_argument
    flag("--baseline", default="greedy", choices=("greedy", "none"),
         help="greedy is ReMax, none is REINFORCE")
    flag("--kl-coef", default=0.01, type=nonnegative_float,
         help="beta, the price of a nat of KL to the reference; 0 loads no reference")
    flag("--steps", default=300, type=positive_int, help="rollouts, and updates: one each")
    flag("--batch-size", default=32, type=positive_int, help="prompts a step, drawn anew")
    flag("--lr", default=1e-6, type=positive_float,
         help="learning rate at the start; it falls to 0 along a cosine")
    flag("--optimizer", default="adamw", choices=("adamw", "adafactor"),
         help="adafactor: a small state, wants 10 to 30 times the --lr")
    flag("--max-grad-norm", default=1.0, type=positive_float,
         help="longer gradients are scaled down to this norm")
    flag("--seed", default=0, type=int, help="of the choice of prompts and of the sampling")
    flag("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"),
         help="auto: on a GPU bf16 if it has it, else fp16; fp32 elsewhere")

    flag = parser.add_argument_group("memory").add_argument
    flag("--micro-batch-size", default=8, type=positive_int,
         help="rows per backward pass: changes memory, not the gradient")
    flag("--gradient-checkpointing", default=True, action=on_or_off,
         help="recompute activations in the backward pass")
    flag("--offload", default=False, action=on_or_off,
         help="reference and reward model wait on the CPU while the policy is at work")
    flag("--device", default=device, help="cpu, cuda, cuda:1, mps, ...")

    flag = parser.add_argument_group("run").add_argument
    flag("--output-dir", help="for metrics, checkpoint and model; None: runs/MODEL-SEED")
    flag("--eval-every", default=50, type=positive_int,
         help="steps between evaluations on held-out prompts")
    flag("--save-every", default=100, type=positive_int,
         help="steps between checkpoints of about 12 bytes a parameter with adamw, two of them "
              "while saving; the last step and Ctrl-C write one too")
    flag("--resume", action="store_true",
         help="continue the run in --output-dir: the same command, --steps may be more")
    # fmt: on

    args = parser.parse_args(argv)
    run_name = "tiny-policy"
    if args.model is None:
        parser.set_defaults(**TINY_WORLD)
        args = parser.parse_args(argv)  # again: flags that were given stay as they are
    else:
        run_name = Path(args.model).name
    if args.output_dir is None:
        args.output_dir = f"runs/{run_name}-{args.seed}"
    for name in "model", "reward", "prompts":
        # A reward function may change the working directory: paths are resolved once.
        path = getattr(args, name)
        if Path(without_function(path)).exists():
            setattr(args, name, os.path.abspath(path))
    return args


def main(argv=None):
    args = parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    sys.stdout.reconfigure(errors="replace")  # a terminal may not know all letters of a sample
    stop = StopRequest()
    stop.install()
    if dist.is_torchelastic_launched():
        # A reward may take its time: the other processes wait for it.
        dist.init_process_group(timeout=timedelta(hours=6))
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, only the first process speaks
    try:
        run = Run(args)
        run.train(stop)
    except torch.OutOfMemoryError as error:
        names = ("micro_batch_size", "gradient_checkpointing", "offload", "optimizer", "batch_size")
        flags = ", ".join(flag(args, name) for name in names)
        sys.exit(f"remax.py: {str(error).splitlines()[0]}\nlook at {flags}")
    if run.rank == 0:
        run.save_model()
        print_summary(run.folder / "metrics.jsonl")
        print(f"the trained model is in {args.output_dir}/model")


if __name__ == "__main__":
    main()
