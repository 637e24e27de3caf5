"""Parameters of one rank: what tensor, pipeline and expert parallelism leave of a model."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_taopd.models.hf_config import HFModelConfig
from megatron_taopd.models.parameter_count import LayerParameters, count_parameters
from megatron_taopd.platform.layout import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class RankParameters:
    """Numbers of parameters of a rank of one pipeline stage."""

    layers: int
    """Of the layers without experts, and the final norm."""
    experts: int
    """Of experts; they are reduced over ranks of their own."""
    vocabulary: int
    """Of embedding and LM head, both with padded rows."""
    head: int
    """The LM head's share of ``vocabulary``."""

    @property
    def dense(self) -> int:
        """All but experts."""
        return self.layers + self.vocabulary

    @property
    def total(self) -> int:
        """All."""
        return self.dense + self.experts


def stage_layers(hf: HFModelConfig, parallel: ParallelConfig, stage: int) -> list[int]:
    """Numbers of the layers of a stage, of a layout that ``check_layout`` accepts."""
    rounds = parallel.num_virtual_stages_per_pipeline_rank or 1
    pieces = [share // rounds for share in _shares_of_stages(hf, parallel)]
    embedding = int(parallel.account_for_embedding_in_pipeline_split)
    layers: list[int] = []
    for number in range(rounds):
        start = number * sum(pieces) + sum(pieces[:stage]) - embedding
        layers += range(max(start, 0), min(start + pieces[stage], hf.num_layers))
    return layers


def _shares_of_stages(hf: HFModelConfig, parallel: ParallelConfig) -> list[int]:
    """Layers of each stage; embedding and loss count as layers where they are accounted as some."""
    stages = parallel.pipeline_model_parallel_size
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    fixed = [layers for layers in (first, last) if layers is not None]
    if fixed:
        rest = (hf.num_layers - sum(fixed)) // max(1, stages - len(fixed))
        counts = [rest] * stages
        counts[0] = rest if first is None else first
        counts[-1] = rest if last is None else last
        return counts
    embedding, loss = parallel.account_for_embedding_in_pipeline_split, parallel.account_for_loss_in_pipeline_split
    return [(hf.num_layers + embedding + loss) // stages] * stages


def rank_parameters(
    hf: HFModelConfig, parallel: ParallelConfig, *, stage: int, padded_vocab_size: int
) -> RankParameters:
    """Parameters of each rank of a stage.

    Args:
        padded_vocab_size: rows of embedding and head over all tensor-parallel ranks.
    """
    tensor, last = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size - 1
    count = count_parameters(hf)
    layers = [count.layers[layer] for layer in stage_layers(hf, parallel, stage)]
    shard = padded_vocab_size // tensor * hf.hidden_size
    # A tied embedding is on both ends of a pipeline.
    vocabulary = shard * ((stage == 0) + (stage == last) - (hf.tied and last == 0))
    expert_ranks = parallel.expert_model_parallel_size * (parallel.expert_tensor_parallel_size or tensor)
    return RankParameters(
        layers=sum(_dense_of_rank(hf, layer, tensor) for layer in layers) + (count.final_norm if stage == last else 0),
        experts=sum(layer.experts for layer in layers) // expert_ranks,
        vocabulary=vocabulary,
        head=shard if stage == last else 0,
    )


def _dense_of_rank(hf: HFModelConfig, layer: LayerParameters, tensor: int) -> int:
    replicated = 2 * hf.head_dim if hf.qk_norm else 0
    attention = (layer.attention - replicated) // tensor + replicated
    # Every tensor-parallel rank has the whole router.
    return attention + layer.norms + (layer.ffn if layer.experts else layer.ffn // tensor)
