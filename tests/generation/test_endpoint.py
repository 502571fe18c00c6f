"""A server that is slow, overloaded, broken, strict or gone: nothing is lost, nothing comes twice,
and what no repetition can mend ends in one line.
"""

import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from makd_llm.config import DataConfig
from makd_llm.config.run import PromptConfig
from makd_llm.config.sequences import GenerationConfig
from makd_llm.errors import RunEnded, Unavailable, UserError
from makd_llm.generation.endpoint import Endpoint, EndpointWriter
from makd_llm.teacher_summaries import Task, write_with_endpoint
from makd_llm.train.build import build_records

DOCUMENTS = 40
SERVER_MAY_SLEEP = 0.05


def task_of(tiny: Path, out: Path, **generation: Any) -> Task:
    data = DataConfig(source=str(tiny / "train.jsonl"), max_length=64)
    asked = GenerationConfig(max_new_tokens=8, **generation)
    return Task(tiny / "teacher", data, asked, out, piece=6)


def write(task: Task, server: Any, **settings: Any) -> dict[str, Any]:
    endpoint = Endpoint(server.url, "tiny", **{"concurrency": 5, **settings})
    return write_with_endpoint(task, endpoint, lambda text: None)


def expected_of(tiny: Path) -> list[tuple[str, str]]:
    rows = map(json.loads, (tiny / "train.jsonl").read_text().splitlines())
    return [(row["id"], "-".join(row["document"].split()[:3])) for row in rows]


def found_in(out: Path) -> list[tuple[str, str]]:
    rows = map(json.loads, (out / "train.jsonl").read_text().splitlines())
    return [(row["id"], row["summary"]) for row in rows]


def refused(task: Task, server: Any, kind: type[RunEnded], **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        write(task, server, **settings)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    return str(caught.value)


def test_answers_out_of_order_and_so_many_at_a_time(
    tiny: Path, tmp_path: Path, server: Any
) -> None:
    def slow(server: Any, body: dict[str, Any], before: int) -> Any:
        time.sleep(SERVER_MAY_SLEEP * (len(server.bodies) % 3))
        return server.answer(body)

    server.fault = slow
    manifest = write(task_of(tiny, tmp_path / "out"), server)
    assert found_in(tmp_path / "out") == expected_of(tiny)
    assert (manifest["summaries"], manifest["cut"], manifest["empty"]) == (DOCUMENTS, [], [])
    assert server.most_at_a_time == 5
    body = server.bodies[0]
    assert body["path"] == "/v1/completions"
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0.0, 8, "tiny")


def test_every_fault_that_goes_away_is_waited_for(tiny: Path, tmp_path: Path, server: Any) -> None:
    faults: list[Any] = [
        (429, {"Retry-After": "1"}, {"error": {"message": "slow down"}}),
        (500, {}, {"error": {"message": "oh"}}),
        (503, {}, "<html>restarting</html>"),
        None,  # the connection is dropped
        "slow",
    ]
    met: Counter[int] = Counter()

    def faulty(server: Any, body: dict[str, Any], before: int) -> Any:
        kind = sum(body["prompt"].encode()) % (len(faults) + 1)
        if before or kind == len(faults):
            return server.answer(body)
        met[kind] += 1
        if faults[kind] == "slow":
            time.sleep(3.0)  # longer than the time-out below
            return server.answer(body)
        return faults[kind]

    server.fault = faulty
    write(task_of(tiny, tmp_path / "out"), server, timeout=1.5, retries=3)
    assert found_in(tmp_path / "out") == expected_of(tiny)
    assert set(met) == set(range(len(faults))), "every fault was met"
    waited = [
        later[1] - later[0]
        for name, later in server.asked_at.items()
        if len(later) > 1 and sum(json.loads(name)["prompt"].encode()) % (len(faults) + 1) == 0
    ]
    assert waited and min(waited) >= 0.95, "as long as Retry-After says"


def test_waits_grow(tiny: Path, tmp_path: Path, server: Any) -> None:
    server.fault = lambda server, body, before: (500, {}, {}) if before < 3 else server.answer(body)
    task = task_of(tiny, tmp_path / "out")
    task = Task(task.model, task.data.model_copy(update={"limit": 1}), task.generation, task.out)
    write(task, server, retries=3)
    ((first, second, third, fourth),) = server.asked_at.values()
    assert second - first >= 0.3  # half a second, less a quarter of jitter
    assert third - second > 1.2 * (second - first) and fourth - third > 1.2 * (third - second)


