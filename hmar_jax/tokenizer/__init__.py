"""image ⇄ tokens: the multi-scale residual VQ-VAE and its training losses."""
