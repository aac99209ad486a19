"""Figures and tables from what benchmarks/decode.py measured: no measuring here.

A ratio of two contenders is taken round by round (they were measured next to each other) and its median reported.
Against llama.cpp's variants (attention fused or not, weights repacked or not) memwall is compared with the best variant
of each row.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Any

DECODE_RATIO = 1.3
BANDWIDTH_SHARE = 0.75
PREFILL_RATIO = 0.8
QUIET_SHARE = 0.05


def bytes_per_step(model: dict[str, Any], contender: dict[str, Any], context: int) -> float:
    """Bytes one decoded token must read: every matrix once and the cache so far (norms, activations left out)."""
    weight_bytes = model["num_matrix_weights"] * contender["weight_bits"] / 8
    return weight_bytes + context * model["kv_values_per_token"] * contender["kv_bytes_per_value"]


def bandwidth_shares(model: dict[str, Any], contender: dict[str, Any], context: str) -> list[float]:
    moved_bytes = bytes_per_step(model, contender, int(context))
    pairs = zip(contender["decode"][context], contender["bandwidth"][context], strict=True)
    return [rate * moved_bytes / bandwidth for rate, bandwidth in pairs]


def best_peer(model: dict[str, Any], values, *, largest: bool = True) -> tuple[str, Any] | None:
    """The llama.cpp variant with the best median of `values(contender)`; None when none ran."""
    ran = {name: values(found) for name, found in measured(model).items() if name.startswith("llama.cpp")}
    if not ran:
        return None
    chosen = (max if largest else min)(ran, key=lambda name: _middle(ran[name]))
    return chosen, ran[chosen]


def measured(model: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: found for name, found in model["contenders"].items() if "not_run" not in found}


def wanted_rows(model: dict[str, Any]) -> list[dict[str, Any]]:
    """What the project asks of itself on this benchmark, each with what was measured and whether it holds."""
    own = measured(model).get("memwall")
    if own is None:
        return [_row("memwall runs", "it did not", "it does", passed=False)]
    rows = []
    for context in own["decode"]:
        peer = best_peer(model, lambda found, context=context: found["decode"][context])
        if peer:
            ratios = _ratios(own["decode"][context], peer[1])
            rows.append(_ratio_row(f"decode at context {context}, times {peer[0]}", ratios, DECODE_RATIO))
        shares = bandwidth_shares(model, own, context)
        rows.append(_ratio_row(f"decode at context {context}, share of read bandwidth", shares, BANDWIDTH_SHARE))
    peer = best_peer(model, lambda found: found["prefill"])
    if peer:
        rows.append(_ratio_row(f"prefill, times {peer[0]}", _ratios(own["prefill"], peer[1]), PREFILL_RATIO))
    runtime_bytes = runtime_row_bytes(own)
    for context in own["decode"]:
        peak_bytes = peak(own, context)
        peer = best_peer(model, lambda found, context=context: peak(found, context), largest=False)
        if peer:
            allowed = peer[1] + runtime_bytes
            rows.append(
                _row(
                    f"peak resident set up to context {context}",
                    _megabytes(peak_bytes),
                    f"<= {_megabytes(allowed)} ({peer[0]} {_megabytes(peer[1])} + runtime {_megabytes(runtime_bytes)})",
                    passed=peak_bytes <= allowed,
                )
            )
    return rows


def peak(contender: dict[str, Any], context: str) -> int:
    return contender["memory"][f"context_{context}"]["peak_bytes"]


def runtime_row_bytes(contender: dict[str, Any]) -> int:
    """The ledger's row for interpreter and libraries."""
    last = list(contender["memory"].values())[-1]
    return sum(size for owner, size in last.get("ledger", {}).items() if owner.split("/")[0] == "runtime")


