"""`makd generate`: from its options to the writing (teacher_summaries.py)."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from makd_llm.cli_options import Debug, Overrides
from makd_llm.errors import UserError
from makd_llm.signals import stop_at_signals


def generate(
    model: Annotated[
        str, typer.Argument(help="Who writes: builtin:NAME, a folder, a .gguf file or a Hub id.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write: a data.source.")],
    overrides: Overrides = None,
    data: Annotated[str | None, typer.Option("--data", help="The documents: data.source.")] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Of the documents: data.train_split.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="A run's YAML, for its data, prompt and generation."),
    ] = None,
    ds: Annotated[
        Path | None,
        typer.Option("--ds", help="DeepSpeed's JSON; default: bf16, sharded over several ranks."),
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="greedy, beam or sample.")] = None,
    beams: Annotated[int | None, typer.Option(help="Of beam search.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of sampling.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of sampling.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of sampling.")] = None,
    per_document: Annotated[
        int | None, typer.Option(help="Summaries of each document: samples, or best beams.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of each summary, at most.")] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Texts that are written together, on each rank.")
    ] = None,
    piece: Annotated[
        int, typer.Option(min=1, help="Documents that are finished, and kept, together.")
    ] = 32,
    endpoint: Annotated[
        str | None,
        typer.Option(help="An OpenAI-compatible server that writes instead; key: $OPENAI_API_KEY."),
    ] = None,
    model_name: Annotated[
        str | None,
        typer.Option(help="The model's name there; default: MODEL, whose tokenizer it has."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
    retries: Annotated[int, typer.Option(min=0, help="Of a request that failed.")] = 10,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for one answer.")] = 600.0,
    debug: Debug = False,
) -> None:
    """Writes summaries of a split's documents, as data to learn from. For several ranks: `torchrun
    --nproc-per-node N -m makd_llm.cli generate ...`.
    """
    from makd_llm.config import DataConfig, checked, load_config
    from makd_llm.config.sequences import GenerationConfig

    run = load_config(config, overrides or [])
    asked = {
        "method": method,
        "beams": beams,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "per_document": per_document,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    before = run.distil.sequences.generation.model_dump()
    generation = checked(GenerationConfig, {**before, **given})
    places = {k: v for k, v in {"source": data, "train_split": split}.items() if v is not None}
    documents = checked(DataConfig, {**run.data.model_dump(), **places})
    if data is None and "source" not in run.data.model_fields_set:
        raise UserError("--data is missing: a data.source, or a run's YAML with --config")
    from makd_llm import distributed
    from makd_llm.files import claimed
    from makd_llm.generation.endpoint import Endpoint
    from makd_llm.models.source import resolve_model
    from makd_llm.teacher_summaries import Task, write_with_endpoint, write_with_engine
    from makd_llm.train.deepspeed_config import read_deepspeed_config

    several = distributed.world_size() > 1
    server = None
    if endpoint is not None:
        if several:
            raise UserError("an endpoint is asked by one process; raise --concurrency instead")
        server = Endpoint(endpoint, model_name or model, concurrency, retries, timeout)
    deepspeed = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3 if several else 0}}
    if ds is not None:
        deepspeed = read_deepspeed_config(ds)
    distributed.quiet()
    stop_at_signals()
    task = Task(
        resolve_model(model, weights=server is None),
        documents,
        generation,
        out,
        run.seed,
        piece,
    )
    group = distributed.joined() if server is None else nullcontext()
    with group, claimed(out, "--out"):
        if server is not None:
            write_with_endpoint(task, server, _tell)
        else:
            write_with_engine(task, deepspeed, _tell)


def _tell(text: str) -> None:
    from makd_llm import distributed

    if distributed.is_main():
        print(text, flush=True)
