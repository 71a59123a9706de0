"""Runs an exported 2:4 model with sparse matrix products: python examples/run_2of4.py FOLDER "a prompt".

Serving engines have dropped their kernels for 2:4 (see docs/sparsity.md), and torch has one: weights with at most two
of every four are packed by `to_sparse_semi_structured`, and `torch.nn.functional.linear` takes cuSPARSELt's product.
Needs a GPU from Ampere on, a torch with cuSPARSELt, and matrices whose sizes are multiples of 16.
"""

import argparse

import torch
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured
from transformers import AutoModelForCausalLM, AutoTokenizer

_MULTIPLE = 16
_GROUP, _KEPT = 4, 2


def make_sparse(model: torch.nn.Module) -> int:
    """Packs every linear layer's weight that is 2:4, in place.

    Returns:
        the number of packed weights.
    """
    SparseSemiStructuredTensor._FORCE_CUTLASS = False  # CUTLASS's kernels in torch are of Ampere
    count = 0
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        weight = module.weight.detach()
        if any(size % _MULTIPLE for size in weight.shape):
            continue
        if ((weight != 0).unflatten(1, (-1, _GROUP)).sum(2) > _KEPT).any():
            continue
        module.weight = torch.nn.Parameter(to_sparse_semi_structured(weight), requires_grad=False)
        count += 1
    return count


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument(
        "folder", help="Hugging Face folder of a 2:4 model, exported with packed=false or not quantised"
    )
    options.add_argument("prompt")
    options.add_argument("--tokens", type=int, default=64, help="to generate")
    args = options.parse_args()
    if not torch.cuda.is_available() or not torch.backends.cusparselt.is_available():
        raise SystemExit("this needs an NVIDIA GPU and a torch with cuSPARSELt")
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.bfloat16).cuda().eval()
    print(f"{make_sparse(model)} matrices are 2:4")
    inputs = tokenizer(args.prompt, return_tensors="pt").to("cuda")
    with torch.no_grad():
        print(tokenizer.decode(model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False)[0]))


if __name__ == "__main__":
    main()
