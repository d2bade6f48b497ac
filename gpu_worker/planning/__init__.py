"""The engine's sequences, and the choice of the tokens that the next step computes."""
