"""What reports say, in words and figures, for whoever shows them: on the console, on a page.

Rows are texts: a label, before, after, the change. Nodes are grouped by what is said of them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from onnxc.bench import Ratio
from onnxc.check import Comparison
from onnxc.execution import Execution
from onnxc.few_bits import is_in_float
from onnxc.fidelity import SQNR_CAP
from onnxc.report import Report, Validation

Row = tuple[str, ...]


def measures(report: Report | Validation) -> Iterator[Row]:
    """Before, after and change of all that was measured."""
    yield from _cost_rows(report)
    yield from _zeros_rows(report)
    yield from _quality_rows(report.comparison)
    yield from _execution_rows(report.execution)
    if isinstance(report, Validation):
        yield from _error_rows(report.comparison)
    if report.coverage is not None and report.coverage.total:
        yield "integer kernels", "", f"{report.coverage.integer} of {report.coverage.total}", ""


def _cost_rows(report: Report | Validation) -> Iterator[Row]:
    before, after = report.before, report.after
    shrink = f"{before.bytes / max(after.bytes, 1):.2f}x"
    yield "file", size_text(before.bytes), size_text(after.bytes), shrink
    if before.macs and after.macs and before.macs != after.macs:
        saved = f"{before.macs / after.macs:.2f}x"
        yield "MACs", count_text(before.macs), count_text(after.macs), saved
    if before.latency and after.latency:
        ratio = spread(report.speedup) if report.speedup else ""
        yield "latency p50", f"{before.latency.p50:.3f} ms", f"{after.latency.p50:.3f} ms", ratio
    if before.opening and after.opening:
        yield "time to load", f"{before.opening.ms:.0f} ms", f"{after.opening.ms:.0f} ms", ""
        held = [x.opening.memory for x in (before, after) if x.opening]
        if None not in held:
            yield "memory loaded", *(size_text(x or 0) for x in held), ""


def _zeros_rows(report: Report | Validation) -> Iterator[Row]:
    if not isinstance(report, Report) or report.zeros is None:
        return
    before, after = report.zeros
    yield "zero weights", percent(before.share), percent(after.share), ""
    shrink = f"{before.coded / max(after.coded, 1):.2f}x"
    yield "with zeros coded", size_text(before.coded), size_text(after.coded), shrink


def spread(ratio: Ratio) -> str:
    return f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def _quality_rows(comparison: Comparison | None) -> Iterator[Row]:
    if comparison is None:
        return
    for label, pair in (("top-1", comparison.top1), ("top-5", comparison.top5)):
        if pair:
            change = f"{100 * (pair[1] - pair[0]):+.2f} points"
            bounds = comparison.change_interval if label == "top-1" else None
            yield label, percent(pair[0]), percent(pair[1]), change + _bounds(bounds)
    if comparison.perplexity:
        first, second = comparison.perplexity
        yield "perplexity", f"{first:.3f}", f"{second:.3f}", f"{second - first:+.3f}"
    if comparison.agreement is not None:
        yield "agreement", "", percent(comparison.agreement), ""
    yield "SQNR", "", f"{comparison.sqnr:.1f} dB", ""


def _execution_rows(execution: Execution | None) -> Iterator[Row]:
    if execution is not None and execution.failure:
        yield "SQNR, not optimized", "", "not known", ""
    if execution is None or execution.plain is None or execution.moved is None:
        return
    is_equal = execution.moved >= SQNR_CAP
    moved = "as optimized" if is_equal else f"{execution.moved:.1f} dB to the optimized run"
    yield "SQNR, not optimized", "", f"{execution.plain:.1f} dB", moved


def _bounds(interval: tuple[float, float] | None) -> str:
    """Between which points a change lies with 95 % confidence, in brackets."""
    return "" if interval is None else " ({:+.2f} to {:+.2f})".format(*(100 * x for x in interval))


def _error_rows(comparison: Comparison) -> Iterator[Row]:
    yield "cosine", "", f"{comparison.cosine:.5f}", ""
    yield "largest error", "", f"{comparison.max_abs_error:.3g}", ""


def left_alone(report: Report | Validation) -> Iterator[tuple[str, str]]:
    """Nodes that were left alone, or heavy ones that run in float, each with the reason.

    That is the reason of the pass that left it, if it gave one.
    """
    coverage, skips = report.coverage, report.skips if isinstance(report, Report) else ()
    if coverage is None:
        yield from ((skip.node, skip.reason) for skip in skips)
        return
    weights_alone = isinstance(report, Report) and is_in_float(report.way)
    reasons = {skip.node: skip.reason for skip in reversed(skips)}
    for kernel in coverage.left_float:
        own = kernel.reason.removesuffix(", which is left in float")
        told = "only weights are stored in few bits" if weights_alone else reasons.get(kernel.node)
        yield kernel.node, told or own


def zeros_notes(report: Report) -> Iterator[str]:
    """What zeros are good for, and what not."""
    if report.zeros is None:
        return
    bits = report.zeros[1].bits
    yield (
        f"the file holds its zeros as any other value: with zeros coded is an estimate, {bits:.2f} "
        "bits a weight for where they lie and all bits of the others"
    )
    yield "stock runtimes multiply by zeros too: no speed is gained from them"


def compared(report: Report) -> tuple[str, ...]:
    """What of the outputs is not compared."""
    return () if report.comparison is None else report.comparison.notes


def untold(report: Report) -> Iterator[str]:
    """How many nodes were left alone besides the heavy ones, which are told by their kernels."""
    if report.coverage is None:
        return
    told = {k.node for k in report.coverage.left_float} | {c.node for c in report.changes}
    rest = {skip.node for skip in report.skips} - told
    if rest:
        yield f"left alone besides: {nodes_text(len(rest))} with little to gain; --json names them"


def kind_of(what: str) -> str:
    """What a change is, without names and figures: equal ones count as one."""
    text = re.sub(r",? -?[\d.]+ (dB|scales)|, [\d.]+ % .*|^\S+ (?=int\d)| by up to .*", "", what)
    return re.sub(r"(?<=^shares ).*", "the weight of another node", text)


def by_reason(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Nodes by what is said of them, the most frequent first."""
    groups: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for node, reason in pairs:
        groups[reason][node] = None
    order = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [(reason, list(nodes)) for reason, nodes in order]


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def nodes_text(count: int) -> str:
    """How many nodes: "1 node"."""
    return f"{count} node{'s'[: count != 1]}"


def size_text(count: int) -> str:
    """Bytes in words: "13.9 MB" (powers of 1000)."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def count_text(count: int) -> str:
    """A large count: "3.5 M"."""
    return _scaled(count, ("", "k", "M", "G", "T")).rstrip()


def _scaled(count: int, units: tuple[str, ...]) -> str:
    power = min(len(units) - 1, (len(str(abs(count))) - 1) // 3)
    number = f"{count}" if power == 0 else f"{count / 1000**power:.1f}"
    return f"{number} {units[power]}"
