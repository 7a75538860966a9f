"""The example script and those of the documents, with a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl", "1.16", reason="the trl integration needs trl >= 1.16")

from examples import rollouts, train_trl
from tests.tiny_trainer import graded, prompts, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
TINY_RUN = "max_steps=2, logging_steps=1, max_completion_length=4, use_cpu=True, bf16=False, report_to='none'"


def test_the_example_trains(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rollouts, "load_model", lambda _: (tiny_model(), tiny_tokenizer()))
    train_trl.main(["--steps", "2", "--questions", "2", "--out", "here"])
    assert capsys.readouterr().out.count("srpo/sdpo_token_fraction") == 2
    with pytest.raises(SystemExit):
        train_trl.main(["--step", "2"])


def test_the_script_of_the_readme_trains(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = next(part for part in README.read_text().split("```") if "SRPOTrainer(" in part).removeprefix("python\n")
    assert len(script.splitlines()) <= 20
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name, tiny in (("HuggingFaceTB/SmolLM2-135M-Instruct", str(tmp_path / "model")), ("max_steps=100", TINY_RUN)):
        assert script.count(name) == 1
        script = script.replace(name, tiny)
    monkeypatch.chdir(tmp_path)
    exec(compile(script, str(README), "exec"), {})
    assert capsys.readouterr().out.count("srpo/sdpo_token_fraction") == 2


def test_the_lines_of_the_page_train(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = (ROOT / "docs/trainers.md").read_text().split("```python\n")[1].split("```")[0]
    for option, tiny in (
        ("questions_per_batch=32", "questions_per_batch=2"),
        ("batch_size=8", f"batch_size=8, {TINY_RUN}"),
    ):
        assert script.count(option) == 1
        script = script.replace(option, tiny)
    given = {"model": tiny_model(), "reward_funcs": graded, "dataset": prompts(), "tokenizer": tiny_tokenizer()}
    monkeypatch.chdir(tmp_path)
    exec(script, given)
    assert capsys.readouterr().out.count("srpo/sdpo_token_fraction") == 2
