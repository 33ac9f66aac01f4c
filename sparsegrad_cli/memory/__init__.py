"""What a run is measured by: scores, memory by phase and category, time, environment."""
