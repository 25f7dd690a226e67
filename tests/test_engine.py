"""The engine against requests run alone, Hugging Face, and decoding the whole answer at once."""

import queue
import random
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import hugging_face, random_model

from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from exchange.hf_tokenizer_file import fast_tokenizer
from generation.batch import CHUNK, Batch, generate
from generation.engine import Answer, Busy, Engine, Piece
from generation.prepare import DynamicInt8Linear, prepare
from generation.sampling import Sampling
from generation.text import StopStrings, TextStream
from model import Transformer


@pytest.fixture(scope="module")
def tokenizer(vocabulary) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(vocabulary)


@pytest.fixture(scope="module")
def model(tokenizer) -> Transformer:
    """A random model that is sure of itself, so that rounding does not change what is drawn."""
    model = random_model(vocab_size=tokenizer.vocab_size + 3, max_seq_len=400, n_kv_heads=2)
    model.norm.weight.data *= 6
    return model


def ids_of(pieces: list[Piece]) -> list[int]:
    return [i for piece in pieces for i in piece.ids]


def random_requests(count: int, vocabulary: int) -> list[tuple[list[int], Sampling]]:
    rng = random.Random(1)
    requests = []
    for number in range(count):
        prompt = [rng.randrange(3, vocabulary) for _ in range(rng.choice((1, 4, 30, CHUNK + 60)))]
        sampling = Sampling(
            rng.randrange(1, 30),
            temperature=rng.choice((0, 0.6, 1.0)),
            top_k=rng.choice((None, 5, 50)),
            top_p=rng.choice((None, 0.8)),
            min_p=rng.choice((None, 0.05)),
            repetition_penalty=rng.choice((1.0, 1.3)),
            frequency_penalty=rng.choice((0.0, 0.5)),
            seed=number,
            logprobs=rng.choice((None, 2)),
        )
        requests.append((prompt, sampling))
    return requests


