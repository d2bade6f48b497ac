"""The stages of a call, from token ids to the answer: resolve, tokenize, constrain, admit, submit, follow, write."""
