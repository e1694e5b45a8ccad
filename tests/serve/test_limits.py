"""Refusals of the server; refusals, departures and floods leave it as it was."""

import asyncio
import contextlib
import json
import random
import socket
import time

import pytest
from serve_setup import httpx, n_open, running, until

from open_lm.serve import silence

BODY = {"prompt": "the quick", "max_tokens": 200, "temperature": 0}


WRONG = [
    ("{", "JSON"),
    ("[]", "object|dictionary"),
    ({}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [99999]}, "vocab|ids"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "x", "max_tokens": "5"}, "max_tokens"),
    ({"prompt": "x", "max_tokens": True}, "max_tokens"),
    ({"prompt": "x", "temperature": -0.1}, "temperature"),
    ('{"prompt": "x", "temperature": NaN}', "temperature|JSON"),
    ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "top_p": 1.1}, "top_p"),
    ({"prompt": "x", "min_p": 2}, "min_p"),
    ({"prompt": "x", "n": 0}, "n"),
    ({"prompt": "x", "n": 129}, "n"),
    ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ({"prompt": "x", "stop": ""}, "stop: a string of 0 characters; give 1 to 1000, or leave stop out."),
    ({"prompt": "x", "stop": [""]}, "stop"),
    ({"prompt": "x", "stop": ["a"] * 17}, "stop: 17 strings; at most 16 are looked for."),
    ({"prompt": "x", "stop": [["a"]]}, "stop: give a string or a list of strings."),
    ({"prompt": "x", "repetition_penalty": 1e-30}, "repetition_penalty"),
    ({"prompt": "x", **dict.fromkeys(map(str, range(100)))}, "101 fields"),
    ({"prompt": "x", "seed": 2**64}, "seed"),
    ({"prompt": "x", "frequency_penalty": 0.5}, "frequency_penalty"),
    ({"prompt": "x", "logit_bias": {"5": 1}}, "logit_bias"),
    ({"prompt": "x", "suffix": "y"}, "suffix"),
    ({"prompt": "x", "best_of": 3}, "best_of"),
    ({"prompt": "x", "max_token": 3}, "max_token"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ('{"prompt": "\\ud800"}', "prompt|JSON"),
    ({"prompt": "x" * 256}, "context"),
    ({"prompt": "x", "model": "../../etc/passwd"}, "No model"),
    ({"prompt": "x", "n": 100, "model": None, "temperature": None, "max_tokens": 2**40}, "max_tokens"),
    ("[" * 100_000, "The body cannot be read as JSON: maximum recursion depth exceeded"),
    ('{"prompt": "x", "seed": ' + "1" * 5000 + "}", "The body cannot be read as JSON: Exceeds the limit"),
    ("", "The body is empty: send a JSON object."),
]


@pytest.mark.parametrize(("body", "says"), WRONG, ids=lambda value: str(value)[:30])
def test_bodies_that_are_wrong_get_a_400_that_says_why(client, body, says):
    content = body if isinstance(body, str) else json.dumps(body)
    answer = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert any(word in error["message"] or word == error["param"] for word in says.split("|")), error["message"]
    assert "Traceback" not in answer.text and "open_lm/" not in answer.text


SETTINGS = {
    "max_tokens": 2, "temperature": 1.0, "n": 1, "stop": ["a"], "seed": 1, "stream": False, "top_p": 0.5,
    "model": None, "stream_options": None,
}  # fmt: skip
BODIES = {
    "/v1/completions": {"prompt": "x", "logprobs": 1, "echo": True, **SETTINGS},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "logprobs": True, **SETTINGS},
    "/loglikelihood": {"prefix_text": ["a"], "text": ["b"]},
    "/loglikelihood-rolling": {"text": ["ab"]},
    "/greedy-until": {"prefix_text": ["a"], "until": [["e"]]},
    "/generate": {"prefix_text": ["a" * 250], "temperature": 1.0},
    "/chat": {"prompt": "a" * 200, "context": "", "temperature": 1.0},
}
ODD = [
    "", "x", -1, 0, 2**70, -(2**70), 1e308, True, [], {}, [[]], [None], [[1, "a"]], {"a": 1}, "\x00", "é" * 300,
    [1, 2**31], [[1], "a"], "9" * 50, [-1], [0.5], [["a"]], [{}], [{"role": "user"}],
    [{"role": "tool", "content": "x"}],
    [{"role": "user", "content": []}], [{"role": "user", "content": [{"type": "text"}]}], ["é" * 300], "\ud800", [""],
]  # fmt: skip


def mutated(rng, body):
    """A valid body with some values replaced by others of any kind."""
    body = dict(body)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*body, *body, "unknown", "__proto__", "best_of", "logit_bias", "suffix", "user"])
        body[name] = rng.choice(ODD)
    return body


