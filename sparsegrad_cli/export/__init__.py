"""Export a run in a form that other libraries load, and check that both compute the same."""
