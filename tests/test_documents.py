"""Documents in one row that do not see each other: against the documents run one by one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from dataset import TokenWindows
from model import IGNORE, ModelArgs, Transformer, document_positions

V = 50


def small_model(kv_heads: int = 4) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(
        ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=kv_heads, vocab_size=V, max_seq_len=48)
    )
    for parameter in model.parameters():  # far from the symmetric initialisation
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def pack(rows: list[list[int]], width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random documents of these lengths in rows; tokens, targets and numbers, (B, width), padding numbered -1."""
    tokens = torch.randint(0, V, (len(rows), width))
    targets = torch.full_like(tokens, IGNORE)
    documents = torch.full((len(rows), width), -1, dtype=torch.int32)
    for row, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths):
            targets[row, start : start + length] = torch.randint(0, V, (length,))
            documents[row, start : start + length] = 7 * number  # numbers need not be consecutive
            start += length
    return tokens, targets, documents


def one_by_one(model: Transformer, rows: list[list[int]], tokens, targets) -> torch.Tensor:
    """The summed loss of every document in a row of its own."""
    total = torch.zeros(())
    for row, lengths in enumerate(rows):
        for end, length in zip(np.cumsum(lengths), lengths, strict=True):
            part = slice(int(end) - length, int(end))
            total = total + model(tokens[row : row + 1, part], targets[row : row + 1, part], reduction="sum")
    return total


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 16), min_size=1, max_size=3), min_size=1, max_size=3),
    kv_heads=st.sampled_from([4, 2, 1]),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradients_are_the_sums_over_the_documents(rows, kv_heads: int, seed: int) -> None:
    model = small_model(kv_heads)
    torch.manual_seed(seed)
    tokens, targets, documents = pack(rows, max(map(sum, rows)))
    packed = model(tokens, targets, reduction="sum", documents=documents)
    expected = one_by_one(model, rows, tokens, targets)
    torch.testing.assert_close(packed, expected, rtol=2e-6, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(packed, list(model.parameters())),
        torch.autograd.grad(expected, list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_documents_are_apart_in_bf16_too(kv_heads: int) -> None:
    model, rows = small_model(kv_heads), [[20, 5, 23], [48]]
    tokens, targets, documents = pack(rows, 48)
    with torch.autocast("cpu", torch.bfloat16):
        packed = model(tokens, targets, reduction="sum", documents=documents)
        expected = one_by_one(model, rows, tokens, targets)
        whole = model(tokens, targets, reduction="sum")
    torch.testing.assert_close(packed, expected, rtol=2e-3, atol=0)
    assert abs(packed - whole) > 0.1


def test_another_document_changes_no_bit_of_this_one() -> None:
    model = small_model(2)
    tokens, _, documents = pack([[20, 5, 23]], 48)
    other = tokens.clone()
    other[0, 20:25] = (tokens[0, 20:25] + 1) % V
    a, b = (model(t, documents=documents) for t in (tokens, other))
    assert torch.equal(a[0, :20], b[0, :20])
    assert torch.equal(a[0, 25:], b[0, 25:])
    assert not torch.equal(a[0, 20:25], b[0, 20:25])


def test_one_document_a_row_is_as_no_documents() -> None:
    model, tokens = small_model(), torch.randint(0, V, (3, 48))
    alone = torch.arange(3)[:, None].expand(3, 48)
    torch.testing.assert_close(model(tokens, documents=alone), model(tokens), rtol=1e-5, atol=1e-5)


def test_positions_restart_at_each_change() -> None:
    documents = torch.tensor([[3, 3, 3, 0, 0, 3], [1, 2, 2, 2, -1, -1]])
    assert document_positions(documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 0, 1]]


def test_a_compiled_model_is_not_compiled_again_for_other_boundaries() -> None:
    from torch._dynamo.testing import CompileCounter

    model, counter = small_model(2), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for rows in ([[20, 5, 23]], [[48]], [[1, 1, 46]], [[16, 16, 16]]):
        tokens, _, documents = pack(rows, 48)
        torch.testing.assert_close(compiled(tokens, documents=documents), model(tokens, documents=documents))
    assert counter.frame_count == 1


def test_windows_number_their_documents_from_each_eos_on(tmp_path, vocabulary) -> None:
    tokenizer = ChatGLMTokenizer(vocabulary)
    eos = tokenizer.special_tokens["<eos>"]
    #        row 0: <eos> opens the second        row 1: at its end             row 2: none      row 3: <eos> first
    stream = [5, 6, 7, eos, 8, 9, eos, 10] + [11, 12, 13, 14, 15, 16, 17, eos] + [20] * 8 + [eos] + [21] * 8
    np.array(stream, dtype="<u2").tofile(tmp_path / "x.bin")
    windows = TokenWindows([tmp_path / "x.bin"], 8, tokenizer, document_mask=True)
    documents = windows.read(np.arange(2)).documents
    assert documents.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 0, 1]]
    assert documents.dtype == torch.int32
    assert windows.read(np.array([2, 3])).documents is None  # nothing to hide: no mask to pay for
    assert windows.read(np.array([3, 1])).documents[0].unique().numel() == 1
    assert TokenWindows([tmp_path / "x.bin"], 8, tokenizer).read(np.arange(4)).documents is None
