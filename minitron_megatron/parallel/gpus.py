"""The known GPUs: their memory and peak throughput."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """A kind of GPU.

    Attributes:
        memory_gib: what a process can allocate, in GiB.
        tflops: peak of dense bf16 matrix products, in TFLOP/s.
        device_name: as CUDA reports it. PCIe and NVL variants have other names and other peaks.
    """

    memory_gib: float
    tflops: float
    device_name: str


# Memory: "total capacity" as PyTorch reports it, a little below the data sheet's. Peaks: NVIDIA's data sheets, without
# sparsity.
GPUS = {
    "h100": GPU(79.1, 989.4, "NVIDIA H100 80GB HBM3"),  # H100 Tensor Core GPU data sheet: SXM, 80 GB
    "h200": GPU(139.8, 989.4, "NVIDIA H200"),  # H200 Tensor Core GPU data sheet: SXM, 141 GB
    "a100-80gb": GPU(79.2, 312.0, "NVIDIA A100-SXM4-80GB"),  # A100 80GB data sheet: SXM
    "a100-40gb": GPU(39.4, 312.0, "NVIDIA A100-SXM4-40GB"),  # A100 Tensor Core GPU data sheet: SXM, 40 GB
}


def peak_tflops(device_name: str) -> float | None:
    """Returns the peak of a GPU by CUDA's name for it, in dense bf16 TFLOP/s; None if it is unknown."""
    return next((gpu.tflops for gpu in GPUS.values() if gpu.device_name == device_name), None)
