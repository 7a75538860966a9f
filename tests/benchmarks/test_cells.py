"""The cells of the learning study: their tasks, their sampler, resume, outcomes, statistics, and the probe's places."""

from __future__ import annotations

import random
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("transformers", reason="the study's model is one of transformers")
pytest.importorskip("scipy", reason="the study's intervals and tests are scipy's")

from examples.rollouts import response_mask
from studies.learning import cells, choices, mechanism, sampling, sweep, tasks
from studies.learning.base import make_model, make_tokenizer
from studies.learning.cell_report import (
    cell_curves,
    cell_table,
    choice_table,
    difference_table,
    mechanism_figure,
    mechanism_table,
    primary_differences,
)
from studies.learning.cells import CHOICE_SEEDS, Cell, Stage, comparison_runs
from studies.learning.comparison import chosen_lr, holm, outcomes
from studies.learning.mechanism import consistent_ids, first_error
from studies.learning.options import Choices, Sweep
from studies.learning.summary import cell_rows
from studies.learning.tasks import draw, max_reply


def problem(question: str):
    """The problem of that question: a sort where all digits differ, else a chain."""
    digits = list(map(int, question))
    left = iter(digits)
    source = SimpleNamespace(
        randint=lambda low, high: next(left),
        sample=lambda population, count: digits,
        choice=random.Random(0).choice,
    )
    kind = tasks._sort if len(set(digits)) == len(digits) else tasks._chain
    return kind("of a test", source, len(digits))


def test_a_sort_may_take_either_end_and_nothing_else():
    sort = problem("7592")
    assert sort.question == "7592"
    assert sort.correct("2~759=9~75=5~7=7") and sort.correct("9~752=7~52=5~2=2")
    middle, kept, swapped, short = "5~792=9~72=7~2=2", "2~7592=9~75=5~7=7", "2~795=9~75=5~7=7", "2~759=9~75=5~7"
    for wrong in (middle, kept, swapped, short, "2~759=9~75=5~7=7=7", "2~759=9~75=5~7=5", "", "7"):
        assert not sort.correct(wrong), wrong
    draws = {sort.solve(random.Random(seed)) for seed in range(200)}
    assert len(draws) == 8 and all(map(sort.correct, draws))


def test_a_chain_has_one_reply():
    chain = problem("7557")
    assert chain.solve(random.Random(0)) == "7+5=2+5=7+7=4"
    assert max_reply("chain-6") == 22 and max_reply("chain-20") == 78 and max_reply("sort-8") == 51


def test_the_sampler_follows_the_model(monkeypatch):
    model, tokenizer = make_model(64, 2, seed=0).eval(), make_tokenizer()
    monkeypatch.setattr(torch, "multinomial", lambda probabilities, count: probabilities.argmax(-1, keepdim=True))
    questions = [draw("chain-6", random.Random(seed), held_out=False).question for seed in range(8)]
    rollouts = sampling.sample(model, tokenizer, questions, 2, 12)
    expected = model.generate(rollouts.prompt_ids, do_sample=False, max_new_tokens=12, pad_token_id=0, eos_token_id=0)
    generated = expected[:, rollouts.prompt_ids.shape[1] :]
    assert len(set(rollouts.replies)) > 1
    assert torch.equal(rollouts.response_ids, generated) and torch.equal(rollouts.mask, response_mask(generated, 0))


def curve(values, **labels):
    steps = np.linspace(0, 120, len(values))
    key = {
        "cell": "chain-6@10",
        "method": "grpo",
        "seed": 0,
        "lr": 1e-4,
        "train_seconds": 1.0,
        "commit": "abc",
    } | labels
    return pd.DataFrame(key, index=range(len(steps))).assign(step=steps, accuracy=values)


def test_outcomes_of_a_run():
    risen = outcomes(curve([0.1, 0.2, 0.3, 0.5, 0.6, 0.8])).iloc[0]
    assert risen["start"] == 0.1 and risen["best"] == 0.8
    assert risen["early"] == pytest.approx(0.15) and risen["end"] == pytest.approx(0.8)
    assert risen["area"] == pytest.approx((0.15 + 0.25 + 0.4 + 0.55 + 0.7) / 5)
    assert not risen["collapsed"]
    once, twice = (outcomes(curve([0.1, 0.6, 0.3, after, 0.6, 0.6])).iloc[0] for after in (0.41, 0.39))
    assert not once["collapsed"] and twice["collapsed"]


