"""What a recomputation repeats: choices that are made while a checkpointed function runs."""

from __future__ import annotations

from flashbias_patch.attention.recovery.replay import Replay


def run(replay, choices, count=2):
    return [replay.once(lambda: next(choices)) for _ in range(count)]


def test_a_choice_is_made_in_the_first_run_only():
    choices, replay = iter("abc"), Replay(None)
    assert run(replay, choices) == ["a", "b"]
    for _ in range(2):
        replay.begin_again()
        assert run(replay, choices) == ["a", "b"]
    assert next(choices) == "c"  # none was drawn again


def test_a_nested_function_repeats_the_choices_of_the_one_around_it():
    choices, outer = iter("abc"), Replay(None)
    assert run(Replay(outer), choices) == ["a", "b"]
    outer.begin_again()
    again = Replay(outer)  # a recomputation of the outer one runs the inner one anew
    assert run(again, choices) == ["a", "b"]
    again.begin_again()
    assert run(again, choices) == ["a", "b"]
    assert next(choices) == "c"
