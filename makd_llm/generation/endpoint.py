"""Pieces written by a model behind an OpenAI-compatible server: vLLM, `transformers serve`, others.

A plain prompt goes to `/v1/completions`, a chat to `/v1/chat/completions`. The client of `openai`
asks again after refused connections, time-outs, 408, 409, 429 and 5xx, waits longer each time (up
to 8 s, with jitter) or as long as Retry-After says (up to two minutes). What no repetition can mend
ends the run in one line; so does a request that failed once too often. Whatever ends it, requests
that are under way come to their end first, and whole pieces are kept.

What the server's own generation settings add (a repetition penalty, say) is out of sight here;
vLLM leaves them away with `--generation-config vllm`.
"""

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai

from makd_llm.errors import Interrupted, RunEnded, Unavailable, UserError
from makd_llm.generation.decoding import Decoding
from makd_llm.generation.documents import Documents, Text
from makd_llm.generation.engine import Save

KEY = "OPENAI_API_KEY"

WORTH_ANOTHER_TRY = (408, 409, 429)
"""Of the 4xx, those that may go away; the client asks again after them and after 5xx."""

UNREADABLE = (json.JSONDecodeError, UnicodeDecodeError, RecursionError)
"""What the client raises for an answer that calls itself JSON and is none."""


def _key() -> str:
    """The key of the environment, or nothing. Raises UserError for one that cannot be sent."""
    key = os.environ.get(KEY, "")
    for place, sign in enumerate(key, 1):
        if not "!" <= sign <= "~":
            raise UserError(
                f"${KEY}: character {place} is a space, a line break or not ASCII, and no key has "
                "one; set the key again"
            )
    return key


def _is_of_a_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        httpx.URL(url)  # the client's own reading, which refuses what urlsplit passes over
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except (ValueError, httpx.InvalidURL):
        return False


@dataclass(frozen=True)
class Endpoint:
    """A server and how it is asked. timeout: seconds for one answer. Raises UserError for a URL
    that is none, or that holds more than a server and a path, and for a key that cannot be sent.
    """

    url: str
    model: str
    concurrency: int = 16
    retries: int = 10
    timeout: float = 600.0
    key: str = field(default_factory=_key, repr=False)

    def __post_init__(self) -> None:
        # None of these is shown: what stands before an @ or behind a ? may be a key.
        if "@" in self.url:
            raise UserError(
                f"--endpoint: the URL has an @, as behind a user's name; the key belongs in ${KEY} "
                "(an @ that is part of a path is written %40)"
            )
        if "?" in self.url or "#" in self.url:
            raise UserError(
                "--endpoint: the URL has a query or a fragment (what begins with ? or #), which "
                f"requests cannot keep; leave it out, the key belongs in ${KEY}"
            )
        if not _is_of_a_server(self.url):
            raise UserError(
                f"--endpoint {self.url!r}: no URL of a server; example: http://127.0.0.1:8000/v1"
            )

    @property
    def base_url(self) -> str:
        """With the version: a URL without a path gets /v1."""
        return self.url if urlsplit(self.url).path.strip("/") else f"{self.url.rstrip('/')}/v1"


