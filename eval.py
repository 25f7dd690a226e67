"""Stage 6: what a chat model answers: given questions, files of questions with scores, or an interactive chat.

python eval.py --questions 感冒了怎么办？
python eval.py --file held_out.jsonl         # with answers: exact match, BLEU, ROUGE
python eval.py --chat
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from chatglm_tokenizer.chat import UNLIMITED, Message, encode_prompt
from generation.config import InferenceConfig
from generation.engine import Engine
from generation.prepare import Precision
from generation.terminal import TerminalChat
from sources.aside import SetAside
from sources.containers import read_rows
from sources.instructions import Unusable, to_messages
from sources.report import table
from stage import DEMO_DIR, DEMO_OUT, ROOT, UserError, atomic_path, check_writable, need, run_stage
from training.checkpoint import Checkpoint

BATCH = 32  # questions answered together


@dataclass
class Config(InferenceConfig):
    """对话模型的评测：回答问题、按参考答案打分，或交互聊天（--chat）。"""

    model: Path = ROOT / "out" / "sft"  # 检查点文件夹（取其中最新的），或原项目的 .pth
    precision: Precision = "fp32"  # 评测默认用 fp32，结果与机器无关；auto：硬件擅长 bf16 就用，更快
    questions: tuple[str, ...] = ()  # 要问的问题
    file: tuple[Path, ...] = ()  # 从文件读问题（一行一个，或 JSON/CSV）；有参考答案就打分
    chat: bool = False  # 在终端里聊天
    save: Path | None = None  # 把每题的回答写到这个文件（JSON lines）

    DEMO = dict(
        model=DEMO_OUT / "sft",
        file=(DEMO_DIR / "eval" / "seen.jsonl", DEMO_DIR / "eval" / "heldout.jsonl"),
        max_new_tokens=80,
    )


@dataclass
class Item:
    """A question with what came before it, the reference answer if there is one, and the model's answer."""

    messages: list[Message]
    reference: str = ""
    answer: str = field(default="", init=False)


def main(cfg: Config) -> None:
    if cfg.demo:
        need(cfg.model, "sft.py", cfg)
    if cfg.save:
        check_writable(cfg.save)
    from_files = {file: read_items(file) for file in cfg.file}
    loaded = cfg.load()
    if cfg.chat:
        with Engine(loaded.model, loaded.tokenizer, slots=1) as engine:
            TerminalChat(engine, loaded.tokenizer, cfg.sampling(), prompt_room(cfg, loaded)).run()
        return
    questions = cfg.questions or (() if cfg.file else ("你好，请介绍一下你自己。", "感冒了应该怎么办？"))
    items = [Item([{"role": "user", "content": q}]) for q in questions]
    answer(items, cfg, loaded)
    for item in items:
        print(f"问：{item.messages[-1]['content']}\n答：{item.answer}\n")
    rows = []
    for file, its_items in from_files.items():
        answer(its_items, cfg, loaded)
        rows += show(file, its_items)
        items += its_items
    if rows:
        print(table(["文件", "题数", "完全一致", "BLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L"], rows))
    if cfg.save:
        save(cfg.save, items)


def read_items(file: Path) -> list[Item]:
    """Questions of a file: lines of text, {question, answer}, or any instruction format."""
    if not file.is_file():
        raise UserError(f"找不到问题文件 {file}。")
    aside, items = SetAside(), []
    for number, row in read_rows(file, aside, as_csv=file.suffix.lower() == ".csv"):
        try:
            items.append(to_item(row))
        except Unusable as reason:
            aside.add(file, number, str(reason), row)
    aside.show()
    if not items:
        raise UserError(f"{file} 里没有可用的问题；每行一个问题，或含 question/answer 字段的 JSON。")
    return items


def to_item(row: dict[str, Any] | str) -> Item:
    """A row of a file of questions; the last answer is the reference."""
    if isinstance(row, str):
        return Item([{"role": "user", "content": row}])
    if isinstance(row.get("question"), str) and row["question"].strip():
        reference = row.get("answer")
        if not isinstance(reference, str | int | float | None):
            raise Unusable("answer 既不是文字也不是数")
        reference = "" if reference is None else str(reference).strip()
        return Item([{"role": "user", "content": row["question"]}], reference)
    messages = to_messages(row)
    system = [{"role": "system", "content": messages["system"]}] if "system" in messages else []
    return Item(system + messages["messages"][:-1], messages["messages"][-1]["content"])


