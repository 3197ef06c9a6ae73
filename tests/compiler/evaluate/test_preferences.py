"""The share of preferences that an adapter gets right: by what an answer gains over the original."""

from onelayer.compiler.evaluate.samples import Pair
from onelayer.compiler.evaluate.scoring import SampleScores


def scores(*losses: float) -> SampleScores:
    return SampleScores(list(losses), [0] * len(losses), [1] * len(losses))


def test_a_preference_is_right_by_the_gain_and_not_by_the_likelihood() -> None:
    original = scores(1.0, 3.0, 3.0, 1.0, 2.0, 2.0)
    adapted = scores(0.9, 2.0, 2.0, 0.9, 1.5, 2.5)
    # The better answer is likelier in the first pair, and the worse one gained more; the second pair is its reverse.
    pairs = [Pair(0, 1), Pair(2, 3), Pair(4, None), Pair(None, 4), Pair(None, 5), Pair(5, None)]
    assert [adapted.right_preferences(original, [pair]) for pair in pairs] == [0, 1, 1, 0, 1, 0]
    assert adapted.right_preferences(original, pairs) == 3
