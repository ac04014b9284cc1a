# SPDX-License-Identifier: MIT
"""ReMax in one file: REINFORCE with the reward of the greedy response as baseline.

One step of the algorithm (Li et al., https://arxiv.org/abs/2310.10505, Alg. 1):
  1. Roll out: for each prompt x draw a response y ~ pi(.|x), and decode the
     greedy response, ybar.
  2. Score: the reward r = r(x, y), and the baseline b = r(x, ybar).
  3. Mask: a response ends with its first EOS; all that follows is padding.
  4. Reference: log-probs of y under pi_ref, the frozen model we start from.
  5. Gradient: of -sum_t log pi(y_t|x,y_<t) * A_t, where A_t is held constant,
     A_t = r - b - beta * sum_{s>=t} log(pi(y_s|x,y_<s) / pi_ref(y_s|x,y_<s)).
  6. Update: clip the gradient norm, take one optimizer step, and throw the
     rollout away.

The baseline leaves the mean of the gradient as it is, and is there to lower its
variance: what a reward owes to the prompt alone cancels in r - b.

What PPO has and ReMax does not need:
  - a critic, its optimizer, and GAE with gamma and lambda: the greedy response
    is the baseline;
  - ratios of new to old probabilities, and their clipping: there is one update
    per rollout, so the policy that learns is the policy that drew;
  - several epochs over one rollout, and advantages divided by their standard
    deviation.

Symbols, in shapes and equations:
  B  prompts in a batch                 x           prompt
  P  tokens of a prompt                 y, ybar     response, greedy response
  T  tokens of a response               r, b        reward, baseline
  V  tokens in the vocabulary           A_t         advantage of token t
  N  any number of rows                 pi, pi_ref  policy, reference
                                        beta        kl_coef, the price of KL
Prompts are padded on the left, responses on the right.

To learn the algorithm, read from rollout to remax_step and the short functions
below it, up to the line "End of the algorithm". The rest reads prompts, asks
for rewards, saves the run, and refuses what would go wrong.

  python remax.py                        # a tiny GPT-2: no GPU, no download
  python remax.py --model gpt2-large     # one GPU: favourable film reviews
  torchrun --nproc-per-node 8 remax.py --model gpt2-large    # eight GPUs
"""

import argparse
import copy
import csv
import gzip
import hashlib
import importlib.util
import json
import math
import multiprocessing.util
import os
import random
import signal
import statistics
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows has none, so there nothing stops two runs in one folder
    fcntl = None

import datasets
import pyarrow.parquet  # comes with datasets
import torch
import torch.distributed as dist
import transformers
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
def rollout(policy, prompt, attention_mask, max_new_tokens, eos_id, pad_id):
    """Draw a response to each prompt, and decode the greedy one beside it, in one loop.

    policy: a Hugging Face causal language model in eval() mode.
    prompt, attention_mask: (B,P), padded on the left. eos_id, pad_id: one number each.
    Returns response (B,T) and greedy_response (B,T), both pad_id after their first eos_id, and
    logprobs (B,T): of each sampled token, in nats, as it was drawn, 0 after EOS.
    Raises ValueError for prompts that are padded on the right, and for a model without a cache
    (RWKV, BERT), which would see nothing but the newest token.

    Why not generate()? It cannot draw some rows of a batch and decode the others greedily. And it
    takes what we do not pass from the checkpoint's generation_config (trl#5783), or from defaults
    such as top-k 50 (transformers#38549). We need pi itself.
    """
    if not attention_mask[:, -1].all():
        raise ValueError(
            "prompts must be padded on the left: responses begin behind the last column"
        )
    # Rows 0 to B-1 are for the sampled responses, rows B to 2B-1 for the greedy ones.
    next_input = torch.cat([prompt, prompt])  # (2B,P), and from then on the new tokens (2B,1)
    full_mask = torch.cat([attention_mask, attention_mask])  # (2B,P), one column more per token
    positions = position_ids(full_mask)  # (2B,P), those of next_input
    cache = None
    done = torch.zeros(len(next_input), 1, dtype=torch.bool, device=prompt.device)  # (2B,1)
    tokens, logprobs = [], []
    for _ in range(max_new_tokens):
        output = policy(
            next_input,
            attention_mask=full_mask,
            position_ids=positions,
            cache=cache,  # transformers 5.24 renamed past_key_values
            use_cache=True,
            logits_to_keep=1,
        )
        cache = getattr(output, "cache", None)
        if cache is None:
            name = type(policy).__name__
            raise ValueError(f"{name} keeps no cache, or transformers is older than 5.24")

        next_logits = output.logits[:, -1].float()  # (2B,V)
        sampled_logits, greedy_logits = next_logits.chunk(2)  # (B,V) each
        all_logprobs = sampled_logits.log_softmax(-1)  # (B,V): all of pi, no temperature, no top-k
        sampled = torch.multinomial(all_logprobs.exp(), 1)  # (B,1): y_t
        sampled_logprob = all_logprobs.gather(1, sampled)  # (B,1)
        greedy = greedy_logits.argmax(-1, keepdim=True)  # (B,1): ybar_t

        # A row that is done goes on with padding until all are done. Nobody uses what it computes.
        new_tokens = torch.cat([sampled, greedy]).masked_fill(done, pad_id)  # (2B,1)
        tokens.append(new_tokens)
        sampled_done, _ = done.chunk(2)  # (B,1) each
        logprobs.append(sampled_logprob.masked_fill(sampled_done, 0.0))
        done = done | (new_tokens == eos_id)  # (2B,1), only now: EOS itself belongs to the response
        if done.all():
            break

        next_input = new_tokens  # (2B,1)
        positions = positions[:, -1:] + 1  # (2B,1)
        new_column = torch.ones_like(new_tokens)  # (2B,1)
        full_mask = torch.cat([full_mask, new_column], 1)
    response, greedy_response = torch.cat(tokens, 1).chunk(2)  # (B,T) each
    return response, greedy_response, torch.cat(logprobs, 1)


def position_ids(attention_mask):
    """The position of each token, which padding on the left does not move: (B,P) -> (B,P).

    The mask 0 0 1 1 1 has the positions 0 0 0 1 2. Without them a left-padded GPT-2 is off by tens
    of nats (trl#6800). Padding has some position too, which nobody uses: 0 0 1 1 0 has 0 0 0 1 1.
    """
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def response_mask(response, eos_id):
    """1 up to and including the first EOS, then 0: (B,T) -> (B,T).

    With EOS = 9, the response 5 9 9 has is_eos 0 1 1, eos_before 0 0 1 and the mask 1 1 0.

    It counts the EOS tokens instead of looking for padding. Many tokenizers pad with EOS: a mask of
    all that is not padding would hide the true EOS too, and the policy would not learn to stop.
    """
    is_eos = (response == eos_id).long()  # (B,T)
    eos_before = is_eos.cumsum(1) - is_eos  # (B,T)
    return (eos_before == 0).long()


def token_logprobs(model, prompt, attention_mask, response, mask):
    """log pi(y_t | x, y_<t) in nats, float32, 0 where masked.

    prompt, attention_mask: (B,P), padded on the left; response, mask: (B,T), padded on the right.
    Returns (B,T): column t belongs to response token t.

    A row with P = T = 3, whose prompt has two tokens and whose response is y_1 and EOS:
      ids         pad  x_1  x_2  y_1  EOS  pad
      full_mask   0    1    1    1    1    0
      positions   0    0    1    2    3    3
      predicts              y_1  EOS  pad         (of the other logits we need none)
    """
    T = response.size(1)
    ids = torch.cat([prompt, response], 1)  # (B,P+T)
    # No token sees the padding after it. Masking it changes no result, and lets kernels skip it.
    full_mask = torch.cat([attention_mask, mask], 1)  # (B,P+T)
    output = model(
        ids,
        attention_mask=full_mask,
        position_ids=position_ids(full_mask),
        use_cache=False,
        logits_to_keep=T + 1,  # these predict the T tokens of the response, and one after it
    )
    # Some models ignore logits_to_keep and return all (B,P+T,V): cut in any case.
    response_logits = output.logits[:, -(T + 1) : -1]  # (B,T,V): column t predicts token t
    # In bfloat16 log_softmax would be off by 0.02 nats per token.
    all_logprobs = response_logits.float().log_softmax(-1)  # (B,T,V)
    logprobs = all_logprobs.gather(-1, response.unsqueeze(-1)).squeeze(-1)  # (B,T)
    return logprobs.masked_fill(mask == 0, 0.0)


# Where this loss comes from. For a prompt x we maximise E[r] - beta * KL(pi || pi_ref), where E is
# over y ~ pi(.|x). A batch averages over its prompts.
#
#   (a) grad E[r] = sum_y r * grad pi(y|x) = E[r * grad log pi(y|x)]   as grad pi = pi * grad log pi
#   (b) log pi(y|x) = sum_t log pi(y_t|x,y_<t)                         so the loss sums over tokens
#   (c) E[grad log pi(y|x)] = sum_y grad pi(y|x) = grad 1 = 0          as sum_y pi(y|x) = 1
#   (d) E[b * grad log pi(y|x)] = b * 0 = 0                            so b(x) may be subtracted
#   (e) grad KL = E[log(pi / pi_ref) * grad log pi] + E[grad log pi]   the second term is 0, by (c)
#   (f) grad (E[r] - beta * KL) = E[sum_t A_t * grad log pi(y_t|x,y_<t)], by (a) to (e), with
#       A_t = r - b - beta * sum_{s>=t} log(pi(y_s|x,y_<s) / pi_ref(y_s|x,y_<s)) and b = r(x, ybar)
#
# Line (a) is REINFORCE: one drawn y gives an unbiased estimate of the gradient. In line (c) a
# response that is cut for its length counts as a response.
#
# Line (d) allows any b that does not depend on y. The greedy response depends on the prompt and the
# weights alone. (With the weights b changes too. But line (d) holds for the weights as they are
# now, and b is not differentiated.) b is there to lower the variance. Suppose that all responses to
# a prompt have rewards between 0.8 and 1. Without b each one that is drawn is made more likely, the
# bad ones too, and only an average over many shows which ones are better. With b = 0.9 a single one
# shows it. A good b is near V(x), the mean reward of the prompt's responses, which PPO trains a
# critic to predict. The greedy reward is a guess at V(x) that needs no training. It is often too
# high: then most r - b are negative, and the bad responses are pushed down most. The mean stays
# right, by line (d), but there is more noise. (By line (d) the KL of the greedy response could be a
# part of b too. Algorithm 1 leaves it out.)
#
# Line (e) is the product rule for KL = sum_y pi * log(pi / pi_ref). What remains of it has the form
# of line (a), with the log-ratio as the reward. So -beta times the log-ratio is added to the
# reward, and held constant as r is. (This estimate of the KL is often called k1. It may be
# negative.)
#
# Line (f) is what remax_loss computes. By (b) and (e), the gradient of token t would be weighted by
# the log-ratios of all tokens s. Those of the past, s < t, may be left out. To see why, take the
# tokens before y_t as given. The sum of the past log-ratios is then a fixed number, k, and line (c)
# holds for the one token y_t:
#   E[k * grad log pi(y_t|x,y_<t) | y_<t] = k * sum_{y_t} grad pi(y_t|x,y_<t) = k * grad 1 = 0
# It is 0 for every past, so it is 0 in the mean over all pasts too. The reward r depends on all
# tokens, and stays.
def remax_loss(logprobs, ref_logprobs, mask, reward, baseline, kl_coef):
    """The scalar whose gradient is minus the ReMax estimator (Algorithm 1).

    Each token pays for the KL of itself and of all later tokens, which App. B calls "full-step".
    (In its "one-step" a token pays for itself alone.)
    logprobs, ref_logprobs, mask: (B,T); reward, baseline: (B,). Only logprobs carry a gradient.
    With baseline 0 this is REINFORCE with the same KL penalty.

    By hand, one row of two tokens, with r = 1, b = 0.4 and beta = 0.1:
      t                    1                        2
      logprobs            -1                       -2
      ref_logprobs        -1.5                     -1
      log_ratio            0.5                     -1
      kl_to_go            -0.5                     -1
      token_advantage      0.6 - 0.1 * -0.5        0.6 - 0.1 * -1
                         = 0.65                  = 0.7
      loss = -(-1 * 0.65 + -2 * 0.7) = 2.05
    """
    log_ratio = (logprobs.detach() - ref_logprobs) * mask  # (B,T)
    # The sum over all s >= t: a cumulative sum from the right.
    kl_to_go = log_ratio.flip(1).cumsum(1).flip(1)  # (B,T)
    token_advantage = (reward - baseline)[:, None] - kl_coef * kl_to_go  # (B,T): A_t
    # log pi(y|x) is a sum over tokens. A mean over each response's tokens would let those of short
    # responses weigh more.
    return -(logprobs * token_advantage * mask).sum(1).mean()


