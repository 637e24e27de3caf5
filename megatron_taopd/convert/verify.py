"""Does a converted model compute what its original computes in transformers?

T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_taopd.checkpoint.layout import HF_FILES, find_iteration, is_megatron_checkpoint
from megatron_taopd.convert.compare import check_original, compare_arguments, compare_settings, compare_tensors
from megatron_taopd.convert.to_hf import open_stored_model
from megatron_taopd.errors import ModelError
from megatron_taopd.models.build import LoadedModel, load_model
from megatron_taopd.models.hf_config import HFModelConfig, load_hf_config
from megatron_taopd.platform import device
from megatron_taopd.platform.layout import ParallelConfig

logger = logging.getLogger(__name__)

_TEXTS = (
    "The history of the lighthouse begins long before the invention of electricity, when keepers climbed the stairs",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "Solve for x: 3x + 7 = 25. Subtract 7 from both sides to get 3x = 18, so x = 6. Check: 3 * 6 + 7 = 25.",
    "Übrigens: 東京は日本の首都です。Москва – столица России. ¿Dónde está la biblioteca? 🚲",
)
_NUM_SHOWN = 8
_KL_ROWS = 32  # in double precision at a time


@dataclass
class Verdict:
    """What the comparison found."""

    tolerance: float
    dtype: torch.dtype
    num_prompts: int = 0
    num_positions: int = 0
    max_difference: float = 0.0
    sum_difference: float = 0.0
    """Over positions, of the mean over the vocabulary."""
    num_top1_agree: int = 0
    sum_kl: float = 0.0
    """Nats, transformers against ours."""
    num_tensors: int | None = None
    """Compared; None if they were not."""
    settings: list[str] = field(default_factory=list)
    own_config: bool = True
    """False: the model keeps no config.json and was read with the original's."""
    tensors: list[str] = field(default_factory=list)
    """Those that differ."""
    allow_tensor_differences: bool = False

    @property
    def logits_agree(self) -> bool:
        """No logit differs by more than the tolerance."""
        return self.max_difference <= self.tolerance  # False for NaN

    @property
    def passed(self) -> bool:
        """Logits, settings and tensors agree, the last after rounding to the stored type.

        No prompt reads every row of an embedding or visits every expert, so that logits alone do not tell.
        """
        return self.logits_agree and not self.settings and self._tensors_agree

    @property
    def _tensors_agree(self) -> bool:
        return not self.tensors or self.allow_tensor_differences

    def report(self) -> str:
        """Several lines for people."""
        positions = max(self.num_positions, 1)
        lines = [
            f"> logits against transformers: {self.num_prompts} prompts, {self.num_positions} positions, {self._kind}",
            f">   max difference .... {self.max_difference:.3g} (tolerance {self.tolerance:g})",
            f">   mean difference ... {self.sum_difference / positions:.3g}",
            f">   top-1 agreement ... {self.num_top1_agree / positions:.2%}",
            f">   mean KL ........... {self.sum_kl / positions:.3g} nats",
            "> settings: " + ("the same" if not self.settings else f"{len(self.settings)} differ") + self._whose_config,
            *(f">   {line}" for line in self.settings),
        ]
        if self.num_tensors is None:
            lines.append("> tensors: not compared (--no-tensors)")
        elif not self.tensors:
            lines.append(f"> tensors: all {self.num_tensors} equal")
        else:
            allowed = ", which --allow-tensor-differences allows" if self.allow_tensor_differences else ""
            lines.append(f"> tensors: {len(self.tensors)} of {self.num_tensors} differ{allowed}")
            lines += [f">   {line}" for line in self.tensors[:_NUM_SHOWN]]
            if len(self.tensors) > _NUM_SHOWN:
                lines.append(f">   and {len(self.tensors) - _NUM_SHOWN} more")
        lines.append("> PASSED" if self.passed else f"> FAILED: {self._reason()}")
        return "\n".join(lines)

    @property
    def _whose_config(self) -> str:
        return "" if self.own_config else f" (the checkpoint has no {HF_FILES}/config.json: the original's was taken)"

    @property
    def _kind(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def _reason(self) -> str:
        reasons = []
        if not self.logits_agree:
            reasons.append(f"logits differ by up to {self.max_difference:.3g}, more than {self.tolerance:g}")
        if self.settings:
            reasons.append("settings differ, see above")
        if self.tensors and self.logits_agree and not self.allow_tensor_differences:
            count = f"{len(self.tensors)} of {self.num_tensors} tensors"
            reasons.append(
                f"{count} are not the original's, though these prompts do not show it (a model trained from it passes "
                "with --allow-tensor-differences)"
            )
        if self.tensors and not (self.logits_agree and self.allow_tensor_differences):
            reasons.append(f"look at {self.tensors[0]}")
        elif not self.settings and self.num_tensors is not None:
            reasons.append(
                f"settings and tensors are the same, so the two models compute differently, or {self._kind} is too "
                "coarse for this --tolerance"
            )
        return "; ".join(reasons)


def verify_model(
    original: str | Path,
    model: str | Path,
    *,
    prompts: str | None = None,
    max_tokens: int = 256,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 1e-3,
    tensors: bool = True,
    allow_tensor_differences: bool = False,
) -> Verdict:
    """Compare ``model``, run by this package, with ``original``, run by transformers. In a process group of one.

    Args:
        original: HF directory.
        model: Megatron checkpoint or HF directory. A checkpoint without a config.json is read with the original's.
        prompts: JSONL file; default: built-in texts, if there is a tokenizer, and ids from all over the vocabulary.
        max_tokens: longer prompts are cut.
        tolerance: largest difference of a logit that passes.
        tensors: compare the values of every tensor as well.
        allow_tensor_differences: tensors that differ do not fail the verdict.

    Raises:
        ModelError, CheckpointError: a model cannot be read, or tensors are missing, superfluous or misshapen.
    """
    if is_megatron_checkpoint(original):
        raise ModelError(f"{original} is a Megatron checkpoint; the original must be a Hugging Face directory")
    hf = load_hf_config(original)
    num_tensors = check_original(hf)
    verdict = Verdict(tolerance=tolerance, dtype=dtype, allow_tensor_differences=allow_tensor_differences)
    verdict.own_config = _keeps_config(model)
    own = load_hf_config(model) if verdict.own_config else hf
    verdict.settings = compare_settings(hf, own)
    if is_megatron_checkpoint(model):
        verdict.settings += compare_arguments(hf, open_stored_model(model, hf.path))
    if tensors:
        verdict.num_tensors = num_tensors
        verdict.tensors = [str(difference) for difference in compare_tensors(hf, model)]
    token_lists = _tokens(hf, prompts, max_tokens)
    reference = _transformers_model(hf, dtype)
    loaded = load_model(model, ParallelConfig(), hf=own, params_dtype=dtype, trainable=False)
    for tokens in token_lists:
        _compare_logits(verdict, reference, loaded, torch.tensor([tokens], device=device()))
    return verdict


def _keeps_config(model: str | Path) -> bool:
    """Of Megatron checkpoints only those that were written here have the configuration inside."""
    if not is_megatron_checkpoint(model):
        return True
    return (find_iteration(model)[0] / HF_FILES / "config.json").is_file()


def _transformers_model(hf: HFModelConfig, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    logger.info("loading %s with transformers", hf.path)
    model = AutoModelForCausalLM.from_pretrained(
        str(hf.path), dtype=dtype, local_files_only=True, trust_remote_code=False
    )
    return model.eval().to(device())


def _tokens(hf: HFModelConfig, prompts: str | None, max_tokens: int) -> list[list[int]]:
    from megatron_taopd.data.config import DataConfig
    from megatron_taopd.data.prompts import read_prompts
    from megatron_taopd.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(hf.path)
    length = min(max_tokens, hf.max_position_embeddings)
    if prompts is not None:
        config = DataConfig(prompt_data=prompts, max_prompt_length=2**31)
        return [prompt.tokens[:length] for prompt in read_prompts(config, tokenizer)]
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(hf.vocab_size, (length,), generator=generator).tolist()]
    if tokenizer is not None:
        found += [tokenizer(text)["input_ids"][:length] for text in _TEXTS]
    return found


@torch.no_grad()
def _compare_logits(verdict: Verdict, reference: Any, loaded: LoadedModel, tokens_1T: torch.Tensor) -> None:
    theirs_TV = reference(tokens_1T).logits[0].float()
    positions = torch.arange(tokens_1T.shape[1], device=tokens_1T.device).expand_as(tokens_1T)
    hidden_T1H = loaded.module(tokens_1T, positions, None)
    ours_TV = (hidden_T1H[:, 0] @ loaded.module.head_weight().T)[:, : theirs_TV.shape[1]].float()
    difference_TV = (ours_TV - theirs_TV).abs()
    largest = difference_TV.max().item()
    # max() would pass over a NaN that does not come first.
    verdict.max_difference = largest if largest != largest else max(verdict.max_difference, largest)
    verdict.sum_difference += difference_TV.mean(dim=1).sum().item()
    verdict.num_top1_agree += int((ours_TV.argmax(dim=1) == theirs_TV.argmax(dim=1)).sum())
    for theirs, ours in zip(theirs_TV.split(_KL_ROWS), ours_TV.split(_KL_ROWS), strict=True):
        log_p, log_q = theirs.double().log_softmax(dim=1), ours.double().log_softmax(dim=1)
        verdict.sum_kl += (log_p.exp() * (log_p - log_q)).sum().item()
    verdict.num_prompts += 1
    verdict.num_positions += tokens_1T.shape[1]
