"""`python -m adapter_store` runs one adapter store."""

import sys

from adapter_store.service import serve
from protocol.runtime.private_files import use_private_umask
from protocol.runtime.service import run, set_up_logging
from protocol.runtime.settings import Settings

if __name__ == "__main__":
    use_private_umask()
    settings = Settings()
    set_up_logging("store", settings.log_level, settings.log_format)
    sys.exit(run(lambda stop: serve(settings, stop), sendfile=True))
