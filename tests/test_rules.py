"""Quality rules: every feature against a slow and obvious version of it, and what the rules keep and drop."""

import gzip
import json
import math
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_clean import keywords
from data_clean.damage import RAW_FEATURES, TRACES, WINDOWS_1252, measure_raw
from data_clean.features import COLUMN, FEATURES, STOP_WORDS, measure
from data_clean.keys import IDEOGRAPHS, TABLE_SIZE
from data_clean.presets import LONG, PRESETS, RAW_RULES, RULES
from data_clean.repetition import ECHO, SAMPLE
from data_clean.rules import LONG_NAME, RuleSet, check_limit, preset_of
from data_clean.texts import Texts, from_strings
from stage import UserError

PIECES = [
    *"的是一。！？?!…⋯【】•·-*é한١1４Ａ々〇𠀀½㈱°~”赌 \n\t\u3000\ufe0f",
    *(
        "中文",
        "哈哈哈",
        "甲乙丙丁戊己庚辛壬癸",
        "abc",
        "23",
        "……",
        "...",
        "。。。",
        "\n\n",
        "\r\n",
        "😀",
        "👩\u200d🔬",
        "\U000e0101",
    ),
    *(
        "点击这里",
        "返回顶部",
        "联系我们",
        "加QQ",
        "ＱＱ群",
        "【公告】",
        "更多",
        "查看更多",
        "[详细]",
        "read more",
        "赌博",
    ),
    *(
        "http://a.cn/x?y=1",
        "https://www.",
        "WWW.b.com",
        "ｗｗｗ．c",
        "<div",
        "</DIV",
        "&nbsp;",
        'href="',
        "\U0010fffd",
    ),
]
TEXTS = st.lists(
    st.one_of(st.sampled_from(PIECES), st.characters(exclude_categories=["Cs"])), max_size=80
).map("".join)
ENDS = "。！？!?…⋯；;：:．.｡～~”’\"'」』）)】》〉］]"
BLOCKED = ("赌", "赌博", "乙丙丁", "ABC")


def one(features, name):
    return features[0, COLUMN[name]]


# --- the slow version of every feature ---


def is_chinese(char):
    return char in "々〇" or any(first <= ord(char) < end for first, end in IDEOGRAPHS)


def group(char):
    """han, letter, digit, punctuation, symbol or space."""
    if is_chinese(char):
        return "han"
    if char.isspace():
        return "space"
    if ord(char) >= TABLE_SIZE or "\ufe00" <= char <= "\ufe0f":
        return "symbol"
    groups = {"L": "letter", "M": "letter", "N": "digit", "P": "punctuation"}
    return groups.get(unicodedata.category(char)[0], "symbol")


def without_space(text):
    return "".join(text.split())


def sentences_of(line):
    """Cut behind 。！？ and behind ?! unless a letter or digit of ASCII follows."""
    return re.split(r"(?<=[。！？])|(?<=[?!])(?![A-Za-z0-9])", line)


def said_share(text, words):
    """Share of the visible characters in sentences that contain one of the words."""
    total, visible = 0, len(without_space(text))
    for line in text.split("\n"):
        folded, ends = keywords.fold(line), set()
        for word in map(keywords.fold, words):
            starts = [i for i in range(len(folded)) if folded.startswith(word, i)]
            ends.update(len(without_space(line[: i + len(word)])) - 1 for i in starts)
        begin = 0
        for sentence in sentences_of(without_space(line)):
            end = begin + len(sentence)
            total += len(sentence) * any(begin <= i < end for i in ends)
            begin = end
    return total / visible


def link_share(text):
    folded, linked, behind = keywords.fold(text), 0, 0
    for match in re.finditer(r"(?=(https?://|www\.))", folded):
        start, end = match.start(), match.start() + len(match[1])
        if end > behind:
            behind = end + len(re.match(r"[!#-;=-~]*", text[end:])[0])
            linked += behind - start
    return linked / len(without_space(text))


