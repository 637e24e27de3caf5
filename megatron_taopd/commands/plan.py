"""``taopd plan``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_taopd.cli import parse
from megatron_taopd.errors import ConfigError


def plan(words: Sequence[str]) -> int:
    """Print the plan; status 1 where nothing fits."""
    from megatron_taopd.plan.config import PlanConfig

    config = parse(PlanConfig, words, name="plan")
    if config.json is not None and not Path(config.json).parent.is_dir():
        raise ConfigError(f"--json {config.json}: there is no directory {Path(config.json).parent}; make it")
    from megatron_taopd.models import load_hf_config
    from megatron_taopd.plan.planning import make_plan, propose
    from megatron_taopd.plan.table import plan_text, proposals_text

    student, teacher = load_hf_config(config.student), load_hf_config(config.teacher)
    if config.propose:
        plans = propose(config, student, teacher)
        print(proposals_text(plans))
    else:
        plans = [make_plan(config, student, teacher)]
        print(plan_text(plans[0]))
    if config.json is not None:
        text = json.dumps([made.as_dict() for made in plans], indent=1)
        Path(config.json).write_text(text + "\n", encoding="utf-8")
    return 0 if any(made.fits for made in plans) else 1
