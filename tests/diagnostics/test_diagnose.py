"""``taopd diagnose`` from rollouts to report, on tiny random models, against brute force on transformers models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_taopd import cli
from megatron_taopd.diagnostics.bank import open_bank
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.oracle import reference
from tests.oracle.cases import STUDENT_VOCAB, make_pair, make_rollouts
from tests.test_refusals import refused, save_tokenizer

KS = (4, 16)
TEMPERATURE = 0.9
LONGEST = 9
WORDS = ["alpha", "beta", "gamma"]
TP2PP2 = ("--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair, a student that was trained a bit, another teacher, recorded responses."""
    root = tmp_path_factory.mktemp("diagnose")
    make_pair(root, "qwen3", tied_student=True)
    shutil.copytree(root / "student", root / "trained")
    generator = torch.Generator().manual_seed(7)
    weights = load_file(root / "student" / "model.safetensors")
    moved = {name: w + 0.03 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    save_file(moved, root / "trained" / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(root / "teacher", root / "teacher2")
    weights = load_file(root / "teacher" / "model.safetensors")
    weights["lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"][5] += 1.0
    save_file(weights, root / "teacher2" / "model.safetensors", metadata={"format": "pt"})
    for model in ("student", "trained", "teacher", "teacher2"):
        save_tokenizer(root / model, WORDS)
    rows = make_rollouts(root / "rollouts.jsonl", count=9)
    rows[3]["prompt_tokens"] = rows[1]["prompt_tokens"]  # the same prompt again
    (root / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def bank_words(root: Path, output: str, *extra: str) -> list[str]:
    words = ["diagnose", "bank", f"--student={root / 'student'}", f"--rollout-data={root / 'rollouts.jsonl'}"]
    if not any(word.startswith("--teacher=") for word in extra):
        words.append(f"--teacher={root / 'teacher'}")
    words += [f"--output={root / output}", f"--temperature={TEMPERATURE}", *(f"--support-k={k}" for k in KS)]
    return [*words, f"--positions-per-response={LONGEST}", *extra]


def gain_words(root: Path, bank: str, checkpoint: str, output: str, *extra: str) -> list[str]:
    words = ["diagnose", "gain", f"--bank={root / bank}", f"--checkpoint={root / checkpoint}"]
    return [*words, f"--output={root / output}.parquet", *extra]


def on_one_rank(root: Path) -> None:
    cli.run(bank_words(root, "bank", "--micro-batch-size=3"))
    cli.run(bank_words(root, "other_bank", "--num-prompts=5", "--responses-per-prompt=2"))
    cli.run(gain_words(root, "bank", "student", "same"))
    cli.run(gain_words(root, "bank", "trained", "trained"))
    cli.run(gain_words(root, "other_bank", "trained", "elsewhere"))
    from megatron_taopd.convert.to_megatron import convert_to_megatron

    convert_to_megatron(root / "trained", root / "megatron")


def on_four_ranks(root: Path) -> None:
    cli.run(bank_words(root, "bank4", *TP2PP2, "--sequence-parallel", "--packed-sequences"))
    cli.run(gain_words(root, "bank", "megatron", "megatron4", TP2PP2[0]))  # two replicas


@pytest.fixture(scope="module")
def made(pool, root: Path) -> Path:
    """Bank and gains on one rank."""
    pool(1).run(on_one_rank, root)
    return root


@pytest.fixture(scope="module")
def report(made: Path) -> dict:
    cli.run(
        [
            *("diagnose", "report", f"--bank={made / 'bank'}", f"--output={made / 'report'}"),
            *(f"--gain={made / 'trained.parquet'}", f"--gain=θ0={made / 'same.parquet'}"),
            *("--support-k=4", "--keep-ratio=0.2", "--keep-ratio=0.05", "--bootstrap-draws=200"),
        ]
    )
    return json.loads((made / "report" / "report.json").read_text())


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, list[dict]]:
    """Rows of the first response to each prompt, cut, by brute force; keys such as '4-exact', and 'trained'."""
    rollouts = [r for i, r in enumerate(reference.read_jsonl(root / "rollouts.jsonl")) if i != 3]
    for rollout in rollouts:
        rollout["response_tokens"] = rollout["response_tokens"][:LONGEST]
    models = {name: reference.load_float64(root / name) for name in ("student", "trained", "teacher")}

    def table(student: str, k: int, mode: str) -> list[dict]:
        return reference.statistics_table(
            models[student],
            models["teacher"],
            rollouts,
            vocab_size=STUDENT_VOCAB,
            k=k,
            temperature=TEMPERATURE,
            support_mode=mode,
        )

    tables = {f"{k}-{mode}": table("student", k, mode) for k in KS for mode in ("exact", "upstream")}
    return tables | {"trained": table("trained", 4, "exact")}


def column(rows: list[dict], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows])


def test_bank_is_brute_force_for_every_k_and_mode(made: Path, expected: dict[str, list[dict]]) -> None:
    bank = open_bank(made / "bank")
    first = expected["4-exact"]
    assert bank.positions["sample_index"].tolist() == [row["sample"] for row in first]
    assert bank.positions["position"].tolist() == [row["position"] for row in first]
    assert bank.positions["token_id"].tolist() == [row["token_id"] for row in first]
    assert bank.positions["position"].max() == LONGEST - 1
    assert bank.record.num_prompts == bank.record.num_responses == 8 and bank.record.support_k == list(KS)
    for k in KS:
        for mode in ("exact", "upstream"):
            rows = expected[f"{k}-{mode}"]
            statistics = bank.statistics(k, mode)
            for name in ("D", "C", "C_topk", "H", "H_topk", "kl_forward", "kl_reverse", "overlap", "teacher_mass"):
                found = getattr(statistics, name).numpy()
                np.testing.assert_allclose(
                    found, column(rows, name), rtol=1e-3, atol=1e-6, err_msg=f"{k} {mode} {name}"
                )
    contexts = bank.contexts()
    assert [len(c.response_tokens) for c in contexts] == [sum(r["sample"] == i for r in first) for i in range(8)]


def test_responses_to_one_prompt_are_resampled_together(made: Path) -> None:
    bank = open_bank(made / "other_bank")
    assert [context.id for context in bank.contexts()] == ["r0", "r1", "r2", "r3", "r4", "r5"]
    prompt_of = dict(zip(bank.positions["id"].tolist(), bank.positions["prompt_index"].tolist(), strict=True))
    assert prompt_of == {"r0": 0, "r1": 1, "r2": 2, "r3": 1, "r4": 3, "r5": 4}
    assert bank.record.num_prompts == 5 and bank.record.id != open_bank(made / "bank").record.id


def test_gain_is_brute_force_and_that_of_theta0_is_0(made: Path, expected: dict[str, list[dict]]) -> None:
    wanted = column(expected["4-exact"], "kl_forward") - column(expected["trained"], "kl_forward")
    table = pq.read_table(made / "trained.parquet")
    np.testing.assert_allclose(np.array(table["gain"]), wanted, rtol=1e-3, atol=2e-5)
    assert (wanted > 0).any() and (wanted < 0).any()
    after = column(expected["trained"], "kl_reverse")
    np.testing.assert_allclose(np.array(table["kl_reverse_after"]), after, rtol=1e-3, atol=1e-5)
    assert set(np.array(pq.read_table(made / "same.parquet")["gain"]).tolist()) == {0.0}


def test_another_layout_gives_the_same_bank_and_gain(pool, made: Path) -> None:
    pool(4).run(on_four_ranks, made)
    one, four = open_bank(made / "bank"), open_bank(made / "bank4")
    assert one.record.files["contexts.jsonl"] == four.record.files["contexts.jsonl"]
    assert one.positions.keys() == four.positions.keys()
    for name, values in one.positions.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(four.positions[name], values, rtol=1e-4, atol=1e-5, err_msg=name)
        else:
            assert four.positions[name].tolist() == values.tolist(), name
    hf, megatron = (pq.read_table(made / f"{name}.parquet") for name in ("trained", "megatron4"))
    np.testing.assert_allclose(np.array(megatron["gain"]), np.array(hf["gain"]), rtol=1e-4, atol=2e-5)


def test_report_is_what_brute_force_selects(report: dict, expected: dict[str, list[dict]], made: Path) -> None:
    gain = column(expected["4-exact"], "kl_forward") - column(expected["trained"], "kl_forward")
    trained, same = report["checkpoints"]
    assert (trained["name"], same["name"]) == ("trained", "θ0")
    assert trained["gain"]["mean"] == pytest.approx(gain.mean(), abs=1e-5)
    low, high = trained["gain"]["interval"]
    assert low < gain.mean() < high
    budgets = {
        (b["selector"], b["support_k"], b["support_mode"], b["compatibility_scale"], b["keep_ratio"]): b
        for b in trained["budgets"]
    }
    assert len(budgets) == len(trained["budgets"])
    before = column(expected["4-exact"], "kl_forward")
    for k in KS:
        for ratio in (0.05, 0.2):
            keep = np.array(reference.teachability_keep(expected[f"{k}-exact"], ratio, min_keep=0))
            found = budgets["teachability", k, "exact", "quantile", ratio]
            assert found["kept"] == keep.sum() == np.ceil(ratio * len(gain))
            assert found["mean"] == pytest.approx(gain[keep].mean(), abs=1e-5)
            assert found["gap_closed"] == pytest.approx(gain[keep].sum() / before[keep].sum(), abs=1e-4)
            assert found["gain_share"] == pytest.approx(gain[keep].sum() / gain.sum(), rel=1e-2)
    prefix = np.lexsort((column(expected["4-exact"], "sample"), column(expected["4-exact"], "position")))
    first = prefix[: budgets["prefix", 4, "exact", None, 0.05]["kept"]]
    assert budgets["prefix", 4, "exact", None, 0.05]["mean"] == pytest.approx(gain[first].mean(), abs=1e-5)
    d = column(expected["4-exact"], "D")
    high_d = np.argsort(-d)[: int(np.ceil(0.2 * len(d)))]
    assert budgets["divergence", 4, "exact", None, 0.2]["median"] == pytest.approx(np.median(gain[high_d]), abs=1e-5)
    quartiles = [r for r in trained["quartiles"] if (r["region"], r["score"]) == ("all", "prefix")]
    position = column(expected["4-exact"], "position")
    assert [quartiles[0]["score_low"], quartiles[-1]["score_high"]] == [-position.max(), 0]
    assert sum(r["mean"] * r["positions"] for r in quartiles) == pytest.approx(gain.sum(), abs=1e-4)
    comparison = report["comparisons"][0]
    assert (comparison["checkpoint"], comparison["reference"]) == ("θ0", "trained")
    assert comparison["mean_difference"] == pytest.approx(-gain.mean(), abs=1e-5)
    assert comparison["interval"] == pytest.approx([-high, -low])


def test_report_of_bound_and_k(report: dict, expected: dict[str, list[dict]]) -> None:
    for bound, support, k in zip(report["bound"], report["supports"], KS, strict=True):
        exact, upstream = expected[f"{k}-exact"], expected[f"{k}-upstream"]
        gap = column(exact, "C") - column(exact, "C_topk")
        assert bound["C_gap"]["mean"] == pytest.approx(gap.mean(), abs=1e-6) and gap.mean() > 0.001
        assert bound["C_gap"]["max"] == pytest.approx(gap.max(), abs=1e-5)
        assert bound["C_gap_above_1e-1"] == pytest.approx((gap > 0.1).mean())
        d_gap = np.abs(column(exact, "D") - column(upstream, "D"))
        assert bound["D_gap"]["mean"] == pytest.approx(d_gap.mean(), rel=1e-3)
        assert support["C"]["q05"] == pytest.approx(np.quantile(column(exact, "C"), 0.05), abs=1e-5)
        assert support["low_C_share"] == pytest.approx((column(exact, "C") < 0.5).mean())
        assert support["student_mass"] == pytest.approx(column(exact, "student_mass").mean(), abs=1e-5)
    same, other = report["k_sensitivity"]
    assert same["spearman_score"] == pytest.approx(1) and same["kept_overlap"][0]["overlap"] == 1
    keeps = [np.array(reference.teachability_keep(expected[f"{k}-exact"], 0.2, min_keep=0)) for k in KS]
    assert other["kept_overlap"][1] == {"keep_ratio": 0.2, "overlap": (keeps[0] & keeps[1]).sum() / keeps[0].sum()}


def test_regressions_and_q3_of_the_report(report: dict, expected: dict[str, list[dict]]) -> None:
    trained, same = report["checkpoints"]
    settings = {
        (r["model"], r["support_k"], r["support_mode"], r["compatibility_scale"]) for r in trained["regressions"]
    }
    assert len(settings) == len(trained["regressions"]) == 2 * 2 * 2 * len(KS)
    assert all(r["terms"] == [] for r in same["regressions"])  # a gain of 0 everywhere has nothing to explain

    def scaled(name: str) -> np.ndarray:
        values = column(expected["16-upstream"], name)
        low, high = np.quantile(values, [0.05, 0.95])
        return np.clip((values - low) / (high - low), 0, 1)

    d, c, h = scaled("D"), column(expected["16-upstream"], "C"), scaled("H")
    gain = column(expected["4-exact"], "kl_forward") - column(expected["trained"], "kl_forward")
    terms = [
        h,
        d * c,
        d * (1 - c),
        column(expected["4-exact"], "position"),
        column(expected["4-exact"], "teacher_entropy"),
    ]
    design = np.column_stack([np.ones(len(d)), *((t - t.mean()) / t.std() for t in terms)])
    # 1 % of these few positions is less than one: nothing is winsorised
    beta = np.linalg.lstsq(design, (gain - gain.mean()) / gain.std(), rcond=None)[0]
    assert len(gain) < 100
    found = next(
        r["terms"]
        for r in trained["regressions"]
        if (r["model"], r["support_k"], r["support_mode"], r["compatibility_scale"])
        == ("decomposition", 16, "upstream", "raw")
    )
    np.testing.assert_allclose([term["coefficient"] for term in found], beta[1:], rtol=2e-3, atol=2e-3)

    rows = expected["4-exact"]
    h, d = column(rows, "H"), column(rows, "D")
    inside = (h < np.median(h)) & (d >= np.median(d))  # normalising keeps the order about the median
    shown = [r["positions"] for r in trained["quartiles"] if (r["region"], r["score"]) == ("q3", "entropy")]
    assert sum(shown) == inside.sum() > 4


def test_files_of_the_report(report: dict, made: Path) -> None:
    directory = made / "report"
    assert set(report["plots"]) == {"gain", "quartiles", "regressions", "budgets", "k_sensitivity", "bound"}
    for file in report["plots"].values():
        assert (directory / file).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert (directory / file).stat().st_size > 5000
    text = (directory / "report.md").read_text()
    mean = report["checkpoints"][0]["gain"]["mean"]
    assert f"| mean G              | {mean:.4f} [" in text
    assert "teachability (K=16)" in text and "teachability (raw C)" in text and "does not vary" in text
    cli.run(["diagnose", "report", f"--bank={made / 'bank'}", f"--output={made / 'report0'}", "--support-k=16"])
    alone = json.loads((made / "report0" / "report.json").read_text())
    assert alone["checkpoints"] == [] and set(alone["plots"]) == {"k_sensitivity", "bound"}
    assert alone["bound"][0]["C_gap"] == report["bound"][0]["C_gap"]


def two_teachers(root: Path) -> list[str]:
    """Runs in a rank: the messages of what is refused on the way."""
    names = [f"--teacher=b={root / 'teacher2'}", f"--teacher=a={root / 'teacher'}"]
    words = bank_words(root, "bank_ab", *names)
    words[words.index(f"--rollout-data={root / 'rollouts.jsonl'}")] = f"--rollout-data={root / 'ab.jsonl'}"
    cli.run(words)
    cli.run(gain_words(root, "bank_ab", "student", "same_ab"))
    swapped = [f"--teacher=a={root / 'teacher2'}", f"--teacher=b={root / 'teacher'}"]
    return [
        refused(gain_words(root, "bank_ab", "student", "x", *swapped)),
        refused(gain_words(root, "bank_ab", "student", "x", f"--teacher=c={root / 'teacher'}")),
    ]


def test_two_teachers(pool, root: Path) -> None:
    rows = reference.read_jsonl(root / "rollouts.jsonl")
    lines = [json.dumps(row | {"teacher": "ab"[i % 2]}) for i, row in enumerate(rows)]
    (root / "ab.jsonl").write_text("\n".join(lines))
    swapped, unknown = pool(1).run(two_teachers, root)[0]
    assert set(np.array(pq.read_table(root / "same_ab.parquet")["gain"]).tolist()) == {0.0}
    assert "the teacher is not that of bank" in swapped
    assert "--teacher c: the bank's teachers are called b, a" in unknown


def refusals(root: Path) -> dict[str, str]:
    """Runs in a rank."""
    cases = {
        "existing output": bank_words(root, "bank"),
        "too few prompts": bank_words(root, "x", "--num-prompts=9"),
        "K": bank_words(root, "x", "--support-k=600"),
        "no bank": gain_words(root, "student", "trained", "x"),
        "tokenizer": gain_words(root, "bank", "other_words", "x"),
        "vocabulary": gain_words(root, "bank", "small_vocabulary", "x"),
        "teacher": gain_words(root, "bank", "trained", "x", f"--teacher={root / 'teacher2'}"),
        "teacher gone": gain_words(root, "bank", "trained", "x", f"--teacher={root / 'nowhere'}"),
        "contexts changed": gain_words(root, "bank_contexts", "trained", "x"),
        "positions gone": gain_words(root, "bank_positions", "trained", "x"),
        "record changed": gain_words(root, "bank_record", "trained", "x"),
    }
    return {name: refused(words) for name, words in cases.items()}


def test_refused(pool, made: Path) -> None:
    shutil.copytree(made / "trained", made / "other_words")
    save_tokenizer(made / "other_words", WORDS[::-1])
    save_tiny_hf_model(made / "small_vocabulary", "qwen3", vocab_size=STUDENT_VOCAB - 9)
    for name in ("contexts", "positions", "record"):
        shutil.copytree(made / "bank", made / f"bank_{name}")
    changed = made / "bank_contexts" / "contexts.jsonl"
    changed.write_text(changed.read_text().replace('"r1"', '"r8"'))
    (made / "bank_positions" / "positions.parquet").unlink()
    record = made / "bank_record" / "bank.json"
    record.write_text(record.read_text().replace('"temperature": 0.9', '"temperature": 1.0'))
    wanted = {
        "existing output": "bank exists and a bank is written once; give another directory",
        "too few prompts": "answers 8 prompts, fewer than --num-prompts 9; lower that or roll out more",
        "K": "--support-k 600 must be between 1 and the vocabulary size 509",
        "no bank": "is no bank: bank.json cannot be read",
        "tokenizer": "it would read other text; use a checkpoint of the bank's student",
        "vocabulary": "was taken over 509 common token ids, ",
        "teacher": "the teacher is not that of bank",
        "teacher gone": "is not a directory here; say with --teacher where it is now",
        "contexts changed": "contexts.jsonl was changed after the bank was made",
        "positions gone": "is incomplete: no positions.parquet",
        "record changed": "bank.json was changed after the bank was made",
    }
    messages = pool(1).run(refusals, made)[0]
    for name, text in wanted.items():
        assert text in messages[name], name
    assert not (made / "x").exists() and not (made / "x.parquet").exists()


def test_report_refuses(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["diagnose", "report", f"--bank={made / 'bank'}", f"--output={made / 'y'}", "--support-k=4"]
    trained = f"--gain={made / 'trained.parquet'}"
    for extra, text in (
        (["--support-k=8", trained], "was not made for --support-k 8; it has 4, 16"),
        ([f"--gain={made / 'elsewhere.parquet'}"], "their positions differ; take the gain on this bank"),
        ([f"--gain={made / 'bank' / 'positions.parquet'}"], "is not a file of `taopd diagnose gain`"),
        ([f"--gain={made / 'nowhere.parquet'}"], "nowhere.parquet cannot be read"),
        ([trained, f"--gain=trained={made / 'same.parquet'}"], "2 checkpoints are called trained; write --gain NAME="),
    ):
        assert text in refused([*words, *extra])
    assert "unknown diagnostic 'gian'; did you mean gain?" in refused(["diagnose", "gian"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "works in one process and 2 were started" in refused(words)
    assert not (made / "y").exists()
