"""`python -m gpu_worker`: one worker."""

import sys

from gpu_worker.service import serve
from protocol.service import run, set_up_logging
from protocol.settings import Settings

if __name__ == "__main__":
    settings = Settings()
    set_up_logging("worker", settings.log_level, settings.log_format)
    sys.exit(run(lambda stop: serve(settings, stop)))
