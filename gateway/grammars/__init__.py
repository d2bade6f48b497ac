"""What clients demand of an answer's form, as grammars."""