def line_features(text):
    pairs = [(without_space(line), line.strip()) for line in text.split("\n") if line.strip()]
    lines = [line for line, _ in pairs]
    more = tuple(map(keywords.fold, keywords.listed(keywords.MORE_ENDS)))
    cut = sum(
        line.endswith(("…", "⋯", "...", "。。。")) or keywords.fold(spaced).endswith(more)
        for line, spaced in pairs
    )
    repeated = [line for i, line in enumerate(lines) if line in lines[:i]]
    inner = [inside for line in lines for inside in re.findall("【([^【】]*)】", line)]
    return {
        "lines": len(lines),
        "line_length": sum(map(len, lines)) / len(lines),
        "ended_lines": sum(line[-1] in ENDS for line in lines) / len(lines),
        "cut_lines": cut / len(lines),
        "bullet_lines": sum(line[0] in "•‣●○◦■□▪▫◆◇▶◀※·➢–-*+" for line in lines) / len(lines),
        "repeated_lines": len(repeated) / len(lines),
        "repeated_line_text": sum(map(len, repeated)) / sum(map(len, lines)),
        "brackets": sum(map(len, inner)) / sum(map(len, lines)),
    }


def top(text, n):
    """Share in the most frequent n-gram, its first occurrence apart."""
    counts = Counter(text[i : i + n] for i in range(len(text) - n + 1))
    return min(1, n * (max(counts.values(), default=1) - 1) / len(text))


def repeated(text, n):
    """Share of the characters covered by n-grams that occurred before, and of those that did within ECHO."""
    seen, covered, echoes = {}, set(), 0
    for i in range(len(text) - n + 1):
        gram = text[i : i + n]
        if gram in seen:
            covered.update(range(i, i + n))
            echoes += i - seen[gram] <= ECHO
        seen[gram] = i
    return len(covered) / len(text), echoes / len(text)


def slow_features(text):
    visible = without_space(text)
    groups = Counter(map(group, text))
    content = groups["han"] + groups["letter"] + groups["digit"]
    sample = visible[:SAMPLE]
    counts = Counter(sample)
    return {
        "characters": len(text),
        "content": content,
        "chinese": groups["han"] / len(visible),
        "content_share": content / len(visible),
        "punctuation": groups["punctuation"] / len(visible),
        "symbols": groups["symbol"] / len(visible),
        "digits": groups["digit"] / max(content, 1),
        "spaces": groups["space"] / len(text),
        **line_features(text),
        "links": link_share(text),
        "boilerplate": said_share(
            text, keywords.listed(keywords.ADVERTISING) + keywords.listed(keywords.NAVIGATION)
        ),
        "markup": said_share(text, keywords.listed(keywords.MARKUPS)),
        "blocked": said_share(text, BLOCKED),
        "entropy": -sum(n / len(sample) * math.log(n / len(sample)) for n in counts.values()),
        "function_words": sum(chr(code) in counts for code in STOP_WORDS.tolist()),
        **{f"top_{n}gram": top(sample, n) for n in (2, 3, 4)},
        **{f"repeated_{n}gram": repeated(sample, n)[0] for n in (8, 12, 16)},
        "echoes": repeated(sample, 8)[1],
    }


def assert_equal(texts):
    """All features of all texts as the slow version has them."""
    measured = measure(from_strings(texts), keywords.automaton(BLOCKED))
    assert measured.shape == (len(texts), len(FEATURES)) and measured.dtype == np.float32
    for row, text in zip(measured, texts, strict=True):
        if not without_space(text):
            assert row[COLUMN["characters"]] == len(text) and row.sum() - len(text) in (0, 1)
            continue
        expected = slow_features(text)
        assert list(expected) != [] and set(expected) == set(FEATURES)
        for name, value in expected.items():
            assert row[COLUMN[name]] == pytest.approx(value, rel=1e-5, abs=1e-6), (name, text)


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_features_are_those_of_the_slow_version(texts):
    assert_equal(texts)


