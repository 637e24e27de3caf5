"""The fall-back's decisions by hand, and which flags are refused."""

from __future__ import annotations

import pytest

from megatron_taopd.errors import ConfigError
from megatron_taopd.monitor_config import MonitorConfig
from megatron_taopd.teachability import SelectionConfig
from megatron_taopd.teachability.phases import Fallback, PhaseConfig


def states(shares: list[tuple[float, float]], **flags) -> list[bool]:
    fallback = Fallback.from_config(PhaseConfig(fallback_selector="full", **flags))
    active = []
    for top5, low_c in shares:
        before = fallback.active
        changed = fallback.see(top5_share=top5, low_c_share=low_c)
        assert changed == (fallback.active != before)
        active.append(fallback.active)
    return active


def test_acts_while_a_share_is_reached() -> None:
    shares = [(0.9, 0.1), (0.95, 0.1), (0.96, 0.6), (0.2, 0.5), (0.2, 0.49), (0.949, 0.0)]
    assert states(shares) == [False, True, True, True, False, False]
    assert states(shares, fallback_threshold=0.96, fallback_low_c_share=1.0) == [
        False,
        False,
        True,
        False,
        False,
        False,
    ]


def test_patience_wants_steps_in_a_row() -> None:
    high, low = (0.99, 0.0), (0.1, 0.0)
    sequence = [high, low, high, high, low, high, low, low, high]
    assert states(sequence, fallback_patience=2) == [False, False, False, True, True, True, True, False, False]


def test_goes_on_from_its_state() -> None:
    config = PhaseConfig(fallback_selector="full", fallback_patience=3)
    whole, first = Fallback.from_config(config), Fallback.from_config(config)
    shares = [0.99, 0.99, 0.99, 0.1, 0.1, 0.99, 0.1, 0.1, 0.1]
    wanted = [whole.see(top5_share=s, low_c_share=0.0) for s in shares]
    got = [first.see(top5_share=s, low_c_share=0.0) for s in shares[:4]]
    second = Fallback.from_config(config)
    second.restore(first.state())
    got += [second.see(top5_share=s, low_c_share=0.0) for s in shares[4:]]
    assert got == wanted == [False, False, True, False, False, False, False, False, True]


def test_reasons_show_the_values() -> None:
    fallback = Fallback.from_config(PhaseConfig(fallback_selector="full"))
    assert fallback.reasons(top5_share=0.9, low_c_share=0.4) == []
    first, second = fallback.reasons(top5_share=0.973, low_c_share=0.75)
    assert "97.30%" in first and "--fallback-threshold 0.95" in first
    assert "75.00%" in second and "--fallback-low-c-share 0.5" in second


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PhaseConfig(full_selector_warmup_iters=-1), "--full-selector-warmup-iters -1 .*negative"),
        (lambda: PhaseConfig(fallback_threshold=0.9), "--fallback-threshold 0.9 has no effect without --fallback-sel"),
        (lambda: PhaseConfig(fallback_low_c_share=0.9), "--fallback-low-c-share 0.9 has no effect"),
        (lambda: PhaseConfig(fallback_patience=2), "--fallback-patience 2 has no effect"),
        (lambda: PhaseConfig(fallback_selector="ful"), "unknown selector 'ful'; did you mean 'full'"),
        (lambda: PhaseConfig(fallback_selector="full", fallback_threshold=95), "95 must be in .0, 1."),
        (
            lambda: PhaseConfig(fallback_selector="full", fallback_patience=0),
            "--fallback-patience 0 must be at least 1",
        ),
        (
            lambda: PhaseConfig(full_selector_warmup_iters=5).check_against(FULL),
            "iters 5 has no effect with --selector",
        ),
        (lambda: PhaseConfig(fallback_selector="tip").check_against(FULL), "--fallback-selector tip has no effect"),
        (lambda: PhaseConfig(fallback_selector="tip").check_against(TIP), "tip is --selector itself"),
        (lambda: MonitorConfig(monitor_interval=-1), "--monitor-interval -1"),
        (lambda: MonitorConfig(monitor_interval=0, monitor_selectors=["tip"]), "tip has no effect"),
        (lambda: MonitorConfig(monitor_selectors=["full"]), "nothing to compare"),
        (lambda: MonitorConfig(monitor_selectors=["tipp"]), "did you mean 'tip'"),
        (lambda: MonitorConfig(monitor_interval=5).check_against(FULL, log_dir="x"), "interval 5 has no effect"),
        (lambda: MonitorConfig(dump_kept_responses=5), "--dump-kept-responses 5 has no effect"),
        (lambda: MonitorConfig(dump_kept_interval=0), "--dump-kept-interval 0 must be at least 1"),
        (lambda: MonitorConfig(dump_kept_interval=5).check_against(TIP, log_dir=None), "without --log-dir"),
    ],
)
def test_refused(make, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


FULL, TIP = SelectionConfig(selector="full"), SelectionConfig(selector="tip")


def test_another_selector_has_the_same_budget_and_drops_flags_without_effect() -> None:
    asked = SelectionConfig(
        selector="teachability",
        keep_ratio=0.3,
        compatibility_scale="raw",
        min_keep_per_sample=2,
        selection_scope="carried",
        carried_decay=0.5,
        carried_agreement_interval=3,
    )
    entropy, random, full = (asked.with_selector(name) for name in ("entropy", "random", "full"))
    assert (entropy.resolved_keep_ratio, entropy.resolved_min_keep, entropy.carried_decay) == (0.3, 2, 0.5)
    assert entropy.compatibility_scale is None and random.carried_decay is None
    assert (random.keep_ratio, full.resolved_keep_ratio, full.selection_scope) == (0.3, 1.0, "carried")
    assert asked.with_selector("incompatible").compatibility_scale == "raw"
