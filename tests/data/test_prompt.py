"""Prompts: what is cut, what is learnt, and how many BOS there are."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase as Tokenizer

from makd_llm.data.prompt import BosRule, PromptBuilder
from makd_llm.data.records import BadRecord, Record
from makd_llm.errors import UserError

MakeRecord = Callable[..., Record]
TOKENIZERS = ["plain", "plain_bos", "chat", "chat_bos", "sentencepiece_llama"]
LONG = "The quick brown fox jumps over the lazy dog, 漢字 🙂 und läuft. " * 30


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def test_plain_example_is_template_then_summary_then_eos(
    plain: Tokenizer, make_record: MakeRecord
) -> None:
    example = PromptBuilder(plain).example(make_record("The dog.", "It sleeps.", id="a/1"))
    assert example.record_id == "a/1"
    assert plain.decode(example.input_ids[: example.prompt_length]) == "The dog.\n\nSummary:"
    assert plain.decode(example.input_ids[example.prompt_length :]) == " It sleeps.</s>"


def test_chat_example_is_what_the_template_writes(chat: Tokenizer, make_record: MakeRecord) -> None:
    prompts = PromptBuilder(chat, instruction="Sum up.", system="Be brief.")
    example = prompts.example(make_record("The dog.", "It sleeps."))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Sum up.\n\nThe dog."},
        {"role": "assistant", "content": "It sleeps."},
    ]
    whole = str(chat.apply_chat_template(messages, tokenize=False)).removesuffix("\n")
    assert chat.decode(example.input_ids) == whole
    assert chat.decode(example.input_ids[example.prompt_length :]) == "It sleeps.<|im_end|>"
    ends = chat.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    assert list(prompts.eos_ids) == ends


@pytest.mark.parametrize("document", ["The dog.", LONG, "dog", "Summary: Summary:"])
def test_the_documents_tokens_are_known(
    tokenizer: Tokenizer, make_record: MakeRecord, document: str
) -> None:
    prompts = PromptBuilder(tokenizer, max_length=80, instruction="Sum up.")
    example = prompts.example(make_record(document, "It sleeps."))
    assert example.document is not None
    begin, end = example.document
    said = tokenizer.decode(example.input_ids[begin:end]).strip("\ufffd").strip()
    assert 0 <= begin < end <= example.prompt_length and said
    assert document.strip().startswith(said)
    rest = tokenizer.decode(example.input_ids[:begin] + example.input_ids[end:])
    assert "dog" not in rest or document == LONG
    if document != LONG:
        assert said == document


def test_chat_can_be_switched_off(chat: Tokenizer, make_record: MakeRecord) -> None:
    prompts = PromptBuilder(chat, chat=False)
    assert chat.decode(prompts.prompt_ids(make_record("Dog.", "x"), 1)) == "Dog.\n\nSummary:"
    assert list(prompts.eos_ids) == [chat.eos_token_id]


def test_the_summary_never_runs_into_the_prompt(
    tokenizer: Tokenizer, make_record: MakeRecord
) -> None:
    prompts = PromptBuilder(tokenizer)
    one, other = make_record("The dog.", "It sleeps."), make_record("The dog.", "zzz")
    first, second = prompts.example(one), prompts.example(other)
    cut = first.prompt_length
    assert first.input_ids[:cut] == second.input_ids[:cut] == prompts.prompt_ids(one, 50)
    text = str(tokenizer.decode(first.input_ids[cut:-1]))
    assert text.strip() == "It sleeps."
    assert first.input_ids[-1] == prompts.eos_ids[0]
    assert first.input_ids[-2] not in tokenizer.all_special_ids


def test_only_the_first_reference_is_learnt(plain: Tokenizer, make_record: MakeRecord) -> None:
    prompts = PromptBuilder(plain)
    assert prompts.example(make_record("d", "one", "two")) == prompts.example(
        make_record("d", "one")
    )


def test_special_tokens_spelt_in_a_summary_are_text(
    tokenizer: Tokenizer, make_record: MakeRecord
) -> None:
    prompts = PromptBuilder(tokenizer)
    ids = prompts.summary_ids(make_record("d", "Use </s> and <|im_end|> here."))
    assert not set(ids[:-1]) & set(prompts.eos_ids)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    document=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300).filter(
        str.strip
    ),
    summary=st.text(st.sampled_from("abc dogthe"), min_size=1, max_size=30).filter(str.strip),
    spare=st.integers(8, 120),
)
def test_any_document_fits_and_only_it_is_cut(
    tokenizer: Tokenizer, make_record: MakeRecord, document: str, summary: str, spare: int
) -> None:
    template = "Title: {title}\n{document}\n\nSummary:"
    record = make_record(document, summary, title="A dog")
    probe = PromptBuilder(tokenizer, template=template, user_template=template)
    frame = len(probe._encode_prompt(record, ""))
    window = frame + spare + len(probe.summary_ids(record))
    prompts = PromptBuilder(tokenizer, template=template, user_template=template, max_length=window)
    example = prompts.example(record)
    assert len(example.input_ids) <= window
    assert example.input_ids[example.prompt_length :] == probe.summary_ids(record)
    prompt = tokenizer.decode(example.input_ids[: example.prompt_length])
    assert "Title: A dog" in prompt
    assert "\n\nSummary:" in prompt
    prompts.check(record)


@pytest.mark.parametrize("spare", [10, 40, 100])
def test_a_cut_document_uses_the_window(
    tokenizer: Tokenizer, make_record: MakeRecord, spare: int
) -> None:
    record = make_record(LONG, "It sleeps.")
    frame = len(PromptBuilder(tokenizer)._encode_prompt(record, ""))
    prompts = PromptBuilder(tokenizer, max_length=frame + spare + 20)
    ids = prompts.prompt_ids(record, 20)
    # A character may be worth several byte tokens, and the cut never splits one.
    assert frame + spare - 6 <= len(ids) <= frame + spare
    assert "�" not in tokenizer.decode(ids)


def test_a_tokenizer_that_ends_every_text_is_nothing_for_a_server(
    plain_bos: Tokenizer, make_record: MakeRecord
) -> None:
    with pytest.raises(UserError, match=r"line 1: .* would see other tokens than a local model"):
        PromptBuilder(plain_bos, max_length=64).request(make_record(LONG, "short"), 10)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "plain_bos"])
def test_a_server_is_sent_what_becomes_the_same_tokens(
    name: str, request: pytest.FixtureRequest, make_record: MakeRecord
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    record = make_record(LONG, "short")
    prompts = PromptBuilder(tokenizer, max_length=64)
    sent = prompts.request(record, 10)
    if isinstance(sent, str):
        seen = tokenizer(sent)["input_ids"]
    else:
        assert [turn["role"] for turn in sent] == ["user"]
        text = tokenizer.apply_chat_template(sent, tokenize=False, add_generation_prompt=True)
        seen = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert seen == prompts.prompt_ids(record, 10) and len(seen) <= 54
    prompts.check_prompt(record, 10)
    with pytest.raises(BadRecord):
        prompts.check_prompt(record, 63)


def test_the_prompt_has_a_limit_of_its_own(plain: Tokenizer, make_record: MakeRecord) -> None:
    prompts = PromptBuilder(plain, max_length=200, max_prompt_length=50)
    short, long = make_record(LONG, "ab"), make_record(LONG, "ab " * 60)
    assert prompts.prompt_ids(short, 10) == prompts.prompt_ids(short, 150)
    assert prompts.example(short).prompt_length == prompts.example(long).prompt_length <= 50


def test_no_offsets_are_needed(
    plain: Tokenizer, make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = make_record(LONG, "It sleeps.")
    prompts = PromptBuilder(plain, max_length=80)
    with_offsets = prompts.prompt_ids(record, 20)
    monkeypatch.setattr(type(plain), "is_fast", False)
    without = prompts.prompt_ids(record, 20)
    assert 0 <= 60 - len(without) <= 8
    assert abs(len(with_offsets) - len(without)) <= 8


def test_a_summary_longer_than_the_window_is_a_bad_record(
    tokenizer: Tokenizer, make_record: MakeRecord
) -> None:
    prompts = PromptBuilder(tokenizer, max_length=60)
    record = make_record("The dog.", "zq" * 60)
    for refused in (prompts.example, prompts.check):
        with pytest.raises(
            BadRecord, match=r"^here\.jsonl, line 1: .*expected a summary of at most"
        ):
            refused(record)


def test_a_template_longer_than_its_window_says_so(
    plain: Tokenizer, make_record: MakeRecord
) -> None:
    prompts = PromptBuilder(plain, template="zq" * 30 + "{document}", max_prompt_length=20)
    with pytest.raises(BadRecord, match="without its document and may have 20") as raised:
        prompts.check(make_record("The dog.", "a"))
    assert raised.value.reason == "template longer than the window"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("auto", {"plain_bos": 1, "chat_bos": 1, "sentencepiece_llama": 1}),
        ("always", dict.fromkeys(TOKENIZERS, 1)),
        ("never", {}),
    ],
)
def test_bos_is_there_once_or_not_at_all(
    name: str,
    rule: BosRule,
    expected: dict[str, int],
    request: pytest.FixtureRequest,
    make_record: MakeRecord,
) -> None:
    tokenizer = request.getfixturevalue(name)
    prompts = PromptBuilder(tokenizer, bos=rule, max_length=100)
    for document in ("The dog.", LONG):
        ids = prompts.example(make_record(document, "It sleeps.")).input_ids
        assert ids.count(tokenizer.bos_token_id) == expected.get(name, 0)
        assert ids[: expected.get(name, 0)] == [tokenizer.bos_token_id] * expected.get(name, 0)
        assert ids.count(tokenizer.eos_token_id) == ("chat" not in name)
    assert f"BOS {rule}: {'one' if expected.get(name) else 'none'}" in prompts.describe()


def test_a_template_that_spells_bos_does_not_double_it(
    plain_bos: Tokenizer, make_record: MakeRecord
) -> None:
    prompts = PromptBuilder(plain_bos, template="<s>{document}")
    assert prompts.prompt_ids(make_record("d", "x"), 1).count(plain_bos.bos_token_id) == 1


def test_never_is_refused_where_bos_opens_every_turn(
    byte_level: object, chat: Tokenizer, make_record: MakeRecord
) -> None:
    import copy

    tokenizer = copy.deepcopy(chat)
    tokenizer.bos_token = "<|im_start|>"
    ids = PromptBuilder(tokenizer, bos="always").prompt_ids(make_record("d", "x"), 1)
    assert ids == PromptBuilder(tokenizer, bos="auto").prompt_ids(make_record("d", "x"), 1)
    assert ids.count(tokenizer.bos_token_id) == 2
    with pytest.raises(UserError, match="opens every turn with"):
        PromptBuilder(tokenizer, bos="never")


def test_fields_of_the_record_can_be_used(plain: Tokenizer, make_record: MakeRecord) -> None:
    prompts = PromptBuilder(
        plain, template="{id} {aspect} {instruction} {document} {{x}}", instruction="I"
    )
    ids = prompts.prompt_ids(make_record("d {y}", "s", id="7", aspect="outcome"), 1)
    assert plain.decode(ids) == "7 outcome I d {y} {x}"


def test_an_unknown_field_names_template_field_and_known_ones(
    plain: Tokenizer, make_record: MakeRecord
) -> None:
    prompts = PromptBuilder(plain, template="{document} {apsect}")
    with pytest.raises(
        UserError, match=r"'{document} {apsect}' uses {apsect}.*aspect, document, id"
    ):
        prompts.prompt_ids(make_record("d", "s", aspect="outcome"), 1)


@pytest.mark.parametrize(
    "template", ["no document", "{document", "{document} {0}", "{document.x}", "{}"]
)
def test_a_template_that_cannot_work_is_refused(plain: Tokenizer, template: str) -> None:
    with pytest.raises(UserError, match="template"):
        PromptBuilder(plain, template=template)


def test_what_the_tokenizer_lacks_is_said(byte_level: object, plain: Tokenizer) -> None:
    import copy

    with pytest.raises(UserError, match="no chat template"):
        PromptBuilder(plain, chat=True)
    bare = copy.deepcopy(plain)
    bare.bos_token = None
    with pytest.raises(UserError, match="no BOS token"):
        PromptBuilder(bare, bos="always")
    assert PromptBuilder(bare).describe().count("none") == 1
    bare.eos_token = None
    with pytest.raises(UserError, match="end-of-sequence"):
        PromptBuilder(bare)


def test_a_template_that_refuses_the_system_turn_is_said(chat: Tokenizer) -> None:
    import copy

    tokenizer = copy.deepcopy(chat)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + CHATML_TAIL
    )
    PromptBuilder(tokenizer)
    with pytest.raises(UserError, match="no system; leave the system message out"):
        PromptBuilder(tokenizer, system="Be brief.")


CHATML_TAIL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


def test_sentencepiece_round_trip(sentencepiece_llama: Tokenizer, make_record: MakeRecord) -> None:
    prompts = PromptBuilder(sentencepiece_llama)
    example = prompts.example(make_record("The dog läuft 漢字.", "It sleeps."))
    whole = sentencepiece_llama.decode(example.input_ids, skip_special_tokens=True)
    assert whole == "The dog läuft 漢字.\n\nSummary: It sleeps."
    assert sentencepiece_llama.convert_ids_to_tokens(example.input_ids)[0] == "<s>"


def test_llama_2_style_spaces_around_the_answer(
    sentencepiece_llama: Tokenizer, make_record: MakeRecord
) -> None:
    import copy

    tokenizer = copy.deepcopy(sentencepiece_llama)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content']"
        " + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}"
        "{% endfor %}"
    )
    prompts = PromptBuilder(tokenizer)
    example = prompts.example(make_record("The dog.", "It sleeps."))
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert prompts.eos_ids == (tokenizer.eos_token_id,)
    assert tokenizer.decode(example.input_ids[example.prompt_length :]) == "It sleeps.</s>"
