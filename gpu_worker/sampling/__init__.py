"""From logits to a token: penalties, grammars, log probabilities and sampling."""
