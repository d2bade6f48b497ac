"""The engine: chooses the tokens of a step, computes the step and emits outputs."""