def test_greedy_equals_hugging_face_for_200_tokens() -> None:
    small = random_model(max_seq_len=256, n_kv_heads=2)
    prompt = torch.randint(0, 101, (1, 20))
    expected = hugging_face(small).generate(
        prompt, max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    others = [[7] * 33, [5]]
    together = generate(small, [*others, prompt[0].tolist()], Sampling(200, temperature=0))
    assert together[-1] == expected[0, 20:].tolist()


def test_fifty_requests_that_come_and_go_get_what_they_get_alone(model, tokenizer) -> None:
    requests = random_requests(50, tokenizer.vocab_size)
    stop = [tokenizer.special_tokens["<eos>"]]
    rng = random.Random(2)
    with Engine(model, tokenizer, slots=6) as engine:
        answers = []
        for prompt, sampling in requests:
            answers.append(engine.submit(prompt, sampling))
            time.sleep(rng.random() * 0.02)
        for answer, (prompt, sampling) in zip(answers, requests, strict=True):
            pieces = list(answer)
            alone = Batch(model, 1, stop, tokenizer.vocab_size)
            row = alone.add(prompt, sampling)
            while not row.finish_reason:
                alone.step()
            expected = row.ids[:-1] if row.finish_reason == "stop" else row.ids
            assert ids_of(pieces) == expected
            assert answer.finish_reason == row.finish_reason
            assert answer.completion_tokens == len(row.ids)
            context = prompt[-1:] if "\ufffd" not in tokenizer.decode(prompt[-1:]) else []
            whole = tokenizer.decode(context + expected)
            assert "".join(p.text for p in pieces) == whole[len(tokenizer.decode(context)) :]
            if sampling.logprobs is not None:
                assert [entry.id for piece in pieces for entry in piece.logprobs] == expected
        stats = engine.stats()
    assert stats["requests"] == 50
    assert stats["generated_tokens"] == sum(a.completion_tokens for a in answers)
    assert stats["running"] == stats["waiting"] == stats["errors"] == 0


def test_rows_behind_the_vocabulary_are_never_generated(tokenizer) -> None:
    padded = random_model(vocab_size=tokenizer.vocab_size + 3, max_seq_len=64)
    padded.output.weight.data[: tokenizer.vocab_size] *= (
        1e-3  # what is chosen is surely one of the last three
    )
    greedy = Sampling(8, temperature=0)
    assert max(generate(padded, [[5, 6]], greedy)[0]) >= tokenizer.vocab_size
    assert max(generate(padded, [[5, 6]], greedy, vocab_size=tokenizer.vocab_size)[0]) < tokenizer.vocab_size


def test_a_long_prompt_does_not_stall_the_others(model) -> None:
    batch = Batch(model, 2)
    short = batch.add([5, 6], Sampling(50, temperature=0))
    batch.step()
    long = batch.add([7] * (CHUNK + 40), Sampling(5, temperature=0))
    for _ in range(2):
        before = len(short.ids)
        batch.step()
        assert len(short.ids) == before + 1
    assert len(long.ids) == 1


def test_the_cache_never_grows_beyond_what_it_says(model, tokenizer) -> None:
    batch = Batch(model, 3)
    for _ in range(3):
        batch.add([5] * 390, Sampling(100, temperature=0))
    while batch.rows:
        for row in batch.step():
            if row.finish_reason:
                assert row.finish_reason == "length"
                assert len(row.ids) == 10  # 390 + 10 fill the context of 400
                batch.remove(row)
    a = model.args
    assert batch.cache.nbytes() == 2 * a.n_layers * 3 * (a.max_seq_len + 1) * a.n_kv_heads * a.head_dim * 4


def test_cancelling_frees_the_slot_and_waiting_requests_can_be_cancelled(model, tokenizer) -> None:
    with Engine(model, tokenizer, slots=1, max_waiting=2) as engine:
        endless = Sampling(10_000, temperature=1.0, seed=1, repetition_penalty=1.0)
        first = engine.submit([5], Sampling(300, temperature=1.0, seed=3))
        assert first.get(timeout=20) is not None
        waiting = [engine.submit([5], endless) for _ in range(2)]
        with pytest.raises(Busy):
            engine.submit([5], endless)
        for answer in (*waiting, first):
            answer.cancel()
        assert [(list(a) and a.finish_reason) or a.finish_reason for a in (first, *waiting)] == [
            "cancelled"
        ] * 3
        last = engine.submit([5], Sampling(3, temperature=0))
        list(last)
        assert last.finish_reason in ("length", "stop")
        assert last.get() is None


def test_unusable_prompts_are_refused_and_a_closed_engine_takes_nothing(model, tokenizer) -> None:
    engine = Engine(model, tokenizer)
    for prompt in ([], [5] * 400, [10**6], [-1]):
        with pytest.raises(ValueError, match="提示词"):
            engine.submit(prompt, Sampling(5))
    running = engine.submit([5], Sampling(20, temperature=0))
    with pytest.raises(queue.Empty):
        engine.submit([5] * 350, Sampling(5)).get(timeout=1e-6)
    engine.close(30)
    assert running.text() is not None
    assert running.finish_reason in ("length", "stop")
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit([5], Sampling(5))


def test_an_error_ends_the_requests_and_the_engine_goes_on(model, tokenizer, monkeypatch, capfd) -> None:
    with Engine(model, tokenizer, slots=2) as engine:
        monkeypatch.setattr(engine.batch, "step", lambda: 1 / 0)
        failed = engine.submit([5], Sampling(5))
        with pytest.raises(RuntimeError, match="division"):
            failed.text()
        assert failed.finish_reason == "error"
        monkeypatch.undo()
        assert engine.submit([5], Sampling(5, temperature=0)).text() is not None


@pytest.mark.parametrize("quantise", ["int8", "int4", None])
def test_quantised_and_bf16_logits_stay_close(quantise) -> None:
    torch.manual_seed(0)
    shape = dict(dim=96, hidden_dim=1376 // 4, max_seq_len=64)  # 344 is no multiple of the groups of int4
    exact, ready = random_model(**shape), prepare(random_model(**shape), "bf16", quantise)
    tokens = torch.randint(0, 101, (2, 30))
    with torch.inference_mode():
        expected, ours = exact(tokens), ready(tokens).float()
        one = ready(tokens[:, :1]).float()  # the kernels for few rows
    bound = {None: 0.02, "int8": 0.03, "int4": 0.25}[quantise]
    assert (ours - expected).norm() < bound * expected.norm()
    assert (one - expected[:, :1]).norm() < bound * expected[:, :1].norm()
    assert len(generate(ready, [[5], [6, 7]], Sampling(8, temperature=0))[0]) == 8


def test_rows_of_int8_do_not_depend_on_their_neighbours() -> None:
    if not DynamicInt8Linear.works(torch.device("cpu")):
        pytest.skip("no int8 kernels of x86 on this machine")
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 64, bias=False)
    quick, x = DynamicInt8Linear(linear), torch.randn(7, 96) * torch.logspace(-3, 3, 7)[:, None]
    together = quick(x)
    for row, y in zip(x, together, strict=True):
        assert torch.allclose(quick(row[None])[0], y, rtol=1e-4, atol=1e-6 * float(row.norm()))
    assert ((together - linear(x)).norm(dim=1) / linear(x).norm(dim=1)).max() < 0.03


def test_fp32_prepared_for_speed_gives_the_same_tokens() -> None:
    model = random_model()
    expected = generate(model, [[5, 6], [7]], Sampling(30, temperature=0))
    assert generate(prepare(model, "fp32"), [[5, 6], [7]], Sampling(30, temperature=0)) == expected


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40), st.lists(st.integers(0, 2499), max_size=20))
def test_streamed_text_is_the_decoded_text(tokenizer, text: str, noise: list[int]) -> None:
    for ids in (tokenizer.encode(text), noise, tokenizer.encode(text) + noise):
        stream, whole, shown = TextStream(tokenizer), tokenizer.decode(ids), ""
        for token in ids:
            shown += stream.push(token)
            assert whole.startswith(shown)  # never anything that is taken back
        assert shown + stream.finish() == whole


