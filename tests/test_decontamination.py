"""Decontamination: what is found of a benchmark in documents, and what is left alone."""

import csv
import gzip
import itertools
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_clean.benchmarks import Benchmarks, Item
from data_clean.keys import keys_of
from data_clean.ngram_index import ASKS, COMMON, DISTINCT, GAP, MINIMUM, SHARE, build_index, empty_found, scan
from data_clean.texts import from_strings
from sources.aside import SetAside
from stage import UserError

LAW = "商标注册人享有商标专用权，受法律保护，转让注册商标的，转让人和受让人应当签订转让协议，并共同提出申请。"
QUESTIONS = {
    f"《商标法》规定：{LAW}这一条文属于法律规则中的哪一种？": (
        "授权性规则",
        "义务性规则",
        "准用性规则",
        "委任性规则",
    ),
    "在孵化室温度适宜的条件下，立体孵化器孵化鸡蛋的最适温度为": ("36°C", "37.8°C", "36.5°C", "37°C"),
    "建筑属于": ("造型艺术", "装饰艺术", "实用艺术", "表现艺术"),
    "关于细胞凋亡，下列说法正确的是": ("与细胞坏死相同", "受基因控制", "只在胚胎期发生", "对机体有害"),
    "关于光合作用，下列说法正确的是": ("只在夜间进行", "需要叶绿体", "不消耗水", "释放二氧化碳"),
    "1+1=": ("1", "2", "3", "4"),
}


def items(questions=QUESTIONS):
    return [Item(Path("题.csv"), row, *question) for row, question in enumerate(questions.items(), 1)]


def hits(benchmarks, *texts):
    return benchmarks.hits(*keys_of(from_strings(texts))).tolist()


def exam(question, options, pattern="{}. {}", separator="\n"):
    lettered = [pattern.format(letter, option) for letter, option in zip("ABCD", options, strict=True)]
    return separator.join([question, *lettered])


# --- the rule, against a plain statement of it ---


def ngrams(text, size):
    """Each n-gram of a text and where it stands first."""
    first = {}
    for place in range(len(text) - size + 1):
        first.setdefault(text[place : place + size], place)
    return first


def reference(document, forms, size):
    """The first item that a document contains; forms: (item, question, options)."""
    known = [ngrams(question + options, size) for _, question, options in forms]
    having = {}
    for (item, *_), grams in zip(forms, known, strict=True):
        for gram in grams:
            having.setdefault(gram, set()).add(item)
    telling = {
        g for g, owners in having.items() if len(owners) <= COMMON and len(set(g)) >= min(DISTINCT, size)
    }
    wanted = []
    for (item, question, _), grams in zip(forms, known, strict=True):
        grams = {gram: place for gram, place in grams.items() if gram in telling}
        characters = {place + i for place in grams.values() for i in range(size)}
        asks = set(sorted(c for c in characters if c < len(question))[-ASKS:])
        options = {c for c in characters if c >= len(question)}
        asked = min(len(asks), 1) if options else len(asks) / 2
        if len(characters) >= MINIMUM:
            wanted.append((item, grams, max(MINIMUM, SHARE * len(characters)), asks, asked, options))
    found = [(None, set())] * len(wanted)
    for end in range(size, len(document) + 1):
        gram = document[end - size : end]
        for number, (item, grams, need, asks, asked, options) in enumerate(wanted):
            if gram not in grams:
                continue
            last, seen = found[number]
            seen = set() if last is None or end - last > GAP else seen
            seen = seen | set(range(grams[gram], grams[gram] + size))
            found[number] = end, seen
            enough = len(seen & asks) >= asked and len(seen & options) >= len(options) / 2
            if len(seen) >= need and enough:
                return item
    return -1