class EndpointWriter:
    """Writes pieces by asking for each text by itself, so many at a time, in order.

    Greedy is temperature 0. For sampling each request has a seed of its own, made from the seed,
    the document's place and the copy's number; what it is worth is up to the server. Raises
    UserError for beams, which the protocol does not know.
    """

    def __init__(self, endpoint: Endpoint, documents: Documents, decoding: Decoding) -> None:
        if decoding.method == "beam":
            raise UserError(
                "beam search is not part of the OpenAI protocol; use greedy or sample, or let the "
                "local engine write (without --endpoint)"
            )
        self._endpoint, self._documents, self._decoding = endpoint, documents, decoding
        self._failure: Exception | None = None

    def write(self, pieces: Sequence[int], save: Save, advance: Callable[[int], None]) -> None:
        """Writes the pieces; each is saved when its last answer is there. advance: is told how many
        more documents are finished.

        Raises UserError where the server refuses, Unavailable where it does not answer, Interrupted
        after SIGTERM or SIGINT.
        """
        asyncio.run(self._write(pieces, save, advance))

    async def _write(
        self, pieces: Sequence[int], save: Save, advance: Callable[[int], None]
    ) -> None:
        answers: dict[int, dict[tuple[int, int], Text]] = {piece: {} for piece in pieces}

        requests = self._requests(pieces)

        async def ask_on(client: openai.AsyncOpenAI) -> None:
            while self._failure is None:
                asked = next(requests, None)
                if asked is None:
                    return
                piece, place, copy = asked
                own = answers[piece]
                own[place, copy] = await self._ask(client, place, copy)
                places = self._documents.places(piece)
                if len(own) == len(places) * self._decoding.copies:
                    save(piece, self._lines(piece, answers.pop(piece)))
                    advance(len(places))

        async def ask_until_the_end(client: openai.AsyncOpenAI) -> None:
            try:
                await ask_on(client)
            except (openai.OpenAIError, *UNREADABLE) as error:
                self._failure = self._failure or self._ended_by(error)
            except Exception as error:  # noqa: BLE001 - raised below, when no request is under way
                self._failure = self._failure or error

        with _stopping():
            async with self._client() as client, asyncio.TaskGroup() as group:
                for _ in range(self._endpoint.concurrency):
                    group.create_task(ask_until_the_end(client))
        if self._failure is not None:
            raise self._failure

    def _client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=self._endpoint.base_url,
            # Servers of one's own ask for none, but the client insists on having one.
            api_key=self._endpoint.key or "none",
            max_retries=self._endpoint.retries,
            timeout=self._endpoint.timeout,
        )

    def _requests(self, pieces: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        for piece in pieces:
            for place in self._documents.places(piece):
                for copy in range(self._decoding.copies):
                    yield piece, place, copy

    def _lines(self, piece: int, texts: dict[tuple[int, int], Text]) -> list[dict[str, Any]]:
        found = []
        for place in self._documents.places(piece):
            own = [texts[place, copy] for copy in range(self._decoding.copies)]
            found += self._documents.lines(place, own)
        return found

    async def _ask(self, client: openai.AsyncOpenAI, place: int, copy: int) -> Text:
        prompt: Any = self._documents.request(place)
        settings, more = self._settings(place, copy)
        try:
            if isinstance(prompt, str):
                return self._text(
                    await client.completions.create(prompt=prompt, extra_body=more, **settings)
                )
            if options := self._documents.prompts.template_options:
                more = {**more, "chat_template_kwargs": options}
            return self._text(
                await client.chat.completions.create(messages=prompt, extra_body=more, **settings)
            )
        except openai.BadRequestError as error:
            if error.code == "content_filter":
                return Text("", ended=False)
            raise

    def _settings(self, place: int, copy: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Those of the protocol, and what servers of open models understand beside it."""
        decoding = self._decoding
        settings: dict[str, Any] = {
            "model": self._endpoint.model,
            "max_tokens": decoding.max_new_tokens,
        }
        if decoding.method == "greedy":
            return {**settings, "temperature": 0.0}, {}
        seed = int(np.random.default_rng([decoding.seed, place, copy]).integers(2**31))
        settings |= {"temperature": decoding.temperature, "top_p": decoding.top_p, "seed": seed}
        return settings, {} if decoding.top_k is None else {"top_k": decoding.top_k}

    def _text(self, answer: object) -> Text:
        """What an answer holds; anything may stand behind a URL. What a filter kept back, or what
        is null, is an empty text.
        """
        found = answer.to_dict(warnings=False) if isinstance(answer, openai.BaseModel) else {}
        match found.get("choices"):
            case [{"finish_reason": "content_filter"}, *_]:
                return Text("", ended=False)
            case [{"text": written, **choice}, *_]:
                pass
            case [{"message": {"role": _} | {"content": _} as message, **choice}, *_]:
                written = message.get("content")  # some servers leave a null out
            case _:
                raise self._no_server()
        if not isinstance(written, str | None):
            raise self._no_server()
        # Half of a surrogate pair, which JSON can spell, has no UTF-8 form.
        text = (written or "").encode("utf-8", "replace").decode("utf-8")
        return Text(text.strip(), ended=choice.get("finish_reason") == "stop")

    def _no_server(self) -> UserError:
        return UserError(
            f"{self._endpoint.base_url} answered, but not as an OpenAI-compatible server does; "
            "check --endpoint (it usually ends in /v1)"
        )

    def _ended_by(self, error: Exception) -> RunEnded:
        """What a failed request means for the run, without the key in it."""
        where = f"{self._endpoint.base_url} ({self._endpoint.model})"
        if isinstance(error, UNREADABLE):
            return self._no_server()
        reason = self._said(error)
        if isinstance(error, openai.APIStatusError):
            code = error.status_code
            if code < 500 and code not in WORTH_ANOTHER_TRY:
                advice = {401: f"check ${KEY}", 403: f"check ${KEY}", 404: "check --model-name"}
                return UserError(
                    f"{where} refused a request with {code}: {reason}; "
                    f"{advice.get(code, 'check the prompt and the settings')}"
                )
            reason = f"{code}: {reason}"
        return Unavailable(
            f"{where} gave no answer, with up to {self._endpoint.retries} retries ({reason}); what "
            "was finished is kept, and the same command goes on from it"
        )

    def _said(self, error: Exception) -> str:
        """The reason in at most 300 characters, without the key should a server repeat it."""
        reason, key = " ".join(str(error).split()), self._endpoint.key
        return (reason.replace(key, f"${KEY}") if key else reason)[:300]


@contextmanager
def _stopping() -> Iterator[None]:
    """SIGTERM and SIGINT cancel this task, and leave it as Interrupted: a handler that raises could
    be lost in the event loop.
    """
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    received = []
    kinds = (signal.SIGTERM, signal.SIGINT)

    def stop(kind: signal.Signals) -> None:
        received.append(kind)
        task.cancel()

    before = {kind: signal.getsignal(kind) for kind in kinds}
    for kind in kinds:
        loop.add_signal_handler(kind, stop, kind)
    try:
        yield
    except asyncio.CancelledError:
        if not received:
            raise
        raise Interrupted("stopped; the same command goes on from what is finished") from None
    finally:
        for kind in kinds:
            loop.remove_signal_handler(kind)
            signal.signal(kind, before[kind])
