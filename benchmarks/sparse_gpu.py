"""A product with a 2:4 matrix on an NVIDIA GPU: torch's cuSPARSELt beside the dense product, at Llama-3.1-8B's shapes.

Needs a GPU from Ampere on and a torch with cuSPARSELt.
"""

import statistics

from common import console, describe, machine, markdown_table, parser, print_table, write_docs, write_results

NAME = "sparse_products"
SHAPES = {"qkv": (6144, 4096), "proj": (4096, 4096), "fc1": (28672, 4096), "fc2": (4096, 14336)}
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
CALLS, WARMUP = 50, 10
COLUMNS = ["matrix", "tokens", "dense, us", "2:4, us", "speed", "largest difference"]


def main() -> None:
    args = parser(__doc__, repeats=5).parse_args()
    if args.docs:
        write_docs(NAME, in_markdown)
        return
    import torch

    if not torch.cuda.is_available() or not torch.backends.cusparselt.is_available():
        console.print("not measured: this needs an NVIDIA GPU and a torch with cuSPARSELt")
        return
    facts = machine()
    cases = [one for name, shape in SHAPES.items() for one in measure(name, shape, args.repeats)]
    results = {"machine": facts, "cusparselt": torch.backends.cusparselt.version(), "cases": cases}
    write_results(NAME, results)
    print_table("a product with one matrix", COLUMNS, rows(results))
    console.print(describe(facts))


def measure(name: str, shape: tuple[int, int], repeats: int) -> list[dict]:
    """Times both products for every number of tokens, in turn."""
    import torch
    from torch.nn.functional import linear
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

    SparseSemiStructuredTensor._FORCE_CUTLASS = False  # CUTLASS's kernels in torch are of Ampere
    dense = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    kept = dense.abs().unflatten(1, (-1, 4)).argsort(-1).argsort(-1) >= 2
    dense = dense * kept.flatten(1)
    sparse = to_sparse_semi_structured(dense)

    def microseconds(weight) -> float:
        for _ in range(WARMUP):
            linear(x, weight)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(CALLS):
            linear(x, weight)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / CALLS * 1e3

    found = []
    for tokens in TOKENS:
        x = torch.randn(tokens, shape[1], device="cuda", dtype=torch.bfloat16)
        times = [(microseconds(dense), microseconds(sparse)) for _ in range(repeats)]
        difference = float((linear(x, sparse) - linear(x, dense)).float().abs().max())
        of_dense, of_sparse = zip(*times, strict=True)
        own = {"dense_us": of_dense, "sparse_us": of_sparse, "error": difference}
        found.append({"matrix": name, "tokens": tokens, **own})
    return found


def rows(results: dict) -> list[list[str]]:
    table = []
    for case in results["cases"]:
        dense, sparse = statistics.median(case["dense_us"]), statistics.median(case["sparse_us"])
        numbers = [f"{dense:.1f}", f"{sparse:.1f}", f"{dense / sparse:.2f}", f"{case['error']:.3f}"]
        table.append([case["matrix"], str(case["tokens"]), *numbers])
    return table


def in_markdown(results: dict) -> str:
    return f"{markdown_table(COLUMNS, rows(results))}\n\n{describe(results['machine'])}"


if __name__ == "__main__":
    main()