def test_what_is_refused_ends_the_run_and_the_next_start_asks_only_for_the_rest(
    tiny: Path, tmp_path: Path, server: Any
) -> None:
    def strict(server: Any, body: dict[str, Any], before: int) -> Any:
        if len(server.bodies) > 20:
            return 400, {}, {"error": {"message": "prompt too long"}}
        return server.answer(body)

    server.fault = strict
    task = task_of(tiny, tmp_path / "out")
    said = refused(task, server, UserError)
    assert "refused a request with 400" in said and "prompt too long" in said
    kept = sorted((tmp_path / "out" / "pieces").glob("*.jsonl"))
    assert 1 <= len(kept) <= 3
    assert not (tmp_path / "out" / "train.jsonl").exists()
    server.bodies.clear()
    server.fault = lambda server, body, before: server.answer(body)
    write(task, server)
    assert len(server.bodies) == DOCUMENTS - 6 * len(kept)
    assert found_in(tmp_path / "out") == expected_of(tiny)
    server.bodies.clear()
    write(task, server)
    assert server.bodies == [], "a finished folder stands"


def test_a_server_that_stays_away_is_no_wrong_input(
    tiny: Path, tmp_path: Path, server: Any
) -> None:
    server.fault = lambda server, body, before: (503, {}, {"error": {"message": "loading"}})
    said = refused(task_of(tiny, tmp_path / "out"), server, Unavailable, retries=1)
    assert "with up to 1 retries" in said and "loading" in said
    nobody = Endpoint("http://127.0.0.1:9", "tiny", retries=0)
    with pytest.raises(Unavailable):
        write_with_endpoint(task_of(tiny, tmp_path / "out"), nobody, lambda text: None)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((200, {}, "<html>hello</html>"), "not as an OpenAI-compatible server does"),
        ((200, {}, {"hello": 1}), "not as an OpenAI-compatible server does"),
        ((200, {"Content-Type": "application/json"}, "{"), "not as an OpenAI-compatible"),
        ((200, {}, {"choices": [None]}), "not as an OpenAI-compatible server does"),
        ((200, {}, {"choices": [{}]}), "not as an OpenAI-compatible server does"),
        ((200, {}, {"choices": {"text": "a"}}), "not as an OpenAI-compatible server does"),
        ((200, {}, {"choices": [{"text": ["a"]}]}), "not as an OpenAI-compatible server does"),
        ((200, {"Content-Type": "application/json"}, "[" * 9999), "not as an OpenAI-compatible"),
        ((404, {}, {"error": {"message": "no model tiny"}}), "check --model-name"),
    ],
)
def test_something_else_behind_the_url(
    tiny: Path, tmp_path: Path, server: Any, reply: Any, words: str
) -> None:
    server.fault = lambda server, body, before: reply
    assert words in refused(task_of(tiny, tmp_path / "out"), server, UserError)


@pytest.mark.parametrize(
    "message", [None, {}, "text", {"content": [{"type": "text", "text": "a"}]}]
)
def test_an_odd_answer_to_a_chat_is_one_line(
    tiny: Path, chat_teacher: Path, tmp_path: Path, server: Any, message: Any
) -> None:
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    server.fault = lambda server, body, before: (200, {}, {"choices": [choice]})
    task = task_of(tiny, tmp_path / "out")
    said = refused(Task(chat_teacher, task.data, task.generation, task.out), server, UserError)
    assert "not as an OpenAI-compatible server does" in said


@pytest.mark.parametrize(
    "choice",
    [
        {"finish_reason": "content_filter", "message": None},
        {"finish_reason": "content_filter", "message": {"content": "I ca"}},
        {"finish_reason": "length", "message": {"content": None}},
        {"finish_reason": "length", "message": {"role": "assistant"}},
        None,  # refused with 400
    ],
)
def test_a_document_that_is_filtered_is_left_out_and_blocks_nothing(
    tiny: Path, chat_teacher: Path, tmp_path: Path, server: Any, choice: Any
) -> None:
    filtered = expected_of(tiny)[7][1]

    def answer(server: Any, body: dict[str, Any], before: int) -> Any:
        if server.words(body) != filtered:
            return server.answer(body)
        if choice is None:
            return 400, {}, {"error": {"message": "our policy", "code": "content_filter"}}
        return 200, {}, {"choices": [{"index": 0, **choice}]}

    server.fault = answer
    task, out = task_of(tiny, tmp_path / "out"), tmp_path / "out"
    data = task.data.model_copy(update={"prompt": PromptConfig(user_template="{document}")})
    manifest = write(Task(chat_teacher, data, task.generation, out, piece=6), server)
    kept = [pair for pair in expected_of(tiny) if pair[1] != filtered]
    assert found_in(out) == kept and len(kept) < DOCUMENTS
    assert (len(manifest["empty"]), manifest["cut"]) == (DOCUMENTS - len(kept), [])


