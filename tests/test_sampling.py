"""generation/sampling.py against Hugging Face's processors, a slow reference, and plain counting."""

import math
import random

import pytest
import torch

from generation.sampling import Logprob, Sampling, logprobs_of, penalise, sample, uniform


def slow_weights(logits: list[float], s: Sampling) -> dict[int, float]:
    """What may be drawn and with which weight: one token after the other, in the order of Hugging Face."""
    scaled = [x / s.temperature for x in logits]
    top = max(scaled)
    weights = {i: math.exp(x - top) for i, x in enumerate(scaled)}
    order = sorted(weights, key=lambda i: -weights[i])[: s.top_k or len(logits)]
    total, reached, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if reached < (s.top_p or 1) * total:
            kept.append(i)
        reached += weights[i]
    likeliest = max(weights[i] for i in kept)
    return {i: weights[i] for i in kept if weights[i] >= (s.min_p or 0) * likeliest}


SETTINGS = [
    Sampling(1),
    Sampling(1, temperature=0.5, top_k=3),
    Sampling(1, top_p=0.7),
    Sampling(1, temperature=1.7, top_p=0.95, min_p=0.05),
    Sampling(1, min_p=0.2),
    Sampling(1, top_k=20, top_p=0.8, min_p=0.1),
    Sampling(1, top_k=5000, top_p=0.999),
    Sampling(1, temperature=0),
]


@pytest.mark.parametrize("vocabulary", [40, 3000])  # fewer and more than are sorted at first
def test_rows_of_all_settings_together_draw_what_a_slow_reference_draws(vocabulary: int) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(len(SETTINGS), vocabulary)
    steps = 400  # evenly spread instead of random: every share is met to 1 / steps
    uniforms = [(step + 0.5) / steps for step in range(steps) for _ in SETTINGS]
    ids = sample(logits.repeat(steps, 1), SETTINGS * steps, uniforms)
    drawn = ids.view(steps, len(SETTINGS)).T.tolist()
    for row, s in enumerate(SETTINGS):
        if not s.temperature:
            assert set(drawn[row]) == {int(logits[row].argmax())}
            continue
        weights = slow_weights(logits[row].tolist(), s)
        assert set(drawn[row]) <= set(weights)
        total = sum(weights.values())
        for token in sorted(weights, key=lambda i: -weights[i])[:5]:
            share = drawn[row].count(token) / steps
            assert share == pytest.approx(weights[token] / total, abs=2 / steps)


def test_the_extremes_of_chance_stay_within_what_may_be_drawn() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0, -50.0]] * 2)
    settings = [Sampling(1, top_k=2), Sampling(1, min_p=0.1)]
    for u in (0.0, 1 - 2**-53):
        assert set(sample(logits, settings, [u, u]).tolist()) <= {1, 2}


def test_the_nucleus_of_a_flat_row_is_wider_than_what_is_sorted_at_first() -> None:
    ids = sample(torch.zeros(500, 5000), [Sampling(1, top_p=0.9)] * 500, [u / 500 for u in range(500)])
    assert len(set(ids.tolist())) > 490


def test_uniform_numbers_are_uniform_and_depend_on_seed_and_step_alone() -> None:
    numbers = torch.tensor([[uniform(seed, step) for step in range(200)] for seed in range(100)])
    assert torch.equal(numbers[3, 7], torch.tensor(uniform(3, 7)))
    assert 0 <= numbers.min() < numbers.max() < 1
    shares = torch.histc(numbers, 10, 0, 1) / numbers.numel()
    assert (shares - 0.1).abs().max() < 0.01
    assert torch.corrcoef(numbers)[0, 1:].abs().max() < 0.3  # neighbouring seeds have nothing in common


def test_repetition_penalty_equals_hugging_face() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 20), torch.randint(0, 20, (2, 6))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(tokens, logits.clone())
    rows = tokens.tolist()
    ours = penalise(
        logits, [Sampling(1, repetition_penalty=1.3)] * 2, [r[:4] for r in rows], [r[4:] for r in rows]
    )
    torch.testing.assert_close(ours, expected)


def test_presence_and_frequency_count_the_answer_alone_and_leave_other_rows() -> None:
    rng = random.Random(0)
    logits = torch.randn(3, 12)
    settings = [Sampling(1, presence_penalty=0.7), Sampling(1), Sampling(1, frequency_penalty=0.4)]
    answers = [[rng.randrange(12) for _ in range(n)] for n in (9, 4, 15)]
    ours = penalise(logits, settings, [[0, 1, 2]] * 3, answers)
    for row, s in enumerate(settings):
        for token in range(12):  # the formula of OpenAI's reference
            count = answers[row].count(token)
            expected = (
                float(logits[row, token]) - count * s.frequency_penalty - (count > 0) * s.presence_penalty
            )
            assert float(ours[row, token]) == pytest.approx(expected, abs=1e-5)


def test_logprobs_are_those_of_the_model_before_all_settings() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 30)
    settings = [Sampling(1, logprobs=0), Sampling(1), Sampling(1, temperature=0.1, top_k=1, logprobs=4)]
    found = logprobs_of(logits, [5, 6, 7], settings)
    expected = logits.double().log_softmax(-1)
    assert found[1] is None
    assert found[0] == Logprob(5, found[0].logprob, ())
    assert found[0].logprob == pytest.approx(float(expected[0, 5]), abs=1e-5)
    assert [i for i, _ in found[2].top] == expected[2].topk(4).indices.tolist()
    assert [p for _, p in found[2].top] == pytest.approx(expected[2].topk(4).values.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(max_new_tokens=0), dict(temperature=-1.0), dict(temperature=math.nan), dict(top_k=0), dict(top_p=0.0),
        dict(top_p=1.5), dict(min_p=-0.1), dict(repetition_penalty=0.0), dict(stop=("",)), dict(logprobs=-1),
        dict(presence_penalty=math.inf), dict(frequency_penalty=math.nan),
    ],
)  # fmt: skip
def test_settings_without_meaning_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**{"max_new_tokens": 5, **wrong})
