"""Files of models ⇄ (ModelConfig, parameters): model directories and their cards, the hub, safetensors, PyTorch."""