def agreement(contenders: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Cosine of each contender's logits with the most exact one's: low means that it ran another model.

    Takes the logits out of the records, which are kept.
    """
    ran = {name: found.pop("check_logits") for name, found in contenders.items() if "check_logits" in found}
    if not ran:
        return {}
    reference = ran[max(ran, key=lambda name: contenders[name]["weight_bits"])]["logits"]
    return {name: _cosine(check["logits"], reference) if check["finite"] else 0.0 for name, check in ran.items()}


def markdown(result: dict[str, Any]) -> str:
    machine, settings = result["hardware"], result["settings"]
    lines = [
        "# Decode, prefill, memory and start-up beside llama.cpp and transformers",
        "",
        f"{result['date']}; {machine['cpu']}, {machine['cores']} cores ({', '.join(machine['vector'])}), "
        f"{_gigabytes(machine['memory_bytes'])}; {machine['system']}; {settings['threads']} threads; "
        f"other processes took {result['others_share']:.0%} of the processors. "
        f"Medians over {settings['rounds']} alternating rounds, smallest and largest in brackets. MB = 10^6 bytes.",
        "",
    ]
    if result["others_share"] > QUIET_SHARE:
        lines += ["**The machine was not quiet: these figures only show that the benchmark runs.**", ""]
    for name, model in result["models"].items():
        lines += _model_section(name, model, settings)
    return "\n".join(lines) + "\n"


def _model_section(name: str, model: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    shape, ran = model["shape"], measured(model)
    lines = [
        f"## Llama {name}: {model['num_matrix_weights'] / 1e6:,.0f} million weights",
        "",
        f"{shape['num_layers']} layers, hidden {shape['hidden']}, {shape['num_heads']} heads, "
        f"{shape['num_kv_heads']} KV heads, intermediate {shape['intermediate']}, vocabulary {shape['vocab']:,}, tied; "
        "random weights.",
        "",
    ]
    bandwidths = [value for found in ran.values() for values in found["bandwidth"].values() for value in values]
    if bandwidths:
        measure = ", ".join(model["bandwidth_measure"].values())
        spread = _spread([value / 1e9 for value in bandwidths])
        lines += [f"Read-only memory bandwidth in the same run: {spread} GB/s ({measure}).", ""]
    lines += [*_table(["", *ran], _measure_rows(model, settings)), ""]
    for contender, found in ran.items():
        lines.append(f"- {contender}: {found['about']['version']}; {found['about']['settings']}")
    for contender, found in model["contenders"].items():
        if "not_run" in found:
            lines.append(f"- {contender}: not run: {found['not_run']}")
    ledger = _ledger_text(ran.get("memwall"))
    lines += ["", *([ledger, ""] if ledger else [])]
    verdicts = [
        [row["claim"], row["measured"], row["required"], "pass" if row["passed"] else "FAIL"] for row in model["wanted"]
    ]
    return lines + _table(["wanted", "measured", "required", ""], verdicts) + [""]


def _measure_rows(model: dict[str, Any], settings: dict[str, Any]) -> list[list[str]]:
    ran = measured(model)
    rows = []
    for context in map(str, settings["contexts"]):
        rows.append(
            [f"decode at context {context}, tokens/s", *(_spread(found["decode"][context]) for found in ran.values())]
        )
        shares = (median(bandwidth_shares(model, found, context)) for found in ran.values())
        rows.append(["- share of read bandwidth", *(f"{share:.0%}" for share in shares)])
    rows.append(
        [f"prefill of {settings['prefill_tokens']}, tokens/s", *(_spread(found["prefill"]) for found in ran.values())]
    )
    last = str(settings["contexts"][-1])
    for context in {str(settings["contexts"][0]): None, last: None}:
        title = f"peak resident up to context {context}, MB"
        rows.append([title, *(f"{peak(found, context) / 1e6:,.0f}" for found in ran.values())])
    before = (found["memory"]["before_load"]["peak_bytes"] for found in ran.values())
    rows.append(["- of which before loading, MB", *(f"{size / 1e6:,.0f}" for size in before)])
    kinds = (found["memory"][f"context_{last}"] for found in ran.values())
    rows.append(
        [
            "- anonymous / file at the end, MB",
            *(f"{k['anonymous_bytes'] / 1e6:,.0f} / {k['file_bytes'] / 1e6:,.0f}" for k in kinds),
        ]
    )
    starts = (found.get("startup_seconds") for found in ran.values())
    rows.append(["start-up to first token, s", *(_spread(values, digits=2) if values else "-" for values in starts)])
    rows.append(["logits, cosine with the most exact", *(f"{model['agreement'][name]:.3f}" for name in ran)])
    return rows


def _ledger_text(own: dict[str, Any] | None) -> str:
    if own is None:
        return ""
    last = list(own["memory"].values())[-1].get("ledger", {})
    rows = ", ".join(f"{owner} {_megabytes(size)}" for owner, size in last.items())
    return f"memwall's ledger at the end: {rows}." if rows else ""


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def _ratio_row(claim: str, ratios: list[float], required: float) -> dict[str, Any]:
    return _row(claim, _spread(ratios, digits=2), f">= {required:g}", passed=median(ratios) >= required)


def _row(claim: str, measured_text: str, required: str, *, passed: bool) -> dict[str, Any]:
    return {"claim": claim, "measured": measured_text, "required": required, "passed": passed}


def _ratios(own: list[float], peer: list[float]) -> list[float]:
    return [mine / theirs for mine, theirs in zip(own, peer, strict=False)]


def _middle(values: Any) -> float:
    return median(values) if isinstance(values, list) else values


def _spread(values: list[float], *, digits: int = 1) -> str:
    return f"{median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def _cosine(left: list[float], right: list[float]) -> float:
    product = sum(a * b for a, b in zip(left, right, strict=True))
    return product / math.sqrt(sum(a * a for a in left) * sum(b * b for b in right))


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
