"""Kills a real fleet at random while clients are served, and checks every byte they got. `python -m chaos --help`."""