def test_features_of_long_texts():
    rng = random.Random(0)
    block = "".join(chr(0x4E00 + rng.randrange(2000)) for _ in range(3000))
    chars = [*PIECES, *map(chr, range(0x4E00, 0x4FF0))]
    mixed = "".join(rng.choice(chars) for _ in range(30_000))
    periods = [block[:period] * 4 for period in range(ECHO - 3, ECHO + 4)]
    lines = "一二三四五六七八\n" * 700
    assert_equal(
        [mixed, *periods, block * 2 + mixed[:100], "甲" * 9000, "甲乙" * 50, lines, "", " \n", mixed[:5000]]
    )
    # Only the beginning of a book is looked at for n-grams.
    fresh = "".join(map(chr, range(0x4E00, 0x4E00 + SAMPLE)))
    assert one(measure(from_strings([fresh + "哈" * 20_000])), "repeated_8gram") == 0


def test_measures_of_datatrove():
    """Gopher's and FineWeb's own code, given characters for words."""
    gopher = pytest.importorskip("datatrove.pipeline.filters.gopher_repetition_filter")
    rng = random.Random(1)
    for _ in range(30):
        block = "".join(chr(0x4E00 + rng.randrange(400)) for _ in range(rng.randrange(20, 200)))
        text = "\n".join(
            rng.choice([block, block[:15], chr(0x4E00 + rng.randrange(400)) * 3]) for _ in range(12)
        )
        measured, chars, lines = measure(from_strings([text])), list(without_space(text)), text.split("\n")
        elements, characters = gopher.find_duplicates(lines)
        assert one(measured, "repeated_lines") == pytest.approx(elements / len(lines))
        assert one(measured, "repeated_line_text") == pytest.approx(characters / len(chars))
        for n in (2, 3, 4):
            joined = gopher.find_top_duplicate(gopher.get_n_grams(chars, n))  # with spaces between the words
            count = joined // (2 * n - 1)
            assert one(measured, f"top_{n}gram") == pytest.approx(min(1, (count - 1) * n / len(chars)))
        for n in (8, 12, 16):
            # It goes on behind a duplicate, so of a repeated passage it may miss the last n - 1 characters.
            greedy, ours = (
                gopher.find_all_duplicate(chars, n),
                one(measured, f"repeated_{n}gram") * len(chars),
            )
            assert greedy <= ours + 1e-3 and ours - greedy < n * len(lines)


# --- keywords ---


def test_keywords_within_and_across_each_other_are_found():
    rng = random.Random(2)
    for _ in range(200):
        words = ["".join(rng.choices("甲乙丙丁abＤ", k=rng.randrange(2, 6))) for _ in range(8)]
        text = "".join(rng.choices("甲乙丙丁abdＡ。", k=40))
        measured = measure(from_strings([text]), keywords.automaton(tuple(words)))
        assert one(measured, "blocked") == pytest.approx(said_share(text, words)), (words, text)


def test_a_long_list_of_keywords():
    words = [han(3, seed) for seed in range(20_000)]
    chosen = keywords.automaton((*words, "赌"))
    text = "".join(f"{word}。阿阿。" for word in words)
    assert one(measure(from_strings([text]), chosen), "blocked") == pytest.approx(4 / 7)
    assert one(measure(from_strings(["赌，好。不是"]), chosen), "blocked") == pytest.approx(4 / 6)


def test_blocked_words_of_the_user_drop_a_text():
    text = from_strings(["今天的开奖号码是多少？请看彩票网。", "今天天气很好，我们去公园散步。"])
    rules = RuleSet("general", block_words=["\ufeff彩票\r", "  ", "ＬＯＴＴＯ"])
    assert [rules.names[v] if v >= 0 else None for v in rules.verdicts(text)] == ["屏蔽词", None]
    assert (RuleSet("general").verdicts(text) == -1).all()
    assert rules.names[rules.verdicts(from_strings(["买lotto吧，大家一起来。"]))[0]] == "屏蔽词"


# --- damage ---


