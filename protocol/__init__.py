"""What every service must understand the same way: `wire`, `queue` and `runtime`. No torch, no HTTP framework."""
