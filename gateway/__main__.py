"""`python -m gateway`: one gateway in this process, configured by `LORAFLEET_*` variables."""

from __future__ import annotations

import sys

from gateway.service import serve
from protocol.runtime.private_files import use_private_umask
from protocol.runtime.service import run, set_up_logging
from protocol.runtime.settings import Settings


def main() -> int:
    """Run until a signal; return the exit code."""
    use_private_umask()
    settings = Settings()
    set_up_logging("gateway", settings.log_level, settings.log_format)
    return run(lambda stop: serve(settings, stop))


if __name__ == "__main__":
    sys.exit(main())