class StepSettings(NamedTuple):
    """What is the same in all steps of a run."""

    eos_id: int
    pad_id: int
    max_new_tokens: int  # a response without EOS is cut here
    kl_coef: float  # beta; 0 if there is no reference
    greedy_baseline: bool  # False sets b = 0: REINFORCE, where the greedy reward is only logged
    micro_batch_size: int  # rows in one backward pass
    max_grad_norm: float  # longer gradients are scaled down to it; math.inf clips nothing
    dtype: torch.dtype  # what to compute in: float32, bfloat16 or float16


class Batch(NamedTuple):
    """B prompts, their sampled responses, and all that the loss needs beside the policy."""

    prompt: torch.Tensor  # (B,P), padded on the left
    attention_mask: torch.Tensor  # (B,P)
    response: torch.Tensor  # (B,T), padded on the right
    mask: torch.Tensor  # (B,T), of the response
    ref_logprobs: torch.Tensor  # (B,T), 0 where masked, and 0 without a reference
    reward: torch.Tensor  # (B,)
    baseline: torch.Tensor  # (B,): the greedy reward, or 0

    def rows(self, part):
        """The Batch of some of the rows. part: a slice."""
        return Batch(
            prompt=self.prompt[part],
            attention_mask=self.attention_mask[part],
            response=self.response[part],
            mask=self.mask[part],
            ref_logprobs=self.ref_logprobs[part],
            reward=self.reward[part],
            baseline=self.baseline[part],
        )


def accumulate_gradient(policy, scaler, batch, settings):
    """Compute the gradient of the loss of a Batch, a micro-batch at a time to save memory.

    Returns the loss, a scalar, and the policy's log-probs (B,T), both without a gradient.
    """
    B = len(batch.prompt)
    policy.zero_grad()  # an earlier step may have failed half way
    batch_loss = torch.zeros((), device=batch.prompt.device)
    batch_logprobs = []
    for part in micro_batches(B, settings.micro_batch_size):
        rows = batch.rows(part)  # N of the B rows
        with computing_in(settings.dtype, rows.prompt.device):
            logprobs = token_logprobs(
                policy, rows.prompt, rows.attention_mask, rows.response, rows.mask
            )  # (N,T)
        loss = remax_loss(
            logprobs, rows.ref_logprobs, rows.mask, rows.reward, rows.baseline, settings.kl_coef
        )
        # A mean over the batch: each micro-batch counts by its rows, as the last may have fewer.
        share_of_loss = loss * len(logprobs) / B
        scaler.scale(share_of_loss).backward()
        batch_loss += share_of_loss.detach()
        batch_logprobs.append(logprobs.detach())
    return batch_loss, torch.cat(batch_logprobs)


def update(policy, optimizer, scaler, max_grad_norm):
    """Clip the gradient and take one optimizer step. Returns the norm before clipping, a scalar.

    The loss is a sum over tokens, so most gradients are long. Clipping keeps their direction and
    gives up their length, and with it strict unbiasedness. A gradient that is not finite changes no
    weight.
    """
    average_gradients(policy)  # under torchrun: each process has had its share of the batch
    # In float16 the loss was multiplied by the scale. In other dtypes the scaler does nothing.
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    if grad_norm.isfinite():  # in float16 the scaler would see to this itself
        scaler.step(optimizer)
    scaler.update()
    policy.zero_grad()  # the next rollout needs the memory of the gradients
    return grad_norm


class StepResult(NamedTuple):
    """What a step drew and computed: all that its metrics are made of."""

    batch: Batch
    greedy_response: torch.Tensor  # (B,T)
    greedy_reward: torch.Tensor  # (B,)
    logprobs: torch.Tensor  # (B,T), before the update; 0 where masked
    sampling_logprobs: torch.Tensor  # (B,T), as rollout() returned them; 0 where masked
    loss: torch.Tensor  # a scalar
    grad_norm: torch.Tensor  # a scalar, before clipping


def remax_step(policy, reference, optimizer, scaler, score, prompt, attention_mask, settings):
    """One update of the policy from B prompts: the six steps at the top of this file.

    policy: a causal language model without dropout. The weights that it trains are in float32: in
    bfloat16 an update of 1e-6 would be rounded away.
    reference: another one, frozen, in eval() mode, on any device; None if kl_coef is 0.
    optimizer: of all weights of the policy that are not frozen.
    scaler: a GradScaler, enabled for float16 alone.
    score: a function, responses (2B,T) -> rewards (2B,). It gets the B sampled responses and then
    the B greedy ones, each in the order of the prompts. It knows the prompts itself.
    prompt, attention_mask: (B,P), padded on the left. settings: StepSettings.
    With a 16-bit dtype the rollout reads 16-bit copies of the weights, the gradient is computed by
    autocast from the float32 weights, and log-probs and loss are in float32.
    Returns a StepResult. The policy is left in train() mode.
    Raises ValueError for kl_coef without a reference, and for rewards of another shape.
    Under torchrun each process brings B prompts of its own, and all make the same update.
    """
    if reference is None and settings.kl_coef != 0:
        raise ValueError("without a reference there is no KL: kl_coef must be 0")
    B = len(prompt)
    dtype = settings.dtype

    # 1. Roll out. In train() mode gradient checkpointing would drop the cache, silently.
    policy.eval()
    with weights_as(policy, dtype):
        response, greedy_response, sampling_logprobs = rollout(
            policy,
            prompt,
            attention_mask,
            settings.max_new_tokens,
            settings.eos_id,
            settings.pad_id,
        )  # (B,T) each

    # 2. Score. One call for both halves, so that nothing can score them differently.
    responses = torch.cat([response, greedy_response])  # (2B,T)
    rewards = score(responses)  # (2B,)
    if rewards.shape != (2 * B,):  # (2B,1) would be broadcast to a wrong loss
        raise ValueError(f"score must return {2 * B} rewards, not the shape {list(rewards.shape)}")
    rewards = rewards.detach().float()  # as they may come from a network, or be whole numbers
    reward, greedy_reward = rewards.chunk(2)  # (B,) each
    if settings.greedy_baseline:
        baseline = greedy_reward  # (B,)
    else:
        baseline = torch.zeros_like(greedy_reward)  # (B,)

    # 3. Mask.
    mask = response_mask(response, settings.eos_id)  # (B,T)

    # 4. Reference. It may rest in CPU memory, and is on the policy's device for this step alone.
    if reference is None:
        ref_logprobs = torch.zeros_like(sampling_logprobs)  # (B,T): they count for nothing
    else:
        with on_device(reference, prompt.device), computing_in(dtype, prompt.device):
            ref_logprobs = logprobs_without_gradient(
                reference, prompt, attention_mask, response, mask, settings.micro_batch_size
            )  # (B,T)

    # 5. Gradient. The log-probs of the policy once more: those of the rollout carry no gradient.
    # Gradient checkpointing works in train() mode alone. (There is no dropout.)
    batch = Batch(
        prompt=prompt,
        attention_mask=attention_mask,
        response=response,
        mask=mask,
        ref_logprobs=ref_logprobs,
        reward=reward,
        baseline=baseline,
    )
    policy.train()
    loss, logprobs = accumulate_gradient(policy, scaler, batch, settings)  # a scalar, (B,T)

    # 6. Update.
    grad_norm = update(policy, optimizer, scaler, settings.max_grad_norm)

    return StepResult(
        batch=batch,
        greedy_response=greedy_response,
        greedy_reward=greedy_reward,
        logprobs=logprobs,
        sampling_logprobs=sampling_logprobs,
        loss=loss,
        grad_norm=grad_norm,
    )


# -------------------------------------------------------------------------------------------------
# What remax_step uses.
# -------------------------------------------------------------------------------------------------


@contextmanager
def weights_as(model, dtype):
    """Inside the with block the model's weights are in dtype, afterwards they are as before.

    Only the numbers behind each parameter are exchanged. The parameters themselves stay, because
    the optimizer holds them.

    Decoding reads all weights for every token: in 16 bits it reads half as many bytes. (Autocast
    can keep 16-bit weights too. But with it many models keep a float32 cache, which is twice as
    large.)
    """
    saved_weights = [parameter.data for parameter in model.parameters()]
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, saved in zip(model.parameters(), saved_weights, strict=True):
            parameter.data = saved


def computing_in(dtype, device):
    """A with block where torch computes in 16 bits what it safely can. float32: in float32."""
    is_16_bit = dtype != torch.float32
    # cache_enabled=True would keep a 16-bit copy of every weight during the backward pass.
    return torch.autocast(device.type, dtype, enabled=is_16_bit, cache_enabled=False)


