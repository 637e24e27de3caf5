"""``taopd diagnose bank``: choose contexts, let both models read them, write the bank. Process groups exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from megatron_taopd.data.records import read_rollouts
from megatron_taopd.diagnostics.bank import (
    BankRecord,
    ModelRecord,
    choose_contexts,
    refuse_existing,
    write_bank,
)
from megatron_taopd.diagnostics.config import BankConfig
from megatron_taopd.diagnostics.fingerprints import model_fingerprint, tokenizer_fingerprint
from megatron_taopd.diagnostics.reading import bank_reader, read_contexts
from megatron_taopd.errors import DataError
from megatron_taopd.files import sha256_of_file
from megatron_taopd.models import load_hf_config
from megatron_taopd.training.pair import load_pair


def make_bank(config: BankConfig, progress: Callable[[int, int], None] | None = None) -> BankRecord | None:
    """Make a bank; all ranks call it.

    Returns:
        The record on the rank that wrote it, None on the others.

    Raises:
        ConfigError: the directory exists, or a K is larger than the vocabulary.
        DataError: a rollout is malformed, or there are fewer prompts than asked for.
    """
    refuse_existing(config.output)
    models, teachers = config.models, config.models.named_teachers()
    paths = [models.student, *(path for _, path in teachers)]
    vocab_size = min(load_hf_config(path).vocab_size for path in paths)
    rollouts = read_rollouts(
        config.rollout_data, vocab_size=vocab_size, teachers=[name for name, _ in teachers if name is not None]
    )
    contexts, prompt_of_context = choose_contexts(
        rollouts,
        num_prompts=config.resolved_num_prompts,
        responses_per_prompt=config.responses_per_prompt,
        positions_per_response=config.positions_per_response,
    )
    num_prompts = len(set(prompt_of_context))
    if config.num_prompts is not None and num_prompts < config.num_prompts:
        raise DataError(
            f"{config.rollout_data} answers {num_prompts} prompts, fewer than --num-prompts {config.num_prompts}; "
            "lower that or roll out more prompts"
        )
    pair = load_pair(
        models,
        config.parallel,
        config.precision,
        train_student=False,
        teacher_parallel=config.teacher_parallel,
    )
    support_k = config.resolved_support_k
    columns = read_contexts(
        bank_reader(pair, support_k, temperature=config.temperature, logits_chunk_bytes=config.logits_chunk_bytes),
        contexts,
        config.parallel,
        config.packing,
        micro_batch_size=config.micro_batch_size,
        progress=progress,
    )
    if columns is None:
        return None
    sample_index = columns.pop("sample_index")
    places = {
        "sample_index": sample_index,
        "prompt_index": np.array(prompt_of_context, dtype=np.int32)[sample_index],
        "id": np.array([context.id for context in contexts])[sample_index],
    }
    return write_bank(
        config.output,
        contexts,
        places | columns,
        student=ModelRecord(path=models.student, fingerprint=model_fingerprint(models.student)),
        teachers=[ModelRecord(path=path, fingerprint=model_fingerprint(path), name=name) for name, path in teachers],
        tokenizer=next(filter(None, map(tokenizer_fingerprint, paths)), None),
        vocab_size=vocab_size,
        temperature=config.temperature,
        support_k=support_k,
        precision=asdict(config.precision),
        teacher_dtype=models.teacher_dtype,
        allow_stop_token_mismatch=models.allow_stop_token_mismatch,
        micro_batch_size=config.micro_batch_size,
        logits_chunk_bytes=config.logits_chunk_bytes,
        rollout_data=config.rollout_data,
        rollout_sha256=sha256_of_file(config.rollout_data),
        num_prompts=num_prompts,
        positions_per_response=config.positions_per_response,
    )
