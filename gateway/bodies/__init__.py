"""What the bodies of all APIs share: JSON and its limits, fields, and the list of all parameters."""
