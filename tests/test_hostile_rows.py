"""A thousand malformed and hostile rows: no traceback, nothing silently lost, and texts stay plain text."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import script
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from chatglm_tokenizer.chat import encode_chat
from chatglm_tokenizer.load import load_tokenizer
from sources.aside import SetAside
from sources.lengths import whole_dialogue
from sources.preferences import as_dialogue, to_record
from sources.record_files import in_style, write_rows
from sources.records import read_records
from sources.turns import Unusable

ROWS = 1000
SPECIALS = ["<eos>", "<bos>", "[gMASK]", "sop", "<|im_end|>", "<|im_start|>system", "</s>", "<|endoftext|>"]
SPECIALS += ["<0x0A>", "<unk>", "[MASK]", "<|Human|>", "<eom>", "<sup><|1|></sup>", "▁"]
TEXT = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [*SPECIALS, "", " ", "\n", "\0", "\x1b[2J", "\u202e反", "\ufeff", "NaN", "null", "问", "[[1]"]
    ),
    st.lists(st.sampled_from([*SPECIALS, "问题", "回答", "\t"]), min_size=1, max_size=4).map("".join),
    st.sampled_from(["\ud800", "半\udfff个"]),
)
DEEP = st.integers(1, 60).map(lambda depth: json.loads("[" * depth + "]" * depth))
ANY = st.recursive(
    st.one_of(
        TEXT,
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([10**30, -(10**400), float("nan"), float("inf")]),
        st.floats(),
        DEEP,
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ROLE = st.one_of(
    st.sampled_from(["user", "assistant", "human", "gpt", "system", "tool", "function_call", "observation"]),
    ANY,
)
TURN = st.one_of(
    st.fixed_dictionaries({"role": ROLE, "content": TEXT | ANY}),
    st.fixed_dictionaries({"from": ROLE, "value": TEXT | ANY}),
    st.fixed_dictionaries({"human": TEXT | ANY, "assistant": TEXT | ANY}),
    ANY,
)
TURNS = st.lists(TURN, max_size=5)
GOOD = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "system"]), TEXT).map(
        lambda pair: {"role": pair[0], "content": pair[1]}
    ),
    max_size=5,
)
FIELDS = [
    "instruction",
    "input",
    "output",
    "history",
    "system",
    "messages",
    "conversations",
    "conversation",
    "chat",
    "data",
    "query",
    "response",
    "question",
    "answer",
    "answer_zh",
    "answer_en",
    "chosen",
    "rejected",
    "response_chosen",
    "response_rejected",
    "label",
    "kto_tag",
    "prompt",
    "completion",
    "target",
    "tools",
    "images",
    "meta_instruction",
    "reference",
    "instruct",
    "text",
]
HUGE = ["长" * 350_000, "a" * 1_000_000]  # a megabyte each
HUGE_ROWS = [{"instruction": "问", "output": text} for text in HUGE]
HUGE_ROWS += [{"messages": [{"role": text, "content": text}]} for text in HUGE]
ROW = st.one_of(
    st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), TEXT | TURNS | ANY, max_size=6),
    st.fixed_dictionaries({"messages": GOOD | TURNS}, optional={"label": st.booleans() | ANY, "tools": ANY}),
    st.fixed_dictionaries({"conversations": TURNS, "chosen": TEXT | TURN, "rejected": TEXT | TURN}),
    st.fixed_dictionaries({"question": TEXT, "response_chosen": TEXT, "response_rejected": TEXT | ANY}),
    st.fixed_dictionaries({"instruction": TEXT, "output": TEXT | ANY}, optional={"history": TURNS | ANY}),
    st.fixed_dictionaries({"question": TEXT, "answer": TEXT}),
    st.fixed_dictionaries({"data": st.lists(TEXT, max_size=4)}),
    st.fixed_dictionaries({"chat": st.dictionaries(st.text(max_size=8), TURN, max_size=3) | ANY}),
)


@pytest.fixture(scope="module")
def hostile() -> list[dict]:
    """The same thousand rows in every run."""
    rows: list[dict] = []

    @settings(
        max_examples=ROWS + 200, derandomize=True, database=None, phases=[Phase.generate], deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(ROW)
    def collect(row):
        rows.append(row)

    collect()
    assert len(rows) >= ROWS
    return rows[: ROWS - len(HUGE_ROWS)] + HUGE_ROWS


def outcome(row):
    """The record of a row, or why there is none; nothing but Unusable may come."""
    try:
        return to_record(row)
    except Unusable as reason:
        assert str(reason)
        return None


def is_whole(record) -> bool:
    """Whether a record keeps the promises of to_record."""
    roles = [message["role"] for message in record["messages"]]
    ends_with_question = "chosen" in record or "reference" in record
    expected = ["user", "assistant"] * (len(roles) // 2) + (["user"] if ends_with_question else [])
    texts = [message["content"] for message in record["messages"]]
    texts += [record[key] for key in ("chosen", "rejected", "reference", "system") if key in record]
    return bool(roles) and roles == expected and all(isinstance(text, str) and text.strip() for text in texts)


def test_every_row_is_a_whole_record_or_refused(hostile):
    records = [outcome(row) for row in hostile]
    usable = [record for record in records if record]
    assert all(map(is_whole, usable))
    assert 50 < len(usable) < ROWS - 200  # the rows are neither all nonsense nor all good


@pytest.mark.parametrize("style", ["alpaca", "sharegpt", "openai"])
def test_conversion_there_and_back(hostile, style):
    for record in filter(None, map(outcome, hostile)):
        plain = {key: value for key, value in record.items() if key != "changes"}
        assert to_record(in_style(plain, style)) == plain


def as_lines(rows, path):
    path.write_bytes(b"\n".join(json.dumps(row).encode() for row in rows))


def as_array(rows, path):
    path.write_text(json.dumps(rows), encoding="utf-8")


def as_raw_utf8(rows, path):
    """Lone surrogates as bytes that are no UTF-8."""
    lines = [json.dumps(row, ensure_ascii=False).replace("\\u0000", "\0") for row in rows]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))


def as_csv(rows, path):
    with open(path, "w", encoding="utf-8", errors="surrogatepass", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["prompt", "answer", "system", "history"])
        for row in rows:
            cells = [str(value).replace("\0", "") for value in row.values()][:4]
            writer.writerow([*cells, *[""] * (4 - len(cells))])


def as_parquet(rows, path):
    texts = [json.dumps(row) for row in rows]
    columns = {
        "instruction": texts,
        "output": texts[::-1],
        "history": [[["问", text]] for text in texts],
        "label": [None if number % 3 else True for number in range(len(texts))],
    }
    pq.write_table(pa.table(columns), path)


WRITERS = [as_lines, as_array, as_raw_utf8, as_csv, as_parquet]


@pytest.mark.parametrize("write", WRITERS)
def test_readers_lose_no_row(hostile, tmp_path, write):
    write(hostile, tmp_path / "file.xyz")
    aside = SetAside()
    records = list(read_records(tmp_path / "file.xyz", aside))
    assert len(records) + len(aside) == ROWS
    assert all(map(is_whole, records))


RAW = st.one_of(
    st.sampled_from(
        [
            b'{"instruction": "\xe9\x97\xae", "instruction": 7, "output": "x"}',  # the last of equal keys counts
            b'{"instruction": "q", "output": NaN}',
            b'{"instruction": "q", "output": -Infinity}',
            b'{"instruction": "q", "output": ' + b"9" * 5000 + b"}",
            b'{"instruction": "q", "output": ' + b"[" * 3000 + b"]" * 3000 + b"}",
            b'{"messages": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
            b'{"instruction": "\\ud83d", "output": "x"}',
            b'{"instruction": "q", "output": "\xff\xfe"}',
            b'{"instruction": "q", "output": "\x00\x01\x1b"}',
            b'{"instruction": "q", "output": "cut off',
            b"null",
            b"7",
            b"[]",
            b'"text"',
            b"{}",
            b"}{",
            b"\xef\xbb\xbf{}",
        ]
    ),
    st.binary(min_size=1, max_size=40).map(lambda data: b"{" + data.replace(b"\n", b"")),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(RAW, min_size=1, max_size=12))
def test_broken_lines_are_counted_too(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("raw") / "a.jsonl"
    good = b'{"instruction": "q", "output": "a"}'
    path.write_bytes(b"\n".join([good, *lines, *[good] * len(lines)]))
    aside = SetAside()
    records = list(read_records(path, aside))
    assert len(records) + len(aside) == 2 * len(lines) + 1


@pytest.fixture(scope="module")
def folder(hostile, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    for write in WRITERS:
        write(hostile, folder / write.__name__)
    return folder


def test_the_command_line_accounts_for_every_row(folder, tmp_path, vocabulary):
    done = script(
        "sft_data_process.py", "--data", folder, "--out", tmp_path / "sft.csv", "--tokenizer", vocabulary
    )
    report = json.loads((tmp_path / "sft.json").read_text(encoding="utf-8"))
    for name, counts in report["sources"].items():
        assert counts["读入"] == ROWS == sum(counts.values()) - counts["读入"], name
    assert len(report["sources"]) == len(WRITERS)
    assert report["set_aside"]["rows"] == sum(counts["搁置"] for counts in report["sources"].values())
    kept = sum(counts["保留"] for counts in report["sources"].values())
    assert sum(report["written"].values()) == kept and set(report["written"]) > {
        "sft.csv",
        "preference.jsonl",
    }
    assert "完全重复" in done.stdout and (tmp_path / "sft.png").read_bytes()[:4] == b"\x89PNG"
    # What was written is read again whole.
    for name, rows in report["written"].items():
        aside = SetAside()
        assert len(list(read_records(tmp_path / name, aside))) == rows and not len(aside)


@pytest.mark.parametrize(
    "tool", ["validate", "dedup --out", "sample --share 0.5 --out", "convert --to sharegpt --out"]
)
def test_tools_survive(folder, tmp_path, tool):
    name, *more = tool.split()
    more += [tmp_path / "out.json"] if "--out" in more else []
    script("sft_tools.py", name, folder / "as_lines", folder / "as_array", *more, ok=name != "validate")
    if more:
        assert all(isinstance(row, dict) for row in json.loads((tmp_path / "out.json").read_text("utf-8")))


@pytest.mark.parametrize("field", ["history", "messages"])
def test_half_characters_in_a_cell_of_json_are_no_text(tmp_path, field):
    turns = {"history": [["\ud83d", "x"]], "messages": [{"human": "\ud83d", "assistant": "x"}]}[field]
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as handle:
        csv.writer(handle).writerows([["prompt", "answer", field], ["问", "答", json.dumps(turns)]])
        csv.writer(handle).writerow(
            ["问", "答", "" if field == "history" else '[{"human":"问","assistant":"答"}]']
        )
    script(
        "sft_data_process.py", "--data", tmp_path / "a.csv", "--out", tmp_path / "o.csv", "--min_question", 1
    )
    report = json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))
    assert report["rows"] == 1 and report["set_aside"]["rows"] == 1
    out = tmp_path / "b.jsonl"
    script("sft_tools.py", "convert", tmp_path / "a.csv", "--to", "openai", "--out", out)
    assert len(out.read_text(encoding="utf-8").splitlines()) == 1


def test_special_tokens_in_texts_stay_text(hostile, vocabulary):
    """Control ids stand only where the chat format puts them, and decoding gives the texts back."""
    tokenizer = load_tokenizer(vocabulary)
    bos, eos = tokenizer.special_tokens["<bos>"], tokenizer.special_tokens["<eos>"]
    records = [as_dialogue(record) for record in filter(None, map(outcome, hostile))]
    checked = 0
    for record in records:
        messages = whole_dialogue(record)
        if sum(len(message["content"]) for message in messages) > 1000:
            continue
        ids, bears_loss = encode_chat(messages, tokenizer, 1 << 20)
        answers = sum(message["role"] == "assistant" for message in messages)
        assert ids.count(bos) == ids.count(eos) == answers
        assert sum(bears_loss) < len(ids)
        answer = messages[-1]["content"]
        last = len(ids) - ids[::-1].index(bos)
        assert tokenizer.decode(ids[last:-1]) == answer.replace("▁", " ")  # SentencePiece writes spaces so
        checked += any(special in answer for special in SPECIALS)
    assert checked >= 20


def test_written_rows_are_valid_json(hostile, tmp_path):
    assert write_rows(tmp_path / "a.json", hostile) == ROWS
    assert len(json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))) == ROWS
