"""serve.py as its clients see it: the official OpenAI client, clients that die, and clients that send garbage."""

import asyncio
import json
import signal
import socket
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import openai
import pytest
from served import Served, write_model

from generation.engine import Piece
from serve import Config, listen, main
from serving.errors import ApiError
from serving.reader import Reader
from stage import UserError
from training import checkpoint

KEY = "a secret"
QUESTION = [{"role": "user", "content": "感冒了怎么办？"}]


@pytest.fixture(scope="module")
def model(vocabulary, tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("served") / "tiny", vocabulary)


@pytest.fixture(scope="module")
def servers(model):
    """A roomy server, and one with a key and with little of everything."""
    strict = [
        "--api_key",
        "another",
        KEY,
        "--slots",
        1,
        "--max_waiting",
        1,
        "--timeout",
        1.5,
        "--max_body",
        0.05,
    ]
    both = Served(model, "--slots", 4, "--max_waiting", 64), Served(model, *strict, "--strict_context")
    with ExitStack() as stack:
        for server in both:
            stack.callback(server.stop)
        yield [server.wait() for server in both]


@pytest.fixture
def server(servers) -> Served:
    return servers[0]


@pytest.fixture
def strict(servers) -> Served:
    return servers[1]


def client(server: Served, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


def ask(server: Served, content: str = "你好", **options):
    options = {"temperature": 0, "max_tokens": 12, **options}
    return client(server).chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}], **options
    )


def post(server: Served, body: object, path: str = "/v1/chat/completions", **options) -> httpx.Response:
    if isinstance(body, str | bytes):
        options["content"] = body
    else:
        options["json"] = body
    headers = {
        "Authorization": f"Bearer {KEY}",
        "Content-Type": "application/json",
        **options.pop("headers", {}),
    }
    return httpx.post(server.url + path, headers=headers, timeout=60, **options)


def assert_error(response: httpx.Response, status: int | None = None, param: str | None = None) -> dict:
    assert response.status_code == (status or response.status_code) and 400 <= response.status_code < 500
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert param is None or error["param"] == param, error
    return error


# ---- answers


def test_greedy_chat_is_what_the_model_answers(server, model) -> None:
    """Against Transformer and chat.py directly, without engine and server."""
    from chatglm_tokenizer.chat import encode_prompt

    loaded = checkpoint.load(model)
    ids = list(encode_prompt(QUESTION, loaded.tokenizer, 400))
    import torch

    prompt = len(ids)
    with torch.inference_mode():
        for _ in range(12):
            ids.append(int(loaded.model.eval()(torch.tensor([ids]))[0, -1].argmax()))
    answer = client(server).chat.completions.create(
        model="tiny", messages=QUESTION, temperature=0, max_tokens=12, logprobs=True, top_logprobs=2
    )
    choice = answer.choices[0]
    assert choice.message.content == loaded.tokenizer.decode(ids[prompt:]).lstrip()
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 12)
    assert answer.usage.total_tokens == prompt + 12
    assert answer.id.startswith("chatcmpl-") and answer.system_fingerprint.startswith("fp_")
    assert abs(answer.created - time.time()) < 100
    tokens = choice.logprobs.content
    assert len(tokens) == 12 and all(len(t.top_logprobs) == 2 for t in tokens)
    assert all(t.logprob == t.top_logprobs[0].logprob <= 0 for t in tokens)  # greedy


def test_a_stream_is_the_whole_answer_in_pieces(server) -> None:
    whole = ask(server, logprobs=True)
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}, logprobs=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1
    tokens = [t for c in chunks[:-1] if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.token for t in tokens] == [t.token for t in whole.choices[0].logprobs.content]
    raw = post(server, {"model": "tiny", "messages": QUESTION, "max_tokens": 2, "stream": True})
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.text.endswith("data: [DONE]\n\n")


