"""Lower bounds of a step's time (seconds), at the full rates of the data sheet."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_taopd.models.hf_config import HFModelConfig
from megatron_taopd.models.parameter_count import count_parameters
from megatron_taopd.plan.config import PlanConfig
from megatron_taopd.plan.memory import padded_vocab
from megatron_taopd.plan.parameters import rank_parameters, stage_layers
from megatron_taopd.plan.traffic import Traffic


@dataclass(frozen=True, kw_only=True)
class PhaseTime:
    """Bounds of a phase (seconds)."""

    compute: float
    memory: float
    """Reading weights and keys from the GPU's memory; of decoding alone."""
    traffic: float
    bubble: float
    """Idle time of a pipeline."""

    @property
    def bound(self) -> float:
        """No phase is quicker: work and messages may overlap, a bubble adds to both."""
        return max(self.compute, self.memory, self.traffic) + self.bubble


def forward_flops(hf: HFModelConfig, length: int) -> float:
    """Of one sequence through the layers, without embedding and LM head."""
    count = count_parameters(hf)
    active = count.active - count.embedding - count.head
    return 2.0 * active * length + attention_flops(hf, length)


def attention_flops(hf: HFModelConfig, length: int) -> float:
    """Of the two products of queries, keys and values in the forward of one sequence."""
    return 2.0 * length**2 * hf.all_heads_size * hf.num_layers  # causal: half of 4 L^2


def phase_times(
    config: PlanConfig, student: HFModelConfig, teacher: HFModelConfig, traffic: list[Traffic]
) -> dict[str, PhaseTime]:
    """Bounds of rollout, score and train."""
    gpu, parallel = config.hardware, config.parallel
    own = config.teacher_parallel.resolve(parallel) or parallel
    rate = gpu.bf16_tflops * 1e12 * config.num_gpus
    teacher_rate = rate
    if config.teacher_dtype == "fp8":
        assert gpu.fp8_tflops is not None, "the configuration refuses FP8 on other GPUs"
        teacher_rate = gpu.fp8_tflops * 1e12 * config.num_gpus
    batch, rows = config.global_batch_size, config.global_batch_size * config.max_response_length
    one_student, one_teacher = (
        batch * forward_flops(student, config.length),
        batch * forward_flops(teacher, config.length),
    )
    heads = [2.0 * hf.hidden_size * hf.vocab_size for hf in (student, teacher)]
    head_rate = rate
    if config.score_head_precision == "fp8":
        assert gpu.fp8_tflops is not None, "the configuration refuses FP8 on other GPUs"
        head_rate = gpu.fp8_tflops * 1e12 * config.num_gpus
    again = {None: 0.0, "full": one_student, "selective": batch * attention_flops(student, config.length)}
    # The loss forms both logits of the kept rows again, and the student's take a backward.
    loss = config.keep_ratio * rows * (3 * heads[0] + heads[1])
    compute = {
        "rollout": (one_student + rows * heads[0]) / rate,
        "score": one_teacher / teacher_rate + one_student / rate + rows * sum(heads) / head_rate,
        "train": (3 * one_student + again[config.recompute.recompute_granularity] + loss) / rate,
    }
    links = {"nvlink": gpu.nvlink_gbps * 1e9, "network": gpu.network_gbps * 1e9}
    replicas = config.num_gpus // parallel.model_parallel_size
    micro_batches = batch // (replicas * config.micro_batch_size)
    teacher_micro_batches = max(1, batch * own.model_parallel_size // (config.num_gpus * config.micro_batch_size))
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank or 1
    bubble = (stages - 1) / (micro_batches * virtual)
    of_teacher = (own.pipeline_model_parallel_size - 1) / teacher_micro_batches
    bubbles = {
        "rollout": 0.0,
        "score": (one_student / rate) * bubble + (one_teacher / teacher_rate) * of_teacher,
        "train": compute["train"] * bubble,
    }
    decode = _decode_seconds(config, student, teacher)
    return {
        phase: PhaseTime(
            compute=compute[phase],
            memory=decode if phase == "rollout" else 0.0,
            traffic=max(
                sum(t.num_bytes for t in traffic if t.phase == phase and t.link == link) / speed
                for link, speed in links.items()
            ),
            bubble=bubbles[phase],
        )
        for phase in compute
    }


def _decode_seconds(config: PlanConfig, student: HFModelConfig, teacher: HFModelConfig) -> float:
    """Every token of a batch of responses reads the weights of all stages once, and the keys so far."""
    parallel, size = config.parallel, 2 if config.bf16 else 4
    padded = padded_vocab(student, teacher, tensor=parallel.tensor_model_parallel_size)
    replicas = config.num_gpus // parallel.model_parallel_size
    mine = -(-(config.global_batch_size // replicas) // parallel.context_parallel_size)
    batches = -(-mine // config.rollout_batch_size)
    kv_heads = student.num_kv_heads / parallel.tensor_model_parallel_size
    total = 0.0
    for stage in range(parallel.pipeline_model_parallel_size):
        rank = rank_parameters(student, parallel, stage=stage, padded_vocab_size=padded)
        # Of the embedding only the rows of the tokens are read; of a mixture at least one expert's set of a token.
        experts = 0.0
        if student.experts is not None:
            experts = rank.experts * student.experts.experts_per_token / student.experts.num_experts
        weights = (rank.layers + experts + rank.head) * size
        layers = len(stage_layers(student, parallel, stage))
        mean_length = config.prompt_length + config.max_response_length / 2
        keys = 2 * kv_heads * student.head_dim * layers * mean_length * size
        total += batches * weights + mine * keys
    return config.max_response_length * total / (config.hardware.memory_gbps * 1e9)