@contextmanager
def on_device(model, device):
    """Inside the with block the model is on the device, afterwards where it was before."""
    device_before = next(model.parameters()).device
    try:
        model.to(device)
        yield
    finally:
        model.to(device_before)


def micro_batches(B, size):
    """Slices of B rows, one after the other: only so many rows are computed at once."""
    for start in range(0, B, size):
        yield slice(start, start + size)


@torch.no_grad()
def logprobs_without_gradient(model, prompt, attention_mask, response, mask, micro_batch_size):
    """token_logprobs() of a batch, computed a micro-batch at a time: the logits need much memory.

    prompt, attention_mask: (B,P); response, mask: (B,T). Returns (B,T).
    """
    logprobs = []
    for part in micro_batches(len(prompt), micro_batch_size):  # N rows
        part_logprobs = token_logprobs(
            model, prompt[part], attention_mask[part], response[part], mask[part]
        )  # (N,T)
        logprobs.append(part_logprobs)
    return torch.cat(logprobs)


def average_in_place(tensor):
    """Overwrite a tensor with its mean over the processes of torchrun; without them keep it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)  # the sum
        tensor.div_(dist.get_world_size())


def average_gradients(model):
    """Give every process of torchrun the mean of all processes' gradients.

    DistributedDataParallel would wrap the model, and need no_sync() for all but one micro-batch.
    """
    if not dist.is_initialized():
        return
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:  # a part of a mixture of experts may have had nothing to do
            parameter.grad = torch.zeros_like(parameter)
        average_in_place(parameter.grad)


# End of the algorithm.

# =================================================================================================
# The task: prompts in, rewards out. It knows the tokenizer and the flags.
# =================================================================================================


class BadInput(Exception):
    """What a person gave cannot be used. main() says why, and which flags to look at."""

    def __init__(self, reason, *flags):
        super().__init__(reason)
        self.flags = flags  # their names, as in args


def short_message(error):
    """An error in one line: the first one of its message.

    OSError and ValueError explain themselves. Other errors get their type in front: KeyError: 'x'.
    """
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else "no message"
    if isinstance(error, (OSError, ValueError)):
        return message
    return f"{type(error).__name__}: {message}"


@contextmanager
def blame(*flags):
    """Turn an error inside a with block into BadInput, which names these flags.

    For code that reads what a person gave by them: files, folders, names of the hub. Such code
    raises ValueError, or BadInput to name other flags. Elsewhere an error is a mistake in this
    file, and keeps its traceback.
    """
    try:
        yield
    except (BadInput, torch.OutOfMemoryError, NameError, AttributeError):
        raise  # main() answers the first two; the others are mistakes in this file after all
    except Exception as error:  # the libraries raise what they like for a wrong file or name
        raise BadInput(short_message(error), *flags) from error


HERE = Path(__file__).resolve().parent


def without_folder(value):
    """A flag's value as text; for a path in the folder of this file, without that folder.

    Lines stay short, and --resume finds the same text after the folder was moved.
    """
    return str(value).removeprefix(f"{HERE}{os.sep}")


def as_flag(name):
    """The flag that is stored under this name: --batch-size for batch_size."""
    return "--" + name.replace("_", "-")


def as_typed(name, value):
    """A flag and its value as a person would type them."""
    if value is None:  # it was not given
        return as_flag(name)
    if value is True:
        return as_flag(name)
    if value is False:  # --no-offload
        return as_flag(f"no_{name}")
    return f"{as_flag(name)} {without_folder(value)}"


def split_function(name):
    """(FILE.py, FUNCTION) of FILE.py:FUNCTION; (name, None) of any other name."""
    if ".py:" not in name:
        return name, None
    file, _, function = name.rpartition(":")
    return file, function


def exit_with(reason, args, flags):
    """End the run with two lines: what is wrong, and the flags to look at."""
    typed = [as_typed(name, getattr(args, name, None)) for name in flags]
    sys.exit(f"remax.py: {reason}\nlook at {', '.join(typed)}")


STANDARD_OUTPUT, STANDARD_ERROR = 1, 2  # their numbers for the operating system


def send_to_devnull(output):
    """Throw away what is printed from now on, by this process and by those that it starts.

    output: STANDARD_OUTPUT or STANDARD_ERROR. Nobody reads it any more, and printing would fail.
    """
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, output)


def say(line):
    """Print a line, in front of the bar if there is one. Under torchrun the first process does."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    try:
        tqdm.write(line)
        sys.stdout.flush()
    except OSError:  # `| head` has ended, the terminal is closed, the disk of a log is full
        send_to_devnull(STANDARD_OUTPUT)


