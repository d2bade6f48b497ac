"""What every service must interpret identically: `wire`, `queue` and `runtime`. No torch, no HTTP framework."""
