"""The exercises of chapter 05: what their checks reject, accept, and say."""

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
    chapter = "05_residual_and_layer_norm"
    least_held_apart = (200, 45)


def said(id, function):
    """The lines of the message, the first one without its mark and the exercise's id."""
    first, *rest = judge(find(id), function).lines
    return [first.removeprefix(f"✗ {id}: "), *rest]


def test_the_chapter_leads_from_a_norm_to_a_block():
    ids = [exercise.id for exercise in chapter_exercises("05_residual_and_layer_norm")]
    assert ids == ["layer_norm", "rms_norm", "swiglu", "dropout", "block"]


# --- the two famous errors of layer norm, and the one that has both ------------------------------


def centred(x):
    return x - x.mean(-1, keepdim=True)


def test_the_unbiased_variance_is_told_so():
    def layer_norm(x, weight, bias, eps=1e-5):
        return centred(x) / torch.sqrt(x.var(-1, keepdim=True) + eps) * weight + bias

    first, second, third = said("layer_norm", layer_norm)
    want = "“with weight 1 and bias 0 each token has the variance 1, divided by d” does not hold."
    assert first == want
    assert second.startswith("Your result equals layer norm with the unbiased variance.")
    assert third == "Which argument of `var` and `std` makes them divide by d?"


def test_eps_outside_the_root_is_told_from_eps_inside():
    def layer_norm(x, weight, bias, eps=1e-5):
        return centred(x) / (x.std(-1, correction=0, keepdim=True) + eps) * weight + bias

    first, second, third = said("layer_norm", layer_norm)
    assert first == "“with a variance of 1, eps = 3 makes the result half as large” does not hold."
    assert second.startswith("Your result equals layer norm with ε outside the root.")
    assert third == "Is ε added before the root is taken, or after?"


def test_both_at_once_have_a_name_of_their_own():
    def layer_norm(x, weight, bias, eps=1e-5):
        return weight * centred(x) / (x.std(-1, keepdim=True) + eps) + bias

    _, second, _ = said("layer_norm", layer_norm)
    want = "Your result equals layer norm with the unbiased standard deviation plus ε."
    assert second.startswith(want)


def test_a_variance_that_loses_its_digits_is_found():
    def layer_norm(x, weight, bias, eps=1e-5):
        variance = x.square().mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2
        return centred(x) * torch.rsqrt(variance + eps) * weight + bias

    first, second, _ = said("layer_norm", layer_norm)
    assert first == "“gives the right numbers for every size” does not hold."
    assert "a difference of squares" in second


def test_an_rms_norm_that_subtracts_the_mean_is_told_so():
    first, second, _ = said(
        "rms_norm", lambda x, weight, eps=1e-5: F.layer_norm(x, weight.shape, weight, None, eps)
    )
    assert first == "“a token whose features are all 3 comes out as the weight” does not hold."
    assert second.startswith("Your result equals layer norm without the bias.")


# --- the other three -----------------------------------------------------------------------------


def test_silu_on_the_wrong_branch_is_told_so():
    first, second, _ = said(
        "swiglu", lambda x, gate, up, down: ((x @ gate) * F.silu(x @ up)) @ down
    )
    want = "“a gate far above 0 multiplies its feature, one far below 0 closes it” does not hold."
    assert first == want
    assert second.startswith("Your result equals SwiGLU with silu on the other branch.")


def test_dropout_left_on_in_evaluation_is_told_so():
    first, second, third = said(
        "dropout", lambda x, noise, p=0.1, training=True: x * (noise >= p) / (1 - p)
    )
    assert first == "“in evaluation x comes back unchanged” does not hold."
    assert second.startswith("Your result equals dropout that is left on in evaluation.")
    assert third == "What should happen to x when training is False?"


def test_dropout_with_noise_of_its_own_is_told_so():
    def dropout(x, noise, p=0.1, training=True):
        return F.dropout(x, p, training)

    assert judge(find("dropout"), dropout).mistake == "another result each time"


def test_a_post_norm_block_in_place_of_pre_norm_is_told_so():
    def block(x, attention, feed_forward, norm_1, norm_2, norm_first=True):
        x = norm_1(x + attention(x))
        return norm_2(x + feed_forward(x))

    first, second, third = said("block", block)
    assert first == "“pre-norm: sublayers that give 0 leave x as it is” does not hold."
    want = "Your result equals a post-norm block, whatever norm_first says. "
    assert second == want + "The argument norm_first has no effect."
    assert third == "What should happen when norm_first is True?"


def test_a_mistake_in_one_arm_is_named_with_the_inputs_where_it_shows():
    def block(x, attention, feed_forward, norm_1, norm_2, norm_first=True):
        if norm_first:
            return feed_forward(norm_2(x + attention(norm_1(x))))
        x = norm_1(x + attention(x))
        return norm_2(x + feed_forward(x))

    _, second, _ = said("block", block)
    assert second.startswith("For x (1, 2, 2), attention = causal_mean, ")
    assert second.endswith("equals a block without the residual around feed_forward.")


def test_a_block_is_shown_numbers_that_can_be_followed_by_hand():
    def block(x, attention, feed_forward, norm_1, norm_2, norm_first=True):
        return x + 2 * attention(norm_1(x))

    _, second, _ = said("block", block)
    functions = "attention = causal_mean, feed_forward = square, norm_1 = minus_mean, norm_2 = half"
    assert second.startswith("For x = [[[")
    assert f"]]], {functions}: got [[[" in second
