"""scale inputs → logits: the scale-Markov masked transformer."""
