"""What every service process needs: settings, logging and signals, metrics, secrets."""
