"""`makd plan`: memory, traffic and time of a distillation, before anything is asked for."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from makd_llm.cli_options import Debug, presets
from makd_llm.errors import UserError


def plan(
    teacher: Annotated[Path, typer.Option(help="The teacher's folder, or its config.json.")],
    ds: Annotated[Path, typer.Option("--ds", help="DeepSpeed's JSON.")],
    keep: Annotated[
        float | None, typer.Option(help="Share of the matrices that the student keeps: 0.5.")
    ] = None,
    student: Annotated[
        Path | None, typer.Option(help="Or the student's folder or config.json.")
    ] = None,
    preset: Annotated[str, typer.Option(help="What is learnt.", autocompletion=presets)] = "makd",
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option(help="Devices, and ranks, of each machine.")] = 8,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, a100-40 or cpu.")] = "h100",
    batch: Annotated[int, typer.Option(help="Records of an optimizer step, over all ranks.")] = 64,
    micro_batch: Annotated[
        int | None, typer.Option(help="Records of a rank and forward; default: its share.")
    ] = None,
    seq: Annotated[int, typer.Option(help="Tokens of a record.")] = 1024,
    targets: Annotated[
        int | None, typer.Option(help="Tokens of its summary; default: a quarter.")
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="With gradient checkpointing.")
    ] = False,
    rank_multiple: Annotated[
        int | None, typer.Option(help="All of a student's ranks are multiples of it: 16.")
    ] = None,
    memory: Annotated[float | None, typer.Option(help="GB of a device, in GPU's place.")] = None,
    flops: Annotated[
        float | None, typer.Option(help="TFLOP/s that a device reaches, as measured.")
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(help="GB/s of a device's memory.")] = None,
    link: Annotated[
        float | None, typer.Option(help="GB/s to other machines of one adapter; a device has one.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="A .png of memory and speed on 1 to 1,024 devices.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Says what a distillation will need of every rank, what it sends, and how fast it can be at
    best. Reads the models' config.json and no weights.
    """
    from makd_llm.cluster.machines import machine_named
    from makd_llm.cluster.plan import plan as planned
    from makd_llm.cluster.plan import scaled
    from makd_llm.planning import as_json as everything
    from makd_llm.planning import build_job
    from makd_llm.report.plan import plan_plot, show_plan

    if plot is not None and (plot.is_dir() or not plot.parent.is_dir()):
        raise UserError(f"--plot {plot}: name a .png in a folder that is there")
    machine = machine_named(gpu)
    for name, given in (
        ("memory", memory),
        ("flops", flops),
        ("bandwidth", bandwidth),
        ("link", link),
    ):
        if given is not None and not 0 < given < math.inf:
            raise UserError(f"--{name} {given:g}: expected a number, more than 0")
    machine = replace(
        machine,
        memory=memory * 1e9 if memory else machine.memory,
        flops=flops * 1e12 if flops else machine.flops,
        flops_fp32=flops * 1e12 if flops else machine.flops_fp32,
        bandwidth=bandwidth * 1e9 if bandwidth else machine.bandwidth,
        far=link * 1e9 if link else machine.far,
    )
    job, notes = build_job(
        teacher,
        ds,
        preset=preset,
        keep=keep,
        rank_multiple=rank_multiple,
        student=student,
        nodes=nodes,
        gpus=gpus,
        batch=batch,
        micro_batch=micro_batch,
        length=seq,
        targets=targets,
        checkpointing=checkpointing,
        on_cpu=machine.on_cpu,
    )
    found = planned(job, machine)
    scaling = scaled(job, machine) if as_json or plot else []
    if plot is not None:
        plan_plot(scaling, found, plot)
    if as_json:
        print(json.dumps(everything(found, notes, scaling), indent=1))
    else:
        show_plan(found, notes)
        if plot is not None:
            print(f"written: {plot}")
