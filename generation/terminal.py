"""Talking to a model in the terminal."""

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from chatglm_tokenizer.base import Tokenizer
from chatglm_tokenizer.chat import UNLIMITED, Message, encode_prompt
from generation.engine import Answer, Engine
from generation.sampling import Sampling

HELP = """输入问题后回车；回答时按 Ctrl-C 停止这一条回答。命令：
  /clear 清空历史    /regen 重新回答上一问    /system 文字 设定系统提示（不带文字则取消）
  /stats 显示或隐藏速度    /help 帮助    /exit 退出"""


class TerminalChat:
    """A dialogue: its messages, the answer in progress, and the commands."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, sampling: Sampling, room: int):
        """room: tokens that the dialogue may take of the context."""
        self.engine, self.tokenizer, self.sampling, self.room = engine, tokenizer, sampling, room
        self.messages: list[Message] = []
        self.shows_stats = False

    def run(self) -> None:
        """Read questions and commands until /exit or the end of the input."""
        print(HELP)
        sys.stdin.reconfigure(errors="replace")  # half a character, typed by mistake, is no reason to end
        while True:
            try:
                line = input("\n问：").strip()
            except EOFError:
                return
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                self.command(*line.partition(" ")[::2])
            elif line:
                self.answer(self.messages + [{"role": "user", "content": line}])

    def command(self, name: str, text: str) -> None:
        """Do what a line that begins with a slash says."""
        system = [m for m in self.messages if m["role"] == "system"]
        if name == "/clear":
            self.messages = system
            print("历史已清空。" + ("系统提示仍在，/system 取消。" if system else ""))
        elif name == "/system":
            rest = self.messages[len(system) :]
            self.messages = ([{"role": "system", "content": text.strip()}] if text.strip() else []) + rest
            print("已设定系统提示。" if text.strip() else "已取消系统提示。")
        elif name == "/regen":
            if len(self.messages) == len(system):
                print("还没有问题可以重新回答。")
            else:
                self.answer(self.messages[:-1], again=True)
        elif name == "/stats":
            self.shows_stats = not self.shows_stats
            print("显示速度。" if self.shows_stats else "不显示速度。")
        elif name == "/help":
            print(HELP)
        else:
            print(f"没有命令 {name}；/help 列出所有命令。")

    def answer(self, messages: Sequence[Message], again: bool = False) -> None:
        """Stream the answer to the last question; it joins the history, even if it was stopped half-way."""
        try:
            prompt = encode_prompt(messages, self.tokenizer, self.room)
            notice = left_out(messages, prompt, self.tokenizer)
            started = self.engine.submit(prompt, self.draw(again))
        except ValueError as error:
            print(f"不能回答：{error}")
            return
        if notice:
            print(notice)
        print("答：", end="", flush=True)
        begin, reply = time.perf_counter(), ""
        with interrupt_stops(started):
            for piece in started:
                print(piece.text, end="", flush=True)
                reply += piece.text
        print("（已停止）" if started.finish_reason == "cancelled" else "")
        if started.finish_reason == "error":
            print(f"生成出错：{started.error}")
            return
        if self.shows_stats:
            seconds = time.perf_counter() - begin
            count = started.completion_tokens
            print(f"（{count} 个 token，{count / seconds:.1f} token/s，提示 {started.prompt_tokens} 个）")
        self.messages = [*messages, {"role": "assistant", "content": reply.strip()}]

    def draw(self, again: bool) -> Sampling:
        """The settings of an answer; another answer to the same question needs another seed, and chance."""
        if not again:
            return self.sampling
        return replace(self.sampling, temperature=self.sampling.temperature or 0.8, seed=None)


def left_out(messages: Sequence[Message], prompt: Sequence[int], tokenizer: Tokenizer) -> str:
    """What a prompt does without, in words; nothing if it is whole."""
    system = [m for m in messages if m["role"] == "system"]
    rest = messages[len(system) :]
    for begin in range(0, len(rest), 2):
        if encode_prompt([*system, *rest[begin:]], tokenizer, UNLIMITED) == prompt:
            return f"（对话超出上下文长度，最早的 {begin // 2} 轮不再参与回答。）" if begin else ""
    return "（这个问题超出上下文长度，只用了它的末尾；以前的对话不再参与回答。）"


@contextmanager
def interrupt_stops(answer: Answer) -> Iterator[None]:
    """While an answer is streamed, Ctrl-C stops the answer and not the program."""
    before = signal.signal(signal.SIGINT, lambda *_: answer.cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
