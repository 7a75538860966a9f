"""A report in tables of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from srpo_kernels.verify.kinds import OURS

_SMALL = "Small sizes: they show that everything runs here, and no time is a GPU's."
_Sections = dict[str, dict[str, Any]]


def markdown(content: dict[str, Any]) -> str:
    """All of ``report.json``."""
    identity, found = content["identity"], failures(content)
    lines = [f"# srpo_kernels on {identity['device']}", "", *([_SMALL, ""] if identity["sizes"] == "small" else [])]
    done = [name for name, section in content["sections"].items() if section["state"] == "done"]
    lines.append(f"{len(done)} sections done; missing: {', '.join(content['missing']) or 'none'}.")
    lines += ["", *(f"- **failed** {line}" for line in found or ["nothing"])]
    for title, body in tables(content).items():
        lines += ["", f"## {title}", "", body]
    return "\n".join(lines) + "\n"


def tables(content: dict[str, Any]) -> dict[str, str]:
    """The parts of the report that are there, by their titles."""
    results = {name: x["result"] for name, x in content["sections"].items() if x["state"] == "done"}
    parts = {
        "Environment": _environment(results["environment"]) if "environment" in results else "",
        "Products": _products(results["products"]) if "products" in results else "",
        "Parity": _checks(results, "parity"),
        "Repeated runs": _checks(results, "determinism"),
        "Row passes": _row_passes(results["row passes"]) if "row passes" in results else "",
        "Steps": steps_table(content),
        "Kernels": _kernels(content["kernels"].values()),
    }
    return {title: body for title, body in parts.items() if body}


def failures(content: dict[str, Any]) -> list[str]:
    """A line for everything that did not hold; what a peer cannot do is no failure."""
    lines = []
    for name, section in content["sections"].items():
        if section["state"] == "failed":
            lines.append(f"{name}: {section['message']}")
        for group in _groups(section):
            lines += [f"{name}: {_failed_check(check)}" for check in group["failed"]]
        if name.startswith("step") and section["state"] == "done":
            providers = section["result"]["providers"]
            lines += [f"{name}: {x}: {providers[x]['reason']}" for x in OURS if providers[x].get("failed")]
    return lines


def steps_table(content: dict[str, Any]) -> str:
    """A line for each whole step, a column for each provider that has a number; empty where no step was measured."""
    sections = content["sections"].items()
    steps = [x["result"] for name, x in sections if name.startswith("step") and x["state"] == "done"]
    if not steps:
        return ""
    names = list(steps[0]["providers"])
    ran = [x for x in names if x != "bare" and any("seconds" in step["providers"][x] for step in steps)]
    rows = []
    for step in steps:
        providers = step["providers"]
        bare = providers["bare"].get("seconds", {}).get("median")
        rows.append(
            [
                f"{step['name']}, {step['hidden_size']:,} × {step['vocab_size']:,}, {step['rows']:,} rows",
                _number(bare, 1e3, ".3g"),
                _number(step["seconds_at_peak"], 1e3, ".3g"),
                _number(_rate(step, "bare"), 1e-12, ".3g"),
                *(_cell(providers[name]) for name in ran),
            ]
        )
    caption = (
        "Forward and backward to dX and dW: time as a multiple of the bare matmuls / extra peak memory in MiB; medians "
        "of rounds in which all take turns. At peak: matmuls and memory traffic of `srpo_loss`, one after the other, "
        "at the data sheet's rates."
    )
    header = ["step", "bare, ms", "at peak, ms", "bare, TFLOP/s", *(f"`{name}`" for name in ran)]
    reasons = {
        name: sorted({why for step in steps if (why := step["providers"][name].get("reason"))}) for name in names
    }
    without = "; ".join(f"`{name}`: {', '.join(whys)}" for name, whys in reasons.items() if whys)
    return f"{caption}\n\n{_table(header, rows)}" + (f"\n\nWithout a number: {without}." if without else "")


def _cell(provider: dict[str, Any]) -> str:
    if "seconds" not in provider:
        return "–"
    return f"{_number(provider.get('ratio_to_bare', {}).get('median'), 1.0, '.2f')} / " + _number(
        provider.get("peak_mib"), 1.0, ",.0f"
    )


def _rate(step: dict[str, Any], provider: str) -> float | None:
    """FLOP per second of the matmuls that no provider can avoid."""
    seconds = step["providers"][provider].get("seconds", {}).get("median")
    return None if seconds is None else step["work"]["flop"] / seconds


def _environment(found: dict[str, Any]) -> str:
    peers = found["peers"]
    lines = {
        "device": f"{found['device']['name']} ({found['device']['type']})",
        "properties": _pairs(found["properties"]),
        "driver": found["driver"],
        "versions": _pairs(found["versions"]),
        "peers": _pairs(peers),
        "backends": ", ".join(found["backends"]) + (" (Triton's interpreter)" if found["interpreted"] else ""),
        "dtypes": ", ".join(found["dtypes"]),
        "fp32 matmuls": f"torch.set_float32_matmul_precision({found['float32_matmul_precision']!r})",
        **{f"no {name}": reason for name, reason in found["absent"].items()},
    }
    return _table(["what", "found"], [[name, str(x)] for name, x in lines.items() if x])


def _products(found: dict[str, Any]) -> str:
    answers = "\n".join(f"- {name}: {answer}" for name, answer in found["answers"].items())
    kinds = list(found["rates"][0]["flop_per_second"])
    rows = [
        [
            x["dtype"],
            f"{x['hidden_size']:,} × {x['vocab_size']:,}",
            f"{x['rows']:,}",
            *(_number(x["flop_per_second"][kind], 1e-12, ".3g") for kind in kinds),
        ]
        for x in found["rates"]
    ]
    caption = f"TFLOP/s with an fp32 result; what is timed of dW adds to it. A copy moves {_rate_text(found)}."
    return f"{answers}\n\n{caption}\n\n{_table(['dtype', 'head', 'rows', *kinds], rows)}"


def _rate_text(found: dict[str, Any]) -> str:
    return f"{_number(found['copy_bytes_per_second'], 1e-9, ',.0f')} GB/s"


def _row_passes(found: Sequence[dict[str, Any]]) -> str:
    kinds = list(found[0]["bytes_per_second"])
    rows = [
        [x["backend"], x["kind"], f"{x['vocab_size']:,}", f"{x['rows']:,}"]
        + [_number(x["bytes_per_second"][kind], 1e-9, ",.3g") for kind in kinds]
        for x in found
    ]
    caption = "GB/s, counting what the Triton kernels have to move; the torch backend moves more."
    return f"{caption}\n\n{_table(['backend', 'of', 'V', 'rows', *kinds], rows)}"


def _groups(section: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Summaries of checks, where a section has some."""
    result = section.get("result")
    if isinstance(result, list):
        yield from (x for x in result if "checks" in x)


