"""report.html: whole, safe and self-contained, whatever the report holds."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_clean.page import MOST_SOURCES, compact, differences, percent, visible, write_page
from data_clean.plot import plot
from data_clean.tally import LENGTHS, SHARES, SIZES, Tally
from data_clean.texts import from_strings

VOID = {"meta", "br", "hr", "line", "path"}  # without an end tag, or closed at once
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


class Page(HTMLParser):
    """Checks that tags are nested, and collects the text, the tags and the references."""

    def __init__(self, path):
        super().__init__()
        self.open, self.text, self.tags, self.references = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open
        self.text = "".join(self.text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page_of(folder, tally, **more):
    report = json.loads(json.dumps({**tally.report(), **more}))
    write_page(folder / "report.html", report)
    page = Page(folder / "report.html")
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    assert all(reference.startswith("#") for reference in page.references)
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", source.partition("</style>")[0])
    return page


def tally_of(texts, sources, rules):
    tally, sources = Tally(), np.array(sources, object)
    data = from_strings(texts)
    read = tally.count_read(data, sources)
    for rule in dict.fromkeys(filter(None, rules)):
        tally.drop(rule, data, sources, np.flatnonzero([other == rule for other in rules]))
    kept = np.array([rule is None for rule in rules], bool)
    tally.count_kept(data.take(np.flatnonzero(kept)), sources[kept])
    tally.step("读取", len(texts), len(texts), read, read, 0.5)
    return tally


SET_ASIDE = {
    "rows": 3,
    "counts": [
        {"file": "<b>坏.jsonl", "reason": "不是有效的 JSON", "rows": 2},
        {"file": "x.gz", "reason": "损坏", "rows": 1},
    ],
    "examples": [{"file": "<b>坏.jsonl", "row": 7, "reason": "不是有效的 JSON", "excerpt": "{<i>"}],
    "remedies": {"损坏": "重新下载该文件"},
}


def test_a_page_with_everything(tmp_path):
    tally = tally_of(
        ["好文章" * 9, "略", "\x00\x1b二进制"], ["维基", "网页", "网页"], [None, "过短", "控制字符过多"]
    )
    tally.examples["近似重复"] = [
        {
            "source": "甲",
            "text": "今天天气很好",
            "kept_source": "乙",
            "kept": "今天天气不好",
            "similarity": 0.6543,
        }
    ]
    tally.rules["近似重复"] = {"rows": 1, "characters": 6}
    tally.count("隐私", {"邮箱": 5})
    page = page_of(
        tmp_path, tally, set_aside=SET_ASIDE, settings={"data": "<目录>", "prefer": []}, seconds=12.5
    )
    for expected in (
        "维基",
        "过短",
        "\\x00\\x1b二进制",
        "0.654",
        "邮箱",
        "<b>坏.jsonl",
        "重新下载该文件",
        "<目录>",
        "第 7 行",
    ):
        assert expected in page.text, expected
    assert page.tags.count("mark") == 2 and page.tags.count("svg") == 1
    assert "读入 3 篇" in page.text and "33.3%" in page.text


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(ANY, ANY, st.one_of(st.none(), ANY)), max_size=6))
def test_any_text_is_only_text(tmp_path_factory, documents):
    """Names, rules and texts of any kind appear as they are, and never become tags."""
    texts, sources, rules = zip(*documents, strict=True) if documents else ((), (), ())
    page = page_of(tmp_path_factory.mktemp("page"), tally_of(texts, sources, rules))
    for text, source, rule in documents:
        for shown in (source, *((rule, text[:120]) if rule else ())):
            assert visible(shown) in page.text


@pytest.mark.parametrize("sources", [0, 1, 30, MOST_SOURCES + 50])
def test_any_number_of_sources(tmp_path, sources):
    names = [f"来源{n}" + "很长" * 200 for n in range(sources)]
    page = page_of(tmp_path, tally_of(["正文"] * sources, names, [None] * sources))
    assert page.text.count("很长" * 200) == min(sources, MOST_SOURCES)
    assert ("其余 50 个来源" in page.text) == (sources > MOST_SOURCES)
    assert "没有剔除任何文档" in page.text


# --- its parts ---


@given(ANY, ANY)
def test_differences_lose_nothing_and_mark_what_differs(one, other):
    left, right = differences(one, other)
    assert "".join(text for text, _ in left) == visible(one)
    assert "".join(text for text, _ in right) == visible(other)
    same = ["".join(text for text, changed in side if not changed) for side in (left, right)]
    assert same[0] == same[1]


HISTOGRAMS = st.sampled_from([LENGTHS, SHARES, SIZES]).flatmap(
    lambda edges: st.tuples(
        st.just(edges),
        st.lists(
            st.lists(st.integers(0, 10**9), min_size=len(edges) - 1, max_size=len(edges) - 1), max_size=2
        ),
    )
)


@settings(deadline=None)
@given(HISTOGRAMS)
def test_plots_stay_within_their_frame(histogram):
    edges, counts = histogram
    svg = plot("名字<b>", {"edges": edges, "series": {f"系列{n}": c for n, c in enumerate(counts)}})
    if not any(map(any, counts)):
        assert svg is None
        return
    width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
    paths = re.findall(r' d="([^"]+)"', svg)
    assert len(paths) == len(counts) and "<b>" not in svg
    for path in paths:
        for letter, value in re.findall(r"([MVH ])(-?[\d.]+)", path):
            assert 0 <= float(value) <= (height if letter in "V " else width)
    assert len(re.findall("<text", svg)) < 40


def test_taller_bars_for_higher_counts():
    (path,) = re.findall(r' d="([^"]+)"', plot("占比", {"edges": [0, 0.5, 1], "series": {"": [10, 20]}}))
    low, high, ground = (float(value) for value in re.findall(r"V([\d.]+)", path))
    assert high < low < ground and abs((ground - high) - 2 * (ground - low)) < 0.2


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (9999, "9,999"), (12345, "1.23万"), (4_100_000, "410万"), (1.5e9, "15.0亿")],
)
def test_large_numbers_as_chinese_says_them(value, expected):
    assert compact(value) == expected


def test_shares():
    assert [percent(0, 0), percent(1, 3), percent(3, 3), percent(1, 10**6)] == [
        "0%",
        "33.3%",
        "100%",
        "0.0001%",
    ]
