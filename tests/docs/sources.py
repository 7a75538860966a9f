"""Numbers in the prose of documents, and the sources that docs/numbers.toml names for them."""

from __future__ import annotations

import ast
import csv
import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
RESULTS = (ROOT / "benchmarks" / "results", ROOT / "studies" / "learning" / "results")
Entry = Mapping[str, Any]
KINDS = ("csv", "json", "code", "formula", "test", "measured", "defined", "unsourced")
# What one of the printed unit is in that of the source.
UNITS = {
    "%": 0.01,
    "ms": 1e-3,
    "GB": 1e9,
    "TB/s": 1e12,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
    "GiB of MiB": 1024.0,
    "bytes of fp32": 1 / 4,
    "MiB of fp32": 2.0**18,
    "fp32 of bytes": 4.0,
}
TAKE: Mapping[str, Callable[[list[float]], float]] = {
    "min": min,
    "max": max,
    "mean": statistics.fmean,
    "median": statistics.median,
}

_GENERATED = re.compile(r"<!-- (\S+) -->.*?<!-- /\1 -->|^( *)```.*?^\2```", re.DOTALL | re.MULTILINE)
# Code, where a link goes, headings; then numbers that are part of a name.
_NO_PROSE = (
    re.compile(r"(?<=\n\n)(?: {4}.*\n)+"),
    re.compile(r"`[^`]+`"),
    re.compile(r"\]\([^)]*\)|^\[[^\]]+\]: .*$", re.MULTILINE),
    re.compile(r"^#+ .*$", re.MULTILINE),
    re.compile(r"arXiv\s+\d{4}\.\d{5}"),
    re.compile(r"\b20\d\d\b"),
    re.compile(r"\blines? \d+(?: to \d+)?"),
    # Shapes and sizes: 576 × 49,152, H = 4,096.
    re.compile(r"(?<![\d.,])\d[\d,]*(?: × \d[\d,]*)+(?![\d.,]*\d)"),
    re.compile(r"\b[A-Z] = (?:\d[\d.,]*\d|\d)(?:e\d+)?(?! · 10)"),
    # Versions: 2.13.0, >= 2.10, < 3.9, TRL 1.16, torch 2.8 and 2.9.
    re.compile(r"\b\d+\.\d+\.\d+\b|[<>]=? [\d.]*\d"),
    re.compile(r"(?i)\b(?:cuda|numpy|python|torch|transformers|triton|trl|verl) \d+\.\d+(?! and [\d.]+ times)"),
)
_POWER = "[⁻⁰¹²³⁴-⁹]+"
_NUMBER = rf"[+−-]?(?:\d[\d,]*\d|\d)(?:\.\d+)?(?:e-?\d+)?(?:{_POWER})?(?: · 10{_POWER})?"
_MEASURE = r"(?:%|×|times\b|points\b|[KMGT]i?B\b|ms\b|s\b|seconds\b|minutes\b|hours\b|nats\b|TFLOP/s)"
_CLAIM = re.compile(rf"(?<![\w.,-])({_NUMBER})(?!\w)(?=((?:,? (?:to|and|or) [\d.,]*\d)*\s{_MEASURE})?)")
_DIGITS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹−", "-0123456789-")


class Claim(NamedTuple):
    """A number that needs a source: where it stands, and the line around it."""

    start: int
    end: int
    line: str


