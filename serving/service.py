"""The model as the server sees it: when it is ready, and how a request becomes prompts and settings of the engine."""

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from chatglm_tokenizer.base import NotText
from chatglm_tokenizer.chat import UNLIMITED, encode_prompt
from generation.engine import Answer, Busy, Engine, Piece
from generation.sampling import Sampling
from serving.errors import CONTEXT, ApiError
from serving.metrics import Metrics
from serving.requests import ChatMessage, ChatRequest, CompletionRequest
from serving.responses import Health, Model
from stage import UserError
from training.checkpoint import Checkpoint

COLDEST = 1e-4  # the engine takes nothing between 0 and this; what is colder always draws the likeliest token


class Service:
    """What the routes share. It exists before the model is loaded and after it has begun to close."""

    def __init__(self, name: str, defaults: Sampling, timeout: float, strict_context: bool = False):
        """defaults: for what a request leaves open. timeout: seconds that a request may take altogether."""
        self.name, self.defaults = name, defaults
        self.timeout, self.strict_context = timeout, strict_context
        self.created = int(time.time())
        self.metrics = Metrics()
        self.engine: Engine | None = None
        self.arrived: deque = deque()  # pieces of all requests on their way to the event loop (reader.py)
        self.is_closing = False
        self.fingerprint, self.context = "", 0
        self.token_texts: dict[int, tuple[str, list[int] | None]] = {}

    def open(self, loaded: Checkpoint, engine: Engine) -> None:
        """Begin to answer."""
        self.tokenizer, self.context = loaded.tokenizer, loaded.model.args.max_seq_len
        self.fingerprint = fingerprint(loaded)
        self.engine = engine

    def close(self, timeout: float) -> None:
        """Refuse new requests and wait for those that run; after `timeout` seconds they are cut short."""
        self.is_closing = True
        if self.engine:
            self.engine.close(timeout)

    def stats(self) -> dict[str, float]:
        return self.engine.stats() if self.engine else {}

    def health(self) -> Health:
        status = "closing" if self.is_closing else "ok" if self.engine else "loading"
        if status == "ok" and not self.engine.thread.is_alive():
            status = "failed"
        stats = {key: int(self.stats().get(key, 0)) for key in ("running", "waiting", "slots")}
        return Health(status=status, model=self.name, **stats)

    def ready(self) -> Engine:
        """The engine; ApiError 503 where there is none to be used."""
        if self.is_closing:
            raise ApiError(503, "服务正在关闭", "closing", headers={"Retry-After": "10"})
        if self.engine is not None and not self.engine.thread.is_alive():
            raise ApiError(503, "服务已停止生成，请重新启动", "failed")
        if self.engine is None:
            raise ApiError(503, "模型正在载入，请稍后再试", "loading", headers={"Retry-After": "2"})
        return self.engine

    def model(self) -> Model:
        self.ready()
        return Model(id=self.name, created=self.created, max_model_len=self.context)

    def check_model(self, name: str) -> None:
        self.ready()
        if name != self.name:
            raise ApiError(404, f"没有模型 {name[:100]}；这里只有 {self.name}", "model_not_found", "model")

    def sampling(self, request: ChatRequest | CompletionRequest) -> Sampling:
        """The engine's settings of a request; what it leaves open is as the server was started."""
        names = ("presence_penalty", "frequency_penalty", "min_p", "repetition_penalty", "seed")
        given = {name: getattr(request, name) for name in names}
        given |= {"stop": request.stops(), "max_new_tokens": request.limit()}
        given = {name: value for name, value in given.items() if value is not None}
        if request.temperature is not None:
            given["temperature"] = request.temperature if request.temperature >= COLDEST else 0.0
        if request.top_p is not None:
            given["top_p"] = max(request.top_p, 1e-6)  # 0: the likeliest token, which is always kept
        if request.top_k is not None:
            given["top_k"] = request.top_k if request.top_k > 0 else None
        return replace(self.defaults, logprobs=request.alternatives(), **given)

    def chat_prompt(self, request: ChatRequest, sampling: Sampling) -> tuple[list[int], Sampling]:
        """Ids of a dialogue, and how many tokens the answer may then have. ApiError for what is no dialogue."""
        limit, wanted = self.context, request.limit()
        try:
            messages = alternating(request.messages)
            if self.strict_context:
                ids = encode_prompt(messages, self.tokenizer, UNLIMITED)
                self.check_room(len(ids), wanted or 1, "messages")
            else:
                # The answer that was asked for may take half of the context from the dialogue, what is merely the
                # server's default a quarter.
                answer = min(sampling.max_new_tokens, limit // 2 if wanted else limit // 4)
                ids = encode_prompt(messages, self.tokenizer, limit - answer)
                self.check_room(len(ids), 1, "messages")
        except (UserError, ValueError) as error:  # no text, or no dialogue for the model's own template
            raise ApiError(400, f"messages：{error}", "invalid_value", "messages") from error
        return ids, replace(sampling, max_new_tokens=min(sampling.max_new_tokens, limit - len(ids)))

    def completion_prompt(
        self, prompt: str | list[int], request: CompletionRequest, sampling: Sampling
    ) -> tuple[list[int], Sampling]:
        """Ids that are to be continued, and how many tokens may follow. No text: as after the end of a document."""
        try:
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        except NotText as error:
            raise ApiError(400, f"prompt：{error}", "invalid_value", "prompt") from error
        ids = ids or [self.tokenizer.special_tokens["<eos>"]]
        self.check_room(len(ids), (request.limit() or 1) if self.strict_context else 1, "prompt")
        return ids, replace(sampling, max_new_tokens=min(sampling.max_new_tokens, self.context - len(ids)))

    def check_room(self, prompt: int, answer: int, param: str) -> None:
        """ApiError where prompt and answer do not fit into the context."""
        if prompt + answer > self.context:
            text = f"模型的上下文是 {self.context} 个 token，而提示词有 {prompt} 个，回答至少要 {answer} 个"
            raise ApiError(400, text, CONTEXT, param)

    def token_text(self, token: int) -> tuple[str, list[int] | None]:
        """A token as log-probabilities name it, and its bytes; worked out once, as many answers name the same ones."""
        if token not in self.token_texts:
            self.token_texts[token] = self.make_token_text(token)
        return self.token_texts[token]

    def make_token_text(self, token: int) -> tuple[str, list[int] | None]:
        """What `token_text` gives: part of a character is `bytes:\\xe4`, as at OpenAI."""
        special = {i: name for name, i in self.tokenizer.special_tokens.items()}
        if token in special:
            return special[token], None
        sp = getattr(self.tokenizer, "sp", None)
        if sp and token < sp.vocab_size() and sp.is_byte(token):
            byte = int(sp.id_to_piece(token)[3:5], 16)
            return (chr(byte) if byte < 0x80 else f"bytes:\\x{byte:02x}"), [byte]
        before = self.tokenizer.encode("a")  # behind another token, the space that begins this one is kept
        text = self.tokenizer.decode([*before, token])[len(self.tokenizer.decode(before)) :]
        return text, None if "\ufffd" in text else list(text.encode())

    def decode(self, ids: list[int]) -> str:
        """Text of a prompt that was given as ids. ApiError for ids outside the vocabulary."""
        try:
            return self.tokenizer.decode(ids)
        except (ValueError, IndexError, OverflowError) as error:
            raise ApiError(
                400, f"prompt 中有词表以外的 token：{error}", "invalid_prompt", "prompt"
            ) from error

    def check_count(self, answers: int) -> None:
        """ApiError for more answers than could ever be queued."""
        engine = self.ready()
        most = engine.max_waiting + engine.batch.slots
        if answers > most:
            raise ApiError(400, f"一个请求至多 {most} 个回答（提示词数 × n）", "invalid_value", "n")

    def submit(
        self,
        prompts: Sequence[tuple[list[int], Sampling]],
        n: int,
        notify: Callable[[int, Piece | None], object],
    ) -> list[Answer]:
        """Queue n answers to every prompt, all or none of them. ApiError 429 when they do not all find a place.

        notify: takes (number of the answer, piece) in the engine's thread, with None for a piece at the end.
        """
        engine, answers = self.ready(), []
        try:
            for ids, sampling in prompts:
                for index in range(n):
                    seed = derived_seed(sampling.seed, index)
                    tell = partial(notify, len(answers))
                    answers.append(engine.submit(ids, replace(sampling, seed=seed), tell))
        except Exception as error:
            for answer in answers:
                answer.cancel()
            if isinstance(error, Busy):
                text = "请求太多，队列已满，请稍后再试"
                raise ApiError(429, text, "queue_full", headers={"Retry-After": "2"}) from error
            if isinstance(error, ValueError):
                raise ApiError(400, f"prompt：{error}", "invalid_prompt", "prompt") from error
            self.ready()  # closed in the meantime: 503
            raise
        return answers


def alternating(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """The dialogue as the model was trained on it: one system text, then user and assistant in turn.

    What one role says in several messages becomes one. ApiError for a system text later on, and for a dialogue
    that does not begin and end with the user.
    """
    merged: list[dict[str, str]] = []
    for place, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        if merged and merged[-1]["role"] == role:
            merged[-1]["content"] += "\n" + message.text()
        elif role == "system" and merged:
            raise ApiError(400, "system 消息只能在最前面", "invalid_value", f"messages.{place}.role")
        else:
            merged.append({"role": role, "content": message.text()})
    turns = merged[1:] if merged[0]["role"] == "system" else merged
    if not turns or turns[0]["role"] != "user" or turns[-1]["role"] != "user":
        raise ApiError(400, "对话应以 user 消息开始，并以 user 消息结束", "invalid_value", "messages")
    return merged


def derived_seed(seed: int | None, index: int) -> int | None:
    """A seed for each of several answers; the first has the request's own."""
    if seed is None or index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:7], "big")


def fingerprint(loaded: Checkpoint) -> str:
    """What changes when the same request may get another answer: shape, vocabulary, files of the weights."""
    path = Path(loaded.path)
    files = sorted(path.glob("model*.safetensors")) if path.is_dir() else [path]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    precision = [str(loaded.model.tok_embeddings.weight.dtype), str(loaded.model.output)]  # quantised or not
    what = json.dumps([asdict(loaded.model.args), loaded.tokenizer.sha256, stats, precision], default=str)
    return "fp_" + hashlib.sha256(what.encode()).hexdigest()[:10]
