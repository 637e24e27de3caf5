"""Vocab-parallel and data-parallel tensor operations. They know torch and a process group, nothing else."""

from megatron_taopd.ops.head import DEFAULT_LOGITS_CHUNK_BYTES, HeadShard
from megatron_taopd.ops.order import distributed_quantiles, first_n
from megatron_taopd.ops.rows import gather_rows
from megatron_taopd.ops.vocab import entropy, gather_ids, log_probs, log_sum_exp, top_k

__all__ = [
    "DEFAULT_LOGITS_CHUNK_BYTES",
    "HeadShard",
    "distributed_quantiles",
    "entropy",
    "first_n",
    "gather_ids",
    "gather_rows",
    "log_probs",
    "log_sum_exp",
    "top_k",
]
