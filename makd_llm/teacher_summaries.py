"""A split's documents with a model's summaries, as a data set: `makd generate`, and a run's stage
`write`.

What comes out is a folder that `data.source` takes: `train.jsonl` with the data's own columns, and
`manifest.json`. Interrupted at any moment, it is taken up where whole pieces end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from makd_llm import distributed
from makd_llm.checks import check_windows
from makd_llm.config import DataConfig
from makd_llm.config.sequences import GenerationConfig
from makd_llm.data.batch import pad_id_of
from makd_llm.data.records import RecordList, content_of, describe_skipped
from makd_llm.data.schema import Columns
from makd_llm.errors import UserError
from makd_llm.files import sample_of_folder
from makd_llm.generation.decoding import Decoding
from makd_llm.generation.documents import Documents
from makd_llm.generation.engine import EngineWriter, Save
from makd_llm.generation.pieces import Pieces
from makd_llm.models.sharded import load_sharded
from makd_llm.models.source import load_tokenizer
from makd_llm.report.progress import progress
from makd_llm.train.build import build_decoding, build_prompts, build_records
from makd_llm.train.deepspeed_config import dtype_of, frozen_config
from makd_llm.train.engine import Frozen

if TYPE_CHECKING:
    from makd_llm.generation.endpoint import Endpoint


@dataclass(frozen=True)
class Task:
    """What is to be written: by the model of a folder, for the training split of `data`. anew:
    summaries that were made otherwise are replaced, and not refused. piece: documents that are
    finished together, which is what a killed rank has to write again.
    """

    model: Path
    data: DataConfig
    generation: GenerationConfig
    out: Path
    seed: int = 0
    piece: int = 32
    anew: bool = False


def write_with_engine(
    task: Task,
    deepspeed: dict[str, Any],
    tell: Callable[[str], None],
    kernels: str = "auto",
) -> dict[str, Any]:
    """Writes with the training engine, sharded as `deepspeed` says; returns the manifest.
    Collective.

    Raises UserError where the folder holds other summaries, the window is too long for the model,
    or nothing is written.
    """
    check_windows(task.model, {"data.max_length": task.data.max_length})
    dtype = dtype_of(deepspeed)
    batch_size = task.generation.batch_size

    def write(documents: Documents, decoding: Decoding, missing: list[int], save: Save) -> None:
        tokenizer = load_tokenizer(task.model)
        ds = frozen_config(deepspeed, micro_batch_size=batch_size)
        if distributed.world_size() == 1 and "offload_param" not in ds["zero_optimization"]:
            # There is nothing to shard, and a token takes ZeRO-3's hooks longer than the model.
            ds["zero_optimization"] = {"stage": 0}
        engine = Frozen(load_sharded(task.model, ds, dtype, kernels), ds)
        pad_id = pad_id_of(tokenizer)
        writer = EngineWriter(
            engine.generate, tokenizer, documents, decoding, batch_size=batch_size, pad_id=pad_id
        )
        _watched(writer.write, documents, missing, save)
        engine.close()

    files = distributed.on_main(sample_of_folder, task.model)
    return _write(task, {"files": files, "dtype": str(dtype)}, write, tell)


def write_with_endpoint(
    task: Task, endpoint: "Endpoint", tell: Callable[[str], None]
) -> dict[str, Any]:
    """Writes through a server; `task.model` is the folder of its tokenizer. Returns the manifest.

    Raises what the writing raises. For one process: it has many requests under way.
    """
    from makd_llm.generation.endpoint import EndpointWriter  # the client takes a second to import

    def write(documents: Documents, decoding: Decoding, missing: list[int], save: Save) -> None:
        _watched(EndpointWriter(endpoint, documents, decoding).write, documents, missing, save)

    # What is sent depends on the tokenizer and its template: it says where documents are cut.
    tokenizer = sample_of_folder(task.model, weights=False)
    return _write(task, {"name": endpoint.model, "tokenizer": tokenizer}, write, tell)


def _write(
    task: Task,
    model: dict[str, Any],
    write: Callable[[Documents, Decoding, list[int], Save], None],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """What both have in common. model: what identifies it."""
    data = task.data.model_copy(update={"streaming": False})
    decoding = build_decoding(task.generation, task.seed)
    records = build_records(data, summarized=False)
    assert isinstance(records, RecordList)
    documents = Documents(
        records,
        build_prompts(data, load_tokenizer(task.model)),
        Columns(**data.columns.model_dump()),
        max_new_tokens=decoding.max_new_tokens,
        per_document=decoding.per_document,
        piece=task.piece,
        on_bad_record=data.on_bad_record,
    )
    made_from = {
        "model": model,
        "data": distributed.on_main(_identity, data),
        "generation": decoding.says,
        "piece": task.piece,
    }
    pieces = Pieces(
        task.out,
        data.train_split,
        made_from,
        count=documents.n_pieces,
        expected=lambda number: len(documents.places(number)) * decoding.per_document,
    )
    missing = distributed.on_main(pieces.begin, tell if task.anew else None)
    if missing is None:
        tell(f"{pieces.file} stands")
    else:
        if len(missing) < documents.n_pieces:
            left = sum(len(documents.places(piece)) for piece in missing)
            tell(f"{len(documents) - left} of {len(documents)} documents are summarized already")
        if missing:
            write(documents, decoding, missing, pieces.save)
        facts = {"documents": len(documents), "skipped": dict(documents.skipped)}
        if not distributed.on_main(pieces.join, facts):
            raise UserError(
                f"{task.model} wrote nothing for any of {len(documents)} documents; check "
                "data.prompt, or the server that writes; the same command then begins again"
            )
        if documents.skipped:
            tell(str(describe_skipped(documents.skipped)))
    manifest = distributed.on_main(pieces.manifest)
    assert manifest is not None
    tell(_in_words(manifest, pieces.file))
    return manifest


def _watched(
    write: Callable[[list[int], Save, Callable[[int], None]], None],
    documents: Documents,
    missing: list[int],
    save: Save,
) -> None:
    """Shows how many documents are finished, over all ranks."""
    total = sum(len(documents.places(piece)) for piece in missing)
    with progress("summaries", total) as advance:
        write(missing, save, advance)


def _identity(data: DataConfig) -> dict[str, Any]:
    """What of the data the summaries depend on; a local file by its content, wherever it lies."""
    columns = {"columns", "prompt", "max_length", "max_prompt_length", "limit", "on_bad_record"}
    content = content_of(data.source, data.train_split)
    return {
        "source": content or data.source,
        "split": data.train_split,
        **data.model_dump(mode="json", include=columns),
    }


def _in_words(manifest: dict[str, Any], file: Path) -> str:
    most = manifest["made_from"]["generation"]["max_new_tokens"]
    found = f"{file}: {manifest['summaries']} summaries of {manifest['documents']} documents"
    if manifest["cut"]:
        found += f", {len(manifest['cut'])} cut at {most} tokens"
    if manifest["empty"]:
        found += f", {len(manifest['empty'])} more were empty and are left out"
    return found