def slow_damage(text):
    controls = len(re.findall("[\x00-\x08\x0e-\x1f\x7f-\x9f]", text))
    latin = "\x80-\xb6\xb8-\xd6\xd8-\xff"
    mojibake = len(re.findall(f"[{TRACES}]", text))
    mojibake += sum(map(len, re.findall("烫{3,}|屯{3,}", text)))
    for run in re.findall(f"[{latin}{WINDOWS_1252}]{{4,}}", text):
        mojibake += len(run) * (len(set(run)) > 1 and 2 * len(re.findall(f"[{latin}]", run)) >= len(run))
    return {"controls": controls / len(text), "mojibake": mojibake / len(text)}


SIGNS = [*"é·×“字°鐨烫a\x00\x93\ufffd", "ä½\xa0å¥½", "×××", "……", "锟斤拷", "烫烫烫"]
DAMAGED = st.lists(
    st.one_of(st.sampled_from(SIGNS), st.characters(exclude_categories=["Cs"])), min_size=1, max_size=40
).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(DAMAGED, min_size=1, max_size=3))
def test_damage_is_that_of_the_slow_version(texts):
    for row, text in zip(measure_raw(from_strings(texts)), texts, strict=True):
        assert dict(zip(RAW_FEATURES, row.tolist(), strict=True)) == pytest.approx(
            slow_damage(text), rel=1e-5
        ), text


@pytest.mark.parametrize("read_as", ["latin-1", "cp1252", "gbk", "gb18030", "big5"])
def test_text_decoded_wrongly_is_mojibake(read_as):
    text = (
        "这天，孔子在家里坐着，弟子们都来了。他说：“学习并且时常温习，不也是很高兴的事吗？”弟子们回答说：是的。"
        * 3
    )
    wrong = text.encode().decode(read_as, errors="replace")
    verdict = RuleSet("general").raw_verdicts(
        from_strings([wrong, text, text.encode("gbk").decode("latin-1")])
    )
    assert verdict[0] >= 0 and verdict[1] == -1 and verdict[2] == 1


# --- what rules keep and drop ---

GOOD = [
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "氧：化学元素，符号O，原子序数8。",
    "二维码：用特定的几何图形记录数据符号信息的图形。",
    "关关雎鸠，在河之洲。窈窕淑女，君子好逑。参差荇菜，左右流之。窈窕淑女，寤寐求之。",
    "行行重行行，与君生别离。相去万余里，各在天一涯。",
    "9加8等于17，17减8等于9，所以9+8=17，17-8=9。",
    "C'est déjà l'été : où êtes-vous allés, mes très chers élèves ?",
    "Il répondit : « À bientôt ! » et s'en alla, à pas feutrés.",
    "Привет, как дела? Сегодня хорошая погода.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
    "The rules of this set were made for Chinese, but a page of English is no worse for that. "
    * 1
    + "Letters are few in English, so single letters say little about how rich a text is; long passages of plain "
    "prose must not be taken for noise merely because an alphabet has twenty-six letters and no more than that.",
    "举报电话和免责声明写在通知的末尾，记者随后拨打了办证大厅的技术支持热线。",
]


def verdict(text, preset="general", **options):
    """The name of the first rule that drops a text, raw or normalised."""
    rules, texts = RuleSet(preset, **options), from_strings([text])
    raw, clean = rules.raw_verdicts(texts)[0], rules.verdicts(texts)[0]
    return rules.raw_names[raw] if raw >= 0 else rules.names[clean] if clean >= 0 else None


@pytest.mark.parametrize("text", GOOD)
def test_good_texts_pass_every_rule(text):
    assert verdict(text) is None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("".join(f"{char}\x08" for char in "这是一段混入控制字符的文字"), "控制字符过多"),
        ("这是��坏�的文�字，�读不��", "乱码"),
        ("你好世界，这里是中文文字".encode().decode("latin-1"), "控制字符过多"),
        ("ä½\xa0å¥½ï¼Œä¸–ç•Œï¼", "乱码"),
        ("锟斤拷锟斤拷烫烫烫锟斤拷", "乱码"),
        ("暂无内容。", "过短"),
        ("★☆★☆＝＝＝＝／／／→→→※※※" * 3 + "字母一二三四五六七八九十", "文字太少"),
        ("点击这里领取大礼包，名额有限！扫一扫二维码，关注公众号。", "广告或网页边框"),
        ("首页 > 频道 > 列表 > 正文　上一页　下一页　返回顶部", "广告或网页边框"),
        ("http://example.com/click?id=12345 http://example.com/ad", "网址太多"),
        ("哈" * 50, "内容重复"),
        ("买一送一，" * 20 + "今天是个好日子。", "内容重复"),
        ("\n".join(["同样的一行文字在这里", "另外一行不同的文字"] * 6), "内容重复"),
    ],
)
def test_bad_texts_fail_the_rule_meant_for_them(text, rule):
    assert verdict(text) == rule