def _checks(results: dict[str, Any], kind: str) -> str:
    groups = [x for result in results.values() for x in _groups({"result": result}) if x["kind"] == kind]
    dtypes = list(dict.fromkeys(x["dtype"] for x in groups))
    rows = []
    for backend, op in dict.fromkeys((x["backend"], x["op"]) for x in groups):
        own = [x for x in groups if (x["backend"], x["op"]) == (backend, op)]
        rows.append([backend, op, *(_worst([x for x in own if x["dtype"] == dtype], kind) for dtype in dtypes)])
    if not rows:
        return ""
    caption = {
        "parity": "Checks: the worst error over what is allowed, which is twice the error of plain torch with fp32 "
        "logits, and a few fp32 roundings (fp64: 1e-9), of gradients also those of dlogits in bf16. Errors are from "
        "plain torch in fp64 on the CPU.",
        "determinism": "Checks of the same call several times: every result and gradient the same to the last bit.",
    }[kind]
    return f"{caption}\n\n{_table(['backend', 'function', *dtypes], rows)}"


def _worst(groups: Sequence[dict[str, Any]], kind: str) -> str:
    if not groups:
        return "–"
    count, failed = sum(x["checks"] for x in groups), sum(len(x["failed"]) for x in groups)
    if failed:
        return f"{count}: **{failed} failed**"
    return f"{count}: " + (f"{max(x['worst'] for x in groups):.2f}" if kind == "parity" else "same bits")


def _failed_check(check: dict[str, Any]) -> str:
    place = f"{check['op']}, {check['group']}: {check['case']}, {check['backend']}, {check['dtype']}"
    if check["message"] is not None:
        return f"{place}: {check['message']}"
    return f"{place}: {check['tensor']} is off by {check['error']}, allowed {check['allowed']}"


def _kernels(kernels: Iterable[dict[str, Any]]) -> str:
    by_name: dict[str, list[dict[str, Any]]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel["kernel"], []).append(kernel)
    fields = ("registers", "spills", "shared_bytes", "warps", "warps_per_multiprocessor")
    rows = [
        [name, str(len(members)), *(_range([x[field] for x in members]) for field in fields)]
        for name, members in by_name.items()
    ]
    return _table(["kernel", "compiled", *(field.replace("_", " ") for field in fields)], rows) if rows else ""


def _range(values: Sequence[int | None]) -> str:
    known = sorted({x for x in values if x is not None})
    return "–" if not known else f"{known[0]:,}" if len(known) == 1 else f"{known[0]:,} to {known[-1]:,}"


def _number(value: float | None, unit: float, form: str) -> str:
    return "–" if value is None else f"{value * unit:{form}}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
