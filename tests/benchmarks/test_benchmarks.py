"""The benchmarks on a tiny head, end to end."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

pytest.importorskip("tyro")
pytest.importorskip("rich")

from benchmarks import pictures
from benchmarks.options import Report
from benchmarks.processes import in_fresh_process
from benchmarks.report import report
from benchmarks.results import Measurement, ResultsFile, environment, read_csv, single
from benchmarks.scaling import exponents
from benchmarks.trainers import SIDES, Step, table
from srpo_kernels.verify.agreement import compare
from srpo_kernels.verify.batches import Case, make_batch
from srpo_kernels.verify.kinds import PROVIDERS, ProviderName
from srpo_kernels.verify.providers import Result, Unsupported, prepare
from srpo_kernels.verify.rounds import Rounds, interleave, quantiles
from tests.benchmarks.conftest import Run

ROUTED = Case("tiny", "routed", 1_024)
CPU = torch.device("cpu")

# Compilers take minutes, and have a test of their own.
COMPILED: tuple[ProviderName, ...] = ("naive-compiled", "liger", "cut_cross_entropy")
UNCOMPILED = tuple(name for name in PROVIDERS if name not in COMPILED)


def test_speed_compares_every_provider_on_every_workload(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl", reason="TRL is one of the providers that are compared")
    out = tmp_path / "new" / "speed.csv"
    threads = str(torch.get_num_threads())
    workloads = ("policy", "jsd", "forward_kl", "reverse_kl", "routed")
    options = ["--rounds", "2", "--no-memory", "--device", "cpu", "--threads", threads, "--out", out]
    run("speed", "--heads", "tiny", "--workloads", *workloads, "--providers", *UNCOMPILED, *options)
    printed = capsys.readouterr().out
    cells = read_csv(out).set_index(["workload", "provider", "metric"])
    for workload in workloads:
        assert f"tiny, {workload}" in printed
        packed = ("trl-packed",) if workload == "routed" else ()
        for provider in ("bare", "srpo_kernels", "naive", "trl", *packed):
            assert provider in printed
            seconds = cells.loc[workload, provider, "seconds"]
            assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
            assert cells.loc[workload, provider, "ratio_to_bare"]["median"] > 0
        for provider in ("srpo_kernels", "trl", *packed):
            for quantity in ("loss", "grad_hidden", "grad_weight"):
                assert cells.loc[workload, provider, f"{quantity}_difference"]["median"] < 1e-4
    without = cells.loc["jsd", "linear_cross_entropy", "seconds"]
    assert pd.isna(without["median"])
    assert without["reason"] == "log-probs alone: no divergence"
    assert cells.loc["policy", "quack", "seconds"]["reason"] == "needs a GPU"
    assert (cells["threads"] == int(threads)).all()
    assert (cells["torch"] == torch.__version__).all()
    assert str(tmp_path) not in out.read_text()


@pytest.mark.slow
def test_providers_that_compile_compute_the_same_loss() -> None:
    for workload in ("policy", "jsd", "routed"):
        batch = make_batch(Case("tiny", workload, 128))
        steps = {name: prepare(name, batch) for name in COMPILED if workload == "policy" or name != "cut_cross_entropy"}
        errors = compare(steps, batch, tolerance=1e-4)
        assert errors.keys() == steps.keys()


def test_accuracy_holds_every_provider_to_the_oracle(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is one of the providers that are compared")
    out = tmp_path / "accuracy.csv"
    providers = [name for name in UNCOMPILED if name != "bare"]
    run("accuracy", "--head", "tiny", "--rows", "64", "--device", "cpu", "--providers", *providers, "--out", out)
    cells = read_csv(out).set_index(["dtype", "workload", "provider", "metric"])["median"]
    for workload in ("policy", "jsd", "forward_kl", "reverse_kl", "routed"):
        for metric in ("loss_error", "grad_hidden_error", "grad_weight_error", "log_probs_error"):
            assert cells["float32", workload, "srpo_kernels", metric] < 1e-5
        for metric in ("grad_hidden_error", "grad_weight_error"):
            # Gradients come back in bf16, and nothing else may be rounded to it.
            assert cells["bfloat16", workload, "srpo_kernels", metric] < 2.0**-8
            assert cells["bfloat16", workload, "srpo_kernels", metric] < cells["bfloat16", workload, "naive", metric]


def test_scaling_and_report_make_the_documents(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is one of the providers that are compared")
    few = ["--providers", "bare", "srpo_kernels", "naive", "trl", "quack", "--device", "cpu"]
    run("speed", "--heads", "tiny", "--rounds", "1", "--no-memory", *few, "--out", tmp_path / "speed.csv")
    # The report shows the heads of the published list.
    renamed = (tmp_path / "speed.csv").read_text().replace("tiny", "smollm2-135m")
    (tmp_path / "speed.csv").write_text(renamed)
    run("accuracy", "--head", "tiny", "--rows", "32", *few[:1], *few[2:], "--out", tmp_path / "accuracy.csv")
    sweep = ["--rows", "64", "128", "--vocab-sizes", "500", "1000", "--active", "0.4", "0.8", "--fixed-rows", "64"]
    two = ["--rounds", "1", "--no-memory", "--providers", "srpo_kernels", "naive", "--device", "cpu"]
    run("scaling", "--head", "tiny", *sweep, *two, "--out", tmp_path / "scaling.csv")

    document = tmp_path / "benchmarks.md"
    markers = (
        "providers",
        "speed",
        "memory",
        "memory:many-rows",
        "accuracy",
        "scaling",
        "trainers",
        "trainers:gpu",
        "objectives",
    )
    document.write_text("before\n" + "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in markers))
    gpu = tmp_path / "gpu.md"
    gpu.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in ("report:gpu", "report")))
    options = Report(results=tmp_path, docs=tmp_path)
    report(options)
    text = document.read_text()
    assert text.startswith("before\n") and "old" not in text
    assert "Without a number here: `quack` (needs a GPU)." in text
    assert "| rows | seconds |" in text
    assert "Error of dW." in text
    for name in ("memory", "trainers"):
        assert f"Not measured yet: `python -m benchmarks {name}`." in text
    assert "None is here: `python -m srpo_kernels.verify --report DIR`" in gpu.read_text()
    for name in ("speed", "scaling", "accuracy"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 10_000
        assert "</svg>" in (tmp_path / "figures" / f"{name}.svg").read_text()

    case = Case("tiny", "jsd", 64)
    memory = ResultsFile(tmp_path / "memory.csv", CPU, threads=1)
    memory.add(
        [
            Measurement(case, "srpo_kernels", "peak_bytes", single(3 * 2**20)),
            Measurement(case, "trl", "peak_bytes", single(6 * 2**20)),
            Measurement(case, "naive", "peak_bytes", None, "killed"),
        ]
    )
    steps = ResultsFile(tmp_path / "trainers.csv", CPU, threads=1)
    for silent in (0.0, 0.5):
        values = {"seconds": (1.0, 2.0), "peak_bytes": (3 * 2.0**20, 4 * 2.0**20)}
        steps.add(
            Measurement(Step("grpo", silent), side, metric, single(value))
            for metric, pair in values.items()
            for side, value in zip(SIDES, pair, strict=True)
        )
    report(options)
    text = document.read_text()
    assert "| tiny (32 × 500), 64 rows, jsd, float32 | 3 | 6 (2.0×) |" in text
    assert "| GRPOTrainer, 2 × 4 completions | 50% | 2.00 | 1.00 (0.50×) | 4 | 3 (0.75×) |" in text


def test_memory_alone(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "memory.csv"
    providers = ["--providers", "srpo_kernels", "quack"]
    options = ["--head", "tiny", "--rows", "64", "--workloads", "jsd", "--device", "cpu", *providers, "--out", out]
    run("memory", *options)
    printed = capsys.readouterr().out
    assert "peak MiB" in printed
    assert "seconds" not in printed
    cells = read_csv(out).set_index(["provider", "metric"])
    assert cells.loc[("srpo_kernels", "peak_limit_bytes"), "median"] > 0
    assert cells.loc[("quack", "peak_bytes"), "reason"] == "needs a GPU"
    first = out.read_text()
    run("memory", *options, "--resume")
    assert out.read_text() == first


def test_a_provider_that_is_killed_for_want_of_memory_has_that_as_its_reason() -> None:
    with pytest.raises(Unsupported, match=r"killed: needs more than the machine's \d+ GiB"):
        in_fresh_process(signal.raise_signal, signal.SIGKILL)


def test_trainers_take_turns(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("trl", "1.16", reason="TRL's trainers are what ours is compared with")
    out = tmp_path / "trainers.csv"
    sizes = ["--sizes.layers", "1", "--sizes.vocab", "64", "--sizes.hidden", "16", "--sizes.length", "8"]
    options = [*sizes, "--branches", "grpo", "--rounds", "1", "--no-memory", "--threads", "1", "--out", out]
    run("trainers", *options, "--silent", "0")
    run("trainers", *options, "--silent", "0", "0.5", "--resume")
    cells = read_csv(out)
    assert cells.groupby("silent").size().to_dict() == {0.0: 2, 0.5: 2}
    assert (cells["median"] > 0).all()
    lines, _ = table(cells)
    assert lines["groups without a correct one"].tolist() == ["0%", "50%"]


def test_a_run_that_was_stopped_is_resumed(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "speed.csv"
    options = ["--heads", "tiny", "--providers", "srpo_kernels", "--rounds", "1", "--no-memory", "--device", "cpu"]
    run("speed", *options, "--softcap", "30", "--workloads", "policy", "routed", "--out", out)
    first = out.read_text()
    run("speed", *options, "--softcap", "30", "--workloads", "policy", "routed", "--resume", "--out", out)
    assert out.read_text() == first
    run("speed", *options, "--workloads", "routed", "--resume", "--out", out)
    both = out.read_text()
    assert both.startswith(first)
    assert len(read_csv(out)) > len(first.splitlines())
    run("speed", *options, "--softcap", "30", "--workloads", "routed", "--resume", "--out", out)
    assert out.read_text() == both


def test_a_report_without_results_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="run `python -m benchmarks speed` first"):
        report(Report(results=tmp_path, docs=tmp_path))


def test_an_unchanged_picture_is_an_unchanged_file(tmp_path: Path) -> None:
    case = {"head": "tiny", "workload": "jsd", "rows": 32, "dtype": "float32"} | environment(CPU, 1)
    cells = pd.DataFrame({**case, "provider": ["srpo_kernels", "trl"], "median": [1.0, 2.0]})
    for folder in ("first", "second"):
        pictures.save(pictures.speed(cells, ["tiny"], ["jsd"]), tmp_path / folder, "speed")
        pictures.save(pictures.memory(cells.assign(x=32.0, vocab_size=500)), tmp_path / folder, "memory")
    for name in ("speed.png", "speed.svg", "memory.png", "memory.svg"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_exponents_are_those_of_a_power_law() -> None:
    rows = [("rows", x, "ours", "seconds", 3.0 * x**1.5) for x in (10.0, 100.0, 1000.0)]
    rows += [("rows", 10.0, "theirs", "seconds", 1.0)]
    points = pd.DataFrame(rows, columns=["axis", "x", "provider", "metric", "median"])
    (fit,) = exponents(points).to_dict("records")
    assert (fit["axis"], fit["provider"], fit["metric"]) == ("rows", "ours", "seconds")
    assert fit["exponent"] == pytest.approx(1.5)


COMMANDS = ["speed", "memory", "accuracy", "scaling", "trainers", "objectives", "report", "cost"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_reads_well(command: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run(*filter(None, [command]), "--help")
    printed = capsys.readouterr().out
    assert all(word in printed for word in (["--"] if command else COMMANDS))


def test_rounds_rotate_and_quantiles_are_ordered() -> None:
    order: list[str] = []

    nothing = Result(*[torch.zeros(())] * 3, None)

    def step(name: str) -> Callable[[], Result]:
        def run() -> Result:
            order.append(name)
            return nothing

        return run

    steps = {name: step(name) for name in ("naive", "trl", "liger")}
    seconds = interleave(steps, Rounds(3, 60.0), CPU, lambda what: None)
    assert order == ["naive", "trl", "liger", "trl", "liger", "naive", "liger", "naive", "trl"]
    assert [len(times) for times in seconds.values()] == [3, 3, 3]
    assert len(interleave({"trl": step("trl")}, Rounds(9, 0.0), CPU, lambda what: None)["trl"]) == 3
    assert len(interleave({"trl": step("trl")}, Rounds(9, 0.0, fewest=1), CPU, lambda what: None)["trl"]) == 1
    assert quantiles([4.0, 1.0, 2.0, 3.0, 5.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))
