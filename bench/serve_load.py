"""Many clients at once against serve.py: is anything lost or mixed up, how many requests a second, how late.

python bench/serve_load.py --model out/sft             # a quarter of a minute at each of 1, 4, 16 and 32 clients
python bench/serve_load.py --model out/sft --clients 32 --seconds 60

Every client streams greedy answers to its own questions with the official openai client; each must be, character for
character, what the same question gets alone.
"""

import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sources.report import table
from stage import ROOT, StageConfig, UserError, run_stage

QUESTIONS = 8  # of each client


@dataclass
class Config(StageConfig):
    """serve.py 的负载测试：吞吐、延迟，以及有没有丢失或混淆的回答。"""

    model: Path = ROOT / "out" / "sft"  # 检查点文件夹
    clients: tuple[int, ...] = (1, 4, 16, 32)  # 同时有几个客户端
    seconds: float = 15.0  # 每种客户端数测多少秒
    max_tokens: int = 64  # 每个回答最多多少 token
    slots: int = 16  # serve.py --slots
    options: str = ""  # 另外传给 serve.py 的参数，如 --options="--precision fp32"：没有一个回答会不同


@dataclass
class Tally:
    """What the clients saw."""

    seconds: list[float] = field(default_factory=list)  # of each answer
    first: list[float] = field(default_factory=list)  # seconds to its first piece
    tokens: int = 0
    wrong: int = 0
    failed: list[str] = field(default_factory=list)


def main(cfg: Config) -> None:
    process = subprocess.Popen(
        [sys.executable, ROOT / "serve.py", "--model", cfg.model, "--port", "0", "--slots", str(cfg.slots),
         *cfg.options.split()],
        stdout=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip
    try:
        url = next((m[1] for line in process.stdout if (m := re.search(r"已就绪：(http\S+?)（", line))), None)
        if not url:
            raise UserError("serve.py 没有启动，见上面的输出。")
        run(cfg, url)
    finally:
        process.terminate()
        process.wait()


def run(cfg: Config, url: str) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    model = client.models.list().data[0].id

    def ask(question: str, tally: Tally) -> str:
        start, text = time.perf_counter(), ""
        stream = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0,
            max_tokens=cfg.max_tokens, stream=True, stream_options={"include_usage": True},
        )  # fmt: skip
        is_first = True
        for chunk in stream:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                if choice.delta.content and is_first:
                    is_first = False
                    tally.first.append(time.perf_counter() - start)
            tally.tokens += chunk.usage.completion_tokens if chunk.usage else 0
        tally.seconds.append(time.perf_counter() - start)
        return text

    questions = [
        [f"{'天地人日月'[(c + q) % 5]}{c * 37 + q}是什么？" for q in range(QUESTIONS)]
        for c in range(max(cfg.clients))
    ]
    alone = {question: ask(question, Tally()) for row in questions for question in row}
    print(f"{len(alone)} 个问题，各自单独问得到 {len(set(alone.values()))} 种不同的回答", flush=True)
    rows = []
    for clients in cfg.clients:
        tallies, start = [Tally() for _ in range(clients)], time.perf_counter()

        def work(tally: Tally, mine: list[str], end: float) -> None:
            number = 0
            while time.perf_counter() < end:
                question = mine[number % QUESTIONS]
                number += 1
                try:
                    tally.wrong += ask(question, tally) != alone[question]
                except Exception as error:
                    tally.failed.append(f"{type(error).__name__}: {error}")

        threads = [
            threading.Thread(target=work, args=(tally, questions[c], start + cfg.seconds))
            for c, tally in enumerate(tallies)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rows.append(row_of(clients, tallies, time.perf_counter() - start))
    head = [
        "客户端",
        "请求",
        "请求/秒",
        "token/秒",
        "首字 P50/P95（秒）",
        "整个 P50/P95（秒）",
        "不同",
        "失败",
    ]
    print(table(head, rows))


def row_of(clients: int, tallies: list[Tally], elapsed: float) -> list[object]:
    """A row of the table; the first failure is printed."""
    seconds = [s for t in tallies for s in t.seconds]
    first = [s for t in tallies for s in t.first]
    failed = [f for t in tallies for f in t.failed]
    if failed:
        print(failed[0])
    tokens = sum(t.tokens for t in tallies)
    return [
        clients, len(seconds), f"{len(seconds) / elapsed:.1f}", f"{tokens / elapsed:.0f}", percentiles(first),
        percentiles(seconds), sum(t.wrong for t in tallies), len(failed),
    ]  # fmt: skip


def percentiles(values: list[float]) -> str:
    if len(values) < 2:
        return "–"
    cuts = statistics.quantiles(values, n=20)
    return f"{cuts[9]:.2f} / {cuts[18]:.2f}"


if __name__ == "__main__":
    run_stage(Config, main)
