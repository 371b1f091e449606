"""Settings → our and other people's attentions, checked and timed: for `hmar-jax bench attention`.

`cases` makes inputs and what to expect of them, `peers` runs attentions, `times` checks and times them, `table` shows
that, `tuning` finds sizes of tiles.
"""
