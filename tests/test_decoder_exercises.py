"""The exercises of chapter 09: what their checks reject, accept, and say."""

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
    chapter = "09_decoder"
    least_held_apart = (260, 36)

    @classmethod
    def most_numbers(cls, id):
        return 18 if id == "cached_attention" else 12  # three weight matrices and a cache


def test_the_chapter_leads_from_pairs_of_tokens_to_the_cache():
    ids = [exercise.id for exercise in chapter_exercises("09_decoder")]
    assert ids == [
        "next_token_pairs", "next_token_loss", "temperature_top_k", "top_p", "cached_attention",
    ]  # fmt: skip


def test_pairs_that_are_swapped_are_told_so():
    verdict = judge(find("next_token_pairs"), lambda tokens: (tokens[:, 1:], tokens[:, :-1]))
    assert verdict.lines == (
        "✗ next_token_pairs: “the targets are the tokens that follow the inputs” does not hold.",
        "Your result equals the pair with inputs and targets swapped. The model reads token i + 1 "
        "and is asked for token i: it learns to write backwards.",
        "After token 0 has been read, which token should be predicted?",
    )


def test_a_second_shift_in_the_loss_is_told_so():
    def shifted(logits, targets):
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), targets[:, 1:])

    verdict = judge(find("next_token_loss"), shifted)
    assert verdict.mistake == "the loss with the logits shifted against the targets"
    assert verdict.lines[2] == "Which target answers the logits at position 0?"


def test_a_target_of_minus_100_used_as_an_index_is_not_blamed_on_the_size():
    def forgetful(logits, targets):
        return -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()

    verdict = judge(find("next_token_loss"), forgetful)
    assert verdict.lines[0].startswith(
        "✗ next_token_loss: your code raised RuntimeError: index -100 is out of bounds"
    )
    assert verdict.mistake is None


def test_tokens_removed_after_softmax_are_told_to_leave_a_gap():
    def gap(logits, temperature=1.0, top_k=None):
        p = (logits / temperature).softmax(-1)
        return p if top_k is None else p * (p >= p.topk(top_k).values[:, -1:])

    verdict = judge(find("temperature_top_k"), gap)
    assert verdict.lines[0] == "✗ temperature_top_k: “each row sums to 1” does not hold."
    assert verdict.lines[2] == "What do the probabilities that are left sum to?"


def test_the_token_that_crosses_p_is_missed():
    def short(probabilities, p):
        ordered, order = probabilities.sort(-1, descending=True)
        keep = torch.zeros_like(ordered).scatter(-1, order, (ordered.cumsum(-1) <= p).float())
        kept = probabilities * keep
        return kept / kept.sum(-1, keepdim=True)

    verdict = judge(find("top_p"), short)
    assert verdict.lines[0] == "✗ top_p: “the token that crosses p is kept” does not hold."
    assert verdict.mistake == "top-p without the token that crosses p"


def test_a_mask_of_the_sorted_tokens_on_the_unsorted_ones_is_told_so():
    def unsorted(probabilities, p):
        ordered = probabilities.sort(-1, descending=True).values
        kept = probabilities * (ordered.cumsum(-1) - ordered < p)
        return kept / kept.sum(-1, keepdim=True)

    assert judge(find("top_p"), unsorted).lines[2] == (
        "The sorted row has lost the order of the vocabulary: how do you get back?"
    )


def with_pytorch(**options):
    """Attention with a cache whose mask is left to PyTorch."""

    def answer(x, cache, w_q, w_k, w_v, num_heads):
        query, key, value = (
            (x @ w).unflatten(-1, (num_heads, -1)).transpose(1, 2) for w in (w_q, w_k, w_v)
        )
        cache = torch.cat([cache, torch.stack([key, value])], dim=-2)
        heads = F.scaled_dot_product_attention(query, *cache, **options)
        return heads.transpose(1, 2).flatten(2), cache

    return answer


def test_pytorchs_is_causal_is_told_to_start_at_the_wrong_corner():
    verdict = judge(find("cached_attention"), with_pytorch(is_causal=True))
    assert verdict.mistake == "cached attention under a mask aligned at the top left"
    assert verdict.lines[2] == "New token i stands at position t + i: which keys may it see?"


def test_several_new_tokens_without_a_mask_are_told_that_they_see_the_future():
    verdict = judge(find("cached_attention"), with_pytorch())
    assert verdict.mistake == "cached attention without a mask among the new tokens"
