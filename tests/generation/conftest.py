"""A split of the tiny data as documents, and a server that can be told to misbehave."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

Fault = Callable[["FakeServer", dict[str, Any], int], tuple[int, dict[str, str], Any] | None]
"""(server, request body, how often it was asked before) -> status, headers and body of an answer;
None: the connection is dropped."""


class FakeServer:
    """An OpenAI-compatible server on a free port: its answer to a prompt is the prompt's last
    words. `fault` may answer in its place.
    """

    def __init__(self) -> None:
        self.fault: Fault = lambda server, body, before: server.answer(body)
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.at_a_time = self.most_at_a_time = 0
        self.asked_at: dict[str, list[float]] = {}
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @staticmethod
    def words(body: dict[str, Any]) -> str:
        """What the server writes: of the document in the prompt, the first three words."""
        prompt = body.get("prompt") or body["messages"][-1]["content"]
        return "-".join(prompt.split("\n\nSummary:")[0].split()[:3])

    def answer(self, body: dict[str, Any], finish: str = "stop") -> tuple[int, dict[str, str], Any]:
        text = " " + self.words(body)
        told = {"text": text} if "prompt" in body else {"message": {"content": text}}
        return 200, {}, {"choices": [{"index": 0, "finish_reason": finish, **told}]}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = json.dumps(body, sort_keys=True)
                with server._lock:
                    before = server._asked[name]
                    server._asked[name] += 1
                    server.bodies.append({**body, "path": self.path})
                    server.keys.add(self.headers["Authorization"])
                    server.asked_at.setdefault(name, []).append(time.monotonic())
                    server.at_a_time += 1
                    server.most_at_a_time = max(server.at_a_time, server.most_at_a_time)
                try:
                    self._reply(server.fault(server, body, before))
                except OSError:
                    pass  # the client went away
                finally:
                    with server._lock:
                        server.at_a_time -= 1

            def _reply(self, reply: tuple[int, dict[str, str], Any] | None) -> None:
                if reply is None:
                    self.close_connection = True
                    self.connection.close()
                    return
                status, headers, body = reply
                page = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                kind = "text/html" if isinstance(body, str) else "application/json"
                self.send_response(status)
                for header, value in {
                    "Content-Type": kind,
                    "Content-Length": str(len(page)),
                    **headers,
                }.items():
                    self.send_header(header, value)
                self.end_headers()
                self.wfile.write(page)

        return Handler


@pytest.fixture
def server() -> Iterator[FakeServer]:
    found = FakeServer()
    yield found
    found.close()


@pytest.fixture(scope="session")
def chat_teacher(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher with a chat template."""
    import shutil

    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("chat") / "teacher"
    shutil.copytree(tiny / "teacher", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant:{% endif %}"
        "{% if enable_thinking %}think{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder
