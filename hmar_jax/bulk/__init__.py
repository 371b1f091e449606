"""What a `Model` and many pictures are needed for: samples of classes, token caches, traces of a sample's growth."""
