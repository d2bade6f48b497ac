"""Those who mean harm while the others are served."""
