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

from benchmarks.results import environment
from studies.learning import policy_optimization, summary
from studies.learning import study as study_module
from studies.learning.analysis import complete, differences, stage_scores
from studies.learning.base import make_model, make_tokenizer
from studies.learning.drawing import draw
from studies.learning.options import Draw, Pretrained, Recipe, Study
from studies.learning.tasks import CHARACTERS, max_reply, with_solution
from studies.learning.tasks import draw as draw_problem
from tests.processes import fork_server

FAMILIES = ("sum", "split")
EVERY = (*FAMILIES, "chain-6", "chain-20", "sort-4", "sort-8")
METHODS = Study.methods
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
    study_module.study(Study(seeds=1, **settings))
    first = (folder / "srpo-0.csv").stat().st_mtime_ns
    study_module.study(Study(seeds=2, **settings))
    assert (folder / "srpo-0.csv").stat().st_mtime_ns == first
    cells = pd.read_csv(out)
    assert set(zip(cells["method"], cells["seed"], strict=True)) == {(m, s) for m in ("grpo", "srpo") for s in (0, 1)}
    assert (cells.groupby(["method", "seed"])["step"].max() == TINY.steps).all()
    with pytest.raises(SystemExit, match="other settings"):
        study_module.study(Study(seeds=2, **settings | {"recipe": Recipe(steps=3)}))
    document = tmp_path / "learning.md"
    markers = [f"{kind}{table}" for kind in ("cells", "pretrained") for table in ("", "-differences", "-rates")]
    markers += ["mechanism", "stages", "differences"]
    document.write_text("".join(f"<!-- {m} -->\n<!-- /{m} -->\n" for m in markers))
    files = {"cells": tmp_path / "none.csv", "mechanism": tmp_path / "none.csv", "study": out}
    files["summary"] = tmp_path / "summary.csv"
    draw(Draw(**files, pretrained=tmp_path / "none.csv", document=document, figures=tmp_path))
    assert document.read_text().count("learning pretrained`") == 3 and "learning sweep`" in document.read_text()
    pretrained_lines().to_csv(tmp_path / "smollm2.csv", index=False)
    draw(Draw(**files, pretrained=tmp_path / "smollm2.csv", document=document, figures=tmp_path))
    text = document.read_text()
    assert "`srpo`" in text and "p = " in text and "40 steps" in text
    assert "| `smollm2` | end | `srpo` less `grpo` | +10.0 (-2.7 to +22.7) | 2 |" in text
    found = pd.read_csv(files["summary"]).set_index(["cell", "method", "less", "statistic"])["mean"]
    assert found["smollm2", "srpo", "grpo", "end"] == pytest.approx(0.1)
    assert (tmp_path / "learning.png").exists() and (tmp_path / "learning_pretrained.svg").exists()


def test_the_published_statistics_are_those_of_the_published_runs(tmp_path):
    published = Draw()
    runs = complete(pd.read_csv(published.study))
    rows = list(summary.study_rows(runs, stage_scores(runs)))
    for cells in (published.cells, published.pretrained):
        rows += summary.cell_rows(pd.read_csv(cells))
    rows += summary.mechanism_rows(pd.read_csv(published.mechanism))
    summary.write(rows, tmp_path / "summary.csv")
    # Another processor may round the last digit otherwise.
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "summary.csv"), pd.read_csv(published.summary), rtol=1e-3)


def pretrained_lines() -> pd.DataFrame:
    """A run that chooses the rate and two that are compared, of two methods; srpo is 0.09 and 0.11 ahead."""
    runs = [
        pd.DataFrame({"step": np.arange(4, 41, 4), "accuracy": 0.5 + lead}).assign(
            cell="smollm2", method=method, seed=seed, lr=1e-5, train_seconds=1.0
        )
        for method, leads in (("grpo", (0.0, 0.0, 0.0)), ("srpo", (0.0, 0.09, 0.11)))
        for seed, lead in zip((100, 0, 1), leads, strict=True)
    ]
    return pd.concat(runs, ignore_index=True).assign(**environment(torch.device("cpu"), 1))


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


def test_a_pretrained_models_methods_get_a_rate_of_their_own_and_runs_are_kept(tmp_path, monkeypatch):
    pytest.importorskip("trl", "1.16", reason="the pretrained model is trained by TRL's trainer")
    from studies.learning import pretrained as module
    from tests.tiny_trainer import tiny_model, tiny_tokenizer

    trained = []

    def log(planned, steps):
        trained.append((planned.method, planned.seed, planned.lr, steps))
        if steps == 2:
            return [row for row in train(planned, steps) if "reward" in row]
        best = {"grpo": 1e-5, "srpo": 2e-5}[planned.method]
        steady = {"reward": 0.6 if planned.lr == best else 0.3, "step_time": 0.5, "grad_norm": 1.0}
        routed = {"srpo/sdpo_token_fraction": 0.0, "srpo/teacher_entropy": 0.0, "completions/mean_length": 7.0}
        return [steady | routed for _ in range(steps)] + [{"train_runtime": 1.0}]

    train = module._train
    monkeypatch.setattr(module, "load_model", lambda _: (tiny_model(), tiny_tokenizer()))
    monkeypatch.setattr(module, "_train", log)
    out = tmp_path / "smollm2.csv"
    settings = {"methods": ("grpo", "srpo"), "lrs": (1e-5, 2e-5), "choice_steps": 40, "steps": 44, "out": out}
    module.pretrained(Pretrained(seeds=1, device="cpu", **settings))
    assert trained[:4] == [(m, 100, lr, 40) for lr in (1e-5, 2e-5) for m in ("grpo", "srpo")]
    assert trained[4:] == [("grpo", 0, 1e-5, 44), ("srpo", 0, 2e-5, 44)]
    module.pretrained(Pretrained(seeds=2, device="cpu", **settings))
    assert trained[6:] == [("grpo", 1, 1e-5, 44), ("srpo", 1, 2e-5, 44)]
    rows = pd.read_csv(out)
    last = rows[(rows["method"] == "srpo") & (rows["seed"] == 1)]
    assert list(last["step"]) == list(range(4, 45, 4)) and last["train_seconds"].iloc[-1] == 22.0
    assert (last["accuracy"] == 0.6).all() and last["teacher_entropy"].isna().all()
    for steps in (36, 42):
        with pytest.raises(SystemExit, match=f"multiples of 4 and at least 40, got {steps} and 40"):
            module.pretrained(Pretrained(**settings | {"steps": steps}))
    real = module.lines(module._train(module.Run(Pretrained(questions=2, device="cpu"), "srpo", 0, 1e-5), 2))
    assert list(real["step"]) == [2] and real["accuracy"].notna().all() and (real["train_seconds"] > 0).all()