def test_streaming_takes_the_same_time_for_each_token(tokenizer, monkeypatch) -> None:
    ids, longest = tokenizer.encode("今天天气很好，我们去公园里散步。" * 50), 0
    decode = ChatGLMTokenizer.decode

    def watched(self, window):
        nonlocal longest
        longest = max(longest, len(window))
        return decode(self, window)

    monkeypatch.setattr(ChatGLMTokenizer, "decode", watched)
    stream = TextStream(tokenizer)
    for token in ids:
        stream.push(token)
    assert longest < 12


def test_characters_of_bytes_are_whole_with_the_decoder_of_hugging_face(tokenizer) -> None:
    fast = fast_tokenizer(tokenizer, tokenizer.vocab_size)
    for text in ("龘龘靐", "魑魅魍魉在山里", "好𠀀𪚥龘"):
        ids = fast.encode(text, add_special_tokens=False).ids
        stream = TextStream(SimpleNamespace(decode=fast.decode))
        pieces = [*map(stream.push, ids), stream.finish()]
        assert "".join(pieces) == fast.decode(ids) == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_replacement_character_of_the_text_itself_is_not_lost(tokenizer) -> None:
    text = "坏字\ufffd\ufffd\ufffd\ufffd\ufffd后面"
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    assert "".join([stream.push(i) for i in ids] + [stream.finish()]) == tokenizer.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab\n。", max_size=4), max_size=12),
    st.lists(st.text("ab\n。", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_are_found_across_pieces_and_never_shown(parts: list[str], stop: list[str]) -> None:
    finder, shown, whole = StopStrings(stop), "", "".join(parts)
    for part in parts:
        shown += finder.push(part)
    shown += finder.finish()
    # The stop string that is complete first ends the text.
    ends = [whole.find(s) + len(s) for s in stop if s in whole]
    if ends:
        first = min(ends)
        assert shown == whole[: min(whole[:first].find(s) for s in stop if s in whole[:first])] or any(
            shown == whole[: whole.find(s)] for s in stop
        )
        assert finder.found
    else:
        assert shown == whole
    assert not any(s in shown for s in stop)


def test_a_stop_string_ends_the_answer_of_the_engine(model, tokenizer) -> None:
    prompt, free = tokenizer.encode("你好"), Sampling(60, temperature=0)
    with Engine(model, tokenizer) as engine:
        text = engine.submit(prompt, free).text()
        middle = text[len(text) // 2 : len(text) // 2 + 3]
        stopped = engine.submit(prompt, Sampling(60, temperature=0, stop=("没有的", middle), logprobs=1))
        pieces = list(stopped)
        cut = "".join(p.text for p in pieces)
    assert cut == text[: text.find(middle)]
    assert stopped.finish_reason == "stop"
    assert stopped.completion_tokens >= len(ids_of(pieces))
    assert all(len(p.ids) == len(p.logprobs) for p in pieces)


def test_an_answer_iterates_once(model, tokenizer) -> None:
    with Engine(model, tokenizer) as engine:
        answer: Answer = engine.submit([5, 6], Sampling(5, temperature=0))
        assert list(answer)
        assert list(answer) == []
