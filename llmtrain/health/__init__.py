"""What watches a run: signals now; spikes, heartbeats and hangs build on the same agreement."""