@pytest.mark.parametrize("n", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_mutated_bodies_get_an_answer_and_leave_the_server_whole(client, server, n):
    rng, statuses = random.Random(0), []
    for number in range(n):
        path = list(BODIES)[number % len(BODIES)]
        content = json.dumps(mutated(rng, BODIES[path]))
        answer = client.post(path, content=content, headers={"content-type": "application/json"})
        statuses.append(answer.status_code)
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, (content, answer.status_code, answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"]["message"] and "Traceback" not in answer.text
    assert statuses.count(400) > 0.7 * n
    assert until(lambda: n_open(server[1]) == 0)
    assert client.post("/v1/completions", json={**BODY, "max_tokens": 3}).status_code == 200


def test_other_ways_in_are_closed(client, server):
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/nowhere").json()["error"]["message"].startswith("Not Found")
    assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404
    plain = client.post("/v1/completions", content=json.dumps(BODY), headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    other = client.post("/v1/completions", json=BODY, headers={"host": "evil.example"})
    assert other.status_code == 403
    for path in ("/../../etc/passwd", "/page/../config.py", "/%2e%2e/config.py"):
        assert client.get(path).status_code == 404


def test_a_body_beyond_the_limit_is_refused_before_it_is_read_declared_or_not(folder):
    with running(folder, max_body_mb=0.01) as (url, _):
        declared = httpx.post(f"{url}/v1/completions", json={"prompt": "x" * 20_000})
        chunks = (b"x" * 1000 for _ in range(11))
        flowing = httpx.post(f"{url}/v1/completions", content=chunks, headers={"content-type": "application/json"})
        assert declared.status_code == flowing.status_code == 413
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(server, monkeypatch):
    from open_lm.serve import limits

    monkeypatch.setattr(limits, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(limits, "DRAIN_SECONDS", 0.1)
    monkeypatch.setattr(silence, "SILENT_SECONDS", 1.0)
    with socket.create_connection(("127.0.0.1", int(server[0].rpartition(":")[2])), timeout=10) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f'{head}Content-Length: 99\r\n\r\n{{"prompt'.encode())
        answer = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
    assert answer.startswith("HTTP/1.1 408") and "did not come within 0.2 seconds" in answer


def test_with_a_key_only_those_who_have_it_come_in(folder):
    with running(folder, api_key="secret") as (url, _):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer sécret".encode()}):
            answer = httpx.post(f"{url}/v1/completions", json=BODY, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
            assert httpx.get(f"{url}/metrics", headers=headers).status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200
        good = {"authorization": "bearer secret", "host": "a.proxy"}  # the scheme's case does not count
        assert httpx.post(f"{url}/v1/completions", json=BODY, headers=good, timeout=60).status_code == 200


def test_texts_beyond_slots_and_queue_get_a_429_that_says_when_to_come_back(folder):
    async def flood(url):
        async with httpx.AsyncClient(timeout=60) as client:
            return await asyncio.gather(*[client.post(f"{url}/v1/completions", json=BODY) for _ in range(12)])

    with running(folder, slots=2, max_queue=3) as (url, state):
        answers = asyncio.run(flood(url))
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses == [200] * 5 + [429] * 7
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert len({a.json()["choices"][0]["text"] for a in answers if a.status_code == 200}) == 1
        assert until(lambda: n_open(state) == 0)
        many = httpx.post(f"{url}/v1/completions", json={**BODY, "n": 6})
        assert many.status_code == 400 and "at once" in many.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_vanishes_frees_its_slots_within_a_second(folder, monkeypatch, path, stream):
    from open_lm.generation.engine import Engine

    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: (time.sleep(0.02), step(self))[1])  # 200 tokens take 4 seconds
    with running(folder) as (url, state):
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            asked = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
            body = json.dumps({**asked, "max_tokens": 200, "n": 3, "stream": stream, "temperature": 0}).encode()
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert until(lambda: n_open(state) == 3)
            time.sleep(0.3)
        assert until(lambda: n_open(state) == 0, seconds=1.0)
        name = next(iter(state.models))
        assert f'openlm_texts_total{{model="{name}",reason="cancelled"}} 3' in state.metrics.text()


def test_a_request_beyond_its_time_ends_with_a_504(folder, monkeypatch):
    from open_lm.generation.engine import Engine

    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: (time.sleep(0.05), step(self))[1])
    with running(folder, max_seconds=0.3) as (url, state):
        answer = httpx.post(f"{url}/v1/completions", json=BODY)
        assert answer.status_code == 504 and "0.3 seconds" in answer.json()["error"]["message"]
        with httpx.stream("POST", f"{url}/v1/completions", json={**BODY, "stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert "0.3 seconds" in lines[-2] and lines[-1] == "data: [DONE]"
        assert until(lambda: n_open(state) == 0)


def test_an_engine_that_fails_answers_500_without_a_trace_and_goes_on(folder, monkeypatch, caplog):
    from open_lm.generation.engine import Engine

    step, failures = Engine.step, iter([True])

    def failing(self):
        if next(failures, False):
            raise RuntimeError("the secret reason")
        return step(self)

    monkeypatch.setattr(Engine, "step", failing)
    with running(folder) as (url, _):
        answer = httpx.post(f"{url}/v1/completions", json=BODY)
        assert answer.status_code == 500 and "secret" not in answer.text
        assert "the secret reason" in caplog.text
        assert httpx.post(f"{url}/v1/completions", json=BODY, timeout=60).status_code == 200


def test_metrics_are_in_prometheus_form_and_count(client, server):
    model = next(iter(server[1].models))
    before = client.get("/metrics").text
    client.post("/v1/completions", json={**BODY, "max_tokens": 7})
    after = client.get("/metrics").text

    def value(text, name):
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    written = f'openlm_generated_tokens_total{{model="{model}"}}'
    assert value(after, written) == value(before, written) + 7
    bucket = f'openlm_text_seconds_bucket{{model="{model}",le="+Inf"}}'
    assert (
        value(after, bucket)
        == value(before, bucket) + 1
        == value(after, f'openlm_text_seconds_count{{model="{model}"}}')
    )
    for line in after.splitlines():
        assert line.startswith("# ") or len(line.rpartition(" ")[0].split("{")[0].split()) == 1


def test_a_text_that_ends_in_the_step_that_fails_is_answered_and_frees_its_place(folder, monkeypatch):
    from open_lm.generation.engine import Engine

    write, failures = Engine._write, iter([True])

    def failing(self, just_read):
        if just_read and next(failures, False):
            raise RuntimeError("no memory")
        return write(self, just_read)

    monkeypatch.setattr(Engine, "_write", failing)
    with running(folder, max_seconds=5) as (url, state):
        scored = httpx.post(f"{url}/v1/completions", json={"prompt": "abc", "max_tokens": 0}, timeout=10)
        assert scored.status_code == 200 and n_open(state) == 0


def test_who_only_asks_for_the_head_gets_it(client):
    for path in ("/", "/health", "/ready", "/metrics", "/v1/models"):
        answer = client.head(path)
        assert answer.status_code == 200 and answer.content == b""


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.2:1", 200), ("[::1]", 200), ("localhost:1", 200), ("127.0.0.1.nip.io", 403), ("0.0.0.0", 403)],
)
def test_all_names_of_this_machine_alone_are_answered(client, host, status):
    assert client.get("/health", headers={"host": host}).status_code == status


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_and_texts_are_in_the_log_only_when_asked_for(folder, caplog, log_prompts):
    caplog.set_level("INFO")
    with running(folder, log_prompts=log_prompts) as (url, _):
        text = httpx.post(f"{url}/v1/completions", json={**BODY, "prompt": "private words"}, timeout=60).json()
        assert text["choices"]
    assert ("private words" in caplog.text) == log_prompts


def test_an_answer_goes_back_as_the_official_client_dumps_it(client):
    empty = {"annotations": None, "audio": None, "function_call": None, "tool_calls": None, "refusal": None}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **empty}]
    body = {"messages": [*turns, {"role": "user", "content": "c"}], "max_tokens": 1}
    assert client.post("/v1/chat/completions", json=body).status_code in (200, 400)
    calls = {**turns[1], "tool_calls": [{"id": "x"}]}
    refused = client.post("/v1/chat/completions", json={"messages": [turns[0], calls], "max_tokens": 1})
    assert refused.status_code == 400 and "tool_calls" in refused.text


def test_connections_on_which_nothing_is_asked_are_closed(folder, monkeypatch):
    monkeypatch.setattr(silence, "SILENT_SECONDS", 1.0)
    with running(folder) as (url, _), contextlib.ExitStack() as stack:
        place = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        nothing, half = (stack.enter_context(socket.create_connection(place, timeout=20)) for _ in range(2))
        half.sendall(b"GET /health HTTP/1.1\r\nHost: local")
        long = {"prompt": "abc", "max_tokens": 200, "n": 40, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=long, timeout=60)
        assert len(answer.json()["choices"]) == 40  # also when that takes longer
        used = stack.enter_context(socket.create_connection(place, timeout=20))
        used.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert used.recv(12) == b"HTTP/1.1 200"
        used.sendall(b"GET /hea")
        for connection in (nothing, half, used):
            while connection.recv(1024):
                pass  # until its end; a timeout fails the test
