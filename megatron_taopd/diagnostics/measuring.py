"""``taopd diagnose gain``: a checkpoint reads the positions of a bank again; how far did the gap close?"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_taopd.diagnostics.bank import Bank, ModelRecord, open_bank
from megatron_taopd.diagnostics.config import GainConfig
from megatron_taopd.diagnostics.fingerprints import model_fingerprint, tokenizer_fingerprint
from megatron_taopd.diagnostics.gain import Gain, write_gain
from megatron_taopd.diagnostics.reading import Columns, divergence_reader, read_contexts
from megatron_taopd.errors import ConfigError, DataError
from megatron_taopd.models import load_hf_config
from megatron_taopd.platform import device
from megatron_taopd.run_config import ModelPairConfig, PrecisionConfig
from megatron_taopd.training.pair import load_pair

logger = logging.getLogger(__name__)

_PLACES = ("sample_index", "prompt_index", "id", "position", "token_id")

# Mean difference (nats) of the teacher's log-probabilities and entropies that rounding explains: another layout or
# batch changes fp32 by some 1e-6, bf16 by some 1e-2.
_ROUNDING, _ROUNDING_LOW_PRECISION = 1e-3, 5e-2


def measure_gain(config: GainConfig, progress: Callable[[int, int], None] | None = None) -> Gain | None:
    """Score a bank with a checkpoint and write the gain file; all ranks call it, process groups exist.

    Returns:
        The gain on the rank that wrote it, None on the others.

    Raises:
        DataError: the bank was changed, or was made with another tokenizer, vocabulary or teacher.
    """
    bank = open_bank(config.bank)
    record = bank.record
    models = ModelPairConfig(
        student=config.checkpoint,
        teacher=_teachers(config, bank),
        teacher_dtype=record.teacher_dtype,
        allow_stop_token_mismatch=record.allow_stop_token_mismatch,
    )
    _check_vocabulary(bank, models)
    precision = PrecisionConfig(**record.precision)
    pair = load_pair(models, config.parallel, precision, train_student=False, teacher_parallel=config.teacher_parallel)
    tolerance = _tolerance(precision, record.teacher_dtype)
    columns = read_contexts(
        divergence_reader(
            pair,
            temperature=record.temperature,
            logits_chunk_bytes=config.logits_chunk_bytes or record.logits_chunk_bytes,
        ),
        bank.contexts(),
        config.parallel,
        config.packing,
        micro_batch_size=config.micro_batch_size or record.micro_batch_size,
        check=lambda rows: _check_teacher(bank, rows, tolerance),
        progress=progress,
    )
    if columns is None:
        return None
    before = {name: bank.positions[name] for name in ("kl_forward", "kl_reverse")}
    gain = Gain(
        file=config.output,
        name=Path(config.output).stem,
        bank_id=record.id,
        checkpoint=ModelRecord(path=config.checkpoint, fingerprint=model_fingerprint(config.checkpoint)),
        columns={
            **{name: bank.positions[name] for name in _PLACES},
            **{f"{name}_before": values for name, values in before.items()},
            **{f"{name}_after": columns[name] for name in before},
            "gain": before["kl_forward"] - columns["kl_forward"],
        },
    )
    write_gain(gain)
    return gain


def _teachers(config: GainConfig, bank: Bank) -> list[str]:
    """The bank's teachers, where they are now."""
    recorded = bank.record.teachers
    names = [teacher.name for teacher in recorded]
    asked = dict(ModelPairConfig(student="", teacher=config.teacher).named_teachers()) if config.teacher else {}
    for name in asked:
        if name not in names:
            known = ", ".join("no name (one teacher)" if n is None else n for n in names)
            raise ConfigError(f"--teacher {name or asked[name]}: the bank's teachers are called {known}; use these")
    words = []
    for teacher in recorded:
        path = asked.get(teacher.name, teacher.path)
        if not Path(path).is_dir():
            raise ConfigError(f"the bank's teacher {path} is not a directory here; say with --teacher where it is now")
        if model_fingerprint(path) != teacher.fingerprint:
            logger.info("teacher %s: not the files of the bank; its probabilities are compared with the bank's", path)
        words.append(path if teacher.name is None else f"{teacher.name}={path}")
    return words


def _check_vocabulary(bank: Bank, models: ModelPairConfig) -> None:
    record = bank.record
    found = tokenizer_fingerprint(models.student)
    if None not in (found, record.tokenizer) and found != record.tokenizer:
        raise DataError(
            f"bank {bank.directory} holds token ids of tokenizer {record.tokenizer} and {models.student} has tokenizer "
            f"{found}: it would read other text; use a checkpoint of the bank's student"
        )
    sizes = [load_hf_config(path).vocab_size for path in (models.student, *(p for _, p in models.named_teachers()))]
    if min(sizes) != record.vocab_size:
        raise DataError(
            f"bank {bank.directory} was taken over {record.vocab_size} common token ids, {models.student} and its "
            f"teacher have {min(sizes)}: the divergences could not be compared; use a checkpoint of the bank's student"
        )


def _tolerance(precision: PrecisionConfig, teacher_dtype: str | None) -> float:
    low = teacher_dtype == "bf16" or (teacher_dtype is None and precision.bf16) or precision.fp8_format is not None
    return _ROUNDING_LOW_PRECISION if low else _ROUNDING


def _check_teacher(bank: Bank, rows: Columns, tolerance: float) -> None:
    """Refuse a teacher that does not say what the bank's said; all ranks call it and raise together.

    Args:
        rows: this rank's; nothing off the last stage.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    if rows:
        index = bank.first_row()[rows["sample_index"].cpu().numpy()] + rows["position"].cpu().numpy()
        for place, name in enumerate(("teacher_logprob", "teacher_entropy")):
            known = bank.positions[name][index].astype(np.float64)
            sums[place] = float(np.abs(rows[name].cpu().numpy() - known).sum())
        sums[2] = len(index)
    sums = sums.to(device())
    torch.distributed.all_reduce(sums)
    logprob, entropy = (sums[:2] / sums[2]).tolist()
    if not max(logprob, entropy) <= tolerance:
        raise DataError(
            f"the teacher is not that of bank {bank.directory}: on the same positions its log-probabilities differ by "
            f"{logprob:.3g} nats and its entropies by {entropy:.3g} on average, rounding explains {tolerance:g}; give "
            f"the bank's teacher ({', '.join(teacher.path for teacher in bank.record.teachers)}) with --teacher"
        )
