# SPDX-License-Identifier: MIT
"""Peak memory of one remax.remax_step, reference and reward model included, beside PPO's.

    python data/experiments/memory.py   # no download

With a GPU it measures: random weights of the real size, the peak of the second step (the first
creates the optimizer's state). That writes data/results/memory_gpu.jsonl.

Without a GPU it computes: the same remax_step on fake tensors (shapes without data), counting the
bytes of all live storages at every operator. That leaves out kernel workspaces, fragmentation and
the CUDA context, about 0.5 GB. It writes data/results/memory.jsonl.

PPO is remax_step plus a critic of the policy's size, trained by the same recipe. It decodes one
response a prompt: here half of the prompts at a time, with their greedy rows. "One by one" updates
the critic after the policy's gradients are freed, "together" keeps both gradients until both step.
"""

import argparse
import contextlib
import gc
import json
import sys
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
)

import remax

rollout = remax.rollout
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = torch.device("cuda" if CUDA else "cpu"), torch.bfloat16
torch.backends.cuda.enable_cudnn_sdp(False)  # as remax.Run does
MODELS = {  # config, prompts, prompt tokens, new tokens; one label: the critic's value
    "gpt2-large": (
        GPT2Config(
            n_embd=1280,
            n_layer=36,
            n_head=20,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            num_labels=1,
        ),
        32,
        64,
        48,
    ),
    "Llama-3.2-1B size": (
        LlamaConfig(
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=32,
            head_dim=64,
            num_key_value_heads=8,
            intermediate_size=8192,
            vocab_size=128256,
            tie_word_embeddings=True,
            num_labels=1,
        ),
        16,
        64,
        128,
    ),
}
if CUDA:  # the step whose seconds are to be compared with the floor of the hardware
    MODELS["gpt2-large, 64 x (64 + 128)"] = (MODELS["gpt2-large"][0], 64, 64, 128)
DEFAULT, PARKED = "default", "default, on a small GPU (--offload)"
SMALLEST = "--optimizer adafactor --offload --micro-batch-size 1"
PPO = {
    "PPO, default, one by one": False,
    "PPO, default, together": True,
}  # are both gradients alive at once?
MEASURED = "torch.cuda.max_memory_allocated of the second step"
COMPUTED = (
    "live storage bytes of the second step on fake CPU tensors: autocast('cpu') in place of 'cuda' "
    "but with its pow in float32, the CPU's attention kernel, full-length micro-batches, "
    "offloaded weights taken off the count"
)


class Meter(TorchDispatchMode):
    """Peak bytes of each phase: a GPU allocator's, else counted from what the operators return."""

    now, peak = 0, 0

    def start(self):
        self.name, self.peaks, self.seen = "rollout", {}, getattr(self, "seen", set())
        self.phase("rollout")
        self.peaks.clear()

    def phase(self, name):
        peak = torch.cuda.max_memory_allocated() if CUDA else self.peak
        self.peaks[self.name] = max(self.peaks.get(self.name, 0), peak)
        self.name, self.peak = name, self.now
        if CUDA:
            torch.cuda.reset_peak_memory_stats()

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)

    def free(self, key, size):
        self.seen.remove(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        asks_for_data = "_local_scalar_dense", "is_nonzero", "item"
        if func.overloadpacket.__name__ in asks_for_data:
            answer = getattr(args[0], "answer", 1)
            return bool(answer) if args[0].dtype == torch.bool else answer
        # Autograd adds up the two gradients of a tied embedding in place, except while a mode such
        # as this one is on.
        node = torch._C._current_autograd_node()
        is_sum = func is torch.ops.aten.add.Tensor and node is not None
        if is_sum and node.name() == "EmbeddingBackward0":
            func = torch.ops.aten.add_.Tensor
        out = func(*args, **kwargs or {})
        if func.overloadpacket.__name__ == "all":
            # Not all responses have ended, and not all of the attention mask is 1. But all of its
            # last column is, which rollout() asks for.
            is_one_column = args[0].ndim == 1
            out.answer = int(is_one_column)
        for storage in [
            t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)
        ]:
            key, size = (
                storage._cdata,
                -(-storage.nbytes() // 512) * 512,
            )  # CUDA's allocator rounds to 512
            if key not in self.seen:
                self.seen.add(key)
                weakref.finalize(storage, self.free, key, size)
                self.add(size)
        return out


def trained(kind, config, small, meter):
    """A model with float32 weights and its optimizer, as remax.py sets them up."""
    net = kind.from_config(config, dtype=torch.float32)
    net.activation_checkpointing_enable({"use_reentrant": False})
    if small:
        optimizer = torch.optim.Adafactor(net.parameters(), 1e-5)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), 1e-6, weight_decay=0.0, fused=True)
    optimizer.register_step_pre_hook(lambda *_: meter.phase("optimizer"))
    return net, optimizer


