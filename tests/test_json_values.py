"""JSON arrays and values in streams: windows of any size, strange values, damage."""

import json

import pytest
from corpus_files import (
    TEXT,
    contain,
    documents,
    file_of,
    read,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sources import json_rows, json_values, streams
from sources.aside import FileAside, SetAside
from sources.containers import read_rows

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["title", "b"]), VALUES, min_size=1) | VALUES, min_size=1, max_size=12
    ),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([(",", ":"), (", ", ": ")]),
    st.booleans(),
    st.sampled_from([1, 3, 10, 50]),
)
def test_windows_of_any_size_find_the_values(values, indent, separators, in_array, size):
    if not in_array:
        values = [value if isinstance(value, dict) else {"v": value} for value in values]
    texts = [
        json.dumps(value, indent=indent, separators=separators, ensure_ascii=size == 3) for value in values
    ]
    content = f"[{separators[0].join(texts)}]" if in_array else "\n".join(texts)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WINDOW", "BLOCK", "FIRST_TRY"):
            patch.setattr(json_values, name, size)
        aside = SetAside()
        with file_of(content.encode()) as path, streams.open_file(path) as handle:
            rows = list(json_rows.json_values(handle, FileAside(aside, path), json_rows.exact_json, in_array))
    assert rows == [(n, value) for n, value in enumerate(values, 1) if isinstance(value, dict)]
    assert len(aside) == sum(not isinstance(value, dict) for value in values)


@pytest.mark.parametrize("layout", ["array", "one a line", "indented", "values"])
@pytest.mark.parametrize("damage", ["quote", "bracket", "value", "byte"])
def test_damage_inside_an_array_costs_few_rows(layout, damage):
    rows = documents(2000)
    content = contain(rows, layout)
    at = content.index("第1000篇".encode())
    changed = {
        "quote": content[:at] + b'"' + content[at:],
        "bracket": content[: at - 1] + content[at:].replace(b"}", b"", 1),
        "value": content[: at - 1] + b"oops" + content[content.index(b'"', at) + 1 :],
        "byte": content[:at] + b"\xff" + content[at + 1 :],
    }[damage]
    with file_of(changed) as path:
        texts, aside = read(path)
    assert set(texts) < {row["text"] for row in rows} and len(texts) >= 1997
    assert len(aside) in (1, 2) and aside.examples[0]["row"] in (1001, 1002)


def test_two_missing_quotes_do_not_join_what_is_between():
    """Up to the second one, strings and what is between them change places."""
    content = contain(documents(2000), "array")
    for number in (1000, 1020):
        content = content.replace(f'"第{number}篇'.encode(), f"第{number}篇".encode())
    with file_of(content) as path:
        texts, aside = read(path)
    assert len(texts) >= 1996 and len(aside) == 2


NESTED = st.recursive(
    st.text(st.sampled_from('\\"{}[],a'), max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from('a\\"{'), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(NESTED, max_size=8), st.sampled_from([1, 7, 1 << 17]))
def test_brackets_enclose_objects(values, block):
    texts = [json.dumps(value) for value in values]
    expected, offset = [], 1
    for text, value in zip(texts, values, strict=True):
        if not isinstance(value, str):
            expected.append((offset, offset + len(text)))
        offset += len(text) + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "BLOCK", block)
        assert json_values.object_spans(f"[{','.join(texts)}]".encode(), 1) == expected


def test_values_of_other_kinds_between_objects(monkeypatch):
    monkeypatch.setattr(json_values, "WINDOW", 100)
    values: list = [{"b": number} for number in range(200)]
    for place in (30, 60, 61, 120, 199):
        values[place] = place if place % 2 else {"c": [{"b": 1}, {"b": 2}], "long": "字" * 1000}
    with file_of(json.dumps(values, ensure_ascii=False).encode()) as path:
        aside = SetAside()
        assert [row for _, row in read_rows(path, aside)] == [v for v in values if isinstance(v, dict)]
        assert [example["row"] for example in aside.examples] == [62, 200]


def test_nested_objects_like_the_outer_ones():
    """What stands between the sections of an entry is what stands between the entries."""
    rows = [
        {"title": f"条目{n}", "sections": [{"title": f"{m}", "content": "内容}, {" * m} for m in range(4)]}
        for n in range(3000)
    ]
    for layout in ("array", "glued", "indented", "values"):
        with file_of(contain(rows, layout)) as path:
            texts, aside = read(path)
            assert [row for _, row in read_rows(path, aside)] == rows and not aside
        assert len(texts) == 3000 and texts[7].startswith("条目7：\n1：内容")
