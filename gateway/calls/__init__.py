"""A call from its tokens to its answer: submitted, followed, written."""
