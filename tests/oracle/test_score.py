"""``taopd score`` against brute force on transformers models in float64, at every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_taopd import cli
from tests.oracle import reference
from tests.oracle.cases import FAMILIES, LAYOUTS, STUDENT_VOCAB, Layout, make_pair, make_rollouts

COLUMNS = (
    "D C C_topk H H_topk kl_forward kl_reverse student_logprob teacher_logprob teacher_entropy overlap student_mass "
    "teacher_mass"
).split()
TEMPERATURE = 0.9
KEEP_RATIO = 0.2


def modes(family: str) -> tuple[str, ...]:
    """Support modes differ in what is made of the logits, so that two families show both."""
    return ("exact", "upstream") if family in ("qwen3", "qwen3_moe") else ("exact",)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs")
    for family in FAMILIES:
        (root / family).mkdir()
        make_pair(root / family, family, tied_student=family == "llama", tied_teacher=family != "qwen2")
    # Seven of them, so that replicas have unequal shares.
    make_rollouts(root / "rollouts.jsonl", count=7)
    return root


@pytest.fixture(scope="module")
def expected(pairs: Path) -> dict[str, list[dict]]:
    rollouts = reference.read_jsonl(pairs / "rollouts.jsonl")
    tables = {}
    for family in FAMILIES:
        student = reference.load_float64(pairs / family / "student")
        teacher = reference.load_float64(pairs / family / "teacher")
        for mode in modes(family):
            tables[f"{family}-{mode}"] = reference.statistics_table(
                student,
                teacher,
                rollouts,
                vocab_size=STUDENT_VOCAB,
                temperature=TEMPERATURE,
                support_mode=mode,
            )
    return tables


def score_all(root: Path, layout: Layout, micro_batch_size: int) -> None:
    """Runs in every rank: all families that suit and their support modes."""
    for family in FAMILIES:
        for mode in modes(family) if layout.suits(family, training=False) else ():
            cli.run(
                [
                    "score",
                    f"--student={root / family / 'student'}",
                    f"--teacher={root / family / 'teacher'}",
                    f"--rollout-data={root / 'rollouts.jsonl'}",
                    f"--output={root / f'{layout.name}-{micro_batch_size}-{family}-{mode}.parquet'}",
                    f"--micro-batch-size={micro_batch_size}",
                    f"--temperature={TEMPERATURE}",
                    f"--keep-ratio={KEEP_RATIO}",
                    f"--support-mode={mode}",
                    "--logits-chunk-bytes=65536",
                    *layout.flags,
                ]
            )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_score_equals_brute_force(pool, pairs: Path, expected: dict[str, list[dict]], layout: Layout) -> None:
    micro_batch_size = {"DP2": 3, "TP4": 3, "EP2": 3, "packed": 1}.get(layout.name, 2)
    pool(layout.world_size).run(score_all, pairs, layout, micro_batch_size)
    for case, rows in expected.items():
        if not layout.suits(case.rpartition("-")[0], training=False):
            continue
        table = pq.read_table(pairs / f"{layout.name}-{micro_batch_size}-{case}.parquet").to_pydict()
        assert table["id"] == [f"r{row['sample']}" for row in rows]
        assert table["position"] == [row["position"] for row in rows]
        assert table["token_id"] == [row["token_id"] for row in rows]
        for column in COLUMNS:
            wanted = np.array([row[column] for row in rows])
            np.testing.assert_allclose(
                np.array(table[column]),
                wanted,
                rtol=1e-3,
                atol=1e-6,
                err_msg=f"{case} {layout.name} {column}",
            )
        if case.endswith("exact"):
            assert table["keep"] == reference.teachability_keep(rows, KEEP_RATIO), f"{case} {layout.name}"
        else:
            if not (pairs / f"TP1-2-{case}.parquet").exists():
                pool(1).run(score_all, pairs, LAYOUTS[0], 2)
            first = pq.read_table(pairs / f"TP1-2-{case}.parquet").to_pydict()
            assert table["keep"] == first["keep"]
