from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import srpo_kernels

ROOT = Path(__file__).parents[2]

NEW_PACKAGES = """
import sys
import srpo_kernels
assert "torch" not in sys.modules
import torch
before = set(sys.modules)
srpo_kernels.srpo_loss
packages = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(packages - set(sys.stdlib_module_names)))
"""


def run_python(*arguments: str, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(cwd)}
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout


def test_importing_it_needs_torch_alone_and_that_with_the_first_name() -> None:
    # Modules of torch itself that `import torch` leaves for later are no other package.
    assert set(run_python("-c", NEW_PACKAGES, cwd=ROOT).split()) <= {"srpo_kernels", "torch"}


@pytest.mark.parametrize("package", ["trl", "verl"])
def test_an_integration_without_its_package_names_the_extra(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import srpo_kernels.integrations.{package}"
    with pytest.raises(subprocess.CalledProcessError) as failure:
        run_python("-c", code, cwd=ROOT)
    last = failure.value.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ") and f"pip install 'srpo-kernels[{package}]'" in last


def test_public_names_exist() -> None:
    assert all(hasattr(srpo_kernels, name) for name in srpo_kernels.__all__)
    assert set(srpo_kernels.__all__) <= set(dir(srpo_kernels))
    names: dict[str, object] = {}
    exec("from srpo_kernels import *", names)
    assert set(srpo_kernels.__all__) <= set(names)
    with pytest.raises(AttributeError, match="no attribute 'srpo_los'"):
        _ = srpo_kernels.srpo_los


def test_a_name_that_is_missing_puts_no_other_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(srpo_kernels, "srpo_loss", "of a test")
    assert not hasattr(srpo_kernels, "srpo_los")
    assert srpo_kernels.srpo_loss == "of a test"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a checkout's sdist is built into, as a build front end does it."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "runs")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    build = "from setuptools import build_meta; build_meta.build_{}('.')"
    run_python("-c", build.format("sdist"), cwd=source)
    (sdist,) = source.glob("*.tar.gz")
    with tarfile.open(sdist) as files:
        files.extractall(sdist.parent, filter="data")
    unpacked = source / sdist.name.removesuffix(".tar.gz")
    run_python("-c", build.format("wheel"), cwd=unpacked)
    (path,) = unpacked.glob("*.whl")
    return path


def test_the_wheel_has_the_library_its_types_and_the_oracle_alone(wheel: Path) -> None:
    files = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    modules = {path for path in files if not path.parts[0].endswith(".dist-info")}
    library = {path.relative_to(ROOT) for path in (ROOT / "srpo_kernels").rglob("*.py")}
    oracle = {Path("srpo_kernels_reference", path.name) for path in (ROOT / "reference").glob("*.py")}
    assert modules == library | oracle | {Path("srpo_kernels/py.typed")}


def test_what_is_uploaded_has_no_link_of_a_checkout_and_no_test(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        (metadata,) = (name for name in files.namelist() if name.endswith("/METADATA"))
        text = files.read(metadata).decode().partition("\n\n")[2]
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links and all(link.startswith("https://") for link in links)
    assert not {"README.md", "benchmarks", "docs", "tests"} & {path.name for path in wheel.parent.iterdir()}


def test_the_readmes_first_lines_run_on_the_wheel_and_torch_alone(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    readme = (ROOT / "README.md").read_text()
    lines = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)[0]
    shown = readme.partition(lines)[2].split("```\n")[2]
    others = ("reference", "rich", "transformers", "triton", "trl", "tyro", "verl")
    (tmp_path / "first.py").write_text(f"import sys\nsys.modules |= dict.fromkeys({others})\n{lines}")
    assert run_python("first.py", cwd=tmp_path) == shown


def test_an_installed_wheel_verifies_itself(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("rich", reason="a command prints with rich: the extras verify and bench have it")
    pytest.importorskip("tyro", reason="a command reads its options with tyro: the extras verify and bench have it")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    where = "import srpo_kernels, srpo_kernels_reference as r; print(srpo_kernels.__file__, r.__file__)"
    assert all(path.startswith(str(tmp_path)) for path in run_python("-c", where, cwd=tmp_path).split())
    options = ("--device", "cpu", "--backend", "torch", "--quick", "--no-timing", "--only", "reduction")
    assert "PASS" in run_python("-m", "srpo_kernels.verify", *options, cwd=tmp_path)
