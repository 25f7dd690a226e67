"""The tokenizer against SentencePiece, the chat format, the download, and training a vocabulary."""

import subprocess
import sys

import pytest
import sentencepiece
from conftest import ROOT, script, streamed
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm_tokenizer.chat import encode_chat, encode_prompt
from chatglm_tokenizer.tokenization_chatglm import CHATGLM2_SHA256, ChatGLMTokenizer

AWKWARD = [
    "", " ", "   三个空格  两个 ", "\t制表\t符", "换行\n\n两次\r\n", "Ａｂｃ１２３全角　空格", "😀👨‍👩‍👧🇨🇳",
    "<s></s><eos>[gMASK]sop Philosophy <|user|>", "a\0b", "繁體字與𠮷野家", "é e\u0301", "\ufeff零宽\u200b", "▁下划线▁",
    "100%123456", "한국어 العربية ไทย",
]  # fmt: skip


@pytest.fixture(scope="module", params=["chatglm2", "own"])
def tokenizer(request: pytest.FixtureRequest) -> ChatGLMTokenizer:
    if request.param == "chatglm2":
        return request.getfixturevalue("chatglm2")
    return ChatGLMTokenizer(request.getfixturevalue("vocabulary"))


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_equals_sentencepiece_and_comes_back(tokenizer: ChatGLMTokenizer, text: str) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.vocab_file))
    assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60), max_size=5))
def test_any_text_equals_sentencepiece(tokenizer: ChatGLMTokenizer, texts: list[str]) -> None:
    reference = tokenizer.sp.encode(texts)
    assert tokenizer.encode_batch(texts) == reference
    assert [tokenizer.encode(text) for text in texts] == reference
    specials = {*range(3), *range(tokenizer.pieces, tokenizer.pieces + 5)}
    assert not specials & {i for row in reference for i in row}
    streams = ["".join(streamed(tokenizer, row)) for row in reference]
    assert streams == [tokenizer.decode(row) for row in reference]


def test_lone_surrogates_and_foreign_ids_are_clear_errors(tokenizer: ChatGLMTokenizer) -> None:
    with pytest.raises(ValueError, match=r"第 3 个字符 U\+D83D"):
        tokenizer.encode("坏了\ud83d字")
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size + 5])
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([-1])


def test_special_ids(tokenizer: ChatGLMTokenizer) -> None:
    assert [tokenizer.special_tokens[name] for name in ("<pad>", "<bos>", "<eos>")] == [0, 1, 2]
    assert tokenizer.decode([1, *tokenizer.encode("你好"), 2, 0]) == "你好"


def test_chatglm2_vocabulary(chatglm2: ChatGLMTokenizer) -> None:
    assert chatglm2.vocab_size == len(chatglm2) == 64793
    assert chatglm2.sha256 == CHATGLM2_SHA256
    assert chatglm2.special_tokens["[gMASK]"] == 64790
    assert chatglm2.encode("你好", add_special_tokens=True) == [64790, 64792, 36474, 54591]
    assert chatglm2.decode([64790, 64792, 36474, 54591]) == "你好"


def test_tokenizer_does_not_import_transformers() -> None:
    code = "import sys, chatglm_tokenizer.tokenization_chatglm; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_streamed_text_never_shows_half_a_character(tokenizer: ChatGLMTokenizer) -> None:
    parts = streamed(tokenizer, tokenizer.encode("鑫𠮷😀👨‍👩‍👧好"))
    assert "".join(parts) == "鑫𠮷😀👨‍👩‍👧好"
    assert not any("\ufffd" in part for part in parts)


def test_bytes_per_token_add_up(tokenizer: ChatGLMTokenizer) -> None:
    sizes = tokenizer.bytes_per_token()
    for text in ("你好 world\n😀", "鑫鑫", "a  b"):
        ids = tokenizer.encode(text)
        assert sizes[ids].sum() == len(text.encode()) + 1  # the space that SentencePiece puts in front