def han(count, seed=0):
    """Varied Chinese characters, none of them a function word."""
    rng, words = random.Random(seed), set(STOP_WORDS.tolist())
    return "".join(chr(c) for c in rng.choices([c for c in range(0x4E00, 0x5400) if c not in words], k=count))


def cut(text, size, form="{}"):
    """Pieces of a text, each put into a form."""
    return [form.format(text[i : i + size]) for i in range(0, len(text) - size + 1, size)]


def prose(count, seed=0):
    """Lines of two clauses, with function words here and there."""
    rng = random.Random(seed)
    words = [
        f"{a}{rng.choice('的是了在和有')}{b}"
        for a, b in zip(cut(han(count, seed), 5), cut(han(count, -seed - 1), 4), strict=False)
    ]
    return "".join(f"{a}，{b}。\n" for a, b in zip(words[::2], words[1::2], strict=False))


HAN, PROSE = han(3000), prose(2000)
ENGLISH = (
    "This page has words and sentences, of which each one differs from all the others. Only they are of another "
    "language, not the one that was asked for, and so it goes on, line after line. Quick brown foxes jump over lazy "
    "dogs; sphinx of black quartz judges my vow; pack my box with jugs. How vexingly quick daft zebras jump! Bright "
    "vixens jump, dozy fowl quack, and five boxing wizards jump quickly."
)
WEB_BAD = {
    "过短": "太短了，的是。",
    "文字太少": "＝＝＝＝，" * 20 + HAN[:40],
    "汉字太少": ENGLISH + "的是",
    "数字太多": "".join(f"{part}{n * 7919 % 1009}，" for n, part in enumerate(cut(HAN, 5))) + "的是。",
    "符号太多": "".join(cut(HAN, 5, "{}★")) + "的是，。",
    "空白太多": " ".join(PROSE[:900]),
    "括号标题太多": "".join(cut(PROSE.replace("\n", ""), 60, "【" + "{}】\n")),
    "没有标点": "\n".join(cut(HAN, 20, "{}的是")),
    "虚词太少": "".join(cut(HAN, 20, "{}。\n")),
    "行太短": "".join(cut(HAN[:900], 6, "{}。\n")) + "的是",
    "行末少标点": PROSE.replace("。\n", "\n") + "的是，然后",
    "截断的行": PROSE.replace("。\n", "……\n"),
    "全是列表": "• " + PROSE.replace("\n", "\n• "),
    "广告或网页边框": PROSE[:400] + "".join(cut(HAN[:300], 30, "点击下载{}。")),
    "网址太多": PROSE[:300] + "http://example.com/" + "a-long/path/that-goes/on-and-on/" * 3,
    "HTML 残留": PROSE[:400] + "".join(cut(HAN[:300], 30, "<div>{}。")),
    "屏蔽词": PROSE[:400] + "".join(cut(HAN[:100], 20, "赌博{}。")),
    "内容重复": PROSE[:300] * 4,
    "同一短语反复": PROSE[:600] + "来来回回走啊" * 20,
    "重复行": "".join(cut(PROSE.replace("\n", ""), 60, "{}\n短短的一行。\n")),
    "重复行的字": PROSE[:1500] + PROSE[:240],
    "二字串重复": "".join(cut(HAN[:1400], 6, "{}国家")) + PROSE[:200],
    "三字串重复": "".join(cut(HAN[:1400], 11, "{}委员会")) + PROSE[:200],
    "四字串重复": "".join(cut(HAN[:1400], 16, "{}人民公社")) + PROSE[:100],
    "八字串重复": "".join(cut(PROSE.replace("\n", ""), 24, "{}一二三四五六七八九")) + "。",
    "十二字串重复": "".join(cut(PROSE.replace("\n", ""), 55, "{}天地玄黄宇宙洪荒日月盈昃")) + "。",
    "十六字串重复": "".join(cut(PROSE.replace("\n", ""), 100, "{}" + PROSE[:18])) + "。",
    "用字太单一": "".join(random.Random(3).choices("的是一二三四五六七八九十，。", k=400)) + "。",
}


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_every_rule_drops_what_it_is_for(rule):
    assert verdict(PROSE, "web") is None
    assert verdict(WEB_BAD[rule], "web", block_words=["赌博"]) == rule


