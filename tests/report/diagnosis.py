"""A diagnostic's report.json, which its own analysis makes of an invented bank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_taopd.diagnostics.analysis import analyse
from megatron_taopd.diagnostics.bank import SHARED_COLUMNS, SUPPORT_COLUMNS, Bank, BankRecord, ModelRecord
from megatron_taopd.diagnostics.config import ReportConfig
from megatron_taopd.diagnostics.gain import Gain
from megatron_taopd.diagnostics.report import defined

PROMPTS, POSITIONS = 12, 30
EVIL = "<script>alert(1)</script>"


def bank_of(directory: Path) -> Bank:
    rng = np.random.default_rng(5)
    n = PROMPTS * POSITIONS
    columns: dict[str, np.ndarray] = {name: rng.gamma(1.0, 0.5, n) for name in SHARED_COLUMNS}
    for k in (8, 16):
        columns |= {f"{name}_k{k}": rng.uniform(0, 1, n) for name in SUPPORT_COLUMNS}
        columns[f"D_upstream_k{k}"] = columns[f"D_k{k}"] * 1.1
        columns[f"C_topk_k{k}"] = columns[f"C_k{k}"] * 0.9
        columns[f"rank_in_student_k{k}"] = columns[f"rank_in_teacher_k{k}"] = rng.integers(0, k, n)
        columns[f"teacher_top1_in_student_k{k}"] = rng.uniform(0, 1, n) < 0.9
    prompt = np.repeat(np.arange(PROMPTS), POSITIONS)
    columns |= {"prompt_index": prompt, "sample_index": prompt, "position": np.tile(np.arange(POSITIONS), PROMPTS)}
    record = BankRecord(
        student=ModelRecord(path="models/student", fingerprint="a"),
        teachers=[ModelRecord(path="models/teacher", fingerprint="b")],
        tokenizer=None,
        vocab_size=100,
        temperature=1.0,
        support_k=[8, 16],
        precision={},
        teacher_dtype=None,
        allow_stop_token_mismatch=False,
        micro_batch_size=1,
        logits_chunk_bytes=2**16,
        rollout_data="r.jsonl",
        rollout_sha256="",
        num_prompts=PROMPTS,
        num_responses=PROMPTS,
        num_positions=n,
        positions_per_response=POSITIONS,
        files={},
    )
    return Bank(directory=directory, record=record, positions=columns)


def gain_of(bank: Bank, name: str, strength: float) -> Gain:
    """G that learnable disagreement explains in part."""
    before = bank.positions["kl_forward"]
    noise = np.random.default_rng(7).normal(0, 0.02, before.size)
    gain = strength * bank.positions["D_k16"] * bank.positions["C_k16"] + noise
    columns = {"kl_forward_before": before, "kl_forward_after": before - gain, "gain": gain}
    columns |= {"kl_reverse_before": before, "kl_reverse_after": before}
    checkpoint = ModelRecord(path="models/a", fingerprint="c")
    return Gain(file=f"{name}.parquet", name=name, bank_id=bank.record.id, checkpoint=checkpoint, columns=columns)


def make_report(directory: Path) -> dict[str, Any]:
    """Of a bank that would be in ``directory``, and of two gains."""
    bank = bank_of(directory)
    gains = [gain_of(bank, EVIL, 0.3), gain_of(bank, "weak", 0.1)]
    selectors = ["teachability", "entropy", "random"]
    config = ReportConfig(bank="bank", output="out", bootstrap_draws=50, selector=selectors)
    return json.loads(json.dumps(defined(analyse(bank, gains, config)), allow_nan=False))
