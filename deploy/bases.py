"""Run a command for several base models: $MODELS, separated by commas, becomes LORAFLEET_MODEL and …_MORE_MODELS.

Without MODELS the command runs as it is. A worker begins with one base, and replicas of a container do not know their
number: with $BASE_LOCKS, a folder that all of this machine share, each takes the first base that the fewest have taken,
as $LORAFLEET_BASE.
"""

import fcntl
import os
import sys
from collections.abc import MutableMapping, Sequence
from itertools import count
from pathlib import Path

from protocol.runtime.model_files import served_name


def claim(models: Sequence[str], folder: Path) -> str:
    """Take a base for as long as this process lives, also once it executes another program. Returns its model.

    folder: of the locks; every base has one for its first worker, one for its second, and so on.
    """
    for number in count():
        turn, i = divmod(number, len(models))
        lock = os.open(folder / f"base-{i}-{turn}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        os.set_inheritable(lock, True)
        return models[i]
    raise AssertionError  # there is always a next one


def set_models(variables: MutableMapping[str, str]) -> None:
    """Set the settings of a service of these bases. Raises OSError if the locks cannot be made."""
    models = list(dict.fromkeys(name.strip() for name in variables.get("MODELS", "").split(",") if name.strip()))
    if models:
        variables["LORAFLEET_MODEL"], variables["LORAFLEET_MORE_MODELS"] = models[0], ",".join(models[1:])
        if "BASE_LOCKS" in variables:
            own = claim(models, Path(variables["BASE_LOCKS"]))
            # A served name is the default base's alone.
            given = variables.get("LORAFLEET_SERVED_NAME", "") if own == models[0] else ""
            variables["LORAFLEET_BASE"] = served_name(own, given)


if __name__ == "__main__":
    set_models(os.environ)
    os.execvp(sys.argv[1], sys.argv[1:])
