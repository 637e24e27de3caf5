"""What the CPU adaptor answers, to Megatron and to everyone else, and how process groups start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from megatron_taopd import platform
from megatron_taopd.errors import ConfigError
from megatron_taopd.platform import cpu_adaptor, distributed
from megatron_taopd.platform.layout import ParallelConfig

pytestmark = pytest.mark.skipif(platform.has_cuda(), reason="the adaptor is for machines without CUDA")


def test_cuda_devices_mean_the_cpu():
    for device in ("cuda", "cuda:1", torch.device("cuda"), 0, torch.cuda.current_device()):
        assert torch.zeros(2, device=device).device.type == "cpu"
        assert torch.empty_like(torch.ones(1), device=device, pin_memory=True).device.type == "cpu"
    assert torch.ones(2).cuda().device.type == "cpu"
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"
    assert torch.zeros(1, device="meta").device.type == "meta"


def test_device_contexts_still_work():
    with torch.device("meta"):
        assert torch.zeros(2).is_meta and torch.nn.Linear(2, 2).weight.is_meta
    assert not torch.zeros(2).is_meta


def test_only_megatron_hears_cuda_type_names():
    tensor = torch.zeros(1, dtype=torch.bfloat16)
    assert tensor.type() == "torch.BFloat16Tensor"
    assert tensor.type(torch.float32).dtype == torch.float32
    asked = eval("lambda tensor: tensor.type()", {"__name__": "megatron.core.optimizer.optimizer"})
    assert asked(tensor) == "torch.cuda.BFloat16Tensor"


def test_streams_and_events():
    with torch.cuda.stream(torch.cuda.Stream()):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        sum(range(10_000))
        end.record()
    torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    torch.cuda.synchronize()
    assert 0 < start.elapsed_time(end) < 1000


def test_installing_twice_changes_nothing():
    before = torch.zeros, torch.Tensor.type
    cpu_adaptor.install()
    platform.enable()
    assert (torch.zeros, torch.Tensor.type) == before


def _random_numbers(seed: int) -> dict[str, list[float]]:
    distributed.initialize(ParallelConfig(tensor_model_parallel_size=2), seed=seed)
    model_parallel_cuda_manual_seed(seed)
    tracker = get_cuda_rng_tracker()
    before = torch.rand(1).item()
    with tracker.fork():
        forked = torch.rand(3).tolist()
    with tracker.fork():
        forked_again = torch.rand(3).tolist()
    outside = [before, torch.rand(1).item()]
    model_parallel_cuda_manual_seed(seed)
    return {"forked": forked, "again": forked_again, "outside": outside, "plain": torch.rand(2).tolist()}


def test_random_state_tracker(pool):
    ranks = pool(4).run(_random_numbers, 77)
    for result in ranks:
        assert result["outside"] == result["plain"], "forking must not move the default generator"
        assert result["forked"] != result["again"], "the forked generator moves on"
    # Ranks 0 and 1 share weights, 0 and 2 are replicas.
    assert ranks[0]["outside"] == ranks[1]["outside"]
    assert ranks[0]["forked"] != ranks[1]["forked"]
    assert ranks[0]["forked"] == ranks[2]["forked"]


def _layouts() -> list[tuple[int, ...]]:
    found = []
    for tensor, pipeline in ((1, 1), (2, 1), (1, 2), (2, 2)):
        config = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
        distributed.initialize(config, seed=1)
        found.append(
            (
                distributed.tensor_parallel_rank(),
                distributed.pipeline_parallel_rank(),
                distributed.data_parallel_rank(),
                distributed.data_parallel_size(),
                distributed.last_stage_rank(),
                int(distributed.is_last_stage()),
            )
        )
    with pytest.raises(ConfigError, match="4 ranks cannot hold whole models of --tensor-model-parallel-size 3"):
        distributed.initialize(ParallelConfig(tensor_model_parallel_size=3), seed=1)
    return found


def test_layouts_one_after_the_other(pool):
    ranks = pool(4).run(_layouts)
    assert ranks[3] == [(0, 0, 3, 4, 3, 1), (1, 0, 1, 2, 3, 1), (0, 1, 1, 2, 3, 1), (1, 1, 0, 1, 3, 1)]
    assert ranks[0] == [(0, 0, 0, 4, 0, 1), (0, 0, 0, 2, 0, 1), (0, 0, 0, 2, 2, 0), (0, 0, 0, 1, 2, 0)]


ALONE = """
import sys
import megatron_taopd.config, megatron_taopd.platform.layout
assert "megatron" not in sys.modules, "options and help must not wait for Megatron"
import megatron.core
from megatron_taopd.platform import distributed
from megatron_taopd.platform.layout import ParallelConfig
distributed.initialize(ParallelConfig(), seed=1)
assert (distributed.world_size(), distributed.data_parallel_size()) == (1, 1)
import torch
assert torch.zeros(1, device="cuda").device.type == "cpu"
distributed.shutdown()
"""


def test_one_process_without_torchrun_and_megatron_imported_first():
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    subprocess.run([sys.executable, "-c", ALONE], check=True, env=environment)
    assert not parallel_state.model_parallel_is_initialized(), "nothing of it happened in this process"
