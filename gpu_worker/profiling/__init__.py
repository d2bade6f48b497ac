"""What the steps of an engine spend their time on."""
