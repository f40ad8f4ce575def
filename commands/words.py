"""Results as lines for people: what verbs print without ``--json``."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from ..core.statistics import Agreement

if TYPE_CHECKING:
    from ..loop.doctor.probe import Finding

TURNS = 12
"""The most turns of the table by turn that are shown."""


def run_words(result: Mapping[str, Any]) -> str:
    """``result.json`` in about ten lines."""
    base, final, compared = result["base"], result["final"], result["comparison"]
    low, high = compared["interval"]
    lines = [
        f"{compared['verdict']}: {rate_words(final)}, before {rate_words(base)}",
        f"difference {100 * compared['difference']:+.1f} points "
        f"[{100 * low:+.1f}, {100 * high:+.1f}], p = {compared['p_value']:.2g} "
        f"({compared['test']})",
    ]
    if result["stopped"]:
        lines.append(f"stopped {result['stopped']}")
    for number, phase in enumerate(result["phases"], 1):
        after = phase["comparison"]
        lines.append(
            f"phase {number}, {phase['trainer']}, {phase['iterations']} iterations: "
            f"{rate_words(phase['final'])}, {100 * after['difference']:+.1f} points, "
            f"p = {after['p_value']:.2g}, {after['verdict']}"
        )
    tables: Mapping[str, Any] | None = result["introspection"]
    if tables:
        lines += table_words([("before", tables["base"]), ("after", tables["final"])])
    lines.append(
        f"{result['wall_s']:.0f} s in all; training took {result['environment_steps']:,} "
        f"environment steps, {result['tokens_sampled']:,} tokens sampled, "
        f"{result['tokens_trained']:,} trained"
    )
    return "\n".join(lines)


def evaluation_words(summary: Mapping[str, Any]) -> str:
    """An evaluation without its results, as ``evaluate`` returns it."""
    (low, high), invalid = summary["interval"], summary["invalid_share"]
    lines = [
        f"{summary['checkpoint']} in {summary['environment']['use']}, {summary['split']}: "
        f"{summary['successes']} of {summary['tasks']} solved, {summary['success_rate']:.1%} "
        f"[{low:.1%}, {high:.1%}]",
        f"{summary['failed']} failed{names(summary['failures'])}, "
        f"{summary['undecided']} undecided, "
        f"{summary['mean_steps']:.1f} steps and a reward of {summary['mean_reward']:.3f} on average"
        + (f", {invalid:.1%} of steps no action" if invalid else ""),
    ]
    within: Sequence[float] = summary["success_by_turn"]
    if len(within) > 1:
        step = -(-len(within) // TURNS)
        shown = [*range(step, len(within), step), len(within)]
        lines.append("turns          " + "".join(f"{turn:>8}" for turn in shown))
        lines.append("solved within  " + "".join(f"{within[t - 1]:>8.1%}" for t in shown))
    if summary["introspection"]:
        lines += table_words([("", summary["introspection"])])
    if summary["agreement"]:
        lines.append(agreement_words(summary["judge"], summary["mean_score"], summary["agreement"]))
    return "\n".join([*lines, f"in {summary['folder']}"])


def agreement_words(judge: str, score: float | None, counts: Mapping[str, int]) -> str:
    one = Agreement(**counts)

    def shown(value: float | None) -> str:
        return "undefined" if value is None else f"{value:.2f}"

    return (
        f"judge {judge}: mean score {shown(score)}; against the world's reward, {one.n} decided: "
        f"precision {shown(one.precision)}, recall {shown(one.recall)}, kappa {shown(one.kappa)}"
    )


def rate_words(summary: Mapping[str, Any]) -> str:
    low, high = summary["interval"]
    failed = f", {summary['failed']} failed" if summary["failed"] else ""
    return (
        f"{summary['successes']} of {summary['tasks']} solved, {summary['success_rate']:.1%} "
        f"[{low:.1%}, {high:.1%}]{failed}"
    )


def table_words(tables: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """RISE's table, one line per checkpoint; then each one's turns without an oracle."""
    k = tables[0][1]["k"]
    cells = (
        ("m1@t1", "m1_t1"),
        (f"m{k}@t1", "mk_t1"),
        (f"m1@t{k}", "m1_tk"),
        (f"p1@t{k}", "p1_tk"),
    )
    lines = [" " * 8 + "".join(f"{name:>9}" for name, _ in cells) + f"{f'm1@t{k} - m1@t1':>18}"]
    for name, table in tables:
        rates = [table[key]["rate"] for _, key in cells]
        gain = 100 * (rates[2] - rates[0])
        lines.append(f"{name:8}" + "".join(f"{r:>9.1%}" for r in rates) + f"{gain:>+18.1f}")
    for name, table in tables:
        turns = "".join(f"{share:>9.1%}" for share in table["turn_accuracy"])
        mended, spoilt = sum(table["wrong_to_right"]), sum(table["right_to_wrong"])
        lines.append(f"{name:8}{turns}  right at turns 1 to {k}; {mended} mended, {spoilt} spoilt")
    return lines


def names(failures: Mapping[str, int]) -> str:
    if not failures:
        return ""
    return f" ({', '.join(f'{name} {count}' for name, count in failures.items())})"


STYLES = {"ok": "green", "warning": "yellow", "failed": "red", "absent": "dim"}


def show_findings(findings: "Sequence[Finding]", out: TextIO) -> None:
    """A table, and a last line that counts. What was found is text, never markup."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..loop.doctor.doctor import counted

    def plain(text: str, style: str = "") -> Text:
        return Text("".join(c if c.isprintable() else " " for c in text), style, overflow="fold")

    table = Table("what", "status", "found", "remedy", box=SIMPLE_HEAD)
    for one in findings:
        style = STYLES[one.status]
        cells = (plain(one.name), plain(one.status, style), plain(one.found), plain(one.remedy))
        table.add_row(*cells)
    console = Console(file=out, highlight=False)
    console.print(table)
    counts = ", ".join(f"{count} {status}" for status, count in counted(findings).items())
    console.print(f"{len(findings)} findings: {counts}", markup=False)
