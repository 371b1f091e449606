"""batches → trained state: objectives, optimizer, sharding, checkpoints and the loop."""
