"""Tokenizers that are small and real, and records, for the tests of this folder."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from makd_llm.data.records import Columns, Record, RecordList, RecordStream, load_records

CORPUS = [
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "Summarize the following text. Summary: the dog sleeps.",
    "Attention is computed from queries and keys after rotary embedding.",
    "A low-rank student learns from its frozen teacher, layer by layer.",
    "Ein Käfer läuft über die Straße; 漢字 and emoji 🙂 are text as well.",
    "system user assistant You are helpful and answer in few words.",
] * 4

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """A byte-level BPE, as GPT-2's, Llama 3's and Qwen's are."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def plain(byte_level: Tokenizer) -> PreTrainedTokenizerBase:
    """Without a chat template; adds no BOS by itself, as GPT-2's."""
    return _wrapped(byte_level)


@pytest.fixture(scope="session")
def plain_bos(byte_level: Tokenizer) -> PreTrainedTokenizerBase:
    """Without a chat template; adds BOS in front and EOS behind by itself."""
    copied = Tokenizer.from_str(byte_level.to_str())
    copied.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", copied.token_to_id("<s>")), ("</s>", copied.token_to_id("</s>"))],
    )
    return _wrapped(copied)


@pytest.fixture(scope="session")
def chat(byte_level: Tokenizer) -> PreTrainedTokenizerBase:
    """With a chat template whose turns end with a token that is not EOS, as Qwen's."""
    return _wrapped(byte_level, CHATML)


@pytest.fixture(scope="session")
def chat_bos(byte_level: Tokenizer) -> PreTrainedTokenizerBase:
    """With a chat template that writes BOS itself, and a post-processor and's."""
    copied = Tokenizer.from_str(byte_level.to_str())
    copied.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", copied.token_to_id("<s>"))]
    )
    return _wrapped(copied, WITH_BOS)


@pytest.fixture(scope="session")
def sentencepiece_llama(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """A SentencePiece model trained here, loaded as Llama 2's tokenizer.model is."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    loaded: PreTrainedTokenizerBase = LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
    return loaded


def _wrapped(tokenizer: Tokenizer, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    special = ["<|im_start|>", "<|im_end|>"]
    wrapped.add_special_tokens({"additional_special_tokens": special})
    wrapped.chat_template = chat_template
    return wrapped


def record(document: str, *references: str, id: str = "r", **fields: str) -> Record:
    return Record(id, document, references, fields, "here.jsonl, line 1")


@pytest.fixture(scope="session")
def make_record() -> Callable[..., Record]:
    return record


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (or, as bytes, whole lines) to a JSONL file."""

    def write(rows: Iterable[Mapping[str, Any] | bytes], name: str = "train.jsonl") -> Path:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return tmp_path / name

    return write


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {"id": str(n), "document": f"document {n} " + "the dog " * (n % 5), "summary": f"sum {n}"}
        for n in range(count)
    ]


@pytest.fixture(scope="session")
def make_rows() -> Callable[[int], list[dict[str, Any]]]:
    return rows


@pytest.fixture(scope="session")
def load() -> Callable[..., RecordList | RecordStream]:
    """`load_records` with what most tests do not care about filled in."""

    def call(source: object, split: str = "train", **options: Any) -> RecordList | RecordStream:
        columns = options.pop("columns", Columns())
        options.setdefault("on_bad_record", "error")
        source_of: RecordList | RecordStream = load_records(str(source), split, columns, **options)
        return source_of

    return call


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterable[None]:
    """`datasets` keeps what it prepares in a folder of this session, not in the user's cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets"))
        )
        yield