def test_what_nobody_foresaw_is_raised_when_no_request_is_under_way(
    tiny: Path, tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = []

    def slow(server: Any, body: dict[str, Any], before: int) -> Any:
        time.sleep(0.2 * (server.words(body) != expected_of(tiny)[0][1]))
        answered.append(body)
        return server.answer(body)

    text = EndpointWriter._text
    read: list[Any] = []

    def fails_once(self: EndpointWriter, answer: Any) -> Any:
        read.append(answer)
        if len(read) == 1:
            raise ZeroDivisionError
        return text(self, answer)

    server.fault = slow
    monkeypatch.setattr(EndpointWriter, "_text", fails_once)
    with pytest.raises(ZeroDivisionError):
        write(task_of(tiny, tmp_path / "out"), server, concurrency=4)
    assert len(read) == len(answered) == 4, "and nothing more is asked for"


def test_a_key_that_cannot_be_sent_is_named_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("sk-secrét", "sk-secret\n", "sk secret"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UserError, match=r"^\$OPENAI_API_KEY: character \d+ is") as caught:
            Endpoint("http://host/v1", "tiny")
        assert "secr" not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    assert "secret" not in repr(Endpoint("http://host/v1", "tiny"))


def test_the_key_is_sent_and_never_shown(
    tiny: Path, tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1")
    server.fault = lambda server, body, before: (
        401,
        {},
        {"error": {"message": "Incorrect API key provided: sk-secret-1"}},
    )
    said = refused(task_of(tiny, tmp_path / "out"), server, UserError)
    assert "check $OPENAI_API_KEY" in said and "sk-secret-1" not in said
    server.fault = lambda server, body, before: server.answer(body)
    write(task_of(tiny, tmp_path / "out"), server)
    assert server.keys == {"Bearer sk-secret-1"}
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or b"sk-secret-1" not in path.read_bytes()


def test_samples_have_seeds_of_their_own(tiny: Path, tmp_path: Path, server: Any) -> None:
    sampling = {"method": "sample", "temperature": 0.7, "top_p": 0.9, "top_k": 20}
    task = task_of(tiny, tmp_path / "out", per_document=2, **sampling)
    manifest = write(task, server)
    assert manifest["summaries"] == 2 * DOCUMENTS
    assert found_in(tmp_path / "out") == [pair for pair in expected_of(tiny) for _ in range(2)]
    assert {(b["temperature"], b["top_p"], b["top_k"]) for b in server.bodies} == {(0.7, 0.9, 20)}
    seeds = {body["seed"] for body in server.bodies}
    assert len(seeds) == 2 * DOCUMENTS
    server.bodies.clear()
    write(Task(**{**task.__dict__, "out": tmp_path / "again"}), server)
    assert {body["seed"] for body in server.bodies} == seeds


def test_cut_and_empty_texts_are_told(tiny: Path, tmp_path: Path, server: Any) -> None:
    first, second = (document.split("-") for _, document in expected_of(tiny)[:2])

    def answer(server: Any, body: dict[str, Any], before: int) -> Any:
        words = body["prompt"].split()[:3]
        if words == first:
            return server.answer(body, "length")
        status, headers, found = server.answer(body)
        if words == second:
            found["choices"][0]["text"] = " \n"
        return status, headers, found

    server.fault = answer
    manifest = write(task_of(tiny, tmp_path / "out"), server)
    same = [id_ for id_, text in expected_of(tiny) if text.split("-") == first]
    none = [id_ for id_, text in expected_of(tiny) if text.split("-") == second]
    assert (manifest["cut"], manifest["empty"]) == (same, none)
    assert found_in(tmp_path / "out") == [p for p in expected_of(tiny) if p[0] not in none]


def test_where_everything_is_empty_nothing_is_done_and_the_next_start_asks_again(
    tiny: Path, tmp_path: Path, server: Any
) -> None:
    server.fault = lambda server, body, before: (200, {}, {"choices": [{"text": "", "index": 0}]})
    task = task_of(tiny, tmp_path / "out")
    assert "wrote nothing for any of 40 documents" in refused(task, server, UserError)
    assert not (tmp_path / "out" / "train.jsonl").exists()
    server.fault = lambda server, body, before: server.answer(body)
    assert write(task, server)["summaries"] == DOCUMENTS
    assert found_in(tmp_path / "out") == expected_of(tiny)


def test_documents_need_no_reference_and_training_does(
    tiny: Path, tmp_path: Path, server: Any
) -> None:
    rows = [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["topic"] = f"t{number}"
        match number % 5:
            case 0:
                del row["summary"]
            case 1:
                row["summary"] = ["", []][number % 2]
            case 2:
                row["summary"] = None
            case 3:
                row["summary"] = "much longer than the window " * 50
    path, out = tmp_path / "documents.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = task_of(tiny, out)
    data = task.data.model_copy(update={"source": str(path)})
    write(Task(task.model, data, task.generation, out), server)
    assert found_in(out) == expected_of(tiny)
    written = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert [row["topic"] for row in written] == [f"t{number}" for number in range(DOCUMENTS)]
    assert {tuple(row) for row in written} == {("id", "document", "topic", "summary")}
    with pytest.raises(UserError, match=r"line 1: there is no column 'summary'"):
        build_records(data)
    # As in training, where no template may use the summary.
    assert build_records(data, summarized=False)[3].fields == {"topic": "t3"}


def test_a_chat_goes_as_turns_and_the_template_is_told_what_ours_is(
    tiny: Path, chat_teacher: Path, tmp_path: Path, server: Any
) -> None:
    task = task_of(tiny, tmp_path / "out")
    template = {"user_template": "{document}\n\nSummary:", "system": "Be brief."}
    data = DataConfig(source=task.data.source, max_length=64, prompt=template)
    write(Task(chat_teacher, data, task.generation, task.out), server)
    body = server.bodies[0]
    assert body["path"] == "/v1/chat/completions"
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["messages"][1]["content"].endswith("\n\nSummary:")
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert found_in(tmp_path / "out") == expected_of(tiny)


def test_another_chat_template_is_not_mixed_in(
    tiny: Path, chat_teacher: Path, tmp_path: Path, server: Any
) -> None:
    changed, task = tmp_path / "changed", task_of(tiny, tmp_path / "out")
    shutil.copytree(chat_teacher, changed)
    write(Task(changed, task.data, task.generation, task.out), server)
    template = changed / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant:", "assistent:"))
    said = refused(Task(changed, task.data, task.generation, task.out), server, UserError)
    assert "holds summaries that were made otherwise: model.tokenizer changed from" in said


def test_a_long_document_is_cut_as_for_a_local_model(
    tiny: Path, tmp_path: Path, server: Any
) -> None:
    from makd_llm.models.source import load_tokenizer
    from makd_llm.train.build import build_prompts

    task = task_of(tiny, tmp_path / "out")
    data = task.data.model_copy(update={"max_length": 24})
    write(Task(task.model, data, task.generation, task.out), server, concurrency=1)
    tokenizer = load_tokenizer(task.model)
    prompts = build_prompts(data, tokenizer)
    sent = [tokenizer(body["prompt"])["input_ids"] for body in server.bodies]
    local = [prompts.prompt_ids(record, 8) for record in build_records(data)]
    assert sent == local and max(map(len, sent)) == 16
    assert any(len(prompts.prompt_ids(r, 8)) < len(tokenizer(r.document)["input_ids"]) + 4
               for r in build_records(data))  # fmt: skip


def test_a_prompt_that_the_server_would_see_otherwise_is_refused(
    tiny: Path, chat_teacher: Path, tmp_path: Path, server: Any
) -> None:
    task = task_of(tiny, tmp_path / "out")
    text = DataConfig(source=task.data.source, max_length=64, prompt={"bos": "always"})
    write(Task(task.model, text, task.generation, task.out), server)
    assert all(body["prompt"].startswith("<s>") for body in server.bodies)
    # A chat whose turns do not open with BOS: only the local model can be given one.
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in chat_teacher.iterdir():
        (bare / path.name).write_bytes(path.read_bytes())
    (bare / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    said = refused(Task(bare, text, task.generation, tmp_path / "chat"), server, UserError)
    assert "train.jsonl, line 1" in said and "data.prompt.bos is 'always'" in said


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("localhost:8000", "no URL of a server"),
        ("ftp://x/v1", "no URL of a server"),
        ("http://[bad/v1", "no URL of a server"),
        ("http://host:80a/v1", "no URL of a server"),
        ("http://host:99999/v1", "no URL of a server"),
        ("http://ho\nst/v1", "no URL of a server"),
        ("http://me:word@host/v1", "the key belongs in"),
        ("me:word@host:8000/v1", "the key belongs in"),
        ("//word@host/v1", "the key belongs in"),
        ("http://me:wo/rd@host/v1", "the key belongs in"),
        ("http://host/v1?api-key=word", "has a query or a fragment"),
        ("http://host#word", "has a query or a fragment"),
    ],
)
def test_wrong_urls(url: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        Endpoint(url, "tiny")
    assert "word" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_url_without_a_path_gets_its_version() -> None:
    assert Endpoint("http://host:8000", "m").base_url == "http://host:8000/v1"
    assert Endpoint("http://host:8000/", "m").base_url == "http://host:8000/v1"
    assert Endpoint("http://host/proxy/v1", "m").base_url == "http://host/proxy/v1"


def test_beams_are_refused(tiny: Path, tmp_path: Path, server: Any) -> None:
    said = refused(task_of(tiny, tmp_path / "out", method="beam"), server, UserError)
    assert "beam search is not part of the OpenAI protocol" in said and server.bodies == []