def test_short_texts_are_not_called_repetitive():
    couplet = "山重水复疑无路，柳暗花明又一村。山重水复疑无路，柳暗花明又一程。"
    assert all(verdict(couplet, preset) is None for preset in PRESETS)
    assert (
        verdict("采薇采薇，薇亦作止。曰归曰归，岁亦莫止。靡室靡家，玁狁之故。不遑启居，玁狁之故。", "poetry")
        is None
    )


def test_lists_of_works_stay_outside_the_web():
    works = "".join(f"《{title}》（{1950 + n}年）；" for n, title in enumerate(cut(HAN[:140], 4)))
    text = f"主要作品：{works}"
    assert [verdict(text, preset) for preset in ("general", "encyclopedia", "medical", "books")] == [None] * 4
    assert verdict(text, "web")


def test_the_frame_of_a_forum_is_no_text():
    frame = "只看该作者 | 回复 | 举报\n回复 支持 反对 使用道具 举报\n您需要登录后才可以回帖 登录\n返回列表 发新帖 回复"
    assert verdict(frame) == "广告或网页边框"
    assert verdict("论坛上有人问使用道具的办法，楼主回复说先看说明书，再到商店里去买。") is None


def test_overrides_take_the_place_of_limits():
    text = "氧：化学元素，符号O，原子序数8。"
    assert verdict(text, overrides={"过短": 100}) == "过短"
    assert verdict("暂无内容。", overrides={"过短": 0}) is None
    assert verdict(PROSE[:140] * 2, "web") is None
    assert verdict(PROSE[:140] * 2, "web", overrides={LONG_NAME: 200}) == "重复行"
    rules = RuleSet("web", {"过短": 7})
    assert rules.limits["过短"] == 7 and rules.limits["汉字太少"] == 0.3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"过长": 1}, "没有名为 过长 .*过短、文字太少"),
        ({"汉字太少": 1.5}, "0 与 1 之间"),
        ({"汉字太少": float("nan")}, "0 与 1 之间"),
        ({"过短": -1}, "不小于 0"),
        ({"过短": math.inf}, "不小于 0"),
        ({LONG_NAME: -5}, "不小于 0"),
    ],
)
def test_limits_that_cannot_be_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        RuleSet("general", overrides)


def test_tables_are_whole():
    for rule in RAW_RULES + RULES:
        assert rule.feature in (RAW_FEATURES if rule in RAW_RULES else FEATURES)
        assert len(rule.limits) == len(PRESETS) == len(LONG)
        for limit in rule.limits:
            check_limit(rule.name, limit)
    assert len({rule.name for rule in RAW_RULES + RULES}) == len(RAW_RULES + RULES) == len(WEB_BAD) + 2


