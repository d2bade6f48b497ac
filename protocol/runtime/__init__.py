"""What every service process needs: settings, logging, signals, tracing and secrets."""
