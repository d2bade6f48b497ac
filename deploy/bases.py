"""Run a command for several base models: $MODELS, separated by commas, becomes LORAFLEET_MODEL and …_MORE_MODELS.

Without MODELS the command runs unchanged. A worker starts with one base, and replicas of a container do not know their
number. With $BASE_LOCKS, a folder shared by all containers of a machine, each replica takes the first of the bases
taken by the fewest replicas, as $LORAFLEET_BASE.
"""

import os
import sys
from collections.abc import MutableMapping, Sequence
from itertools import count
from pathlib import Path

from protocol.runtime.file_locks import lock_first
from protocol.runtime.model_files import served_name


def claim(models: Sequence[str], folder: Path) -> str:
    """Lock a base until this process ends, even if it executes another program. Return the base's model.

    folder: holds the locks; each base has one lock for its first worker, one for its second, and so on.
    """
    turns = (divmod(number, len(models)) for number in count())
    lock = lock_first((folder / f"base-{i}-{turn}.lock" for turn, i in turns), inherited=True)
    assert lock is not None  # there is always a next number
    return models[int(lock.name.split("-")[1])]


def set_models(variables: MutableMapping[str, str]) -> None:
    """Set the environment variables of a service for these bases. Raises OSError if the locks cannot be created."""
    models = list(dict.fromkeys(name.strip() for name in variables.get("MODELS", "").split(",") if name.strip()))
    if models:
        variables["LORAFLEET_MODEL"], variables["LORAFLEET_MORE_MODELS"] = models[0], ",".join(models[1:])
        if "BASE_LOCKS" in variables:
            own = claim(models, Path(variables["BASE_LOCKS"]))
            # Only the default base has a served name.
            given = variables.get("LORAFLEET_SERVED_NAME", "") if own == models[0] else ""
            variables["LORAFLEET_BASE"] = served_name(own, given)


if __name__ == "__main__":
    set_models(os.environ)
    os.execvp(sys.argv[1], sys.argv[1:])