def test_the_documentation_has_every_limit():
    """docs/cleaning_rules.md: one row for each rule, in order, with the limits in force."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "cleaning_rules.md").read_text(encoding="utf-8")
    rows = [
        line for line in page.splitlines() if line.startswith("| ") and ("低于" in line or "高于" in line)
    ]
    for row, rule in zip(rows, RAW_RULES + RULES, strict=True):
        is_off = [limit == (rule.drops == "above") and rule.feature != "content" for limit in rule.limits]
        limits = ["–" if off else f"{limit:g}" for off, limit in zip(is_off, rule.limits, strict=True)]
        drops = {"below": "低于", "above": "高于"}[rule.drops] + ("（长文）" if rule.long_only else "")
        measured = (RAW_FEATURES | FEATURES)[rule.feature]
        assert row.startswith(f"| {rule.name} | {measured} | {drops} | {' | '.join(limits)} | "), rule.name
    assert " | ".join(map(str, LONG)) in page and all(name in page for name in PRESETS)


@pytest.mark.parametrize(
    ("source", "preset"),
    [
        ("wikipedia-cn-20230720-filtered", "encyclopedia"),
        ("563w_baidubaike", "encyclopedia"),
        ("C4_zh", "web"),
        ("WuDaoCorpus2.0_base_200G", "web"),
        ("SkyPile-150B", "web"),
        ("medical", "medical"),
        ("medical_book_zh", "medical"),
        ("tang_poems", "poetry"),
        ("modern_chapters", "books"),
        ("我的语料", "general"),
        ("bc4all", "general"),
        ("facebook_vaccine_posts", "general"),
        ("book_corpus", "books"),
        ("CCI3-HQ", "web"),
    ],
)
def test_known_sources_have_their_preset(source, preset):
    assert preset_of(source) == preset


def test_the_users_choice_of_a_preset_wins():
    assert preset_of("C4_zh", {"C4*": "general"}) == "general"
    assert preset_of("C4_zh", {"wiki": "books"}) == "web"
    for wrong in (lambda: preset_of("C4_zh", {"C4_zh": "网页"}), lambda: RuleSet("网页")):
        with pytest.raises(UserError, match=r"网页.*encyclopedia"):
            wrong()


def test_empty_batches_and_empty_texts():
    none = from_strings([])
    assert RuleSet("web").verdicts(none).shape == RuleSet("web").raw_verdicts(none).shape == (0,)
    blank = from_strings(["", " ", "\n"])
    assert [RuleSet("general").names[v] for v in RuleSet("general").verdicts(blank)] == ["过短"] * 3


def test_a_part_of_a_larger_buffer_is_measured_alike():
    texts = from_strings(["前面的文字。", *GOOD, "后面。"])
    part = Texts(texts.data[texts.starts[1] : texts.starts[-2]], texts.starts[1:-1] - texts.starts[1])
    assert (measure(part) == measure(texts)[1:-1]).all()


# --- real and made corpora ---


def test_clean_documents_of_the_demo_stay():
    from demo.facts import load_facts, load_tables
    from demo.make import build_documents
    from demo.patterns import Speaker

    speaker = Speaker(load_tables())
    documents = build_documents(load_facts(list(speaker.phrasings)), speaker, 3, 1.0)
    sources = {
        "wiki": "wikipedia-cn",
        "baidu": "baidubaike",
        "c4": "C4_zh",
        "wudao": "WuDaoCorpus",
        "medical": "medical",
    }
    for name, items in documents.items():
        rules, texts = RuleSet(preset_of(sources[name])), from_strings([item.text for item in items])
        dropped = rules.verdicts(texts)
        assert (dropped == -1).all(), [
            (rules.names[v], texts.text(i)) for i, v in enumerate(dropped) if v >= 0
        ]


def test_real_books_and_poems_stay(shared):
    for name, allowed in (
        ("modern_chapters", {"过短": 3, "十六字串重复": 2}),
        ("tang_poems", {"过短": 500, "文字太少": 20}),
    ):
        with gzip.open(shared / "pretrain" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            texts = from_strings([json.loads(line)["text"] or "空" for line in lines])
        rules = RuleSet(preset_of(name))
        counts = Counter(rules.names[v] for v in rules.verdicts(texts).tolist() if v >= 0)
        assert all(counts[rule] <= allowed.get(rule, 0) for rule in counts), (name, counts)
        assert (rules.raw_verdicts(texts) == -1).mean() > 0.9999