def dialogue(*texts: str, system: str = "") -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def test_chat_format_and_loss_mask(tokenizer: ChatGLMTokenizer) -> None:
    e = tokenizer.encode
    ids, loss = encode_chat(dialogue("问一", "答一", "问二", "答二", system="系统"), tokenizer, 999)
    assert ids == [*e("系统"), *e("问一"), 1, *e("答一"), 2, *e("问二"), 1, *e("答二"), 2]
    assert tokenizer.decode([i for i, bears in zip(ids, loss, strict=True) if bears]) == tokenizer.decode(
        [*e("答一"), 2, *e("答二"), 2]
    )
    assert encode_prompt(dialogue("问一", "答一", "问二"), tokenizer, 999) == [
        *e("问一"), 1, *e("答一"), 2, *e("问二"), 1,
    ]  # fmt: skip
    # An empty answer is an answer, and ends as such.
    assert encode_prompt(dialogue("问一", "", "问二"), tokenizer, 999) == [
        *e("问一"), 1, 2, *e("问二"), 1,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="alternate"):
        encode_chat(dialogue("问")[:1] * 2, tokenizer, 99)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=8),
    room=st.integers(2, 60),
    system=st.booleans(),
)
def test_truncation_keeps_bos_and_an_answer_token(
    tokenizer: ChatGLMTokenizer, lengths: list[int], room: int, system: bool
) -> None:
    lengths = lengths[: len(lengths) // 2 * 2]
    messages = dialogue(*("好" * n for n in lengths), system="系统" if system else "")
    encoded = encode_chat(messages, tokenizer, room)
    prompt = encode_prompt(messages[:-1], tokenizer, room)
    assert len(prompt) <= room or system
    assert prompt[-1] == 1
    if encoded is None:  # only when the last question leaves no room
        head = len(tokenizer.encode("系统")) if system else 0
        assert head + len(tokenizer.encode("好" * lengths[-2])) + 1 >= room
    else:
        ids, loss = encoded
        assert len(ids) == len(loss) <= room
        assert any(loss)
        assert ids[loss.index(True) - 1] == 1  # <bos> stands before the first answer
        if system:
            assert ids[: len(tokenizer.encode("系统"))] == tokenizer.encode("系统")


def test_download_accepts_the_right_file_and_explains_when_offline(shared, tmp_path, monkeypatch) -> None:
    right = tmp_path / "tokenizer.model"
    right.write_bytes((shared / "chatglm2_tokenizer.model").read_bytes())
    assert "校验正确" in script("chatglm_tokenizer/download.py", "--out", right).stdout
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    failed = script("chatglm_tokenizer/download.py", "--out", tmp_path / "x.model", ok=False)
    assert "tokenizer.model" in failed.stderr
    assert CHATGLM2_SHA256 in failed.stderr
    assert not (tmp_path / "x.model").exists()


def test_download_fetches_checks_and_discards_wrong_content(shared, tmp_path, monkeypatch) -> None:
    from chatglm_tokenizer import download

    wrong, right = tmp_path / "wrong", shared / "chatglm2_tokenizer.model"
    wrong.write_bytes(b"an error page")
    monkeypatch.setattr(download, "SOURCES", (wrong.as_uri(), right.as_uri()))
    download.main(download.Config(out=tmp_path / "tokenizer.model"))
    assert (tmp_path / "tokenizer.model").read_bytes() == right.read_bytes()


def test_training_a_vocabulary(corpus, vocabulary, tmp_path) -> None:
    tokenizer = ChatGLMTokenizer(vocabulary)
    assert tokenizer.vocab_size == 2500
    pieces = [tokenizer.sp.id_to_piece(i) for i in range(2500)]
    assert not [p for p in pieces if sum(c.isdigit() for c in p) > 1 and not p.startswith("<0x")]
    again = tmp_path / "again.model"
    done = script("train_tokenizer.py", "--data", corpus / "raw", "--out", again, "--vocab_size", 2500)
    assert again.read_bytes() == vocabulary.read_bytes()
    assert "每个 token" in done.stdout


def test_training_a_vocabulary_too_large_for_the_corpus_is_explained(tmp_path) -> None:
    (tmp_path / "small.txt").write_text("只有一行很短的文字\n" * 100, encoding="utf-8")
    failed = script("train_tokenizer.py", "--data", tmp_path, "--out", tmp_path / "x.model", ok=False)
    assert "--vocab_size" in failed.stderr
    assert not (tmp_path / "x.model").exists()
    assert script("train_tokenizer.py", "--data", tmp_path / "none", ok=False).stderr.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_said_before_the_training(tmp_path) -> None:
    (tmp_path / "file").write_text("甲\n" * 9, encoding="utf-8")
    failed = script(
        "train_tokenizer.py", "--data", tmp_path / "file", "--out", tmp_path / "file" / "x.model", ok=False
    )
    assert f"无法写入 {tmp_path / 'file' / 'x.model'}" in failed.stderr and failed.stderr.count("\n") == 1


def test_not_a_vocabulary(tmp_path) -> None:
    (tmp_path / "bad.model").write_bytes(b"garbage")
    failed = script("data_process.py", "--data", tmp_path, "--tokenizer", tmp_path / "bad.model", ok=False)
    assert "bad.model" in failed.stderr


@settings(max_examples=200, deadline=None)
@given(lines=st.lists(st.text("字", min_size=1, max_size=9), max_size=80), budget=st.integers(1, 200))
def test_sampling_is_bounded_in_order_and_complete_when_it_fits(lines: list[str], budget: int) -> None:
    from train_tokenizer import sample

    numbered = [f"{i:03d}{line}" for i, line in enumerate(lines)]
    chosen = sample(iter(numbered), budget, seed=1)
    assert chosen == sorted(chosen) == sample(iter(numbered), budget, seed=1)
    assert set(chosen) <= set(numbered)
    if sum(map(len, numbered)) <= budget:
        assert chosen == numbered
    else:  # the budget is met, by less than a line too much
        assert budget <= sum(map(len, chosen)) < budget + 12


def test_sampling_takes_every_line_with_the_same_chance() -> None:
    from train_tokenizer import sample

    lines = [f"{i:04d}" for i in range(1000)]
    counts = dict.fromkeys(lines, 0)
    for seed in range(100):
        for line in sample(iter(lines), 400, seed):
            counts[line] += 1
    early, late = sum(counts[line] for line in lines[:500]), sum(counts[line] for line in lines[500:])
    assert early + late == 100 * 100
    assert abs(early - late) < 400  # four standard deviations
