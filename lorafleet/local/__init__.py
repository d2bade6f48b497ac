"""The fleets on this machine, as the commands of the same user see them."""
