"""Tools for tests, shipped for users too: run a function on several gloo ranks, and tiny random models."""

from megatron_taopd.testing.pool import WorkerError, WorkerPool, run_distributed

__all__ = ["WorkerError", "WorkerPool", "run_distributed"]
