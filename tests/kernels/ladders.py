"""Ladders to draw for property tests: 1 to 14 scales with sides 1 to 40, most of them small."""

from hypothesis import strategies as st

from hmar_jax.scales import ScaleLadder

# Drawn first, so that few ladders have thousands of tokens.
LARGEST_SIDES = (5, 8, 8, 10, 14, 14, 14, 18, 40)


def _sides(largest: int) -> st.SearchStrategy[set[int]]:
    """As many as often as few."""
    number = st.integers(1, min(largest, 14))
    return number.flatmap(lambda n: st.sets(st.integers(1, largest), min_size=n, max_size=n))


ladders = st.sampled_from(LARGEST_SIDES).flatmap(_sides).map(lambda sides: ScaleLadder(sorted(sides)))
