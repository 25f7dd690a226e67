"""model.py against Hugging Face, against itself without a cache, and against plain formulas."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from generation.batch import generate
from generation.cache import KVCache
from generation.sampling import Sampling
from model import IGNORE, PRESETS, ModelArgs, Transformer, cross_entropy


def greedy(count: int) -> Sampling:
    return Sampling(count, temperature=0)


def random_model(**shape: object) -> Transformer:
    torch.manual_seed(0)
    args = ModelArgs(
        **{"dim": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 101, "max_seq_len": 64, **shape}
    )
    model = Transformer(args).eval()
    for parameter in model.parameters():  # far from the symmetric initialisation
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def hugging_face(model: Transformer):
    """The same weights in LlamaForCausalLM, whose rotary layout splits halves instead of pairs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    a = model.args
    config = LlamaConfig(
        hidden_size=a.dim,
        intermediate_size=a.hidden_dim,
        num_hidden_layers=a.n_layers,
        num_attention_heads=a.n_heads,
        num_key_value_heads=a.n_kv_heads,
        vocab_size=a.vocab_size,
        max_position_embeddings=a.max_seq_len,
        rms_norm_eps=a.norm_eps,
        rope_theta=a.rope_theta,
        tie_word_embeddings=a.tie_embeddings,
    )
    names = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    renamed = {"tok_embeddings.": "model.embed_tokens.", "output.": "lm_head.", "norm.": "model.norm."}
    weights = {}
    for key, value in model.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
        for ours, theirs in renamed.items():
            key = theirs + key.removeprefix(ours) if key.startswith(ours) else key
        if "q_proj" in key or "k_proj" in key:
            heads = a.n_heads if "q_proj" in key else a.n_kv_heads
            value = value.view(heads, -1, 2, a.dim).transpose(1, 2).reshape(value.shape)
        weights[key.replace("layers.", "model.layers.", 1) if key.startswith("layers.") else key] = value
    reference = LlamaForCausalLM(config).eval()
    reference.load_state_dict(weights, strict=True)
    return reference


