"""The exercises of chapter 12: what their checks reject, accept, and say."""

import exercise_gate
import pytest
import torch
import torch.nn.functional as F
from exercise_gate import ExerciseGate

from course_lib.grading.exercise import chapter_exercises, find
from course_lib.grading.judge import judge

pytestmark = pytest.mark.exercises
pytest_generate_tests = exercise_gate.parametrize


class TestGate(ExerciseGate):
    chapter = "12_linear_attention"
    least_held_apart = (280, 65)

    @classmethod
    def most_numbers(cls, id):
        return 14 if id == "linformer" else 12  # Linformer comes with its two matrices


def said(id, function):
    return judge(find(id), function).lines


def phi(x):
    return F.elu(x) + 1


def test_the_chapter_leads_from_the_feature_map_to_linformer():
    ids = [exercise.id for exercise in chapter_exercises("12_linear_attention")]
    assert ids == [
        "feature_map", "linear_attention", "causal_linear_attention", "rnn_step", "chunked",
        "positive_features", "linformer",
    ]  # fmt: skip


def test_elu_without_the_1_is_told_so():
    assert said("feature_map", F.elu) == (
        "✗ feature_map: “0 becomes 1” does not hold.",
        "Your result equals elu(x) without the 1. elu goes down to -1, so weights can be negative.",
        "Which two properties has φ: what is φ(0), and can φ be 0 or negative?",
    )


def test_a_missing_normaliser_is_told_so():
    lines = said("linear_attention", lambda q, k, v: phi(q) @ (phi(k).mT @ v))
    assert lines == (
        "✗ linear_attention: “values that are all alike come back: the weights of a query sum to "
        "1” does not hold.",
        "Your result equals linear attention without the normaliser. The weights of a query do not "
        "sum to 1: more keys, larger output.",
        "What must a query's output be divided by so that its weights sum to 1?",
    )


def test_right_numbers_by_way_of_the_large_matrix_are_told_its_size():
    def linear_attention(q, k, v):
        weights = phi(q) @ phi(k).mT
        return weights @ v / weights.sum(-1, keepdim=True)

    assert said("linear_attention", linear_attention) == (
        "✗ linear_attention: “no matrix of n_q × n_k is made” does not hold.",
        "For 64 queries and 64 keys a tensor of 4096 numbers was made.",
    )


def test_the_large_matrix_row_by_row_is_still_too_much_work():
    def linear_attention(q, k, v):
        rows = [(phi(q[:, :, i : i + 1]) @ phi(k).mT) for i in range(q.shape[2])]
        return torch.cat([row @ v / row.sum(-1, keepdim=True) for row in rows], 2)

    lines = said("linear_attention", linear_attention)
    assert lines[0] == (
        "✗ linear_attention: “twice as many tokens take twice the numbers, not four times as many” "
        "does not hold."
    )


def test_a_token_that_leaves_itself_out_is_told_so():
    def causal_linear_attention(q, k, v):
        weights = (phi(q) @ phi(k).mT).tril(-1)
        return weights @ v / weights.sum(-1, keepdim=True)

    lines = said("causal_linear_attention", causal_linear_attention)
    assert lines[1:] == (
        "Your result equals causal linear attention that leaves out the token itself. Query i sees "
        "the keys j < i, so the first one sees nothing: 0 / 0.",
        "Does j ≤ i hold for j = i?",
    )


def test_a_normaliser_that_knows_the_future_is_told_so():
    def causal_linear_attention(q, k, v):
        weights = phi(q) @ phi(k).mT
        return weights.tril() @ v / weights.sum(-1, keepdim=True)

    lines = said("causal_linear_attention", causal_linear_attention)
    assert lines[0] == (
        "✗ causal_linear_attention: “a later token cannot change an earlier output” does not hold."
    )
    assert lines[1].startswith(
        "Your result equals causal linear attention with a normaliser over all keys."
    )


def test_a_step_that_reads_before_it_writes_is_told_so():
    def rnn_step(q, k, v, state, total):
        q, k = phi(q), phi(k)
        output = (q[..., None, :] @ state)[..., 0, :] / (q * total).sum(-1, keepdim=True)
        return output, state + k[..., None] * v[..., None, :], total + k

    lines = said("rnn_step", rnn_step)
    assert lines[0] == (
        "✗ rnn_step: “from an empty state the output is the token's own value” does not hold."
    )
    assert lines[1].startswith(
        "Your result equals the step that reads the old state and the old total."
    )


def test_a_state_that_is_added_to_in_place_is_told_so():
    def rnn_step(q, k, v, state, total):
        q, k = phi(q), phi(k)
        state += k[..., None] * v[..., None, :]
        total += k
        output = (q[..., None, :] @ state)[..., 0, :] / (q * total).sum(-1, keepdim=True)
        return output, state, total

    verdict = judge(find("rnn_step"), rnn_step)
    assert verdict.mistake == "input changed in place"


def test_a_state_that_is_forgotten_between_chunks_is_told_so():
    def chunked_linear_attention(q, k, v, chunk):
        rows = []
        for query, key, value in zip(*(t.split(chunk, 2) for t in (q, k, v)), strict=True):
            weights = (phi(query) @ phi(key).mT).tril()
            rows.append(weights @ value / weights.sum(-1, keepdim=True))
        return torch.cat(rows, 2)

    assert said("chunked", chunked_linear_attention) == (
        "✗ chunked: “a token sees the chunks before its own” does not hold.",
        "Your result equals chunked attention with the state forgotten between chunks. Every chunk "
        "starts anew.",
        "Of which two parts is the numerator made, and the normaliser?",
    )


def test_right_numbers_one_token_at_a_time_are_told_how_many_operations_they_took():
    def chunked_linear_attention(q, k, v, chunk):
        state, total, rows = 0.0, 0.0, []
        for i in range(q.shape[2]):
            a, b, c = phi(q[:, :, i]), phi(k[:, :, i]), v[:, :, i]
            state, total = state + b[..., None] * c[..., None, :], total + b
            rows.append((a[..., None] * state).sum(-2) / (a * total).sum(-1, keepdim=True))
        return torch.stack(rows, 2)

    lines = said("chunked", chunked_linear_attention)
    assert (
        lines[0] == "✗ chunked: “the tokens of a chunk are not handled one by one” does not hold."
    )
    assert lines[1].startswith("One chunk of 128 tokens took ")


def test_a_norm_that_is_not_squared_is_told_so():
    def positive_features(x, projection):
        exponent = x @ projection.mT - x.norm(dim=-1, keepdim=True) / 2
        return exponent.exp() / len(projection) ** 0.5

    assert said("positive_features", positive_features)[:2] == (
        "✗ positive_features: “along a direction of 0 the feature is exp(-‖x‖²/2) / √m” does not "
        "hold.",
        "Your result equals the features with the norm not squared. ‖x‖/2 stands where ‖x‖²/2 "
        "should.",
    )


def test_the_two_projections_swapped_are_told_so():
    def linformer(q, k, v, e, f):
        return F.scaled_dot_product_attention(q, f @ k, e @ v)

    assert said("linformer", linformer) == (
        "✗ linformer: “with one mixed key every query gets f v” does not hold.",
        "Your result equals Linformer with e and f swapped. f mixes the keys and e the values.",
        "Which matrix mixes the keys, and which the values?",
    )
