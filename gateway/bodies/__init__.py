"""What the bodies of all APIs share: JSON reading within limits, field types, and the list of all parameters."""
