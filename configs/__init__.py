"""Train configs: each file's `get_config()` returns the `TrainConfig` of one stage as an ml_collections ConfigDict."""