@pytest.mark.parametrize(("kv_heads", "tied"), list(itertools.product((4, 2, 1), (True, False))))
def test_logits_and_greedy_text_equal_hugging_face(kv_heads: int, tied: bool) -> None:
    model = random_model(n_kv_heads=kv_heads, tie_embeddings=tied)
    reference = hugging_face(model)
    tokens = torch.randint(0, 101, (2, 40))
    with torch.no_grad():
        assert (model(tokens) - reference(tokens).logits).abs().max() < 1e-4
    prompt = tokens[:1, :11]
    expected = reference.generate(
        prompt, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert generate(model, prompt.tolist(), greedy(30)) == [expected[0, 11:].tolist()]


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_cached_batch_of_unequal_prompts_equals_uncached_rows(kv_heads: int) -> None:
    model = random_model(n_kv_heads=kv_heads)
    prompts = [[5, 6, 7], [9] * 11, [3], list(range(1, 31))]
    for row, new in zip(prompts, generate(model, prompts, greedy(30)), strict=True):
        tokens = list(row)
        for _ in range(len(new)):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert new == tokens[len(row) :]
        assert len(new) == 30


def test_cached_logits_equal_uncached_whatever_the_pieces() -> None:
    model = random_model(n_kv_heads=2)
    tokens = torch.randint(0, 101, (2, 40))
    cache, pieces = KVCache(model.args, 3), []
    with torch.no_grad():
        for part in tokens.split([7, 1, 20, 12], dim=1):
            begin = sum(piece.shape[1] for piece in pieces)
            window = cache.window([2, 0], [begin] * 2, [part.shape[1]] * 2)
            pieces.append(model(part, cache=window))
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocab_size", [50, 9000])  # one chunk and several
def test_loss_and_gradients_equal_plain_cross_entropy(vocab_size: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1500, 16, requires_grad=True), torch.randn(vocab_size, 16, requires_grad=True)
    targets = torch.randint(0, vocab_size, (1500,))
    targets[::3] = IGNORE
    for reduction in ("mean", "sum"):
        ours = cross_entropy(x, weight, targets, reduction)
        plain = F.cross_entropy(x @ weight.T, targets, ignore_index=IGNORE, reduction=reduction)
        torch.testing.assert_close(ours, plain)
        for a, b in zip(
            torch.autograd.grad(ours * 3, (x, weight)),
            torch.autograd.grad(plain * 3, (x, weight)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_loss_without_any_target_is_zero() -> None:
    model = random_model()
    loss = model(torch.ones(1, 4, dtype=torch.long), torch.full((1, 4), IGNORE))
    loss.backward()
    assert loss == 0


def test_stop_ids_end_each_row_on_its_own() -> None:
    model = random_model()
    prompts = [[5, 6, 7], [9] * 11, [3]]
    free = generate(model, prompts, greedy(20))
    stop = free[0][4]
    stopped = generate(model, prompts, greedy(20), [stop])
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]


def test_generation_ends_at_the_context_and_crops_long_prompts() -> None:
    model = random_model(max_seq_len=16)
    assert len(generate(model, [[1] * 10], greedy(100))[0]) == 6
    assert len(generate(model, [[1] * 50], greedy(4))[0]) == 4
    with pytest.raises(ValueError, match="max_seq_len"):
        model(torch.ones(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="至少要有一个 token"):
        generate(model, [[]], greedy(4))


def test_a_row_gets_as_much_room_beside_a_longer_one_as_alone() -> None:
    model = random_model()
    short, long = [5, 6], list(range(1, 41))
    together = generate(model, [short, long], greedy(50))
    assert together == [generate(model, [p], greedy(50))[0] for p in (short, long)]
    assert [len(row) for row in together] == [50, 24]  # 40 + 24 fill the context of 64


def test_parameter_counts_of_the_reference_sizes() -> None:
    counts = {}
    for name, shape in PRESETS.items():
        with torch.device("meta"):
            counts[name] = Transformer(ModelArgs(**shape)).num_params() / 1e6
    assert counts["92M"] == pytest.approx(58.5, abs=0.1)
    assert counts["218M"] == pytest.approx(218, abs=0.5)
    assert counts["500M"] == pytest.approx(500, rel=0.05)
    assert counts["1B"] == pytest.approx(1000, rel=0.05)


def test_flops_per_token_counts_every_matrix_product() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for tied in (True, False):
        model = random_model(tie_embeddings=tied)
        tokens = torch.randint(0, 101, (1, 64))
        with FlopCounterMode(display=False) as counter:
            model(tokens).sum().backward()
        # The counter passes over the attention kernel of CPUs; the formula also counts norm weights (negligible).
        attention = 12 * 3 * 64 * 64 * 64
        assert model.flops_per_token() * 64 - attention == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_impossible_shapes_are_refused() -> None:
    for shape in (dict(dim=65, n_heads=4), dict(n_heads=4, n_kv_heads=3), dict(dim=12, n_heads=4)):
        with pytest.raises(ValueError, match="n_heads"):
            ModelArgs(**shape)
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "vocab_size"):
        with pytest.raises(ValueError, match="at least 1"):
            ModelArgs(**{name: 0})


def test_a_vocabulary_filled_up_for_the_gpu_changes_nothing(monkeypatch) -> None:
    torch.manual_seed(0)
    x, weight, targets = torch.randn(30, 16), torch.randn(101, 16), torch.randint(0, 101, (30,))

    def run() -> list[torch.Tensor]:
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = cross_entropy(a, b, targets)
        loss.backward()
        return [loss.detach(), a.grad, b.grad]

    expected = run()
    monkeypatch.setattr("loss.vocabulary_multiple", lambda device: 64)
    for ours, plain in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(("tokens", "vocabulary"), [(7, 50), (700, 3001)])
def test_the_loss_in_bf16_by_tiles_equals_the_plain_one(tokens: int, vocabulary: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, 32), 0.3 * torch.randn(vocabulary, 32)
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[::3] = IGNORE
    a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = cross_entropy(a, b, targets)
        assert torch.equal(cross_entropy(a.detach(), b.detach(), targets), ours)
    ours.backward()
    c, d = x.bfloat16().float().requires_grad_(), weight.bfloat16().float().requires_grad_()
    plain = F.cross_entropy(c @ d.T, targets, ignore_index=IGNORE)
    plain.backward()
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)
    for ours_grad, grad in ((a.grad, c.grad), (b.grad, d.grad)):
        assert (ours_grad - grad).norm() < 5e-3 * grad.norm()


def test_recomputing_layers_changes_no_gradient() -> None:
    torch.manual_seed(0)
    network = Transformer(ModelArgs(dim=32, n_layers=2, n_heads=2, vocab_size=50, max_seq_len=16))
    tokens = torch.randint(0, 50, (2, 16))
    network(tokens, tokens).backward()
    expected = {name: p.grad.clone() for name, p in network.named_parameters()}
    network.zero_grad()
    network.recompute = True
    network(tokens, tokens).backward()
    for name, p in network.named_parameters():
        assert torch.equal(p.grad, expected[name])


def test_the_loss_of_certain_targets_in_bf16_is_never_negative() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3000, 64)
    targets = torch.randint(0, 3000, (500,))
    with torch.autocast("cpu", torch.bfloat16):
        losses = [float(cross_entropy(weight[t][None], weight, t[None])) for t in targets[:50]]
        total = float(cross_entropy(weight[targets], weight, targets))
    assert min(losses) >= -1e-6
    assert -1e-6 <= total < 0.01
