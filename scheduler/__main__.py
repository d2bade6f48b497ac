"""`python -m scheduler`: run one scheduler until a signal ends it."""

import sys

from protocol.runtime.private_files import use_private_umask
from protocol.runtime.service import run, set_up_logging
from protocol.runtime.settings import Settings
from scheduler.service import serve

if __name__ == "__main__":
    use_private_umask()
    settings = Settings()
    set_up_logging("scheduler", settings.log_level, settings.log_format)
    sys.exit(run(lambda stop: serve(settings, stop)))