def frozen(kind, config, phase, meter):
    """A frozen model in 16 bits, whose forward passes are a phase of their own."""
    net = kind.from_config(config, dtype=DTYPE).eval().requires_grad_(False)
    net.register_forward_pre_hook(lambda *_: meter.phase(phase))
    return net


def counted_on_device(meter):
    """remax.on_device for fake parameters, which cannot change their device: their bytes count."""

    @contextlib.contextmanager
    def on_device(model, device):
        size = bytes_of(model) if getattr(model, "is_parked", False) else 0
        meter.add(size)
        yield
        meter.add(-size)

    return on_device


def bytes_of(model):
    return sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())


def park(model, meter):
    """Its home is CPU memory from now on."""
    if CUDA:
        model.to("cpu")
    else:
        model.is_parked = True
        meter.add(-bytes_of(model))


def modes(meter):
    """On a GPU tensors are made there; elsewhere they are fake, and counted."""
    if CUDA:
        return [DEVICE]
    return [FakeTensorMode(allow_non_fake_inputs=True), meter]


class Critic:
    """What PPO trains beside the policy: a value for each token of the response."""

    def __init__(self, config, small, meter):
        self.net, self.optimizer = trained(AutoModelForTokenClassification, config, small, meter)
        self.meter = meter

    def backward(self, parts, size, P, T):
        """Gradients of `parts` micro-batches of `size` rows, P prompt and T response tokens."""
        self.meter.phase("critic")
        for _ in range(parts):
            ids = torch.full((size, P + T), 5)  # (size,P+T)
            with torch.enable_grad(), torch.autocast(DEVICE.type, DTYPE, cache_enabled=False):
                values = self.net(ids, use_cache=False).logits[:, P - 1 : -1, 0]  # (size,T)
                (values.float() ** 2).sum(1).mean().backward()

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def rollout_by_halves(*inputs):
    """remax.rollout for PPO, which decodes B rows at a time, and not 2B."""
    policy, prompt, attention_mask, *options = inputs
    halves = [
        rollout(policy, prompt[rows], attention_mask[rows], *options)
        for rows in torch.arange(len(prompt)).chunk(2)
    ]
    return [torch.cat(parts) for parts in zip(*halves, strict=True)]