def prose(document: str) -> tuple[str, str]:
    """A document without generated blocks and fenced code, and the same without names and code.

    Both have the length of the document: what is left out is blank.
    """

    def blank(found: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", found.group())

    text = _GENERATED.sub(blank, document)
    words = text
    for pattern in _NO_PROSE:
        words = pattern.sub(blank, words)
    return text, words


def claims(words: str) -> list[Claim]:
    """Numbers with a unit, a fraction or an exponent, and those from 10 on."""
    found = []
    for match in _CLAIM.finditer(words):
        number, measure = match.groups()
        if measure or not re.fullmatch(r"[+−-]?\d", number):
            start, end = words.rfind("\n", 0, match.start()) + 1, words.find("\n", match.end())
            found.append(Claim(*match.span(1), words[start:end].strip()))
    return found


def places(fragment: str, text: str) -> list[tuple[int, int]]:
    """Where the numbers are that braces mark in a fragment, or the whole of it. It must occur exactly once."""
    pattern = r"\s+".join(map(re.escape, fragment.split())).replace(r"\{", "(").replace(r"\}", ")")
    found = list(re.finditer(pattern, text))
    if len(found) != 1:
        raise ValueError(f"occurs {len(found)} times")
    return list(found[0].regs[1:] or found[0].regs)


def printed(number: str) -> tuple[float, float]:
    """The value of a number as it is written, and half a unit of its last digit."""
    if power := re.fullmatch(rf"([−-]?)(\d+)({_POWER})", number):
        value = float(power[2]) ** int(power[3].translate(_DIGITS))
        return (-value if power[1] else value), value / 2
    mantissa, _, exponent = number.translate(_DIGITS).replace(",", "").replace(" · 10", "e").partition("e")
    decimals = len(mantissa.partition(".")[2])
    return float(f"{mantissa}e{exponent or 0}"), 0.5 * 10.0 ** (int(exponent or 0) - decimals)


@cache
def _rows(path: Path) -> Sequence[Mapping[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@cache
def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def constant(node: ast.AST, names: Mapping[str, Any]) -> Any:
    """What an expression of numbers and ``names`` is; None where it is anything else."""
    try:
        return eval(ast.unparse(node), {"__builtins__": {}, "field": lambda default=None, **_: default}, dict(names))
    except Exception:
        return None


@cache
def constants(path: Path) -> Mapping[str, Any]:
    """What a module and its classes assign names to, as far as those are numbers: nothing is imported."""
    found: dict[str, Any] = {}

    def walk(body: Sequence[ast.stmt], prefix: str) -> None:
        for statement in body:
            if isinstance(statement, ast.ClassDef):
                walk(statement.body, f"{statement.name}.")
            elif isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
                target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
                found[prefix + ast.unparse(target)] = constant(statement.value, found)

    walk(ast.parse(path.read_text()).body, "")
    return found


@cache
def literals(path: Path) -> frozenset[float]:
    """The numbers that a module's source has, as ``2.0**-22`` is one."""
    nodes = ast.walk(ast.parse(path.read_text()))
    values = (constant(node, {}) for node in nodes if isinstance(node, ast.Constant | ast.BinOp | ast.UnaryOp))
    return frozenset(float(value) for value in values if type(value) in (int, float))


def _file(name: str) -> Path:
    return next((folder / name for folder in RESULTS if (folder / name).exists()), RESULTS[0] / name)


def measured() -> Mapping[str, float]:
    """What was measured by hand, by its name."""
    return {row["name"]: float(row["value"]) for row in _rows(_file("measured.csv"))}


def _of_rows(path: Path, where: Mapping[str, str], column: str, take: str | None) -> float:
    rows = [row for row in _rows(path) if all(row[name] == value for name, value in where.items())]
    if take == "count":
        return len(rows)
    # The reason of a number that is missing may have one: needs about 28 GiB.
    found = [re.search(r"-?\d[\d.]*(?:e[+-]?\d+)?", row[column]) for row in rows]
    values = [float(match.group()) for match in found if match]
    if take is None and len(values) != 1:
        raise ValueError(f"{len(values)} rows of {path.name} have {dict(where)}")
    return values[0] if take is None else TAKE[take](values)


def _of_json(path: Path, keys: Sequence[str]) -> float:
    value = _json(path)
    for key in keys:
        value = value[key]
    return float(value)


def _result(entry: Entry, place: str, column: str) -> float:
    """What a file of results has where an entry says, or at the change of that place that ``minus`` or ``per`` is."""
    if "json" in entry:
        return _of_json(_file(entry["json"]), entry[place].split("/"))
    where = {**entry["where"], **entry[place]}
    return _of_rows(_file(entry["csv"]), where, column, entry.get("take"))


def values(entry: Entry) -> list[float]:
    """The numbers that the source of an entry has, in the unit that the document prints."""
    if "csv" in entry or "json" in entry:
        found = []
        for column in entry.get("column", "median").split(", "):
            less = _result(entry, "minus", column) if "minus" in entry else 0.0
            divisor = _result(entry, "per", column) if "per" in entry else 1.0
            found.append((_result(entry, "where", column) - less) / divisor)
    elif "code" in entry:
        path, _, names = entry["code"].partition(":")
        found = [float(constants(ROOT / path)[name]) for name in names.split(", ")]
    elif "measured" in entry:
        found = [measured()[name] for name in entry["measured"].split(", ")]
    else:
        found = [eval(formula, {"__builtins__": {}}, dict(measured())) for formula in entry["formula"].split(", ")]
    return [value / UNITS[entry["unit"]] for value in found] if "unit" in entry else found


def _compare(entry: Entry, numbers: Sequence[str]) -> str | None:
    """What an entry's source says of the numbers that its fragment marks."""
    path = ROOT / str(entry.get("test", entry.get("code"))).partition(":")[0]
    if "test" in entry and f"def {entry['test'].rpartition('::')[2]}(" not in path.read_text():
        return f"there is no {entry['test']}"
    if "test" in entry or ("code" in entry and ":" not in entry["code"]):
        missing = [number for number in numbers if not literals(path) & {printed(number)[0], -printed(number)[0]}]
        return f"{path.name} has no {', '.join(missing)}" if missing else None
    expected = values(entry)
    if len(numbers) != len(expected):
        return f"marks {len(numbers)} numbers, its source has {len(expected)}"
    for number, value in zip(numbers, expected, strict=True):
        wanted, half = printed(number)
        if abs(wanted - value) > half * (1 + 1e-6):
            return f"says {number}, its source {value:.6g}"
    return None


def fault(entry: Entry, text: str) -> str | None:
    """What is wrong with an entry of the document ``text``; None where its source says the same."""
    kinds = [kind for kind in KINDS if kind in entry]
    if len(kinds) != 1 or not entry[kinds[0]]:
        return f"must name one source, names {kinds}"
    try:
        spans = places(entry["text"], text)
        numbers = [text[start:end] for start, end in spans] if "{" in entry["text"] else []
        if kinds[0] in ("defined", "unsourced"):
            return None
        return _compare(entry, numbers)
    except (ArithmeticError, LookupError, NameError, OSError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def faults(document: str, entries: Sequence[Entry]) -> list[str]:
    """What is wrong with a document: entries whose source is another or whose fragment is gone, and other numbers."""
    text, words = prose(document)
    found: list[str] = []
    covered: list[tuple[int, int]] = []
    for entry in entries:
        if (what := fault(entry, text)) is None:
            covered += places(entry["text"], text)
        else:
            found.append(f"{entry['text']!r}: {what}")
    for start, end, line in claims(words):
        if not any(first <= start and end <= last for first, last in covered):
            found.append(f"{words[start:end]} has no source: {line}")
    return found
