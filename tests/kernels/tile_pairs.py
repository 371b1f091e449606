"""Which tiles of queries and keys hold something visible, counted pair by pair."""


def visible_pairs(ranges, queries, keys):
    """(query tile, key tile) → its visible pairs, where there are any; queries beyond L see what the last one does."""
    rows = [*ranges.tolist(), *[ranges[-1].tolist()] * (-len(ranges) % queries)]
    table = {}
    for i, (start, end) in enumerate(rows):
        for j in range(start, end):
            pair = i // queries, j // keys
            table[pair] = table.get(pair, 0) + 1
    return table
