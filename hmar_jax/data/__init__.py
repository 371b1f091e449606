"""Where examples come from: rendered glyphs, picture folders, TFDS, token caches; and the grain pipeline over them."""
