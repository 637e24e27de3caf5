"""GPUs: memory as the driver reports it, rates from the makers' data sheets (dense, without sparsity)."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU and its links."""

    memory_gib: float
    """Memory that the driver reports (GiB); the gigabytes of a name are neither these nor 1e9 bytes."""
    bf16_tflops: float
    """Dense bf16 matrix products (TFLOP/s)."""
    fp8_tflops: float | None
    """The same in FP8; None: the GPU has no such units."""
    memory_gbps: float
    """Memory bandwidth (GB/s)."""
    nvlink_gbps: float
    """To other GPUs of the node, one direction (GB/s)."""
    network_gbps: float
    """To other nodes, a GPU's share, one direction (GB/s); a 400 Gbit/s adapter a GPU has 50."""


GPUS: dict[str, Gpu] = {
    "a100-40gb": Gpu(
        memory_gib=40, bf16_tflops=312, fp8_tflops=None, memory_gbps=1555, nvlink_gbps=300, network_gbps=25
    ),
    "a100-80gb": Gpu(
        memory_gib=80, bf16_tflops=312, fp8_tflops=None, memory_gbps=2039, nvlink_gbps=300, network_gbps=25
    ),
    "h100-80gb": Gpu(
        memory_gib=79.6, bf16_tflops=989, fp8_tflops=1979, memory_gbps=3350, nvlink_gbps=450, network_gbps=50
    ),
    "h200-141gb": Gpu(
        memory_gib=140.4, bf16_tflops=989, fp8_tflops=1979, memory_gbps=4800, nvlink_gbps=450, network_gbps=50
    ),
    "b200-180gb": Gpu(
        memory_gib=178.3, bf16_tflops=2250, fp8_tflops=4500, memory_gbps=8000, nvlink_gbps=900, network_gbps=50
    ),
}