def test_holm_multiplies_by_what_is_left():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def compared_runs():
    """Ten pairs in which srpo is 0.1 ahead all along, give or take 0.01 times the seed's parity; sdpo as grpo."""
    runs = [
        curve(
            np.full(21, 0.3 + 0.02 * seed + (method == "srpo") * (0.1 + 0.01 * (-1) ** seed)), method=method, seed=seed
        )
        for seed in range(10)
        for method in ("grpo", "srpo", "sdpo")
    ]
    choice = [
        curve(np.full(21, area), method=method, seed=CHOICE_SEEDS[0], lr=lr)
        for method in ("grpo", "srpo", "sdpo")
        for lr, area in ((1e-4, 0.4), (2e-4, 0.6), (4e-4, 0.5))
    ]
    return pd.concat([*choice, *runs], ignore_index=True)


def test_primary_comparisons_are_paired_and_corrected():
    rows = compared_runs()
    assert chosen_lr(outcomes(rows), "chain-6@10", "srpo") == 2e-4
    found = {entry[1:4]: entry[4:] for entry in primary_differences(rows)}
    assert set(found) == {
        ("early", "srpo", "grpo"),
        ("early", "sdpo", "grpo"),
        ("end", "srpo", "grpo"),
        ("end", "srpo", "sdpo"),
    }
    lead, corrected = found["early", "srpo", "grpo"]
    assert lead.mean == pytest.approx(0.1) and lead.pairs == 10 and 0.09 < lead.low < lead.high < 0.11
    assert corrected == pytest.approx(4 * lead.p)


def test_a_summary_has_outcomes_differences_both_ways_and_the_choice():
    keys = ("method", "less", "lr", "statistic")
    found = {tuple(row.get(key) for key in keys): row for row in cell_rows(compared_runs())}
    ahead, behind = found["srpo", "grpo", None, "early"], found["grpo", "srpo", None, "early"]
    assert ahead["mean"] == pytest.approx(0.1)
    assert (ahead["mean"], ahead["high"]) == pytest.approx((-behind["mean"], -behind["low"]))
    assert ahead["holm"] == pytest.approx(4 * ahead["p"]) and behind["holm"] is None
    assert found["srpo", None, 2e-4, "choice"]["mean"] == pytest.approx(0.6)
    level = found["grpo", None, 1e-4, "end"]
    assert level["mean"] == pytest.approx(0.39) and level["low"] < 0.39 < level["high"]
    assert found["grpo", None, 1e-4, "collapsed"]["mean"] == 0


def test_consistent_totals_follow_what_is_written():
    tokenizer = make_tokenizer()
    ids = tokenizer(["7+5=3+9=2", "7+5=+=9+1="], padding=True, return_tensors="pt").input_ids
    own = consistent_ids(ids, tokenizer)
    assert tokenizer.decode(own[0, 4]) == "2" and tokenizer.decode(own[0, 8]) == "2"
    assert (own[0, [0, 1, 2, 3, 5, 6, 7]] == -1).all() and own[1, 8] == -1


def test_places_are_those_around_the_first_wrong_token(monkeypatch):
    tokenizer, chain = make_tokenizer(), problem("7557")
    replies = ["7+5=2+5=7+7=4", "7+5=2+5=8+7=4", "7+5=2+5=8+7=5", "8+5=3+5=8+7=5"]
    ids = tokenizer([reply + "<eos>" for reply in replies], return_tensors="pt").input_ids
    masks = response_mask(ids, 0)
    batch = SimpleNamespace(
        rollouts=SimpleNamespace(response_ids=ids, mask=masks), sdpo_mask=torch.tensor([False, True, True, True])
    )
    monkeypatch.setattr(mechanism, "_GROUP_SIZE", 4)
    places = first_error(batch, [chain], tokenizer)
    assert not any(mask[0].any() for mask in places.values())
    assert places["before"][1:].sum(1).tolist() == [8, 8, 0]
    assert places["at"][1:].nonzero().tolist() == [[0, 8], [1, 8], [2, 0]]
    assert places["after"][1:].sum(1).tolist() == [5, 5, 13]


def test_a_cell_with_groups_of_another_size_has_the_same_first_model_and_as_many_replies():
    four, eight = Cell("chain-20", 0.1, (1e-4, 2e-4), group_size=4), Cell("chain-20", 0.1, (1e-4, 2e-4))
    assert Cell("chain-20", 0.1, (2e-4,)).name == "chain-20~10r0.0002"
    assert (four.name, four.first_model, eight.name) == ("chain-20~10g4", "chain-20~10", "chain-20~10")
    assert four.recipe(1e-4) == replace(eight.recipe(1e-4), group_size=4, prompts=16)
    assert len({stage.cell.name for stage in cells.PLAN}) == len(cells.PLAN) - 1  # one has its ablations apart