def test_completions_of_texts_ids_and_lists_of_them(server, model) -> None:
    tokenizer = checkpoint.load(model).tokenizer
    create = client(server).completions.create
    options = dict(model="tiny", temperature=0, max_tokens=8)
    one = create(prompt="北京是", **options)
    by_ids = create(prompt=tokenizer.encode("北京是"), **options)
    many = create(prompt=["中国", "北京是"], n=2, echo=True, **options)
    assert one.choices[0].text == by_ids.choices[0].text
    assert [c.index for c in many.choices] == [0, 1, 2, 3]
    assert [c.text for c in many.choices[2:]] == ["北京是" + one.choices[0].text] * 2
    assert many.usage.completion_tokens == 32
    assert many.usage.prompt_tokens == len(tokenizer.encode("中国")) + one.usage.prompt_tokens
    streamed = "".join(c.choices[0].text for c in create(prompt="北京是", echo=True, stream=True, **options))
    assert streamed == "北京是" + one.choices[0].text
    assert create(prompt="", **options).usage.completion_tokens == 8
    told = create(prompt="北京是", logprobs=3, **options).choices[0].logprobs
    assert (
        len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 8
    )
    assert told.text_offset[0] == 0 and told.text_offset == sorted(told.text_offset)
    # What waits because a stop string may begin with it comes late and is where it was.
    stop = [token[-1:] + "绝不出现" for token in told.tokens[:4]]
    late = create(prompt="北京是", logprobs=3, stop=stop, **options).choices[0].logprobs
    assert (late.tokens, late.text_offset) == (told.tokens, told.text_offset)


def test_seeds_repeat_and_several_answers_differ(server) -> None:
    options = dict(temperature=1.5, seed=7, max_tokens=16)
    several = [[c.message.content for c in ask(server, n=4, **options).choices] for _ in range(2)]
    assert several[0] == several[1] and len(set(several[0])) == 4
    assert ask(server, **options).choices[0].message.content == several[0][0]
    assert ask(server, **{**options, "seed": 8}).choices[0].message.content != several[0][0]
    chunks = list(ask(server, n=4, stream=True, **options))
    for index in range(4):
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == index)
        assert text == several[0][index]


def test_stop_strings_end_the_answer_and_are_not_in_it(server) -> None:
    text = ask(server, max_tokens=40).choices[0].message.content
    stop = text[8:10]
    for given in (stop, ["不会出现的", stop]):
        choice = ask(server, max_tokens=40, stop=given).choices[0]
        assert choice.message.content == text[: text.index(stop)] and choice.finish_reason == "stop"


def test_roles_parts_and_parameters_that_ask_for_nothing(server) -> None:
    plain = ask(server, "你好").choices[0].message.content
    body = {
        "model": "tiny", "temperature": 0, "max_completion_tokens": 12, "tools": [], "logit_bias": None, "user": "u",
        "response_format": {"type": "text"}, "top_k": -1, "top_p": 1, "store": False, "stop": None,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]}],
    }  # fmt: skip
    assert post(server, body).json()["choices"][0]["message"]["content"] == plain
    dialogue = [{"role": "developer", "content": "简短"}, *QUESTION]
    first = client(server).chat.completions.create(model="tiny", messages=dialogue, max_tokens=4)
    dialogue += [
        first.choices[0].message,
        {"role": "user", "content": "然后呢"},
    ]  # as the client's objects are
    assert client(server).chat.completions.create(model="tiny", messages=dialogue, max_tokens=4).choices


def test_long_dialogues_lose_their_oldest_turns_or_are_refused(server, strict) -> None:
    turns = [*QUESTION, {"role": "assistant", "content": "多喝水。"}] * 150 + QUESTION
    answer = client(server).chat.completions.create(model="tiny", messages=turns, max_tokens=9999)
    assert answer.usage.total_tokens == 512  # the context is full
    for api, messages in ((strict, turns), (server, [{"role": "system", "content": "长" * 900}, *QUESTION])):
        with pytest.raises(openai.BadRequestError) as error:
            client(api).chat.completions.create(model="tiny", messages=messages)
        assert error.value.code == "context_length_exceeded"
    response = post(server, {"model": "tiny", "prompt": "长" * 900}, "/v1/completions")
    assert assert_error(response, 400, "prompt")["code"] == "context_length_exceeded"


def test_32_clients_at_once_get_what_each_would_get_alone(server) -> None:
    prompts = [f"第{i}个问题：{'天地人日月'[i % 5]}{i * i}是什么？" for i in range(32)]
    alone = [ask(server, p, max_tokens=10 + i).choices[0].message.content for i, p in enumerate(prompts)]
    assert len(set(alone)) > 25

    def streamed(i: int) -> str:
        chunks = ask(server, prompts[i], max_tokens=10 + i, stream=True)
        return "".join(c.choices[0].delta.content or "" for c in chunks)

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(streamed, range(32))) == alone
    server.until(running=0, waiting=0)


# ---- models, keys, limits