def step_peaks(model, flags):
    """(parameters, {phase: peak GB}, {phase: seconds on a GPU}) of the second step."""
    config, B, P, T = MODELS[model]
    is_ppo, small = flags in PPO, flags == SMALLEST
    micro_batch_size = 1 if small else 8
    remax.rollout = rollout_by_halves if is_ppo else rollout
    meter = Meter()
    meter.start()
    if not CUDA:
        remax.on_device = counted_on_device(meter)

    @torch.no_grad()
    def score(responses):
        stopwatch.lap("rollout_seconds")
        if PPO.get(flags):  # both gradients are alive at once
            critic.backward(B // micro_batch_size, micro_batch_size, P, T)
        with remax.on_device(classifier, DEVICE):
            rewards = classifier(torch.full((len(responses), P + T), 5)).logits[:, -1].float()
        stopwatch.lap("score_seconds")
        return rewards

    with contextlib.ExitStack() as stack:
        for mode in modes(meter):
            stack.enter_context(mode)
        policy, optimizer = trained(AutoModelForCausalLM, config, small, meter)
        policy.register_forward_pre_hook(
            lambda net, _: meter.phase("update" if net.training else "rollout")
        )
        reference = frozen(AutoModelForCausalLM, config, "reference", meter)
        classifier = frozen(AutoModelForSequenceClassification, DistilBertConfig(), "score", meter)
        if small or flags == PARKED:
            park(reference, meter)
            park(classifier, meter)
        critic = Critic(config, small, meter) if is_ppo else None
        prompt, attention_mask = torch.full((B, P), 5), torch.ones(B, P, dtype=torch.long)
        attention_mask[::2, 0] = 0  # some padding, so that attention takes the path with a mask
        scaler = torch.amp.GradScaler(DEVICE.type, enabled=False)
        for tokens in (1, T):  # the first step creates the optimizer's state
            meter.start()
            settings = remax.StepSettings(
                eos_id=-1,
                pad_id=0,
                max_new_tokens=tokens,
                kl_coef=0.01,
                greedy_baseline=not is_ppo,
                micro_batch_size=micro_batch_size,
                max_grad_norm=1.0,
                dtype=DTYPE,
            )
            stopwatch = remax.Stopwatch()
            remax.remax_step(
                policy, reference, optimizer, scaler, score, prompt, attention_mask, settings
            )
            stopwatch.lap("update_seconds")
            if is_ppo:
                if not PPO[flags]:
                    critic.backward(B // micro_batch_size, micro_batch_size, P, T)
                critic.update()
            meter.phase("end")
    peaks_gb = {phase: round(peak / 1e9, 2) for phase, peak in meter.peaks.items()}
    seconds = stopwatch.seconds if CUDA else {}  # on fake tensors they would mean nothing
    return policy.num_parameters(), peaks_gb, seconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    if not CUDA:
        power = torch.pow
        torch.pow = lambda x, n: power(x.float() if torch.is_autocast_enabled("cpu") else x, n)
    name = "memory_gpu.jsonl" if CUDA else "memory.jsonl"
    path = Path(__file__).resolve().parent.parent / "results" / name
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", buffering=1) as file:
        for model, (_, B, P, T) in MODELS.items():
            peak_gb = {}
            for flags in [*PPO, DEFAULT, PARKED, SMALLEST]:
                parameters, phases, seconds = step_peaks(model, flags)
                gc.collect()
                peak_gb[flags] = max(phases.values())
                shares = (
                    {}
                    if flags in PPO
                    else {ppo: round(peak_gb[flags] / peak_gb[ppo], 3) for ppo in PPO}
                )
                row = dict(
                    model=model,
                    parameters=parameters,
                    flags=flags,
                    prompts=B,
                    prompt_tokens=P,
                    new_tokens=T,
                    peak_gb=peak_gb[flags],
                    phase=max(phases, key=phases.get),
                    phases_gb=phases,
                    share_of_ppo=shares,
                    **seconds,
                    kind="measured" if CUDA else "computed",
                    how=MEASURED if CUDA else COMPUTED,
                    torch=torch.__version__,
                    transformers=transformers.__version__,
                    device=torch.cuda.get_device_name() if CUDA else "none: fake tensors",
                    command="python data/experiments/memory.py",
                )
                file.write(json.dumps(row) + "\n")
                print(
                    f"{model:18} {flags:54} {row['peak_gb']:6.2f} GB in {row['phase']:9}",
                    *(f"{share:6.1%}" for share in shares.values()),
                    flush=True,
                )


if __name__ == "__main__":
    main()
