"""The exercises of chapter 03: what their checks reject, accept, and say."""

import exercise_gate
import pytest
import torch
import torch.nn.functional as F
from exercise_gate import ExerciseGate

from course_lib import attention, layers
from course_lib.grading.exercise import chapter_exercises, find
from course_lib.grading.judge import judge

pytestmark = pytest.mark.exercises
pytest_generate_tests = exercise_gate.parametrize


@pytest.mark.no_shape_checks  # answers vmap, and checking 500,000 small calls takes a third of all
class TestGate(ExerciseGate):
    chapter = "03_multi_head_attention"
    least_held_apart = (270, 55)

    @classmethod
    def most_numbers(cls, id):
        """Four weight matrices are 64 numbers, even with two heads of two features."""
        return 72 if id == "multi_head_attention" else super().most_numbers(id)


def second_line(id, function):
    return judge(find(id), function).lines[1]


def split(x, num_heads):
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def merge(heads):
    return heads.transpose(1, 2).flatten(2)


def test_the_chapter_leads_from_splitting_to_what_each_head_adds():
    ids = [exercise.id for exercise in chapter_exercises("03_multi_head_attention")]
    assert ids == [
        "split_heads",
        "merge_heads",
        "multi_head_attention",
        "grouped_query_attention",
        "head_contributions",
    ]


def test_our_multi_head_attention_is_the_layer_of_the_package():
    layer = layers.MultiHeadAttention(6, 3, bias=False).double()
    x = torch.randn(2, 4, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    parts = (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    got = find("multi_head_attention").reference(x, *[part.weight.T for part in parts], 3, mask)
    torch.testing.assert_close(got, layer(x, mask=mask))


def test_our_grouped_query_attention_is_the_function_of_the_package():
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, 3, 4, generator=g).double() for h in (6, 2, 2))
    got = find("grouped_query_attention").reference(query, key, value)
    torch.testing.assert_close(got, attention(query, key, value))


def test_heads_read_off_by_a_reshape_are_told_so():
    def split_heads(x, num_heads):
        return x.reshape(*x.shape[:-2], num_heads, x.shape[-2], -1)

    said = second_line("split_heads", split_heads)
    assert said.startswith("Your result equals x reshaped straight to (num_heads, n, d_head).")


def test_a_learner_can_follow_which_feature_went_where():
    verdict = judge(find("split_heads"), lambda x, num_heads: split(x.flip(-1), num_heads))
    assert verdict.lines[1] == (
        "For x = [[4, 4.1, 4.2, 4.3], [5, 5.1, 5.2, 5.3]], num_heads = 2: "
        "got [[[4.3, 4.2], [5.3, 5.2]], [[4.1, 4], [5.1, 5]]], "
        "want [[[4, 4.1], [5, 5.1]], [[4.2, 4.3], [5.2, 5.3]]]."
    )


def test_a_view_of_transposed_heads_is_shown_pytorchs_own_advice():
    def merge_heads(heads):
        return heads.transpose(-3, -2).view(*heads.shape[:-3], heads.shape[-2], -1)

    verdict = judge(find("merge_heads"), merge_heads)
    assert "your code raised RuntimeError: view size is not compatible" in verdict.lines[0]
    assert "Use .reshape(...)" in verdict.lines[0]
    assert verdict.mistake is None  # "shape hard-coded" would lead astray


def test_multi_head_attention_scaled_by_d_model_is_told_so():
    def multi_head_attention(x, w_q, w_k, w_v, w_o, num_heads, mask=None):
        query, key, value = (split(x @ w, num_heads) for w in (w_q, w_k, w_v))
        scores = query @ key.mT / x.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return merge(scores.softmax(-1).nan_to_num(0.0) @ value) @ w_o

    said = second_line("multi_head_attention", multi_head_attention)
    assert said.startswith("Your result equals multi-head attention scaled by √d_model.")


def test_heads_that_attend_to_one_another_are_told_so():
    """The transpose forgotten: without a mask it runs, and the shape is right."""

    def multi_head_attention(x, w_q, w_k, w_v, w_o, num_heads, mask=None):
        query, key, value = ((x @ w).unflatten(-1, (num_heads, -1)) for w in (w_q, w_k, w_v))
        return F.scaled_dot_product_attention(query, key, value, mask).flatten(2) @ w_o

    said = second_line("multi_head_attention", multi_head_attention)
    assert "in which the heads of each token attend to one another." in said


def test_repeating_the_heads_in_the_wrong_order_is_told_so():
    def grouped_query_attention(query, key, value, mask=None):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat(1, group, 1, 1), value.repeat(1, group, 1, 1)
        return F.scaled_dot_product_attention(query, key, value, mask)

    said = second_line("grouped_query_attention", grouped_query_attention)
    assert said.startswith(
        "Your result equals grouped-query attention with key/value head i % h_kv for query head i."
    )


def test_the_output_in_the_place_of_its_terms_is_told_so():
    def head_contributions(heads, w_o):
        return merge(heads) @ w_o

    said = second_line("head_contributions", head_contributions)
    assert said.startswith("Your result equals the contributions summed over the heads.")
