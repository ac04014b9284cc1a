# SPDX-License-Identifier: MIT
"""Peak memory of one whole remax.remax_step, reference and reward model included, beside PPO's with a critic.

    python data/memory.py            # writes data/results/memory.jsonl and prints it as a table; no download

With a GPU it measures: random weights of the real size, peak of the second step (the first creates the optimizer's
state). Without one it computes: the same remax_step on fake tensors (shapes without data), counting the bytes of all
live storages at every operator. That leaves out kernel workspaces, fragmentation and the CUDA context, about 0.5 GB.
PPO is remax_step without the greedy rollout plus a critic of the policy's size, trained by the same recipe; "one by
one" updates the critic after the policy's gradients are freed, "together" keeps both gradients until both step.
"""
import argparse
import contextlib
import gc
import json
import sys
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification,
                          DistilBertConfig, GPT2Config, LlamaConfig)

import remax

CUDA = torch.cuda.is_available()
DEVICE, DTYPE, GB = torch.device("cuda" if CUDA else "cpu"), torch.bfloat16, 1e9
ELSEWHERE = torch.device("cpu" if CUDA else "meta")  # where offloaded models wait; computing, only a name
MODELS = {  # config, prompts, prompt tokens, new tokens
    "gpt2-large": (GPT2Config(n_embd=1280, n_layer=36, n_head=20, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
                   32, 64, 48),
    "Llama-3.2-1B size": (LlamaConfig(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, head_dim=64,
                                      num_key_value_heads=8, intermediate_size=8192, vocab_size=128256,
                                      tie_word_embeddings=True), 16, 64, 128)}
DEFAULT, SMALLEST = "default", "--optimizer adafactor --offload --micro-batch-size 1"
PPO = {"PPO, default, one by one": False, "PPO, default, together": True}  # are both gradients alive at once?
HOW = ("torch.cuda.max_memory_allocated of the second step" if CUDA else
       "live storage bytes of the second step on fake CPU tensors: autocast('cpu') in place of 'cuda' with its pow in "
       "float32, the CPU's attention kernel, full-length micro-batches, bytes of offloaded models taken off the count")


class Meter(TorchDispatchMode):
    """Peak bytes of every phase: the allocator's on a GPU; else counted from what the operators return."""
    def __init__(self):
        super().__init__()
        self.now, self.name, self.peaks, self.seen = 0, "load", {}, set()

    def phase(self, name):
        peak = torch.cuda.max_memory_allocated() if CUDA else self.peak
        self.peaks[self.name] = max(self.peaks.get(self.name, 0), peak)
        self.name, self.peak = name, self.now
        if CUDA:
            torch.cuda.reset_peak_memory_stats()

    peak = 0

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)

    def free(self, key, size):
        self.seen.remove(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "item"):  # reads data: there is none
            answer = getattr(args[0], "answer", 1)
            return bool(answer) if args[0].dtype == torch.bool else answer
        out = func(*args, **kwargs or {})
        if func.overloadpacket.__name__ == "all":  # not all responses are done, not all of the mask is 1
            out.answer = 0
        for storage in [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]:
            key, size = storage._cdata, -(-storage.nbytes() // 512) * 512  # CUDA's allocator rounds to 512
            if key not in self.seen:
                self.seen.add(key)
                weakref.finalize(storage, self.free, key, size)
                self.add(size)
        return out


def peaks(model, flags):
    """(parameters, peak GB of every phase of the second step)"""
    config, B, P, T = MODELS[model]
    config.num_labels = 1  # the critic's
    small, joint, meter = flags == SMALLEST, PPO.get(flags), Meter()
    home, size = ELSEWHERE if small else DEVICE, 1 if small else 8
    with contextlib.ExitStack() as stack:
        for mode in [torch.device(DEVICE)] if CUDA else [FakeTensorMode(allow_non_fake_inputs=True), meter]:
            stack.enter_context(mode)

        def trained(auto):
            net = auto.from_config(config, dtype=torch.float32)
            net.gradient_checkpointing_enable({"use_reentrant": False})
            params = list(net.parameters())
            opt = torch.optim.Adafactor(params, 1e-5) if small else torch.optim.AdamW(
                params, 1e-6, weight_decay=0.0, fused=True)
            opt.register_step_pre_hook(lambda *_: meter.phase("optimizer"))
            return net, opt

        def frozen(auto, config, phase):
            net = auto.from_config(config, dtype=DTYPE).eval().requires_grad_(False)
            net.register_forward_pre_hook(lambda *_: meter.phase(phase))
            if not CUDA:  # a fake parameter cannot change its device: its bytes come off the count instead
                net.at, size = DEVICE, sum(t.untyped_storage().nbytes() for t in net.parameters())

                def to(device):
                    meter.add(size * ((device == DEVICE) - (net.at == DEVICE)))
                    net.at = device
                    return net
                net.to = to
            net.to(home)
            return net

        policy, optimizer = trained(AutoModelForCausalLM)
        policy.register_forward_pre_hook(lambda net, _: meter.phase("update" if net.training else "rollout"))
        reference = frozen(AutoModelForCausalLM, config, "reference")
        classifier = frozen(AutoModelForSequenceClassification, DistilBertConfig(), "score")
        if joint is not None:
            critic, critic_optimizer = trained(AutoModelForTokenClassification)
        prompt, attention = (torch.full((B, n), 5) for n in (P, P))
        attention = attention.clamp(max=1)
        attention[::2, 0] = 0  # left padding: the attention mask cannot be optimised away

        def critic_backward():
            meter.phase("critic")
            for _ in range(B // size):
                with torch.autocast(DEVICE.type, DTYPE, cache_enabled=False):
                    values = critic.train()(torch.full((size, P + T), 5), use_cache=False).logits[:, P - 1:-1, 0]
                (values.float() ** 2).sum(1).mean().backward()

        @torch.no_grad()
        def score(responses):
            if joint:
                with torch.enable_grad():
                    critic_backward()
            logits = classifier.to(DEVICE)(torch.full((len(responses), P + T), 5)).logits
            classifier.to(home)
            return logits[:, -1].float()

        for _ in range(2):
            meter.peaks, meter.name = {}, "rollout"
            meter.phase("rollout")
            remax.remax_step(policy, reference, optimizer, torch.amp.GradScaler(DEVICE.type, enabled=False), score,
                             prompt, attention, eos_id=-1, pad_id=0, max_new_tokens=T, greedy=joint is None,
                             kl_coef=0.01, micro_batch_size=size, max_grad_norm=1.0, dtype=DTYPE, home=home)
            if joint is not None:
                if not joint:
                    critic_backward()
                torch.nn.utils.clip_grad_norm_(critic.parameters(), 1.0)
                critic_optimizer.step()
                critic_optimizer.zero_grad()
            meter.phase("done")
        return policy.num_parameters(), {key: round(peak / GB, 2) for key, peak in meter.peaks.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/memory.jsonl")
    args = parser.parse_args()
    if not CUDA:  # what needs data, and what autocast('cuda') does but autocast('cpu') does not
        power = torch.pow
        torch.pow = lambda x, n: power(x.float() if torch.is_autocast_enabled("cpu") else x, n)
        remax.micro_batches = lambda *batch, size=None: (
            (rows, tuple(t[rows] for t in batch[:4])) for rows in torch.arange(len(batch[0])).split(batch[4]))
    args.output.parent.mkdir(exist_ok=True)
    with open(args.output, "w") as file:
        for model, (_, B, P, T) in MODELS.items():
            rows = {}
            for flags in [*PPO, DEFAULT, SMALLEST]:
                parameters, phases = peaks(model, flags)
                gc.collect()
                phase = max(phases, key=phases.get)
                rows[flags] = row = dict(model=model, parameters=parameters, flags=flags, prompts=B, prompt_tokens=P,
                                         new_tokens=T, peak_gb=phases[phase], phase=phase, phases_gb=phases)
                if flags not in PPO:
                    row["share_of_ppo"] = {key: round(row["peak_gb"] / rows[key]["peak_gb"], 3) for key in PPO}
                row |= dict(kind="measured" if CUDA else "computed", how=HOW, torch=torch.__version__,
                            transformers=transformers.__version__, command="python data/memory.py",
                            device=torch.cuda.get_device_name() if CUDA else "none: fake tensors")
                file.write(json.dumps(row) + "\n")
                file.flush()
                shares = " ".join(f"{share:6.1%}" for share in row.get("share_of_ppo", {}).values())
                print(f"{model:18} {flags:54} {row['peak_gb']:6.2f} GB in {phase:10} {shares}", flush=True)


if __name__ == "__main__":
    main()
