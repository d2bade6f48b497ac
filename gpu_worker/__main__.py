"""`python -m gpu_worker`: run one worker until SIGTERM."""

import sys

from gpu_worker.service.program import serve
from protocol.runtime.again import note_start
from protocol.runtime.private_files import use_private_umask
from protocol.runtime.service import run, set_up_logging
from protocol.runtime.settings import Settings

if __name__ == "__main__":
    note_start()
    use_private_umask()
    settings = Settings()
    set_up_logging("worker", settings.log_level, settings.log_format)
    sys.exit(run(lambda stop: serve(settings, stop)))
