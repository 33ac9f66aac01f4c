"""Scripts behind every claim of speed, memory or quality."""
