"""The exercises of chapter 10: what their checks reject, accept, and say."""

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
    chapter = "10_encoder_decoder"
    least_held_apart = (140, 28)


def said(id, function):
    return judge(find(id), function).lines


def test_the_chapter_leads_from_teacher_forcing_to_bleu():
    ids = [exercise.id for exercise in chapter_exercises("10_encoder_decoder")]
    assert ids == [
        "teacher_forcing",
        "scheduled_sampling",
        "bahdanau_scores",
        "beam_step",
        "bleu_precision",
    ]


# --- our answers are what they are used for -------------------------------------------------------


def test_the_loss_on_the_outputs_counts_each_real_token_and_one_stop():
    targets = torch.tensor([[5, 6, 7], [5, 0, 0], [0, 0, 0]])
    _, outputs = find("teacher_forcing").reference(targets, 1, 2, 0)
    loss = F.cross_entropy(torch.zeros(3, 8, 4), outputs, reduction="sum")
    torch.testing.assert_close(loss, 7 * torch.tensor(8.0).log())


def test_the_share_of_predictions_is_the_share_asked_for():
    gold, predicted = torch.zeros(100, 101).long(), torch.ones(100, 101).long()
    coins = torch.rand(100, 101, generator=torch.Generator().manual_seed(0))
    read = find("scheduled_sampling").reference(gold, predicted, coins, 0.3)
    assert read[:, 1:].float().mean() == pytest.approx(0.3, abs=0.02)


def test_beam_steps_with_room_for_all_find_the_likeliest_sentence():
    """Two steps of a model whose tokens depend on the one before, against all nine sentences."""
    first, then = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).split([1, 3])
    first, then = first.log_softmax(-1), then.log_softmax(-1)
    step = find("beam_step").reference
    scores, _, token = step(torch.zeros(1, 1), first[None], 3)
    scores, parent, last = step(scores, then[token], 1)
    every = first.T + then  # (first token, second token)
    best = divmod(every.argmax().item(), 3)
    assert (token[0, parent[0, 0]].item(), last.item()) == best
    torch.testing.assert_close(scores[0, 0], every.max())


def test_the_n_grams_of_bleu_are_those_of_sacrebleu():
    bleu = pytest.importorskip("sacrebleu").BLEU(tokenize="none", smooth_method="none")
    g = torch.Generator().manual_seed(0)
    for size in (4, 7, 12):
        candidate, reference = torch.randint(5, (2, size), generator=g)
        texts = [" ".join(map(str, ids.tolist())) for ids in (candidate, reference)]
        score = bleu.corpus_score([texts[0]], [[texts[1]]])
        ours = [find("bleu_precision").reference(candidate, reference, n) for n in (1, 2, 3, 4)]
        assert torch.stack(ours).T.tolist() == [score.counts, score.totals]


# --- famous traps ---------------------------------------------------------------------------------


def test_a_stop_token_behind_the_padding_is_told_so():
    def teacher_forcing(targets, start, stop, pad):
        whole = F.pad(F.pad(targets, (1, 0), value=start), (0, 1), value=stop)
        return whole[:, :-1], whole[:, 1:]

    assert said("teacher_forcing", teacher_forcing) == (
        "✗ teacher_forcing: “each row stops once, right behind its last real token” does not hold.",
        "Your result equals the pair with the padding to be said, and stop behind it. The model is "
        "taught to say pad, and to end where the longest row ends.",
        "Which number does `F.cross_entropy` ignore, and where should it stand?",
    )


def test_a_stop_token_that_is_ignored_as_padding_is_told_so():
    def teacher_forcing(targets, start, stop, pad):
        inputs = F.pad(targets, (1, 0), value=start)
        outputs = F.pad(targets, (0, 1), value=pad)
        outputs[torch.arange(len(targets)), (targets != pad).sum(1)] = stop
        return inputs, outputs.masked_fill(outputs == pad, -100)

    lines = said("teacher_forcing", teacher_forcing)
    assert lines[0] == (
        "✗ teacher_forcing: “stop is learned where it is the padding token's id, too” does not "
        "hold."
    )
    assert lines[1].startswith(
        "Your result equals the pair with stop ignored where it is the padding token's id."
    )


def test_a_replaced_start_token_is_told_so():
    lines = said("scheduled_sampling", lambda gold, p, coins, s: torch.where(coins < s, p, gold))
    assert lines[0] == (
        "✗ scheduled_sampling: “the start token stays, whatever its coin” does not hold."
    )
    assert lines[1].startswith("Your result equals the mix with the start token replaced.")


def test_coins_of_ones_own_are_told_so():
    def scheduled_sampling(gold, predicted, coins, share):
        use = torch.rand(gold.shape) < share
        use[:, 0] = False
        return torch.where(use, predicted, gold)

    line = said("scheduled_sampling", scheduled_sampling)[1]
    assert line.endswith("Called again with the same inputs, your function gives something else.")


def test_scores_without_tanh_are_told_so():
    lines = said("bahdanau_scores", lambda q, k, w, u, v: ((q @ w)[:, None] + k @ u) @ v)
    assert lines == (
        "✗ bahdanau_scores: “with widths of 1 the score is v · tanh(q w + k u)” does not hold.",
        "Your result equals the scores without tanh. v · (q W + k U) is linear: the query adds the "
        "same number to all scores, and softmax loses it.",
        "Which function stands between the sum and v?",
    )


def test_a_query_that_meets_another_sentence_is_told_so():
    lines = said("bahdanau_scores", lambda q, k, w, u, v: (q @ w + k @ u).tanh() @ v)
    assert lines[1].startswith(
        "Elsewhere your result equals the scores with the queries laid along the keys."
    )


def test_a_beam_for_each_beam_is_told_so():
    def beam_step(scores, log_probs, num_beams):
        best, token = (scores[..., None] + log_probs).max(-1)
        return best, torch.arange(scores.shape[1]).expand_as(token), token

    lines = said("beam_step", beam_step)
    assert lines[0] == "✗ beam_step: “one beam is continued by its likeliest tokens” does not hold."
    assert lines[1].startswith("Your result equals the step with one child for each beam.")


def test_swapped_parents_and_tokens_are_told_so():
    def beam_step(scores, log_probs, num_beams):
        best, place = (scores[..., None] + log_probs).flatten(1).topk(num_beams)
        return best, place % log_probs.shape[-1], place // log_probs.shape[-1]

    assert said("beam_step", beam_step)[1:] == (
        "Your result equals the step with parent and token swapped. A row of places is beam after "
        "beam, V tokens each.",
        "Place p lies in a row of beams · V totals. How many places belong to one beam?",
    )


def test_counts_that_are_not_clipped_are_told_so():
    def bleu_precision(candidate, reference, n):
        ours, theirs = (
            [ids[i : i + n].tolist() for i in range(len(ids) - n + 1)]
            for ids in (candidate, reference)
        )
        return torch.tensor([sum(gram in theirs for gram in ours), len(ours)])

    assert said("bleu_precision", bleu_precision) == (
        "✗ bleu_precision: “a token said three times matches once where the reference has it once” "
        "does not hold.",
        "Your result equals the counts without clipping. Every n-gram that the reference has "
        "counts, as often as the candidate says it.",
        "How often may an n-gram count that the reference has once?",
    )
