"""A plan as tables for people, and as a picture from 1 to 1,024 devices."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from makd_llm.cluster.plan import Plan
from makd_llm.files import replacing
from makd_llm.report.table import show

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    most = _count(plan.largest, "record") if plan.largest else "none, not even one record"
    lines.append(
        f"micro-batch: {_count(job.micro_batch, 'record')}, {job.accumulation} a step; the largest "
        f"that fits as it is: {most}"
    )
    share = sum(timing.messages.values()) / timing.seconds
    lines.append(
        f"time: {timing.seconds:.3g} s a step at the stated rates, {timing.tokens_per_second:.3g} "
        f"tokens/s, {timing.tokens_per_second * 86400:.3g} tokens a day at best; messages take "
        f"{share:.0%} of it" + (" (beside the computation)" if job.sharding.overlap else "")
    )
    if job.teacher is not None:
        lines.append(
            "the distillation alone is planned; where the stage sft tunes the teacher before it, "
            "that has gradients and Adam's states of the whole teacher: plan it with "
            "--preset finetune --student TEACHER"
        )
    return lines


def plan_plot(scaling: Sequence[Mapping[str, Any]], plan: Plan, path: Path) -> None:
    """Writes memory of a rank by part, and tokens per second, over the number of devices: a PNG.

    Raises OSError where it cannot be written.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 6), layout="constrained")
    job, machine = plan.job, plan.machine.name
    figure.suptitle(
        f"{job.sharding.name}, {machine}, {job.gpus} devices a machine, "
        f"micro-batches of {job.micro_batch} x {job.length} tokens",
        fontsize=11,
    )
    _draw_memory(left, scaling, plan.room / 1e9, machine)
    _draw_speed(right, scaling)
    ranks = [row["ranks"] for row in scaling]
    right.set_xscale("log", base=2)
    for axis, places in ((left, list(range(len(ranks)))), (right, ranks)):
        asked = places[ranks.index(job.ranks)]
        axis.axvline(asked, color="black", linewidth=1, linestyle=":", label="as asked for")
        axis.set_xticks(places, [f"{rank:,}" for rank in ranks])
        axis.minorticks_off()
        axis.set_xlabel("devices")
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(*_from_the_top(left), fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    right.legend(fontsize=8)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=110, format="png")
    plt.close(figure)


def _draw_memory(
    axis: "Axes", scaling: Sequence[Mapping[str, Any]], room: float, machine: str
) -> None:
    """A bar for each number of devices, of all parts; in GB."""
    import matplotlib as mpl

    parts = list(dict.fromkeys(part for row in scaling for part in row["parts"]))
    parts = [part for part in parts if any(row["parts"].get(part) for row in scaling)]
    below = [0.0] * len(scaling)
    colors = mpl.colormaps["tab20"]
    for number, part in enumerate(parts):
        heights = [row["parts"].get(part, 0) / 1e9 for row in scaling]
        axis.bar(range(len(scaling)), heights, 0.8, below, color=colors(number), label=part)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axis.axhline(room, color="black", linestyle="--", label=f"room on {machine}")
    axis.set(ylabel="GB of a rank (10^9 bytes)", title="memory at its largest, by part")
    axis.set_axisbelow(True)
    axis.grid(axis="y", alpha=0.3)


def _draw_speed(axis: "Axes", scaling: Sequence[Mapping[str, Any]]) -> None:
    ranks = [row["ranks"] for row in scaling]
    speeds = [row["tokens_per_second"] for row in scaling]
    axis.plot(ranks, speeds, color="tab:blue", zorder=1)
    for fits, face, said in ((True, "tab:blue", "fits"), (False, "white", "does not fit")):
        shown = [i for i, row in enumerate(scaling) if row["fits"] == fits]
        xs, ys = [ranks[i] for i in shown], [speeds[i] for i in shown]
        axis.scatter(xs, ys, edgecolor="tab:blue", facecolor=face, zorder=2, label=said)
    axis.set(yscale="log", ylabel="tokens/s", title="speed at the stated rates, at best")
    axis.grid(alpha=0.3)


def _from_the_top(axis: "Axes") -> tuple[list[Any], list[str]]:
    """A legend's handles and labels in the order in which the bars' parts are seen."""
    handles, labels = axis.get_legend_handles_labels()
    return handles[::-1], labels[::-1]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _gigabytes(value: float) -> str:
    gigabytes = value / 1e9
    return f"{gigabytes:.1f}" if gigabytes >= 100 else f"{gigabytes:.2f}"
