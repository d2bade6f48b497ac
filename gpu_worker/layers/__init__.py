"""The modules of a model that adapters change, and what a step keeps of each layer."""
