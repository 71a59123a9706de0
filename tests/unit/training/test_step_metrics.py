from types import SimpleNamespace

import pytest
import torch

from minitron_megatron.config.parallel import ParallelConfig
from minitron_megatron.training.step_metrics import throughput_values


@pytest.mark.parametrize(
    "name, expected",
    [
        ("NVIDIA H100 80GB HBM3", 100 * 2 / 989.4),
        ("NVIDIA A100-SXM4-80GB", 100 * 2 / 312),
        # The peaks of these are not those of the SXM parts.
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
    ],
)
def test_utilisation_is_of_the_part_whose_peak_is_known(name, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    ctx = SimpleNamespace(layout=ParallelConfig(tensor=2), device=torch.device("cuda"))
    found = throughput_values(1e3, 4e12, ctx)
    assert found["throughput/tflops_per_rank"] == pytest.approx(2)
    assert found.get("throughput/mfu_pct") == (expected and pytest.approx(expected))