def test_a_teacher_that_copies_what_is_shown_takes_another_right_choice_away(tmp_path):
    tokenizer = make_tokenizer()

    class Copies(torch.nn.Module):
        """Of a question with a solution in brackets, it says that solution; else every digit is as likely."""

        def forward(self, input_ids):
            logits = torch.zeros(1, input_ids.shape[1], len(tokenizer))
            text = tokenizer.decode(input_ids[0])
            if "[" in text:
                solution = text.partition("[")[2].partition("]")[0]
                ids = tokenizer(solution).input_ids
                first = input_ids.shape[1] - len(ids) - 2
                logits[0, range(first, first + len(ids)), ids] = 50.0
            return SimpleNamespace(logits=logits)

    seen = choices.held(Copies(), "sort-4")
    assert seen["questions"] > 100 and seen["alone"] == pytest.approx(1 / len(tokenizer))
    assert seen["shown_another"] < 1e-9 and seen["reply_shown_another"] < seen["reply_alone"] < 0.0
    make_model(32, 1, seed=0).save_pretrained(tmp_path / "one")
    choices.choices(Choices(models=("one",), family="sort-4", folder=tmp_path, out=tmp_path / "choices.csv"))
    assert pd.read_csv(tmp_path / "choices.csv").loc[0, "alone"] == pytest.approx(1 / len(tokenizer), rel=0.5)


def test_cells_are_resumed_probed_and_drawn(tmp_path, monkeypatch):
    def coin(family, source, length, chain=tasks._chain):
        return chain(family, source, length)._replace(correct=lambda reply: zlib.crc32(reply.encode()) % 3 == 0)

    monkeypatch.setattr(tasks, "_chain", coin)
    small = {"steps": 5, "prompts": 4, "evaluate_every": 1, "evaluation_problems": 8}
    monkeypatch.setattr(cells, "RECIPE", replace(cells.RECIPE, **small))
    monkeypatch.setattr(mechanism, "STEPS", (0, 5))
    cell = Cell("chain-6", 0.1, (1e-4, 1e-3))
    monkeypatch.setattr(sweep, "PLAN", (Stage(cell, ("grpo", "srpo")),))
    monkeypatch.setattr(sweep, "comparison_runs", lambda stage: comparison_runs(stage)[:4])
    make_model(32, 1, seed=0).save_pretrained(tmp_path / cell.name)
    files = {"folder": tmp_path, "out": tmp_path / "cells.csv", "mechanism": tmp_path / "mechanism.csv"}
    sweep.sweep(Sweep(**files))
    rows, probed = pd.read_csv(files["out"]), pd.read_csv(files["mechanism"])
    keys = list(rows[["method", "seed"]].drop_duplicates().itertuples(index=False, name=None))
    assert keys == [("grpo", 100), ("srpo", 100), ("grpo", 0), ("srpo", 0), ("grpo", 1), ("srpo", 1)]
    assert set(probed.loc[probed["method"] != "start", "seed"]) == {0, 1} and set(probed["step"]) == {0, 5}
    whole = probed[probed["place"] == "reply"]
    assert (whole["distilled"] > 0).all() and whole["cosine_distillation"].between(-1, 1).all()
    cut = rows[~((rows["method"] == "srpo") & (rows["seed"] == 1))]
    cut.to_csv(files["out"], index=False)
    sweep.sweep(Sweep(**files))
    again = pd.read_csv(files["out"])
    same = ["cell", "method", "seed", "lr", "step", "accuracy", "grad_norm"]
    pd.testing.assert_frame_equal(again[same], rows[same])
    for table in (cell_table, difference_table, choice_table):
        assert "`srpo`" in table(again)
    probed = pd.read_csv(files["mechanism"])
    assert list(probed.loc[probed["place"] == "reply", "method"]) == ["start"] * 5 + ["grpo", "srpo"] * 2
    assert f"`{cell.name}`" in mechanism_table(probed)
    mechanism_figure(probed).savefig(tmp_path / "mechanism.png")
    cell_curves(again).savefig(tmp_path / "cells.png")
    with pytest.raises(SystemExit, match="no such cell"):
        sweep.sweep(Sweep(only="chain-7@10", **files))