def test_models_health_and_metrics(server) -> None:
    models = client(server).models
    assert [m.id for m in models.list()] == ["tiny"] and models.retrieve("tiny").max_model_len == 512
    with pytest.raises(openai.NotFoundError) as error:
        models.retrieve("org/other")
    assert error.value.code == "model_not_found"
    assert server.health() == {"status": "ok", "model": "tiny", "running": 0, "waiting": 0, "slots": 4}
    before = metrics(server)
    ask(server, max_tokens=5)
    after = metrics(server)
    name = 'baby_llama_http_requests_total{path="/v1/chat/completions",status="200"}'
    assert after[name] == before.get(name, 0) + 1
    assert (
        after["baby_llama_engine_generated_tokens_total"]
        == before["baby_llama_engine_generated_tokens_total"] + 5
    )
    assert after['baby_llama_request_seconds_bucket{le="+Inf"}'] == after["baby_llama_request_seconds_count"]


def metrics(server: Served) -> dict[str, float]:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {
        line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")
    }


def test_keys(strict) -> None:
    assert client(strict, "another").models.list().data
    for key in ("a secret.", "a", "密", "é"):
        response = httpx.get(f"{strict.url}/v1/models", headers={b"Authorization": b"Bearer " + key.encode()})
        assert assert_error(response, 401)["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        ask_wrong = client(strict, "wrong").chat.completions.create
        ask_wrong(model="tiny", messages=QUESTION)
    assert httpx.get(f"{strict.url}/health").status_code == 200


def test_bodies_that_are_too_large(strict, server) -> None:
    large = {"model": "tiny", "messages": [{"role": "user", "content": "长" * 3_500_000}]}  # 10 MB
    for api in (strict, server):
        assert_error(post(api, large), 413)
    pieces = (b" " * 10_000 for _ in range(20))  # of no declared length
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    assert_error(httpx.post(f"{strict.url}/v1/completions", content=pieces, headers=headers), 413)


def test_a_full_queue_answers_429(strict) -> None:
    def long(seed: int) -> httpx.Response:
        body = {"model": "tiny", "messages": QUESTION, "max_tokens": 480, "seed": seed, "temperature": 2}
        return post(strict, body)

    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(long, range(8)))
    statuses = {r.status_code for r in responses}
    assert 200 in statuses and 429 in statuses and statuses <= {200, 429, 503}
    refused = next(r for r in responses if r.status_code == 429)
    assert assert_error(refused)["code"] == "queue_full" and int(refused.headers["Retry-After"]) > 0
    strict.until(running=0, waiting=0)
    too_many = post(strict, {"model": "tiny", "messages": QUESTION, "n": 3})  # could never find a place
    assert_error(too_many, 400, "n")


class Slow(threading.Thread):
    """An engine's one answer, that comes a letter at a time, or with nothing, until it is cancelled."""

    def __init__(self, silent: bool, timeout: float):
        super().__init__(daemon=True)
        self.silent, self.timeout, self.arrived = silent, timeout, deque()
        self.completion_tokens, self.finish_reason, self.is_cancelled = 0, None, False

    def submit(self, prompts, n, notify) -> list["Slow"]:
        self.notify = notify
        self.start()
        return [self]

    def run(self) -> None:
        while not self.is_cancelled:
            time.sleep(0.01)
            if not self.silent:
                self.completion_tokens += 1
                self.notify(0, Piece("x", [1], [0]))
        self.finish_reason = "cancelled"
        self.notify(0, None)

    def cancel(self) -> None:
        self.is_cancelled = True


def test_what_the_time_does_not_allow_is_cut_or_refused() -> None:
    async def read(reader: Reader) -> str:
        return "".join([item[1].text async for item in reader if item and item[1]])

    async def run() -> None:
        spoken = Reader(Slow(silent=False, timeout=0.3), [], 1)
        assert set(await read(spoken)) == {"x"} and spoken.finish_reason(0) == "length"
        silent = Reader(Slow(silent=True, timeout=0.1), [], 1)
        assert await read(silent) == ""
        with pytest.raises(ApiError) as error:
            silent.finish_reason(0)
        assert (error.value.status, error.value.body.error.code) == (503, "timeout")

    asyncio.run(run())


# ---- clients that go away


