"""From a run to something that runs elsewhere, and the check that both answer alike."""
