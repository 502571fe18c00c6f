"""A plan as tables for people, and as a picture from 1 to 1,024 devices."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from makd_llm.cluster.plan import Plan
from makd_llm.files import replacing
from makd_llm.report.table import show


def show_plan(plan: Plan, notes: Sequence[str]) -> None:
    """Prints a plan."""
    show(memory_table(plan))
    if plan.traffic:
        show(traffic_table(plan))
    for line in (*summary(plan), *notes):
        print(line)


def memory_table(plan: Plan) -> Table:
    """Parts by moments."""
    memory, job = plan.memory, plan.job
    table = Table(
        title=f"GB of a rank's device, {job.sharding.name}, {job.nodes} x {job.gpus} "
        f"{plan.machine.name}"
    )
    table.add_column("part")
    for moment in memory.device:
        table.add_column(moment, justify="right")
    parts = list(dict.fromkeys(part for found in memory.device.values() for part in found))
    for part in parts:
        values = [found.get(part, 0) for found in memory.device.values()]
        if any(values):
            table.add_row(part, *(_gigabytes(value) for value in values))
    table.add_section()
    table.add_row("in all", *(_gigabytes(memory.at(moment)) for moment in memory.device))
    return table


def traffic_table(plan: Plan) -> Table:
    """Messages of an optimizer step."""
    table = Table(title="GB that a rank sends in an optimizer step")
    for column in ("what", "when", "collective", "whole", "sent", "seconds"):
        table.add_column(column, justify="left" if column in _WORDS else "right")
    from makd_llm.cluster.timing import message_seconds

    for message in plan.traffic:
        table.add_row(
            message.what,
            message.moment,
            message.collective,
            _gigabytes(message.payload),
            _gigabytes(message.sent),
            f"{message_seconds(message, plan.machine):.3g}",
        )
    return table


_WORDS = ("what", "when", "collective")


def summary(plan: Plan) -> list[str]:
    """What it comes to, in lines."""
    memory, timing, job = plan.memory, plan.timing, plan.job
    lines = [
        f"memory: {_gigabytes(memory.peak)} GB at its largest ({memory.moment}), of "
        f"{_gigabytes(plan.room)} GB: {'fits' if plan.fits else 'does not fit'}"
    ]
    if memory.host:
        lines.append(
            f"host memory: {_gigabytes(sum(memory.host.values()))} GB a rank, "
            f"{_gigabytes(sum(memory.host.values()) * job.gpus)} GB a machine"
        )
    if memory.disk:
        lines.append(f"NVMe: {_gigabytes(sum(memory.disk.values()))} GB a rank")
    if plan.advice:
        lines.append(f"to make it fit: {plan.advice}")
    elif plan.largest > job.micro_batch:
        lines.append(f"the largest micro-batch that fits: {plan.largest} records")
    share = sum(timing.messages.values()) / timing.seconds
    lines.append(
        f"time: {timing.seconds:.3g} s a step at the stated rates, {timing.tokens_per_second:.3g} "
        f"tokens/s, {timing.tokens_per_second * 86400:.3g} tokens a day at best; messages take "
        f"{share:.0%} of it" + (" (beside the computation)" if job.sharding.overlap else "")
    )
    return lines


def plan_plot(scaling: Sequence[Mapping[str, Any]], machine: str, room: float, path: Path) -> None:
    """Writes memory of a rank by part, and tokens per second, over the number of devices: a PNG."""
    import matplotlib.pyplot as plt

    ranks = [row["ranks"] for row in scaling]
    parts = list(dict.fromkeys(part for row in scaling for part in row["parts"]))
    parts = [part for part in parts if any(row["parts"].get(part) for row in scaling)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    left.stackplot(
        ranks,
        [[row["parts"].get(part, 0) / 1e9 for row in scaling] for part in parts],
        labels=parts,
    )
    left.axhline(room / 1e9, color="black", linestyle="--", label=f"room on {machine}")
    left.set(xscale="log", xlabel="devices", ylabel="GB of a rank", title="memory at its largest")
    left.legend(fontsize=7)
    speeds = [row["tokens_per_second"] for row in scaling]
    right.plot(ranks, speeds, color="tab:blue")
    for row, speed in zip(scaling, speeds, strict=True):
        face = "tab:blue" if row["fits"] else "white"
        right.plot(row["ranks"], speed, marker="o", color="tab:blue", markerfacecolor=face)
    right.set(
        xscale="log",
        yscale="log",
        xlabel="devices (hollow: does not fit)",
        ylabel="tokens/s",
        title="speed at the stated rates, at best",
    )
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ranks, [str(rank) for rank in ranks])
        axis.grid(alpha=0.3)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=110, format="png")
    plt.close(figure)


def _gigabytes(value: float) -> str:
    gigabytes = value / 1e9
    return f"{gigabytes:.1f}" if gigabytes >= 100 else f"{gigabytes:.2f}"
