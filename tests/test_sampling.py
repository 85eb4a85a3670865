"""Sampling keeps the model's distribution; `benchmarks/distribution.py` shows the same with 20,000 draws."""

from distribution import total_variation


def test_total_variation_is_within_noise():
    told = total_variation(1_200)
    assert told["tokens_per_forward"] > 1.3
    assert told["total_variation"] < 1.35 * told["expected_of_exact_sampler"]