@st.composite
def cases(draw):
    """Questions of few letters, and documents put together from pieces of them."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    size, letters = (
        draw(st.sampled_from([2, 3, 5, 8])),
        draw(st.sampled_from(["甲乙丙丁戊", "abcdefghijklmnopq"])),
    )

    def noise(length):
        return "".join(rng.choices(letters, k=length))

    phrases = [noise(rng.randint(2, 12)) for _ in range(3)]
    forms = []
    for item in range(rng.randint(1, 8)):
        question = noise(rng.randint(0, 30)) + rng.choice(["", *phrases])
        forms += [(item, question, "")] + [(item, question, noise(rng.randint(1, 30)))] * rng.randint(0, 1)
    documents = []
    for _ in range(6):
        pieces = []
        for _ in range(rng.randint(0, 5)):
            text = "".join(rng.choice(forms)[1:])
            start = rng.choice([0, rng.randint(0, len(text))])
            pieces += [text[start : rng.choice([len(text), rng.randint(start, len(text))])]]
            pieces += [noise(rng.choice([0, 1, 3, 45, 60]))]
        documents.append("".join(pieces))
    return size, forms, documents


def codes_of(strings):
    starts = np.cumsum([0, *map(len, strings)])
    return np.frombuffer("".join(strings).encode("utf-32-le"), np.uint32), starts


@settings(max_examples=300, deadline=None)
@given(cases())
def test_found_is_what_the_rule_says(case):
    size, forms, documents = case
    codes, starts = codes_of([question + options for _, question, options in forms])
    questions = np.array([len(question) for _, question, _ in forms])
    index = build_index(codes, starts, np.array([item for item, *_ in forms]), questions, size)
    keys, ends = codes_of(documents)
    found, begins = np.full(len(documents), -1, np.int32), np.zeros(len(documents), np.int64)
    scan(keys, ends, index, empty_found(index), found, begins)
    assert found.tolist() == [reference(document, forms, size) for document in documents]


# --- what is contamination and what is not ---


def test_a_question_is_found_whatever_its_layout():
    benchmarks = Benchmarks(items())
    for number, (question, options) in enumerate(list(QUESTIONS.items())[:5]):
        row = {"question": question, **dict(zip("ABCD", options, strict=True))}
        layouts = [
            exam(question, options),
            exam(question, options, "（{}）{}", "　"),
            exam(question, options, "{}、{}；", " ").replace("，", ","),
            ",".join(["0", question, *options, "B"]),
            json.dumps(row, ensure_ascii=False),
            "网页开头的一段话，与题目无关。" * 20 + exam(question, options) + "答案见下一页。" * 20,
        ]
        assert hits(benchmarks, *layouts) == [number] * len(layouts)


def test_a_changed_character_hides_nothing_and_parts_are_nothing():
    question, options = list(QUESTIONS.items())[1]
    benchmarks = Benchmarks(items())
    changed = question.replace("孵化器", "孵蛋器")
    filled = exam(question.replace("的最适温度为", "的（37.8）最适温度为"), options)
    assert hits(benchmarks, exam(changed, options), filled, question) == [1, 1, 1]
    parts = [
        question[:14],
        question[-8:],
        "\n".join(options),
        "关于病毒，下列说法正确的是",
        "建筑属于造型艺术。",
    ]
    assert hits(benchmarks, *parts, "") == [-1] * 6


def test_what_a_question_quotes_is_not_the_question():
    benchmarks = Benchmarks(items())
    assert hits(benchmarks, LAW, f"第三条　{LAW}第四条　自然人可以申请商标注册。") == [-1, -1]
    assert hits(benchmarks, next(iter(QUESTIONS))) == [0]


def test_pieces_far_apart_do_not_add_up():
    question, options = list(QUESTIONS.items())[1]
    halves, between = (question[:14], question[14:] + "".join(options[:2])), "与题目没有关系的许多别的文字，"
    assert hits(Benchmarks(items()), *(between * n for n in (1, 9)))[0] == -1
    assert hits(Benchmarks(items()), (between * 9).join(halves)) == [-1]


def test_set_phrases_short_questions_and_repeats_are_counted():
    stem = "下列关于这个问题的各种说法当中正确的是哪一项"
    same_stem = {stem + " " * n: (f"甲说法{n}号乙丙丁", f"戊己庚{n}辛壬癸") for n in range(COMMON + 1)}
    benchmarks = Benchmarks(items(same_stem) + items(same_stem) + items({"1+1=": ("1", "2")}))
    report = benchmarks.report()
    assert (report["items"], report["repeated"], report["too_short"]) == (COMMON + 2, COMMON + 1, 1)
    assert hits(benchmarks, stem) == [-1]
    assert hits(benchmarks, "\n".join([stem, *same_stem[stem]])) == [0]


def test_documents_do_not_touch_each_other():
    benchmarks = Benchmarks(items())
    question, options = list(QUESTIONS.items())[1]
    text = exam(question, options)
    pieces = [text[start : start + 9] for start in range(0, len(text), 9)]
    assert hits(benchmarks, *pieces) == [-1] * len(pieces)
    rng = random.Random(0)
    texts = [exam(*rng.choice(list(QUESTIONS.items()))) + "。" * rng.randint(0, 3) for _ in range(50)] + [""]
    assert hits(benchmarks, *texts) == [hits(benchmarks, text)[0] for text in texts]


def test_survives_pickling_and_shows_the_place():
    benchmarks = pickle.loads(pickle.dumps(Benchmarks(items())))
    question, options = list(QUESTIONS.items())[1]
    text = "前面的话。" * 100 + f"１２．{exam(question, options)}" + "后面的话。" * 100
    assert hits(benchmarks, text) == [1]
    assert benchmarks.excerpt(text).startswith(question)
    assert benchmarks.describe(1) == {"file": "题.csv", "row": 2, "question": question}


# --- files ---


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


Q, A = "大熊猫在自然界里主要以哪一种植物的茎叶为食？", ("竹子", "松针", "苔藓", "芦苇")
SHAPES = {
    "cmmlu.csv": [["", "Question", *"ABCD", "Answer"], ["0", Q, *A, "A"]],
    "ceval.csv": [["id", "question", *"ABCD", "answer", "explanation"], ["0", Q, *A, "A", ""]],
    "cmb.json": [
        {"exam_type": "医师", "question": Q, "option": dict(zip("ABCD", A, strict=True)), "answer": "A"}
    ],
    "choices.jsonl": [{"question": Q, "choices": list(A), "answer": 0}],
    "arc.jsonl": [{"question": Q, "choices": {"text": list(A), "label": list("ABCD")}, "answerKey": "A"}],
    "agieval.jsonl": [{"passage": None, "question": Q, "options": list(A), "label": "A"}],
    "passage.jsonl": [{"passage": "先读一段材料。", "question": Q, "options": list(A)}],
    "open.jsonl": [{"question": Q, "answer": "竹子，也吃少量竹笋"}],
    "ours.csv": [["prompt", "answer"], [Q, "竹子，也吃少量竹笋"]],
    "alpaca.json": [{"instruction": Q, "input": "", "output": "竹子，也吃少量竹笋"}],
    "messages.jsonl": [
        {"messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": "竹子"}]}
    ],
}


@pytest.mark.parametrize("name", SHAPES)
def test_benchmark_files(tmp_path, name):
    write_rows(tmp_path / name, SHAPES[name])
    aside = SetAside()
    benchmarks = Benchmarks.read([tmp_path / name], aside)
    assert len(aside) == 0 and benchmarks.report()["items"] == 1
    assert hits(benchmarks, f"问：{Q}", Q.replace("大熊猫", "北极熊"), "竹子") == [0, 0, -1]
    assert benchmarks.describe(0)["question"].endswith(Q) and benchmarks.describe(0)["row"] == 1
    assert benchmarks.items[0].options in (A, ())


def test_facts_may_be_learnt():
    rows = {"请告诉我立秋是二十四节气中的第几个？": (), "在动物的分类当中，犀牛属于哪一类？": ()}
    facts = ["立秋是二十四节气中的第十三个节气。", "在动物的分类当中，犀牛属于哺乳动物。"]
    assert hits(Benchmarks(items(rows)), *facts, *rows) == [-1, -1, 0, 1]


def test_lines_of_text_folders_and_bad_rows(tmp_path):
    (tmp_path / "题目.txt").write_text(f"{Q}\n", encoding="utf-8")
    rows = [
        {"question": "第二道题目，说的是长江与黄河的长度之比，应是多少？"},
        {"question": " "},
        {"title": "无关"},
        {"question": 3},
    ]
    write_rows(tmp_path / "更多" / "题.jsonl", rows)
    aside = SetAside()
    benchmarks = Benchmarks.read([tmp_path], aside)
    assert benchmarks.report()["items"] == 2 and len(aside) == 3
    assert all(reason.startswith("不是题目") for _, reason in aside.counts)
    (tmp_path / "空").mkdir()
    write_rows(tmp_path / "空" / "无.jsonl", rows[1:])
    with pytest.raises(UserError, match="没有可用的题目"):
        Benchmarks.read([tmp_path / "空"], SetAside())
    with pytest.raises(UserError, match="找不到"):
        Benchmarks.read([tmp_path / "不存在"], SetAside())


# --- real questions, real text ---


def test_cmmlu_is_found_and_classics_are_kept(shared):
    from opencc import OpenCC

    traditional = OpenCC("s2t").convert
    benchmarks, rng = Benchmarks.read([shared / "eval" / "cmmlu"], SetAside()), random.Random(0)
    chosen = rng.sample(benchmarks.items, 800)

    def found(documents):
        return np.mean([hit >= 0 for hit in hits(benchmarks, *documents)])

    pages = [exam(item.question, item.options) for item in chosen]
    assert found(pages) > 0.995
    assert found([traditional(page) for page in pages]) > 0.995
    assert (
        found(["".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in page) for page in pages])
        > 0.995
    )
    assert found([f"{'别的话。' * 100}{page}{'别的话。' * 100}" for page in pages]) > 0.995
    half = [len(item.question) // 2 for item in chosen]
    edited = [
        item.question[:at] + "某" + item.question[at + 1 :] for item, at in zip(chosen, half, strict=True)
    ]
    assert found([exam(question, item.options) for question, item in zip(edited, chosen, strict=True)]) > 0.99
    assert found([item.question for item in chosen]) > 0.8  # the others are shorter than MINIMUM
    for name, rows in (("modern_chapters", 1500), ("tang_poems", 20_000)):
        with gzip.open(shared / "pretrain" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in itertools.islice(lines, rows)]
        assert max(hits(benchmarks, *texts)) == -1