def answer(items: Sequence[Item], cfg: Config, loaded: Checkpoint) -> None:
    """Fill in the answers; questions of similar length are begun together."""
    room = prompt_room(cfg, loaded)
    prompts = [encode_prompt(item.messages, loaded.tokenizer, UNLIMITED) for item in items]
    too_long = [i for i, prompt in enumerate(prompts) if len(prompt) > room]
    for i in too_long:
        prompts[i] = encode_prompt(items[i].messages, loaded.tokenizer, room)
    if too_long:
        print(f"{len(too_long)} 个问题放不进上下文：去掉了最早的几轮对话，或问题的开头。")
    order = sorted(range(len(items)), key=lambda i: len(prompts[i]))
    with Engine(loaded.model, loaded.tokenizer, slots=BATCH, max_waiting=len(items)) as engine:
        try:
            answers = [engine.submit(prompts[i], cfg.sampling()) for i in order]
        except ValueError as error:  # a system text that fills the context
            raise UserError(f"有的问题放不进上下文：{error}") from error
        for i, its_answer in zip(order, tqdm(answers, "回答", disable=None), strict=True):
            items[i].answer = its_answer.text().strip()


def prompt_room(cfg: Config, loaded: Checkpoint) -> int:
    """How many tokens of the context the question may take: what the answer leaves, at least half."""
    limit = loaded.model.args.max_seq_len
    return max(limit - cfg.max_new_tokens, limit // 2)


def show(file: Path, items: Sequence[Item]) -> list[list[Any]]:
    """Print some answers of a file; returns its row of scores if it has references."""
    scored = [item for item in items if item.reference]
    wrong = [item for item in scored if item.answer != item.reference]
    right = [item for item in scored if item.answer == item.reference]
    for label, examples in (("答对", right[:5]), ("答错", wrong[:5]), ("回答", [] if scored else items[:20])):
        for item in examples:
            print(f"[{label}] 问：{item.messages[-1]['content']}\n       答：{item.answer}")
            if item in wrong:
                print(f"       参考：{item.reference}")
    if not scored:
        return []
    scores = score([item.answer for item in scored], [item.reference for item in scored])
    return [[file.stem, len(scored), f"{scores['exact']:.1%}", *(f"{scores[k]:.2f}" for k in METRICS)]]


METRICS = ("bleu", "rouge1", "rouge2", "rougeL")


def score(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Exact match (0–1), and BLEU-4 and ROUGE F1 (0–100) over words segmented by jieba."""
    try:
        import jieba
        import sacrebleu
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError(f"打分需要 {error.name}：pip install jieba sacrebleu rouge-score") from error
    jieba.setLogLevel("ERROR")

    class Words:
        """The tokenizer interface of rouge_score, whose own one drops Chinese characters."""

        @staticmethod
        def tokenize(text: str) -> list[str]:
            return [word for word in jieba.lcut(text) if word.strip()]

    segmented = [[" ".join(Words.tokenize(text)) for text in texts] for texts in (answers, references)]
    scorer = RougeScorer(METRICS[1:], tokenizer=Words)
    rouge = [scorer.score(r, a) for a, r in zip(answers, references, strict=True)]
    return {
        "exact": sum(a == r.strip() for a, r in zip(answers, references, strict=True)) / len(answers),
        "bleu": sacrebleu.corpus_bleu(segmented[0], [segmented[1]], tokenize="none").score,
        **{k: 100 * sum(row[k].fmeasure for row in rouge) / len(rouge) for k in METRICS[1:]},
    }


def save(path: Path, items: Sequence[Item]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for item in items:
            row = {"messages": item.messages, "answer": item.answer, "reference": item.reference}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"已写入 {path}")


if __name__ == "__main__":
    run_stage(Config, main)