def largest_length(config):
    """The most tokens that a model can read at once. Some, as Bloom, have no limit: inf."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return math.inf if limit is None else limit


def is_made_for(config, task):
    """Whether a checkpoint is of a class such as GPT2ForSequenceClassification."""
    class_names = config.architectures or []
    if isinstance(class_names, str):  # in a config written by hand
        class_names = [class_names]
    return any(task in class_name for class_name in class_names)


def load_tokenizer(name, **options):
    """AutoTokenizer. Raises ValueError for a folder without one."""
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    # From a folder without a tokenizer AutoTokenizer makes one of special tokens alone.
    has_words = len(tokenizer) > len(tokenizer.all_special_tokens)
    if not has_words:
        raise ValueError(f"{without_folder(name)} holds no tokenizer")
    return tokenizer


def load_policy_tokenizer(args):
    """The policy's tokenizer, with an EOS and a padding token."""
    tokenizer = load_tokenizer(args.model)
    if args.eos_token is not None:
        tokenizer.eos_token = args.eos_token
        ids = tokenizer.encode(args.eos_token, add_special_tokens=False)
        # GPT-2 stores a newline under another name: its eos_token_id would be the unknown token.
        if ids != [tokenizer.eos_token_id]:
            raise ValueError(f"{args.eos_token!r} is not one token of the policy's tokenizer")
    if tokenizer.eos_token is None:
        raise ValueError(
            "its tokenizer has no EOS, so no response would end: name one by --eos-token"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


FILE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")


def suffix_of(path):
    """The kind of a file: .jsonl for prompts.jsonl and for prompts.JSONL.gz."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def read_json(text):
    """The rows of a JSON array, or of one JSON object a line."""
    if text.lstrip().startswith("["):
        return json.loads(text)
    rows = []
    # Not splitlines(): it would cut a text at U+2028 too, which JSON allows inside.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
    return rows


def read_table(file, delimiter):
    """The rows below the first line of a table, which names the columns."""
    # strict: a quotation mark that is never closed is an error, and swallows no rows.
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    rows = []
    try:
        columns = reader.fieldnames or []
        if len(set(columns)) < len(columns):
            raise ValueError("two columns have the same name")
        for row in reader:
            # DictReader stores values without a column under None, and None for a lacking value.
            has_too_many_values = None in row
            has_too_few_values = None in row.values()
            if has_too_many_values or has_too_few_values:
                raise ValueError(f"row {len(rows) + 1} does not fit the columns: {shortened(row)}")
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"row {len(rows) + 1} is wrong: {error}") from error
    return rows


def open_text(path):
    """A text file, opened for reading. A .gz is unpacked."""
    # utf-8-sig: a mark that some programs put in front is left out. newline: csv wants it so.
    options = {"encoding": "utf-8-sig", "newline": ""}
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", **options)
    return open(path, **options)


def read_file(path):
    """The rows of a file: dicts that hold the values as they stand there.

    Not by datasets: it makes a date of "2021-03-04" and 7 of 007, takes [ and * in a name for
    wildcards, and may answer from its cache after the file has changed.
    """
    suffix = suffix_of(path)
    if suffix not in FILE_SUFFIXES:
        raise ValueError(f"{path} ends in none of {' '.join(FILE_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    if suffix == ".parquet":
        return pyarrow.parquet.ParquetFile(path).read().to_pylist(maps_as_pydicts="strict")
    with open_text(path) as file:
        if suffix == ".txt":
            return [{"prompt": line.rstrip("\r\n")} for line in file]
        if suffix == ".csv":
            return read_table(file, ",")
        if suffix == ".tsv":
            return read_table(file, "\t")
        return read_json(file.read())


def read_dataset(name):
    """The rows, dicts, of a file, or of the training split of a folder or a dataset of the hub."""
    path = Path(name)
    if path.is_file():
        return read_file(path)
    if suffix_of(path) in FILE_SUFFIXES and not path.exists():
        raise FileNotFoundError(f"there is no file {name}")  # do not ask the hub for it
    try:
        return list(datasets.load_dataset(name, split="train"))
    except datasets.exceptions.DatasetGenerationError as error:  # its cause says what is wrong
        raise ValueError(str(error.__cause__ or error)) from error


def shortened(value):
    """Enough of a value to find it in a file."""
    return repr(value)[:60]


def check_chat(number, chat):
    """Raise ValueError unless the chat is a list of {role, content} that waits for an answer."""
    for message in chat:
        has_role = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not has_role:
            raise ValueError(f"row {number} has a message without role: {shortened(message)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"row {number} has a message without a text: {shortened(message)}")
    if chat and chat[-1]["role"] == "assistant":
        raise ValueError(f"row {number} ends with an answer: there is nothing left to answer")


def check_prompts(prompts):
    """Raise ValueError unless all prompts are texts, or all are chats of {role, content}."""
    are_chats = isinstance(prompts[0], list)
    for number, prompt in enumerate(prompts, 1):
        if are_chats:
            if not isinstance(prompt, list):
                raise ValueError(f"row 1 is a chat, but row {number} is not: {shortened(prompt)}")
            check_chat(number, prompt)
        elif not isinstance(prompt, str):
            raise ValueError(f"row {number} is not a text: {shortened(prompt)}")


def render(tokenizer, chat, **options):
    """A chat as text, by the template. Raises ValueError for a chat that the template refuses."""
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, **options)
    except Exception as error:  # a template is a program, and raises what it likes
        raise ValueError(f"the chat template refuses {shortened(chat)}: {error}") from error


def check_end_of_turn(tokenizer, chat):
    """Raise BadInput if the template ends no turn with EOS: responses would run on and on.

    SmolLM2's template ends a turn with "<|im_end|>" and a newline, and its EOS is <|im_end|>.
    """
    # Render an answer that we know, and look at what the template writes after it.
    answer = "the content of a turn"
    text = render(tokenizer, [*chat, {"role": "assistant", "content": answer}])
    _, _, after_answer = text.rpartition(answer)
    if not after_answer.strip().startswith(tokenizer.eos_token):
        reason = (
            f"the template ends a turn with {after_answer!r}, and not with EOS "
            f"{tokenizer.eos_token!r}: name the first token of this ending by --eos-token"
        )
        raise BadInput(reason, "model", "eos_token")


def encode_texts(tokenizer, texts):
    """The token ids of each text. BOS stays. EOS, which some tokenizers add, is cut off."""
    batch = tokenizer(texts, return_special_tokens_mask=True)
    encoded = []
    for ids, added in zip(batch["input_ids"], batch["special_tokens_mask"], strict=True):
        length = len(ids)
        while length > 0 and added[length - 1] == 1:  # the tokenizer has added this token
            length -= 1
        encoded.append(ids[:length])
    return encoded


def check_template(tokenizer, chats):
    """Raise BadInput unless the policy has a chat template whose turns end with EOS."""
    if tokenizer.chat_template is None:
        reason = (
            "the prompts are chats, but the policy's tokenizer has no chat template: "
            "take an instruct model, or give texts as prompts"
        )
        raise BadInput(reason, "model", "prompts")
    not_empty = [chat for chat in chats if chat]
    if not_empty:
        check_end_of_turn(tokenizer, not_empty[0])  # the others end as it does


def encode_chat(tokenizer, chat):
    """The token ids of a chat, through the template, up to where the answer begins."""
    if not chat:
        return []  # is_usable() leaves it out
    text = render(tokenizer, chat, add_generation_prompt=True)
    # The template writes the special tokens itself: added again, BOS would stand there twice.
    return tokenizer.encode(text, add_special_tokens=False)


def check_rows(rows):
    """Raise ValueError unless there are rows, and all are dicts."""
    if len(rows) == 0:
        raise ValueError("there are 0 prompts")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} has no columns: {shortened(row)}")


def fill_columns(rows):
    """The rows, all with the same columns: None where a row lacks one."""
    columns = []  # of all rows, in order of appearance
    for row in rows:
        for name in row:
            if name not in columns:
                columns.append(name)
    return [{name: row.get(name) for name in columns} for row in rows]


def check_columns(columns, prompt_column):
    """Raise ValueError for columns that cannot be passed to reward(prompts=..., completions=...).

    All columns but the prompts are passed by their names. (self is the reward model's own.)
    """
    if prompt_column not in columns:
        names = ", ".join(str(name) for name in columns)
        raise ValueError(f"there is no column {prompt_column}, only {names}")
    others = [name for name in columns if name != prompt_column]
    for name in others:
        if name in ("prompts", "completions", "self"):
            raise ValueError(f"rename the column {name}: a reward has an argument of this name")


def read_prompts(args, tokenizer):
    """The rows of --prompts, dicts of the same columns, and the token ids of each prompt."""
    rows = read_dataset(args.prompts)
    check_rows(rows)
    rows = fill_columns(rows)
    check_columns(list(rows[0]), args.prompt_column)
    prompts = [row[args.prompt_column] for row in rows]
    check_prompts(prompts)
    if isinstance(prompts[0], list):
        check_template(tokenizer, prompts)
        return rows, [encode_chat(tokenizer, chat) for chat in prompts]
    if tokenizer.chat_template is not None:
        say("the prompts are texts: the policy's chat template is not applied")
    return rows, encode_texts(tokenizer, prompts)


class PromptRow(NamedTuple):
    """A row of --prompts, ready for use."""

    prompt_ids: list  # the tokens that the policy sees
    prompt_text: str  # the text of these tokens
    is_cut: bool  # the prompt was longer than --max-prompt-tokens
    reward_prompt: str | list  # for the reward: text or chat as it stands in the data, unless cut
    columns: dict  # for the reward too: the other columns


def cut_ids(tokenizer, ids, length):
    """The first tokens, but no part of a letter: some letters are several tokens."""
    ids = ids[:length]
    part_of_a_letter = "\ufffd"  # what decode() writes for it
    while tokenizer.decode(ids).endswith(part_of_a_letter):
        ids = ids[:-1]
    return ids


def decode(tokenizer, ids):
    """The text of these tokens, as it stands, without special tokens."""
    # Some tokenizers would clean it up: "they ' re" would become "they're".
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def make_row(args, tokenizer, values, ids):
    """A PromptRow. Too long a text is cut; a chat cannot be cut.

    values: a row of the dataset, column -> value. ids: the token ids of its prompt.
    """
    columns = dict(values)
    prompt = columns.pop(args.prompt_column)
    is_text = isinstance(prompt, str)
    is_cut = is_text and len(ids) > args.max_prompt_tokens
    if is_cut:
        ids = cut_ids(tokenizer, ids, args.max_prompt_tokens)
        prompt = decode(tokenizer, ids)
    return PromptRow(
        prompt_ids=ids,
        prompt_text=decode(tokenizer, ids),
        is_cut=is_cut,
        reward_prompt=prompt,
        columns=columns,
    )


def is_usable(args, row):
    """Whether a PromptRow is neither empty nor a chat that is too long."""
    is_empty = row.prompt_text.strip() == ""
    is_chat = isinstance(row.reward_prompt, list)
    is_too_long = is_chat and len(row.prompt_ids) > args.max_prompt_tokens  # it cannot be cut
    return not is_empty and not is_too_long


def say_what_was_read(args, rows, held_out_count, dataset):
    """One line: how many prompts there are to train on, held out, cut and left out."""
    training_count = len(rows) - held_out_count
    message = f"{len(rows)} prompts: {training_count} to train on, {held_out_count} held out"
    cut = sum(row.is_cut for row in rows)
    if cut > 0:
        message += f", {cut} cut to {args.max_prompt_tokens} tokens"
    if len(rows) < len(dataset):
        message += f" ({len(dataset) - len(rows)} left out: empty, or chats that are too long)"
    say(message)


def warn_of_repeated_prompts(training_rows, held_out_rows):
    """Say so if held-out prompts are trained on too: prompts may repeat, or be cut to the same."""
    trained_on = {tuple(row.prompt_ids) for row in training_rows}
    repeated = sum(tuple(row.prompt_ids) in trained_on for row in held_out_rows)
    if repeated > 0:
        say(f"warning: {repeated} of the held-out prompts are among the training prompts too")


def load_prompts(args, tokenizer):
    """Return (training rows, held-out rows), both lists of PromptRows."""
    dataset, encoded = read_prompts(args, tokenizer)
    rows = []
    for values, ids in zip(dataset, encoded, strict=True):
        row = make_row(args, tokenizer, values, ids)
        if is_usable(args, row):
            rows.append(row)
    random.Random(0).shuffle(rows)  # the same prompts are held out, whatever the seed
    held_out_count = min(128, math.ceil(len(rows) / 5))  # a fifth; 128 give a steady mean
    say_what_was_read(args, rows, held_out_count, dataset)
    held_out_rows = rows[:held_out_count]
    training_rows = rows[held_out_count:]
    warn_of_repeated_prompts(training_rows, held_out_rows)
    if len(training_rows) < args.batch_size:
        reason = f"{len(training_rows)} prompts to train on are fewer than one batch"
        raise BadInput(reason, "prompts", "max_prompt_tokens", "batch_size")
    return training_rows, held_out_rows


def collate(tokenizer, rows, device):
    """prompt, attention_mask (B,P), padded on the left, so that all responses start in column P."""
    inputs = {"input_ids": [row.prompt_ids for row in rows]}
    batch = tokenizer.pad(
        inputs, padding_side="left", return_attention_mask=True, return_tensors="pt"
    ).to(device)
    return batch["input_ids"], batch["attention_mask"]


@contextmanager
def forbid_exit():
    """Turn sys.exit() in a reward into an error: it would end the run with exit code 0."""
    try:
        yield
    except SystemExit as error:
        raise RuntimeError("the reward called sys.exit()") from error


def import_file(path):
    """Import a Python file by its path, as the documentation of importlib does it.

    import_module() would prefer a library of the same name.
    """
    name = Path(path).stem
    sys.path.insert(0, str(Path(path).parent))  # the file may import its neighbours
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    # Process pools look for its functions there. setdefault: a library of the same name stays.
    sys.modules.setdefault(name, module)
    spec.loader.exec_module(module)
    return module


def load_function(path, function_name):
    """A function of a Python file. What the file itself raises keeps its traceback."""
    if not Path(path).is_file():
        raise BadInput(f"there is no file {path}", "reward")
    with forbid_exit():
        module = import_file(path)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise BadInput(f"{path} has no function {function_name}", "reward")
    return function


def contents_of(chat):
    """The contents of a chat's messages, one below the other."""
    return "\n".join(message["content"] for message in chat)


def give_padding_token(tokenizer):
    """Name a padding token if there is none. EOS is the last choice: a text may end with it."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


class RewardModel:
    """A sequence classifier as a reward function: (prompts, completions) -> rewards (N,).

    The reward is the logit of its one label or, if it has several, the last one's probability.
    It reads text with a tokenizer of its own, never the policy's tokens.
    """

    def __init__(self, name, dtype, device):
        config = AutoConfig.from_pretrained(name)
        if not is_made_for(config, "SequenceClassification"):
            raise ValueError(f"{name} is not a sequence classifier")
        tokenizer = load_tokenizer(name, padding_side="right", truncation_side="left")
        tokenizer.model_max_length = min(tokenizer.model_max_length, largest_length(config))
        give_padding_token(tokenizer)
        self.tokenizer = tokenizer
        self.model = load_model(AutoModelForSequenceClassification, name, dtype=dtype)
        self.model.requires_grad_(False)
        # A GPT-2 classifier reads the last token that is no padding: it must know the padding.
        self.model.config.pad_token_id = tokenizer.pad_token_id
        self.device = device  # where it computes; with --offload its home is the CPU

    def tokenize(self, conversations):
        """Texts, or chats as lists of messages, to the model's inputs."""
        add_special_tokens = True
        if isinstance(conversations[0], str):
            texts = conversations
        elif self.tokenizer.chat_template is None:
            texts = [contents_of(chat) for chat in conversations]
        else:
            texts = [render(self.tokenizer, chat) for chat in conversations]
            add_special_tokens = False  # the template writes them itself
        return self.tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            padding=True,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )

    @torch.no_grad()
    def __call__(self, prompts, completions, **columns):
        conversations = []
        for prompt, completion in zip(prompts, completions, strict=True):
            conversations.append(prompt + completion)  # two texts, or two lists of messages
        with blame("reward", "prompts"):
            batch = self.tokenize(conversations).to(self.device)
        with on_device(self.model, self.device):
            logits = self.model(**batch).logits.float()  # (N,labels)
        if logits.size(1) == 1:
            return logits[:, 0]
        return logits.softmax(1)[:, -1]


def load_reward_function(args, dtype, device):
    """reward(prompts, completions, **columns) -> one number per completion: TRL's signature."""
    name, function_name = split_function(args.reward)
    if function_name is not None:
        return load_function(name, function_name)
    if name.endswith(".py"):
        raise BadInput("name the function too: FILE.py:FUNCTION", "reward")
    with blame("reward"):
        return RewardModel(name, dtype, device)


def decode_response(tokenizer, row, ids):
    """The text of a response to a row's prompt. ids: its tokens, without padding.

    Prompt and response are decoded together, and the prompt's text is cut off: "The plot was warm"
    without "The plot" leaves " was warm". Decoded alone, the response would lose its first space
    with Llama's tokenizer.
    """
    both = decode(tokenizer, row.prompt_ids + ids)
    if not both.startswith(row.prompt_text):  # rare: a prompt that ends with half of an emoji
        return decode(tokenizer, ids)
    return both.removeprefix(row.prompt_text)


def decode_responses(tokenizer, rows, responses):
    """The texts of responses (N,T) to the prompts of N rows."""
    # Padding is cut off first: decode() leaves out special tokens alone, and not every EOS is one.
    lengths = response_mask(responses, tokenizer.eos_token_id).sum(1).tolist()
    texts = []
    for row, ids, length in zip(rows, responses.tolist(), lengths, strict=True):
        texts.append(decode_response(tokenizer, row, ids[:length]))
    return texts


def reward_arguments(tokenizer, rows, responses):
    """prompts, completions and every other column of the dataset: lists of one entry a row."""
    completions = decode_responses(tokenizer, rows, responses)
    if isinstance(rows[0].reward_prompt, list):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    # Copies: a row is used for two responses and in many steps, whatever a reward does to it.
    arguments = {
        "prompts": [copy.deepcopy(row.reward_prompt) for row in rows],
        "completions": completions,
    }
    for name in rows[0].columns:
        arguments[name] = [copy.deepcopy(row.columns[name]) for row in rows]
    return arguments


def as_rewards(values, N, device):
    """What a reward function returned, as a tensor (N,). Raises BadInput for anything else."""
    try:
        rewards = torch.as_tensor(values, dtype=torch.float32, device=device).detach()
    except (TypeError, ValueError) as error:
        reason = f"rewards must be numbers; None is not supported: {shortened(values)}"
        raise BadInput(reason, "reward") from error
    if rewards.shape != (N,):
        raise BadInput(f"the reward must return {N} numbers: {shortened(values)}", "reward")
    if not rewards.isfinite().all():
        raise BadInput(f"the reward must return finite numbers: {shortened(values)}", "reward")
    return rewards


def score_responses(args, reward_function, tokenizer, rows, responses):
    """Rewards (N,) of responses (N,T) to the prompts of N rows."""
    arguments = reward_arguments(tokenizer, rows, responses)
    with forbid_exit():  # no blame(): what a person's own function raises keeps its traceback
        values = reward_function(**arguments)
    rewards = as_rewards(values, len(rows), responses.device)  # (N,)
    has_no_eos = (responses != tokenizer.eos_token_id).all(1)  # (N,)
    rewards = rewards - args.missing_eos_penalty * has_no_eos
    if not rewards.isfinite().all():
        raise BadInput("a reward less the penalty is beyond float32", "missing_eos_penalty")
    return rewards


# =================================================================================================
# The models.
# =================================================================================================


def choose_device(name):
    """The device of a name such as cpu, cuda or cuda:1. torchrun's processes get a GPU each."""
    device = torch.device(name)
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"{device.type} is none of cpu, cuda, mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA GPU here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("torch finds no MPS GPU here")
    if device.type == "cuda" and dist.is_initialized():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.zeros(1, device=device)  # raises now if there is no such device
    return device


def set_up_cuda(device):
    if dist.is_initialized():
        torch.cuda.set_device(device)  # nccl uses the current one
    # On H100 and H200 cuDNN's attention gives NaN gradients to padded rows of some lengths
    # (pytorch#196678). The other kernels do not.
    torch.backends.cuda.enable_cudnn_sdp(False)


def choose_dtype(precision, device):
    """What to compute in. auto: on a GPU bfloat16 if it has it, else float16; float32 elsewhere."""
    if precision == "fp32":
        return torch.float32
    if precision == "bf16":
        return torch.bfloat16
    if precision == "fp16":
        return torch.float16
    if device.type != "cuda":
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def load_model(auto_class, name, **options):
    """from_pretrained. Raises ValueError for weights that are missing or not finite.

    from_pretrained would draw missing weights at random and go on.
    """
    model, info = auto_class.from_pretrained(
        name,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in the info, and refused below
        **options,
    )
    absent = [*info["missing_keys"], *info["mismatched_keys"]]
    if absent:
        raise ValueError(f"{without_folder(name)} has no fitting weights for {absent[0]}")
    unused = sorted(info["unexpected_keys"])
    if unused:
        say(f"{without_folder(name)} has weights that its model does not use: {unused[0]}, ...")
    for parameter in model.parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{without_folder(name)} has weights that are not finite")
    return model


def turn_off_noise(config):
    """Set dropout and jitter to 0 in a config, and in the configs inside it.

    That is every float with such a name, as attn_pdrop, hidden_dropout or router_jitter_noise.

    With dropout two passes over one text disagree, and the KL is noise (trl#3500). eval() mode has
    none, but gradient checkpointing needs train() mode.
    """
    for name, value in list(vars(config).items()):  # a list, as the loop changes the config
        is_noise = "drop" in name or "jitter" in name
        if isinstance(value, PreTrainedConfig):
            turn_off_noise(value)
        elif is_noise and isinstance(value, float):
            setattr(config, name, 0.0)


def check_policy(args):
    """Refuse a model that cannot be trained here, before its weights are loaded."""
    if Path(args.model, "adapter_config.json").exists():
        raise ValueError("this is an adapter: merge it into its model first")
    config = AutoConfig.from_pretrained(args.model)
    if is_made_for(config, "Classification"):
        raise ValueError("this is a classifier, not a language model")
    positions = largest_length(config)
    if args.max_prompt_tokens + args.max_new_tokens > positions:
        reason = f"prompt and response do not fit into the model's {positions} positions"
        raise BadInput(reason, "model", "max_prompt_tokens", "max_new_tokens")


def load_policy(args):
    """The model to train: float32 weights, no noise, gradient checkpointing if asked for."""
    config = AutoConfig.from_pretrained(args.model)
    turn_off_noise(config)  # before the modules read it
    # float32: bfloat16 weights would round an update of 1e-6 away.
    policy = load_model(AutoModelForCausalLM, args.model, config=config, dtype=torch.float32)
    if policy.config.model_type != config.model_type:  # it is a part of a model that sees images
        say(f"{without_folder(args.model)}: only its language model is trained and saved")
    if args.gradient_checkpointing:
        # transformers 5.24 renamed gradient_checkpointing_enable().
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
    # fused=True: CUDA's default, foreach, needs extra memory of the size of the gradients.
    return torch.optim.AdamW(policy.parameters(), args.lr, weight_decay=0.0, fused=True)


def check_optimizer_state(optimizer):
    """Raise ValueError for another model's state: load_state_dict() does not compare shapes."""
    for parameter, state in optimizer.state.items():
        average = state.get("exp_avg")  # AdamW's running mean of the gradients
        if average is not None and average.shape != parameter.shape:
            raise ValueError("the checkpoint holds the optimizer of another model")


def make_scaler(dtype, device):
    """float16 alone needs one: its small gradients would be rounded to 0."""
    # A sum over tokens is large: the default scale of 65536 would overflow at once.
    is_float16 = dtype == torch.float16
    return torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=is_float16)


def use_one_thread_if_small(policy):
    """A small model is no faster on two threads, and 20 times slower if other work takes a core."""
    if policy.num_parameters() < 5e6:
        torch.set_num_threads(1)


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


def fingerprint(name):
    """The name of a file or folder, and the hash of its content. A name of the hub as it is.

    The content of a folder is that of the files right in it. 16 digits of the hash are enough to
    tell two contents apart.
    """
    if not os.path.exists(name):
        return name
    path = Path(name)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
    hashes = ""
    for file in files:
        with open(file, "rb") as opened:
            hashes += hashlib.file_digest(opened, "sha256").hexdigest()
    hash_of_all = hashlib.sha256(hashes.encode()).hexdigest()
    return f"{path.name} with the hash {hash_of_all[:16]}"


def args_as_texts(args, dtype):
    """The arguments as texts, for --resume to compare: name -> text."""
    texts = {name: without_folder(value) for name, value in vars(args).items()}
    texts["precision"] = str(dtype)  # auto may be another dtype on another device
    # Files and folders count by their content: they may have been edited since, or moved.
    texts["model"] = fingerprint(args.model)
    texts["prompts"] = fingerprint(args.prompts)
    reward_name, function_name = split_function(args.reward)
    texts["reward"] = fingerprint(reward_name)
    if function_name is not None:
        texts["reward"] += f", function {function_name}"
    return texts


def lock(file):
    """Raise ValueError for a file that another run has locked. The lock ends with the process."""
    if fcntl is None:
        return
    try:
        # lockf, not flock: children of a reward function must not inherit the lock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError(f"another run is writing {file.name}") from error


def may_continue(name, old, new):
    """Whether a run that was made with one value of a flag may go on with another one."""
    if name in MAY_CHANGE:
        return True
    if name == "steps":  # a longer run
        return int(new) >= int(old)
    return new == old


def read_checkpoint(args, new_args, folder):
    """The checkpoint that --resume goes on from. Raises BadInput if other flags made it.

    new_args: this run's, as args_as_texts() returns them.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        raise ValueError(
            f"{args.output_dir} holds no checkpoint to resume from: "
            "start a new run, without --resume, in a folder of its own"
        )
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or "args" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of remax.py")
    for name, old in checkpoint["args"].items():
        new = new_args.get(name)
        if not may_continue(name, old, new):
            reason = f"{as_flag(name)} is {new}, but the run was made with {old}"
            raise BadInput(reason, name, "output_dir")
    return checkpoint


def drop_later_rows(metrics_file, size_then):
    """Cut off the rows of steps that were taken after the checkpoint: they are taken again.

    size_then: the bytes of metrics.jsonl when the checkpoint was written.
    """
    size_now = os.fstat(metrics_file.fileno()).st_size
    # Not beyond its end: that would fill up a file that was cut by hand.
    metrics_file.truncate(min(size_now, size_then))


def refuse_old_run(args, folder):
    """Raise ValueError if the folder of a new run holds another run.

    It has a metrics.jsonl in any case: claim_folder() has opened it.
    """
    if (folder / "checkpoint.pt").exists():
        raise ValueError(
            f"{args.output_dir} holds a run: --resume continues it, "
            "another --output-dir starts a new one"
        )
    has_metrics = (folder / "metrics.jsonl").stat().st_size > 0
    if has_metrics or (folder / "model").exists():
        raise ValueError(
            f"{args.output_dir} holds a run without a checkpoint: "
            "delete it, or choose another --output-dir"
        )


def claim_folder(args, folder):
    """Make the output folder this run's own. Returns metrics.jsonl in it, open for appending."""
    if (folder / "config.json").exists():
        raise ValueError(f"{args.output_dir} holds a model: choose another --output-dir")
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115, open for the run
    lock(file)  # before looking into the folder: another run may be writing there
    if not args.resume:
        refuse_old_run(args, folder)
    return file


def save_checkpoint(path, checkpoint):
    """Write it beside the old one, then rename: a kill at any instant leaves one of them whole."""
    unfinished = path.with_suffix(".new")
    try:
        with open(unfinished, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except RuntimeError as error:  # torch.save on a full disk: "unexpected pos"
        raise OSError(f"writing {path} failed: is the disk full?") from error
    finally:
        unfinished.unlink(missing_ok=True)


SIGHUP = getattr(signal, "SIGHUP", None)  # Windows has none


def stop_signals():
    """The signals that ask a run to stop: Ctrl-C, `kill` or a scheduler, a closed terminal."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    # nohup ignores SIGHUP, and that stays so.
    if SIGHUP is not None and signal.getsignal(SIGHUP) != signal.SIG_IGN:
        numbers.append(SIGHUP)
    return numbers


def end_at_once(number):
    """End the run, and the children that its reward has from multiprocessing."""
    for child in multiprocessing.active_children():
        child.terminate()
    # Not by an exception: a reward could catch it, and a pool may wait for ever when it is closed.
    os._exit(128 + number)  # as shells report a signal


class StopRequest:
    """Remembers a signal until the step is done. Ctrl-C after an earlier signal ends it at once.

    Other signals may come twice for one request: torchrun passes them on to all processes.
    """

    def __init__(self):
        self.signal_number = 0  # no signal yet
        # Asked now, because isatty() says no of a terminal that is closed.
        outputs = (STANDARD_OUTPUT, STANDARD_ERROR)
        self.terminals = [output for output in outputs if os.isatty(output)]
        signal.signal(signal.SIGINT, self.on_ctrl_c)
        signal.signal(signal.SIGTERM, self.on_stop)
        if SIGHUP in stop_signals():
            signal.signal(SIGHUP, self.on_hangup)

    def on_stop(self, number, frame):
        self.signal_number = number
        # Not print(): the signal may have come in the middle of one.
        message = b"\nstopping after this step; press again to stop now, unsaved\n"
        with suppress(OSError):  # nobody may be there to read it
            os.write(STANDARD_ERROR, message)

    def on_ctrl_c(self, number, frame):
        if self.signal_number != 0:  # the run has been asked to stop already
            end_at_once(number)
        self.on_stop(number, frame)

    def on_hangup(self, number, frame):
        for terminal in self.terminals:  # they are closed
            send_to_devnull(terminal)
        self.signal_number = number

    def signal_of_any_process(self):
        """The number of the signal, 0 without one. Under torchrun all stop after the same step."""
        number = torch.tensor(self.signal_number)
        if dist.is_initialized():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()


def prepare_forks():
    """Let signals do what they should to the processes that a reward forks, as a pool does.

    Without this three things would go wrong:
    1. A child inherits the handlers of StopRequest, which only remember a signal. terminate()
       would not end it. So each child takes them away: reset_signals().
    2. A terminate() from before it has done so would be lost. So signals wait while a process
       forks: hold_signals() and release_signals().
    3. A terminal, `timeout` and torchrun send their signals to a whole group of processes. The
       workers of a pool and their programs would end. The step would then wait for ever, or count
       wrong rewards. So they leave the group: leave_group().
    """
    if not hasattr(os, "register_at_fork"):  # Windows has no fork
        return
    os.register_at_fork(
        before=hold_signals, after_in_parent=release_signals, after_in_child=reset_signals
    )
    # Only where multiprocessing forks: a child of subprocess may call setsid(), which the leader
    # of a group must not. leave_group() will get what is the first argument here, and needs none.
    multiprocessing.util.register_after_fork(os, leave_group)


def hold_signals():
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())


def release_signals():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())


def reset_signals():
    for number in stop_signals():
        signal.signal(number, signal.SIG_DFL)
    release_signals()


def leave_group(_):
    os.setpgrp()


def format_metrics(metrics, prefix=""):
    """Reward, greedy reward and KL of a step or, with the prefix eval_, of an evaluation."""
    reward = metrics[f"{prefix}reward"]
    greedy_reward = metrics[f"{prefix}greedy_reward"]
    kl = metrics[f"{prefix}kl"]
    words = f"reward {reward:.3f}, greedy {greedy_reward:.3f}"
    if kl is not None:
        words += f", KL {kl:.3g}"
    return words


class Sample(NamedTuple):
    """What an evaluation keeps of a held-out prompt and its two responses."""

    prompt: str
    response: str
    greedy_response: str
    reward: float
    greedy_reward: float
    kl: float | None  # nats per response; None without a reference


def format_sample(sample):
    """A prompt, and below it the sampled and the greedy response with their rewards."""
    return (
        f"  > {sample.prompt}\n"
        f"    sampled {sample.reward:6.3f}  {sample.response!r}\n"
        f"    greedy  {sample.greedy_reward:6.3f}  {sample.greedy_response!r}"
    )


def mean_over_processes(values):
    """The mean over all entries and all processes, as a number: all processes must call it."""
    mean = values.float().mean()
    average_in_place(mean)
    return mean.item()


class Stopwatch:
    """The seconds of the parts of a step, by name."""

    def __init__(self):
        self.seconds = {}
        self.start = time.perf_counter()

    def lap(self, name):
        """A part ends now, and the next one begins."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the GPU may still be at work on this part
        now = time.perf_counter()
        self.seconds[name] = now - self.start
        self.start = now


def step_metrics(result, settings):
    """The metrics of a StepResult as numbers: means over the batch of all processes."""
    batch = result.batch
    kl = None  # there is no reference
    if settings.kl_coef > 0:
        log_ratio = result.logprobs - batch.ref_logprobs  # (B,T), 0 where masked
        kl = mean_over_processes(log_ratio.sum(1))  # in nats per response
    has_eos = (batch.response == settings.eos_id).any(1)  # (B,)
    tokens = mean_over_processes(batch.mask.sum(1))
    # The next two are in nats per token: the mean sum over a response, divided by its mean length.
    entropy = mean_over_processes(-result.logprobs.sum(1)) / tokens
    difference = (result.logprobs - result.sampling_logprobs).abs()  # (B,T), 0 where masked
    sampling_logp_difference = mean_over_processes(difference.sum(1)) / tokens
    grad_norm = mean_over_processes(result.grad_norm)
    skipped = 0.0 if math.isfinite(grad_norm) else 1.0
    return {
        "reward": mean_over_processes(batch.reward),
        "greedy_reward": mean_over_processes(result.greedy_reward),
        "advantage": mean_over_processes(batch.reward - batch.baseline),
        "zero_advantage": mean_over_processes(batch.reward == batch.baseline),
        "kl": kl,
        "entropy": entropy,
        "tokens": tokens,
        "eos": mean_over_processes(has_eos),
        "sampling_logp_difference": sampling_logp_difference,
        "loss": mean_over_processes(result.loss),
        "grad_norm": grad_norm,
        "skipped": skipped,
    }


def seed_of_step(seed, step):
    """A number of 32 bits, as numpy wants it: another one for every seed and step."""
    generator = random.Random(f"{seed}/{step}")  # a text may be a seed
    return generator.getrandbits(32)


# Drawing and training compute the same log-probs, up to rounding. A larger difference, in nats a
# token, means that a cache or padding goes wrong for this model.
LARGEST_DIFFERENCE = {torch.float32: 0.02, torch.bfloat16: 0.3, torch.float16: 0.3}


class Run:
    """One training run: what it has loaded, and what it does with it."""

    def __init__(self, args):
        """Check and load everything, cheap things first."""
        self.args = args
        self.steps_before = 0  # taken before this process began: more than 0 with --resume
        self.steps_without_advantage = 0  # in a row, up to now
        self.skipped_steps = 0  # in a row, up to now

        # The machine.
        self.rank, self.process_count = 0, 1
        if dist.is_initialized():
            self.rank, self.process_count = dist.get_rank(), dist.get_world_size()
        if args.batch_size % self.process_count != 0:
            reason = f"the batch does not divide among {self.process_count} processes"
            raise BadInput(reason, "batch_size")
        with blame("device"):
            self.device = choose_device(args.device)
        if self.device.type == "cuda":
            set_up_cuda(self.device)
        self.dtype = choose_dtype(args.precision, self.device)

        # What needs no model: files, flags, tokenizer and output folder. Files are compared as they
        # are now: they may change during the run.
        with blame("model", "prompts", "reward"):
            self.args_to_compare = args_as_texts(args, self.dtype)
        with blame("model"):
            check_policy(args)
        with blame("model", "eos_token"):
            self.tokenizer = load_policy_tokenizer(args)
        self.settings = self.step_settings()
        self.folder = Path(args.output_dir).resolve()
        self.metrics_file = None
        checkpoint = None
        with blame("output_dir"):
            if self.rank == 0:  # under torchrun the first process alone writes
                self.metrics_file = claim_folder(args, self.folder)
            if args.resume:
                checkpoint = read_checkpoint(args, self.args_to_compare, self.folder)

        # What takes time: prompts, reward and models.
        with blame("prompts", "prompt_column"):
            self.training_rows, self.held_out_rows = load_prompts(args, self.tokenizer)
        self.reward_function = load_reward_function(args, self.dtype, self.device)
        with blame("model", "gradient_checkpointing"):
            self.policy = load_policy(args)
        with blame("model"):
            self.reference = load_reference(args, self.dtype)
            self.check_token_ids()
        self.policy.to(self.device)
        if not args.offload:  # otherwise they stay in CPU memory: see on_device()
            self.move_frozen_models()
        self.check_decoding()
        self.optimizer = make_optimizer(args, self.policy)
        self.scaler = make_scaler(self.dtype, self.device)
        if checkpoint is not None:
            with blame("output_dir", "model"):
                self.restore(checkpoint)

        use_one_thread_if_small(self.policy)
        with blame("output_dir"):
            self.save_args()
        self.announce()

    def check_token_ids(self):
        """Raise ValueError for a token that the policy has no embedding for."""
        embeddings = self.policy.get_input_embeddings().num_embeddings
        largest = max(self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        for row in self.training_rows + self.held_out_rows:
            largest = max(largest, max(row.prompt_ids))
        if largest >= embeddings:
            raise ValueError(
                f"the policy has {embeddings} embeddings, but its tokenizer has a token {largest}"
            )

    @torch.no_grad()
    def logprobs_without_padding(self, rows, response, mask):
        """token_logprobs() (B,T) of responses, each computed alone: no prompt is padded."""
        logprobs = []
        for i, row in enumerate(rows):
            prompt = torch.tensor([row.prompt_ids], device=self.device)  # (1,P)
            attention_mask = torch.ones_like(prompt)  # (1,P)
            row_logprobs = token_logprobs(
                self.policy, prompt, attention_mask, response[i : i + 1], mask[i : i + 1]
            )  # (1,T)
            logprobs.append(row_logprobs)
        return torch.cat(logprobs)

    def step_settings(self):
        args = self.args
        return StepSettings(
            eos_id=self.tokenizer.eos_token_id,
            pad_id=self.tokenizer.pad_token_id,
            max_new_tokens=args.max_new_tokens,
            kl_coef=args.kl_coef,
            greedy_baseline=args.baseline == "greedy",
            micro_batch_size=args.micro_batch_size,
            max_grad_norm=args.max_grad_norm,
            dtype=self.dtype,
        )

    def check_decoding(self):
        """Draw a few tokens and check them, before any time is spent on a model that fails.

        They are drawn with a cache and with padding, and their log-probs computed without either.
        """
        rows = self.training_rows[:8]  # of several lengths, so that most of them are padded
        prompt, attention_mask = collate(self.tokenizer, rows, self.device)  # (B,P)
        eos_id, pad_id = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        max_new_tokens = min(4, self.args.max_new_tokens)
        self.policy.eval()
        try:
            response, _, sampling_logprobs = rollout(
                self.policy, prompt, attention_mask, max_new_tokens, eos_id, pad_id
            )  # (B,T) each
        except ValueError as error:  # it has no cache
            raise BadInput(str(error), "model") from error
        mask = response_mask(response, eos_id)  # (B,T)
        logprobs = self.logprobs_without_padding(rows, response, mask)  # (B,T)
        difference = (logprobs - sampling_logprobs).abs()  # (B,T), 0 where masked
        mean_difference = difference.sum() / mask.sum()
        # float32: they are drawn with the policy's own weights, whatever --precision says.
        self.check_sampler(mean_difference.item(), torch.float32)

    def check_sampler(self, difference, dtype):
        """Refuse a model whose decoding is not what its full forward computes.

        difference: mean |log-prob as drawn - log-prob as trained| in nats per token.
        """
        if math.isnan(difference) or difference > LARGEST_DIFFERENCE[dtype]:
            reason = (
                f"sampling_logp_difference is {difference:.2g} nats per token: with a cache or "
                f"padding {type(self.policy).__name__} computes something else than without"
            )
            raise BadInput(reason, "model", "precision")

    def move_frozen_models(self):
        """Put reference and reward model on the policy's device."""
        if self.reference is not None:
            self.reference.to(self.device)
        if isinstance(self.reward_function, RewardModel):
            self.reward_function.model.to(self.device)

    def restore(self, checkpoint):
        """Load weights, optimizer, scaler and step from a checkpoint."""
        self.policy.load_state_dict(checkpoint["policy"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        check_optimizer_state(self.optimizer)
        if self.rank == 0:
            drop_later_rows(self.metrics_file, checkpoint["metrics_bytes"])
        self.steps_before = checkpoint["step"]
        self.skipped_steps = checkpoint["skipped_steps"]

    def save_args(self):
        if self.rank == 0:
            (self.folder / "args.json").write_text(json.dumps(vars(self.args), indent=2))

    def announce(self):
        """Say in one line what is trained, by what, and where it goes."""
        args = self.args
        millions = self.policy.num_parameters() / 1e6
        reference = "none" if self.reference is None else "the same"
        say(
            f"policy {without_folder(args.model)} ({millions:.1f}M parameters), "
            f"reference {reference}, reward {without_folder(args.reward)}, "
            f"EOS {self.tokenizer.eos_token!r}, output {args.output_dir}"
        )
        is_chat = isinstance(self.training_rows[0].reward_prompt, list)
        is_model = isinstance(self.reward_function, RewardModel)
        if is_chat and is_model and self.reward_function.tokenizer.chat_template is None:
            say("the reward model has no chat template: it reads the contents, line by line")
        if self.device.type == "mps":
            say("device mps: nobody has tested remax.py there")

    def log(self, row):
        if self.rank == 0:
            with blame("output_dir"):
                self.metrics_file.write(json.dumps(row) + "\n")

    def kl_to_reference(self, prompt, attention_mask, response):
        """The estimates of the KL in nats, a list: one from each response, None if no reference."""
        if self.reference is None:
            return [None] * len(prompt)
        mask = response_mask(response, self.tokenizer.eos_token_id)  # (B,T)
        size = self.args.micro_batch_size
        with computing_in(self.dtype, self.device):  # as in training
            logprobs = logprobs_without_gradient(
                self.policy, prompt, attention_mask, response, mask, size
            )  # (B,T)
            with on_device(self.reference, self.device):
                ref_logprobs = logprobs_without_gradient(
                    self.reference, prompt, attention_mask, response, mask, size
                )  # (B,T)
        return (logprobs - ref_logprobs).sum(1).tolist()

    def sample_rows(self, rows):
        """A Sample of each of B rows."""
        tokenizer = self.tokenizer
        prompt, attention_mask = collate(tokenizer, rows, self.device)  # (B,P)
        with weights_as(self.policy, self.dtype):
            response, greedy_response, _ = rollout(
                self.policy,
                prompt,
                attention_mask,
                self.args.max_new_tokens,
                tokenizer.eos_token_id,
                tokenizer.pad_token_id,
            )  # (B,T) each
        responses = torch.cat([response, greedy_response])  # (2B,T)
        rewards = score_responses(
            self.args, self.reward_function, tokenizer, rows + rows, responses
        )  # (2B,)
        reward, greedy_reward = rewards.chunk(2)  # (B,) each
        texts = decode_responses(tokenizer, rows, response)
        greedy_texts = decode_responses(tokenizer, rows, greedy_response)
        kl = self.kl_to_reference(prompt, attention_mask, response)

        samples = []
        for i, row in enumerate(rows):
            sample = Sample(
                prompt=row.prompt_text,
                response=texts[i],
                greedy_response=greedy_texts[i],
                reward=reward[i].item(),
                greedy_reward=greedy_reward[i].item(),
                kl=kl[i],
            )
            samples.append(sample)
        return samples

    @torch.no_grad()
    def evaluate(self):
        """Return (metrics, samples): means over the held-out rows, and a Sample of each."""
        size = self.args.batch_size // self.process_count  # as many at once as in training
        transformers.set_seed(0)  # the same noise every time
        self.policy.eval()
        samples = []
        for part in micro_batches(len(self.held_out_rows), size):
            samples += self.sample_rows(self.held_out_rows[part])

        metrics = {
            "eval_reward": statistics.fmean(sample.reward for sample in samples),
            "eval_greedy_reward": statistics.fmean(sample.greedy_reward for sample in samples),
            "eval_kl": None,
        }
        if self.reference is not None:
            metrics["eval_kl"] = statistics.fmean(sample.kl for sample in samples)
        return metrics, samples

    def evaluate_and_log(self, step):
        """The first process evaluates. The others go on, and wait for it at their next average."""
        if self.rank > 0:
            return
        metrics, samples = self.evaluate()
        self.log({"step": step} | metrics)
        say(f"step {step}: held-out {format_metrics(metrics, 'eval_')}")
        for sample in samples[:3]:
            say(format_sample(sample))

    def learning_rate(self, step):
        """A cosine from --lr down to 0. It needs no state, so there is no scheduler to resume."""
        progress = (step - 1) / self.args.steps
        return self.args.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def draw_rows(self, step_seed):
        """Draw the prompts of a step, and return this process's share of them."""
        batch = random.Random(step_seed).sample(self.training_rows, self.args.batch_size)
        # The processes of torchrun take turns: one takes rows 0, 2, 4, the other rows 1, 3, 5.
        return batch[self.rank :: self.process_count]

    def set_learning_rate(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def train_step(self, step):
        """Draw prompts, take one step of the algorithm, log and return its metrics."""
        # All noise of a step comes from --seed and the step. So a resumed run draws the same.
        step_seed = seed_of_step(self.args.seed, step)
        rows = self.draw_rows(step_seed)
        # The processes draw other responses. A reward may draw too, by random, numpy or torch.
        transformers.set_seed((step_seed + self.rank) % 2**32)
        prompt, attention_mask = collate(self.tokenizer, rows, self.device)  # (B,P)
        lr = self.learning_rate(step)
        self.set_learning_rate(lr)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        stopwatch = Stopwatch()

        def score(responses):  # the sampled ones, and the greedy ones to the same prompts
            stopwatch.lap("rollout_seconds")
            rewards = score_responses(
                self.args, self.reward_function, self.tokenizer, rows + rows, responses
            )
            stopwatch.lap("score_seconds")
            return rewards

        result = remax_step(
            policy=self.policy,
            reference=self.reference,
            optimizer=self.optimizer,
            scaler=self.scaler,
            score=score,
            prompt=prompt,
            attention_mask=attention_mask,
            settings=self.settings,
        )
        stopwatch.lap("update_seconds")
        metrics = {"step": step, "lr": lr}
        metrics |= step_metrics(result, self.settings)
        metrics |= stopwatch.seconds
        metrics["peak_memory_gb"] = peak_memory_gb(self.device)
        self.log(metrics)
        return metrics

    def save(self, step):
        """Write a checkpoint: all that --resume needs."""
        if self.rank > 0:
            return
        os.fsync(self.metrics_file.fileno())  # or a power cut could lose rows that it counts
        checkpoint = {
            "step": step,
            "metrics_bytes": os.fstat(self.metrics_file.fileno()).st_size,
            "args": self.args_to_compare,
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped_steps": self.skipped_steps,
        }
        save_checkpoint(self.folder / "checkpoint.pt", checkpoint)

    def config_as_loaded(self):
        """The policy's config from before load_policy() set its dropout to 0."""
        config = AutoConfig.from_pretrained(self.args.model)
        if config.model_type != self.policy.config.model_type:  # of a model for images and text
            config = config.get_text_config()
        return config

    def save_model(self):
        """Save the policy and its tokenizer. generate() will stop where training did."""
        eos_id = self.tokenizer.eos_token_id
        self.policy.config = self.config_as_loaded()
        self.policy.config.eos_token_id = eos_id
        self.policy.generation_config.eos_token_id = eos_id
        self.policy.save_pretrained(self.folder / "model")

        tokenizer = AutoTokenizer.from_pretrained(self.args.model)  # without our padding token
        # Not an ordinary token such as ".": saved as EOS it would be cut out of every text.
        if eos_id in tokenizer.added_tokens_decoder:
            tokenizer.eos_token = self.tokenizer.eos_token
        tokenizer.save_pretrained(self.folder / "model")

    def warn_if_nothing_is_learned(self, metrics):
        """Say it once: for 20 steps in a row every advantage was 0."""
        if metrics["zero_advantage"] == 1:
            self.steps_without_advantage += 1
        else:
            self.steps_without_advantage = 0
        if self.steps_without_advantage == 20:
            say("warning: 20 steps of zero_advantage 1: are all responses or rewards alike?")

    def refuse_to_be_stuck(self, metrics):
        """Raise BadInput if five steps in a row, or all of a shorter run, changed no weight."""
        if metrics["skipped"] == 1:
            self.skipped_steps += 1
        else:
            self.skipped_steps = 0
        if self.skipped_steps >= min(5, self.args.steps):
            reason = (
                f"no finite gradient in {self.skipped_steps} steps: start again with other flags "
                "and another --output-dir"
            )
            raise BadInput(reason, "lr", "precision", "kl_coef", "output_dir")

    def make_bar(self, first_step):
        """A progress bar over the steps that are left. In a log it does not show."""
        return tqdm(
            range(first_step, self.args.steps + 1),
            initial=self.steps_before,
            total=self.args.steps,
            file=sys.stdout,
            disable=self.rank > 0 or not sys.stdout.isatty(),
        )

    def show(self, bar, step, metrics):
        """Write the step's metrics beside the bar, or in a log as a line."""
        if sys.stdout.isatty():
            bar.set_description_str(format_metrics(metrics), refresh=False)
        else:
            say(f"step {step}: {format_metrics(metrics)}")

    def train(self, stop):
        """Take the steps that are left, with the evaluations and checkpoints that are due.

        Returns the number of the signal that stopped the run, 0 if it came to its end.
        """
        args = self.args
        if self.steps_before == 0:
            self.evaluate_and_log(0)
        if self.steps_before == args.steps:
            say(f"all {args.steps} steps are done already: larger --steps continue")
        first_step = self.steps_before + 1
        bar = self.make_bar(first_step)
        for step in bar:
            metrics = self.train_step(step)
            if step == first_step:
                self.check_sampler(metrics["sampling_logp_difference"], self.dtype)
            self.show(bar, step, metrics)
            self.warn_if_nothing_is_learned(metrics)
            self.refuse_to_be_stuck(metrics)

            is_last = step == args.steps
            if is_last or step % args.eval_every == 0:
                self.evaluate_and_log(step)
            signal_number = stop.signal_of_any_process()
            is_stopped = signal_number != 0
            if is_last or is_stopped or step % args.save_every == 0:
                with blame("output_dir"):
                    self.save(step)
            if is_stopped:
                say(f"stopped after step {step}: the same command with --resume continues")
                return signal_number
        return 0


def peak_memory_gb(device):
    """The most GPU memory in use in this step, in GB of 1e9 bytes; None without a GPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 1e9


def print_summary(path):
    """The evaluations before and after, and where the seconds of the steps went."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    evaluations = [row for row in rows if "eval_reward" in row]
    steps = [row for row in rows if "reward" in row]
    if not evaluations or not steps:
        return  # metrics.jsonl was deleted between two parts of the run
    first, last = evaluations[0], evaluations[-1]
    for name in "eval_reward", "eval_greedy_reward", "eval_kl":
        if first[name] is not None:
            say(f"{name:20}{first[name]:.4g} -> {last[name]:.4g}")
    seconds = {}
    for name in "rollout_seconds", "score_seconds", "update_seconds":
        seconds[name] = sum(row[name] for row in steps)
    whole = sum(seconds.values())
    for name, value in seconds.items():
        say(f"{name:20}{value:.1f} ({value / whole:.0%})")


# =================================================================================================
# The flags and main.
# =================================================================================================

# Without --model these replace the defaults below, which follow the paper: lengths as in its GPT-2
# runs (App. F.4), learning rate and beta as in its larger ones.
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


def tiny_world_defaults():
    """TINY_WORLD, one flag a line."""
    return "\n".join(f"  {as_typed(name, value)}" for name, value in TINY_WORLD.items())


def make_parser():
    parser = argparse.ArgumentParser(
        usage="python remax.py [--FLAG VALUE] ...",
        description=__doc__,
        epilog=f"Without --model, in the tiny world, the defaults are:\n{tiny_world_defaults()}",
        formatter_class=HelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_or_off = argparse.BooleanOptionalAction
    # fmt: off
    task = parser.add_argument_group("task")
    task.add_argument("--model",
        help="the policy: a causal language model, hub id or folder; None is the tiny world")
    task.add_argument("--reward", default="lvwerra/distilbert-imdb",
        help="a sequence classifier, hub id or folder, or a function, FILE.py:FUNCTION")
    task.add_argument("--prompts", default=f"{HERE}/data/tiny/prompts.jsonl",
        help="a json, jsonl, csv, tsv, parquet or txt file, or a dataset of the hub")
    task.add_argument("--prompt-column", default="prompt",
        help="the column that holds the prompts: texts, or lists of {role, content}")
    task.add_argument("--max-prompt-tokens", default=64, type=positive_int,
        help="longer texts are cut; longer chats are left out")
    task.add_argument("--max-new-tokens", default=48, type=positive_int,
        help="a response without EOS is cut here")
    task.add_argument("--eos-token",
        help="the token that ends a response; None is the tokenizer's EOS")
    task.add_argument("--missing-eos-penalty", default=0.0, type=nonnegative_float,
        help="subtracted from the reward of every response without EOS, sampled or greedy")

    algorithm = parser.add_argument_group("algorithm")
    algorithm.add_argument("--baseline", default="greedy", choices=("greedy", "none"),
        help="greedy is ReMax; none is REINFORCE, where the greedy reward is only logged")
    algorithm.add_argument("--kl-coef", default=0.01, type=nonnegative_float,
        help="beta, the price of a nat of KL to the reference; 0 loads no reference")
    algorithm.add_argument("--steps", default=300, type=positive_int,
        help="each is one rollout and one update")
    algorithm.add_argument("--batch-size", default=32, type=positive_int,
        help="prompts a step, drawn anew; under torchrun of all processes together")
    algorithm.add_argument("--lr", default=1e-6, type=positive_float,
        help="learning rate at the start; it falls to 0 along a cosine")
    algorithm.add_argument("--optimizer", default="adamw", choices=("adamw", "adafactor"),
        help="adafactor needs less memory, and an --lr 10 to 30 times higher")
    algorithm.add_argument("--max-grad-norm", default=1.0, type=positive_float,
        help="longer gradients are scaled down to this norm")
    algorithm.add_argument("--seed", default=0, type=int,
        help="for the choice of prompts and for sampling; the same seed gives the same metrics on "
             "the same kind of CPU")
    algorithm.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"),
        help="auto: on a GPU bf16 if it has it, else fp16; fp32 elsewhere")

    memory = parser.add_argument_group("memory")
    memory.add_argument("--micro-batch-size", default=8, type=positive_int,
        help="rows in one backward pass: changes memory, not the gradient")
    memory.add_argument("--gradient-checkpointing", default=True, action=on_or_off,
        help="compute activations again in the backward pass, to save memory")
    memory.add_argument("--offload", default=False, action=on_or_off,
        help="reference and reward model wait in CPU memory while the policy is at work")
    memory.add_argument("--device", default=device, help="cpu, cuda, cuda:1 or mps")

    run = parser.add_argument_group("run")
    run.add_argument("--output-dir",
        help="the folder for metrics, checkpoint and model; None is runs/MODEL-SEED")
    run.add_argument("--eval-every", default=50, type=positive_int,
        help="steps between evaluations on held-out prompts")
    run.add_argument("--save-every", default=100, type=positive_int,
        help="steps between checkpoints; one takes about 12 bytes per parameter with adamw, and "
             "the old one stays until the new one is written; the last step and Ctrl-C save too")
    run.add_argument("--resume", action="store_true",
        help="continue the run in --output-dir: give the same command, with larger --steps if "
             "you like")
    # fmt: on

    return parser


def absolute(path):
    """The whole path of an existing file or folder; a name of the hub as it is."""
    if os.path.exists(path):
        return os.path.abspath(path)
    return path


def make_paths_absolute(args):
    """A reward function may change the working directory: a relative path would be another one."""
    args.model = absolute(args.model)
    args.prompts = absolute(args.prompts)
    reward_file, function_name = split_function(args.reward)
    args.reward = absolute(reward_file)
    if function_name is not None:
        args.reward += f":{function_name}"


def parse_args(argv=None):
    """The flags that were typed, and the defaults of all others."""
    parser = make_parser()
    args = parser.parse_args(argv)
    is_tiny_world = args.model is None
    if is_tiny_world:
        # Its own defaults for all flags that were not typed: read the command once more.
        parser.set_defaults(**TINY_WORLD)
        args = parser.parse_args(argv)
    if args.output_dir == "":
        parser.error("--output-dir is empty")
    if args.output_dir is None:
        name = "tiny-policy" if is_tiny_world else Path(args.model).name
        args.output_dir = f"runs/{name}-{args.seed}"
    args.output_dir = os.path.expanduser(args.output_dir)  # the shell leaves --output-dir=~/runs
    make_paths_absolute(args)
    return args


def silence_libraries():
    """No bars and warnings of transformers and datasets between the lines of a run."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()


def join_torchrun():
    """Let the processes of torchrun find each other."""
    # gloo beside nccl: the number of a signal travels in a CPU tensor, the gradients do not.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # A reward may take its time: the other processes wait for it.
    dist.init_process_group(backend, timeout=timedelta(hours=6))


def prepare_process():
    """What has to be done once, before anything is loaded."""
    silence_libraries()
    prepare_forks()  # a reward file may fork while it is imported
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know all letters of a sample
    if dist.is_torchelastic_launched():
        join_torchrun()


def run_to_the_end(args):
    """Load, train, and save the trained model."""
    try:
        run = Run(args)
    except KeyboardInterrupt:  # Ctrl-C while loading
        sys.exit(128 + signal.SIGINT)
    stop = StopRequest()  # from now on Ctrl-C ends the run after the step, and no longer at once
    signal_number = run.train(stop)
    if signal_number != 0:
        sys.exit(128 + signal_number)  # as shells report a signal
    if run.rank == 0:
        with blame("output_dir", "model"):
            run.save_model()
        print_summary(run.folder / "metrics.jsonl")
        say(f"the trained model is in {args.output_dir}/model")


def main(argv=None):
    """Read the flags, and answer in two lines if they do not work out."""
    args = parse_args(argv)
    prepare_process()
    try:
        run_to_the_end(args)
    except BadInput as error:
        exit_with(error, args, error.flags)
    except torch.OutOfMemoryError as error:
        flags = ("micro_batch_size", "gradient_checkpointing", "offload", "optimizer", "batch_size")
        exit_with(str(error).splitlines()[0], args, flags)
    if dist.is_initialized():
        dist.destroy_process_group()  # nccl warns of a process that ends without it


if __name__ == "__main__":
    main()
