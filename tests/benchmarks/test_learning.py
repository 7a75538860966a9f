"""The learning study: its problems, its loop, its resume and its statistics, on a model of a few thousand weights."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("transformers", reason="the study's model is one of transformers")
pytest.importorskip("scipy", reason="the study's intervals and tests are scipy's")

from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks.results import environment
from studies.learning import policy_optimization, pretrained_analysis
from studies.learning import study as study_module
from studies.learning.analysis import differences, stage_scores
from studies.learning.base import make_model, make_tokenizer
from studies.learning.drawing import draw
from studies.learning.policy_optimization import Recipe
from studies.learning.tasks import CHARACTERS, max_reply, with_solution
from studies.learning.tasks import draw as draw_problem
from tests.processes import fork_server

FAMILIES = ("sum", "split")
EVERY = (*FAMILIES, "chain-6", "chain-20", "sort-4", "sort-8")
METHODS = study_module.METHODS
TINY = Recipe(steps=2, prompts=2, group_size=4, evaluate_every=1, evaluation_problems=4, evaluation_replies=2)


@given(st.sampled_from(EVERY), st.integers(0, 2**32), st.booleans())
def test_solutions_are_correct_and_other_numbers_are_not(family, seed, held_out):
    source = random.Random(seed)
    problem = draw_problem(family, source, held_out=held_out)
    reply = problem.solve(source)
    assert problem.held_out == held_out
    assert problem.correct(reply)
    assert len(reply) < max_reply(family)
    assert set(with_solution(problem.question, reply)) <= set(CHARACTERS)
    last = int(reply[-1])
    assert not problem.correct(f"{reply[:-1]}{(last + 1) % 10}")
    assert not problem.correct(reply + "+") and not problem.correct("") and not problem.correct("=" + reply)


def test_a_split_needs_three_different_parts_in_range_with_the_given_one():
    draws = (draw_problem("split", random.Random(seed), held_out=False) for seed in range(10_000))
    problem = next(problem for problem in draws if problem.question == "37~8")
    assert problem.correct("20+8=28+9=37") and problem.correct("10+19=29+8=37")
    one_part_twice, two_parts, out_of_range = "8+8=16+21=37", "8+29=37", "8+28=36+1=37"
    without_8, other_sum, no_steps, wrong_end = "18+9=27+10=37", "19+8=27+9=36", "20+8+9", "20+8=28+9=36"
    for wrong in (one_part_twice, two_parts, out_of_range, without_8, other_sum, no_steps, wrong_end):
        assert not problem.correct(wrong), wrong


def test_the_tokenizer_is_one_id_per_character():
    tokenizer = make_tokenizer()
    ids = tokenizer(CHARACTERS + "<eos>").input_ids
    assert ids == [*range(1, len(CHARACTERS) + 1), 0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == CHARACTERS


@pytest.mark.parametrize("method", METHODS)
def test_every_method_moves_the_model_where_groups_are_mixed(method, monkeypatch):
    def coin(family, source, *, held_out):
        problem = draw_problem(family, source, held_out=held_out)
        return problem._replace(correct=lambda reply: zlib.crc32(reply.encode()) % 2 == 0)

    monkeypatch.setattr(policy_optimization, "draw", coin)
    rows = list(policy_optimization.run(make_model(32, 1, seed=0), method, 0, FAMILIES, TINY))
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["grad_norm"] > 0 and row["train_seconds"] > 0 for row in rows[1:])
    assert (rows[1]["sdpo_rollouts"] == 0) == (method == "grpo")
    assert ("teacher_entropy" in rows[1]) == (method != "grpo")
    assert ("dw_weight_std" in rows[1] and rows[1]["dw_weight_std"] > 1e-3) == (method in ("sdpo", "srpo", "mixing"))


def test_a_study_is_resumed_and_drawn(tmp_path, monkeypatch):
    # The study's own processes import everything anew.
    context = fork_server()
    monkeypatch.setattr(study_module.multiprocessing, "get_context", lambda method: context)
    folder, out = tmp_path / "runs", tmp_path / "learning.csv"
    folder.mkdir()
    make_model(32, 1, seed=0).save_pretrained(folder / "base")
    settings = {"methods": ("grpo", "srpo"), "families": FAMILIES, "recipe": TINY, "folder": folder, "out": out}
    study_module.study(seeds=1, **settings)
    first = (folder / "srpo-0.csv").stat().st_mtime_ns
    study_module.study(seeds=2, **settings)
    assert (folder / "srpo-0.csv").stat().st_mtime_ns == first
    cells = pd.read_csv(out)
    assert set(zip(cells["method"], cells["seed"], strict=True)) == {(m, s) for m in ("grpo", "srpo") for s in (0, 1)}
    assert (cells.groupby(["method", "seed"])["step"].max() == TINY.steps).all()
    with pytest.raises(SystemExit, match="other settings"):
        study_module.study(seeds=2, **settings | {"recipe": Recipe(steps=3)})
    document = tmp_path / "learning.md"
    markers = ("cells", "cell-differences", "rates", "mechanism", "stages", "differences", "pretrained")
    document.write_text("".join(f"<!-- {m} -->\n<!-- /{m} -->\n" for m in markers))
    files = {"cells": tmp_path / "none.csv", "mechanism": tmp_path / "none.csv", "study": out}
    draw(**files, pretrained=tmp_path / "none.csv", document=document, figures=tmp_path)
    assert "learning pretrained`" in document.read_text() and "learning sweep`" in document.read_text()
    pretrained_steps().to_csv(tmp_path / "pretrained.csv", index=False)
    draw(**files, pretrained=tmp_path / "pretrained.csv", document=document, figures=tmp_path)
    text = document.read_text()
    assert "`srpo`" in text and "p = " in text and "9 steps, one run a method" in text
    assert (tmp_path / "learning.png").exists() and (tmp_path / "learning_pretrained.svg").exists()


def pretrained_steps() -> pd.DataFrame:
    """Nine steps of two methods; srpo is 0.2 ahead in the last three, give or take 0.1."""
    steps = np.arange(1, 10)
    grpo = {"method": "grpo", "step": steps, "reward": 0.5, "sdpo_tokens": 0.0, "teacher_entropy": 0.0}
    lead = np.repeat([0.0, 0.2], [6, 3]) + np.tile([-0.1, 0.0, 0.1], 3)
    srpo = grpo | {"method": "srpo", "reward": 0.5 + lead, "sdpo_tokens": 0.4, "teacher_entropy": 0.1 * steps}
    cells = pd.concat(map(pd.DataFrame, (grpo, srpo)), ignore_index=True)
    return cells.assign(seed=0, reply_length=7.0, seconds=2.5, **environment(torch.device("cpu"), 1))


def test_a_pretrained_models_methods_are_compared_on_the_same_steps(tmp_path):
    path = tmp_path / "pretrained.csv"
    pretrained_steps().to_csv(path, index=False)
    lines = pretrained_analysis.table(pretrained_analysis.read(path)).splitlines()
    grpo, srpo = (line.split(" | ") for line in lines[-2:])
    half = 0.1 * stats.t.ppf(0.975, 2) / 3**0.5
    assert srpo[1:3] == [f"50.0 ± {100 * half:.1f}", f"70.0 ± {100 * half:.1f}"] and srpo[3].startswith("+6.7 ± ")
    assert srpo[4:] == ["40%", "0.20, 0.80", "7.0, 7.0 |"]
    assert grpo[1:] == ["50.0 ± 0.0", "50.0 ± 0.0", "-", "0%", "-, -", "7.0, 7.0 |"]


def test_differences_are_those_of_pairs():
    steps = np.arange(0, 101, 10)
    cells = pd.concat(
        pd.DataFrame(
            {
                "method": method,
                "seed": seed,
                "step": steps,
                "train_seconds": 2.0 * steps,
                "accuracy": 0.5 + 0.1 * seed + gain + 0.01 * seed * gain,
            }
        )
        for method, gain in (("grpo", 0.0), ("srpo", 0.1))
        for seed in range(5)
    )
    scores = stage_scores(cells)
    mean, low, high, p = differences(scores, "end", "grpo")
    assert mean == pytest.approx(0.1 + 0.01 * 0.1 * 2)
    assert low < mean < high and high - low < 0.01
    assert p < 1e-6


def test_a_pretrained_model_is_trained_with_each_method_once(tmp_path, monkeypatch):
    pytest.importorskip("trl", "1.16", reason="the pretrained model is trained by TRL's trainer")
    from studies.learning import pretrained as module
    from tests.tiny_trainer import tiny_model, tiny_tokenizer

    monkeypatch.setattr(module, "load_model", lambda _: (tiny_model(), tiny_tokenizer()))
    out = tmp_path / "learning_pretrained.csv"
    module.pretrained(methods=("grpo",), steps=2, questions=2, threads=1, out=out)
    first = pd.read_csv(out)
    module.pretrained(methods=("grpo", "srpo"), steps=2, questions=2, threads=1, out=out)
    cells = pd.read_csv(out)
    assert list(zip(cells["method"], cells["step"], strict=True)) == [(m, s) for m in ("grpo", "srpo") for s in (1, 2)]
    pd.testing.assert_frame_equal(cells.head(2), first)
    for name in ("reward", "reply_length", "sdpo_tokens", "active_tokens", "seconds"):
        assert cells[name].notna().all(), name
