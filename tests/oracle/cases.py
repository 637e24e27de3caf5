"""Tiny pairs, recorded responses and layouts on which the command line is compared with brute force."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from megatron_taopd.testing.tiny_models import save_tiny_hf_model

STUDENT_VOCAB, TEACHER_VOCAB = 509, 523
# After the dash what is special about a pair; see make_pair and Layout.kinds.
FAMILIES = (
    *("qwen3", "qwen2", "llama", "qwen3_moe"),
    *("llama-threes", "qwen3-deep", "qwen3-counted", "qwen3_moe-uneven", "qwen3-from_moe"),
)
LAYERS = {"deep": (4, 4), "counted": (2, 6), "uneven": (3, 5)}
"""Of student and teacher: for virtual stages, for those with embedding and loss counted, for stages of unequal size."""


@dataclass(frozen=True)
class Layout:
    name: str
    world_size: int
    flags: tuple[str, ...]
    kinds: tuple[str, ...] = ("",)
    """Of the pairs that it is tried on."""

    def suits(self, family: str, *, training: bool) -> bool:
        """Experts are shared by models that have some, and trained with sequence parallelism only."""
        parts = family.split("-")
        kind = next((part for part in parts[1:] if part not in ("tied", "untied")), "")
        if kind not in self.kinds:
            return self.name == "TP1"
        if "moe" not in family:
            return "--expert-model-parallel-size" not in self.flags
        trains_experts = training and parts[0] == "qwen3_moe"
        return (
            not trains_experts
            or "--tensor-model-parallel-size" not in self.flags
            or "--sequence-parallel" in self.flags
        )


LAYOUTS = (
    Layout("TP1", 1, ()),
    Layout("TP2", 2, ("--tensor-model-parallel-size", "2")),
    Layout("PP2", 2, ("--pipeline-model-parallel-size", "2")),
    Layout("DP2", 2, ()),
    Layout("TP4", 4, ("--tensor-model-parallel-size", "4")),
    Layout(
        "TP2PP2SP",
        4,
        ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--sequence-parallel"),
    ),
    Layout("TP3", 3, ("--tensor-model-parallel-size", "3"), kinds=("threes",)),
    Layout("EP2", 2, ("--expert-model-parallel-size", "2"), kinds=("", "from_moe")),
    Layout(
        "TP2EP2SP",
        4,
        ("--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2", "--sequence-parallel"),
    ),
    Layout(
        "TP2EP2ETP1SP",
        4,
        (
            *("--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2", "--sequence-parallel"),
            *("--expert-tensor-parallel-size", "1"),
        ),
        kinds=("", "from_moe"),
    ),
    Layout("CP2", 2, ("--context-parallel-size", "2")),
    Layout(
        "CP2TP2SP",
        4,
        ("--context-parallel-size", "2", "--tensor-model-parallel-size", "2", "--sequence-parallel"),
    ),
    Layout(
        "PP2VPP2",
        2,
        ("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"),
        kinds=("deep",),
    ),
    Layout(
        "CP2PP2VPP2packed-account",  # the teacher's stages have 1+2 and 2+1 layers, the student's 0+1 and 1+0
        4,
        (
            *("--context-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
            *("--num-virtual-stages-per-pipeline-rank", "2", "--packed-sequences"),
            *("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"),
        ),
        kinds=("counted",),
    ),
    Layout("CP2EP2", 2, ("--context-parallel-size", "2", "--expert-model-parallel-size", "2")),
    Layout("packed", 1, ("--packed-sequences", "--max-packed-length=40")),
    Layout("CP2packed", 2, ("--context-parallel-size", "2", "--packed-sequences")),
    Layout(
        "PP2last1EP2",
        4,
        (
            *("--pipeline-model-parallel-size", "2", "--decoder-last-pipeline-num-layers", "1"),
            *("--expert-model-parallel-size", "2"),
        ),
        kinds=("uneven",),
    ),
    Layout(
        "PP2account",
        2,
        ("--pipeline-model-parallel-size", "2", "--account-for-embedding-in-pipeline-split"),
        kinds=("uneven",),
    ),
)


def make_pair(directory: Path, family: str, *, tied_student: bool = False, tied_teacher: bool = True) -> None:
    """A student and a teacher of other width, depth and vocabulary in ``directory``.

    Args:
        family: of both models, and after a dash what is special: heads in ``threes``, one of :data:`LAYERS`, or
            ``from_moe`` for a Qwen3 student of a teacher with experts.
    """
    family, _, kind = family.partition("-")
    kv_heads = 3 if kind == "threes" else 4
    student_layers, teacher_layers = LAYERS.get(kind, (2, 4))
    save_tiny_hf_model(
        directory / "student",
        family,
        vocab_size=STUDENT_VOCAB,
        hidden_size=8 * kv_heads,
        num_layers=student_layers,
        num_heads=kv_heads,
        num_kv_heads=kv_heads,
        ffn_size=16 * kv_heads,
        tied=tied_student,
        seed=1,
    )
    save_tiny_hf_model(
        directory / "teacher",
        "qwen3_moe" if kind == "from_moe" else family,
        vocab_size=TEACHER_VOCAB,
        hidden_size=48,
        num_layers=teacher_layers,
        num_heads=2 * kv_heads,
        num_kv_heads=kv_heads,
        ffn_size=24 * kv_heads,
        tied=tied_teacher,
        seed=2,
    )


def make_rollouts(path: Path, *, count: int = 8, seed: int = 0, with_logprobs: bool = False) -> list[dict]:
    """Recorded responses of unequal length with token ids alone."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        response = [rng.randrange(3, STUDENT_VOCAB) for _ in range(rng.randrange(2, 14))]
        row = {
            "id": f"r{index}",
            "prompt_tokens": [rng.randrange(3, STUDENT_VOCAB) for _ in range(rng.randrange(1, 9))],
            "response_tokens": response,
            "finish_reason": "length",
        }
        if with_logprobs:
            row["response_logprobs"] = [-rng.uniform(2.0, 7.0) for _ in response]
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows
