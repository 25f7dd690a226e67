"""Dialogues of models with a chat template: the ids are transformers', only answers bear loss, text stays text."""

import json
import shutil
from datetime import datetime
from pathlib import Path

import pytest
from hf_folders import CHATML, KINDS, L3_NAMES, LLAMA2, LLAMA3, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm_tokenizer.chat import CHAT_TEMPLATE, encode_chat, encode_chats, encode_prompt
from chatglm_tokenizer.chat_template import render
from chatglm_tokenizer.hf_tokenizer import HFTokenizer
from chatglm_tokenizer.load import load_tokenizer
from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from exchange.hf_tokenizer_file import fast_tokenizer
from exchange.hf_tokenizer_file import write_tokenizer as write_export
from exchange.modelfile import modelfile
from model import ModelArgs
from stage import UserError

LONG = 100_000
SYSTEM = {"role": "system", "content": "你是医生。 "}
DIALOGUE = [
    {"role": "user", "content": "感冒了怎么办？"},
    {"role": "assistant", "content": "  多喝水，\n多休息。\n"},
    {"role": "user", "content": "发烧呢？ I'm at 39°C — 😷"},
    {"role": "assistant", "content": "39 度以上要就医。"},
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[HFTokenizer, object]]:
    """Of each kind of vocabulary and template ours, and transformers'."""
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for kind in KINDS:
        theirs = write_tokenizer(folder / kind, kind)
        found[kind] = (load_tokenizer(folder / kind), theirs)
    return found


def their_ids(theirs, messages: list[dict], **options: object) -> list[int]:
    return theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_ids_equal_those_of_transformers(kind: str, system: list[dict], tokenizers) -> None:
    ours, theirs = tokenizers[kind]
    for turns in (2, 4):
        messages = system + DIALOGUE[:turns]
        ids, _ = encode_chat(messages, ours, LONG)
        assert ids == their_ids(theirs, messages)
        prompt = encode_prompt(messages[:-1], ours, LONG)
        assert prompt == their_ids(theirs, messages[:-1], add_generation_prompt=True)
        bos = ours.tokenizer.token_to_id(theirs.bos_token or "")
        assert bos is None or kind == "llama2" or ids.count(bos) == 1  # never doubled


TEXTS = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("a 中\n")), min_size=1, max_size=20
)


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(TEXTS, min_size=2, max_size=5))
def test_any_ordinary_text_gives_the_ids_of_transformers(tokenizers, texts: list[str]) -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    for ours, theirs in tokenizers.values():
        if not any(ours.control.search(text) for text in texts):
            prompt = messages if len(messages) % 2 else messages[:-1]
            assert encode_prompt(prompt, ours, LONG) == their_ids(theirs, prompt, add_generation_prompt=True)


@pytest.mark.parametrize("kind", KINDS)
def test_only_answers_and_the_token_that_ends_them_bear_loss(kind: str, tokenizers) -> None:
    ours, _ = tokenizers[kind]
    ids, bears_loss = encode_chat([SYSTEM, *DIALOGUE], ours, LONG)
    answers, current = [], []
    for i, bears in zip([*ids, None], [*bears_loss, False], strict=True):
        if bears:
            current.append(i)
        elif current:
            answers.append(current)
            current = []
    assert [ours.decode(answer).strip() for answer in answers] == [
        m["content"].strip() for m in DIALOGUE[1::2]
    ]
    assert all(
        answer[-1] in ours.stop_ids and not set(answer[:-1]) & set(ours.stop_ids) for answer in answers
    )
    # What stands before an answer is what the model is given when it is asked.
    first = bears_loss.index(True)
    if kind != "plain":  # whose prompt ends with a space that belongs to the answer's first token
        assert ids[:first] == encode_prompt([SYSTEM, DIALOGUE[0]], ours, LONG)


def test_the_marks_of_transformers_agree_where_a_template_has_them(tokenizers) -> None:
    ours, theirs = tokenizers["chatml"]
    options = dict(tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    expected = theirs.apply_chat_template([SYSTEM, *DIALOGUE], **options)
    ids, bears_loss = encode_chat([SYSTEM, *DIALOGUE], ours, LONG)
    assert [int(b) for b in bears_loss] == list(expected["assistant_masks"])
    assert ids == list(expected["input_ids"])


HOSTILE = [
    *L3_NAMES,
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<unk>",
    "[INST]",
    "{{ 1 + 1 }}",
    "{% raw %}",
]


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.one_of(st.sampled_from(HOSTILE), TEXTS), min_size=1, max_size=6))
def test_control_tokens_come_from_the_template_alone(tokenizers, parts: list[str]) -> None:
    text = "".join(parts)
    for ours, _ in tokenizers.values():
        counts = []
        for content in ("x", text):
            messages = [{"role": "system", "content": content}]
            messages += [{"role": role, "content": content} for role in ("user", "assistant") * 2]
            ids, bears_loss = encode_chat(messages, ours, LONG)
            counts.append([i for i in ids if i in ours.names])
            answered = [i for i, bears in zip(ids, bears_loss, strict=True) if bears]
        assert counts[0] == counts[1]
        assert len([i for i in answered if i in ours.stop_ids]) == 2
        assert ours.decode(answered).count(text.strip().replace("▁", " ")) >= (2 if text.strip() else 0)


def test_a_control_token_of_one_character_is_refused_in_a_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "chatml")
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"].append({**content["added_tokens"][0], "content": "§", "id": 5000})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    ours = load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="control token"):
        encode_prompt([{"role": "user", "content": "a § b"}], ours, LONG)
    with pytest.raises(ValueError, match="control token"):
        ours.encode("a § b")


def test_whole_texts_survive_with_names_of_control_tokens(tokenizers) -> None:
    ours, theirs = tokenizers["llama3"]
    text = "the token <|eot_id|> ends a turn<|begin_of_text|>"
    ids = encode_prompt([{"role": "user", "content": text}], ours, LONG)
    assert text in ours.decode(ids)
    assert text not in theirs.decode(
        their_ids(theirs, [{"role": "user", "content": text}]), skip_special_tokens=True
    )


@pytest.mark.parametrize("kind", KINDS)
def test_too_long_dialogues_lose_their_oldest_turns(kind: str, tokenizers) -> None:
    ours, _ = tokenizers[kind]
    messages = [SYSTEM, *DIALOGUE, *DIALOGUE]
    for kept in (3, 2, 1):
        expected = [SYSTEM, *messages[len(messages) - 2 * kept :]]
        whole = encode_chat(expected, ours, LONG)
        assert encode_chat(messages, ours, len(whole[0])) == whole
        prompt = encode_prompt(expected[:-1], ours, LONG)
        assert encode_prompt(messages[:-1], ours, len(prompt)) == prompt


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_turn_that_is_too_long_is_cut_as_in_our_own_format(kind: str, tokenizers) -> None:
    ours, _ = tokenizers[kind]
    ids, bears_loss = encode_chat([SYSTEM, *DIALOGUE[:2]], ours, LONG)
    room = bears_loss.index(True) + 2
    assert encode_chat([SYSTEM, *DIALOGUE[:2]], ours, room) == (ids[:room], bears_loss[:room])
    assert encode_chat([SYSTEM, *DIALOGUE[:2]], ours, room - 2) is None
    question = {"role": "user", "content": "一二三四五六七八九十" * 20}
    whole = encode_prompt([SYSTEM, question], ours, LONG)
    cut = encode_prompt([SYSTEM, question], ours, len(whole) - 40)
    assert len(whole) - 50 < len(cut) <= len(whole) - 40
    text = ours.decode(cut)
    assert SYSTEM["content"].strip() in text and "八九十" in text  # the end of the question
    assert cut[-1] == whole[-1] and cut[:3] == whole[:3]


def test_dialogues_that_a_template_rewrites_are_set_aside(tokenizers) -> None:
    ours = tokenizers["llama3"][0]
    without_answers = LLAMA3.replace(
        "message['content'] | trim", "(message['content'] if loop.last or message['role'] == 'user' else '-')"
    )
    ours.chat_template, kept = without_answers, ours.chat_template
    try:
        found = encode_chats([DIALOGUE[:2], DIALOGUE, DIALOGUE[1:]], ours, LONG)
    finally:
        ours.chat_template = kept
    assert isinstance(found[0], tuple)
    assert isinstance(found[1], ValueError) and "turn after turn" in str(found[1])
    assert isinstance(found[2], ValueError) and "alternate" in str(found[2])


def test_templates_are_rendered_as_by_transformers_and_in_a_sandbox(tokenizers) -> None:
    theirs = tokenizers["chatml"][1]
    template = """
    {%- for message in messages %}
        {%- if loop.index > 2 %}
            {%- break %}
        {%- endif %}
        {{ message | tojson }}  {{ {"a": [1, "<中>"]} | tojson(indent=2) }}
    {% endfor %}
    {% if tools is none %}no tools{% endif %}
    {{ strftime_now("%Y") }} {{ eos_token }}
    """
    expected = theirs.apply_chat_template(DIALOGUE, chat_template=template, tokenize=False)
    assert render(template, DIALOGUE, {"eos_token": "<|im_end|>"}, False) == expected
    assert render("{{ strftime_now('%d') }}", DIALOGUE, {}, False, datetime(2024, 7, 26)) == "26"
    for bad in ("{% for %}", "{{ raise_exception('no') }}", "{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}",
                "{{ nothing.at.all }}", "{{ 1 / 0 }}", "{{ messages[9]['role'] }}", "{{ 'a' + 1 }}"):  # fmt: skip
        with pytest.raises(ValueError, match="chat template"):
            render(bad, DIALOGUE, {}, False)


# Our own format as a template.


def test_our_format_as_jinja_gives_the_text_between_the_same_tokens(vocabulary: Path) -> None:
    """What `encode_prompt` encodes piece by piece, the template writes as one string."""
    tokenizer = ChatGLMTokenizer(vocabulary)
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    assert render(CHAT_TEMPLATE, [SYSTEM, *DIALOGUE[:1]], names, True) == "你是医生。 感冒了怎么办？<s>"
    for system in ([], [SYSTEM]):
        messages = system + DIALOGUE
        text = render(CHAT_TEMPLATE, messages, names, False)
        ids = []
        for part in text.replace("</s>", "<s>").split("<s>")[:-1]:
            ids += [*tokenizer.encode(part), None]
        ends = iter([1, 2] * 2)
        assert [next(ends) if i is None else i for i in ids] == encode_chat(messages, tokenizer, LONG)[0]
    with pytest.raises(ValueError, match="alternate"):
        render(CHAT_TEMPLATE, DIALOGUE[1:], names, True)


def test_the_exported_tokenizer_gives_the_ids_of_our_chat_format(vocabulary: Path, tmp_path: Path) -> None:
    """The whole way: export a checkpoint's vocabulary, let transformers render and tokenise."""
    from transformers import AutoTokenizer

    ours = ChatGLMTokenizer(vocabulary)
    write_export(tmp_path, ours, ours.vocab_size, 512, CHAT_TEMPLATE)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    systems = ([], [SYSTEM], [{"role": "system", "content": " two  spaces \n"}])
    questions = ("感冒了怎么办？", " leading", "two  ", "\nline")
    for system in systems:
        for question in questions:
            messages = [*system, {"role": "user", "content": question}, *DIALOGUE[1:]]
            assert their_ids(theirs, messages) == encode_chat(messages, ours, LONG)[0]
            assert their_ids(theirs, messages[:-1], add_generation_prompt=True) == (
                encode_prompt(messages[:-1], ours, LONG)
            )
    again = load_tokenizer(tmp_path)
    assert isinstance(again, ChatGLMTokenizer) and again.sha256 == ours.sha256
    (tmp_path / "tokenizer.model").unlink()
    imported = load_tokenizer(tmp_path)
    assert encode_chat([SYSTEM, *DIALOGUE], imported, LONG) == encode_chat([SYSTEM, *DIALOGUE], ours, LONG)


def test_a_folder_with_a_sentencepiece_model_and_a_template(vocabulary: Path, tmp_path: Path) -> None:
    """Llama 2's older folders: no tokenizer.json, and a template that names control tokens."""
    shutil.copy(vocabulary, tmp_path / "tokenizer.model")
    assert isinstance(load_tokenizer(tmp_path), ChatGLMTokenizer)
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": LLAMA2}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, plain = load_tokenizer(tmp_path), ChatGLMTokenizer(vocabulary)
    ids, bears_loss = encode_chat(DIALOGUE[:2], ours, LONG)
    text = "[INST] 感冒了怎么办？ [/INST] 多喝水，\n多休息。 "
    assert ids == [1, *plain.encode(text), 2]
    assert (
        ours.decode([i for i, bears in zip(ids, bears_loss, strict=True) if bears]).strip()
        == "多喝水，\n多休息。"
    )
    assert ours.encode("a <s> b</s>") == plain.encode("a <s> b</s>")


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_added_to_a_sentencepiece_model(legacy, where, vocabulary: Path, tmp_path: Path) -> None:
    """ChatML on a Llama 2 without tokenizer.json, and both of transformers' ways with spaces."""
    from tokenizers import AddedToken
    from transformers import LlamaTokenizer

    pieces = ChatGLMTokenizer(vocabulary).pieces
    names = {"<|im_start|>": pieces, "<|im_end|>": pieces + 1}
    shutil.copy(vocabulary, tmp_path / "tokenizer.model")
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML, "legacy": legacy}
    if where == "added_tokens.json":
        (tmp_path / where).write_text(json.dumps(names))
        config["additional_special_tokens"] = ["<|im_start|>"]
    else:
        config["added_tokens_decoder"] = {i: {"content": n, "special": True} for n, i in names.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(tmp_path)
    model = json.loads(fast_tokenizer(ChatGLMTokenizer(vocabulary), pieces).to_str())["model"]
    theirs = LlamaTokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]], legacy=legacy)
    theirs.add_special_tokens({"additional_special_tokens": [AddedToken(n, normalized=False) for n in names]})
    dialogue = [
        {**m, "content": m["content"].strip()} for m in DIALOGUE
    ]  # which legacy=True counts otherwise
    ids, _ = encode_chat(dialogue, ours, LONG)
    assert ids == theirs.apply_chat_template(dialogue, chat_template=CHATML)["input_ids"]
    assert ours.stop_ids == [pieces + 1] and set(names.values()) <= set(ids)
    assert not set(names.values()) & set(ours.encode("<|im_start|>user<|im_end|>"))
    (tmp_path / "added_tokens.json").write_text('{"<|far|>": 99999}')
    with pytest.raises(UserError, match="接不上"):
        load_tokenizer(tmp_path)


def test_an_answer_may_be_asked_for_with_more_than_stands_before_it(tokenizers) -> None:
    """As DeepSeek-R1's distillates do: `<think>` after the role, only where an answer is to come."""
    ours = tokenizers["llama3"][0]
    begin = "assistant<|end_header_id|>\n\n' }}{% endif %}"
    thinking, kept = LLAMA3.replace(begin, begin.replace("' }}", "<think>\n' }}")), ours.chat_template
    try:
        ours.chat_template = thinking
        found = encode_chat([SYSTEM, *DIALOGUE], ours, LONG)
    finally:
        ours.chat_template = kept
    assert thinking != kept and found == encode_chat([SYSTEM, *DIALOGUE], ours, LONG)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_without_template_gets_our_format_and_an_export_says_so(
    kind: str, tmp_path: Path
) -> None:
    """Base models have none; what they are then trained with must be known to who loads the export."""
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path / "base", kind)
    (tmp_path / "base" / "chat_template.jinja").unlink()
    ours = load_tokenizer(tmp_path / "base")
    (tmp_path / "out").mkdir()
    for name, content in ours.files.items():
        (tmp_path / "out" / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for dialogue in (DIALOGUE, [SYSTEM, *DIALOGUE]):
        ids, bears_loss = encode_chat(dialogue, ours, LONG)
        assert ids == their_ids(theirs, dialogue)
        assert encode_prompt(dialogue[:-1], ours, LONG) == their_ids(theirs, dialogue[:-1])
        assert ids.count(ours.special_tokens["<eos>"]) >= 2 and bears_loss[-1]
    text = modelfile("x.gguf", ModelArgs(), True, ours.template_names)
    bos, eos = (ours.names[i] for i in ours.special_tokens.values())
    assert "bos_token" not in text and f"}}}}{bos}{{{{ else" in text and f'PARAMETER stop "{eos}"' in text


def test_our_format_is_each_text_and_a_token_behind_it(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama2")
    (tmp_path / "chat_template.jinja").unlink()
    ours = load_tokenizer(tmp_path)
    ids, bears_loss = encode_chat(DIALOGUE[:2], ours, LONG)
    question, answer = (ours.encode(m["content"]) for m in DIALOGUE[:2])
    assert ids == [*question, 1, *answer, 2]
    assert bears_loss == [False] * (len(question) + 1) + [True] * (len(answer) + 1)