def raw_request(server: Served, body: dict) -> socket.socket:
    """A connection on which a request has been sent."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)))
    head = "POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"
    head = "\r\n".join([*head, f"Content-Length: {len(content)}"])
    connection.sendall(head.encode() + b"\r\n\r\n" + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_die_free_their_slots(server, stream) -> None:
    before = metrics(server)
    body = {
        "model": "tiny",
        "messages": QUESTION,
        "max_tokens": 480,
        "n": 4,
        "temperature": 2,
        "stream": stream,
    }
    running = [raw_request(server, body) for _ in range(6)]  # 24 answers for 4 slots: most of them wait
    server.until(running=4)
    for connection in running:
        connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0"
        )  # as of a killed process
        connection.close()
    server.until(running=0, waiting=0)
    after = metrics(server)
    assert after["baby_llama_engine_cancelled_total"] >= before["baby_llama_engine_cancelled_total"] + 16
    assert ask(server, max_tokens=4).usage.completion_tokens == 4


def test_on_sigterm_running_requests_finish_and_new_ones_are_refused(model) -> None:
    server = Served(model, "--slots", 1).wait()
    with httpx.Client() as keeps, ThreadPoolExecutor(1) as pool:
        chunks = pool.submit(lambda: list(ask(server, max_tokens=450, stream=True)))
        server.until(running=1)
        keeps.get(f"{server.url}/health")
        server.process.send_signal(signal.SIGTERM)
        refused = 0
        while not chunks.done():
            try:
                response = keeps.post(
                    f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1}
                )
            except httpx.TransportError:
                break
            refused += response.status_code == 503 and "error" in response.json()
        assert chunks.result()[-1].choices[0].finish_reason == "length"
    assert refused
    server.stop()


# ---- garbage

CHAT = {"model": "tiny", "messages": QUESTION, "max_tokens": 1}
HOSTILE = {
    "temperature": [-1, 2.1, "0.5", None.__class__.__name__, [], {}, True, 1e400],
    "top_p": [-0.1, 1.5, "x"],
    "max_tokens": [0, -5, 1.5, "10", True],
    "n": [0, -1, 129, 1.0, "2", 99],
    "seed": [2**63, 1.5, "7"],
    "stop": ["", [""], ["a"] * 5, [1], {}, 3],
    "top_logprobs": [5, -1, 21],
    "logprobs": [3, "yes"],
    "stream": ["true", 1],
    "stream_options": [{"include_usage": True}, [], "x"],
    "top_k": [-2, 1.5],
    "min_p": [-0.1, 2],
    "repetition_penalty": [0, -1, 1e9],
    "presence_penalty": [3, "x"],
    "tools": [[{"type": "function", "function": {"name": "f"}}], {}],
    "response_format": [{"type": "json_object"}, "text"],
    "logit_bias": [{"5": 10}],
    "functions": [[{}]],
    "tempreature": [1],
    "messages": [[], None, {}, "你好", [1], [{}], [{"role": "tool", "content": "x"}], [{"role": "user"}],
                 [{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "image_url"}]}],
                 [{"role": "assistant", "content": "x"}], [*QUESTION, {"role": "system", "content": "x"}],
                 [{"role": "system", "content": "x"}], [{"role": "user", "content": {"text": "x"}}]],
    "model": [None, 3, "other", "", ["tiny"]],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_wrong_values_are_refused_by_name(server, name) -> None:
    for value in HOSTILE[name]:
        response = post(server, json.dumps({**CHAT, name: value}))
        error = assert_error(response, 404 if value in ("other", "") and name == "model" else 400)
        assert error["param"] is None or error["param"].split(".")[0] == name, (value, error)


RAW = {
    "no JSON": b"{",
    "empty": b"",
    "no UTF-8": b'{"model": "tiny\xff"}',
    "deep": b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep message": b'{"model": "tiny", "messages": ' + b'[{"role":' * 5_000 + b"1" + b"}]" * 5_000 + b"}",
    "NaN": b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "infinity": b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "top_p": -Infinity}',
    "digits": b'{"model": "tiny", "seed": ' + b"9" * 10_000 + b"}",
    "surrogate": b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "surrogate part": b'{"model":"tiny","messages":[{"role":"user","content":[{"type":"text","text":"\\udfff"}]}]}',
    "surrogate name": b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "\\ud800": 1}',
    "surrogate model": b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
    "surrogate stop": b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"stop":"\\ud800"}',
    "a list": b"[]",
    "a string": b'"x"',
    "null": b"null",
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("name", RAW)
def test_garbage_is_a_bad_request(server, name) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert_error(post(server, RAW[name], path))


def test_what_is_wrong_is_told_of_the_type_that_was_meant(server) -> None:
    image = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}]
    for path, change, param, text in (
        ("chat/completions", {"stop": ["a"] * 5}, "stop", "至多 4 项"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": image}]},
            "messages.0.content.1.type",
            "'text'",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": None}]},
            "messages.0.content",
            "字符串",
        ),
        ("completions", {"prompt": []}, "prompt", "至少要有 1 项"),
        ("completions", {"prompt": [5, -1]}, "prompt.1", "不小于 0"),
        ("completions", {"prompt": [5, 2500]}, "prompt", "在 0 与 2499 之间"),
    ):
        body = {"model": "tiny", "prompt" if path == "completions" else "messages": QUESTION, **change}
        error = assert_error(post(server, body, f"/v1/{path}"), 400, param)
        assert text in error["message"], error
    for body in ("", "{"):
        assert assert_error(post(server, body), 400)["message"].startswith("请求体")


def test_head_answers_as_get_without_a_body(server, strict) -> None:
    for path in ("/", "/health", "/v1/models", "/page/chat.js", "/metrics"):
        head, get = httpx.head(server.url + path), httpx.get(server.url + path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
    assert httpx.head(f"{server.url}/nothing").status_code == 404
    assert httpx.head(f"{server.url}/v1/completions").status_code == 405
    assert httpx.head(f"{strict.url}/v1/models").status_code == 401


def test_other_garbage(server) -> None:
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "",
        ";;",
    ):
        assert_error(post(server, json.dumps(CHAT), headers={"Content-Type": kind}), 400)
    for prompt in (
        [2500],
        [-1],
        [[]],
        [],
        [1, "x"],
        [True],
        5,
        {},
        [2**70],
        [[1], "x"],
        ["\ud800"],
        "\ud800",
    ):
        assert_error(post(server, json.dumps({"model": "tiny", "prompt": prompt}), "/v1/completions"), 400)
    for extra in ({"echo": True, "logprobs": 1}, {"best_of": 3}, {"suffix": "x"}, {"logprobs": 6}):
        assert_error(post(server, {"model": "tiny", "prompt": "x", **extra}, "/v1/completions"), 400)
    assert_error(httpx.get(f"{server.url}/v1/chat/completions"), 405)
    assert_error(httpx.get(f"{server.url}/v2/nothing"), 404)
    assert_error(httpx.get(f"{server.url}/../serve.py"), 404)
    duplicate = '{"model": "other", "model": "tiny", "prompt": "x", "max_tokens": 1}'  # the last counts
    assert post(server, duplicate, "/v1/completions").status_code == 200
    assert server.health()["status"] == "ok"


def test_schemathesis_finds_no_5xx_and_no_untruth(server) -> None:
    """Requests generated from the OpenAPI schema: every answer is one that the schema speaks of."""
    import hypothesis
    import schemathesis
    from schemathesis import checks
    from schemathesis.specs.openapi import checks as openapi

    assert checks.not_a_server_error
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    wanted = [checks.not_a_server_error, openapi.status_code_conformance, openapi.content_type_conformance]
    wanted += [openapi.response_schema_conformance]
    tried = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.settings(
            max_examples=40, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        @hypothesis.given(case=operation.as_strategy())
        def run(case) -> None:
            nonlocal tried
            tried += 1
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "tiny"  # otherwise everything is a 404
                case.body["max_tokens"] = 2
            case.call_and_validate(checks=wanted, timeout=30)

        run()
    assert tried > 80
    document = httpx.get(f"{server.url}/openapi.json").json()
    statuses = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert {"200", "400", "401", "404", "413", "429", "503"} <= set(statuses) and "422" not in statuses


# ---- starting


def test_what_cannot_be_served_is_one_line(tmp_path) -> None:
    with pytest.raises(UserError, match="找不到检查点"):
        main(Config(model=tmp_path / "none", port=0))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="--port"):
        listen("127.0.0.1", taken.getsockname()[1])
    for wrong in ({"slots": 0}, {"port": 70_000}, {"timeout": float("nan")}, {"api_key": ("",)}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Config(**wrong).check()


def test_a_server_says_that_it_is_loading(model) -> None:
    """Before the model is there every answer is a 503, in OpenAI's shape."""
    from fastapi.testclient import TestClient

    from generation.sampling import Sampling
    from serving.api import create_app
    from serving.service import Service

    browser = TestClient(create_app(Service("tiny", Sampling(8), 5), cors=["https://a.example"]))
    assert browser.get("/health").json()["status"] == "loading" and browser.get("/health").status_code == 503
    response = browser.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 503 and response.json()["error"]["code"] == "loading"
    assert "script-src 'self'" in browser.get("/").headers["content-security-policy"]
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    allowed = browser.options("/v1/chat/completions", headers=preflight)
    assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    assert threading.active_count() < 50
