"""The modules of a model that adapters change, and each layer's state during a step."""
